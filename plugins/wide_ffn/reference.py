"""The wide FFN in plain PyTorch: what the kernels are held against, and what the op does on a CPU.

T = tokens, D = hidden_size, F = width (intermediate_size of all fused FFNs). Roundings, in this order:

    n     = bf16(norm_weight * bf16(x / sqrt(mean(x^2) + epsilon)))     in float32, as `exporter.reference.rms_norm`
    g, u  = (q(n) @ gate.T) * scales, (q(n) @ up.T) * scales            accumulated and kept in float32
    inner = bf16(silu(g) * u)                                           float32, rounded once
    y     = bf16(residual + (q(inner) @ down.T) * scales)               float32, rounded once

Where activations are "none", q is the identity. Otherwise q(v) = codes(v / s), nearest even and saturating, with s =
input_scale / inner_scale ("static") or, of every token, amax(v) / largest ("token": float32, at least the smallest
normal number, and 1 for a token of zeros; `exporter.numerics.scale_from_amax`). The product is one of codes, and
`scales` is s times the weight's scale.

`exporter.reference` rounds more often, because it runs op by op: codes times scales to bf16 (weights and inputs), g, u,
silu(g), and the FFN's output before the residual. Nothing else differs.

NaN and infinity among a token's x make its whole row of y NaN, whatever the number format, and no other row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
CHUNK = 1 << 24  # elements of a weight that are widened at a time


def wide_ffn_reference(
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
    *,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """residual + down(silu(gate(n)) * up(n)), n = rms_norm(x); the arguments are those of `plugins.contract.WIDE_FFN`.

    Args:
        accumulate: float32 or float64, of the products and what follows them up to the next rounding.

    Returns:
        bfloat16 [T, D].
    """
    normed = rms_norm(x, norm_weight, epsilon)
    codes, scale = quantized(normed, gate.dtype, activations, input_scale)
    gated = product(codes, gate, accumulate) * _factor(scale, gate_scale, accumulate)
    upped = product(codes, up, accumulate) * _factor(scale, up_scale, accumulate)
    inner = (F.silu(gated) * upped).to(torch.bfloat16)
    codes, scale = quantized(inner, down.dtype, activations, inner_scale)
    y = product(codes, down, accumulate) * _factor(scale, down_scale, accumulate)
    if residual is not None:
        y = y + residual.to(accumulate)
    return y.to(torch.bfloat16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """weight * (x / rms(x)), [T, D] bfloat16: normalized in float32, rounded before the weight and after it."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def quantized(
    values: torch.Tensor, dtype: torch.dtype, activations: str, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes as float32 [T, K], their scale: float32 [1] or [T, 1]); (values, None) where activations are "none".

    Codes stay float32 so that NaN, which int8 cannot hold, goes on.
    """
    if activations == "none":
        return values, None
    wide = values.to(torch.float32)
    if activations == "token":
        scale = scale_of_tokens(wide, dtype)
    if scale is None:
        raise AssertionError("Bug: static activations without a scale")
    quotient = wide / scale
    if dtype == torch.int8:
        return quotient.round().clamp(-128, 127), scale
    return quotient.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype).to(torch.float32), scale


def scale_of_tokens(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """amax / largest(dtype) of every row, float32 [T, 1]; 1 for a row of zeros."""
    amax = values.to(torch.float32).abs().amax(-1, keepdim=True)
    return torch.where(amax == 0, 1.0, (amax / LARGEST[dtype]).clamp(min=SMALLEST_SCALE))


def product(x: torch.Tensor, weight: torch.Tensor, accumulate: torch.dtype) -> torch.Tensor:
    """x @ weight.T, [T, K] x [N, K] -> [T, N], in `accumulate`; the weight is widened a few rows at a time."""
    wide = x.to(accumulate)
    rows = max(1, CHUNK // weight.shape[1])
    return torch.cat([wide @ part.to(accumulate).T for part in weight.split(rows)], dim=-1)


def _factor(scale: torch.Tensor | None, weight_scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | float:
    """Activation scale times weight scale: 1.0 or of a shape that broadcasts against [T, N]."""
    factor: torch.Tensor | float = 1.0
    for one in (scale, weight_scale):
        if one is not None:
            factor = one.to(dtype) * factor
    return factor
