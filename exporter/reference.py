"""Running a ModelGraph in PyTorch, one block in memory at a time: the definition that everything else is held against.

Shape letters: B = batch, S = tokens of this call, T = tokens in the cache, D = hidden_size, V = vocab_size,
Hq / Hkv = attention / key-value heads, d = head_dim. The residual stream is kept in `dtype`; norms and softmax are
taken in float32 (float64 if `dtype` is) as in transformers' Llama.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from exporter.dtypes import BY_NAME, INT8, DType
from exporter.errors import GraphError, TargetError
from exporter.graph import (
    Activation,
    Attention,
    Block,
    KVQuantization,
    Linear,
    ModelGraph,
    ParallelBlocks,
    members,
)
from exporter.lazy import LazyTensor
from exporter.lazy_quantized import dequantized
from exporter.numerics import LARGEST, SMALLEST_SCALE

# Is shown tensors on their way through a sublayer, each with a name:
#   "norm"       x / rms(x), [B, S, D]: before the norm's weight, so that it stays true when a weight is moved there
#   "o_proj"     the input of that projection, [B, S, Hq * d]
#   "down_proj"  likewise, [B, S, F]
#   "key", "value"  as they go to the KV cache, [B, Hkv, S, d]
Observe = Callable[[str, torch.Tensor], None]
BlockObserver = Callable[[int, str, str, torch.Tensor], None]  # the same after (member, "attention" or "ffn")

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.RELU: F.relu,
}

# Elements of logits to take at a time where two models are compared: a vocabulary is large, and softmaxes make copies.
LOGITS_TOGETHER = 1 << 25


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of every KV slot, [B, Hkv, capacity, d] each, and how many tokens each sequence holds."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    lengths: torch.Tensor  # int64 [B]

    @property
    def capacity(self) -> int | None:
        """None in a model without attention, which needs no cache."""
        return self.keys[0].shape[2] if self.keys else None


class Reference:
    """Runs `graph` on `device` in `dtype`.

    Blocks are loaded when they are needed and dropped after use, so memory is that of the largest block; with
    `resident` they are loaded once and kept, for graphs that fit and are run many times.

    Raises:
        TargetError: torch cannot use the device on this machine.
    """

    def __init__(
        self,
        graph: ModelGraph,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        resident: bool = False,
    ) -> None:
        self.graph = graph
        self.device = _usable(device)
        self.dtype = dtype
        self._kept: dict[int, LoadedBlock] | None = {} if resident else None
        self._first_slots = _first_slots(graph)
        self._ends: dict[str, torch.Tensor] = {}
        self._lm_head: LoadedLinear | None = None

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Empty caches with room for `capacity` tokens per sequence."""
        shapes = [(batch, a.num_key_value_heads, capacity, a.head_dim) for _, a in self.graph.attentions]
        return Cache(
            keys=tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes),
            values=tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes),
            lengths=torch.zeros(batch, dtype=torch.int64, device=self.device),
        )

    @torch.inference_mode()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Full causal forward without a cache: int64 [B, S] -> [B, S, V] in `dtype`."""
        return self.head(self.hidden_states(input_ids, None))

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor, cache: Cache, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Append right-padded tokens to every sequence of `cache`, which is changed in place.

        Args:
            input_ids: int64 [B, S].
            lengths: valid tokens of each row; None: all S.

        Returns:
            The logits of each row's last valid token, [B, V] in `dtype`.

        Raises:
            GraphError: the cache has no room.
        """
        batch, tokens = input_ids.shape
        valid = torch.tensor([tokens] * batch if lengths is None else list(lengths), device=self.device)
        if cache.capacity is not None and int(cache.lengths.max()) + tokens > cache.capacity:
            raise GraphError("the KV cache is full", expected=f"at most {cache.capacity} tokens")
        hidden = self.hidden_states(input_ids, cache)
        cache.lengths.add_(valid)
        return self.head(hidden[torch.arange(batch, device=self.device), valid - 1])

    def hidden_states(self, input_ids: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """The residual stream after the last block, [B, S, D], before the final norm."""
        return deque(self.residuals(input_ids, cache), maxlen=1).pop()  # to unpack them would keep all

    def residuals(self, input_ids: torch.Tensor, cache: Cache | None) -> Iterator[torch.Tensor]:
        """Yield the residual stream [B, S, D] before the first block and after every entry of `graph.blocks`."""
        x = self.embed(input_ids)
        yield x
        span = self.span(input_ids.shape, cache)
        for index in range(len(self.graph.blocks)):
            x = self.block(index)(x, span)
            yield x

    def block(self, index: int) -> LoadedBlock:
        """Entry `index` of `graph.blocks` with its weights in memory."""
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        loaded = LoadedBlock(self.graph.blocks[index], self._first_slots[index], self.device, self.dtype)
        if self._kept is not None:
            self._kept[index] = loaded
        return loaded

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and lm_head: [..., D] -> [..., V]."""
        norm, head = self.graph.norm, self.graph.lm_head
        normed = rms_norm(hidden, self._end("norm", norm.weight), norm.eps)
        if head is None:
            return F.linear(normed, self._end("embedding", self.graph.embedding))
        if self._lm_head is None:
            self._lm_head = loaded_linear(head, self.device, self.dtype)
        return apply_linear(self._lm_head, normed)

    def span(self, shape: Sequence[int], cache: Cache | None) -> Span:
        """Positions and rotations of a call that appends `shape` = [B, S] tokens to `cache`."""
        batch, tokens = shape
        start = cache.lengths if cache is not None else torch.zeros(batch, dtype=torch.int64, device=self.device)
        positions = start[:, None] + torch.arange(tokens, device=self.device)[None, :]  # [B, S]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        rope, head_dim = self.graph.rope, self.graph.head_dim
        if head_dim is None:
            return Span(positions, None, None, cache)
        frequencies = torch.from_numpy(rope.inverse_frequencies(head_dim)).to(self.device, wide)
        angles = positions[:, None, :, None].to(wide) * frequencies  # [B, 1, S, d / 2]
        cos, sin = (f(angles) * rope.attention_factor for f in (torch.cos, torch.sin))
        return Span(positions, cos.to(self.dtype), sin.to(self.dtype), cache)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream before the first block: int64 [B, S] -> [B, S, D]."""
        input_ids = input_ids.to(self.device)
        if self._kept is not None or "embedding" in self._ends:  # a tied head may have brought it
            return F.embedding(input_ids, self._end("embedding", self.graph.embedding))
        ids, where = input_ids.unique(return_inverse=True)
        rows = [torch_from_numpy(self.graph.embedding.rows(i, i + 1), self.device, self.dtype) for i in ids.tolist()]
        return torch.cat(rows)[where]

    def _end(self, name: str, tensor: LazyTensor) -> torch.Tensor:
        # What every call needs at both ends of the model is kept: it is one matrix, as large as a block.
        if name not in self._ends:
            self._ends[name] = torch_from_lazy(tensor, self.device, self.dtype)
        return self._ends[name]


def _usable(device: str | torch.device) -> torch.device:
    try:
        value = torch.zeros(1, device=device)
        value.cpu()  # which the device "meta", without values, refuses
    except (AssertionError, RuntimeError) as error:  # the first: torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise TargetError(
            f"torch cannot use this device ({reason})", expected="cpu, or cuda where there is a GPU", found=device
        ) from error
    return value.device


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one call: where they are and what they can see."""

    positions: torch.Tensor  # int64 [B, S]
    cos: torch.Tensor | None  # [B, 1, S, d / 2]; None in a model without attention
    sin: torch.Tensor | None
    cache: Cache | None


class LoadedBlock:
    """One entry of `graph.blocks` with its weights as torch tensors."""

    def __init__(
        self, entry: Block | ParallelBlocks, first_slot: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.members: tuple[Block, ...] = tuple(_on_device(block, device, dtype) for block in members(entry))
        self._slots = _slots_of(self.members, first_slot)

    def __call__(self, x: torch.Tensor, span: Span, observe: BlockObserver | None = None) -> torch.Tensor:
        """f(x), for parallel blocks x + sum_j (f_j(x) - x): [B, S, D] -> [B, S, D]."""
        attention, ffn = self.contributions(x, span, observe=observe)
        return x + attention + ffn

    def contributions(
        self,
        x: torch.Tensor,
        span: Span,
        *,
        attention: bool = True,
        ffn: bool = True,
        observe: BlockObserver | None = None,
    ) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """See the function `contributions`; with `attention` or `ffn` false the block runs without that sublayer."""
        return contributions(self.members, self._slots, x, span, attention=attention, ffn=ffn, observe=observe)


def contributions(
    blocks: Sequence[Any],
    slots: Sequence[int | None],
    x: torch.Tensor,
    span: Span,
    *,
    attention: bool = True,
    ffn: bool = True,
    observe: BlockObserver | None = None,
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """What attention and FFN (of all `blocks`) add to x: f(x) = x + both, [B, S, D] each, 0.0 where there is none.

    Args:
        blocks: a block or the members of a parallel group, with torch tensors; see `attend` and `feed_forward`.
        slots: the KV slot of each.
        attention, ffn: if false, run without that sublayer.
    """

    def observer(member: int, sublayer: str) -> Observe | None:
        return None if observe is None else partial(observe, member, sublayer)

    from_attention: torch.Tensor | float = 0.0
    from_ffn: torch.Tensor | float = 0.0
    for member, (block, slot) in enumerate(zip(blocks, slots, strict=True)):
        mixed = x
        if attention and block.attention is not None:
            contribution = attend(block.attention, x, span, slot, observer(member, "attention"))
            mixed, from_attention = x + contribution, from_attention + contribution
        if ffn and block.ffn is not None:
            from_ffn = from_ffn + feed_forward(block.ffn, mixed, observer(member, "ffn"))
    return from_attention, from_ffn


def attend(
    sublayer: Any, x: torch.Tensor, span: Span, slot: int | None, observe: Observe | None = None
) -> torch.Tensor:
    """What an attention (or the linear in its place) adds to the residual: [B, S, D] -> [B, S, D].

    `sublayer` has the fields of an Attention or a LinearSublayer, with torch tensors and, for linears, the fields of
    `LoadedLinear`. With a cache, new keys and values go to `slot` at each sequence's length.
    """
    normed = _normed(sublayer.norm, x, observe)
    if hasattr(sublayer, "linear"):
        return apply_linear(sublayer.linear, normed)
    batch, tokens, _ = x.shape

    def heads(projection: Any, norm: Any, count: int) -> torch.Tensor:
        y = apply_linear(projection, normed).view(batch, tokens, count, -1)
        if norm is not None:
            y = rms_norm(y, norm.weight, norm.eps)
        return y.transpose(1, 2)  # [B, count, S, d]

    if span.cos is None or span.sin is None:
        raise AssertionError("Bug: attention in a graph that says it has none")
    query = rotate(heads(sublayer.q_proj, sublayer.q_norm, sublayer.num_attention_heads), span.cos, span.sin)
    key = rotate(heads(sublayer.k_proj, sublayer.k_norm, sublayer.num_key_value_heads), span.cos, span.sin)
    value = heads(sublayer.v_proj, None, sublayer.num_key_value_heads)
    if observe is not None:
        observe("key", key)
        observe("value", value)
    if sublayer.kv_quantization is not None:
        kv = sublayer.kv_quantization
        key, value = fake_quantized(key, kv.dtype, kv.k_scale), fake_quantized(value, kv.dtype, kv.v_scale)
    key_positions = span.positions[:, None, :]  # [B, 1, T]
    if span.cache is not None:
        if slot is None:
            raise AssertionError("Bug: attention without a KV slot")
        keys, values = span.cache.keys[slot], span.cache.values[slot]
        rows = torch.arange(batch, device=x.device)[:, None]
        keys[rows, :, span.positions] = key.transpose(1, 2)
        values[rows, :, span.positions] = value.transpose(1, 2)
        used = int(span.positions.max()) + 1
        key, value = keys[:, :, :used], values[:, :, :used]
        key_positions = torch.arange(used, device=x.device)[None, None, :]
    # Right padding needs no mask of its own: what a padded token writes lies behind every valid position.
    visible = key_positions <= span.positions[:, :, None]  # [B, S, T]
    if sublayer.sliding_window is not None:
        visible = visible & (key_positions > span.positions[:, :, None] - sublayer.sliding_window)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None], enable_gqa=True)
    mixed = mixed.transpose(1, 2).reshape(batch, tokens, -1)
    if observe is not None:
        observe("o_proj", mixed)
    return apply_linear(sublayer.o_proj, mixed)


def feed_forward(sublayer: Any, x: torch.Tensor, observe: Observe | None = None) -> torch.Tensor:
    """What an FFN (or the linear in its place) adds to the residual: [..., D] -> [..., D]."""
    normed = _normed(sublayer.norm, x, observe)
    if hasattr(sublayer, "linear"):
        return apply_linear(sublayer.linear, normed)
    gate = ACTIVATIONS[sublayer.activation](apply_linear(sublayer.gate_proj, normed))
    inner = gate * apply_linear(sublayer.up_proj, normed)
    if observe is not None:
        observe("down_proj", inner)
    return apply_linear(sublayer.down_proj, inner)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * (x / rms(x)), normalized in float32 and rounded to x's dtype before the weight, as Llama does."""
    return weight * _over_rms(x, eps)


