"""The nodes, constants and parameters of one ONNX network, before it is a file.

T = the dtype of the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from exporter.dtypes import DType
from exporter.lazy import LazyTensor
from exporter.safetensors_io import Shards
from exporter.writers.onnx_weights import Reference, WeightStore, located
from plugins.contract import CustomOp

Attribute = int | float | str | Sequence[int]


class Nodes:
    """Nodes in the order in which they were asked for, and what they read that no node makes.

    Small constants are in the .onnx file itself; parameters are references to tensors of a `WeightStore`.
    """

    def __init__(self, dtype: DType, weights: WeightStore, *, zero_points: bool) -> None:
        self.dtype = dtype  # T
        self.weights = weights
        self.zero_points = zero_points  # whether int8 codes come with them
        self.once: dict[object, ir.Value] = {}  # values that several nodes share
        self._tape = ir.tape.Tape()
        self._references: dict[str, tuple[ir.Value, Reference]] = {}  # by initializer name
        self._constants: dict[str, ir.Value] = {}  # by name

    @property
    def T(self) -> ir.DataType:
        return ir.DataType(self.dtype.onnx)

    def op(self, op_type: str, *inputs: ir.Value, name: str, **attributes: Attribute) -> ir.Value:
        """Add a node with one output."""
        return self._tape.op(op_type, inputs, attributes, name=name)

    def split(self, x: ir.Value, sizes: Sequence[int], *, axis: int, name: str) -> Sequence[ir.Value]:
        inputs = [x, self.ints(*sizes)]
        return self._tape.op_multi_out("Split", inputs, {"axis": axis}, num_outputs=len(sizes), name=name)

    def plugin(
        self, op: CustomOp, inputs: Sequence[ir.Value], attributes: Mapping[str, Attribute], *, name: str
    ) -> Sequence[ir.Value]:
        """Add a node of a custom op; gives all of the op's outputs."""
        return self._tape.op_multi_out(
            op.name, inputs, attributes, num_outputs=len(op.outputs), domain=op.namespace, name=name
        )

    def cast(self, x: ir.Value, found: DType, wanted: DType, name: str) -> ir.Value:
        """x, of dtype `found`, as `wanted`."""
        return x if found == wanted else self.op("Cast", x, to=ir.DataType(wanted.onnx), name=name)

    def parameter(
        self, stored: str, parts: Sequence[LazyTensor], rows: tuple[int, int] | None = None, name: str | None = None
    ) -> ir.Value:
        """A parameter (or rows of one) in T; it is cast in the network if it is stored in another dtype."""
        reference = self.weights.parameter(stored, parts, rows)
        name = name or stored
        if name not in self.once:
            value = self.initializer(name, reference)
            self.once[name] = self.cast(value, reference.dtype, self.dtype, f"{name}.cast")
        return self.once[name]

    def tensor(
        self, stored: str, parts: Sequence[LazyTensor], rows: tuple[int, int] | None = None, name: str | None = None
    ) -> ir.Value:
        """A tensor (or rows of one) in its own dtype, in the file as in the network."""
        return self.initializer(name or stored, self.weights.tensor(stored, parts, rows))

    def scalar(self, value: float, dtype: DType | None = None) -> ir.Value:
        """A constant of shape []; of type T where no dtype is given."""
        dtype = dtype or self.dtype
        suffix = "" if dtype == self.dtype else f".{dtype.name}"
        return self.constant(f"scalar.{value!r}{suffix}", np.array(value, dtype=dtype.numpy))

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 [len(values)]."""
        return self.constant(f"ints.{'_'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def scalar_int(self, value: int) -> ir.Value:
        """A constant int64 []."""
        return self.constant(f"int.{value}", np.array(value, dtype=np.int64))

    def constant(self, name: str, values: np.ndarray) -> ir.Value:
        """A small constant; equal names mean equal values."""
        if name not in self._constants:
            tensor = ir.tensor(values, name=name)
            self._constants[name] = ir.Value(
                name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._constants[name]

    def initializer(self, name: str, reference: Reference) -> ir.Value:
        """What is stored at `reference`, as it is stored."""
        if name not in self._references:
            value = ir.Value(
                name=name, shape=ir.Shape(reference.shape), type=ir.TensorType(ir.DataType(reference.dtype.onnx))
            )
            self._references[name] = value, reference
        return self._references[name][0]

    def initializers(self, shards: Shards) -> list[ir.Value]:
        """All that was referred to, pointing to where `shards` put it, and the constants."""
        for name, (value, reference) in self._references.items():
            location = located(shards, reference)
            value.const_value = ir.ExternalTensor(
                location.file,
                location.offset,
                location.length,
                ir.DataType(reference.dtype.onnx),
                shape=ir.Shape(reference.shape),
                name=name,
            )
        return [*(value for value, _ in self._references.values()), *self._constants.values()]

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    def weight_files(self, shards: Shards) -> tuple[str, ...]:
        """Return the names of the files that this network refers to, in order."""
        files = {located(shards, reference).file for _, reference in self._references.values()}
        return tuple(sorted(files))
