"""From a measured model to a suggested plan, and the files that `analyze` writes: numbers, pictures, plan.yaml."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from exporter.analysis.dependency import Dependency, measure_dependency
from exporter.analysis.pictures import pictures_of
from exporter.analysis.plan import (
    Constraints,
    Drop,
    Group,
    ParallelGroup,
    has_droppable_attention,
    suggest_drops,
    suggest_fusion,
    suggest_parallel,
)
from exporter.analysis.plan_text import Gain, plan_text, suggested_plan
from exporter.errors import PlanError
from exporter.graph import ModelGraph
from exporter.hidden_states import DEFAULT_BUDGET_BYTES
from exporter.manifests import DEPENDENCY_FILE, PLAN_FILE
from exporter.passes.drop_attention import drop_attention
from exporter.plan import Plan
from exporter.writers.files import json_bytes

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, what comes next)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a suggested plan should do."""

    drop: int = 0  # attentions
    greedy: bool = False  # measure again after each drop, one pass over the weights each
    parallel: int = 0  # groups of full blocks
    window: int = 4  # blocks of such a group
    constraints: Constraints = field(default_factory=Constraints)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A plan in pieces, each with its reason."""

    drops: Sequence[Drop]
    fuse: Sequence[Group]
    parallel: Sequence[ParallelGroup]

    @property
    def plan(self) -> Plan:
        return suggested_plan(drops=self.drops, fuse=self.fuse, parallel=self.parallel)


def suggest(
    graph: ModelGraph,
    dependency: Dependency,
    wishes: Wishes,
    *,
    tokens: np.ndarray | None = None,
    device: str = "cpu",
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    progress: Progress | None = None,
) -> Suggestion:
    """Suggest a plan for a measured graph.

    Args:
        dependency: of the whole graph, all kinds.
        tokens: int64 [N, S], needed for greedy drops; they are measured on `device`, with `budget_bytes` as there.

    Raises:
        PlanError: more drops than attentions (that were measured), or limits that no model could meet.
    """
    check_wishes(graph, wishes)
    drops = suggest_drops(graph, dependency, count=wishes.drop) if wishes.drop else []
    if len(drops) < wishes.drop:
        raise PlanError("fewer attentions were measured", expected=f"at most {len(drops)} drops", found=wishes.drop)
    if wishes.greedy:
        if tokens is None:
            raise AssertionError("Bug: greedy drops are measured, and there is nothing to measure them on")
        drops = greedy_drops(
            graph, dependency, tokens, wishes.drop, device=device, budget_bytes=budget_bytes, progress=progress
        )
    dropped = drop_attention(graph, [drop.layer for drop in drops]) if drops else graph
    parallel = (
        suggest_parallel(dropped, dependency, window=wishes.window, count=wishes.parallel) if wishes.parallel else []
    )
    return Suggestion(drops=drops, fuse=suggest_fusion(dropped, dependency, wishes.constraints), parallel=parallel)


def check_wishes(graph: ModelGraph, wishes: Wishes, *, blocks: tuple[int, int] | None = None) -> None:
    """Raise PlanError if there are fewer attentions than are to be dropped; cheap, for use before long work.

    Args:
        blocks: first and last of those that will be measured; None: all.
    """
    first, last = blocks or (0, len(graph.blocks) - 1)
    count = sum(map(has_droppable_attention, graph.blocks[first : last + 1]))
    if count < wishes.drop:
        whose = "the model has" if blocks is None else "the layers to measure have"
        raise PlanError(f"{whose} fewer attentions to drop", expected=f"at most {count}", found=wishes.drop)


def greedy_drops(
    graph: ModelGraph,
    dependency: Dependency,
    tokens: np.ndarray,
    count: int,
    *,
    device: str = "cpu",
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    progress: Progress | None = None,
) -> list[Drop]:
    """Take the least important attention, measure what is left again, and so on: one pass over the weights each.

    Args:
        dependency: of the graph; the same blocks are measured again, and the logits where it has their divergence.
        count: no more attentions than these blocks have.
        device, budget_bytes: as for `measure_dependency`.

    Raises:
        PlanError: the model's output is not finite without any of the attentions that are left.
    """
    drops: list[Drop] = []
    for step in range(count):
        if progress is not None:
            progress(step, count, "greedy drops")
        measured = measure_dependency(
            graph,
            tokens,
            blocks=(dependency.first, dependency.last),
            kinds=("attention",),
            kl=bool(dependency.kl),
            device=device,
            budget_bytes=budget_bytes,
        )
        best = suggest_drops(graph, measured, count=1)
        if not best:
            raise PlanError(
                "without any one of the attentions that are left the model's output is NaN or infinite",
                expected=f"{count} drops",
                found=f"{len(drops)}",
                hint="ask for fewer",
            )
        drops += best
        graph = drop_attention(graph, [best[0].layer])
    return drops


def source_text(dependency: Dependency, text: Path, model: Path) -> str:
    """Where an analysis has its numbers from, one line; a model's folder is often called just "model"."""
    where = "/".join(model.absolute().parts[-2:])
    return f"measured on {dependency.tokens:,} tokens of {text.name}, model in {where}"


def analysis_files(
    dependency: Dependency, suggestion: Suggestion, *, constraints: Constraints, source: str, gain: Gain | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield the files of an analysis: dependency.json, plan.yaml and PNG pictures.

    Args:
        source: where the numbers come from, one line, see `source_text`.
        gain: what a line of the plan is worth, for its reason; see `plan_text`.
    """
    text = plan_text(
        constraints=constraints,
        source=source,
        drops=suggestion.drops,
        fuse=suggestion.fuse,
        parallel=suggestion.parallel,
        gain=gain,
    )
    yield PLAN_FILE, text.encode()
    yield DEPENDENCY_FILE, json_bytes(dependency.to_json())
    for picture in pictures_of(dependency, suggestion.plan):
        yield picture.file, picture.draw("light")
