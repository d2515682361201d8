"""Real sizes and random weights: decoders and FFNs for benchmarks on a GPU, without a checkpoint.

Structures are graphs without bytes; `random_tensor` makes weights directly on the device, in the ranges of trained
ones. Imports PyTorch, NumPy and ml_dtypes, nothing else from outside.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from exporter.dtypes import BFLOAT16, FLOAT8_E4M3FN, FLOAT32, INT8, DType
from exporter.graph import (
    FFN,
    Activation,
    Attention,
    Block,
    InputQuantization,
    Linear,
    ModelGraph,
    Quantization,
    RMSNorm,
    Segment,
    linears,
    map_blocks,
    weights,
)
from exporter.lazy import LazyTensor, array, full, shape_only
from exporter.numerics import LARGEST
from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.reference import torch_from_lazy
from exporter.rope import Rope

EPS = 1e-5
SPREAD = {FLOAT8_E4M3FN: 100.0, INT8: 73.0}  # standard deviation of random codes; of int8 that of -127 to 127
NORMED_RANGE, INNER_RANGE = 5.0, 4.0  # largest magnitudes of a norm's output and of silu(g) * u, in round numbers
FILL_ROWS_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """How linears are stored and multiplied."""

    weights: DType  # bfloat16: as they are
    activations: str = "none"  # or "static", "token"
    per_row: bool = False  # one weight scale per output channel, else one for all


FORMATS = {
    "bf16": NumberFormat(BFLOAT16),
    "fp8": NumberFormat(FLOAT8_E4M3FN, "static"),
    "fp8-token": NumberFormat(FLOAT8_E4M3FN, "token", per_row=True),
    "fp8-weight-only": NumberFormat(FLOAT8_E4M3FN),
    "int8": NumberFormat(INT8, "static", per_row=True),
    "int8-token": NumberFormat(INT8, "token", per_row=True),
    "int8-weight-only": NumberFormat(INT8, per_row=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A decoder; `layers` has (key-value heads, FFN width) of each, None where there is no attention."""

    hidden: int
    heads: int
    head_dim: int
    layers: tuple[tuple[int | None, int], ...]
    vocab: int = 128256


def _dropped(*widths: int) -> list[tuple[int | None, int]]:
    return [(None, width) for width in widths]


