"""What a plan would gain, and how a model's predicted latency changes with tensor-parallel size and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engines.latency_model import (
    Deployment,
    Memory,
    Prediction,
    Tokens,
    cost_per_million_tokens,
    memory_per_gpu,
    predict,
    stages_of,
    structure_from_graph,
)
from exporter.errors import EngineError
from exporter.graph import ModelGraph
from exporter.pipeline import apply_plan
from exporter.plan import Plan
from exporter.structure import Structure


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What one line of a plan, or all of it, saves per decode step."""

    what: str  # "drop_attention 9", "fuse [66, 73]"
    sublayers_saved: int
    saved_us: tuple[float, ...]  # one per deployment
    saved_share: tuple[float, ...]  # of the decode latency without this line, one per deployment


def plan_gains(graph: ModelGraph, plan: Plan, deployments: Sequence[Deployment], tokens: Tokens) -> list[Gain]:
    """Predict what every line of a plan saves, and last what the whole plan does.

    A line is taken alone, in the graph that its pass sees: fusions in the one without what the plan drops, parallel
    groups also with what it fuses.

    Raises:
        PlanError: the plan does not fit the graph.
        EngineError: a deployment that the model cannot have.
    """
    latencies_of = _latencies(graph, deployments, tokens)
    gains = []
    for what, without, with_line in _lines(plan):
        sublayers, before = latencies_of(without)
        left, after = latencies_of(with_line)
        saved = tuple(was - now for was, now in zip(before, after, strict=True))
        share = tuple(us / was for us, was in zip(saved, before, strict=True))
        gains.append(Gain(what=what, sublayers_saved=sublayers - left, saved_us=saved, saved_share=share))
    return gains


def gain_text(graph: ModelGraph, deployment: Deployment, tokens: Tokens) -> Callable[[Plan, Plan], str]:
    """A function that says what the lines are worth that one plan has beside another: reasons in a suggested plan.

    Raises:
        EngineError: at once, for a deployment that the model cannot have.
    """
    latencies_of = _latencies(graph, [deployment], tokens)
    latencies_of(Plan())

    def text(without: Plan, with_lines: Plan) -> str:
        (before,), (after,) = latencies_of(without)[1], latencies_of(with_lines)[1]
        return (
            f"predicted {before - after:,.0f} us ({100 * (before - after) / before:.1f} %) less per decode step"
            f" on {deployment.name}, {deployment.format.name}"
        )

    return text


def _latencies(
    graph: ModelGraph, deployments: Sequence[Deployment], tokens: Tokens
) -> Callable[[Plan], tuple[int, tuple[float, ...]]]:
    """A function from a plan to the sequential sublayers that it leaves and the latency on every deployment, in us."""
    known: dict[str, tuple[int, tuple[float, ...]]] = {}

    def latencies_of(plan: Plan) -> tuple[int, tuple[float, ...]]:
        key = plan.model_dump_json()
        if key not in known:
            structure = structure_from_graph(apply_plan(graph, plan))
            latencies = tuple(predict(structure, deployment, tokens).latency_us for deployment in deployments)
            known[key] = structure.sequential_sublayers, latencies
        return known[key]

    return latencies_of


def _lines(plan: Plan) -> Iterator[tuple[str, Plan, Plan]]:
    """Yield (what, plan without the line, plan with it), and the whole plan last."""
    without = Plan()
    for key in Plan.model_fields:  # in the order in which a plan is applied
        for entry in getattr(plan, key):
            shown = entry if isinstance(entry, int) else list(entry)
            yield f"{key} {shown}", without, without.model_copy(update={key: [entry]})
        without = without.model_copy(update={key: getattr(plan, key)})
    yield "the whole plan", Plan(), plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model on one deployment at one batch."""

    model: str
    deployment: Deployment
    prediction: Prediction  # of a decode step
    prefill: Prediction  # of a prompt as long as the context
    memory: Memory

    @property
    def batch(self) -> int:
        return self.prediction.tokens.batch

    def cost_per_million_tokens(self, price_per_gpu_hour: float) -> float:
        return cost_per_million_tokens(self.prediction, self.deployment, price_per_gpu_hour)


def possible_tp_sizes(models: Sequence[tuple[str, Structure]], sizes: Sequence[int]) -> list[int]:
    """Those of `sizes` over which the heads of all models can be shared out.

    Raises:
        EngineError: there is none; that of the first size.
    """
    refusals = {}
    for size in sizes:
        try:
            for _, structure in models:
                stages_of(structure, size)
        except EngineError as error:
            refusals[size] = error
    if len(refusals) == len(sizes):
        raise refusals[sizes[0]]
    return [size for size in sizes if size not in refusals]


def sweep(
    models: Sequence[tuple[str, Structure]],
    deployments: Sequence[Deployment],
    *,
    batches: Sequence[int],
    context: int,
) -> list[Point]:
    """Predict every model on every deployment at every batch.

    Raises:
        EngineError: a context that a model was not made for, or a deployment that it cannot have.
    """
    for name, structure in models:
        if context > structure.max_position_embeddings:
            raise EngineError(
                f"{name} was not made for so long a context",
                expected=f"at most {structure.max_position_embeddings:,} tokens",
                found=context,
            )
    return [
        Point(
            model=name,
            deployment=deployment,
            prediction=predict(structure, deployment, Tokens.decode(batch, context)),
            prefill=predict(structure, deployment, Tokens.prefill(batch, context)),
            memory=memory_per_gpu(structure, deployment, batch, context),
        )
        for name, structure in models
        for deployment in deployments
        for batch in batches
    ]
