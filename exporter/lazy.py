"""Tensors whose shape and dtype are free and whose bytes cost: they are read in row chunks, on demand.

Every node below can produce any range of its rows without producing the others, so whoever reads one needs memory
for a chunk, not for the tensor. Nodes are immutable, hold no bytes (but for `array`) and may be read from several
threads at once.

Row: one index of axis 0, i.e. `shape[1:]` elements. A tensor of shape () counts as one row.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from exporter.dtypes import BFLOAT16, BY_NAME, FLOAT8_E4M3FN, FLOAT16, FLOAT32, FLOAT64, DType
from exporter.errors import CheckpointError, GraphError

# Small enough for the arithmetic nodes to stay in a core's L2 cache, large enough to hide a system call.
CHUNK_BYTES = 1 << 20


class LazyTensor(ABC):
    """A tensor of known `shape` and `dtype` that can produce any of its rows."""

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: Sequence[int], dtype: DType) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.dtype = dtype

    @abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) as an array of shape `(stop - start, *shape[1:])` and of this dtype.

        The result may share memory with the source: treat it as read-only. A tensor of shape () ignores the range
        and gives an array of shape ().
        """

    @property
    def has_bytes(self) -> bool:
        """False if any part of this tensor has a shape only (see `shape_only`)."""
        return True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def widest_row_nbytes(self) -> int:
        """Bytes of the longest row that any node reads to produce one row of this tensor."""
        return self.row_nbytes

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Yield all rows in order, in C-contiguous pieces of at most `max_bytes`, but at least one row.

        The bound also holds for what the nodes below read: a narrow slice of a wide matrix comes in small pieces.
        """
        if not self.size:
            return
        step = max(1, max_bytes // self.widest_row_nbytes)
        for start in range(0, self.num_rows, step):
            yield np.ascontiguousarray(self.rows(start, min(start + step, self.num_rows)))

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        """Columns [start, stop) of a matrix; see `slice_columns`. A node that can leave the others unread does so."""
        return _SliceColumns(self, start, stop)

    def numpy(self) -> np.ndarray:
        """Read the whole tensor into a new array."""
        out = np.empty(self.shape, self.dtype.numpy)
        if not self.shape:
            out[...] = self.rows(0, 1)
            return out
        start = 0
        for piece in self.chunks():
            out[start : start + len(piece)] = piece
            start += len(piece)
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dtype.name}{list(self.shape)})"


class _ShapeOnly(LazyTensor):
    __slots__ = ()

    def rows(self, start: int, stop: int) -> np.ndarray:
        raise CheckpointError(
            "this model is a structure without weights, and the command needs weights",
            hint="give a folder that holds the model's safetensors files",
        )

    @property
    def has_bytes(self) -> bool:
        return False


class _Array(LazyTensor):
    __slots__ = ("_values",)

    def __init__(self, values: np.ndarray, dtype: DType) -> None:
        super().__init__(values.shape, dtype)
        self._values = values

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._values[start:stop] if self.shape else self._values


class _Full(LazyTensor):
    __slots__ = ("_value",)

    def __init__(self, shape: Sequence[int], value: float, dtype: DType) -> None:
        super().__init__(shape, dtype)
        self._value = value

    def rows(self, start: int, stop: int) -> np.ndarray:
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return np.full(shape, self._value, self.dtype.numpy)

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        return _Full((self.shape[0], stop - start), self._value, self.dtype)


class Derived(LazyTensor):
    """A node that computes its rows from `sources`."""

    __slots__ = ("sources",)

    def __init__(self, shape: Sequence[int], dtype: DType, *sources: LazyTensor) -> None:
        super().__init__(shape, dtype)
        self.sources = sources

    @property
    def has_bytes(self) -> bool:
        return all(source.has_bytes for source in self.sources)

    @property
    def widest_row_nbytes(self) -> int:
        return max(self.row_nbytes, *(source.widest_row_nbytes for source in self.sources))

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        """What was computed from the first source, in this dtype; an error names the tensor of a file that this is."""
        try:
            return _rounded(values, self.dtype)
        except CheckpointError as error:
            leaf, *others = leaves(self.sources[0])
            if not others:
                error.tensor, error.file = getattr(leaf, "name", None), getattr(leaf, "path", None)
            raise


class _ConcatRows(Derived):
    __slots__ = ()

    def rows(self, start: int, stop: int) -> np.ndarray:
        pieces = []
        first = 0  # this source's first row in the result
        for source in self.sources:
            lo, hi = max(start, first), min(stop, first + source.shape[0])
            if lo < hi:
                pieces.append(source.rows(lo - first, hi - first))
            first += source.shape[0]
        if len(pieces) == 1:
            return pieces[0]
        if not pieces:
            return np.empty((0, *self.shape[1:]), self.dtype.numpy)
        return np.concatenate(pieces)

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        return concat([slice_columns(source, start, stop) for source in self.sources], axis=0)


class _ConcatColumns(Derived):
    __slots__ = ()

    def rows(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, self.shape[1]), self.dtype.numpy)
        first = 0
        for source in self.sources:
            out[:, first : first + source.shape[1]] = source.rows(start, stop)
            first += source.shape[1]
        return out

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        pieces = []
        first = 0  # this source's first column in the result
        for source in self.sources:
            lo, hi = max(start, first), min(stop, first + source.shape[1])
            if lo < hi:
                pieces.append(slice_columns(source, lo - first, hi - first))
            first += source.shape[1]
        return concat(pieces, axis=1) if pieces else super().cut_columns(start, stop)


class _SliceRows(Derived):
    __slots__ = ("_start",)

    def __init__(self, source: LazyTensor, start: int, stop: int) -> None:
        super().__init__((stop - start, *source.shape[1:]), source.dtype, source)
        self._start = start

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.sources[0].rows(self._start + start, self._start + stop)

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        return slice_rows(slice_columns(self.sources[0], start, stop), self._start, self._start + self.shape[0])


class _SliceColumns(Derived):
    __slots__ = ("_start",)

    def __init__(self, source: LazyTensor, start: int, stop: int) -> None:
        super().__init__((source.shape[0], stop - start), source.dtype, source)
        self._start = start

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.sources[0].rows(start, stop)[:, self._start : self._start + self.shape[1]]

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        return slice_columns(self.sources[0], self._start + start, self._start + stop)


class _Scale(Derived):
    """Row or column scaling; `factors` are read once per call, being as small as one row or column."""

    __slots__ = ("_by_column",)

    def __init__(self, source: LazyTensor, factors: LazyTensor, by_column: bool) -> None:
        super().__init__(source.shape, source.dtype, source, factors)
        self._by_column = by_column

    def rows(self, start: int, stop: int) -> np.ndarray:
        source, factors = self.sources
        wide = FLOAT64 if FLOAT64 in (source.dtype, factors.dtype) else FLOAT32
        product = source.rows(start, stop).astype(wide.numpy)
        if self._by_column:
            product *= factors.rows(0, factors.num_rows).astype(wide.numpy)
        else:
            product *= factors.rows(start, stop).astype(wide.numpy)[:, None]
        return self._rounded(product)

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        source, factors = self.sources
        own = slice_rows(factors, start, stop) if self._by_column else factors
        return _Scale(slice_columns(source, start, stop), own, self._by_column)


class _Sum(Derived):
    __slots__ = ()

    def rows(self, start: int, stop: int) -> np.ndarray:
        wide = FLOAT64 if self.dtype == FLOAT64 else FLOAT32
        total = self.sources[0].rows(start, stop).astype(wide.numpy)
        for source in self.sources[1:]:
            total += source.rows(start, stop).astype(wide.numpy)
        return _rounded(total, self.dtype)

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        return add([slice_columns(source, start, stop) for source in self.sources])


class _Cast(Derived):
    __slots__ = ()

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._rounded(self.sources[0].rows(start, stop))

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        return cast(slice_columns(self.sources[0], start, stop), self.dtype)


class _Reshape(Derived):
    __slots__ = ()

    def rows(self, start: int, stop: int) -> np.ndarray:
        (source,) = self.sources
        if not self.shape:
            return source.rows(0, 1).reshape(())
        if not source.shape:
            return source.rows(0, 1).reshape(self.shape)[start:stop]
        return source.rows(start, stop).reshape((stop - start, *self.shape[1:]))


class _Computed(Derived):
    """A small tensor that is computed as a whole when it is first read, and kept."""

    __slots__ = ("_function", "_lock", "_values")

    def __init__(
        self, shape: Sequence[int], dtype: DType, function: Callable[..., np.ndarray], *sources: LazyTensor
    ) -> None:
        super().__init__(shape, dtype, *sources)
        self._function = function
        self._lock = threading.Lock()
        self._values: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        with self._lock:  # one scale can stand for gigabytes: whoever comes second waits and does not read them, too
            if self._values is None:
                values = self._rounded(np.asarray(self._function(*self.sources)))
                if values.shape != self.shape:
                    raise AssertionError(f"Bug: computed {values.shape} instead of {self.shape}")
                self._values = values
            return self._values[start:stop] if self.shape else self._values


def _rounded(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Round once, to nearest even; an integer format saturates and has 0 for NaN, and float16 gets no new infinities.

    ml_dtypes takes float64 to its formats by way of float32, which would round twice: the step to float32 rounds to
    odd here, which keeps the second rounding right (Boldo and Melquiond, "When double rounding is odd").
    """
    if not dtype.is_float:
        limits = np.iinfo(dtype.numpy)
        wide = np.nan_to_num(values.astype(np.float64), nan=0.0)  # infinity becomes a number, and is clipped
        return np.clip(np.rint(wide), limits.min, limits.max).astype(dtype.numpy)
    if values.dtype == np.float64 and dtype in (BFLOAT16, FLOAT8_E4M3FN):
        with np.errstate(over="ignore"):  # beyond float32 is infinity, here as below
            nearest = values.astype(np.float32)
        bits = nearest.view(np.uint32)
        bits -= np.abs(nearest) > np.abs(values)  # towards zero
        bits |= nearest != values  # and to odd, where something was cut off
        values = nearest
    if dtype == FLOAT16:
        return _rounded_to_float16(values)
    with np.errstate(over="ignore"):
        return values.astype(dtype.numpy, copy=False)


