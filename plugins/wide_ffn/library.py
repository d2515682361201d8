"""The wide FFN by library GEMMs, for more tokens than the kernels take: compute-bound, so fusing gains nothing.

Rounds as `plugins.wide_ffn.reference` does, and in two more places: each product comes out as bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from plugins.wide_ffn.reference import quantized, rms_norm

ELEMENTS = 1 << 28  # of inner at a time: 1 GiB in float32
INT8_DEPTH = 1 << 16  # products of codes that fit in 32 bits
MIN_INT8_ROWS = 32  # `torch._int_mm` wants more than 16 on a GPU
WEIGHT_ELEMENTS = 1 << 26  # of an 8-bit weight that are bfloat16 at a time


def wide_ffn_by_library(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_scale: torch.Tensor | None,
    up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    inner_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    epsilon: float,
    activations: str,
) -> torch.Tensor:
    """residual + down(silu(gate(n)) * up(n)), as `plugins.wide_ffn.reference`; so many tokens at a time as fit."""
    y = torch.empty_like(x)
    step = max(1, ELEMENTS // len(gate))
    for start in range(0, len(x), step):
        tokens = slice(start, start + step)
        normed = rms_norm(x[tokens], norm_weight, epsilon)
        gated = _linear(normed, gate, gate_scale, activations, input_scale)
        upped = _linear(normed, up, up_scale, activations, input_scale)
        inner = (F.silu(gated.to(torch.float32)) * upped.to(torch.float32)).to(torch.bfloat16)
        out = _linear(inner, down, down_scale, activations, inner_scale)
        y[tokens] = out if residual is None else residual[tokens] + out
    return y


def _linear(
    values: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activations: str,
    static_scale: torch.Tensor | None,
) -> torch.Tensor:
    """values @ (weight * weight_scale).T, bfloat16 [T, K] -> bfloat16 [T, N]; `values` are quantized first if asked."""
    if weight_scale is None:
        return F.linear(values, weight)
    codes, scale = quantized(values, weight.dtype, activations, static_scale)
    if scale is None:
        return (_wide_product(values, weight) * weight_scale).to(torch.bfloat16)
    if weight.dtype == torch.int8:
        scale = scale + (codes * 0).sum(-1, keepdim=True)  # NaN has no int8 code: it travels in the scale
    if any(size % 16 for size in weight.shape):
        total = _wide_product(codes.to(torch.bfloat16), weight)
    elif weight.dtype == torch.int8:
        total = _int8_product(codes.to(torch.int8), weight)
    else:
        return torch._scaled_mm(
            codes.to(weight.dtype),
            weight.T,
            scale_a=scale.expand(len(values), 1).contiguous(),
            scale_b=weight_scale.expand(len(weight))[None, :].contiguous(),
            out_dtype=torch.bfloat16,
        )
    return (total * (scale * weight_scale)).to(torch.bfloat16)


def _int8_product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """codes @ weight.T of int8, float32 [T, N]: exact within each part of the depth."""
    rows = F.pad(codes, (0, 0, 0, max(0, MIN_INT8_ROWS - len(codes))))
    parts = zip(rows.split(INT8_DEPTH, dim=1), weight.split(INT8_DEPTH, dim=1), strict=True)
    return torch.stack([torch._int_mm(a.contiguous(), b.T)[: len(codes)].to(torch.float32) for a, b in parts]).sum(0)


def _wide_product(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """values @ weight.T, float32 [T, N], the weight as bfloat16, in which every code is exact, a few rows at a time."""
    rows = max(1, WEIGHT_ELEMENTS // weight.shape[1])
    return torch.cat([F.linear(values, part.to(torch.bfloat16)) for part in weight.split(rows)], -1).to(torch.float32)
