"""A suggested plan as the file that people read and edit: plan.yaml, with a comment for every line."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from exporter.analysis.plan import MEASURES, Constraints, Drop, Group, ParallelGroup, bytes_text, sublayers_text
from exporter.plan import Plan, plan_from_data

TEXT_WIDTH = 118  # of plan.yaml

Gain = Callable[[Plan, Plan], str]  # (a plan, the same with one line more) -> what that line is worth


def suggested_plan(
    *, drops: Sequence[Drop] = (), fuse: Sequence[Group] = (), parallel: Sequence[ParallelGroup] = ()
) -> Plan:
    """The suggestions as a plan, in the order that `plan_text` writes them."""
    return plan_from_data(
        {
            "drop_attention": [drop.layer for drop in drops],
            "fuse": [list(group.layers) for group in fuse],
            "parallel": [list(group.layers) for group in parallel],
        }
    )


def plan_text(
    *,
    constraints: Constraints,
    source: str,
    drops: Sequence[Drop] = (),
    fuse: Sequence[Group] = (),
    parallel: Sequence[ParallelGroup] = (),
    gain: Gain | None = None,
) -> str:
    """Write plan.yaml, with a comment that gives the reason for each line.

    Args:
        constraints: those of `suggest_fusion`.
        source: where the numbers come from, one line.
        gain: what a line is worth, "-12 % latency on 8x H100", say, in the graph that its pass sees: drops alone,
            fusions after the drops, parallel groups after both. None: not said.

    Returns:
        Text that `exporter.plan.read_plan` reads as `suggested_plan(...)` of the same suggestions.
    """
    saved = len(drops) + sum(group.sublayers_saved for group in fuse) + sum(p.sublayers_saved for p in parallel)
    dropped, fused = suggested_plan(drops=drops), suggested_plan(drops=drops, fuse=fuse)
    whole = suggested_plan(drops=drops, fuse=fuse, parallel=parallel)

    def worth(without: Plan, with_line: Plan) -> str:
        return "" if gain is None else f": {gain(without, with_line)}"

    lines = [
        *_comment("Suggested plan, to be edited: layers are the source model's numbers, ranges include both ends."),
        *_comment(f"Numbers: {source}"),
        *_comment(f"Limits of fusion: {_limits_text(constraints)}"),
        *_comment(f"All of it saves {sublayers_text(saved)}{worth(Plan(), whole)}."),
        "",
        *_comment(
            "Layers that lose their attention, the least important first: fewer here can mean shorter ranges below."
        ),
        *(_comment(f"Importance: {MEASURES[drops[0].measure]}, without this one attention.") if drops else []),
        *_entries(
            "drop_attention",
            [(drop.layer, drop.reason + worth(Plan(), suggested_plan(drops=[drop]))) for drop in drops],
        ),
        "",
        *_comment("Ranges of layers without attention whose FFNs become one."),
        *_entries(
            "fuse",
            [
                (list(group.layers), group.reason + worth(dropped, suggested_plan(drops=drops, fuse=[group])))
                for group in fuse
            ],
        ),
        "",
        *_comment("Ranges of full layers that run side by side, the least dependent first."),
        *_entries(
            "parallel",
            [
                (list(p.layers), p.reason + worth(fused, suggested_plan(drops=drops, fuse=fuse, parallel=[p])))
                for p in parallel
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _entries(key: str, entries: Sequence[tuple[int | list[int], str]]) -> list[str]:
    if not entries:
        return [f"{key}: []"]
    lines = [f"{key}:"]
    for value, reason in entries:
        lines += [*_comment(reason, indent="  "), f"  - {value}"]
    return lines


def _comment(text: str, indent: str = "") -> list[str]:
    """Comment lines; control characters and line breaks in what callers pass must not end a comment."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    prefix = f"{indent}# "
    return textwrap.wrap(printable, TEXT_WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)


def _limits_text(constraints: Constraints) -> str:
    limits = []
    if constraints.max_width is not None:
        limits.append(f"at most {constraints.max_width:,} channels")
    if constraints.max_bytes_per_gpu is not None:
        limit, tp_size = constraints.max_bytes_per_gpu, constraints.tp_size
        limits.append(f"at most {bytes_text(limit)} ({limit:,} bytes) per GPU at tensor-parallel size {tp_size}")
    if constraints.max_dependency is not None:
        limits.append(f"pairwise dependency at most {constraints.max_dependency:g}")
    limits.append(
        "the last FFN of a run stays alone" if constraints.keep_last else "the last FFN of a run may be taken"
    )
    limits.append(f"runs of at least {constraints.min_run} FFNs")
    return "; ".join(limits) + "."
