"""An ONNX network with the types and shapes of its values, as TensorRT's import rules look at it."""

from __future__ import annotations

import graphlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import Message
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from exporter.errors import CheckpointError

Version = tuple[int, int]
Size = int | str | None  # of one dimension: a number, a symbol, or unknown
DTYPE_ATTRIBUTES = ("to", "output_dtype")


class TypedNetwork:
    """An ONNX network with the types and shapes of its values, its local functions expanded.

    Names are unique in a network and its control flow, so one table serves all.
    """

    def __init__(self, model: onnx.ModelProto, version: Version, plugins: Collection[str] = (), *, file: str) -> None:
        """Expand functions, except those that a plugin of their name replaces, and infer types; `model` is not changed.

        Args:
            model: weights may be in external files, which are not read.
            plugins: op types that are registered with TensorRT where the network is parsed.
            file: what errors call the network.

        Raises:
            CheckpointError: not valid ONNX: types cannot be inferred, or rules could not make sense of it.
        """
        self._file = file
        if not _is_text(model):
            raise _invalid_network("a name that is not UTF-8", file)
        self.source = model
        self.version = version
        self.plugins = frozenset(plugins)
        self.functions = tuple(model.functions)
        self.model = _inferred(model, self.plugins, file)
        self.nodes: list[onnx.NodeProto] = []
        self.conditional: list[onnx.NodeProto] = []  # those inside If, Loop and Scan
        self.initializers: dict[str, TensorProto] = {}
        self.dtypes: dict[str, int] = {}
        self._shapes: dict[str, tuple[Size, ...]] = {}
        self._collect(self.model.graph, self.nodes)
        self.all_nodes = self.nodes + self.conditional
        self._producers = {output: node for node in self.all_nodes for output in node.output if output}
        try:
            self._refuse_invalid()
        except ValueError as error:
            raise _invalid_network(str(error), file) from error
        self.inputs = {value.name for value in self.model.graph.input} - set(self.initializers)
        self.outputs = {value.name for value in self.model.graph.output}
        self.constants = set(self.initializers) | {
            output for node in self.all_nodes if node.op_type == "Constant" for output in node.output
        }
        self.rooted_in_constants = set(self.constants)  # values that depend on no input of the network
        for node in self.all_nodes:
            if all(name in self.rooted_in_constants for name in node.input if name):
                self.rooted_in_constants.update(node.output)

    def built_in(self, *op_types: str) -> Iterator[onnx.NodeProto]:
        """The nodes of these types that TensorRT's own importers take."""
        return (node for node in self.all_nodes if node.op_type in op_types and node.op_type not in self.plugins)

    def producer(self, name: str | None) -> onnx.NodeProto | None:
        return self._producers.get(name) if name else None

    def dtype(self, name: str | None) -> int | None:
        return self.dtypes.get(name) if name else None

    def shape(self, name: str | None) -> tuple[Size, ...] | None:
        """Sizes of a value; None if its rank is unknown."""
        return self._shapes.get(name) if name else None

    def size(self, name: str | None, axis: int) -> Size:
        shape = self.shape(name)
        return None if shape is None or not -len(shape) <= axis < len(shape) else shape[axis]

    def constant(self, name: str | None) -> np.ndarray | None:
        """The value of a constant that is in the .onnx file itself; None if it is not one, or lies elsewhere.

        Raises:
            CheckpointError: its bytes are not those of its dtype and shape.
        """
        if not name or name not in self.constants:
            return None
        tensor = self.initializers.get(name)
        if tensor is None:
            tensor = attributes(self._producers[name]).get("value")
        if not isinstance(tensor, TensorProto) or tensor.data_location == TensorProto.EXTERNAL:
            return None
        try:
            return numpy_helper.to_array(tensor)
        except (TypeError, ValueError) as error:
            raise _invalid_network(str(error), self._file) from error

    def _refuse_invalid(self) -> None:
        """Raise ValueError for what ONNX's inference lets pass and rules must not meet."""
        graphlib.TopologicalSorter({name: node.input for name, node in self._producers.items()}).prepare()  # no cycle
        dtypes = set(self.dtypes.values())
        for node in self.all_nodes:
            values = attributes(node)  # not of a function that there is none of
            dtypes |= {values[name] for name in DTYPE_ATTRIBUTES if isinstance(values.get(name), int)}
            known = onnx.defs.get_schema(node.op_type).attributes if onnx.defs.has(node.op_type) else {}
            for attribute in node.attribute:
                found = getattr(onnx.defs.OpSchema.AttrType, AttributeProto.AttributeType.Name(attribute.type), None)
                if attribute.name in known and known[attribute.name].type != found:
                    raise ValueError(f"{node.op_type}: attribute {attribute.name} of another type")
        for dtype in dtypes:
            TensorProto.DataType.Name(dtype)

    def _collect(self, graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
        for tensor in graph.initializer:
            self.initializers[tensor.name] = tensor
            self.dtypes[tensor.name] = tensor.data_type
            self._shapes[tensor.name] = tuple(tensor.dims)
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor_type = value.type.tensor_type
            if tensor_type.elem_type:
                self.dtypes[value.name] = tensor_type.elem_type
            if tensor_type.HasField("shape"):
                self._shapes[value.name] = tuple(_size(dimension) for dimension in tensor_type.shape.dim)
        for node in graph.node:
            nodes.append(node)
            for attribute in node.attribute:
                for subgraph in (attribute.g, *attribute.graphs):
                    self._collect(subgraph, self.conditional)


def _inferred(model: onnx.ModelProto, plugins: Collection[str], file: str) -> onnx.ModelProto:
    kept = [(function.domain, function.name) for function in model.functions if function.name in plugins]
    try:
        if len(kept) < len(model.functions):
            model = onnx.inliner.inline_selected_functions(model, kept, exclude=True)
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:  # whatever C++ threw
        raise _invalid_network(str(error), file) from error


def _invalid_network(problem: str, file: str) -> CheckpointError:
    return CheckpointError("not a valid ONNX network", file=file, found=" ".join(problem.split())[:200])


def _is_text(message: Message) -> bool:
    """Whether every string in a message is UTF-8: protobuf gives those that are not as bytes, and raises nothing."""
    for field, value in message.ListFields():
        values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        if field.type == field.TYPE_STRING and any(isinstance(text, bytes) for text in values):
            return False
        if field.type == field.TYPE_MESSAGE and not all(map(_is_text, values)):
            return False
    return True


def _size(dimension: onnx.TensorShapeProto.Dimension) -> Size:
    return dimension.dim_value if dimension.HasField("dim_value") else dimension.dim_param or None


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as plain values; strings are decoded."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value for name, value in values.items()
    }


def version_text(version: Version) -> str:
    return ".".join(map(str, version))
