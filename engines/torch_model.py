"""A ModelGraph resident on one device, with a static KV cache: what a CUDA graph can record and replay.

Letters: B = sequences, S = tokens of one call, N = B * S, D = hidden_size, V = vocab_size, n = heads, d = head_dim,
C = positions of the cache, T = the dtype of activations and cache.

It computes what `exporter.reference` computes, in another form: the shapes of a call depend on B, S and C alone and
nothing is read back from the device; linears of one input are one GEMM; codes stay codes (`engines.torch_linear`); and
an FFN can be one custom op (`plugins.contract.WIDE_FFN`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from engines.torch_linear import DeviceLinear, Load, activations_of, halves, linear_on_device
from exporter.dtypes import FLOAT32
from exporter.graph import (
    FFN,
    Activation,
    Attention,
    Block,
    Linear,
    ModelGraph,
    Quantization,
    RMSNorm,
    members,
)
from exporter.lazy import LazyTensor, cast, concat
from exporter.one_gemm import can_be_one
from exporter.reference import ACTIVATIONS, fake_quantized, rotate, torch_from_lazy
from exporter.writers.onnx_weights import filled_biases

ALIGNMENT = 64  # positions: the cache's length is a multiple, which suits every attention kernel


@dataclass(frozen=True, slots=True)
class StaticCache:
    """Keys and values of every KV slot, T [B, n_kv, C, d] each.

    The positions behind `capacity` are scratch: padding is written there, and no valid token looks at them.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    cos: torch.Tensor  # T [C, d / 2], of the rotary embedding
    sin: torch.Tensor
    capacity: int  # tokens of a sequence


@dataclass(frozen=True, slots=True)
class Call:
    """What every attention of one call needs to know."""

    positions: torch.Tensor  # int64 [B, S], where keys and values go; the cache's capacity for padding
    sequences: torch.Tensor  # int64 [B, 1], 0 to B - 1
    cos: torch.Tensor  # T [B, 1, S, d / 2]
    sin: torch.Tensor
    cache: StaticCache
    fresh: bool  # nothing was in the cache before: the call's own keys are all there are
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """What is added to the scores, T [B, 1, S, C], or [S, S] if `fresh`; made once per window."""
        if window not in self._masks:
            count = self.positions.shape[1] if self.fresh else len(self.cache.cos)
            keys = torch.arange(count, device=self.positions.device)
            queries = keys if self.fresh else self.positions[:, None]
            visible = keys <= queries[..., None]
            if window is not None:
                visible &= keys > queries[..., None] - window
            mask = torch.zeros(visible.shape, dtype=self.cos.dtype, device=visible.device)
            self._masks[window] = mask.masked_fill_(~visible, float("-inf"))
        return self._masks[window]