def _over_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.float32) if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _normed(norm: Any, x: torch.Tensor, observe: Observe | None) -> torch.Tensor:
    over_rms = _over_rms(x, norm.eps)
    if observe is not None:
        observe("norm", over_rms)
    return norm.weight * over_rms


def apply_linear(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """x @ weight.T + bias, [..., in] -> [..., out], of a `LoadedLinear` or anything with its fields."""
    if linear.input is not None:
        x = fake_quantized(x, linear.input.dtype, linear.input.scale)
    return F.linear(x, linear.weight, linear.bias)


def fake_quantized(x: torch.Tensor, dtype: DType, scale: torch.Tensor | None) -> torch.Tensor:
    """Round x to codes and back, in float32, under one scale ([]) or (None) one per token, the last axis being one."""
    wide = x.to(torch.float32)
    if scale is None:
        scale = scale_from_amax(wide.abs().amax(-1, keepdim=True), dtype)
    scale = scale.to(torch.float32)
    codes = wide / scale  # and from here on in place: of a wide FFN's weight, every copy has gigabytes
    if dtype == INT8:
        codes = codes.round_().clamp_(-128, 127)
    else:
        largest = LARGEST[dtype]
        codes = codes.clamp_(-largest, largest).to(getattr(torch, dtype.torch)).to(torch.float32)
    return codes.mul_(scale).to(x.dtype)


def scale_from_amax(amax: torch.Tensor, dtype: DType) -> torch.Tensor:
    """amax / largest(dtype), 1 where amax is 0, never subnormal: `exporter.numerics.scale_from_amax` in torch."""
    return torch.where(amax == 0, 1.0, (amax / LARGEST[dtype]).clamp_min(SMALLEST_SCALE))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn heads, [..., S, d], by the angles of `cos` and `sin`, [..., S, d / 2]: channel i goes with i + d / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def torch_from_lazy(tensor: LazyTensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Read a tensor, chunk by chunk, into a new torch tensor of `dtype` on `device`."""
    out = torch.empty(tensor.shape, dtype=dtype, device=device)
    start = 0
    for piece in tensor.chunks():
        rows = torch_from_numpy(piece, device, dtype)
        if not tensor.shape:
            return rows.reshape(())  # NumPy's contiguous arrays have an axis at least
        out[start : start + len(rows)] = rows
        start += len(rows)
    return out


def torch_from_numpy(values: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Convert an array of one of our dtypes; torch cannot take ml_dtypes arrays, so the bits travel as integers."""
    source = getattr(torch, BY_NAME[values.dtype.name].torch)
    bits = np.ascontiguousarray(values)
    if not bits.flags.writeable:
        bits = bits.copy()
    if bits.dtype.kind == "V" or bits.dtype.name in ("bfloat16", "float8_e4m3fn"):
        bits = bits.view({1: np.int8, 2: np.int16}[bits.dtype.itemsize])
    return torch.from_numpy(bits).view(source).to(device=device, dtype=dtype)


@dataclass(frozen=True, slots=True)
class LoadedInput:
    """An `InputQuantization` with a torch tensor."""

    dtype: DType
    scale: torch.Tensor | None  # float32 []


@dataclass(frozen=True, slots=True)
class LoadedLinear:
    """A `Linear` with torch tensors; a weight that was codes holds the values that they stand for."""

    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None = None  # [out]
    input: LoadedInput | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True, slots=True)
class LoadedKV:
    """A `KVQuantization` with torch tensors."""

    dtype: DType
    k_scale: torch.Tensor  # float32 []
    v_scale: torch.Tensor


def loaded_linear(linear: Linear, device: torch.device, dtype: torch.dtype) -> LoadedLinear:
    """Read a linear into torch tensors."""
    bias = None if linear.bias is None else torch_from_lazy(linear.bias, device, dtype)
    quantization = linear.quantization
    if quantization is None:
        return LoadedLinear(torch_from_lazy(linear.weight, device, dtype), bias)
    weight = torch_from_lazy(dequantized(linear.weight, quantization.weight_scale), device, dtype)
    if quantization.input is None:
        return LoadedLinear(weight, bias)
    scale = quantization.input.scale
    loaded = None if scale is None else torch_from_lazy(scale, device, torch.float32)
    return LoadedLinear(weight, bias, LoadedInput(quantization.input.dtype, loaded))


def _on_device(part: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same dataclasses with torch tensors, which have shapes too, in place of lazy ones."""
    if isinstance(part, LazyTensor):
        return torch_from_lazy(part, device, dtype)
    if isinstance(part, Linear):
        return loaded_linear(part, device, dtype)
    if isinstance(part, KVQuantization):
        scales = (torch_from_lazy(scale, device, torch.float32) for scale in (part.k_scale, part.v_scale))
        return LoadedKV(part.dtype, *scales)
    if is_dataclass(part) and not isinstance(part, type):
        return type(part)(**{f.name: _on_device(getattr(part, f.name), device, dtype) for f in fields(part)})
    return part


def _slots_of(blocks: Sequence[Block], first_slot: int) -> tuple[int | None, ...]:
    slots: list[int | None] = []
    for block in blocks:
        has_cache = isinstance(block.attention, Attention)
        slots.append(first_slot if has_cache else None)
        first_slot += has_cache
    return tuple(slots)


def _first_slots(graph: ModelGraph) -> list[int]:
    """For every entry of `graph.blocks`, the KV slot that its first attention has or would have."""
    first, slots = 0, []
    for entry in graph.blocks:
        slots.append(first)
        first += sum(isinstance(block.attention, Attention) for block in members(entry))
    return slots
