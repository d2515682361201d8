"""Lazy tensors of 8-bit codes and of their scales; the arithmetic is that of `exporter.numerics`.

A scale is computed when it is first read and kept: one number, or one per row. Codes with one scale for the whole
tensor need a pass over the source before they can be written; codes with a scale per row need none, and leave their
scales behind for whoever reads those next.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporter.dtypes import FLOAT32, DType
from exporter.errors import CheckpointError, GraphError
from exporter.lazy import Derived, LazyTensor, computed, is_finite, leaves, reshape, slice_columns
from exporter.numerics import LARGEST, amax, dequantize, quantize, scale_from_amax


class _RowScales(Derived):
    __slots__ = ("_format", "_known", "_scales")

    def __init__(self, source: LazyTensor, dtype: DType) -> None:
        super().__init__(source.shape[:1], FLOAT32, source)
        self._format = dtype
        self._scales = np.zeros(source.shape[0], np.float32)
        self._known = np.zeros(source.shape[0], bool)

    def rows(self, start: int, stop: int) -> np.ndarray:
        if not self._known[start:stop].all():
            step = max(1, (1 << 20) // self.sources[0].widest_row_nbytes)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                self.of_rows(first, self.sources[0].rows(first, last))
        return self._scales[start:stop]

    def of_rows(self, start: int, values: np.ndarray) -> np.ndarray:
        """The scales of rows that were just read; remembered."""
        stop = start + len(values)
        if not self._known[start:stop].all():
            self._scales[start:stop] = scale_from_amax(_amax(values, 1, self.sources[0]), self._format)
            self._known[start:stop] = True
        return self._scales[start:stop]


class _Codes(Derived):
    __slots__ = ()

    def __init__(self, source: LazyTensor, scale: LazyTensor, dtype: DType) -> None:
        super().__init__(source.shape, dtype, source, scale)

    def rows(self, start: int, stop: int) -> np.ndarray:
        source, scale = self.sources
        values = source.rows(start, stop)
        if isinstance(scale, _RowScales) and scale.sources[0] is source:
            scales = scale.of_rows(start, values)
        else:
            scales = scale.rows(start, stop)
        return quantize(values, scales, self.dtype)

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        source, scale = self.sources
        return _Codes(slice_columns(source, start, stop), scale, self.dtype)


class _Values(Derived):
    __slots__ = ()

    def __init__(self, codes: LazyTensor, scale: LazyTensor) -> None:
        super().__init__(codes.shape, FLOAT32, codes, scale)

    def rows(self, start: int, stop: int) -> np.ndarray:
        codes, scale = self.sources
        return dequantize(codes.rows(start, stop), scale.rows(start, stop))

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        codes, scale = self.sources
        return _Values(slice_columns(codes, start, stop), scale)


class _StoredScale(Derived):
    __slots__ = ("_file", "_tensor")

    def __init__(self, source: LazyTensor, file: object, tensor: str) -> None:
        super().__init__(source.shape, FLOAT32, source)
        self._file = file
        self._tensor = tensor

    def rows(self, start: int, stop: int) -> np.ndarray:
        scales = self.sources[0].rows(start, stop).astype(np.float32)
        wrong = scales[~(np.isfinite(scales) & (scales > 0))]
        if wrong.size:
            raise CheckpointError(
                "a scale is a positive number", file=self._file, tensor=self._tensor, found=wrong.flat[0]
            )
        return scales


def _amax(values: np.ndarray, axis: int | None, source: LazyTensor) -> np.ndarray:
    """`exporter.numerics.amax` of rows of `source`; an error says which tensor of which file is to blame."""
    try:
        return amax(values, axis)
    except CheckpointError as error:
        wrong = next((leaf for leaf in leaves(source) if not is_finite(leaf)), None)
        error.tensor, error.file = getattr(wrong, "name", None), getattr(wrong, "path", None)
        raise


def tensor_scale(sources: Sequence[LazyTensor], dtype: DType) -> LazyTensor:
    """One scale for all of `sources`, float32 []: tensors that one GEMM reads as one share it."""

    def find(*tensors: LazyTensor) -> np.ndarray:
        largest = np.max([_amax(piece, None, tensor) for tensor in tensors for piece in tensor.chunks()])
        return scale_from_amax(largest, dtype)

    return computed((), FLOAT32, find, *sources)


def row_scales(source: LazyTensor, dtype: DType) -> LazyTensor:
    """One scale per row of a matrix, float32 [rows]."""
    return _RowScales(source, dtype)


def quantized(source: LazyTensor, scale: LazyTensor, dtype: DType) -> LazyTensor:
    """The codes of a matrix in `dtype` under `scale`, float32 [] or [rows]."""
    if dtype not in LARGEST:
        raise GraphError("not a format for codes", expected=" or ".join(map(str, LARGEST)), found=dtype)
    if scale.shape not in ((), source.shape[:1]):
        raise GraphError("a scale fits its matrix", expected=f"[] or {list(source.shape[:1])}", found=list(scale.shape))
    return _Codes(source, scale, dtype)


def dequantized(codes: LazyTensor, scale: LazyTensor) -> LazyTensor:
    """codes * scale in float32."""
    return _Values(codes, scale)


def stored_scale(source: LazyTensor, shape: Sequence[int], *, file: object, tensor: str) -> LazyTensor:
    """A scale as a folder has it, in any float dtype and with or without a last axis of one: float32 [] or [out].

    Its values are held against their rule when they are read, not before.

    Args:
        file, tensor: where it comes from, for the error.

    Raises:
        CheckpointError: when it is read, if a number is zero, negative, NaN or infinite.
    """
    return _StoredScale(reshape(source, shape), file, tensor)
