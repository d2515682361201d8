"""Arithmetic of 8-bit formats on one array: ranges, scales, rounding. Symmetric, scales multiply: x = code * scale.

    amax  = max |x|                                float32, over everything, over each row or over each column
    scale = amax / largest(dtype)                  448 for float8_e4m3fn, 127 for int8
    code  = saturate(round_to_nearest_even(x / scale))

This is what NVIDIA ModelOpt stores (`modelopt/torch/export/quant_utils.py`): equal amax gives equal scales and codes.
An amax of zero has the scale 1, so that zeros come back as zeros. NaN and infinity are refused, never stored.

Work is cut into slabs of rows that stay in a core's cache; NumPy releases the GIL, so the slabs of one call run on
several cores (`THREADS`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np

from exporter.dtypes import BFLOAT16, FLOAT8_E4M3FN, INT8, DType
from exporter.errors import CheckpointError, GraphError

LARGEST: dict[DType, float] = {FLOAT8_E4M3FN: 448.0, INT8: 127.0}
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # a subnormal scale would lose the bits of what it divides
SLAB_BYTES = 1 << 18  # of float32
THREADS = os.cpu_count() or 1

T = TypeVar("T")


def amax(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """max |values| in float32: of everything ([]), of each row of a matrix (`axis` 1, [rows]) or column (0, [columns]).

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    if not values.size:
        raise GraphError("an empty tensor has no range", found=list(values.shape))
    if values.ndim < 2:
        found = _amax_of_slab(values, axis)
    else:
        parts = _by_slab(values, lambda rows: _amax_of_slab(values[rows], axis))
        found = np.concatenate(parts) if axis == 1 else np.max(parts, axis=0)
    if not np.isfinite(found).all():
        raise CheckpointError("a tensor that is to be quantized holds NaN or infinity")
    return np.asarray(found, np.float32)


def _amax_of_slab(values: np.ndarray, axis: int | None) -> np.ndarray:
    # NaN survives max and min, so nothing is hidden here.
    wide = values.astype(np.float32, copy=False)
    return np.asarray(np.maximum(wide.max(axis=axis), -wide.min(axis=axis)), np.float32)


def scale_from_amax(amax: np.ndarray, dtype: DType) -> np.ndarray:
    """amax / largest(dtype) in float32, of amax's shape; 1 where amax is 0.

    A range so small that its scale would be subnormal gets `SMALLEST_SCALE`: its codes are then smaller than they
    could be, and still right.

    Raises:
        GraphError: an amax is negative, NaN or infinite.
    """
    amax = np.asarray(amax, np.float32)
    if not (np.isfinite(amax) & (amax >= 0)).all():
        raise GraphError("a range is a finite number that is not negative", found=amax[~np.isfinite(amax) | (amax < 0)])
    largest = np.float32(LARGEST[dtype])
    with np.errstate(under="ignore", over="ignore"):
        scale = np.maximum(amax / largest, np.float32(SMALLEST_SCALE))
        # At the very end of float32 the quotient may round up, and the largest code would stand for infinity.
        scale = np.where(np.isinf(scale * largest), np.nextafter(scale, np.float32(0)), scale)
    return np.where(amax == 0, np.float32(1), scale).astype(np.float32)


def quantize(values: np.ndarray, scale: np.ndarray, dtype: DType) -> np.ndarray:
    """Codes of a matrix [rows, columns] (or of any array, under one scale) in `dtype`.

    Args:
        scale: float32 [] or, one per row, [rows].

    The quotient is taken in float32. Where one scale serves a bfloat16 or float16 array it is rounded to that format
    before it becomes a code: that is what PyTorch does with a tensor and a scalar, and so what ModelOpt stores.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    if values.ndim == 0:
        return quantize(values.reshape(1), scale, dtype).reshape(())
    codes = np.empty(values.shape, dtype.numpy)
    scale = np.asarray(scale, np.float32)

    def slab(rows: slice) -> None:
        divisor = scale[rows, None] if scale.ndim else scale
        codes[rows] = _codes(values[rows], divisor, dtype)

    _by_slab(values, slab)
    return codes


def _codes(values: np.ndarray, divisor: np.ndarray, dtype: DType) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        quotient = values.astype(np.float32) / divisor
        if divisor.ndim == 0 and values.dtype.itemsize == 2:
            quotient = quotient.astype(values.dtype).astype(np.float32)
    if not np.isfinite(quotient).all() and not np.isfinite(values.astype(np.float32)).all():
        raise CheckpointError("a tensor that is to be quantized holds NaN or infinity")
    if dtype == INT8:
        np.rint(quotient, out=quotient)
        np.clip(quotient, -128, 127, out=quotient)
        return quotient.astype(np.int8)
    return _to_float8_e4m3fn(quotient)


def _to_float8_e4m3fn(values: np.ndarray) -> np.ndarray:
    """Round float32 to nearest even, saturating.

    By way of bfloat16, for which a table has all codes: five times as fast as ml_dtypes' own conversion. What is cut
    off on that way rounds to odd, so that the second rounding is as right as if it were the only one.
    """
    bits = values.view(np.uint32)
    upper = (bits >> 16).astype(np.uint16)
    upper |= (bits & 0xFFFF) != 0
    return np.take(_codes_of_bfloat16(), upper).view(FLOAT8_E4M3FN.numpy)


@cache
def _codes_of_bfloat16() -> np.ndarray:
    every = np.arange(1 << 16, dtype=np.uint16).view(BFLOAT16.numpy).astype(np.float32)
    limit = LARGEST[FLOAT8_E4M3FN]
    return np.clip(np.nan_to_num(every), -limit, limit).astype(FLOAT8_E4M3FN.numpy).view(np.uint8)


def dequantize(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """codes * scale in float32; `scale` is float32 [] or, one per row, [rows]."""
    scale = np.asarray(scale, np.float32)
    with np.errstate(over="ignore"):  # a hostile scale: who needs finite numbers checks for them
        return codes.astype(np.float32) * (scale[:, None] if scale.ndim else scale)


def _by_slab(values: np.ndarray, work: Callable[[slice], T]) -> list[T]:
    """Run `work` on slabs of rows, on several threads where there are several slabs."""
    step = max(1, SLAB_BYTES * len(values) // (4 * max(1, values.size)))
    slabs = [slice(start, min(start + step, len(values))) for start in range(0, len(values), step)]
    if len(slabs) == 1 or THREADS == 1:
        return [work(rows) for rows in slabs]
    return list(_pool().map(work, slabs))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="numerics")