class TorchModel:
    """The weights of a graph on a device, and the step that runs them."""

    def __init__(
        self,
        graph: ModelGraph,
        *,
        device: torch.device,
        dtype: torch.dtype,
        wide_ffn: bool = False,
        load: Load = torch_from_lazy,
    ) -> None:
        """Load all weights; a wide FFN needs room for itself only, never for a second copy.

        Args:
            wide_ffn: run the gated FFNs with the custom op; they must have none of `wide_ffn_problems`.
            load: makes a tensor on the device.
        """
        self.graph = graph
        self.device = device
        self.dtype = dtype
        parts = _Loader(device, dtype, load, wide_ffn)
        self._embedding = parts.tensor(graph.embedding)
        self._blocks = [[parts.block(block) for block in members(entry)] for entry in graph.blocks]
        self._slots = _slots(graph)
        self._norm = parts.norm(graph.norm)
        self._head = None if graph.lm_head is None else parts.linear(graph.lm_head)

    def new_cache(self, batch: int, capacity: int) -> StaticCache:
        """Zero-filled caches with room for `capacity` tokens per sequence."""
        graph, count = self.graph, -(-(capacity + 1) // ALIGNMENT) * ALIGNMENT

        def zeros() -> tuple[torch.Tensor, ...]:
            shapes = [(batch, one.num_key_value_heads, count, one.head_dim) for _, one in graph.attentions]
            return tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes)

        # A model without attention has no angles, and no use for any.
        frequencies = torch.from_numpy(graph.rope.inverse_frequencies(graph.head_dim or 2)).to(self.device)
        angles = torch.arange(count, dtype=torch.float32, device=self.device)[:, None] * frequencies
        return StaticCache(
            keys=zeros(),
            values=zeros(),
            cos=(angles.cos() * graph.rope.attention_factor).to(self.dtype),
            sin=(angles.sin() * graph.rope.attention_factor).to(self.dtype),
            capacity=capacity,
        )

    @torch.inference_mode()
    def step(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        cache: StaticCache,
        *,
        fresh: bool,
    ) -> torch.Tensor:
        """Append the tokens of one call to `cache`, which is changed in place.

        Args:
            input_ids: int64 [B, S], right-padded.
            positions: int64 [B, S], of every token; `cache.capacity` for padding.
            rows: int64 [B], which of the N = B * S tokens the logits are wanted of.
            fresh: nothing is in the cache, and positions begin at 0.

        Returns:
            Logits, float32 [B, V].
        """
        cos, sin = (table[positions][:, None] for table in (cache.cos, cache.sin))
        sequences = torch.arange(len(positions), device=self.device)[:, None]
        call = Call(positions, sequences, cos, sin, cache, fresh)
        x = F.embedding(input_ids.reshape(-1), self._embedding)  # [N, D], as every x below
        for blocks, slots in zip(self._blocks, self._slots, strict=True):
            x = _parallel(blocks, slots, x, call) if len(blocks) > 1 else _sequential(blocks[0], slots[0], x, call)
        rows_of_interest = self._norm(x[rows])
        head = self._head
        logits = F.linear(rows_of_interest, self._embedding) if head is None else head(rows_of_interest)
        return logits.to(torch.float32)


def ffn_on_device(
    ffn: FFN, *, device: torch.device, dtype: torch.dtype, load: Load = torch_from_lazy
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """One FFN with its norm and residual, T [N, D] -> x + FFN(norm(x)): as library products, and as the custom op.

    Both have the same weights in memory; see `TorchModel` for when the op can be called.
    """
    gated = _Loader(device, dtype, load, wide_ffn=False).gated(ffn)
    op = gated.as_op()
    return lambda x: gated(x, x), lambda x: op(x, x)


class DecodeStep:
    """One more token for every sequence, from the same buffers at every call; on a GPU recorded once as a CUDA graph.

    Set `tokens` and `positions` in place, then call it.
    """

    def __init__(self, model: TorchModel, cache: StaticCache, batch: int) -> None:
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self.positions = torch.full((batch,), cache.capacity, device=model.device)  # scratch, until they are set
        rows = torch.arange(batch, device=model.device)
        run = partial(model.step, self.tokens[:, None], self.positions[:, None], rows, cache, fresh=False)
        self._run = recorded(run) if model.device.type == "cuda" else run

    def __call__(self) -> torch.Tensor:
        """Logits, float32 [B, V]; on a GPU the same buffer at every call."""
        return self._run()


def recorded(run: Callable[[], torch.Tensor], warmup: int = 3) -> Callable[[], torch.Tensor]:
    """Record what `run` launches as a CUDA graph; what is returned replays it into the same output.

    The first calls compile kernels and ask for workspaces, which must not happen while a graph is recorded; as PyTorch
    asks, they run on a stream of their own.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return partial(_replayed, graph, output, run)


def _replayed(graph: torch.cuda.CUDAGraph, output: torch.Tensor, run: object) -> torch.Tensor:
    """Replay a graph. It knows its inputs by address alone: `run` is here because it keeps them in memory."""
    graph.replay()
    return output


class Sublayer(Protocol):
    """An attention, an FFN or a linear in the place of one, with its norm."""

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, call: Call | None = None, slot: int | None = None
    ) -> torch.Tensor:
        """What it adds to x, T [N, D]; with a residual, that plus the residual. An attention needs call and slot."""


def _sequential(block: Sequence[Sublayer], slot: int | None, x: torch.Tensor, call: Call) -> torch.Tensor:
    for sublayer in block:
        x = sublayer(x, x, call, slot)
    return x


def _parallel(
    blocks: Sequence[Sequence[Sublayer]], slots: Sequence[int | None], x: torch.Tensor, call: Call
) -> torch.Tensor:
    """y = x + sum_j (f_j(x) - x), where f_j(x) - x is what the sublayers of block j add."""
    y = x
    for block, slot in zip(blocks, slots, strict=True):
        inner = x
        for sublayer in block:
            part = sublayer(inner, None, call, slot)
            y, inner = y + part, inner + part
    return y


def _onto(y: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return y if residual is None else residual + y


@dataclass(frozen=True, slots=True)
class _Norm:
    """RMSNorm of the last axis; PyTorch's own, one kernel, rounds once where the reference rounds twice."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class _LinearSublayer:
    norm: _Norm
    linear: DeviceLinear

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, call: Call | None = None, slot: int | None = None
    ) -> torch.Tensor:
        return _onto(self.linear(self.norm(x)), residual)


