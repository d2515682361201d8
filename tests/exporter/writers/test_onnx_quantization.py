"""The form of quantized linears in an exported network, and what is refused.

Whether it computes the right thing is tested where it can run, in tests/engines/test_onnxruntime_quantized.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter.dtypes import BFLOAT16, FLOAT8_E4M3FN, FLOAT16, FLOAT32, INT8
from exporter.errors import TargetError
from exporter.graph import InputQuantization, KVQuantization, Linear, ModelGraph, Quantization, linears
from exporter.lazy import LazyTensor, array, full
from exporter.numerics import quantize, scale_from_amax
from exporter.one_gemm import can_be_one
from exporter.passes.quantize_linears import quantize_linears
from exporter.quantization import read_quantization
from exporter.ranges import BlockRanges
from exporter.safetensors_io import read_safetensors
from exporter.writers import onnx as writer
from exporter.writers.files import save_folder, sizes_of
from exporter.writers.onnx import PRESETS, Options, options_for
from exporter.writers.onnx_quantization import number_format
from tests.tiny import quantized_graph, tiny_graph

FORMATS = ("int8-smoothquant", "int8-smoothquant-token", "int8-weight-only", "fp8", "fp8-rowwise")
ORT = PRESETS["onnxruntime"]
UNPACKED = Options(networks=(replace(ORT.networks[0], pack_qkv=False, pack_gate_up=False),))
TRT = options_for({"tensorrt": None}, max_positions=64)
TRT_BF16 = options_for({"tensorrt": BFLOAT16}, max_positions=64)


@cache
def quantized(format_name: str) -> ModelGraph:
    return quantized_graph(tiny_graph("AF", qkv_bias=True), format_name)


def exported(graph: ModelGraph, options: Options, folder: Path) -> onnx.GraphProto:
    save_folder(folder, writer.emit(graph, options), kind=writer.KIND, details={})
    path = folder / options.networks[0].file
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path, load_external_data=False).graph


COUNTED = ("QuantizeLinear", "DequantizeLinear", "Gemm", "MatMul", "ReduceMax")
FORMS = {  # format and form -> how many of those a full block has
    ("int8-smoothquant", "packed"): (ORT, (4, 8, 4, 0, 0)),
    ("int8-smoothquant", "unpacked"): (UNPACKED, (7, 14, 7, 0, 0)),
    ("int8-smoothquant", "tensorrt"): (TRT, (4, 11, 7, 0, 0)),
    ("int8-smoothquant-token", "packed"): (ORT, (4, 8, 4, 0, 4)),
    ("int8-smoothquant-token", "unpacked"): (UNPACKED, (7, 14, 7, 0, 4)),
    ("int8-weight-only", "packed"): (ORT, (0, 4, 0, 4, 0)),
    ("int8-weight-only", "unpacked"): (UNPACKED, (0, 7, 0, 7, 0)),
    ("int8-weight-only", "tensorrt"): (TRT, (0, 7, 7, 0, 0)),
    ("fp8", "packed"): (ORT, (4, 8, 4, 0, 0)),
    ("fp8-rowwise", "tensorrt"): (TRT, (4, 11, 7, 0, 4)),
}


@pytest.mark.parametrize(("form", "expected"), FORMS.items(), ids=map("-".join, FORMS))
def test_form(form: tuple[str, str], expected: tuple[Options, tuple[int, ...]], tmp_path: Path) -> None:
    options, counts = expected
    graph = exported(quantized(form[0]), options, tmp_path / "network")
    found = Counter(node.op_type for node in graph.node if node.name != "lm_head")  # which no recipe here quantizes
    assert tuple(found[op] for op in COUNTED) == counts


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("options", [ORT, UNPACKED, TRT, TRT_BF16], ids=["packed", "unpacked", "tensorrt", "bfloat16"])
def test_rules_of_both_runtimes(format_name: str, options: Options, tmp_path: Path) -> None:
    graph = exported(quantized(format_name), options, tmp_path / "network")
    dtypes = {value.name: value.data_type for value in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    producers = {name: node for node in graph.node for name in node.output}
    is_int8 = format_name.startswith("int8")
    has_zero_points = is_int8 and options in (ORT, UNPACKED)
    codes = TensorProto.INT8 if is_int8 else TensorProto.FLOAT8E4M3FN
    T = TensorProto.BFLOAT16 if options is TRT_BF16 else TensorProto.FLOAT
    products = [node for node in graph.node if node.op_type in ("Gemm", "MatMul") and node.name != "lm_head"]
    for node in products:
        weight = producers[node.input[1]]
        assert weight.op_type == "DequantizeLinear", "nothing stands between a weight and its product"
        assert len(node.input) == 2, "a bias inside the product would keep it float"
        stored = weight.input[0] if node.op_type == "Gemm" else producers[weight.input[0]].input[0]
        assert dtypes[stored] == codes
        assert readers[node.input[1]] == 1
        if format_name == "int8-weight-only":
            continue
        rounded = producers[node.input[0]]
        assert rounded.op_type == "DequantizeLinear"
        assert producers[rounded.input[0]].op_type == "QuantizeLinear"
        if options in (ORT, UNPACKED):
            assert readers[node.input[0]] == readers[rounded.input[0]] == 1, "no product shares its rounding"
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        source = producers.get(node.input[0])
        is_transposed = source is not None and source.name.endswith(".weight.transposed")
        assert attributes.get("axis") == (1 if is_transposed else 0 if ".weight." in node.name else None)
        scale = dtypes[node.input[1]]
        if node.op_type == "DequantizeLinear":
            assert scale == (TensorProto.FLOAT if is_int8 else T)
            assert attributes.get("output_dtype") == (None if scale == T else T)
        elif not has_zero_points:
            assert attributes["output_dtype"] == codes
        if has_zero_points and not is_transposed:
            assert dtypes[node.input[2]] == TensorProto.INT8
        if not has_zero_points:
            assert len(node.input) == 2


def test_stored_values(tmp_path: Path) -> None:
    """Codes and scales per output channel lie as the rows of what is packed; zero points are zeros, once for all."""
    graph = quantized("int8-smoothquant")
    exported(graph, ORT, tmp_path / "network")
    tensors: dict[str, Any] = read_safetensors(tmp_path / "network" / "weights.safetensors")
    original = tiny_graph("AF", qkv_bias=True)
    attention = original.blocks[0].attention
    weight = np.concatenate(
        [linear.weight.numpy() for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    )
    scale = scale_from_amax(np.abs(weight).max(axis=1), INT8)
    name = "blocks.0.attention.qkv_proj"
    np.testing.assert_array_equal(tensors[f"{name}.weight"].numpy(), quantize(weight, scale, INT8))
    np.testing.assert_array_equal(tensors[f"{name}.weight_scale"].numpy(), scale)
    input_scale = graph.blocks[0].attention.q_proj.quantization.input.scale
    np.testing.assert_array_equal(tensors[f"{name}.input_scale"].numpy(), input_scale.numpy())
    assert tensors[f"{name}.bias"].dtype == FLOAT32
    np.testing.assert_array_equal(tensors["zero_points"].numpy(), np.zeros(512, np.int8))


def test_scales_keep_their_bits_where_weights_lose_theirs(tmp_path: Path) -> None:
    """What a bfloat16 network stores in bfloat16: norms and biases, FP8 scales (as TensorRT asks), not int8 scales."""
    names = "blocks.0.ffn.down_proj.weight_scale", "blocks.0.ffn.down_proj.weight_scale.bfloat16"
    for format_name, name, dtype in (("int8-smoothquant", names[0], FLOAT32), ("fp8", names[1], BFLOAT16)):
        folder = tmp_path / format_name
        exported(quantized(format_name), TRT_BF16, folder)
        tensors = read_safetensors(folder / "weights.safetensors")
        assert tensors[name].dtype == dtype
        assert tensors["blocks.0.ffn.norm.weight"].dtype == BFLOAT16


TRT_FP16 = options_for({"tensorrt": FLOAT16}, max_positions=64)


def with_down_proj_scale(scales: np.ndarray) -> ModelGraph:
    """A graph of FP8 with these scales, [64], in one linear, and its codes as they were."""
    graph = quantized("fp8-rowwise")
    ffn = graph.blocks[0].ffn
    quantization = replace(ffn.down_proj.quantization, weight_scale=array(scales.astype(np.float32)))
    ffn = replace(ffn, down_proj=replace(ffn.down_proj, quantization=quantization))
    return replace(graph, blocks=(replace(graph.blocks[0], ffn=ffn),))


ROUNDED = {  # options -> dtype of scales, smallest and largest that it holds, largest error
    "float16": (TRT_FP16, FLOAT16, 2.0**-17, 146.125, 2.0**-8),
    "float16, normal numbers": (TRT_FP16, FLOAT16, 2.0**-14, 1.0, 2.0**-11),
    "bfloat16": (TRT_BF16, BFLOAT16, 2.0**-126, 2.0**119, 2.0**-8),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_rounded_scales(case: str, tmp_path: Path) -> None:
    """Every row's values in the network against those of the graph, over all scales that the dtype holds."""
    options, dtype, smallest, largest, error = ROUNDED[case]
    scales = np.geomspace(smallest, largest, 64).clip(smallest, largest)
    exported(with_down_proj_scale(scales), options, tmp_path / "network")
    tensors: dict[str, Any] = read_safetensors(tmp_path / "network" / "weights.safetensors")
    name = "blocks.0.ffn.down_proj"
    codes, stored = tensors[f"{name}.weight"].numpy(), tensors[f"{name}.weight_scale.{dtype}"].numpy()
    assert stored.dtype == dtype.numpy
    expected = quantized("fp8-rowwise").blocks[0].ffn.down_proj.weight.numpy().astype(np.float64) * scales[:, None]
    found = codes.astype(np.float64) * stored.astype(np.float64)[:, None]
    np.testing.assert_allclose(found, expected, rtol=error * 1.0001)
    with np.errstate(over="raise"):
        assert np.isfinite((stored * dtype.numpy.type(448)).astype(np.float32)).all()


