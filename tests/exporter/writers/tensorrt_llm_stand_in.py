"""A stand-in for the modules of TensorRT-LLM that our model class imports, which computes with torch on a CPU.

Classes and functions have the names and the signatures of TensorRT-LLM 1.1, so that a call with an argument that the
real one lacks fails here too. What they compute was written anew from the documented behaviour: tensors are torch
tensors [tokens, features] of one sequence, ranks of a tensor-parallel group are threads that meet in `allreduce`.

    module.Module, ModuleList                      tensorrt_llm/module.py
    functional.allreduce, allgather                tensorrt_llm/functional.py
    layers.linear, mlp, normalization, attention   tensorrt_llm/layers/*.py
    quantization.layers                            tensorrt_llm/quantization/layers.py
    quantize                                       tensorrt_llm/quantization/quantize.py
    models.nemotron_nas.model                      tensorrt_llm/models/nemotron_nas/model.py
"""

from __future__ import annotations

import fnmatch
import inspect
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.exporter.writers.trtllm_loader import rotated

RANK = threading.local()  # .tp_rank and .world of the thread that simulates a rank


class World:
    """What the ranks of one tensor-parallel group have in common."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size
        self.all_reduces = 0

    def exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.slots[RANK.tp_rank] = tensor
        self.barrier.wait()
        tensors = list(self.slots)
        self.barrier.wait()
        return tensors


def allreduce(tensor, group, all_reduce_params=None):
    assert list(group) == list(range(RANK.world.size))
    if RANK.tp_rank == 0:
        RANK.world.all_reduces += 1
    return sum(RANK.world.exchange(tensor))


def allgather(tensor, group, gather_dim=0):
    return torch.cat(RANK.world.exchange(tensor), gather_dim)


# --- module.py


class Parameter:
    def __init__(self, shape, dtype=None):
        self.shape = tuple(shape)
        self.value: Any = None


class Module:
    def __init__(self):
        self._modules: dict[str, Any] = {}
        self._parameters: dict[str, Any] = {}

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def __setattr__(self, name, value):
        if isinstance(value, (Module, Parameter)):
            self.__dict__.pop(name, None)
            self.__dict__["_modules" if isinstance(value, Module) else "_parameters"][name] = value
        else:
            object.__setattr__(self, name, value)

    def __getattr__(self, name):
        for kind in ("_parameters", "_modules"):
            if name in self.__dict__.get(kind, {}):
                return self.__dict__[kind][name]
        raise AttributeError(name)

    def named_modules_with_parent(self, prefix="", parent=None):
        yield prefix, self, parent
        current = self if parent is None else getattr(parent, prefix.rpartition(".")[2])
        for name, child in list(current._modules.items()):
            yield from child.named_modules_with_parent(f"{prefix}.{name}".lstrip("."), current)

    def named_parameters(self, prefix=""):
        for name, parameter in self._parameters.items():
            yield f"{prefix}.{name}".lstrip("."), parameter
        for name, child in self._modules.items():
            yield from child.named_parameters(f"{prefix}.{name}".lstrip("."))


class ModuleList(Module):
    def __init__(self, modules):
        super().__init__()
        for number, module in enumerate(modules):
            self._modules[str(number)] = module

    def __getitem__(self, index):
        return list(self._modules.values())[index]

    def __len__(self):
        return len(self._modules)


# --- layers


class LinearBase(Module):
    def __init__(self, local_in_features, local_out_features, bias, dtype, tp_group, tp_size):
        super().__init__()
        assert bias is False
        self.in_features, self.out_features = local_in_features, local_out_features
        self.bias, self.dtype, self.tp_group, self.tp_size = None, dtype, tp_group, tp_size
        self.weight = Parameter((local_out_features, local_in_features), dtype)

    def multiply(self, x):
        return x @ self.weight.value.T

    def forward(self, x, lora_runtime_params=None, lora_hidden_state=None, **kwargs):
        return self.collect(self.multiply(x), **kwargs)


class ColumnLinear(LinearBase):
    def __init__(
        self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, gather_output=True,
        share_weight=None, strict_dtype=False, pad_lda=0, pad_ldc=0, prefer_managed_weight=True, is_qkv=False,
    ):  # fmt: skip
        super().__init__(in_features, out_features // tp_size, bias, dtype, tp_group, tp_size)
        self.gather_output = gather_output

    def collect(self, x):
        gathers = self.gather_output and self.tp_size > 1 and self.tp_group is not None
        return allgather(x, self.tp_group, gather_dim=-1) if gathers else x


class RowLinear(LinearBase):
    def __init__(
        self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, strict_dtype=False,
        pad_lda=0, prefer_managed_weight=True, is_expert=False,
    ):  # fmt: skip
        super().__init__(in_features // tp_size, out_features, bias, dtype, tp_group, tp_size)

    def collect(self, x, all_reduce_params=None):
        return allreduce(x, self.tp_group) if self.tp_size > 1 and self.tp_group is not None else x


class RmsNorm(Module):
    def __init__(self, normalized_shape, num_groups=1, eps=1e-06, elementwise_affine=True, dtype=None):
        super().__init__()
        self.normalized_shape, self.eps, self.dtype = normalized_shape, eps, dtype
        self.weight = Parameter((normalized_shape,), dtype)

    def forward(self, x, normalized_shape=None):
        return self.weight.value * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class GatedMLP(Module):
    def __init__(
        self, hidden_size, ffn_hidden_size, hidden_act, bias=True, dtype=None, tp_group=None, tp_size=1,
        quant_mode=None, inner_layernorm=False, eps=1e-05, is_expert=False,
    ):  # fmt: skip
        super().__init__()
        self.hidden_size, self.ffn_hidden_size, self.hidden_act, self.bias = (
            hidden_size, ffn_hidden_size, hidden_act, bias,
        )  # fmt: skip
        self.dtype, self.tp_group, self.tp_size, self.quant_mode = dtype, tp_group, tp_size, quant_mode
        column = {"bias": bias, "dtype": dtype, "tp_group": tp_group, "tp_size": tp_size}
        self.fc = ColumnLinear(hidden_size, ffn_hidden_size, gather_output=False, **column)
        self.proj = RowLinear(ffn_hidden_size, hidden_size, **column)
        self.gate = ColumnLinear(hidden_size, ffn_hidden_size, gather_output=False, **column)

    def forward(self, hidden_states, lora_layer_params=None, all_reduce_params=None):
        assert self.hidden_act == "silu"
        return self.proj(F.silu(self.fc(hidden_states)) * self.gate(hidden_states), all_reduce_params=all_reduce_params)


class KeyValueCacheParams:
    def __init__(
        self, past_key_value=None, host_past_key_value_lengths=None, host_max_attention_window_sizes=None,
        host_sink_token_length=None, kv_cache_block_offsets=None, host_kv_cache_block_offsets=None,
        host_kv_cache_pool_pointers=None, host_kv_cache_pool_mapping=None, cache_indirection=None,
        past_key_value_length=None, cross_kv_cache_block_offsets=None, host_cross_kv_cache_block_offsets=None,
        host_cross_kv_cache_pool_pointers=None, host_cross_kv_cache_pool_mapping=None,
    ):  # fmt: skip
        self.past_key_value = past_key_value
        self.host_past_key_value_lengths = host_past_key_value_lengths
        self.host_max_attention_window_sizes = host_max_attention_window_sizes
        self.host_sink_token_length = host_sink_token_length
        self.kv_cache_block_offsets = kv_cache_block_offsets
        self.host_kv_cache_block_offsets = host_kv_cache_block_offsets
        self.host_kv_cache_pool_pointers = host_kv_cache_pool_pointers
        self.host_kv_cache_pool_mapping = host_kv_cache_pool_mapping
        self.cache_indirection = cache_indirection

    def fill_none_tensor_list(self, list_size):
        if self.past_key_value is None:
            self.past_key_value = tuple([None] * list_size)


class _AttentionBase(Module):
    """What every attention class does around its two linears: the attention plugin over the KV cache.

    The cache is a list with one entry per attention layer of the rank, {"kv_heads": n, "key": ..., "value": ...}, and
    travels as `kv_cache_block_offsets`. `local_layer_idx` chooses the entry, as in the plugin.
    """

    def _set(self, **values):
        for name, value in values.items():
            setattr(self, name, value)

    def _attend(self, qkv, kv_cache_params, attention_params):
        params = kv_cache_params
        for one in (
            params.host_kv_cache_pool_mapping, params.host_kv_cache_pool_pointers, params.host_kv_cache_block_offsets,
            params.cache_indirection, params.host_max_attention_window_sizes, params.host_sink_token_length,
        ):  # fmt: skip
            assert one is not None
        hs, heads, kv_heads = self.attention_head_size, self.num_attention_heads, self.num_attention_kv_heads
        slot = kv_cache_params.kv_cache_block_offsets[self.local_layer_idx]
        assert slot["kv_heads"] == kv_heads, "another layer's cache"
        start = kv_cache_params.host_past_key_value_lengths
        assert (0 if slot["key"] is None else slot["key"].shape[1]) == start, "a cache that another layer wrote to"
        query, key, value = qkv.split([heads * hs, kv_heads * hs, kv_heads * hs], -1)
        query, key, value = (x.view(len(qkv), -1, hs).transpose(0, 1) for x in (query, key, value))
        query, key = (rotated(x[None], attention_params, start)[0] for x in (query, key))
        if "kv_cache_scaling_factor" in self._parameters:
            to_real, to_code = self.kv_cache_scaling_factor.value, self.kv_cache_rcp_scaling_factor.value
            key, value = (self.kv_round(x * to_code) * to_real for x in (key, value))
        if slot["key"] is not None:
            key, value = torch.cat([slot["key"], key], 1), torch.cat([slot["value"], value], 1)
        slot["key"], slot["value"] = key, value
        tokens, used = query.shape[1], key.shape[1]
        visible = torch.arange(used)[None, :] <= start + torch.arange(tokens)[:, None]
        repeat = heads // kv_heads
        key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return mixed.transpose(0, 1).reshape(tokens, -1)


class Attention(_AttentionBase):
    def __init__(
        self, *, local_layer_idx, hidden_size, num_attention_heads, num_kv_heads=None, max_position_embeddings=1024,
        num_layers=1, apply_query_key_layer_scaling=False, attention_head_size=None, qk_layernorm=False,
        inner_layernorm=False, eps=1e-05, attention_mask_type=None, bias=True, dtype=None,
        position_embedding_type=None, rotary_embedding_base=10000.0, rotary_embedding_scaling=None,
        rotary_embedding_percentage=1.0, rope_scaling_short_factors=None, rope_scaling_long_factors=None,
        tp_group=None, tp_size=1, tp_rank=0, quant_mode=None, dense_bias=None, clip_qkv=None, alibi_bias_max=8,
        skip_cross_kv=False,
    ):  # fmt: skip
        super().__init__()
        assert bias is False
        assert attention_mask_type == "causal"
        assert position_embedding_type == "rope_gpt_neox"
        assert num_attention_heads % tp_size == 0
        kv_heads = (num_kv_heads + tp_size - 1) // tp_size
        self._set(
            local_layer_idx=local_layer_idx, hidden_size=hidden_size, attention_head_size=attention_head_size,
            num_attention_heads=num_attention_heads // tp_size, num_kv_heads=num_kv_heads,
            num_attention_kv_heads=kv_heads, bias=bias, dense_bias=bias, dtype=dtype, tp_group=tp_group,
            tp_size=tp_size, tp_rank=tp_rank, quant_mode=quant_mode, attention_mask_type=attention_mask_type,
            max_position_embeddings=max_position_embeddings, position_embedding_type=position_embedding_type,
            rotary_embedding_base=rotary_embedding_base, rotary_embedding_scaling=rotary_embedding_scaling,
        )  # fmt: skip
        sizes = (tp_size * (self.num_attention_heads + 2 * kv_heads) * attention_head_size, hidden_size)
        common = {"bias": bias, "dtype": dtype, "tp_group": tp_group, "tp_size": tp_size}
        self.qkv = ColumnLinear(hidden_size, sizes[0], gather_output=False, **common)
        self.dense = RowLinear(num_attention_heads * attention_head_size, hidden_size, **common)

    def forward(
        self, hidden_states, attention_mask=None, attention_packed_mask=None, use_cache=False,
        spec_decoding_params=None, mrope_params=None, kv_cache_params=None, attention_params=None,
        encoder_output=None, position_embedding=None, norm_before_bmm1=False, lora_layer_params=None,
        cross_kv_cache_gen=None, cross_kv_reuse=None, all_reduce_params=None, skip_attn=None,
    ):  # fmt: skip
        context = self._attend(self.qkv(hidden_states), kv_cache_params, attention_params)
        output = self.dense(context, all_reduce_params=all_reduce_params)
        return (output, None) if use_cache else output


# --- quantization/layers.py, with codes as floats


def to_fp8(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def to_int8(x):
    return x.round().clamp(-128, 127)


def per_token(x, largest, rounded):
    scale = x.abs().amax(-1, keepdim=True) / largest
    return rounded(x / scale), scale


class _FP8(LinearBase):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.activation_scaling_factor = Parameter((1,))
        self.weights_scaling_factor = Parameter((1,))

    def multiply(self, x):
        a, w = self.activation_scaling_factor.value, self.weights_scaling_factor.value
        return (to_fp8(x / a) @ self.weight.value.float().T) * (a * w)


class FP8Linear(_FP8, ColumnLinear):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, gather_output=True,
                 prefer_managed_weight=True, is_qkv=False):  # fmt: skip
        super().__init__(in_features, out_features, bias, dtype, tp_group, tp_size, gather_output)


class FP8RowLinear(_FP8, RowLinear):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1,
                 prefer_managed_weight=True, is_expert=False):  # fmt: skip
        super().__init__(in_features, out_features, bias, dtype, tp_group, tp_size)


class _WeightOnly(LinearBase):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        del self._parameters["weight"]
        self.weight = Parameter((self.in_features, self.out_features))  # packed when the checkpoint is loaded
        self.per_channel_scale = Parameter((self.out_features,))

    def multiply(self, x):
        return (x @ self.weight.value) * self.per_channel_scale.value


class WeightOnlyQuantColumnLinear(_WeightOnly, ColumnLinear):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, tp_rank=0,
                 gather_output=True, quant_mode=None, transa=False, transb=False, is_qkv=False,
                 prefer_managed_weight=True):  # fmt: skip
        assert in_features % (64 * tp_size) == out_features % (64 * tp_size) == 0, "the real layer would pad"
        super().__init__(in_features, out_features, bias, dtype, tp_group, tp_size, gather_output)


class WeightOnlyQuantRowLinear(_WeightOnly, RowLinear):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, tp_rank=0,
                 quant_mode=None, prefer_managed_weight=True, is_expert=False):  # fmt: skip
        assert in_features % (64 * tp_size) == out_features % (64 * tp_size) == 0, "the real layer would pad"
        super().__init__(in_features, out_features, bias, dtype, tp_group, tp_size)


class QuantMode:
    """The few questions that modules ask of `QuantMode`."""

    def __init__(self, algo=None):
        self.algo = algo

    def has_act_static_scaling(self):
        return self.algo == "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN"

    def has_fp8_rowwise(self):
        return self.algo == "FP8_PER_CHANNEL_PER_TOKEN"


class _PairLinear(LinearBase):
    """A linear of SmoothQuant or row-wise FP8: codes and a scale per token come in, or codes alone."""

    def _quantize(self, quant_mode, row):
        self.quant_mode = quant_mode
        if quant_mode.has_fp8_rowwise():
            self.per_channel_scale = Parameter((self.out_features,))
            return
        self.per_channel_scale = Parameter((1, self.out_features))
        if quant_mode.has_act_static_scaling():
            self.act_scale = Parameter((1, 1))
        if row:
            self.smoother = Parameter((1, self.in_features))

    def multiply(self, x):
        x, scale = (x, self.act_scale.value) if self.quant_mode.has_act_static_scaling() else x
        return (x @ self.weight.value.float().T) * scale * self.per_channel_scale.value


class SmoothQuantLinear(_PairLinear, ColumnLinear):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, gather_output=True,
                 quant_mode=None, prefer_managed_weight=True):  # fmt: skip
        super().__init__(in_features, out_features, bias, dtype, tp_group, tp_size, gather_output)
        self._quantize(quant_mode, row=False)

    def forward(self, x, lora_runtime_params=None):
        return self.collect(self.multiply(x))


class SmoothQuantRowLinear(_PairLinear, RowLinear):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, quant_mode=None,
                 prefer_managed_weight=True):  # fmt: skip
        super().__init__(in_features, out_features, bias, dtype, tp_group, tp_size)
        self._quantize(quant_mode, row=True)

    def forward(self, x, lora_runtime_params=None, all_reduce_params=None):
        return self.collect(self.multiply(x))


class SmoothQuantRmsNorm(RmsNorm):
    def __init__(self, normalized_shape, eps=1e-06, elementwise_affine=True, dtype=None, quant_mode=None, bias=False,
                 clamp_val=None):  # fmt: skip
        super().__init__(normalized_shape, eps=eps, dtype=dtype)
        self.quant_mode = quant_mode
        self.scale_to_int = Parameter((1,))

    def forward(self, x):
        normed = super().forward(x)
        if self.quant_mode.has_act_static_scaling():
            return to_int8(normed * self.scale_to_int.value)
        return per_token(normed, 127, to_int8)


class Fp8RowwiseRmsNorm(RmsNorm):
    def __init__(self, normalized_shape, eps=1e-06, elementwise_affine=True, dtype=None, quant_mode=None, bias=False,
                 clamp_val=None):  # fmt: skip
        super().__init__(normalized_shape, eps=eps, dtype=dtype)

    def forward(self, x):
        return per_token(super().forward(x), 448, to_fp8)


def _quantize_input(module, x, row_linear):
    if module.quant_mode.has_fp8_rowwise():
        return per_token(x, 448, to_fp8)
    x = x / row_linear.smoother.value
    if module.quant_mode.has_act_static_scaling():
        return to_int8(x * module.quantization_scaling_factor.value)
    return per_token(x, 127, to_int8)


class SmoothQuantGatedMLP(Module):
    def __init__(self, hidden_size, ffn_hidden_size, hidden_act, bias=True, dtype=None, tp_group=None, tp_size=1,
                 quant_mode=None):  # fmt: skip
        super().__init__()
        self.quant_mode = quant_mode
        common = {"bias": bias, "dtype": dtype, "tp_group": tp_group, "tp_size": tp_size, "quant_mode": quant_mode}
        self.fc = SmoothQuantLinear(hidden_size, ffn_hidden_size, gather_output=False, **common)
        self.gate = SmoothQuantLinear(hidden_size, ffn_hidden_size, gather_output=False, **common)
        self.proj = SmoothQuantRowLinear(ffn_hidden_size, hidden_size, **common)
        if quant_mode.has_act_static_scaling():
            self.quantization_scaling_factor = Parameter((1,))

    def forward(self, hidden_states, lora_layer_params=None):
        inner = F.silu(self.fc(hidden_states)) * self.gate(hidden_states)
        return self.proj(_quantize_input(self, inner, self.proj))


class Fp8RowwiseGatedMLP(SmoothQuantGatedMLP):
    def __init__(self, hidden_size, ffn_hidden_size, hidden_act, bias=True, dtype=None, tp_group=None, tp_size=1,
                 quant_mode=None, clamp_val=None):  # fmt: skip
        super().__init__(hidden_size, ffn_hidden_size, hidden_act, bias, dtype, tp_group, tp_size, quant_mode)


class SmoothQuantAttention(_AttentionBase):
    def __init__(
        self, *, local_layer_idx, hidden_size, num_attention_heads, num_kv_heads=None, max_position_embeddings=1024,
        num_layers=1, apply_query_key_layer_scaling=False, attention_head_size=None, attention_mask_type=None,
        bias=True, dense_bias=None, dtype=None, position_embedding_type=None, rotary_embedding_base=10000.0,
        rotary_embedding_scaling=None, rotary_embedding_percentage=1.0, tp_group=None, tp_size=1, tp_rank=0,
        scale_alibi_bias=False, paged_kv_cache=False, quant_mode=None,
    ):  # fmt: skip
        super().__init__()
        kv_heads = (num_kv_heads + tp_size - 1) // tp_size
        self._set(
            local_layer_idx=local_layer_idx, attention_head_size=attention_head_size, quant_mode=quant_mode,
            num_attention_heads=num_attention_heads // tp_size, num_attention_kv_heads=kv_heads,
        )  # fmt: skip
        common = {"bias": bias, "dtype": dtype, "tp_group": tp_group, "tp_size": tp_size, "quant_mode": quant_mode}
        rows = tp_size * (self.num_attention_heads + 2 * kv_heads) * attention_head_size
        self.qkv = SmoothQuantLinear(hidden_size, rows, gather_output=False, **common)
        self.dense = SmoothQuantRowLinear(num_attention_heads * attention_head_size, hidden_size, **common)
        if quant_mode.has_act_static_scaling():
            self.quantization_scaling_factor = Parameter((1,))

    def forward(
        self, hidden_states, attention_mask=None, use_cache=False, kv_cache_params=None, attention_params=None,
        spec_decoding_params=None, mrope_params=None, encoder_output=None, position_embedding=None,
        norm_before_bmm1=False, lora_layer_params=None, all_reduce_params=None,
    ):  # fmt: skip
        context = self._attend(self.qkv(hidden_states), kv_cache_params, attention_params)
        output = self.dense(_quantize_input(self, context, self.dense), all_reduce_params=all_reduce_params)
        return (output, None) if use_cache else output


class Fp8RowwiseAttention(SmoothQuantAttention):
    def forward(
        self, hidden_states, attention_mask=None, use_cache=False, kv_cache_params=None, attention_params=None,
        spec_decoding_params=None, encoder_output=None, position_embedding=None, norm_before_bmm1=False,
        lora_layer_params=None, all_reduce_params=None,
    ):  # fmt: skip
        return super().forward(
            hidden_states, use_cache=use_cache, kv_cache_params=kv_cache_params, attention_params=attention_params
        )


# --- quantization/quantize.py


def quantize(model: Module, config: Any) -> None:
    """Replace modules by type, as `PretrainedModel` does once a model is constructed."""
    algo = config.quantization["quant_algo"]
    excluded = config.quantization.get("exclude_modules") or ["*lm_head", "*vocab_embedding"]
    smooth = {RmsNorm: SmoothQuantRmsNorm, GatedMLP: SmoothQuantGatedMLP, Attention: SmoothQuantAttention}
    replacements: dict[Any, dict[type, Any]] = {
        None: {},
        "FP8": {ColumnLinear: FP8Linear, RowLinear: FP8RowLinear},
        "W8A16": {ColumnLinear: WeightOnlyQuantColumnLinear, RowLinear: WeightOnlyQuantRowLinear},
        "FP8_PER_CHANNEL_PER_TOKEN": {
            RmsNorm: Fp8RowwiseRmsNorm, GatedMLP: Fp8RowwiseGatedMLP, Attention: Fp8RowwiseAttention,
        },
        "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": smooth,
        "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": smooth,
    }  # fmt: skip
    mode = QuantMode(algo)
    for name, module, parent in model.named_modules_with_parent():
        kind = next((new for old, new in replacements[algo].items() if isinstance(module, old)), None)
        if replacements[algo] is smooth:  # has no exclusions
            left_out = name.rpartition(".")[2] in ("ln_f", "lm_head")
        else:
            left_out = any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded)
        if kind is None or left_out:
            continue
        # `get_init_params`: what the module's class and the new one both take must be an attribute of the module.
        own = inspect.signature(type(module).__init__).parameters
        takes = inspect.signature(kind.__init__).parameters
        parameters = {key: getattr(module, key) for key in takes if key in own and key in module.__dict__}
        if "quant_mode" in takes:
            parameters["quant_mode"] = mode
        if "bias" in takes:
            parameters["bias"] = False
        if isinstance(module, ColumnLinear):
            parameters["out_features"] = module.out_features * module.tp_size
        elif isinstance(module, RowLinear):
            parameters["in_features"] = module.in_features * module.tp_size
        elif isinstance(module, Attention):
            parameters["num_attention_heads"] = module.num_attention_heads * module.tp_size
        setattr(parent, name.rpartition(".")[2], kind(**parameters))
    if config.quantization["kv_cache_quant_algo"] is not None:
        rounded = {"INT8": to_int8, "FP8": to_fp8}[config.quantization["kv_cache_quant_algo"]]
        for _, module, _ in model.named_modules_with_parent():
            if isinstance(module, _AttentionBase):
                module.kv_cache_scaling_factor = Parameter((1,))
                module.kv_cache_rcp_scaling_factor = Parameter((1,))
                module.kv_round = rounded


# --- models/nemotron_nas/model.py


class DeciLMLayerListOutput:
    def __init__(self, hidden_states, present_kvs):
        self.hidden_states, self.present_kvs = hidden_states, present_kvs


class NoOp(Module):
    def forward(self, hidden_states, *args, **kwargs):
        return 0


class LinearReplacement(ColumnLinear):
    """`LinearAttention` and `LinearFFN`."""

    def forward(self, hidden_states):
        return super().forward(hidden_states)


class DeciLMDecoderLayer(Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.config = config
        self.layer_config = config.get_layer_config(layer_idx)
        self._init_attention()
        self._init_ffn()

    def _norm(self):
        return RmsNorm(normalized_shape=self.config.hidden_size, eps=self.config.norm_epsilon, dtype=self.config.dtype)

    def _linear(self):
        config = self.config
        return LinearReplacement(
            in_features=config.hidden_size, out_features=config.hidden_size, bias=False, dtype=config.dtype,
            tp_group=config.mapping.tp_group, tp_size=config.mapping.tp_size, gather_output=True,
        )  # fmt: skip

    def _init_attention(self):
        config, layer = self.config, self.layer_config
        if layer.is_noop_attention_layer:
            self.input_layernorm, self.attention = NoOp(), NoOp()
            return
        self.input_layernorm = self._norm()
        if layer.is_linear_attention_layer:
            self.attention = self._linear()
            return
        local = config.mapping.pp_layers(config.num_hidden_layers)
        before = [config.layer_types[number] for number in local if number < self.layer_idx]
        self.attention = Attention(
            local_layer_idx=before.count("attention"), hidden_size=config.hidden_size,
            attention_head_size=config.head_size, num_attention_heads=config.num_attention_heads,
            num_kv_heads=layer.num_key_value_heads, max_position_embeddings=config.max_position_embeddings,
            dtype=config.dtype, attention_mask_type="causal", bias=False, position_embedding_type="rope_gpt_neox",
            rotary_embedding_base=config.rotary_base, rotary_embedding_scaling=config.rotary_scaling,
            tp_group=config.mapping.tp_group, tp_size=config.mapping.tp_size, tp_rank=config.mapping.tp_rank,
            quant_mode=config.quant_mode,
        )  # fmt: skip

    def _init_ffn(self):
        config, layer = self.config, self.layer_config
        if layer.is_noop_ffn_layer:
            self.post_layernorm, self.ffn = NoOp(), NoOp()
            return
        self.post_layernorm = self._norm()
        if not layer.is_mlp_layer:
            self.ffn = self._linear()
            return
        self.ffn = GatedMLP(
            hidden_size=config.hidden_size, ffn_hidden_size=layer.intermediate_size, hidden_act=config.hidden_act,
            bias=False, dtype=config.dtype, tp_group=config.mapping.tp_group, tp_size=config.mapping.tp_size,
            quant_mode=config.quant_mode,
        )  # fmt: skip


class DeciLMDecoderLayerList(ModuleList):
    def __init__(self, cls, config):
        self.layer_list = config.mapping.pp_layers(config.num_hidden_layers)
        super().__init__([cls(config, number) for number in self.layer_list])
        self.attention_layer_list = [
            number for number, layer in zip(self.layer_list, self, strict=True) if layer.layer_config.is_attention_layer
        ]


class DeciLMModel(Module):
    def __init__(self, config):
        super().__init__()
        self.mapping = config.mapping
        if self.mapping.is_first_pp_rank():
            self.vocab_embedding = Module()
            self.ranks = config.mapping.tp_size if config.use_parallel_embedding else 1
            self.vocab_embedding.weight = Parameter((-(-config.vocab_size // self.ranks), config.hidden_size))
        self.layers = DeciLMDecoderLayerList(DeciLMDecoderLayer, config)
        if self.mapping.is_last_pp_rank():
            self.ln_f = RmsNorm(normalized_shape=config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)

    def forward(self, input_ids, hidden_states, kv_cache_params, attention_params):
        if self.mapping.is_first_pp_rank():
            hidden_states = self._embed(input_ids)
        output = self.layers.forward(
            hidden_states, use_cache=True, attention_mask=None, kv_cache_params=kv_cache_params,
            attention_params=attention_params, lora_params=None, spec_decoding_params=None,
        )  # fmt: skip
        hidden_states = output.hidden_states
        return self.ln_f(hidden_states) if self.mapping.is_last_pp_rank() else hidden_states

    def _embed(self, input_ids):
        rows = self.vocab_embedding.weight.value
        if self.ranks == 1:
            return F.embedding(input_ids, rows)
        local = input_ids - self.mapping.tp_rank * len(rows)
        is_ours = (local >= 0) & (local < len(rows))
        own = F.embedding(local.clamp(0, len(rows) - 1), rows) * is_ours[:, None]
        return allreduce(own, self.mapping.tp_group)


class DeciLMForCausalLM(Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = DeciLMModel(config)
        if config.mapping.is_last_pp_rank():
            tp_size = config.mapping.tp_size
            padded = -(-config.vocab_size // tp_size) * tp_size
            self.lm_head = ColumnLinear(
                config.hidden_size, padded, bias=False, dtype=config.dtype, tp_group=config.mapping.tp_group,
                tp_size=tp_size, gather_output=True,
            )  # fmt: skip

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Every parameter must be there, with its shape; of names that no parameter has we ask that there be none."""
        parameters = dict(self.named_parameters())
        assert set(parameters) == set(weights)
        for name, parameter in parameters.items():
            assert parameter.shape == tuple(weights[name].shape), name
            value = weights[name]
            parameter.value = value if value.dtype in (torch.float8_e4m3fn, torch.int8) else value.float()


