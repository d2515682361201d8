"""Which blocks depend on which: the paper's matrix, its curves, and what the output loses with each part.

With h_j = what block j adds to its input (f_j(x) - x), and h_j^(i) the same in a model without block i,
    M[i, j] = mean over tokens of cosine_distance(h_j, h_j^(i))            (arXiv:2503.18908, section 3)
and likewise for attention sublayers and for FFN sublayers alone. Small means independent.

All of it takes one pass over the weights: every block is loaded once and applied to the hidden states of the whole
model and to those of every model with one part removed, which are kept, in memory or in files.

Shape letters: N = windows of text, S = tokens per window, D = hidden_size, n = blocks of the range.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from exporter.errors import PlanError
from exporter.graph import ModelGraph, ParallelBlocks, members, structure
from exporter.hidden_states import (
    DEFAULT_BATCH,
    DEFAULT_BUDGET_BYTES,
    HiddenStates,
    check_finite,
    check_logits,
    states_folder,
)
from exporter.reference import LOGITS_TOGETHER, LoadedBlock, Reference

Kind = Literal["block", "attention", "ffn"]
KINDS: tuple[Kind, ...] = ("block", "attention", "ffn")
TOKENS_TOGETHER = 4096  # of several variants: so many tokens go through a block in one call, if there are as many


@dataclass(frozen=True, slots=True)
class Removal:
    """A part that a variant of the model lacks."""

    kind: Kind
    block: int  # index in graph.blocks

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.block}"


@dataclass(slots=True)
class Dependency:
    """What was measured. Distances are means over tokens; NaN where there is nothing to compare."""

    source_layers: list[list[int]]  # of every block of the graph
    first: int  # the range of blocks: [first, last], indices in graph.blocks
    last: int
    tokens: int
    matrices: dict[Kind, np.ndarray]  # [n, n], row i removed, column j compared; NaN unless i < j
    # Of every block of the range, [n]: the paper's other curves.
    distance_of_output: np.ndarray  # cosine distance of x and f(x)
    distance_of_contribution: np.ndarray  # cosine distance of x and h(x)
    relative_contribution: np.ndarray  # |h| / |x|, of the tokens whose x is not zero
    # What the last hidden state (before the final norm) loses without a part, [n] per kind.
    importance: dict[Kind, np.ndarray] = field(default_factory=dict)
    kl: dict[Kind, np.ndarray] = field(default_factory=dict)  # KL(whole || without), nats per token, [n]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; NaN becomes null."""
        return _plain({f.name: getattr(self, f.name) for f in fields(self)})


def dependency_from_json(data: Mapping[str, Any]) -> Dependency:
    """The inverse of `Dependency.to_json`."""
    plain = ("source_layers", "first", "last", "tokens")
    return Dependency(**{name: data[name] if name in plain else _arrays(data[name]) for name in data})