UNHELD = {
    "too small to be precise": (TRT_FP16, 2.0**-18, "expected 7.63e-06 to 146, found 3.81e-06.*tensorrt:bfloat16"),
    "0 in float16": (TRT_FP16, 1e-9, "found 1e-09"),
    "weights beyond float16": (TRT_FP16, 146.2, "found 146"),
    "weights beyond bfloat16": (TRT_BF16, 1e36, r"bfloat16 cannot hold this scale: .*found 1e\+36$"),
}


@pytest.mark.parametrize("case", UNHELD)
def test_refuses_scales_that_the_network_cannot_hold(case: str, tmp_path: Path) -> None:
    options, scale, message = UNHELD[case]
    graph = with_down_proj_scale(np.r_[np.ones(63), scale])
    with pytest.raises(TargetError, match=rf"^blocks\.0\.ffn\.down_proj\.weight_scale: .*{message}"):
        save_folder(tmp_path / "network", writer.emit(graph, options), kind=writer.KIND, details={})
    assert not list(tmp_path.iterdir())


class Unread(LazyTensor):
    """A weight that must not be read."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        raise AssertionError("a plan reads nothing")


@pytest.mark.parametrize("format_name", FORMATS)
def test_plan_reads_no_weights(format_name: str) -> None:
    graph = tiny_graph("F")
    ffn = graph.blocks[0].ffn
    unread = {name: Linear(weight=Unread(linear.weight.shape, FLOAT32)) for name, linear in linears(ffn).items()}
    graph = replace(graph, blocks=(replace(graph.blocks[0], ffn=replace(ffn, **unread)),))
    ranges = (BlockRanges({}, {"norm": full((64,), 1.0, FLOAT32), "down_proj": full((256,), 1.0, FLOAT32)}),)
    graph = quantize_linears(graph, read_quantization(format_name), ranges)
    assert sizes_of(writer.emit(graph, replace(ORT, networks=(*ORT.networks, *TRT.networks), max_positions=64)))


def with_attention(**changes: Any) -> ModelGraph:
    graph = quantized("int8-smoothquant")
    block = graph.blocks[0]
    return replace(graph, blocks=(replace(block, attention=replace(block.attention, **changes)),))


def with_kv() -> ModelGraph:
    one = full((), 1.0, FLOAT32)
    return with_attention(kv_quantization=KVQuantization(dtype=FLOAT8_E4M3FN, k_scale=one, v_scale=one))


def with_fp8_inputs() -> ModelGraph:
    linear = quantized("int8-smoothquant").blocks[0].attention.o_proj
    inputs = InputQuantization(dtype=FLOAT8_E4M3FN, scale=None)
    return with_attention(o_proj=replace(linear, quantization=replace(linear.quantization, input=inputs)))


def with_fp8_o_proj() -> ModelGraph:
    return with_attention(o_proj=quantized("fp8").blocks[0].attention.o_proj)


def with_float8_norm() -> ModelGraph:
    norm = quantized("int8-smoothquant").blocks[0].attention.norm
    codes = np.ones(64, FLOAT8_E4M3FN.numpy)
    return with_attention(norm=replace(norm, weight=array(codes)))


FLOAT16_ORT = Options(networks=(replace(ORT.networks[0], dtype=FLOAT16),))
REFUSED: dict[str, tuple[Callable[[], ModelGraph], Options, str]] = {
    "KV cache": (with_kv, TRT, "block 0: .*KV cache cannot hold codes.*float8_e4m3fn"),
    "two formats in one product": (with_fp8_inputs, TRT, r"blocks\.0\.attention\.o_proj: .*one format"),
    "FP8 and int8 for ONNX Runtime": (with_fp8_o_proj, ORT, "float8_e4m3fn and int8"),
    "float16 for ONNX Runtime": (lambda: quantized("int8-smoothquant"), FLOAT16_ORT, "float32 networks only"),
    "codes that are no linear's": (with_float8_norm, TRT, "block 0: .*float8_e4m3fn"),
}


@pytest.mark.parametrize(("make", "options", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(make: Callable[[], ModelGraph], options: Options, problem: str) -> None:
    graph = make()
    with pytest.raises(TargetError, match=problem):
        list(writer.emit(graph, options))
    assert len(writer.check(graph, options)) == 1


def test_number_formats() -> None:
    names = {format_name: number_format(quantized(format_name)) for format_name in FORMATS}
    assert names == {
        "int8-smoothquant": "int8 (W8A8 static)",
        "int8-smoothquant-token": "int8 (W8A8 per token)",
        "int8-weight-only": "int8 (weight only)",
        "fp8": "fp8 (W8A8 static)",
        "fp8-rowwise": "fp8 (W8A8 per token)",
    }
    assert number_format(tiny_graph("AF")) is None
    assert number_format(with_fp8_o_proj()) == "fp8 (W8A8 static) + int8 (W8A8 static)"


def a_linear(scale: LazyTensor | None = None, inputs: LazyTensor | str | None = "none", dtype: Any = INT8) -> Linear:
    weight = array(np.ones((4, 8), dtype.numpy))
    quantization = Quantization(
        weight_scale=full((4,), 1.0, FLOAT32) if scale is None else scale,
        input=None if isinstance(inputs, str) else InputQuantization(dtype=dtype, scale=inputs),
    )
    return Linear(weight=weight, quantization=quantization)


FLOAT = Linear(weight=full((4, 8), 1.0, FLOAT32))
ONE, SAME, OTHER = (full((), value, FLOAT32) for value in (1.0, 1.0, 2.0))
TOGETHER = {
    "not quantized": ([FLOAT, FLOAT], True),
    "one of two": ([a_linear(), FLOAT], False),
    "scales per row": ([a_linear(), a_linear()], True),
    "one scale for both": ([a_linear(ONE), a_linear(ONE)], True),
    "a scale for each": ([a_linear(ONE), a_linear(OTHER)], False),
    "per row and per tensor": ([a_linear(), a_linear(ONE)], False),
    "codes of two kinds": ([a_linear(), a_linear(dtype=FLOAT8_E4M3FN)], False),
    "weight only and rounded": ([a_linear(), a_linear(inputs=ONE)], False),
    "static and per token": ([a_linear(inputs=ONE), a_linear(inputs=None)], False),
    "both per token": ([a_linear(inputs=None), a_linear(inputs=None)], True),
    "inputs of one scale": ([a_linear(inputs=ONE), a_linear(inputs=ONE)], True),
    "inputs of equal scales": ([a_linear(inputs=ONE), a_linear(inputs=SAME)], True),
    "inputs of two scales": ([a_linear(inputs=ONE), a_linear(inputs=OTHER)], False),
}


@pytest.mark.parametrize(("side_by_side", "together"), TOGETHER.values(), ids=TOGETHER.keys())
def test_what_can_be_one(side_by_side: Sequence[Linear], together: bool) -> None:
    assert can_be_one(side_by_side) is together
