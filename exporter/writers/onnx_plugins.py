"""FFNs as nodes that a TensorRT plugin runs, and what these nodes compute, as local functions of ONNX.

A TensorRT quick plugin is one kernel, so an FFN is two nodes, `plugins.contract.wide_ffn_halves`; the attributes that
begin with `plugin` and `aot` tell TensorRT's parser what to look for. Where no plugin of that name is registered, the
local functions stand in for it: with them ONNX Runtime runs the network, in float32 arithmetic between the roundings
that the kernels make. Their scratch outputs are empty; whatever reads those is inside the plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import onnx_ir as ir

from exporter.dtypes import FLOAT32, INT8, DType
from exporter.graph import FFN, Linear
from exporter.lazy import cast, reshape
from exporter.numerics import LARGEST, SMALLEST_SCALE
from exporter.one_gemm import can_be_one
from exporter.wide_ffn import WideFormat, wide_format
from exporter.writers.onnx_nodes import Attribute, Nodes
from exporter.writers.onnx_weights import Stack
from plugins.contract import WIDE_FFN, WIDE_FFN_FORMATS, CustomOp, wide_ffn_halves

DOMAIN = WIDE_FFN.namespace
DOMAIN_VERSION = 1
FOR_TENSORRT: dict[str, Attribute] = {"plugin_namespace": DOMAIN, "plugin_version": WIDE_FFN.version, "aot": 1}
FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


def plugin_ops(plugins: Collection[str]) -> tuple[str, ...]:
    """The op types that the nodes of plugins (of `onnx_options.PLUGINS`) may have."""
    halves = (wide_ffn_halves(*format) for format in WIDE_FFN_FORMATS)
    return tuple(op.name for pair in halves for op in pair) if WIDE_FFN.name in plugins else ()


def wide_ffn(nodes: Nodes, x: ir.Value, residual: ir.Value, ffn: FFN, scope: str) -> ir.Value:
    """residual + FFN(norm(x)), T [B*S, D], as two nodes; `ffn` has none of `exporter.wide_ffn.wide_ffn_problems`."""
    format = wide_format(ffn)
    up, down = wide_ffn_halves(format.weights.name, format.activations)
    gate_up, joined = [ffn.gate_proj, ffn.up_proj], f"{scope}.gate_up_proj"
    names = [f"{scope}.gate_proj", f"{scope}.up_proj"]
    if can_be_one(gate_up):
        stacks = list(Stack.of(gate_up, joined).members(names))
    else:
        stacks = [Stack.of([linear], name) for linear, name in zip(gate_up, names, strict=True)]
    last = Stack.of([ffn.down_proj], f"{scope}.down_proj")
    inner_scale = _input_scale(nodes, ffn.down_proj, last.name)
    norm = nodes.parameter(f"{scope}.norm.weight", [ffn.norm.weight])
    inner, *scratch = nodes.plugin(
        up,
        [
            x,
            norm,
            *(_weight(nodes, stack) for stack in stacks),
            *(scale for stack in stacks for scale in _weight_scale(nodes, stack)),
            *_input_scale(nodes, ffn.gate_proj, joined),
            *inner_scale,
        ],
        {"epsilon": ffn.norm.eps, **FOR_TENSORRT},
        name=f"{scope}.up",
    )
    _, y = nodes.plugin(
        down,
        [inner, *scratch, _weight(nodes, last), *_weight_scale(nodes, last), *inner_scale, residual],
        FOR_TENSORRT,
        name=f"{scope}.down",
    )
    return y


def _weight(nodes: Nodes, stack: Stack) -> ir.Value:
    weights, name = [linear.weight for linear in stack.linears], f"{stack.name}.weight"
    if stack.linears[0].quantization is None:
        return nodes.parameter(f"{stack.stored}.weight", weights, stack.rows, name)
    return nodes.tensor(f"{stack.stored}.weight", weights, stack.rows, name)


def _weight_scale(nodes: Nodes, stack: Stack) -> list[ir.Value]:
    """float32 [rows], or [1] where one serves all."""
    scales = [linear.quantization.weight_scale for linear in stack.linears if linear.quantization is not None]
    if not scales:
        return []
    if not scales[0].shape:
        return [nodes.tensor(f"{stack.stored}.weight_scale.one", [reshape(scales[0], (1,))])]
    parts = [cast(scale, FLOAT32) for scale in scales]
    return [nodes.tensor(f"{stack.stored}.weight_scale", parts, stack.rows, f"{stack.name}.weight_scale")]


def _input_scale(nodes: Nodes, linear: Linear, name: str) -> list[ir.Value]:
    """float32 [1] of a static scale."""
    rounding = None if linear.quantization is None else linear.quantization.input
    if rounding is None or rounding.scale is None:
        return []
    return [nodes.tensor(f"{name}.input_scale.one", [reshape(cast(rounding.scale, FLOAT32), (1,))])]


def wide_ffn_functions(format: WideFormat, opset: int) -> list[ir.Function]:
    """What the two nodes of a format compute. T is the type of x: bfloat16 for the plugin, float32 as well here."""
    up, down = wide_ffn_halves(format.weights.name, format.activations)
    return [
        _function(up, opset, lambda body: _up_body(body, format)),
        _function(down, opset, lambda body: _down_body(body, format)),
    ]


class _Body:
    """The nodes of a local function."""

    def __init__(self, op: CustomOp) -> None:
        self.inputs = {one.name: ir.Value(name=one.name) for one in op.inputs}
        self.tape = ir.tape.Tape()

    def op(self, op_type: str, *inputs: ir.Value | float, **attributes: object) -> ir.Value:
        """Add a node; numbers are float32 constants."""
        values = [self.constant(one, FLOAT) if isinstance(one, float) else one for one in inputs]
        return self.tape.op(op_type, values, attributes)  # type: ignore[arg-type]

    def constant(self, value: object, dtype: ir.DataType) -> ir.Value:
        return self.tape.op("Constant", [], {"value": ir.tensor(np.array(value, dtype.numpy()))})

    def wide(self, x: ir.Value) -> ir.Value:
        return self.op("Cast", x, to=FLOAT)

    def nothing(self, dtype: ir.DataType) -> ir.Value:
        """A scratch output."""
        return self.constant([], dtype)


def _function(op: CustomOp, opset: int, compute: Callable[[_Body], Sequence[ir.Value]]) -> ir.Function:
    body = _Body(op)
    outputs = compute(body)
    for value, output in zip(outputs, op.outputs, strict=True):
        value.name = output.name
    graph = ir.Graph(
        inputs=list(body.inputs.values()), outputs=outputs, nodes=body.tape.nodes, opset_imports={"": opset}
    )
    names = [attribute.name for attribute in op.attributes] + list(FOR_TENSORRT)
    attributes = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in names]
    return ir.Function(domain=DOMAIN, name=op.name, graph=graph, attributes=attributes)


def _up_body(body: _Body, format: WideFormat) -> list[ir.Value]:
    x, norm_weight = body.inputs["x"], body.inputs["norm_weight"]
    normed = body.tape.op(
        "RMSNormalization",
        [x, norm_weight],
        {"axis": -1, "stash_type": 1, "epsilon": ir.RefAttr("epsilon", "epsilon", ir.AttributeType.FLOAT)},
    )
    codes, scale = _rounded(body, body.wide(normed), format, body.inputs.get("input_scale"))
    gate, up = (_product(body, codes, scale, name) for name in ("gate", "up"))
    inner = body.op("CastLike", body.op("Mul", body.op("Mul", gate, body.op("Sigmoid", gate)), up), x)
    if format.activations == "static":
        wide, _ = _rounded(body, body.wide(inner), format, body.inputs["inner_scale"])
        inner = body.op("Cast", wide, to=ir.DataType(format.weights.onnx))
    return [inner, body.nothing(INT32), body.nothing(INT32)]


def _down_body(body: _Body, format: WideFormat) -> list[ir.Value]:
    residual, wide = body.inputs["residual"], body.wide(body.inputs["inner"])
    codes, scale = wide, body.inputs.get("inner_scale")  # codes already, where the scale is static
    if format.activations == "token":
        codes, scale = _rounded(body, wide, format, None)
    y = body.op("Add", body.wide(residual), _product(body, codes, scale, "weight"))
    return [body.nothing(FLOAT), body.op("CastLike", y, residual)]


def _rounded(
    body: _Body, wide: ir.Value, format: WideFormat, scale: ir.Value | None
) -> tuple[ir.Value, ir.Value | None]:
    """(codes as float32, their scale: [1], or [tokens, 1] made here); (wide, None) if activations stay as they are."""
    if format.activations == "none":
        return wide, None
    largest = LARGEST[format.weights]
    if format.activations == "token":
        axis = body.constant([-1], ir.DataType.INT64)
        amax = body.tape.op("ReduceMax", [body.op("Abs", wide), axis], {"keepdims": 1})
        least = body.op("Max", body.op("Div", amax, largest), SMALLEST_SCALE)
        scale = body.op("Where", body.op("Equal", amax, 0.0), 1.0, least)
    if scale is None:
        raise AssertionError("Bug: static activations without a scale")
    return _codes(body, body.op("Div", wide, scale), format.weights), scale


def _codes(body: _Body, quotient: ir.Value, dtype: DType) -> ir.Value:
    """Nearest even, saturating, as float32."""
    if dtype == INT8:
        return body.op("Clip", body.op("Round", quotient), -128.0, 127.0)
    limit = LARGEST[dtype]
    codes = body.op("Cast", body.op("Clip", quotient, -limit, limit), to=ir.DataType(dtype.onnx))
    return body.wide(codes)


def _product(body: _Body, codes: ir.Value, scale: ir.Value | None, name: str) -> ir.Value:
    """(codes @ weight.T) * scale * weight_scale, float32 [tokens, rows]."""
    y = body.op("Gemm", codes, body.wide(body.inputs[name]), transB=1)
    for factor in (scale, body.inputs.get(f"{name}_scale")):
        y = y if factor is None else body.op("Mul", y, factor)
    return y