@dataclass(frozen=True, slots=True)
class _GatedFFN:
    norm: _Norm
    gate_up: Sequence[DeviceLinear]  # one for both, or one each
    down: DeviceLinear
    activation: Activation

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, call: Call | None = None, slot: int | None = None
    ) -> torch.Tensor:
        normed = self.norm(x)
        parts = [linear(normed) for linear in self.gate_up]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        return _onto(self.down(ACTIVATIONS[self.activation](gate) * up), residual)

    def as_op(self) -> _WideFFN:
        """The same FFN, over the same weights, as the custom op."""
        gate, up = self.gate_up if len(self.gate_up) == 2 else halves(self.gate_up[0])
        linears = (gate, up, self.down)
        roundings = [linear.rounding for linear in (gate, self.down)]
        static = [None if rounding is None else rounding.scale for rounding in roundings]
        scales = [None if scale is None else scale.reshape(-1) for scale in (*(one.scale for one in linears), *static)]
        return _WideFFN(self.norm, tuple(one.weight for one in linears), tuple(scales), activations_of(gate.rounding))


@dataclass(frozen=True, slots=True)
class _WideFFN:
    """The custom op; the arguments are those of `plugins.contract.WIDE_FFN`."""

    norm: _Norm
    weights: tuple[torch.Tensor, ...]  # gate, up, down
    scales: tuple[torch.Tensor | None, ...]  # of gate, up, down, the input and the inner activations
    activations: str

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, call: Call | None = None, slot: int | None = None
    ) -> torch.Tensor:
        norm = self.norm
        return torch.ops.fuselage.wide_ffn(
            x, norm.weight, *self.weights, *self.scales, residual, norm.eps, self.activations
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    norm: _Norm
    qkv: Sequence[DeviceLinear]  # one for all three, or one each
    o: DeviceLinear
    q_norm: _Norm | None
    k_norm: _Norm | None
    source: Attention
    # What keys and values are rounded to; the cache holds T all the same.
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, call: Call | None = None, slot: int | None = None
    ) -> torch.Tensor:
        if call is None or slot is None:
            raise AssertionError("Bug: attention without a KV slot")
        normed = self.norm(x)
        parts = [linear(normed) for linear in self.qkv]
        query, key, value = self._heads(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), call)
        keys, values = call.cache.keys[slot], call.cache.values[slot]
        keys[call.sequences, :, call.positions] = key.transpose(1, 2)
        values[call.sequences, :, call.positions] = value.transpose(1, 2)
        mixed = self._mixed(query, key, value, call) if call.fresh else self._mixed(query, keys, values, call)
        return _onto(self.o(mixed.transpose(1, 2).reshape(len(x), -1)), residual)

    def _heads(self, qkv: torch.Tensor, call: Call) -> Iterator[torch.Tensor]:
        """[N, (n + 2 n_kv) * d] -> [B, n, S, d] and twice [B, n_kv, S, d], normed, turned and rounded."""
        source = self.source
        counts = [source.num_attention_heads, source.num_key_value_heads, source.num_key_value_heads]
        heads = qkv.view(*call.positions.shape, sum(counts), source.head_dim).transpose(1, 2)
        query, key, value = heads.split(counts, dim=1)
        query, key = (x if norm is None else norm(x) for x, norm in ((query, self.q_norm), (key, self.k_norm)))
        yield rotate(query, call.cos, call.sin)
        key = rotate(key, call.cos, call.sin)
        if self.kv_scales is not None and source.kv_quantization is not None:
            dtype = source.kv_quantization.dtype
            key, value = (
                fake_quantized(x, dtype, scale) for x, scale in zip((key, value), self.kv_scales, strict=True)
            )
        yield key
        yield value

    def _mixed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> torch.Tensor:
        """Attention of [B, n, S, d] over the keys there are, [B, n, S, d]."""
        window, tokens = self.source.sliding_window, query.shape[2]
        if call.fresh and (window is None or tokens <= window):  # flash attention takes no mask
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        mask = call.mask(window)
        if tokens > 1:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        # One token: the query heads of one key head are the rows of one product, and no key is repeated.
        grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
        mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)
        return mixed.reshape(query.shape)


