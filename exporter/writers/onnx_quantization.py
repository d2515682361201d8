"""Quantized linears: QuantizeLinear (Q) and DequantizeLinear (DQ) around a product, as both runtimes fuse them.

    static       y = Gemm(DQ(Q(x, s), s), DQ(W, w, axis 0)) + bias
    per token    y = t * Gemm(DQ(Q(x / t, u), u), DQ(W, w, axis 0)) + bias,  t = max |x| / (largest code * u)
    weight only  y = Gemm(x, DQ(W, w, axis 0)) + bias  or  MatMul(x, DQ(Transpose(W), w, axis 1)) + bias

x is [B*S, in]; W are codes as the graph has them, [out, in], and w their scale, [] or [out]; s is a constant, t float32
[B*S, 1], u the `UNIT` of the format.

Why this form:
  - A scale per token is outside of Q and DQ: neither runtime has a fast product with such a scale inside. The codes are
    those of x / (t * u) all the same, since u is a power of two; it keeps the product in float16's range.
  - For ONNX Runtime every int8 Q and DQ has a zero point of int8 zeros: without it, it dequantizes weights at every
    step. For TensorRT none has: before 11.0 it refuses a DQ that has both a zero point and `output_dtype`.
  - The bias is added to the product, not in it: a Gemm with a float bias stays float in ONNX Runtime.
  - Nothing stands between a DQ and its product, for the same reason in both.
  - Scales of int8 stay float32; those of FP8 are rounded to T. TensorRT's rules allow a float32 scale under a 16-bit
    output, but NVIDIA's own builders say that FP8 products do not compile with one, and cast. That changes a row by
    2^-8 at most in bfloat16, 2^-11 in float16, where a code is off by up to 2^-4: over Gaussian weights and inputs the
    error of a W8A8 product goes from 3.734 to 3.738 %. Scales that float16 cannot hold: see `_RoundedScale`.
    ModelOpt's ONNX export also rounds them, has one per tensor, and divides weights by the rounded one
    (`modelopt/torch/quantization/export_onnx.py`, `modelopt/onnx/export/fp8_exporter.py`); here codes are the graph's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporter.dtypes import BFLOAT16, FLOAT8_E4M3FN, FLOAT32, INT8, DType
from exporter.errors import TargetError
from exporter.graph import InputQuantization, Linear, ModelGraph, Quantization, linear_names
from exporter.lazy import Derived, LazyTensor
from exporter.numerics import LARGEST, SMALLEST_SCALE
from exporter.writers.onnx_nodes import Nodes
from exporter.writers.onnx_weights import Stack

OPS = frozenset({"Abs", "DequantizeLinear", "Div", "MatMul", "Max", "QuantizeLinear", "ReduceMax"})
NAMES = {FLOAT8_E4M3FN: "fp8", INT8: "int8"}
UNIT = {FLOAT8_E4M3FN: 2.0**-9, INT8: 2.0**-7}  # the largest power of two that brings all codes to 1 at most


class LinearInput:
    """What linears read that stand side by side: x as it is, or rounded to codes and back."""

    def __init__(
        self, nodes: Nodes, x: ir.Value, quantization: InputQuantization | None, name: str, *, shared: bool
    ) -> None:
        """Make ready what all of them share: with `shared` also the Q and DQ, else each gets a pair of its own."""
        self._nodes = nodes
        self._x = x
        self._quantization = quantization
        self._name = name
        self._shared = shared
        self._rounded: dict[str, ir.Value] = {}  # by the name of what it was made for
        self.token_scale: ir.Value | None = None  # float32 [B*S, 1], what a product is to be multiplied by
        if quantization is not None and quantization.scale is None:
            self._x, self.token_scale = self._over_token_scale(quantization.dtype)

    def values(self, name: str) -> ir.Value:
        """T [B*S, in] for the linear of that name."""
        quantization = self._quantization
        if quantization is None:
            return self._x
        scope = self._name if self._shared else name
        if scope not in self._rounded:
            self._rounded[scope] = self._to_codes_and_back(quantization, scope)
        return self._rounded[scope]

    def _to_codes_and_back(self, quantization: InputQuantization, scope: str) -> ir.Value:
        nodes, dtype = self._nodes, quantization.dtype
        if quantization.scale is None:
            scale, back = (nodes.scalar(UNIT[dtype], wanted) for wanted in (FLOAT32, _scale_dtype(nodes, dtype)))
        else:
            scale = back = _scale(nodes, f"{self._name}.input_scale", [quantization.scale], dtype)
        zero = _zero_points(nodes, dtype, ())
        kind = {} if zero else {"output_dtype": dtype.onnx}
        codes = nodes.op("QuantizeLinear", self._x, scale, *zero, name=f"{scope}.input.codes", **kind)
        return _dequantized(nodes, [codes, back, *zero], dtype, f"{scope}.input")

    def _over_token_scale(self, dtype: DType) -> tuple[ir.Value, ir.Value]:
        """(x / t, t) in float32; a token of zeros has the smallest t, and stays zeros."""
        nodes, name = self._nodes, f"{self._name}.token"
        x = nodes.cast(self._x, nodes.dtype, FLOAT32, f"{name}.float32")
        largest = nodes.op("Abs", x, name=f"{name}.abs")
        largest = nodes.op("ReduceMax", largest, nodes.ints(-1), keepdims=1, name=f"{name}.amax")
        scale = nodes.op("Div", largest, nodes.scalar(LARGEST[dtype] * UNIT[dtype], FLOAT32), name=f"{name}.scale")
        scale = nodes.op("Max", scale, nodes.scalar(SMALLEST_SCALE, FLOAT32), name=f"{name}.positive")
        return nodes.op("Div", x, scale, name=f"{name}.scaled"), scale


def quantized_product(nodes: Nodes, x: LinearInput, stack: Stack, *, transpose_weight_only: bool) -> ir.Value:
    """x @ (codes * scale).T in T, [B*S, out], without the bias."""
    quantization = _quantization(stack.linears[0])
    dtype = stack.linears[0].weight.dtype
    codes = nodes.tensor(
        f"{stack.stored}.weight", [linear.weight for linear in stack.linears], stack.rows, f"{stack.name}.weight"
    )
    scales, rows = [_quantization(linear).weight_scale for linear in stack.linears], stack.rows
    one_for_all = not scales[0].shape
    if one_for_all:
        scales, rows = scales[:1], None
    scale = _scale(nodes, f"{stack.stored}.weight_scale", scales, dtype, rows, f"{stack.name}.weight_scale")
    if transpose_weight_only and quantization.input is None and dtype == INT8:
        codes = nodes.op("Transpose", codes, perm=[1, 0], name=f"{stack.name}.weight.transposed")
        weight = _dequantized(nodes, [codes, scale], dtype, f"{stack.name}.weight", axis=1)
        return nodes.op("MatMul", x.values(stack.name), weight, name=stack.name)
    zero = _zero_points(nodes, dtype, () if one_for_all else (stack.out_features,))
    weight = _dequantized(nodes, [codes, scale, *zero], dtype, f"{stack.name}.weight", axis=0)
    y = nodes.op("Gemm", x.values(stack.name), weight, transB=1, name=stack.name)
    if x.token_scale is None:
        return y
    y = nodes.cast(y, nodes.dtype, FLOAT32, f"{stack.name}.float32")
    y = nodes.op("Mul", y, x.token_scale, name=f"{stack.name}.scaled")
    return nodes.cast(y, FLOAT32, nodes.dtype, f"{stack.name}.rounded")


def _dequantized(nodes: Nodes, inputs: Sequence[ir.Value], dtype: DType, name: str, **attributes: int) -> ir.Value:
    """Codes of `dtype` as values in T; `inputs` are codes, scale and, where there is one, a zero point."""
    if _scale_dtype(nodes, dtype) != nodes.dtype:
        attributes["output_dtype"] = nodes.dtype.onnx
    return nodes.op("DequantizeLinear", *inputs, name=f"{name}.values", **attributes)


def _zero_points(nodes: Nodes, dtype: DType, shape: Sequence[int]) -> list[ir.Value]:
    """int8 zeros of the shape of a scale, [] or [out], as the last input of a Q or DQ; none where none is wanted."""
    if dtype != INT8 or not nodes.zero_points:
        return []
    if not shape:
        return [nodes.constant("zero_point", np.zeros((), np.int8))]
    return [nodes.initializer(f"zero_points.{shape[0]}", nodes.weights.zero_points(shape[0]))]


def _scale_dtype(nodes: Nodes, dtype: DType) -> DType:
    return FLOAT32 if dtype == INT8 else nodes.dtype


def _scale(
    nodes: Nodes,
    stored: str,
    parts: Sequence[LazyTensor],
    dtype: DType,
    rows: tuple[int, int] | None = None,
    name: str | None = None,
) -> ir.Value:
    """(Rows of) a scale of codes of `dtype`."""
    wanted = _scale_dtype(nodes, dtype)
    suffix = "" if wanted == FLOAT32 else f".{wanted.name}"
    if wanted != FLOAT32:
        parts = [_RoundedScale(part, wanted, LARGEST[dtype], stored) for part in parts]
    return nodes.tensor(stored + suffix, parts, rows, (name or stored) + suffix)


class _RoundedScale(Derived):
    """Scales of codes in a 16-bit dtype, as long as it can say what they are.

    A scale below the smallest number of 8 significant bits (2^-17 in float16) loses more than bfloat16 would take, and
    soon is 0, which no runtime accepts; one that takes the largest code beyond the dtype makes infinite weights.
    """

    __slots__ = ("_largest_code", "_name")

    def __init__(self, scale: LazyTensor, dtype: DType, largest_code: float, name: str) -> None:
        super().__init__(scale.shape, dtype, scale)
        self._largest_code = largest_code
        self._name = name

    def rows(self, start: int, stop: int) -> np.ndarray:
        scales = self.sources[0].rows(start, stop)
        limits = ml_dtypes.finfo(self.dtype.numpy)
        smallest, largest = float(limits.smallest_subnormal) * 2**7, float(limits.max) / self._largest_code
        with np.errstate(over="ignore"):
            rounded = scales.astype(self.dtype.numpy)
        wrong = scales[(scales < smallest) | (rounded.astype(np.float32) > largest)]
        if wrong.size:
            raise TargetError(
                f"a network in {self.dtype} cannot hold this scale",
                tensor=self._name,
                expected=f"{smallest:.3g} to {largest:.3g}",
                found=f"{wrong.flat[0]:.3g}",
                hint="give the target as tensorrt:bfloat16" if self.dtype != BFLOAT16 else None,
            )
        return rounded


def _quantization(linear: Linear) -> Quantization:
    if linear.quantization is None:
        raise AssertionError("Bug: not a quantized linear")
    return linear.quantization


def number_format(graph: ModelGraph) -> str | None:
    """What a graph's quantized linears are, e.g. "int8 (W8A8 static)"; None if there are none."""
    formats = {_format(linear) for linear in linear_names(graph).values() if linear.quantization is not None}
    return " + ".join(sorted(formats)) or None


def _format(linear: Linear) -> str:
    inputs = _quantization(linear).input
    how = "weight only" if inputs is None else "W8A8 per token" if inputs.scale is None else "W8A8 static"
    return f"{NAMES[linear.weight.dtype]} ({how})"


def quantization_problems(graph: ModelGraph) -> Iterator[TargetError]:
    """What of a graph's quantization no network can express."""
    for index, attention in graph.attentions:
        if attention.kv_quantization is not None:
            yield TargetError(
                "a network's KV cache cannot hold codes: TensorRT writes float caches only",
                block=index,
                expected="no kv_quantization",
                found=attention.kv_quantization.dtype,
                hint="quantize the linears alone for this target",
            )
    for name, linear in linear_names(graph).items():
        inputs = None if linear.quantization is None else linear.quantization.input
        if inputs is not None and inputs.dtype != linear.weight.dtype:
            yield TargetError(
                "weights and inputs of one product have one format",
                tensor=name,
                expected=linear.weight.dtype,
                found=f"inputs in {inputs.dtype}",
            )
