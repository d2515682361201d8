"""Where the time of a call went: a profile, and which sublayer a node or kernel belongs to.

A profile is of a run of its own: profiling costs time, so its sum is more than the latency that is measured without.
All of the time of a call is in it: what belongs to no sublayer is "other", what passed between kernels "between".

Nodes of our networks say whose they are (`exporter.writers.onnx_graph`): "blocks.3.attention.qkv_proj" is the product
of block 3, counted over `ModelGraph.flat_blocks`. A runtime that fuses nodes keeps one of their names, or lists them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from exporter.structure import Count, Positive, Sealed

Kind = Literal["attention", "ffn", "embedding", "lm_head", "norm", "other", "between"]
Phase = Literal["prefill", "decode"]
Summary = Literal["median_call", "kernel_medians"]
MOST_KERNELS = 100_000
_BY_STEM: dict[str, Kind] = {"embedding": "embedding", "lm_head": "lm_head", "logits": "lm_head", "norm": "norm"}

Name = Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class KernelTime(Sealed):
    """What one kernel took in one sublayer and call, all of its executions together."""

    kind: Kind  # of sublayer; a norm in front of one is "norm", its residual addition belongs to it
    block: Count | None  # None: of no block
    name: Name  # the op or kernel that ran, as the runtime calls it
    time_us: Amount
    executions: Positive


class Profile(Sealed):
    """A call of one phase, taken apart."""

    phase: Phase
    batch: Positive
    tokens: Positive  # of each sequence in a call: the prompt, or 1
    position: Count  # tokens that each sequence held before the first call that counts
    calls: Positive  # that were profiled
    # Which call this is. "kernel_medians": each execution of a kernel takes its median over the calls, and none ran so
    # as a whole. "median_call": the one of median duration, in files that do not say.
    summary: Summary = "median_call"
    profiler: Name  # what took the times
    total_us: Amount  # of the kernels and what passed between them; profiler included
    kernels: tuple[KernelTime, ...] = Field(max_length=MOST_KERNELS)

    @model_validator(mode="after")
    def _nothing_is_dropped(self) -> Profile:
        found = math.fsum(kernel.time_us for kernel in self.kernels)
        if not math.isclose(found, self.total_us, rel_tol=1e-6, abs_tol=1e-3):
            raise ValueError(f"the kernels take {found} us, the call {self.total_us} us")
        return self


@dataclass(frozen=True, slots=True)
class Place:
    """The sublayer that something belongs to."""

    kind: Kind
    block: int | None = None


OTHER, BETWEEN = Place("other"), Place("between")


@dataclass(frozen=True, slots=True)
class Execution:
    """One kernel that ran once."""

    place: Place
    name: str
    time_us: float


def attention_blocks(structure: dict[str, Any]) -> tuple[int, ...]:
    """The block of every KV slot: blocks that have an attention, counted over flat blocks.

    Args:
        structure: `exporter.graph.structure` of the model.
    """
    blocks = [member for entry in structure["blocks"] for member in entry.get("parallel", [entry])]
    attentions = [(block["attention"] or {}).get("kind") == "attention" for block in blocks]
    return tuple(index for index, is_attention in enumerate(attentions) if is_attention)


def place_of(node: str, slot_blocks: Sequence[int]) -> Place:
    """Say which sublayer a node of one of our networks belongs to, by its name; "other" for any other name.

    Args:
        slot_blocks: the block of every KV slot, for the nodes that write to caches.
    """
    part = re.match(r"blocks\.(\d{1,9})\.(attention|ffn)(?=[./]|$)(\.norm(?=[./]|$))?", node)
    if part is not None:
        kind: Kind = "norm" if part[3] else "attention" if part[2] == "attention" else "ffn"
        return Place(kind, int(part[1]))
    cache = re.match(r"present_[kv]_(\d{1,9})$", node)
    if cache is not None and int(cache[1]) < len(slot_blocks):
        return Place("attention", slot_blocks[int(cache[1])])
    return Place(_BY_STEM.get(re.split(r"[./]", node, maxsplit=1)[0], "other"))


def place_of_all(nodes: Iterable[str], slot_blocks: Sequence[int]) -> Place:
    """Say which sublayer a kernel belongs to that runs several nodes.

    Norms and residual additions run along with their neighbours. A kernel that runs more than that of two sublayers
    belongs to neither: it is "other".
    """
    names = list(nodes)
    places = [place_of(name, slot_blocks) for name in names]
    working = {
        place
        for name, place in zip(names, places, strict=True)
        if place.kind not in ("norm", "other") and not name.endswith("residual")
    }
    if len(working) == 1:
        return working.pop()
    known = [place for place in places if place != OTHER]
    return known[0] if known and not working else OTHER


def profile_of(
    calls: Sequence[tuple[float, Sequence[Execution]]],
    *,
    phase: Phase,
    batch: int,
    tokens: int,
    position: int,
    profiler: str,
) -> Profile:
    """Take a call apart: each execution of a kernel has its median over the calls, and the total is their sum.

    What passed between kernels is an entry of its own, its median likewise. A neighbour that takes the CPU stretches
    the kernel that it interrupts, often beyond the rest of the call; on a busy machine that happens in most calls, the
    one of median duration included. But it rarely hits the same kernel in half of them.

    Args:
        calls: for each call its time in us, as a whole, and the kernels that ran in it, one after the other. The order
            of those that have one place and name says which of them are the same in different calls.
    """
    taken: dict[tuple[Place, str, int], list[float]] = {}  # by place, name and how many such ran before it in its call
    between = []
    for whole, executions in calls:
        before: Counter[tuple[Place, str]] = Counter()
        for execution in executions:
            kernel = (execution.place, execution.name)
            taken.setdefault((*kernel, before[kernel]), []).append(execution.time_us)
            before[kernel] += 1
        between.append(whole - math.fsum(execution.time_us for execution in executions))
    times: dict[tuple[Place, str], list[float]] = {}
    for (place, name, _), found in taken.items():
        absent = [0.0] * (len(calls) - len(found))  # where it did not run
        times.setdefault((place, name), []).append(median([*found, *absent]))
    if (gaps := median(between)) > 0:
        times[BETWEEN, "between kernels"] = [gaps]
    kernels = tuple(
        KernelTime(kind=place.kind, block=place.block, name=name, time_us=math.fsum(found), executions=len(found))
        for (place, name), found in times.items()
    )
    return Profile(
        phase=phase,
        batch=batch,
        tokens=tokens,
        position=position,
        calls=len(calls),
        summary="kernel_medians",
        profiler=profiler,
        total_us=math.fsum(kernel.time_us for kernel in kernels),
        kernels=kernels,
    )