def _rounded_to_float16(values: np.ndarray) -> np.ndarray:
    if values.dtype.itemsize < FLOAT32.itemsize:
        values = values.astype(np.float32)  # exact; ml_dtypes' own conversion does not say when it overflows
    try:
        with np.errstate(over="raise"):
            return values.astype(np.float16)
    except FloatingPointError:
        largest = float(np.abs(values[np.isfinite(values)]).max())
        raise CheckpointError(
            "a value is beyond float16, where it would be infinite",
            expected=f"at most {np.finfo(np.float16).max:g}",
            found=f"{largest:g}",
            hint="ask for bfloat16",
        ) from None


def leaves(tensor: LazyTensor) -> Iterator[LazyTensor]:
    """Yield the tensors that `tensor` is computed from in the end: itself if from no other."""
    if not isinstance(tensor, Derived):
        yield tensor
        return
    for source in tensor.sources:
        yield from leaves(source)


def is_finite(tensor: LazyTensor) -> bool:
    """Whether no element is NaN or infinite; reads all of them."""
    return all(np.isfinite(piece.astype(np.float32)).all() for piece in tensor.chunks())


def shape_only(shape: Sequence[int], dtype: DType) -> LazyTensor:
    """A tensor of a structure-only graph: reading its rows raises CheckpointError."""
    return _ShapeOnly(shape, dtype)