@dataclass(frozen=True, slots=True)
class _Loader:
    """Makes the parts of a `TorchModel`."""

    device: torch.device
    dtype: torch.dtype
    load: Load
    wide_ffn: bool

    def tensor(self, tensor: LazyTensor) -> torch.Tensor:
        return self.load(tensor, self.device, self.dtype)

    def scale(self, tensor: LazyTensor) -> torch.Tensor:
        return self.load(tensor, self.device, torch.float32)

    def norm(self, norm: RMSNorm) -> _Norm:
        return _Norm(self.tensor(norm.weight), norm.eps)

    def linear(self, linear: Linear) -> DeviceLinear:
        return linear_on_device(linear, self.device, self.dtype, self.load)

    def together(self, linears: Sequence[Linear]) -> list[DeviceLinear]:
        """Linears of one input: one GEMM if they can be."""
        return [self.linear(linear) for linear in ([joined(linears)] if can_be_one(linears) else linears)]

    def block(self, block: Block) -> list[Sublayer]:
        sublayers: list[Sublayer] = []
        for sublayer in (block.attention, block.ffn):
            if isinstance(sublayer, Attention):
                sublayers.append(self.attention(sublayer))
            elif isinstance(sublayer, FFN):
                gated = self.gated(sublayer)
                sublayers.append(gated.as_op() if self.wide_ffn else gated)
            elif sublayer is not None:
                sublayers.append(_LinearSublayer(self.norm(sublayer.norm), self.linear(sublayer.linear)))
        return sublayers

    def attention(self, attention: Attention) -> _Attention:
        q_norm, k_norm = (None if norm is None else self.norm(norm) for norm in (attention.q_norm, attention.k_norm))
        kv = attention.kv_quantization
        return _Attention(
            norm=self.norm(attention.norm),
            qkv=self.together([attention.q_proj, attention.k_proj, attention.v_proj]),
            o=self.linear(attention.o_proj),
            q_norm=q_norm,
            k_norm=k_norm,
            source=attention,
            kv_scales=None if kv is None else (self.scale(kv.k_scale), self.scale(kv.v_scale)),
        )

    def gated(self, ffn: FFN) -> _GatedFFN:
        gate_up = self.together([ffn.gate_proj, ffn.up_proj])
        return _GatedFFN(self.norm(ffn.norm), gate_up, self.linear(ffn.down_proj), ffn.activation)


def joined(linears: Sequence[Linear]) -> Linear:
    """Linears that `can_be_one` as one, their rows one after the other."""
    first = linears[0]
    biases = filled_biases(linears)
    quantization = first.quantization
    if quantization is not None and quantization.weight_scale.shape:
        scales = [linear.quantization.weight_scale for linear in linears if linear.quantization is not None]
        quantization = Quantization(weight_scale=concat(scales, axis=0), input=quantization.input)
    return Linear(
        weight=_below_each_other([linear.weight for linear in linears]),
        bias=None if biases is None else _below_each_other(biases),
        quantization=quantization,
    )


def _below_each_other(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Of different dtypes in float32, which holds float16 and bfloat16 exactly."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [cast(tensor, FLOAT32) for tensor in tensors]
    return concat(tensors, axis=0)


def _slots(graph: ModelGraph) -> list[list[int | None]]:
    """The KV slot of every block of every entry of `graph.blocks`."""
    indices = itertools.count()
    return [[graph.kv_slots.get(next(indices)) for _ in members(entry)] for entry in graph.blocks]