# --- configuration and execution


class LayerConfig:
    def __init__(self, entry: dict[str, Any]) -> None:
        attention, ffn = entry["attention"], entry["ffn"]
        self.is_attention_layer = attention["impl"] == "attention"
        self.is_linear_attention_layer = attention["impl"] == "linear"
        self.is_noop_attention_layer = attention["impl"] == "no_op"
        self.is_mlp_layer = ffn["impl"] == "mlp"
        self.is_noop_ffn_layer = ffn["impl"] == "no_op"
        self.num_key_value_heads = attention["num_key_value_heads"]
        self.intermediate_size = ffn["intermediate_size"]


class Mapping:
    def __init__(self, rank: int, tp_size: int, pp_size: int) -> None:
        self.tp_size, self.pp_size, self.tp_rank, self.pp_rank = tp_size, pp_size, rank % tp_size, rank // tp_size
        self.tp_group = list(range(tp_size))

    def pp_layers(self, num_layers: int) -> list[int]:
        return torch.tensor_split(torch.arange(num_layers), self.pp_size)[self.pp_rank].tolist()

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1


class Config:
    """`DeciConfig`: every key of config.json is an attribute, also one that it does not know."""

    def __init__(self, entries: dict[str, Any], rank: int) -> None:
        self.__dict__.update(entries)
        self.mapping = Mapping(rank, entries["mapping"]["tp_size"], entries["mapping"]["pp_size"])
        self.layer_types = [entry["attention"]["impl"] for entry in entries["layer_configs"]]
        self.quant_mode = QuantMode(entries["quantization"]["quant_algo"])

    def get_layer_config(self, number: int) -> LayerConfig:
        return LayerConfig(self.layer_configs[number])


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import tensorrt_llm...` find what is above."""
    contents: dict[str, dict[str, Any]] = {
        "tensorrt_llm": {},
        "tensorrt_llm.functional": {"allreduce": allreduce},
        "tensorrt_llm.layers": {},
        "tensorrt_llm.layers.attention": {"KeyValueCacheParams": KeyValueCacheParams},
        "tensorrt_llm.layers.mlp": {"GatedMLP": GatedMLP},
        "tensorrt_llm.models": {},
        "tensorrt_llm.models.nemotron_nas": {},
        "tensorrt_llm.models.nemotron_nas.model": {
            kind.__name__: kind
            for kind in (DeciLMDecoderLayer, DeciLMDecoderLayerList, DeciLMForCausalLM, DeciLMLayerListOutput)
        },
        "tensorrt_llm.module": {"Module": Module},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)


class Engine:
    """All ranks of a checkpoint, each with its own model and KV cache, for one sequence."""

    def __init__(self, model_class: Callable[[Any], Any], config: dict[str, Any], ranks: list[Any]) -> None:
        self.config = config
        self.tp_size = config["mapping"]["tp_size"]
        self.length = 0
        self.models, self.caches = [], []
        for rank, weights in enumerate(ranks):
            configured = Config(config, rank)
            model = model_class(configured)
            quantize(model, configured)
            model.load(_preprocessed(model, weights))
            self.models.append(model)
            layers = [
                configured.get_layer_config(number)
                for number in configured.mapping.pp_layers(len(configured.layer_types))
            ]
            kv_heads = [-(-layer.num_key_value_heads // self.tp_size) for layer in layers if layer.is_attention_layer]
            self.caches.append([{"kv_heads": heads, "key": None, "value": None} for heads in kv_heads])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [S]; returns the logits of all of them, [S, V]."""
        hidden = None
        for first in range(0, len(self.models), self.tp_size):
            hidden = self._stage(range(first, first + self.tp_size), tokens, hidden)
        self.length += len(tokens)
        return hidden[:, : self.config["vocab_size"]]

    def _stage(self, ranks: range, tokens: torch.Tensor, hidden: Any) -> Any:
        self.world = World(self.tp_size)
        outputs: list[Any] = [None] * self.tp_size
        errors: list[BaseException] = []

        def run(rank: int) -> None:
            RANK.tp_rank, RANK.world = rank - ranks.start, self.world
            try:
                outputs[RANK.tp_rank] = self._forward(rank, tokens, hidden)
            except BaseException as error:
                errors.append(error)
                self.world.barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        assert all(torch.equal(outputs[0], output) for output in outputs[1:])
        return outputs[0]

    @torch.inference_mode()
    def _forward(self, rank: int, tokens: torch.Tensor, hidden: Any) -> torch.Tensor:
        model = self.models[rank]
        params = KeyValueCacheParams(
            host_past_key_value_lengths=self.length, host_max_attention_window_sizes=1, host_sink_token_length=0,
            kv_cache_block_offsets=self.caches[rank], host_kv_cache_block_offsets=1, host_kv_cache_pool_pointers=1,
            host_kv_cache_pool_mapping=1, cache_indirection=1,
        )  # fmt: skip
        hidden = model.transformer(tokens, hidden, params, self.config)
        return model.lm_head(hidden) if model.config.mapping.is_last_pp_rank() else hidden


def _preprocessed(model: Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`preprocess_weights`: weights of weight-only linears become INT8 under |max| / 128 of every output."""
    result = dict(weights)
    for name, module, _ in model.named_modules_with_parent():
        if isinstance(module, _WeightOnly):
            weight = result.pop(f"{name}.weight").float()
            scale = weight.abs().amax(1) / 128
            result[f"{name}.weight"] = to_int8(weight / scale[:, None]).T.contiguous()
            result[f"{name}.per_channel_scale"] = scale
    return result
