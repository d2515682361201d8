"""The weight files of an ONNX export: every tensor once, in safetensors, referred to by any number of networks.

An ONNX initializer can live in another file, given by (location, offset, length). Both runtimes map any file and ask
for no alignment, so that file may as well be one that other tools can open. Query, key and value projections of a
block are stored as one tensor, and so are gate and up: a network that wants them apart refers to row ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.dtypes import DType
from exporter.graph import Linear
from exporter.lazy import LazyTensor, cast, concat, full
from exporter.rope import Rope
from exporter.safetensors_io import Shards, shard_tensors

STEM = "weights"


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

    def parameter(self, name: str, parts: Sequence[LazyTensor], rows: tuple[int, int] | None = None) -> Reference:
        """Refer to (rows of) a parameter: the concatenation of `parts` along axis 0, in the stored dtype."""
        if name not in self._tensors:
            dtypes = {self._stored_dtype(part.dtype) for part in parts}
            dtype = dtypes.pop() if len(dtypes) == 1 else max(dtypes, key=lambda dtype: dtype.itemsize)
            self._tensors[name] = concat([cast(part, dtype) for part in parts], axis=0)
        return self._reference(name, rows)

    def table(self, name: str, tensor: LazyTensor, rows: int) -> Reference:
        """Refer to the first `rows` of a table in its own dtype; `name` tells tables of different dtypes apart."""
        self._tensors.setdefault(name, tensor)
        return self._reference(name, (0, rows))

    def shards(self, shard_bytes: int) -> Shards:
        """Lay out all tensors that were referred to."""
        return shard_tensors(self._tensors, shard_bytes, stem=STEM)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def _reference(self, name: str, rows: tuple[int, int] | None) -> Reference:
        tensor = self._tensors[name]
        start, stop = rows or (0, tensor.num_rows)
        return Reference(
            name,
            tensor.dtype,
            (stop - start, *tensor.shape[1:]),
            start * tensor.row_nbytes,
            (stop - start) * tensor.row_nbytes,
        )


def located(shards: Shards, reference: Reference) -> Location:
    """Find a reference's bytes once the files are laid out."""
    file, offset = shards.locate(reference.tensor)
    return Location(file, offset + reference.start_byte, reference.nbytes)


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
