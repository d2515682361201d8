"""TensorRT's import rules: our networks pass them, a network spoiled in one way breaks the one rule it should.

No rule was confirmed by TensorRT itself, which is not at hand: benchmarks/tensorrt_probes.py asks it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exporter.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from exporter.errors import CheckpointError, TargetError
from exporter.graph import Activation, ModelGraph
from exporter.rope import Llama3Scaling, Rope
from exporter.writers import onnx as writer
from exporter.writers.files import save_folder
from exporter.writers.onnx import options_for
from exporter.writers.onnx_graph import OPS as WRITTEN_OPS
from exporter.writers.onnx_plugins import plugin_ops
from exporter.writers.onnx_tensorrt_ops import CUSTOM_OPS, OPS
from exporter.writers.onnx_tensorrt_rules import (
    RULES,
    VERSIONS,
    Severity,
    Version,
    check_network,
    read_network,
    refuse_violations,
    rules_for,
    version_from_text,
)
from tests.tiny import quantized_graph, tiny_graph

NEWEST = VERSIONS[-1]
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
BEFORE_11 = (10, 16)
FORMATS = ("int8-smoothquant", "int8-smoothquant-token", "int8-weight-only", "fp8", "fp8-rowwise")


def network_of(graph: ModelGraph, dtype: DType | None = None, batch: int | None = None) -> ModelProto:
    """What the writer makes for TensorRT; its weight files stay unwritten."""
    files = dict(writer.emit(graph, options_for({"tensorrt": dtype}, max_positions=64, batch=batch)))
    content = files["tensorrt.onnx"]
    assert isinstance(content, bytes)
    return read_network("tensorrt.onnx", content)


def fired(model: ModelProto, version: Version = NEWEST, **options: object) -> set[str]:
    return {violation.rule.id for violation in check_network(model, version, **options)}


# --- what the writer makes passes

STRUCTURES: dict[str, Callable[[], ModelGraph]] = {
    "llama": lambda: tiny_graph("AF AF"),
    "tied": lambda: tiny_graph("AF F", tied=True),
    "everything": lambda: tiny_graph(
        "AF F - LF (AF AL) A",
        qk_norm=True,
        qkv_bias=True,
        ffn_bias=True,
        sliding_window=9,
        num_key_value_heads=(1, 4, 2),
        intermediate_size=(256, 512, 64),
    ),
    "no attention": lambda: tiny_graph("F"),
    "scaled rope": lambda: tiny_graph("AF", rope=Rope(theta=5e5, scaling=LLAMA3)),
    **{activation.value: lambda a=activation: tiny_graph("AF", activation=a) for activation in Activation},  # type: ignore[misc]
}


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_our_networks_pass(structure: Callable[[], ModelGraph], dtype: DType) -> None:
    graph = structure()
    for batch in (1, 3):
        model = network_of(graph, dtype, batch)
        assert [fired(model, version) for version in VERSIONS] == [set()] * len(VERSIONS)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_our_quantized_networks_pass(format_name: str, dtype: DType) -> None:
    """Only that nobody has seen FP8 weights with a scale per channel run is a warning."""
    model = network_of(quantized(format_name), dtype)
    expected = {"fp8-channel"} if format_name == "fp8-rowwise" else set()
    assert [fired(model, version) for version in VERSIONS] == [expected] * len(VERSIONS)


@pytest.mark.parametrize("format_name", [None, "fp8", "fp8-rowwise", "int8-smoothquant", "int8-smoothquant-token"])
def test_our_plugin_networks_pass(format_name: str | None) -> None:
    """Their nodes are plugins' where these are there, else local functions, which are looked into."""
    graph = tiny_graph("AF F", hidden_size=128, intermediate_size=256)
    graph = graph if format_name is None else quantized_graph(graph, format_name)
    options = options_for({"tensorrt": BFLOAT16}, max_positions=64, plugins=("wide_ffn",))
    content = dict(writer.emit(graph, options))["tensorrt.onnx"]
    assert isinstance(content, bytes)
    model, plugins = read_network("tensorrt.onnx", content), plugin_ops(("wide_ffn",))
    assert model.functions
    violations = [v for version in VERSIONS for v in check_network(model, version, plugins=plugins)]
    assert {v.rule.id for v in violations} <= {"fp8-channel"}


@cache
def quantized(format_name: str) -> ModelGraph:
    return quantized_graph(tiny_graph("AF F LF (AF AL) A", qkv_bias=True, num_key_value_heads=(1, 4, 2)), format_name)


def test_networks_for_onnx_runtime_do_not() -> None:
    [(_, content)] = [
        (name, content)
        for name, content in writer.emit(quantized("int8-weight-only"), writer.PRESETS["onnxruntime"])
        if name.endswith(".onnx")
    ]
    assert isinstance(content, bytes)
    found = fired(read_network("", content))
    assert found == {"cache-capacity", "cache-batch", "op-dtype"}  # the last: codes are transposed


# --- a network that is spoiled breaks one rule


@cache
def valid(kind: str) -> bytes:
    graph = tiny_graph("AF F")
    quantized_kinds = {"int8": "int8-smoothquant", "fp8": "fp8"}
    model = network_of(quantized_graph(graph, quantized_kinds[kind]) if kind != "float" else graph, BFLOAT16)
    return model.SerializeToString()


def the(model: ModelProto, op_type: str, position: int = 0) -> NodeProto:
    return [node for node in model.graph.node if node.op_type == op_type][position]