FULL = (8, 28672)  # a layer of Llama-3.3-70B
DECODERS = {
    # config.json of meta-llama/Llama-3.1-8B and Llama-3.3-70B
    "llama-8b": Sizes(hidden=4096, heads=32, head_dim=128, layers=((8, 14336),) * 32),
    "llama-70b": Sizes(hidden=8192, heads=64, head_dim=128, layers=(FULL,) * 80),
    # tests/data/nemotron-super-49b.structure.json
    "super-49b": Sizes(
        hidden=8192,
        heads=64,
        head_dim=128,
        layers=(
            (8, 14336), *[FULL] * 5, *_dropped(14336, 14336), *[FULL] * 3, *_dropped(17920), *[FULL] * 30,
            *_dropped(7168, 14336, 14336, 7168, 28672, 7168, 14336, 7168, 7168, 7168), FULL,
            *_dropped(7168, 5632, 5632, 7168, 5632, 5632, 5632, 7168, 7168),
            *_dropped(2816, 2816, 5632, 5632, 2816, 2816, 5632, 2816, 2816), *[FULL] * 9,
        ),
    ),
    "tiny": Sizes(hidden=64, heads=4, head_dim=16, layers=((2, 128),) * 6, vocab=320),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fusion:
    """Runs of layers, both ends included: attentions to drop, FFNs to fuse."""

    drop: tuple[tuple[int, int], ...]
    fuse: tuple[tuple[int, int], ...]


# Of the 49B model, what arXiv:2503.18908 fused in its third step; of the others, a run of about that share.
FUSIONS = {
    "llama-8b": Fusion(((20, 28),), ((20, 27),)),
    "llama-70b": Fusion(((42, 70),), ((42, 55), (56, 69))),
    "super-49b": Fusion((), ((42, 50), (53, 61), (62, 69))),
    "tiny": Fusion(((1, 4),), ((1, 3),)),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """An FFN of a published model. On n GPUs each has an n-th of its width."""

    hidden: int
    width: int


LAYERS = {
    "llama-70b": Layer(8192, 28672),
    "llama-405b": Layer(16384, 53248),
    "super-49b, layers 42-50 fused": Layer(8192, 107520),
    "ultra-253b, its widest": Layer(16384, 425984),  # tests/data/nemotron-ultra-253b.structure.json, layer 134
    "tiny": Layer(64, 256),
}


def ffn_of(hidden: int, width: int, format: NumberFormat) -> FFN:
    """An FFN without bytes."""
    plain = FFN(
        norm=RMSNorm(weight=full((hidden,), 1.0, BFLOAT16), eps=EPS),
        gate_proj=Linear(weight=shape_only((width, hidden), BFLOAT16)),
        up_proj=Linear(weight=shape_only((width, hidden), BFLOAT16)),
        down_proj=Linear(weight=shape_only((hidden, width), BFLOAT16)),
        activation=Activation.SILU,
        segments=(Segment(0, width),),
    )
    return _in_format(plain, format)


@functools.cache
def decoder(name: str, format: NumberFormat, *, fused: bool) -> ModelGraph:
    """A whole model without bytes; the head stays in bfloat16."""
    sizes = DECODERS[name]

    def linear(rows: int, columns: int) -> Linear:
        return Linear(weight=shape_only((rows, columns), BFLOAT16))

    def norm() -> RMSNorm:
        return RMSNorm(weight=full((sizes.hidden,), 1.0, BFLOAT16), eps=EPS)

    def attention(kv_heads: int) -> Attention:
        query, key = sizes.heads * sizes.head_dim, kv_heads * sizes.head_dim
        return Attention(
            norm=norm(),
            q_proj=linear(query, sizes.hidden),
            k_proj=linear(key, sizes.hidden),
            v_proj=linear(key, sizes.hidden),
            o_proj=linear(sizes.hidden, query),
            num_attention_heads=sizes.heads,
            num_key_value_heads=kv_heads,
        )

    graph = ModelGraph(
        embedding=shape_only((sizes.vocab, sizes.hidden), BFLOAT16),
        blocks=tuple(
            Block(
                attention=None if kv_heads is None else attention(kv_heads),
                ffn=replace(ffn_of(sizes.hidden, width, FORMATS["bf16"]), segments=(Segment(layer, width),)),
                source_layers=(layer,),
            )
            for layer, (kv_heads, width) in enumerate(sizes.layers)
        ),
        norm=norm(),
        lm_head=linear(sizes.vocab, sizes.hidden),
        rope=Rope(theta=500000.0),
        max_position_embeddings=131072,
    )
    if fused:
        fusion = FUSIONS[name]
        dropped = [layer for first, last in fusion.drop for layer in range(first, last + 1)]
        graph = fuse_ffn(drop_attention(graph, dropped) if dropped else graph, fusion.fuse, norm="last")

    def in_format(block: Block, index: int) -> Block:
        parts = {name: getattr(block, name) for name in ("attention", "ffn")}
        return replace(block, **{name: part and _in_format(part, format) for name, part in parts.items()})

    return map_blocks(graph, in_format)


def _in_format(part: FFN | Attention, format: NumberFormat) -> FFN | Attention:
    """A sublayer with its linears in a format; what they read has the same scale in all of them."""
    if format.weights == BFLOAT16:
        return part
    scales: dict[float, LazyTensor] = {}

    def scale(value: float) -> LazyTensor:
        return scales.setdefault(value, array(np.array(value, np.float32)))

    def quantized(name: str, linear: Linear) -> Linear:
        # A random product of unit inputs has unit outputs.
        value = 1 / (SPREAD[format.weights] * math.sqrt(linear.in_features))
        largest = INNER_RANGE if name in ("down_proj", "o_proj") else NORMED_RANGE
        rounding = InputQuantization(
            dtype=format.weights,
            scale=scale(largest / LARGEST[format.weights]) if format.activations == "static" else None,
        )
        return Linear(
            weight=shape_only(linear.weight.shape, format.weights),
            quantization=Quantization(
                weight_scale=full((linear.out_features,), value, FLOAT32) if format.per_row else scale(value),
                input=None if format.activations == "none" else rounding,
            ),
        )

    return replace(part, **{name: quantized(name, linear) for name, linear in linears(part).items()})


def random_tensor(tensor: LazyTensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What a graph says where it says it (norms, scales), else random numbers; a `Load` of `engines.torch_linear`."""
    if tensor.has_bytes:
        return torch_from_lazy(tensor, device, dtype)
    out = torch.empty(tensor.shape, dtype=dtype, device=device)
    if dtype == torch.int8:
        return out.random_(-127, 128)
    if dtype != torch.float8_e4m3fn:
        return out.normal_(std=tensor.shape[-1] ** -0.5)
    rows = max(1, FILL_ROWS_BYTES // (2 * tensor.shape[-1]))
    for part in out.split(rows):  # PyTorch draws no FP8 numbers, and a second matrix would not always fit
        values = torch.empty(part.shape, dtype=torch.bfloat16, device=device).normal_(std=SPREAD[FLOAT8_E4M3FN])
        part.copy_(values.clamp_(-448, 448))
    return out


def nbytes(parts: FFN | ModelGraph | Sequence[Block]) -> int:
    """Bytes of all weights, scales included."""
    return sum(tensor.nbytes for tensor in weights(parts))
