"""Which part of a model each rank of a TensorRT-LLM checkpoint holds; nothing of names or number formats.

Rank r has tp_rank = r % tp_size and pp_rank = r // tp_size. Pipeline stages are runs of logical layers, cut as
`torch.tensor_split` does. Tensor parallelism cuts q, k, v, gate and up by rows (column-parallel in the field's words),
o and down by columns (row-parallel); with more ranks than key-value heads, ranks in a row hold the same head.
Source: TensorRT-LLM 1.1, `tensorrt_llm/mapping.py`, `tensorrt_llm/models/nemotron_nas/convert.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from exporter.graph import FFN, Attention, Block, Linear, LinearSublayer, ModelGraph, members
from exporter.lazy import LazyTensor, concat, slice_columns, slice_rows

PART_MULTIPLE = 64  # channels of a part of a wide FFN on one rank: what every quantized GEMM takes


@dataclass(frozen=True, slots=True)
class Layer:
    """A logical layer of the checkpoint: a block that is not empty."""

    block: Block
    index: int  # of its entry in `graph.blocks`


@dataclass(frozen=True, slots=True)
class Rank:
    """One GPU of the mapping."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int

    @property
    def number(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


@dataclass(frozen=True, slots=True)
class Gemm:
    """One matrix product of one rank: rows of one or several linears below each other, and some of their columns."""

    name: str  # below its module: "qkv", "dense", "fc", "gate", "proj", or "" where the module is the linear
    linears: tuple[Linear, ...]
    rows: tuple[range, ...]  # of each linear
    columns: range
    row_parallel: bool = False
    beside: tuple[Linear, ...] = ()  # those of other GEMMs that read the same input

    @property
    def shape(self) -> tuple[int, int]:
        """[n, k] of the weight on this rank."""
        return sum(map(len, self.rows)), len(self.columns)

    @property
    def is_quantized(self) -> bool:
        return self.linears[0].quantization is not None

    def cut(self, matrices: list[LazyTensor]) -> LazyTensor:
        """This rank's part of matrices [out, in], one per linear: [n, k]."""
        columns = self.columns
        pieces = [
            slice_columns(slice_rows(matrix, rows.start, rows.stop), columns.start, columns.stop)
            for matrix, rows in zip(matrices, self.rows, strict=True)
        ]
        return concat(pieces, axis=0)

    def cut_rows(self, vectors: list[LazyTensor]) -> LazyTensor:
        """This rank's part of vectors [out], one per linear: [n]."""
        pieces = [slice_rows(vector, rows.start, rows.stop) for vector, rows in zip(vectors, self.rows, strict=True)]
        return concat(pieces, axis=0)


@dataclass(frozen=True, slots=True)
class Module:
    """What is one module of a layer in TensorRT-LLM: an attention, an FFN or a part of one, or a bare linear."""

    name: str  # below the layer: "attention", "ffn", "ffn.part_0"
    sublayer: Attention | FFN | LinearSublayer
    gemms: tuple[Gemm, ...]


def layers_of(graph: ModelGraph) -> tuple[Layer, ...]:
    """The logical layers of a graph; empty blocks are left out, which changes nothing that the model computes."""
    return tuple(
        Layer(block, index)
        for index, entry in enumerate(graph.blocks)
        for block in members(entry)
        if not block.is_empty
    )


def parallel_groups(graph: ModelGraph) -> tuple[range, ...]:
    """The groups of parallel blocks as ranges of logical layers; a group that has one block left is none."""
    groups, first = [], 0
    for entry in graph.blocks:
        count = sum(not block.is_empty for block in members(entry))
        if count > 1:
            groups.append(range(first, first + count))
        first += count
    return tuple(groups)


def stages(num_layers: int, pp_size: int) -> tuple[range, ...]:
    """The logical layers of every pipeline stage: the first num_layers % pp_size stages hold one more."""
    size, longer = divmod(num_layers, pp_size)
    ends = [size * stage + min(stage, longer) for stage in range(pp_size + 1)]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(ends))