def measure_dependency(
    graph: ModelGraph,
    tokens: np.ndarray,
    *,
    blocks: tuple[int, int] | None = None,
    kinds: Sequence[Kind] = KINDS,
    importance: bool = True,
    kl: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    work: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    batch: int = DEFAULT_BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Dependency:
    """Measure a range of blocks in one pass over the weights.

    Args:
        tokens: int64 [N, S].
        blocks: first and last index in `graph.blocks`; None: all.
        kinds: what is removed, one part at a time.
        importance: carry every variant to the end of the model; without it the pass stops after the range.
        kl: also compare logits, for which every variant is carried to the end, too.
        budget_bytes: hidden states beyond this go to files.
        work: folder for those files; a measurement that was interrupted goes on from there when it is called again
            with the same arguments, and a finished one is read from there, until `hidden_states.remove_states`. None: a
            temporary folder where files are needed at all.
        identity: plain JSON data that tells this model from others of the same structure, for `work`.
        batch: windows that go through a block at a time.
        progress: called with (blocks done, blocks in all).

    Raises:
        PlanError: the range is not in the model.
        CheckpointError: a weight is NaN or infinite; names the tensor.
    """
    first, last = blocks or (0, len(graph.blocks) - 1)
    if not 0 <= first <= last < len(graph.blocks):
        raise PlanError(
            "the range of blocks is not in the model", expected=f"0 to {len(graph.blocks) - 1}", found=blocks
        )
    reference = Reference(graph, device=device, dtype=dtype)
    removals = [Removal(kind, index) for index in range(first, last + 1) for kind in _removable(graph, index, kinds)]
    shape = (*tokens.shape, graph.hidden_size)
    needed_bytes = (len(removals) + 1) * math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    stop = len(graph.blocks) if importance or kl else last + 1
    with states_folder(work, needed_bytes, budget_bytes) as folder:
        key = _key(graph, tokens, removals, dtype, identity)
        run = _Run(graph, reference, tokens, first, last, removals, HiddenStates(shape, dtype, folder, key), batch)
        for index in run.remaining(stop):
            if progress is not None:
                progress(index, stop)
            run.block(index)
        if progress is not None:
            progress(stop, stop)
        return run.result(importance=importance, kl=kl)


def _key(
    graph: ModelGraph,
    tokens: np.ndarray,
    removals: Sequence[Removal],
    dtype: torch.dtype,
    identity: Mapping[str, Any] | None,
) -> str:
    """What hidden states belong to."""
    read = hashlib.sha256(f"{tokens.shape}".encode() + tokens.tobytes()).hexdigest()
    described = [structure(graph), read, str(dtype), [r.name for r in removals], identity]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _removable(graph: ModelGraph, index: int, kinds: Sequence[Kind]) -> list[Kind]:
    entry = graph.blocks[index]
    has = {
        "block": not entry.is_empty,
        "attention": any(block.attention is not None for block in members(entry)),
        "ffn": any(block.ffn is not None for block in members(entry)),
    }
    if isinstance(entry, ParallelBlocks):
        has["attention"] = has["ffn"] = False  # a group stands or falls as one
    return [kind for kind in kinds if has[kind]]


class _Run:
    """The pass: hidden states of the whole model ("base") and of every variant, moved on block by block."""

    def __init__(
        self,
        graph: ModelGraph,
        reference: Reference,
        tokens: np.ndarray,
        first: int,
        last: int,
        removals: Sequence[Removal],
        states: HiddenStates,
        batch: int,
    ) -> None:
        self._graph, self._reference, self._states = graph, reference, states
        self._first, self._last, self._removals = first, last, removals
        self._tokens = torch.from_numpy(tokens)
        self._slices = [slice(start, start + batch) for start in range(0, len(tokens), batch)]
        self._span = reference.span((1, tokens.shape[1]), None)
        # Of every block of the range: its column of each kind's matrix, "<kind>.<index>" [n], and of the three curves,
        # "curves.<index>" [3].
        self._columns: dict[str, np.ndarray] = {}

    def remaining(self, stop: int) -> range:
        saved = self._states.progress()
        if saved is None:
            for part in self._slices:
                self._states.write("base", part, self._reference.embed(self._tokens[part]))
            self._states.commit(0, {})
            return range(stop)
        self._columns = saved.found
        return range(saved.next_block, stop)

    @torch.inference_mode()
    def block(self, index: int) -> None:
        block = self._reference.block(index)
        in_range = self._first <= index <= self._last
        older = [removal for removal in self._removals if removal.block < index]
        fresh = [removal for removal in self._removals if removal.block == index]
        distances = dict.fromkeys(older, 0.0)
        curves = np.zeros(4)
        for part in self._slices:
            x = self._states.read("base", part, self._reference.device)
            attention, ffn = block.contributions(x, self._span)
            y = x + attention + ffn
            check_finite(y, self._graph, index)
            if in_range:
                curves += _curves(x, y)
            # Variants go through the block together: few large products instead of many small ones.
            together = max(1, TOKENS_TOGETHER // x[..., 0].numel())
            for start in range(0, len(older), together):
                group = older[start : start + together]
                xs = torch.cat([self._states.read(removal.name, part, self._reference.device) for removal in group])
                of_attention, of_ffn = block.contributions(xs, self._span)
                ys = xs + of_attention + of_ffn
                for number, removal in enumerate(group):
                    rows = slice(number * len(x), (number + 1) * len(x))
                    if in_range:
                        attention_v, ffn_v = _rows(of_attention, rows), _rows(of_ffn, rows)
                        pairs = {
                            "block": (attention + ffn, attention_v + ffn_v),
                            "attention": (attention, attention_v),
                            "ffn": (ffn, ffn_v),
                        }
                        distances[removal] += _summed_distance(*pairs[removal.kind])
                    self._states.write(removal.name, part, ys[rows])
            for removal in fresh:
                self._states.write(removal.name, part, _without(block, removal.kind, x, attention, self._span))
            self._states.write("base", part, y)
        columns: dict[str, np.ndarray] = {}
        if in_range:
            count = self._tokens.numel()
            columns = {f"{kind}.{index}": np.full(self._last - self._first + 1, math.nan) for kind in KINDS}
            for removal, distance in distances.items():
                columns[f"{removal.kind}.{index}"][removal.block - self._first] = distance / count
            nonzero = curves[3] or math.nan
            columns[f"curves.{index}"] = curves[:3] / (count, count, nonzero)
        self._states.commit(index + 1, columns)
        self._columns |= columns

    @torch.inference_mode()
    def result(self, *, importance: bool, kl: bool) -> Dependency:
        count = self._last - self._first + 1
        output, contribution, relative = self._matrix("curves")
        result = Dependency(
            source_layers=[list(entry.source_layers) for entry in self._graph.blocks],
            first=self._first,
            last=self._last,
            tokens=self._tokens.numel(),
            matrices={kind: self._matrix(kind) for kind in dict.fromkeys(removal.kind for removal in self._removals)},
            distance_of_output=output,
            distance_of_contribution=contribution,
            relative_contribution=relative,
        )
        for removal in self._removals if importance or kl else ():
            column = removal.block - self._first
            distance = divergence = 0.0
            for part in self._slices:
                base = self._states.read("base", part, self._reference.device)
                variant = self._states.read(removal.name, part, self._reference.device)
                distance += _summed_distance(base, variant)
                if kl:
                    divergence += self._kl(base, variant)
            tokens = self._tokens.numel()
            result.importance.setdefault(removal.kind, np.full(count, math.nan))[column] = distance / tokens
            if kl:
                result.kl.setdefault(removal.kind, np.full(count, math.nan))[column] = divergence / tokens
        return result

    def _matrix(self, name: str) -> np.ndarray:
        return np.stack([self._columns[f"{name}.{index}"] for index in range(self._first, self._last + 1)], axis=1)

    def _kl(self, base: torch.Tensor, variant: torch.Tensor) -> float:
        """Sum over tokens of KL(base || variant), of last hidden states [n, S, D]."""
        together = max(1, LOGITS_TOGETHER // self._graph.vocab_size)
        pairs = zip(base.flatten(0, 1).split(together), variant.flatten(0, 1).split(together), strict=True)
        total = 0.0
        for one, other in pairs:
            logits = self._reference.head(one)
            check_logits(logits, self._graph)
            total += summed_kl(logits, self._reference.head(other))
        return total


def _rows(values: torch.Tensor | float, rows: slice) -> torch.Tensor | float:
    return values[rows] if isinstance(values, torch.Tensor) else values


def _without(block: LoadedBlock, kind: Kind, x: torch.Tensor, attention: Any, span: Any) -> torch.Tensor:
    """The output of a block that lacks a part, given its input."""
    if kind == "block":
        return x
    if kind == "ffn":
        return x + attention
    _, ffn = block.contributions(x, span, attention=False)
    return x + ffn


def _curves(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Sums over tokens of distance(x, f(x)), distance(x, h(x)) and |h| / |x|, and how many have a ratio.

    A token whose embedding is zero, as padding has it, has none before the first attention.
    """
    h = y - x
    sizes = x.double().norm(dim=-1)
    ratios = h.double().norm(dim=-1)[sizes > 0] / sizes[sizes > 0]
    return np.array([_summed_distance(x, y), _summed_distance(x, h), ratios.sum().item(), len(ratios)])


def _summed_distance(a: torch.Tensor | float, b: torch.Tensor | float) -> float:
    """Sum over tokens of 1 - cos(a, b), in float64; NaN where either side is not there.

    Equal vectors have the distance 0, also two zeros, which have no angle: what a block of zero weights adds depends on
    nothing.
    """
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return math.nan
    smallest = torch.finfo(torch.float64).tiny  # 1e-8, the library's, makes shorter vectors unlike any other
    distances = 1 - F.cosine_similarity(a.double(), b.double(), dim=-1, eps=smallest)
    return distances.masked_fill((a == b).all(-1), 0.0).sum().item()


def summed_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Sum over tokens of KL(softmax(reference) || softmax(other)) in nats; logits [..., V]."""
    log_p = F.log_softmax(reference.float(), dim=-1)
    log_q = F.log_softmax(other.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum().item()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _arrays(value: Any) -> Any:
    return {k: _arrays(v) for k, v in value.items()} if isinstance(value, dict) else np.array(value, dtype=np.float64)
