"""Parts of the wide FFN's kernels alone, as kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from plugins.wide_ffn.kernels import _codes, _magnitude, _scale_of


def codes_of(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 [n] -> codes [n]."""
    codes = torch.empty(len(values), dtype=dtype)
    _codes_kernel[(1,)](values, scale, codes, len(values), triton.next_power_of_2(len(values)))
    return codes


def scales_of(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 [n, 3] -> float32 [n]."""
    scales = torch.empty(len(values))
    codes = torch.empty(0, dtype=dtype)
    _scales_kernel[(1,)](values, codes, scales, len(values))
    return scales


@triton.jit
def _codes_kernel(values, scale, codes, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    divisor = tl.load(scale)
    loaded = tl.load(values + at, mask=at < count, other=0.0)
    found = _codes(loaded, divisor, tl.div_rn(1.0, divisor), codes.dtype.element_ty)
    tl.store(codes + at, found, mask=at < count)


@triton.jit
def _scales_kernel(values, codes, scales, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    largest = tl.zeros([ROWS], tl.int32)
    for column in range(3):
        largest = tl.maximum(largest, _magnitude(tl.load(values + row * 3 + column)))
    tl.store(scales + row, _scale_of(largest, codes.dtype.element_ty))