def ranks(tp_size: int, pp_size: int) -> Iterator[Rank]:
    """Yield every rank in the order of its number."""
    for pp_rank in range(pp_size):
        for tp_rank in range(tp_size):
            yield Rank(tp_rank, tp_size, pp_rank, pp_size)


def kv_heads_of(num_key_value_heads: int, tp_size: int) -> int:
    """Key-value heads that one rank holds."""
    return -(-num_key_value_heads // tp_size)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of lm_head over all ranks: `pad_vocab_size`."""
    return -(-vocab_size // tp_size) * tp_size


def ffn_parts(ffn: FFN, tp_size: int, max_gemm_elements: int) -> tuple[range, ...]:
    """Cut an FFN's channels so that gate and up of a part, as one matrix of one rank, have at most so many elements."""
    width = ffn.intermediate_size
    widest = max_gemm_elements * tp_size // (2 * ffn.hidden_size)
    if width <= widest:
        return (range(width),)
    unit = PART_MULTIPLE * tp_size
    count = -(-width // max(unit, widest // unit * unit))
    step = -(-width // (count * unit)) * unit
    return tuple(range(start, min(start + step, width)) for start in range(0, width, step))


def modules_of(layer: Layer, rank: Rank, parts: tuple[range, ...]) -> Iterator[Module]:
    """Yield the modules of a layer on a rank, attention first.

    Args:
        parts: of the layer's FFN, by channel; empty for one that is not cut and reduces by itself.
    """
    attention, ffn = layer.block.attention, layer.block.ffn
    if isinstance(attention, Attention):
        yield Module("attention", attention, _attention_gemms(attention, rank))
    elif attention is not None:
        yield Module("attention", attention, (_linear_gemm(attention, rank),))
    if isinstance(ffn, FFN):
        named = [(f"ffn.part_{number}", part) for number, part in enumerate(parts)]
        for name, part in named or [("ffn", range(ffn.intermediate_size))]:
            yield Module(name, ffn, _ffn_gemms(ffn, part, rank))
    elif ffn is not None:
        yield Module("ffn", ffn, (_linear_gemm(ffn, rank),))


def _attention_gemms(attention: Attention, rank: Rank) -> tuple[Gemm, ...]:
    kv_heads = attention.num_key_value_heads
    own = _share(range(attention.num_attention_heads * attention.head_dim), rank)
    if kv_heads >= rank.tp_size:
        kv = _share(range(kv_heads * attention.head_dim), rank)
    else:
        first = rank.tp_rank * kv_heads // rank.tp_size * attention.head_dim
        kv = range(first, first + attention.head_dim)
    hidden = range(attention.hidden_size)
    packed = (attention.q_proj, attention.k_proj, attention.v_proj)
    return (
        Gemm("qkv", packed, (own, kv, kv), hidden),
        Gemm("dense", (attention.o_proj,), (hidden,), own, row_parallel=True),
    )


def _ffn_gemms(ffn: FFN, channels: range, rank: Rank) -> tuple[Gemm, ...]:
    own, hidden = _share(channels, rank), range(ffn.hidden_size)
    return (  # the activation runs on `fc`: it is gate_proj, and `gate` is up_proj
        Gemm("fc", (ffn.gate_proj,), (own,), hidden, beside=(ffn.up_proj,)),
        Gemm("gate", (ffn.up_proj,), (own,), hidden, beside=(ffn.gate_proj,)),
        Gemm("proj", (ffn.down_proj,), (hidden,), own, row_parallel=True),
    )


def _linear_gemm(sublayer: LinearSublayer, rank: Rank) -> Gemm:
    hidden = range(sublayer.hidden_size)
    return Gemm("", (sublayer.linear,), (_share(hidden, rank),), hidden)


def _share(channels: range, rank: Rank) -> range:
    size = len(channels) // rank.tp_size
    return channels[rank.tp_rank * size : (rank.tp_rank + 1) * size]