def set_attribute(node: NodeProto, name: str, value: object) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, *([] if value is None else [helper.make_attribute(name, value)])])


def add_constant(model: ModelProto, name: str, values: np.ndarray, dtype: int | None = None) -> str:
    tensor = numpy_helper.from_array(values, name)
    if dtype is not None:
        tensor = helper.make_tensor(name, dtype, values.shape, values.reshape(-1).tolist())
    model.graph.initializer.append(tensor)
    return name


def insert_before(model: ModelProto, node: NodeProto, made: NodeProto) -> None:
    index = list(model.graph.node).index(node)
    model.graph.node.insert(index, made)


def between(model: ModelProto, node: NodeProto, index: int, op_type: str, **attributes: object) -> None:
    """Put a node of one input between `node` and its input."""
    name = f"{node.input[index]}.{op_type}"
    made = helper.make_node(op_type, [node.input[index]], [name], name=name, **attributes)
    insert_before(model, node, made)
    again = next(n for n in model.graph.node if n.name == node.name)
    again.input[index] = name


def set_dimension(model: ModelProto, name: str, axis: int, size: int | str) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name == name:
            dimension = value.type.tensor_type.shape.dim[axis]
            dimension.Clear()
            if isinstance(size, int):
                dimension.dim_value = size
            else:
                dimension.dim_param = size


def wrong_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 25


def newer_ir(model: ModelProto) -> None:
    model.ir_version = 13


def a_double(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["logits64"], name="wide", to=TensorProto.DOUBLE))
    model.graph.output.append(helper.make_tensor_value_info("logits64", TensorProto.DOUBLE, [1, 320]))


def an_inner_uint8(model: ModelProto) -> None:
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["logits"], ["bytes"], name="narrow", to=TensorProto.UINT8),
            helper.make_node("Cast", ["bytes"], ["back"], name="widen", to=TensorProto.FLOAT),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("back", TensorProto.FLOAT, [1, 320]))


def uint8_read_again(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["bytes"], name="bytes", to=TensorProto.UINT8))
    model.graph.output.append(helper.make_tensor_value_info("bytes", TensorProto.UINT8, [1, 320]))
    model.graph.node.append(helper.make_node("Concat", ["bytes", "bytes"], ["two"], name="two", axis=0))
    model.graph.output.append(helper.make_tensor_value_info("two", TensorProto.UINT8, [2, 320]))


def an_int16(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["short"], name="short", to=TensorProto.INT16))
    model.graph.output.append(helper.make_tensor_value_info("short", TensorProto.INT16, [1, 320]))


def a_cast_to_fp8(model: ModelProto) -> None:
    kind = TensorProto.FLOAT8E4M3FN
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["codes"], name="codes", to=kind))
    model.graph.output.append(helper.make_tensor_value_info("codes", kind, [1, 320]))


def an_unknown_op(model: ModelProto) -> None:
    the(model, "Sigmoid").op_type = "Softmin"


def a_swish(model: ModelProto) -> None:
    the(model, "Sigmoid").op_type = "Swish"


