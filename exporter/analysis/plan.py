"""From structure, measurements and limits to a plan with reasons.

Each kind of suggestion belongs to the graph that its pass will see: drop first, then look for runs to fuse and for
windows of full blocks, in the graph without the dropped attentions (`exporter.pipeline.apply_plan` keeps that order).
Structure alone is enough for fusion; the dependency matrix, where it was measured, steers and limits it.

Layers are the source model's numbers, ranges include both ends. A run is a stretch of blocks without attention that
`exporter.passes.fuse_ffn` could fuse; a group is the part of a run that becomes one FFN.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from exporter.errors import PlanError
from exporter.graph import FFN, Attention, Block, ModelGraph, ParallelBlocks, linears
from exporter.passes.find_blocks import check_order
from exporter.passes.fuse_ffn import WIDTH_MULTIPLE

Kind = Literal["block", "attention", "ffn"]
Measure = Literal["cosine", "kl"]

DEFAULT_WINDOW = 4  # full blocks that run side by side (arXiv:2503.18908, appendix B)
MEASURES = {"cosine": "cosine distance of the last hidden state", "kl": "KL divergence of the logits, nats per token"}


class Measured(Protocol):
    """What of `exporter.analysis.dependency.Dependency` is used here; n blocks, NaN where nothing was measured."""

    @property
    def source_layers(self) -> Sequence[Sequence[int]]: ...  # of every block of the graph that was measured
    @property
    def first(self) -> int: ...  # the n blocks are [first, last], indices in graph.blocks
    @property
    def last(self) -> int: ...
    @property
    def matrices(self) -> Mapping[Kind, np.ndarray]: ...  # [n, n], row i removed, column j compared, i < j
    @property
    def importance(self) -> Mapping[Kind, np.ndarray]: ...  # [n], what the last hidden state loses
    @property
    def kl(self) -> Mapping[Kind, np.ndarray]: ...  # [n], what the logits lose


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What a fused FFN may be. None is no limit; a limit that no two FFNs meet is allowed and gives no groups.

    Raises:
        PlanError: a value that no model could meet.
    """

    max_width: int | None = None  # channels, after padding to WIDTH_MULTIPLE
    max_bytes_per_gpu: int | None = None  # gate, up and down of one fused FFN, as stored, on each of `tp_size` GPUs
    tp_size: int = 1
    max_dependency: float | None = None  # largest M[i, j] in a group; not applied where no matrix was measured
    keep_last: bool = True  # leave the last FFN of a run alone: fusing it costs most (arXiv:2503.18908)
    min_run: int = 2  # runs of fewer FFNs, the last one counted, are left alone

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_width", self.max_width, 1),
            ("max_bytes_per_gpu", self.max_bytes_per_gpu, 1),
            ("tp_size", self.tp_size, 1),
            ("max_dependency", self.max_dependency, 0),
            ("min_run", self.min_run, 2),
        ):
            _check_least(name, value, least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """FFNs to fuse into one."""

    layers: tuple[int, int]
    width: int  # channels, the sum over its FFNs
    padded_width: int  # what fuse_ffn makes of it
    bytes_per_gpu: int  # gate, up and down, padding included, as stored
    dependency: float | None  # the largest M[i, j] of two of its FFNs; None: not measured for all of them
    sublayers_saved: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelGroup:
    """Full blocks to run side by side."""

    layers: tuple[int, int]
    dependency: float  # the largest M[i, j] of two of its blocks
    dependency_sum: float
    sublayers_saved: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """An attention to drop."""

    layer: int
    importance: float  # in units of `measure`
    measure: Measure
    reason: str


# --- Fusion


def suggest_fusion(graph: ModelGraph, dependency: Measured | None, constraints: Constraints) -> list[Group]:
    """Choose the groups of every run that save the most sublayers within the limits.

    Between equal savings a run's largest dependency decides, then how even the widths of its FFNs are afterwards.

    Args:
        graph: without the attentions that the plan drops; may be structure only.
        dependency: measured on this graph, or on it before attentions were dropped; the matrix of FFNs is used, or
            else that of blocks, which is the same for blocks without attention. None: structure and limits decide.
            With `max_dependency`, FFNs that were not measured together are not fused.

    Returns:
        Groups in the order of their layers, each of at least two FFNs.

    Raises:
        PlanError: the measurement belongs to another graph, or has no matrix to use.
    """
    check_order(graph)
    matrix = None if dependency is None else _matrix(graph, dependency, ("ffn", "block"))
    return [
        _group(graph, run, piece, matrix is not None, constraints)
        for run in fusible_runs(graph)
        if len(run) >= constraints.min_run
        for piece in _split(graph, run[: len(run) - constraints.keep_last], matrix, constraints)
    ]


def fusible_runs(graph: ModelGraph) -> list[list[int]]:
    """The maximal stretches of blocks that `fuse_ffn` takes, as indices in `graph.blocks` of those with an FFN.

    An empty block does not end a run (it disappears in it); an attention, a linear sublayer, a parallel group, a
    quantized FFN, and another activation, eps or dtype do.
    """
    runs: list[list[int]] = []
    previous = None
    for index, entry in enumerate(graph.blocks):
        if isinstance(entry, Block) and entry.is_empty:
            continue
        alike = _fusible_as(entry)
        if alike is not None:
            if alike != previous:
                runs.append([])
            runs[-1].append(index)
        previous = alike
    return runs


def _fusible_as(entry: Block | ParallelBlocks) -> tuple[Any, ...] | None:
    """What all FFNs of a run have in common; None for an entry that is in no run."""
    if isinstance(entry, ParallelBlocks) or entry.attention is not None or not isinstance(entry.ffn, FFN):
        return None
    ffn = entry.ffn
    if any(linear.quantization is not None for linear in linears(ffn).values()):
        return None
    dtypes = [linear.weight.dtype.name for linear in linears(ffn).values()]
    return ffn.activation, ffn.norm.eps, *dtypes


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive FFNs of a run, as a candidate for a group."""

    start: int  # positions in the run, stop excluded
    stop: int
    width: int  # channels, without padding
    dependency: float  # the largest of its pairs; infinite: not measured for all of them


def split_run(widths: Sequence[int], candidates: Iterable[Piece]) -> list[Piece]:
    """Choose disjoint candidates; FFNs that none of them holds stay alone.

    The most sublayers saved; then the smallest largest dependency; then the smallest sum of squared widths of the FFNs
    that result, those left alone included. Their number and total width are the same for all choices that save
    equally, so that is the most even choice. The order of the candidates does not matter.

    Args:
        widths: channels of every FFN of the run.
    """
    candidates = list(candidates)
    # One dynamic program for all three criteria would be wrong: a prefix that is best by its own largest dependency
    # need not be part of the best whole, once a later group has a larger one. So the bound is found first.
    most = _saved(_cheapest_cover(widths, candidates))
    bounds = sorted({piece.dependency for piece in candidates})

    def enough(bound: float) -> bool:
        return _saved(_cheapest_cover(widths, [p for p in candidates if p.dependency <= bound])) == most

    if most == 0:
        return []
    bound = bounds[bisect_left(bounds, True, key=enough)]
    return _cheapest_cover(widths, [piece for piece in candidates if piece.dependency <= bound])


def _cheapest_cover(widths: Sequence[int], candidates: Sequence[Piece]) -> list[Piece]:
    """Minimize (-saved, sum of squared widths) over all choices of disjoint candidates."""
    ending: dict[int, list[Piece]] = {}
    for piece in candidates:
        ending.setdefault(piece.stop, []).append(piece)
    best: list[tuple[int, int]] = [(0, 0)]  # of the FFNs before each position
    chosen: list[Piece] = []  # the last part of that best, one FFN alone where start + 1 == stop
    for stop in range(1, len(widths) + 1):
        alone = Piece(stop - 1, stop, widths[stop - 1], 0.0)
        options = []
        for piece in [alone, *ending.get(stop, [])]:
            saved, squares = best[piece.start]
            # The start makes the answer one where choices are equal, whatever the order of the candidates.
            options.append((saved - (piece.stop - piece.start - 1), squares + piece.width**2, -piece.start, piece))
        saved, squares, _, piece = min(options, key=lambda option: option[:3])
        best.append((saved, squares))
        chosen.append(piece)
    cover = []
    stop = len(widths)
    while stop:
        piece = chosen[stop - 1]
        if piece.stop - piece.start > 1:
            cover.append(piece)
        stop = piece.start
    return cover[::-1]


def _saved(cover: Sequence[Piece]) -> int:
    return sum(piece.stop - piece.start - 1 for piece in cover)


def _split(graph: ModelGraph, run: Sequence[int], matrix: np.ndarray | None, constraints: Constraints) -> list[Piece]:
    widths = [_width(_ffn(graph, index)) for index in run]
    return split_run(widths, _candidates(graph, run, widths, matrix, constraints))


def _candidates(
    graph: ModelGraph, run: Sequence[int], widths: Sequence[int], matrix: np.ndarray | None, constraints: Constraints
) -> Iterator[Piece]:
    """Every stretch of at least two FFNs of a run that is within the limits."""
    for start in range(len(run)):
        width, dependency = widths[start], -math.inf
        for stop in range(start + 2, len(run) + 1):
            width += widths[stop - 1]
            if matrix is not None:
                pairs = matrix[run[start : stop - 1], run[stop - 1]]
                dependency = max(dependency, math.inf if np.isnan(pairs).any() else float(pairs.max()))
            # Nothing that begins here and is longer can be within a limit that this exceeds.
            if not _is_allowed(_ffn(graph, run[start]), width, dependency, constraints):
                break
            yield Piece(start, stop, width, math.inf if matrix is None else dependency)


def _is_allowed(ffn: FFN, width: int, dependency: float, constraints: Constraints) -> bool:
    padded = _padded(width)
    limits = (
        (padded, constraints.max_width),
        (_bytes_per_gpu(ffn, padded, constraints.tp_size), constraints.max_bytes_per_gpu),
        (dependency, constraints.max_dependency),
    )
    return all(limit is None or value <= limit for value, limit in limits)


def _group(graph: ModelGraph, run: Sequence[int], piece: Piece, measured: bool, constraints: Constraints) -> Group:
    padded = _padded(piece.width)
    taken = run[piece.start : piece.stop]
    nbytes = _bytes_per_gpu(_ffn(graph, taken[0]), padded, constraints.tp_size)
    known = math.isfinite(piece.dependency)
    whole = _layers(graph, run)
    of_run = f"{len(taken)} of the {len(run)} FFNs of run {list(whole)}"
    if constraints.keep_last:
        of_run += f" (its last, in layer {whole[1]}, stays alone)"
    width = f"width {piece.width:,}" + (f", padded to {padded:,}" if padded != piece.width else "")
    size = f"{bytes_text(nbytes)} per GPU at tensor-parallel size {constraints.tp_size}"
    limit = constraints.max_dependency
    if known:
        dependency = f"largest pairwise dependency {piece.dependency:.3g}"
        dependency += f" (limit {limit:g})" if limit is not None else ""
    elif measured:
        dependency = "dependency not measured for all of its pairs"
    else:
        dependency = "dependency not measured"
        dependency += f", so its limit of {limit:g} was not applied" if limit is not None else ""
    saved = len(taken) - 1
    return Group(
        layers=_layers(graph, taken),
        width=piece.width,
        padded_width=padded,
        bytes_per_gpu=nbytes,
        dependency=piece.dependency if known else None,
        sublayers_saved=saved,
        reason=f"{of_run}; {width}; {size}; {dependency}; saves {sublayers_text(saved)}",
    )


def _ffn(graph: ModelGraph, index: int) -> FFN:
    entry = graph.blocks[index]
    ffn = entry.ffn if isinstance(entry, Block) else None
    assert isinstance(ffn, FFN), f"Bug: block {index} is in no run"
    return ffn


def _width(ffn: FFN) -> int:
    """Channels that an FFN brings into a group: padding of an earlier fusion is cut off there."""
    return ffn.intermediate_size - ffn.padding


def _padded(width: int) -> int:
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _bytes_per_gpu(ffn: FFN, padded_width: int, tp_size: int) -> int:
    """Bytes of gate [F, D], up [F, D] and down [D, F] on one GPU; each holds whole channels. Biases do not count."""
    itemsizes = sum(linear.weight.dtype.itemsize for linear in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
    return -(-padded_width // tp_size) * ffn.hidden_size * itemsizes


# --- Full blocks side by side


def suggest_parallel(
    graph: ModelGraph,
    dependency: Measured,
    *,
    window: int = DEFAULT_WINDOW,
    max_dependency: float | None = None,
    count: int | None = None,
) -> list[ParallelGroup]:
    """Choose windows of full blocks greedily: the least dependent one that does not overlap those chosen before.

    A window's statistic is max over i < j of M[i, j], M the matrix of blocks; equal ones are told apart by the sum,
    then by their place. Source: Bercovich et al., "FFN Fusion", arXiv:2503.18908, appendix B.

    Args:
        window: consecutive blocks with attention in a group; empty blocks between them count for nothing.
        max_dependency: no group with a larger statistic.
        count: no more groups than this.

    Returns:
        Groups in the order they were chosen, best first. Windows that were not measured whole are left out.

    Raises:
        PlanError: a limit is negative or `window` less than two; the measurement belongs to another graph or has no
            matrix of blocks.
    """
    _check_least("window", window, 2)
    _check_least("max_dependency", max_dependency, 0)
    _check_least("count", count, 0)
    check_order(graph)
    matrix = _matrix(graph, dependency, ("block",))
    upper = np.triu_indices(window, 1)
    ranked = []
    for indices in _windows(graph, window):
        pairs = matrix[np.ix_(indices, indices)][upper]
        # With NaN neither the maximum nor the sum is a number to compare.
        if not np.isnan(pairs).any():
            ranked.append((float(pairs.max()), math.fsum(pairs), indices))
    chosen: list[ParallelGroup] = []
    taken: set[int] = set()
    for largest, total, indices in sorted(ranked):
        if len(chosen) == count or (max_dependency is not None and largest > max_dependency):
            break
        if taken.isdisjoint(indices):
            taken.update(indices)
            chosen.append(_parallel_group(graph, indices, largest, total, len(chosen) + 1, max_dependency))
    return chosen


def _windows(graph: ModelGraph, size: int) -> Iterator[list[int]]:
    """Every `size` consecutive blocks with attention, as indices in `graph.blocks`."""
    stretch: list[int] = []
    for index, entry in enumerate(graph.blocks):
        if isinstance(entry, Block) and entry.is_empty:
            continue
        is_full = isinstance(entry, Block) and isinstance(entry.attention, Attention)
        stretch = [*stretch, index][-size:] if is_full else []
        if len(stretch) == size:
            yield stretch


def _parallel_group(
    graph: ModelGraph, indices: Sequence[int], largest: float, total: float, rank: int, limit: float | None
) -> ParallelGroup:
    members = tuple(block for block in (graph.blocks[index] for index in indices) if isinstance(block, Block))
    before = sum(block.sequential_sublayers for block in members)
    saved = before - ParallelBlocks(blocks=members).sequential_sublayers
    within = f" (limit {limit:g})" if limit is not None else ""
    return ParallelGroup(
        layers=_layers(graph, indices),
        dependency=largest,
        dependency_sum=total,
        sublayers_saved=saved,
        reason=f"choice {rank} of the greedy search over windows of {len(members)} full blocks; largest pairwise"
        f" dependency {largest:.3g}{within}, sum {total:.3g}; saves {sublayers_text(saved)}",
    )


# --- Attentions to drop


def suggest_drops(
    graph: ModelGraph,
    dependency: Measured,
    *,
    count: int | None = None,
    max_importance: float | None = None,
    measure: Measure | None = None,
) -> list[Drop]:
    """Rank the attentions (and linears in their place) that can be dropped, the least important first.

    Importance was measured without one attention at a time: the loss of dropping several is not its sum.

    Args:
        count: no more than this.
        max_importance: none that is more important, in units of the measure.
        measure: None is KL divergence where it was measured, else cosine distance.

    Returns:
        Drops in the order of importance, equal ones in the order of their layers. Attentions that were not measured
        are left out, and so are those in parallel groups and fused blocks, which `drop_attention` refuses.

    Raises:
        PlanError: a limit is negative, or the measurement belongs to another graph or lacks the importance.
    """
    _check_least("count", count, 0)
    _check_least("max_importance", max_importance, 0)
    _check_fits(graph, dependency)
    if measure is None:
        measure = "kl" if "attention" in dependency.kl else "cosine"
    importance = (dependency.kl if measure == "kl" else dependency.importance).get("attention")
    if importance is None:
        raise PlanError(f"the importance of attentions was not measured ({MEASURES[measure]})")
    size = dependency.last - dependency.first + 1
    if np.shape(importance) != (size,):
        raise PlanError("importance fits the measured range", expected=[size], found=list(np.shape(importance)))
    ranked = []
    for index, value in enumerate(np.asarray(importance, dtype=np.float64).tolist(), start=dependency.first):
        block = graph.blocks[index]
        if has_droppable_attention(block) and not math.isnan(value):
            ranked.append((value, block.source_layers[0]))
    ranked.sort()
    return [
        Drop(
            layer=layer,
            importance=value,
            measure=measure,
            reason=f"importance {value:.3g}, place {place} of {len(ranked)}; saves {sublayers_text(1)}",
        )
        for place, (value, layer) in enumerate(ranked, start=1)
        if (count is None or place <= count) and (max_importance is None or value <= max_importance)
    ]


def has_droppable_attention(entry: Block | ParallelBlocks) -> bool:
    """Whether `drop_attention` takes the attention (or the linear in its place) of an entry of `ModelGraph.blocks`."""
    return isinstance(entry, Block) and entry.attention is not None and len(entry.source_layers) == 1


# --- Words


def sublayers_text(count: int) -> str:
    return f"{count} sequential sublayer" + ("" if count == 1 else "s")


def bytes_text(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


# --- Graphs and measurements


def _layers(graph: ModelGraph, indices: Sequence[int]) -> tuple[int, int]:
    return graph.blocks[indices[0]].source_layers[0], graph.blocks[indices[-1]].source_layers[-1]


def _check_fits(graph: ModelGraph, dependency: Measured) -> None:
    ours = [list(entry.source_layers) for entry in graph.blocks]
    measured = [list(layers) for layers in dependency.source_layers]
    if ours != measured:
        raise PlanError(
            "the dependencies were measured on another graph",
            expected=f"{len(ours)} blocks of layers {ours[0][0]} to {ours[-1][-1]}" if ours else "no blocks",
            found=f"{len(measured)} blocks" if len(ours) != len(measured) else "other source layers",
        )
    if not 0 <= dependency.first <= dependency.last < len(ours):
        raise PlanError(
            "the measured range is not in the graph",
            expected=f"0 to {len(ours) - 1}",
            found=(dependency.first, dependency.last),
        )


def _matrix(graph: ModelGraph, dependency: Measured, kinds: Sequence[Kind]) -> np.ndarray:
    """The first of these matrices that was measured, for all blocks of the graph: NaN outside the measured range."""
    _check_fits(graph, dependency)
    kind = next((kind for kind in kinds if kind in dependency.matrices), None)
    if kind is None:
        raise PlanError(
            "the dependency matrix to use was not measured",
            expected=" or ".join(kinds),
            found=", ".join(dependency.matrices) or "none",
        )
    measured = np.asarray(dependency.matrices[kind], dtype=np.float64)
    size = dependency.last - dependency.first + 1
    if measured.shape != (size, size):
        raise PlanError("the matrix fits the measured range", expected=[size, size], found=list(measured.shape))
    matrix = np.full((len(graph.blocks), len(graph.blocks)), math.nan)
    matrix[dependency.first : dependency.last + 1, dependency.first : dependency.last + 1] = measured
    return matrix


def _check_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not value >= least:  # not: NaN is no limit either
        raise PlanError(f"{name} is out of range", expected=f">= {least}", found=value)
