"""The weight files of an ONNX export: every tensor once, in safetensors, referred to by any number of networks.

An ONNX initializer can live in another file, given by (location, offset, length). Both runtimes map any file and ask
for no alignment, so that file may as well be one that other tools can open. Query, key and value projections of a
block are stored as one tensor, and so are gate and up: a network that wants them apart refers to row ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exporter.dtypes import FLOAT32, INT8, DType
from exporter.graph import Linear
from exporter.lazy import LazyTensor, cast, concat, full
from exporter.rope import Rope
from exporter.safetensors_io import Shards, shard_tensors

STEM = "weights"
ZERO_POINTS = "zero_points"


@dataclass(frozen=True, slots=True)
class Reference:
    """Rows [start, stop) of a stored tensor."""

    tensor: str  # name in the weight file
    dtype: DType  # as stored
    shape: tuple[int, ...]
    start_byte: int  # within the tensor
    nbytes: int


@dataclass(frozen=True, slots=True)
class Location:
    """Where a reference's bytes are."""

    file: str
    offset: int  # bytes from the start of the file
    length: int  # bytes


class WeightStore:
    """Collects the tensors that networks refer to, each under one name and once; nothing is read."""

    def __init__(self, stored_dtype: Callable[[DType], DType]) -> None:
        self._stored_dtype = stored_dtype  # dtype of a tensor of the model -> dtype in the file
        self._tensors: dict[str, LazyTensor] = {}
        self._zero_points = 0  # how many int8 zeros the longest reference to them wants

    def parameter(self, name: str, parts: Sequence[LazyTensor], rows: tuple[int, int] | None = None) -> Reference:
        """Refer to (rows of) a parameter: the concatenation of `parts` along axis 0, in the stored dtype.

        Parts that would be stored in different ones are stored in float32, which holds float16 and bfloat16 exactly.
        """
        dtypes = {self._stored_dtype(part.dtype) for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else FLOAT32
        return self.tensor(name, [cast(part, dtype) for part in parts], rows)

    def tensor(self, name: str, parts: Sequence[LazyTensor], rows: tuple[int, int] | None = None) -> Reference:
        """Refer to (rows of) the same in the parts' own dtype; `name` tells tensors of different dtypes apart."""
        if name not in self._tensors:
            self._tensors[name] = concat(parts, axis=0)
        return self._reference(name, rows)

    def zero_points(self, count: int) -> Reference:
        """Refer to int8 zeros, [count]: the first of those that all zero points share."""
        self._zero_points = max(self._zero_points, count)
        return Reference(ZERO_POINTS, INT8, (count,), 0, count)

    def shards(self, shard_bytes: int) -> Shards:
        """Lay out all tensors that were referred to."""
        return shard_tensors(self._all, shard_bytes, stem=STEM)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._all.values())

    @property
    def _all(self) -> dict[str, LazyTensor]:
        # Zeros of any number come last, so that no other tensor begins at an odd byte because of them.
        zeros = {ZERO_POINTS: full((self._zero_points,), 0.0, INT8)} if self._zero_points else {}
        return self._tensors | zeros

    def _reference(self, name: str, rows: tuple[int, int] | None) -> Reference:
        tensor = self._tensors[name]
        start, stop = rows or (0, tensor.num_rows)
        return Reference(
            name,
            tensor.dtype,
            (stop - start, *tensor.shape[1:]) if tensor.shape else (),
            start * tensor.row_nbytes,
            (stop - start) * tensor.row_nbytes,
        )


def located(shards: Shards, reference: Reference) -> Location:
    """Find a reference's bytes once the files are laid out."""
    file, offset = shards.locate(reference.tensor)
    return Location(file, offset + reference.start_byte, reference.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Linears of one input that are stored as one, their rows one after the other; or one of them, as `rows`."""

    linears: tuple[Linear, ...]  # all that are stored together
    stored: str  # what the stored tensors' names begin with
    name: str  # of the node, and what the names of its parameters begin with
    rows: tuple[int, int] | None = None  # [start, stop) of the stored matrix; None: all
    has_bias: bool

    @staticmethod
    def of(linears: Sequence[Linear], name: str) -> Stack:
        """All of `linears`."""
        has_bias = any(linear.bias is not None for linear in linears)
        return Stack(linears=tuple(linears), stored=name, name=name, has_bias=has_bias)

    @property
    def out_features(self) -> int:
        if self.rows is not None:
            return self.rows[1] - self.rows[0]
        return sum(linear.out_features for linear in self.linears)

    def members(self, names: Sequence[str]) -> Iterator[Stack]:
        """Each linear by itself, under a name of its own."""
        start = 0
        for linear, name in zip(self.linears, names, strict=True):
            rows = (start, start + linear.out_features)
            yield replace(self, name=name, rows=rows, has_bias=linear.bias is not None)
            start = rows[1]


def filled_biases(linears: Sequence[Linear]) -> list[LazyTensor] | None:
    """The biases of linears that are stored as one, zeros for those that have none; None if none has."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if not biases:
        return None
    dtype = biases[0].dtype
    return [full((linear.out_features,), 0.0, dtype) if linear.bias is None else linear.bias for linear in linears]


class RopeTable(LazyTensor):
    """cos or sin of every position and frequency, [positions, d / 2], computed in float32 and then rounded.

    The rows of `Rope.tables`, made as they are read: whole tables of a long-context model take hundreds of megabytes.
    """

    __slots__ = ("_factor", "_frequencies", "_function")

    def __init__(self, rope: Rope, function: np.ufunc, positions: int, head_dim: int, dtype: DType) -> None:
        super().__init__((positions, head_dim // 2), dtype)
        self._frequencies = rope.inverse_frequencies(head_dim)
        self._factor = np.float32(rope.attention_factor)
        self._function = function

    def rows(self, start: int, stop: int) -> np.ndarray:
        angles = np.outer(np.arange(start, stop, dtype=np.float32), self._frequencies)
        return (self._function(angles) * self._factor).astype(self.dtype.numpy)