def a_contrib_op(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    the(model, "Gemm").domain = "com.microsoft"


def mixed_floats(model: ModelProto) -> None:
    node = the(model, "Mul", 1)  # of SiLU
    add_constant(model, "two", np.array(2.0, np.float32))
    node.input[1] = "two"


def an_integer_product(model: ModelProto) -> None:
    made = [
        helper.make_node("Cast", ["logits"], ["whole"], name="whole", to=TensorProto.INT32),
        helper.make_node("Transpose", ["whole"], ["whole.T"], name="whole.T", perm=[1, 0]),
        helper.make_node("MatMul", ["whole", "whole.T"], ["square"], name="square"),
    ]
    model.graph.node.extend(made)
    model.graph.output.append(helper.make_tensor_value_info("square", TensorProto.INT32, [1, 1]))


def a_computed_axis(model: ModelProto) -> None:
    node = the(model, "Unsqueeze")
    made = helper.make_node("Cast", ["logits_index"], ["axes"], name="axes", to=TensorProto.INT64)
    insert_before(model, node, made)
    the(model, "Unsqueeze").input[1] = "axes"


def top_k(model: ModelProto) -> None:
    add_constant(model, "k", np.array([4000], np.int64))
    model.graph.node.append(helper.make_node("TopK", ["logits", "k"], ["best", "where"], name="best"))
    model.graph.output.append(helper.make_tensor_value_info("best", TensorProto.FLOAT, [1, 4000]))


def a_function(model: ModelProto, name: str, domain: str = "mine", inputs: int = 1) -> None:
    names = [f"x{index}" for index in range(inputs)]
    body = [helper.make_node("Identity", names[:1], ["y"], name="body")]
    opsets = [helper.make_opsetid("", 24)]
    model.functions.append(helper.make_function(domain, name, names, ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid(domain, 1))


def a_call(model: ModelProto, name: str, domain: str = "mine") -> None:
    model.graph.node.append(helper.make_node(name, ["logits"], ["called"], name="call", domain=domain))
    model.graph.output.append(helper.make_tensor_value_info("called", TensorProto.FLOAT, [1, 320]))


def functions_of_one_name(model: ModelProto) -> None:
    a_function(model, "Twice")
    a_function(model, "Twice", "yours")


def a_function_with_an_onnx_name(model: ModelProto) -> None:
    a_function(model, "Softplus")


def a_call_with_too_few_inputs(model: ModelProto) -> None:
    a_function(model, "Two", inputs=2)
    a_call(model, "Two")


def an_empty_initializer(model: ModelProto) -> None:
    add_constant(model, "nothing", np.zeros((0, 4), np.float32))


def a_wide_ffn(model: ModelProto) -> None:
    """The gate of ten FFNs of Llama-3.1-70B as one: 10 * 28,672 rows of 8,192."""
    location = onnx.StringStringEntryProto(key="location", value="weights.safetensors")
    tensor = TensorProto(name="gate", data_type=TensorProto.BFLOAT16, dims=[286_720, 8_192], external_data=[location])
    tensor.data_location = TensorProto.EXTERNAL
    model.graph.initializer.append(tensor)


def a_weight_file(**entries: str) -> Callable[[ModelProto], None]:
    def spoil(model: ModelProto) -> None:
        tensor = next(one for one in model.graph.initializer if one.data_location == TensorProto.EXTERNAL)
        for key, value in entries.items():
            kept = [entry for entry in tensor.external_data if entry.key != key]
            del tensor.external_data[:]
            tensor.external_data.extend([*kept, onnx.StringStringEntryProto(key=key, value=value)])

    return spoil


def a_float32_gamma(model: ModelProto) -> None:
    add_constant(model, "gamma", np.ones(64, np.float32))
    the(model, "RMSNormalization").input[1] = "gamma"


def empty_positions(model: ModelProto) -> None:
    node = the(model, "RotaryEmbedding")
    node.input[3] = ""
    for index in (1, 2):  # cos and sin then have three dimensions
        name = add_constant(model, f"table{index}", np.ones((1, 1, 8)), TensorProto.BFLOAT16)
        node.input[index] = name


def flat_tables_without_positions(model: ModelProto) -> None:
    del the(model, "RotaryEmbedding").input[3]


def add_node(
    model: ModelProto, op_type: str, inputs: list[str], dtype: int, sizes: list[int], **attributes: object
) -> None:
    """A node of one output, which becomes an output of the network."""
    model.graph.node.append(helper.make_node(op_type, inputs, ["added"], name="added", **attributes))
    model.graph.output.append(helper.make_tensor_value_info("added", dtype, sizes))


def heads_side_by_side(model: ModelProto, **attributes: object) -> None:
    x = add_constant(model, "flat", np.ones((1, 1, 64)), TensorProto.BFLOAT16)
    _, *tables = the(model, "RotaryEmbedding").input
    add_node(model, "RotaryEmbedding", [x, *tables], TensorProto.BFLOAT16, [1, 1, 64], **attributes)


def a_cache_behind_a_node(model: ModelProto) -> None:
    between(model, the(model, "TensorScatter"), 0, "Identity")


def a_cache_that_is_no_output(model: ModelProto) -> None:
    model.graph.output.remove(next(output for output in model.graph.output if output.name == "present_k_0"))


def one_cache_for_keys_and_values(model: ModelProto) -> None:
    the(model, "TensorScatter", 1).input[0] = the(model, "TensorScatter").input[0]


def a_growing_cache(model: ModelProto) -> None:
    for name in ("past_k_0", "present_k_0"):
        set_dimension(model, name, 2, "capacity")


def a_symbolic_batch(model: ModelProto) -> None:
    for name in ("past_k_0", "present_k_0"):
        set_dimension(model, name, 0, "batch")


def a_cache_of_other_heads(model: ModelProto) -> None:
    for name in ("past_k_0", "present_k_0"):
        set_dimension(model, name, 3, 32)


def a_cache_of_one_head(model: ModelProto) -> None:
    for name in ("past_k_0", "present_k_0"):
        set_dimension(model, name, 1, 1)


def int32_positions(model: ModelProto) -> None:
    between(model, the(model, "RotaryEmbedding"), 3, "Cast", to=TensorProto.INT32)


def a_float_position_to_write(model: ModelProto) -> None:
    between(model, the(model, "TensorScatter"), 2, "Cast", to=TensorProto.FLOAT)


def a_circular_cache(model: ModelProto) -> None:
    set_attribute(the(model, "TensorScatter"), "mode", "circular")


def a_softcap(model: ModelProto) -> None:
    set_attribute(the(model, "Attention"), "softcap", 30.0)


def a_softmax_precision(model: ModelProto) -> None:
    set_attribute(the(model, "Attention"), "softmax_precision", 1)


def a_past(model: ModelProto) -> None:
    the(model, "Attention").input.extend(["past_k_0", "past_v_0"])


def key_lengths(model: ModelProto) -> None:
    the(model, "Attention").input.extend(["", "", "cache_write"])


def second_output(model: ModelProto) -> None:
    the(model, "Attention").output.append("attended_keys")


def outputs_without_names(model: ModelProto) -> None:
    """As exporters leave them that drop what nobody reads."""
    the(model, "Attention").output.extend(["", "", ""])


def indices_alone(model: ModelProto) -> None:
    add_constant(model, "k", np.array([3], np.int64))
    model.graph.node.append(helper.make_node("TopK", ["logits", "k"], ["", "where"], name="best"))
    model.graph.output.append(helper.make_tensor_value_info("where", TensorProto.INT64, [1, 3]))


def causal_over_a_cache(model: ModelProto) -> None:
    node = the(model, "Attention")
    del node.input[3]
    set_attribute(node, "is_causal", 1)


def causal_and_a_mask(model: ModelProto) -> None:
    node = the(model, "Attention")
    node.input[1], node.input[2] = node.input[0], node.input[0]  # no cache, so that causality is defined alike
    short = add_constant(model, "short", np.ones((1, 1, 1, 1), bool))
    node.input[3] = short
    set_attribute(node, "is_causal", 1)


def an_integer_mask(model: ModelProto) -> None:
    between(model, the(model, "Attention"), 3, "Cast", to=TensorProto.INT32)


def a_float_mask(model: ModelProto) -> None:
    between(model, the(model, "Attention"), 3, "Cast", to=TensorProto.BFLOAT16)


def a_short_mask(model: ModelProto) -> None:
    the(model, "Attention").input[3] = add_constant(model, "short", np.ones((1, 1, 1, 32), bool))


def unscaled_queries(model: ModelProto) -> None:
    set_attribute(the(model, "Attention"), "scale", None)


def a_cast_before_attention(model: ModelProto) -> None:
    between(model, the(model, "Attention"), 0, "Cast", to=TensorProto.BFLOAT16)


def attention_in_a_condition(model: ModelProto) -> None:
    node = the(model, "Attention")
    inner = NodeProto()
    inner.CopyFrom(node)
    inner.output[0] = "inside"
    other = helper.make_node("Identity", [node.input[0]], ["outside"], name="else")
    value = [helper.make_empty_tensor_value_info(name) for name in ("inside", "outside")]
    branches = [
        helper.make_graph([inner], "then", [], value[:1]),
        helper.make_graph([other], "else", [], value[1:]),
    ]
    add_constant(model, "yes", np.array(True))
    made = helper.make_node(
        "If", ["yes"], [node.output[0]], name="if", then_branch=branches[0], else_branch=branches[1]
    )
    insert_before(model, node, made)
    model.graph.node.remove(the(model, "Attention"))


def five_query_heads(model: ModelProto) -> None:
    name = add_constant(model, "queries", np.ones((1, 5, 1, 16)), TensorProto.BFLOAT16)
    the(model, "Attention").input[0] = name


def heads_of(size: int) -> Callable[[ModelProto], None]:
    def spoil(model: ModelProto) -> None:
        node = the(model, "Attention")
        for index, heads in enumerate((4, 2, 2)):
            values = np.ones((1, heads, 64, size))
            node.input[index] = add_constant(model, f"heads{index}", values, TensorProto.BFLOAT16)

    return spoil


def a_flat_gemm(model: ModelProto) -> None:
    node = the(model, "Gemm")
    node.input[0] = add_constant(model, "cube", np.ones((2, 2, 64)), TensorProto.BFLOAT16)


def an_offset(model: ModelProto) -> None:
    node = the(model, "QuantizeLinear")
    node.input.append(add_constant(model, "offset", np.array(3, np.int8)))


def an_unsigned_zero(model: ModelProto) -> None:
    node = the(model, "QuantizeLinear")
    set_attribute(node, "output_dtype", None)
    node.input.append(add_constant(model, "unsigned", np.array(0, np.uint8)))


def a_zero_point_beside_output_dtype(model: ModelProto) -> None:
    the(model, "DequantizeLinear").input.append(add_constant(model, "zero", np.zeros((), np.int8)))


def no_code_dtype(model: ModelProto) -> None:
    set_attribute(the(model, "QuantizeLinear"), "output_dtype", None)


def int16_codes(model: ModelProto) -> None:
    set_attribute(the(model, "QuantizeLinear"), "output_dtype", TensorProto.INT16)


def integers_out_of_a_dq(model: ModelProto) -> None:
    set_attribute(the(model, "DequantizeLinear"), "output_dtype", TensorProto.INT32)


def an_old_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 18


def a_half_scale(model: ModelProto) -> None:
    name = add_constant(model, "half", np.array(0.5), TensorProto.FLOAT16)
    the(model, "QuantizeLinear").input[1] = name


def a_float32_scale_of_fp8(model: ModelProto) -> None:
    name = add_constant(model, "wide", np.array(0.5, np.float32))
    the(model, "QuantizeLinear").input[1] = name


def a_negative_scale(model: ModelProto) -> None:
    the(model, "QuantizeLinear").input[1] = add_constant(model, "minus", np.array(-1.0, np.float32))


def the_weight_dq(model: ModelProto) -> NodeProto:
    return next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and ".down_proj.weight" in n.name)


def scales_on_the_wrong_axis(model: ModelProto) -> None:
    set_attribute(the_weight_dq(model), "axis", None)  # [64, 256]: axis 1 is the default


def a_scale_per_channel_of_x(model: ModelProto) -> None:
    name = add_constant(model, "many", np.full(64, 0.5, np.float32))
    the(model, "QuantizeLinear").input[1] = name


def a_scale_per_channel_of_fp8(model: ModelProto) -> None:
    node = the_weight_dq(model)
    node.input[1] = add_constant(model, "many", np.full(64, 0.5), TensorProto.BFLOAT16)


def two_blocked_axes(model: ModelProto) -> None:
    the_weight_dq(model).input[1] = add_constant(model, "tiles", np.full((2, 2), 0.5, np.float32))


def a_scale_for_every_weight(model: ModelProto) -> None:
    the_weight_dq(model).input[1] = add_constant(model, "blocks of 1", np.full((64, 256), 0.5, np.float32))


def a_scale_per_token(model: ModelProto) -> None:
    inputs = {"codes": (TensorProto.INT8, ["tokens", 64]), "token scales": (TensorProto.BFLOAT16, ["tokens"])}
    model.graph.input.extend(helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items())
    add_node(model, "DequantizeLinear", list(inputs), TensorProto.BFLOAT16, [1, 64], axis=0)


def scales_of_blocks_of_x(model: ModelProto) -> None:
    inputs = {"codes": (TensorProto.FLOAT8E4M3FN, ["tokens", 64]), "scales": (TensorProto.BFLOAT16, ["rows", 4])}
    model.graph.input.extend(helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items())
    add_node(model, "DequantizeLinear", list(inputs), TensorProto.BFLOAT16, [1, 64], axis=1, block_size=16)


def a_node_after_dq(model: ModelProto) -> None:
    name = the_weight_dq(model).output[0]
    node = next(n for n in model.graph.node if name in n.input)
    between(model, node, list(node.input).index(name), "Identity")


def a_float_weight_behind_codes(model: ModelProto) -> None:
    name = the_weight_dq(model).output[0]
    node = next(n for n in model.graph.node if name in n.input)
    node.input[1] = add_constant(model, "float_weight", np.ones((64, 256)), TensorProto.BFLOAT16)


def a_weight_quantized_in_the_network(model: ModelProto) -> None:
    node = the_weight_dq(model)
    weight = add_constant(model, "float_weight", np.ones((64, 256)), TensorProto.BFLOAT16)
    scale = node.input[1]
    made = helper.make_node(
        "QuantizeLinear", [weight, scale], ["late"], name="late", axis=0, output_dtype=TensorProto.INT8
    )
    insert_before(model, node, made)
    the_weight_dq(model).input[0] = "late"


def external_zero_points(model: ModelProto) -> None:
    tensor = TensorProto(name="far", data_type=TensorProto.INT8, dims=[], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.safetensors")
    model.graph.initializer.append(tensor)
    the(model, "QuantizeLinear").input.append("far")


def no_scale(model: ModelProto) -> None:
    del the(model, "QuantizeLinear").input[1]


SPOILED: dict[str, tuple[str, Callable[[ModelProto], None], str]] = {
    # what is done to it: (which network, how, the rule that fires)
    "opset 25": ("float", wrong_opset, "opset"),
    "a newer IR": ("float", newer_ir, "ir-version"),
    "float64": ("float", a_double, "double"),
    "uint8 inside": ("float", an_inner_uint8, "uint8"),
    "uint8 that is read again": ("float", uint8_read_again, "op-dtype"),
    "int16": ("float", an_int16, "dtype"),
    "a cast to FP8": ("float", a_cast_to_fp8, "cast-codes"),
    "an op nobody has": ("float", an_unknown_op, "op-unknown"),
    "an op of ONNX Runtime": ("float", a_contrib_op, "op-domain"),
    "a function named like an op": ("float", a_function_with_an_onnx_name, "op-domain"),
    "two float dtypes": ("float", mixed_floats, "op-mixed-dtypes"),
    "a product of integers": ("float", an_integer_product, "op-dtype"),
    "axes that are computed": ("float", a_computed_axis, "op-constant-input"),
    "a large TopK": ("float", top_k, "top-k"),
    "a product in three dimensions": ("float", a_flat_gemm, "op-rank"),
    "two functions of one name": ("float", functions_of_one_name, "function-name"),
    "a call with too few inputs": ("float", a_call_with_too_few_inputs, "function-inputs"),
    "a weight of 2.3e9 elements": ("float", a_wide_ffn, "large-initializer"),
    "an empty initializer": ("float", an_empty_initializer, "empty-initializer"),
    "a float32 norm weight": ("float", a_float32_gamma, "rms-norm-dtype"),
    "empty position_ids": ("float", empty_positions, "rotary-empty-positions"),
    "flat tables without positions": ("float", flat_tables_without_positions, "rotary-tables"),
    "heads side by side, and nobody says how many": ("float", heads_side_by_side, "rotary-heads"),
    "weights in the folder above": (
        "float",
        a_weight_file(location="below/../../weights.safetensors"),
        "external-data",
    ),
    "weights anywhere": ("float", a_weight_file(location="/weights.safetensors"), "external-data"),
    "weights with a base path": ("float", a_weight_file(basepath="."), "external-data"),
    "a cache that is no input": ("float", a_cache_behind_a_node, "cache-input"),
    "a cache that is no output": ("float", a_cache_that_is_no_output, "cache-output"),
    "one cache for keys and values": ("float", one_cache_for_keys_and_values, "cache-once"),
    "a cache that grows": ("float", a_growing_cache, "cache-capacity"),
    "any number of sequences": ("float", a_symbolic_batch, "cache-batch"),
    "a cache of another head size": ("float", a_cache_of_other_heads, "cache-update"),
    "a cache of one head": ("float", a_cache_of_one_head, "cache-update"),
    "positions in int32": ("float", int32_positions, "op-dtype"),
    "a float position to write": ("float", a_float_position_to_write, "op-dtype"),
    "a circular cache": ("float", a_circular_cache, "op-attribute-value"),
    "a softcap": ("float", a_softcap, "op-attribute-value"),
    "a softmax precision": ("float", a_softmax_precision, "op-attribute"),
    "past keys": ("float", a_past, "attention-past"),
    "key lengths": ("float", key_lengths, "attention-nonpad"),
    "a second output": ("float", second_output, "op-outputs"),
    "outputs with empty names": ("float", outputs_without_names, "op-outputs"),
    "the indices of a TopK alone": ("float", indices_alone, "op-outputs"),
    "sums on a computed axis": (
        "float",
        lambda model: add_node(model, "CumSum", ["logits", "logits_index"], TensorProto.FLOAT, [1, 320]),
        "op-constant-input",
    ),
    "a scatter that adds": (
        "float",
        lambda model: add_node(
            model, "ScatterND", ["logits", "input_ids", "logits"], TensorProto.FLOAT, [1, 320], reduction="add"
        ),
        "op-attribute-value",
    ),
    "causal over a cache": ("float", causal_over_a_cache, "attention-causal"),
    "causal and a mask": ("float", causal_and_a_mask, "attention-causal-mask"),
    "a mask of integers": ("float", an_integer_mask, "attention-mask-dtype"),
    "a mask of floats": ("float", a_float_mask, "attention-float-mask"),
    "a short mask": ("float", a_short_mask, "attention-mask-shape"),
    "scaling by attention": ("float", unscaled_queries, "attention-scale"),
    "a cast in front of attention": ("float", a_cast_before_attention, "attention-cast"),
    "attention in a condition": ("float", attention_in_a_condition, "attention-condition"),
    "five query heads for two": ("float", five_query_heads, "attention-groups"),
    "heads of 264": ("float", heads_of(264), "attention-head-size"),
    "heads of 20": ("float", heads_of(20), "attention-head-size"),
    "heads of 8": ("float", heads_of(8), "attention-head-size"),
    "an asymmetric zero point": ("int8", an_offset, "zero-point"),
    "an unsigned zero point": ("int8", an_unsigned_zero, "zero-point-uint8"),
    "a zero point in a weight file": ("int8", external_zero_points, "zero-point-unread"),
    "codes of unsaid dtype": ("int8", no_code_dtype, "codes-dtype-missing"),
    "codes in int16": ("int8", int16_codes, "codes-dtype"),
    "integers out of a DQ": ("int8", integers_out_of_a_dq, "dequantized-dtype"),
    "a float16 scale of bfloat16": ("int8", a_half_scale, "scale-dtype"),
    "a float32 scale of FP8": ("fp8", a_float32_scale_of_fp8, "fp8-scale-dtype"),
    "a negative scale": ("int8", a_negative_scale, "scale-positive"),
    "scales on the other axis": ("int8", scales_on_the_wrong_axis, "scale-shape"),
    "blocks on two axes": ("int8", two_blocked_axes, "scale-shape"),
    "blocks of one": ("int8", a_scale_for_every_weight, "scale-shape"),
    "a scale per token": ("float", a_scale_per_token, "scale-shape"),
    "a scale per channel of x": ("int8", a_scale_per_channel_of_x, "scale-activation"),
    "a scale per channel of FP8": ("fp8", a_scale_per_channel_of_fp8, "fp8-channel"),
    "something behind a DQ": ("int8", a_node_after_dq, "dequantize-adjacent"),
    "a float weight behind codes": ("int8", a_float_weight_behind_codes, "product-half-quantized"),
    "a weight quantized late": ("int8", a_weight_quantized_in_the_network, "weight-codes"),
    "a Q without scale": ("int8", no_scale, "op-inputs"),
}

# Where one wrong thing is two by nature.
ALSO = {
    "codes in int16": {"dtype"},
    "a scale per token": {"scale-activation"},
    "codes of unsaid dtype": {"uint8"},
    "integers out of a DQ": {"op-dtype", "op-mixed-dtypes"},
    "an unsigned zero point": {"uint8"},
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_spoiled_breaks_its_rule(case: str) -> None:
    kind, spoil, rule = SPOILED[case]
    model = onnx.load_model_from_string(valid(kind))
    assert fired(model) == set()
    spoil(model)
    assert fired(model) == {rule} | ALSO.get(case, set())


TAKEN: dict[str, Callable[[ModelProto], None]] = {
    # what importers take though their documentation, or ONNX, does not say so
    "num_heads beside four dimensions": lambda model: set_attribute(the(model, "RotaryEmbedding"), "num_heads", 4),
    "heads side by side": lambda model: heads_side_by_side(model, num_heads=4),
    "attention that may be decomposed": lambda model: set_attribute(the(model, "Attention"), "TRT_decomposable", 1),
    "sums of integers": lambda model: add_node(
        model, "CumSum", ["input_ids", add_constant(model, "axis", np.array(1))], TensorProto.INT64, [1, 1]
    ),
    "integers within bounds": lambda model: add_node(
        model, "Clip", ["input_ids", add_constant(model, "least", np.array(0))], TensorProto.INT64, [1, 1]
    ),
    "scales of blocks of inputs": scales_of_blocks_of_x,
    "weights in a folder below": a_weight_file(location="below/weights.safetensors"),
    "an attribute that is no text": lambda model: set_attribute(the(model, "Gemm"), "note", b"\xff"),
}


@pytest.mark.parametrize("change", TAKEN.values(), ids=TAKEN.keys())
def test_what_is_unusual_passes(change: Callable[[ModelProto], None]) -> None:
    model = onnx.load_model_from_string(valid("float"))
    change(model)
    assert [fired(model, version) for version in VERSIONS] == [set()] * len(VERSIONS)


def a_constant_cut_short(model: ModelProto) -> None:
    tensor = TensorProto(name="short", data_type=TensorProto.FLOAT, dims=[2], raw_data=b"\0\0\0")
    model.graph.initializer.append(tensor)
    the(model, "QuantizeLinear").input[1] = "short"


def an_attribute_of_no_function(model: ModelProto) -> None:
    the(model, "Attention").attribute.add(name="softcap", type=onnx.AttributeProto.FLOAT, ref_attr_name="cap")


def a_dtype_that_is_none(model: ModelProto) -> None:
    model.graph.initializer.append(TensorProto(name="odd", data_type=101, dims=[1], raw_data=b"\0"))


def a_cycle(model: ModelProto) -> None:
    first = the(model, "DequantizeLinear")
    first.input[0] = first.output[0]


def an_attribute_of_another_type(model: ModelProto) -> None:
    the(model, "DequantizeLinear").attribute.append(helper.make_attribute("axis", "one"))


def a_wish_for_a_dtype_that_is_none(model: ModelProto) -> None:
    the(model, "DequantizeLinear").attribute.append(helper.make_attribute("output_dtype", 101))


@pytest.mark.parametrize(
    "spoil",
    [
        a_constant_cut_short,
        an_attribute_of_no_function,
        an_attribute_of_another_type,
        a_dtype_that_is_none,
        a_wish_for_a_dtype_that_is_none,
        a_cycle,
    ],
)
def test_what_is_not_onnx(spoil: Callable[[ModelProto], None]) -> None:
    model = onnx.load_model_from_string(valid("int8"))
    spoil(model)
    with pytest.raises(CheckpointError, match=r"x\.onnx: not a valid ONNX network"):
        check_network(model, file="x.onnx")


def test_names_that_are_no_text() -> None:
    content = valid("float").replace(b"weights.safetensors", b"weights\xffsafetensors")
    with pytest.raises(CheckpointError, match="not a valid ONNX network"):
        check_network(read_network("x.onnx", content))


def test_every_rule_has_a_network_that_breaks_it() -> None:
    elsewhere = {"op-version", "zero-point-output-dtype", "codes-opset", "attention-heads", "attention-keys"}
    assert {rule for _, _, rule in SPOILED.values()} | elsewhere == {rule.id for rule in RULES}
    assert len({rule.id for rule in RULES}) == len(RULES)


VERSIONED: dict[str, tuple[str, Callable[[ModelProto], None], str, tuple[Version, ...]]] = {
    # the rule, and the versions in which it fires
    "Swish": ("float", a_swish, "op-version", ((10, 15), (10, 16))),
    "zero point and dtype": ("int8", a_zero_point_beside_output_dtype, "zero-point-output-dtype", ((10, 15), (10, 16))),
}


@pytest.mark.parametrize(("kind", "spoil", "rule", "versions"), VERSIONED.values(), ids=VERSIONED.keys())
def test_rules_of_some_versions(
    kind: str, spoil: Callable[[ModelProto], None], rule: str, versions: tuple[Version, ...]
) -> None:
    model = onnx.load_model_from_string(valid(kind))
    spoil(model)
    assert {version for version in VERSIONS if rule in fired(model, version)} == set(versions)
    assert all(fired(model, version) <= {rule} for version in VERSIONS)


def test_codes_of_an_opset_that_has_none() -> None:
    model = onnx.load_model_from_string(valid("fp8"))
    an_old_opset(model)
    assert "codes-opset" in fired(model)


@pytest.mark.parametrize(("capacity", "expected"), [(16_384, set()), (16_385, {"attention-keys"})])
def test_a_long_cache(capacity: int, expected: set[str]) -> None:
    graph = tiny_graph("A", max_position_embeddings=131_072)
    files = dict(writer.emit(graph, options_for({"tensorrt": BFLOAT16}, max_positions=capacity)))
    content = files["tensorrt.onnx"]
    assert isinstance(content, bytes)
    assert fired(read_network("tensorrt.onnx", content)) == expected


@pytest.mark.parametrize(("queries", "expected"), [(4, set()), (3, {"attention-groups"})])
def test_heads_side_by_side(queries: int, expected: set[str]) -> None:
    """[B, S, n * d] with a mask of two dimensions, which the importers reshape: heads are attributes then."""
    kinds = {"q": (6, queries * 64), "k": (20, 2 * 64), "v": (20, 2 * 64)}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, *kind]) for name, kind in kinds.items()]
    inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, [6, 20]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)]
    heads = {"q_num_heads": queries, "kv_num_heads": 2}
    node = helper.make_node("Attention", [*kinds, "mask"], ["y"], name="attention", scale=1.0, **heads)
    graph = helper.make_graph([node], "attention", inputs, outputs)
    assert fired(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)) == expected