def array(values: np.ndarray) -> LazyTensor:
    """Wrap an array in memory; its dtype must be one of `exporter.dtypes.DTYPES`."""
    dtype = BY_NAME.get(values.dtype.name)
    if dtype is None:
        raise GraphError("an array of this dtype cannot be a weight", expected=", ".join(BY_NAME), found=values.dtype)
    return _Array(values.astype(dtype.numpy, copy=False), dtype)  # a copy where the bytes are in the other order


def full(shape: Sequence[int], value: float, dtype: DType) -> LazyTensor:
    """A constant tensor, made when read."""
    return _Full(shape, value, dtype)


def concat(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """Join tensors along rows (axis 0, any rank >= 1) or columns (axis 1, matrices only).

    Raises:
        GraphError: dtypes or the other sizes differ.
    """
    if len(tensors) == 1:
        return tensors[0]
    first = tensors[0]
    for tensor in tensors[1:]:
        other_sizes_equal = (
            tensor.shape[:axis] + tensor.shape[axis + 1 :] == first.shape[:axis] + first.shape[axis + 1 :]
        )
        if tensor.dtype != first.dtype or len(tensor.shape) != len(first.shape) or not other_sizes_equal:
            raise GraphError(f"tensors cannot be joined along axis {axis}", expected=first, found=tensor)
    shape = list(first.shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    node = _ConcatRows if axis == 0 else _ConcatColumns
    return node(shape, first.dtype, *tensors)


def slice_rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows [start, stop) of a tensor."""
    if not 0 <= start <= stop <= tensor.shape[0]:
        raise GraphError(
            "row slice out of range", expected=f"within [0, {tensor.shape[0]}]", found=f"[{start}, {stop})"
        )
    return tensor if (start, stop) == (0, tensor.shape[0]) else _SliceRows(tensor, start, stop)


def slice_columns(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Columns [start, stop) of a matrix."""
    if not 0 <= start <= stop <= tensor.shape[1]:
        raise GraphError(
            "column slice out of range", expected=f"within [0, {tensor.shape[1]}]", found=f"[{start}, {stop})"
        )
    return tensor if (start, stop) == (0, tensor.shape[1]) else tensor.cut_columns(start, stop)


def scale_rows(tensor: LazyTensor, factors: LazyTensor) -> LazyTensor:
    """`tensor * factors[:, None]`, taken in float32 (float64 if either is) and rounded once to `tensor.dtype`."""
    return _scaled(tensor, factors, by_column=False)


def scale_columns(tensor: LazyTensor, factors: LazyTensor) -> LazyTensor:
    """`tensor * factors[None, :]`, taken in float32 (float64 if either is) and rounded once to `tensor.dtype`."""
    return _scaled(tensor, factors, by_column=True)


def _scaled(tensor: LazyTensor, factors: LazyTensor, *, by_column: bool) -> LazyTensor:
    if len(tensor.shape) != 2 or factors.shape != (tensor.shape[1 if by_column else 0],):
        raise GraphError("scale factors do not fit the matrix", expected=tensor.shape, found=factors.shape)
    return _Scale(tensor, factors, by_column)


def pad(tensor: LazyTensor, axis: int, size: int) -> LazyTensor:
    """Append zeros along rows (axis 0) or columns (axis 1) up to `size`."""
    missing = size - tensor.shape[axis]
    if missing < 0:
        raise GraphError("padding cannot shrink a tensor", expected=f">= {tensor.shape[axis]}", found=size)
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return concat([tensor, full(shape, 0.0, tensor.dtype)], axis)


def add(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The sum of tensors of one shape and dtype, taken in float32 (float64 if they are) and rounded once."""
    first = tensors[0]
    for tensor in tensors[1:]:
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise GraphError("tensors cannot be added", expected=first, found=tensor)
    return first if len(tensors) == 1 else _Sum(first.shape, first.dtype, *tensors)


def cast(tensor: LazyTensor, dtype: DType) -> LazyTensor:
    """The same values in another dtype, rounded to nearest even.

    Raises:
        CheckpointError: when it is read, if a number is beyond float16.
    """
    return tensor if tensor.dtype == dtype else _Cast(tensor.shape, dtype, tensor)


def reshape(tensor: LazyTensor, shape: Sequence[int]) -> LazyTensor:
    """The same values in another shape with as many rows, so that it is read row by row: [] as [1], [n] as [n, 1]."""
    reshaped = _Reshape(shape, tensor.dtype, tensor)
    if (reshaped.num_rows, reshaped.size) != (tensor.num_rows, tensor.size):
        raise GraphError("a tensor cannot be reshaped row by row", expected=list(shape), found=list(tensor.shape))
    return tensor if reshaped.shape == tensor.shape else reshaped


def computed(
    shape: Sequence[int], dtype: DType, function: Callable[..., np.ndarray], *sources: LazyTensor
) -> LazyTensor:
    """A tensor as small as a row that `function` computes from `sources` (given to it lazy) when it is first read."""
    return _Computed(shape, dtype, function, *sources)
