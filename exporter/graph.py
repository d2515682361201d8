"""A decoder as data: structure and lazy weights of every block, with the invariants that every pass keeps.

Shape letters: D = hidden_size, V = vocab_size, Hq / Hkv = attention / key-value heads, d = head_dim,
F = intermediate_size of one block, all per block but D and V.

A block: g(x) = x + Attention(n1(x)), f(x) = g(x) + FFN(n2(g(x))), n = RMSNorm (arXiv:2503.18908, section 2).
Three numbers that are easy to confuse: a block's index in `ModelGraph.blocks`, the source layers it came from
(`source_layers`, the numbers that plans use) and the KV-cache slot of its attention (`ModelGraph.kv_slots`).
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

from exporter.dtypes import FLOAT8_E4M3FN, INT8, DType
from exporter.errors import GraphError
from exporter.lazy import LazyTensor
from exporter.rope import Rope

CODES = (FLOAT8_E4M3FN, INT8)  # dtypes of quantized weights
# Linears of a sublayer that read one input, and that engines run as one GEMM.
FUSED_GEMMS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Activation(enum.Enum):
    """The gate's activation, spelled as `hidden_act` in Hugging Face configs."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_pytorch_tanh"
    RELU = "relu"


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSNorm:
    """n(x) = weight * x / sqrt(mean(x^2) + eps), the mean in float32."""

    weight: LazyTensor  # [D] before a sublayer, [d] on query or key heads
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InputQuantization:
    """What a linear's input is rounded to before the product."""

    dtype: DType  # float8_e4m3fn or int8
    scale: LazyTensor | None  # float32 [], of all tokens; None: every token has its own, amax / largest(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a linear whose weight is codes computes: y = (round(x) * input scale) @ (weight * weight_scale).T + bias."""

    weight_scale: LazyTensor  # float32 [] or, one per row, [out]
    input: InputQuantization | None = None  # None: the input is used as it comes (weight only)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVQuantization:
    """What keys (after the rotation) and values are stored as in the KV cache."""

    dtype: DType  # float8_e4m3fn or int8
    k_scale: LazyTensor  # float32 []
    v_scale: LazyTensor  # float32 []


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """y = x @ weight.T + bias; where there is a `quantization`, `weight` holds codes."""

    weight: LazyTensor  # [out, in]
    bias: LazyTensor | None = None  # [out]
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if len(self.weight.shape) != 2:
            raise GraphError("a linear weight is a matrix", expected="[out, in]", found=list(self.weight.shape))
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise GraphError("a bias fits its weight", expected=[self.weight.shape[0]], found=list(self.bias.shape))
        if self.quantization is None:
            return
        scale = self.quantization.weight_scale
        if self.weight.dtype not in CODES:
            raise GraphError("a quantized weight is codes", expected="int8 or float8_e4m3fn", found=self.weight.dtype)
        if scale.shape not in ((), self.weight.shape[:1]):
            raise GraphError(
                "a weight scale fits its weight", expected=f"[] or [{self.weight.shape[0]}]", found=list(scale.shape)
            )

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query self-attention with rotary embedding, and the norm in front of it."""

    norm: RMSNorm  # [D]
    q_proj: Linear  # [Hq * d, D]
    k_proj: Linear  # [Hkv * d, D]
    v_proj: Linear  # [Hkv * d, D]
    o_proj: Linear  # [D, Hq * d]
    num_attention_heads: int
    num_key_value_heads: int
    q_norm: RMSNorm | None = None  # [d], on every query head before the rotation (Qwen3)
    k_norm: RMSNorm | None = None  # [d]
    sliding_window: int | None = None  # a query sees this many positions, itself included
    kv_quantization: KVQuantization | None = None

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise GraphError(
                "key-value heads divide the attention heads", expected=f"a divisor of {heads}", found=kv_heads
            )
        if self.q_proj.out_features % heads or self.head_dim % 2:
            raise GraphError("head_dim is an even whole number", found=f"{self.q_proj.out_features} / {heads} heads")
        d, hidden_size = self.head_dim, self.q_proj.in_features
        for name, linear, expected in (
            ("k_proj", self.k_proj, (kv_heads * d, hidden_size)),
            ("v_proj", self.v_proj, (kv_heads * d, hidden_size)),
            ("o_proj", self.o_proj, (hidden_size, heads * d)),
        ):
            _check_shape(name, linear.weight, expected)
        _check_shape("attention norm", self.norm.weight, (hidden_size,))
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if norm is not None:
                _check_shape(name, norm.weight, (d,))
        if self.sliding_window is not None and self.sliding_window < 1:
            raise GraphError("a sliding window holds at least one position", found=self.sliding_window)

    @property
    def hidden_size(self) -> int:
        return self.q_proj.in_features

    @property
    def head_dim(self) -> int:
        return self.q_proj.out_features // self.num_attention_heads


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a wide FFN that came from one source layer; segments lie in order from channel 0."""

    source_layer: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FFN:
    """Gated feed-forward network down(act(gate(n)) * up(n)), and the norm in front of it.

    `segments` covers channels [0, sum of widths); what is left up to `intermediate_size` is zero padding.
    """

    norm: RMSNorm  # [D]
    gate_proj: Linear  # [F, D]
    up_proj: Linear  # [F, D]
    down_proj: Linear  # [D, F]
    activation: Activation
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        hidden_size, width = self.hidden_size, self.intermediate_size
        _check_shape("up_proj", self.up_proj.weight, (width, hidden_size))
        _check_shape("down_proj", self.down_proj.weight, (hidden_size, width))
        _check_shape("FFN norm", self.norm.weight, (hidden_size,))
        if not self.segments or any(segment.width < 1 for segment in self.segments) or self.padding < 0:
            raise GraphError(
                "segments fit the FFN", expected=f"widths that add up to at most {width}", found=self.segments
            )

    @property
    def hidden_size(self) -> int:
        return self.gate_proj.in_features

    @property
    def intermediate_size(self) -> int:
        return self.gate_proj.out_features

    @property
    def padding(self) -> int:
        """Channels that are zero in gate, up and down."""
        return self.intermediate_size - sum(segment.width for segment in self.segments)

    @property
    def source_layers(self) -> tuple[int, ...]:
        return tuple(segment.source_layer for segment in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSublayer:
    """One matrix in place of an attention or an FFN: linear(n(x)) (Puzzle's "replace with linear")."""

    norm: RMSNorm  # [D]
    linear: Linear  # [D, D]

    def __post_init__(self) -> None:
        size = self.linear.out_features
        _check_shape("linear", self.linear.weight, (size, size))
        _check_shape("norm", self.norm.weight, (size,))

    @property
    def hidden_size(self) -> int:
        return self.linear.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """An attention and an FFN, each with its residual; None is a sublayer that is not there."""

    attention: Attention | LinearSublayer | None
    ffn: FFN | LinearSublayer | None
    source_layers: tuple[int, ...]  # every layer that ended in this block, also those that left no tensor

    def __post_init__(self) -> None:
        if not self.source_layers or list(self.source_layers) != sorted(set(self.source_layers)):
            raise GraphError("source layers of a block are ascending and not empty", found=self.source_layers)
        if isinstance(self.ffn, FFN) and not set(self.ffn.source_layers) <= set(self.source_layers):
            raise GraphError(
                "an FFN's segments come from its block's source layers",
                expected=self.source_layers,
                found=self.ffn.source_layers,
            )

    @property
    def is_empty(self) -> bool:
        return self.attention is None and self.ffn is None

    @property
    def sequential_sublayers(self) -> int:
        return (self.attention is not None) + (self.ffn is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelBlocks:
    """Full blocks that read the same input: y = x + sum_j (f_j(x) - x) (arXiv:2503.18908, appendix B)."""

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if len(self.blocks) < 2:
            raise GraphError("a parallel group holds at least two blocks", found=len(self.blocks))

    @property
    def source_layers(self) -> tuple[int, ...]:
        return tuple(layer for block in self.blocks for layer in block.source_layers)

    @property
    def is_empty(self) -> bool:
        return all(block.is_empty for block in self.blocks)

    @property
    def sequential_sublayers(self) -> int:
        """The attentions run side by side, then the FFNs."""
        return any(block.attention for block in self.blocks) + any(block.ffn for block in self.blocks)


@dataclass(frozen=True, kw_only=True)
class ModelGraph:
    """A whole decoder. Immutable: a pass makes a new one with `dataclasses.replace`.

    Raises:
        GraphError: at construction, if an invariant does not hold; the message names the block.
    """

    embedding: LazyTensor  # [V, D]
    blocks: tuple[Block | ParallelBlocks, ...]
    norm: RMSNorm  # [D]
    lm_head: Linear | None  # [V, D]; None: tied to the embedding
    rope: Rope
    max_position_embeddings: int

    def __post_init__(self) -> None:
        if len(self.embedding.shape) != 2:
            raise GraphError("the embedding is a matrix", expected="[V, D]", found=list(self.embedding.shape))
        _check_shape("final norm", self.norm.weight, (self.hidden_size,))
        if self.lm_head is not None:
            _check_shape("lm_head", self.lm_head.weight, (self.vocab_size, self.hidden_size))
        if self.max_position_embeddings < 1:
            raise GraphError("max_position_embeddings is positive", found=self.max_position_embeddings)
        seen: set[int] = set()
        for index, entry in enumerate(self.blocks):
            for block in members(entry):
                for sublayer in (block.attention, block.ffn):
                    if sublayer is not None and sublayer.hidden_size != self.hidden_size:
                        raise GraphError(
                            "every sublayer has the model's hidden_size",
                            block=index,
                            expected=self.hidden_size,
                            found=sublayer.hidden_size,
                        )
            repeated = seen & set(entry.source_layers)
            if repeated:
                raise GraphError("a source layer belongs to one block", block=index, found=f"{sorted(repeated)} twice")
            seen |= set(entry.source_layers)
        if len({attention.head_dim for _, attention in self.attentions}) > 1:
            raise GraphError("all attentions of a model have one head_dim (they share one rotary embedding)")

    @property
    def hidden_size(self) -> int:
        return self.embedding.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.embedding.shape[0]

    @property
    def head_dim(self) -> int | None:
        """The head size that all attentions share, None in a model without attention."""
        return self.attentions[0][1].head_dim if self.attentions else None

    @property
    def dtype(self) -> DType:
        """The dtype of the embedding, which stands for the model's where one is needed."""
        return self.embedding.dtype

    @cached_property
    def flat_blocks(self) -> tuple[Block, ...]:
        """All blocks in order, the members of parallel groups one after the other."""
        return tuple(block for entry in self.blocks for block in members(entry))

    @cached_property
    def attentions(self) -> tuple[tuple[int, Attention], ...]:
        """(index in `flat_blocks`, attention) in the order of their KV-cache slots."""
        pairs = ((index, block.attention) for index, block in enumerate(self.flat_blocks))
        return tuple((index, attention) for index, attention in pairs if isinstance(attention, Attention))

    @cached_property
    def kv_slots(self) -> dict[int, int]:
        """Index in `flat_blocks` -> KV-cache slot, for the blocks that have attention."""
        return {index: slot for slot, (index, _) in enumerate(self.attentions)}

    @property
    def sequential_sublayers(self) -> int:
        """The depth that costs latency, and one all-reduce each under tensor parallelism."""
        return sum(entry.sequential_sublayers for entry in self.blocks)

    @property
    def num_parameters(self) -> int:
        """Parameters as stored: a tied embedding once, padding of fused FFNs included."""
        return sum(tensor.size for tensor in weights(self, scales=False))

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in weights(self))

    def kv_bytes_per_token(self, dtype: DType) -> int:
        """Bytes that one token of one sequence takes in a KV cache of `dtype`, over all attentions."""
        elements = sum(2 * attention.num_key_value_heads * attention.head_dim for _, attention in self.attentions)
        return elements * dtype.itemsize

    @property
    def has_bytes(self) -> bool:
        """False for a structure-only graph."""
        return all(tensor.has_bytes for tensor in weights(self))


def members(entry: Block | ParallelBlocks) -> tuple[Block, ...]:
    """The blocks of one entry of `ModelGraph.blocks`: itself, or the members of a parallel group."""
    return entry.blocks if isinstance(entry, ParallelBlocks) else (entry,)


def map_blocks(graph: ModelGraph, function: Callable[[Block, int], Block]) -> ModelGraph:
    """The graph with `function(block, index in flat_blocks)` in place of every block."""
    indices = itertools.count()

    def mapped(entry: Block | ParallelBlocks) -> Block | ParallelBlocks:
        if isinstance(entry, ParallelBlocks):
            return ParallelBlocks(blocks=tuple(function(block, next(indices)) for block in entry.blocks))
        return function(entry, next(indices))

    return replace(graph, blocks=tuple(mapped(entry) for entry in graph.blocks))


def linear_names(graph: ModelGraph) -> dict[str, Linear]:
    """Every linear of a graph by name: "blocks.3.ffn.down_proj", 3 being its index in `flat_blocks`, and "lm_head"."""
    found = {}
    for index, block in enumerate(graph.flat_blocks):
        for sublayer in ("attention", "ffn"):
            part = getattr(block, sublayer)
            for name, linear in linears(part).items() if part is not None else ():
                found[f"blocks.{index}.{sublayer}.{name}"] = linear
    if graph.lm_head is not None:
        found["lm_head"] = graph.lm_head
    return found


def weights(part: Any, *, scales: bool = True) -> Iterator[LazyTensor]:
    """Yield every tensor of a graph or of a part of one, in the order of the fields, on request without the scales."""
    if isinstance(part, LazyTensor):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from weights(item, scales=scales)
    elif is_dataclass(part) and (scales or not isinstance(part, (Quantization, KVQuantization))):
        for field in fields(part):
            yield from weights(getattr(part, field.name), scales=scales)


def linears(sublayer: Attention | FFN | LinearSublayer) -> dict[str, Linear]:
    """The linears of a sublayer by the name of their field, in the order of the fields."""
    named = ((field.name, getattr(sublayer, field.name)) for field in fields(sublayer))
    return {name: value for name, value in named if isinstance(value, Linear)}


def structure(graph: ModelGraph) -> dict[str, Any]:
    """Describe a graph as plain JSON data: what `inspect --json` prints, manifests carry and reports draw."""

    def attention_entry(attention: Attention | LinearSublayer | None) -> dict[str, Any] | None:
        if isinstance(attention, Attention):
            return {
                "kind": "attention",
                "num_attention_heads": attention.num_attention_heads,
                "num_key_value_heads": attention.num_key_value_heads,
                "head_dim": attention.head_dim,
                "sliding_window": attention.sliding_window,
            }
        return None if attention is None else {"kind": "linear"}

    def ffn_entry(ffn: FFN | LinearSublayer | None) -> dict[str, Any] | None:
        if isinstance(ffn, FFN):
            return {
                "kind": "gated",
                "intermediate_size": ffn.intermediate_size,
                "segments": [{"source_layer": s.source_layer, "width": s.width} for s in ffn.segments],
                "padding": ffn.padding,
            }
        return None if ffn is None else {"kind": "linear"}

    def block_entry(block: Block) -> dict[str, Any]:
        return {
            "source_layers": list(block.source_layers),
            "attention": attention_entry(block.attention),
            "ffn": ffn_entry(block.ffn),
        }

    return {
        "hidden_size": graph.hidden_size,
        "vocab_size": graph.vocab_size,
        "max_position_embeddings": graph.max_position_embeddings,
        "tie_word_embeddings": graph.lm_head is None,
        "dtype": graph.dtype.name,
        "num_parameters": graph.num_parameters,
        "weight_bytes": graph.weight_bytes,
        "kv_bytes_per_token": graph.kv_bytes_per_token(graph.dtype),
        "sequential_sublayers": graph.sequential_sublayers,
        "blocks": [
            {"parallel": [block_entry(block) for block in entry.blocks]}
            if isinstance(entry, ParallelBlocks)
            else block_entry(entry)
            for entry in graph.blocks
        ],
    }


def _check_shape(name: str, tensor: LazyTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise GraphError(f"{name} has the wrong shape", expected=list(expected), found=list(tensor.shape))