def test_symbolic_heads() -> None:
    shape = ["batch", "heads", "sequence", 64]
    names = ("q", "k", "v")
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in names]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)]
    node = helper.make_node("Attention", names, ["y"], name="attention", scale=1.0)
    graph = helper.make_graph([node], "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    found = check_network(model)
    assert [violation.rule.id for violation in found] == ["attention-heads"] * 3
    assert "heads" in str(found[0])


# --- functions, plugins, and the rest


def test_local_functions_are_looked_into() -> None:
    model = onnx.load_model_from_string(valid("float"))
    a_function(model, "Twice")
    a_call(model, "Twice")
    assert fired(model) == set()
    model.functions[0].node[0].op_type = "Softmin"
    assert fired(model) == {"op-unknown"}


def test_plugins_are_not() -> None:
    model = onnx.load_model_from_string(valid("float"))
    a_call(model, "WideFFN", "fuselage")
    with pytest.raises(CheckpointError, match="No opset import for domain fuselage"):
        check_network(model)
    model.opset_import.append(helper.make_opsetid("fuselage", 1))
    assert fired(model) == {"op-unknown"}
    assert fired(model, plugins={"WideFFN"}) == set()
    del model.opset_import[-1]
    a_function(model, "WideFFN", "fuselage")
    model.functions[0].node[0].op_type = "Softmin"
    assert fired(model) == {"op-unknown"}
    assert fired(model, plugins={"WideFFN"}) == set(), "the plugin replaces the function"


def test_the_check_changes_nothing_and_reads_no_weights() -> None:
    model = onnx.load_model_from_string(valid("int8"))  # whose weight files were never written
    before = model.SerializeToString(deterministic=True)
    assert any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
    check_network(model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_violation_says_everything() -> None:
    model = onnx.load_model_from_string(valid("float"))
    a_softcap(model)
    [violation] = check_network(model, BEFORE_11, file="tensorrt.onnx")
    text = str(violation)
    for part in ("tensorrt.onnx", "blocks.0.attention.attention (Attention)", "10.16", "softcap 0.0", "30.0"):
        assert part in text
    assert violation.rule.severity is Severity.REFUSED


def test_violations_are_refused_and_warnings_returned() -> None:
    model = onnx.load_model_from_string(valid("float"))
    unscaled_queries(model)
    files = {"one.onnx": model.SerializeToString(), "two.onnx": valid("float")}
    [warning] = refuse_violations(files, NEWEST)
    assert warning.rule.id == "attention-scale"
    a_softcap(model)
    the(model, "Attention").name = "attention\n  passes"
    for node in [node for node in model.graph.node if node.op_type == "TensorScatter"] * 10:
        set_attribute(node, "mode", "circular")
    with pytest.raises(TargetError) as raised:
        refuse_violations({"one.onnx": model.SerializeToString()}, NEWEST)
    text = str(raised.value)
    assert text.count("one.onnx: ") == 3
    assert "attention-scale" not in text
    assert "one.onnx: attention\\n  passes (Attention): expected" in text
    assert "present_k_0 (TensorScatter)" in text


def test_rules_for_what_is_installed() -> None:
    assert rules_for(None) == NEWEST
    assert rules_for((11, 0, 0)) == (11, 0)
    assert rules_for((10, 17, 3)) == (10, 16), "the last that is known before it"
    assert rules_for((11, 9, 1)) == NEWEST
    assert rules_for((10, 14, 1)) == VERSIONS[0]


def test_versions() -> None:
    assert version_from_text("tensorrt") == NEWEST
    assert version_from_text("tensorrt:10.15") == (10, 15)
    for text in ("tensorrt:", "tensorrt:9.0", "tensorrt10.15", "onnxruntime", ""):
        with pytest.raises(TargetError, match=r"10\.15, 10\.16, 11\.0"):
            version_from_text(text)


@pytest.mark.parametrize("content", [b"no network", b"", ModelProto().SerializeToString()])
def test_not_a_network(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.onnx"):
        read_network("x.onnx", tmp_path / "x.onnx")


@pytest.mark.parametrize("op_type", OPS)
def test_nodes_that_lack_everything(op_type: str) -> None:
    graph = helper.make_graph([helper.make_node(op_type, [], [])], "bare", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    with contextlib.suppress(CheckpointError):  # which ONNX's own inference may well raise
        check_network(model)


def test_the_table_of_ops() -> None:
    """Every op that we write is in it; every row is an op that ONNX had by opset 24, or one of TensorRT's own."""
    schemas = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert set(OPS) >= WRITTEN_OPS
    assert set(OPS) - schemas == set()
    assert not set(CUSTOM_OPS) & schemas
    for name, op in OPS.items():
        latest = onnx.defs.get_schema(name, 24) if onnx.defs.has(name) else None
        if latest is not None and op.attributes is not None:
            own = {"TRT_decomposable", "TRT_normalization_op", "nb_rank"}
            assert set(op.attributes) - own <= set(latest.attributes)
        if latest is not None:
            assert op.outputs is None or latest.min_output <= op.outputs <= latest.max_output
            assert max([*op.others, *op.constant, *op.ranks], default=-1) < latest.max_input


def test_a_folder(tmp_path: Path) -> None:
    from exporter.writers.onnx_tensorrt_rules import networks_to_check

    graph = tiny_graph("AF")
    for targets, files in (
        ({"tensorrt": None, "onnxruntime": None}, ["tensorrt.onnx"]),
        ({"onnxruntime": None}, ["onnxruntime.onnx"]),
    ):
        folder = tmp_path / "-".join(targets)
        save_folder(folder, writer.emit(graph, options_for(targets, max_positions=64)), kind=writer.KIND, details={})
        assert networks_to_check(folder) == ({file: folder / file for file in files}, [])
    assert networks_to_check(folder / "onnxruntime.onnx") == ({"onnxruntime.onnx": folder / "onnxruntime.onnx"}, [])
    with pytest.raises(CheckpointError):
        networks_to_check(tmp_path)
