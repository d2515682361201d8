"""FFNs as nodes for a TensorRT plugin: what the nodes look like, and what their local functions compute."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporter.dtypes import BFLOAT16
from exporter.errors import TargetError
from exporter.graph import Activation, ModelGraph
from exporter.writers import onnx as writer
from exporter.writers.files import save_folder, sizes_of
from exporter.writers.hf import Options as HfOptions
from exporter.writers.hf import emit as hf_emit
from exporter.writers.onnx import PRESETS, Options, options_for
from plugins.contract import CustomOp, wide_ffn_halves
from tests.command_line import call, done
from tests.engines.test_onnxruntime import LENGTHS, Recorded, open_graph
from tests.engines.test_onnxruntime_quantized import TOLERANCE, differences
from tests.tiny import quantized_graph, tiny_graph

FORMATS = {
    None: ("bfloat16", "none"),
    "fp8": ("float8_e4m3fn", "static"),
    "fp8-rowwise": ("float8_e4m3fn", "token"),
    "int8-smoothquant": ("int8", "static"),
    "int8-smoothquant-token": ("int8", "token"),
    "int8-weight-only": ("int8", "none"),
}
TENSORRT = options_for({"tensorrt": BFLOAT16}, max_positions=64, plugins=("wide_ffn",))
ONNXRUNTIME = Options(networks=(replace(PRESETS["onnxruntime"].networks[0], plugins=("wide_ffn",)),))


@cache
def graph_of(format_name: str | None, pattern: str = "AF F (AF F) L") -> ModelGraph:
    graph = tiny_graph(pattern, dtype="bfloat16", intermediate_size=(256, 192))
    return graph if format_name is None else quantized_graph(graph, format_name)


def network_of(graph: ModelGraph, options: Options, folder: Path) -> onnx.ModelProto:
    save_folder(folder, writer.emit(graph, options), kind=writer.KIND, details={})
    [path] = folder.glob("*.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path, load_external_data=False)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def plugin_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("options", [TENSORRT, ONNXRUNTIME], ids=["tensorrt", "onnxruntime"])
def test_nodes_are_those_of_the_contract(format_name: str | None, options: Options, tmp_path: Path) -> None:
    """Names and places of inputs and outputs, and what TensorRT's parser looks for; also valid ONNX, with all types."""
    model = network_of(graph_of(format_name), options, tmp_path / "network")
    halves = wide_ffn_halves(*FORMATS[format_name])
    nodes = plugin_nodes(model)
    assert [node.op_type for node in nodes] == [half.name for half in halves] * 4
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", 24), ("fuselage", 1)}
    constants = {one.name: one for one in model.graph.initializer}
    for node, half in zip(nodes, halves * 4, strict=True):
        wanted = {"plugin_namespace": b"fuselage", "plugin_version": b"1", "aot": 1}
        found = attributes(node)
        assert {name: found.pop(name) for name in wanted} == wanted
        assert list(found) == [attribute.name for attribute in half.attributes]
        assert len(node.output) == len(half.outputs)
        assert not half.problems(dict(described(node, half, constants)), found)


def described(node: onnx.NodeProto, half: CustomOp, constants: dict[str, onnx.TensorProto]) -> Any:
    """(name, (dtype, shape)) of a node's inputs, of one token where it is no constant, in the order of the contract."""
    names = {onnx.TensorProto.BFLOAT16: "bfloat16", onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT8: "int8",
             onnx.TensorProto.FLOAT8E4M3FN: "float8_e4m3fn"}  # fmt: skip
    sizes = {"tokens": 1, "hidden": 64}
    assert len(node.input) == len(half.inputs)
    for name, one in zip(node.input, half.inputs, strict=True):
        if name not in constants:  # computed, or cast in the network
            shape = one.shapes[0]
            sizes |= {"width": width_of(node, constants)}
            yield one.name, (one.dtypes[0], tuple(sizes.get(str(size), 1) for size in shape))
        else:
            constant = constants[name]
            yield one.name, (names[constant.data_type], tuple(constant.dims))


def width_of(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> int:
    sizes = {size for name in node.input if name in constants for size in constants[name].dims} - {1, 64}
    return sizes.pop() if sizes else 256


def test_float32_networks_cast_the_same_weights() -> None:
    """A plain network and one with plugins refer to the same bytes; only scales of shape [] are there twice."""
    for format_name in FORMATS:
        graph = graph_of(format_name)
        plain = options_for({"tensorrt": BFLOAT16}, max_positions=64)
        both = replace(plain, networks=(*plain.networks, replace(TENSORRT.networks[0], name="plugins")))
        files = [sizes_of(writer.emit(graph, options)) for options in (plain, both)]
        sizes = [sum(size for name, size in named.items() if name.endswith("safetensors")) for named in files]
        assert sizes[1] - sizes[0] < 0.06 * sizes[0], format_name


@pytest.mark.parametrize("format_name", FORMATS)
def test_local_functions_compute_what_the_reference_does(format_name: str | None, tmp_path: Path) -> None:
    """In ONNX Runtime. FFNs alone: what an attention's standard form rounds is tested elsewhere."""
    graph = graph_of(format_name, "F (F F) F")
    runner = open_graph(graph, ONNXRUNTIME, tmp_path)
    is_quantized = format_name is not None
    assert (runner.manifest.options["emulated"], str(runner.manifest.number_format).endswith(", emulated")) == (
        is_quantized,
        is_quantized,
    )
    recorded = Recorded(runner, len(LENGTHS))
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    recorded.prefill(5, 0, 3)
    found = differences(recorded, graph)
    assert np.quantile(found, 0.75) < TOLERANCE  # where an input lies between two codes, it may become the other one
    assert found.max() < (TOLERANCE if format_name in (None, "int8-weight-only") else 0.1)


def test_whole_models_compute_what_the_reference_does(tmp_path: Path) -> None:
    graph = graph_of(None)
    recorded = Recorded(open_graph(graph, ONNXRUNTIME, tmp_path), len(LENGTHS))
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    recorded.decode(recorded.prefill(5, 1, 3))
    recorded.compare(graph)


def test_functions_are_there_once_per_format(tmp_path: Path) -> None:
    model = network_of(graph_of(None), TENSORRT, tmp_path / "with")
    assert Counter(function.name for function in model.functions) == {"wide_ffn_up_bf16": 1, "wide_ffn_down_bf16": 1}
    plain = network_of(graph_of(None), options_for({"tensorrt": BFLOAT16}, max_positions=64), tmp_path / "without")
    assert not plain.functions
    assert not plugin_nodes(plain)


@pytest.mark.parametrize(
    ("graph", "options", "message"),
    [
        (
            tiny_graph("AF", activation=Activation.RELU),
            ONNXRUNTIME,
            "block 0: the wide-FFN op gates with silu: found relu",
        ),
        (tiny_graph("AF", ffn_bias=True), ONNXRUNTIME, "block 0: the wide-FFN op has no biases"),
        (
            tiny_graph("AF"),
            options_for({"tensorrt": None}, plugins=("wide_ffn",)),
            "tensorrt.onnx: the plugins for TensorRT compute in bfloat16: expected bfloat16, found float32",
        ),
        (tiny_graph("AF"), options_for({"onnxruntime": None}, plugins=("x",)), "onnxruntime.onnx: no such plugin"),
    ],
)
def test_what_cannot_be_written(graph: ModelGraph, options: Options, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        list(writer.emit(graph, options))


def test_export(tmp_path: Path) -> None:
    """Also against the rules of TensorRT's importer, which leave nodes of plugins alone."""
    save_folder(tmp_path / "model", hf_emit(graph_of("fp8", "AF F"), HfOptions()), kind="checkpoint", details={})
    export = ("export", tmp_path / "model", "--to", "onnx", "--plugins", "wide_ffn", "--max-positions", 64)
    done(*export, "--target", "tensorrt:bfloat16", "--check", "tensorrt", "-o", tmp_path / "network")
    done("check", tmp_path / "network")
    assert "cast-codes" in call("check", tmp_path / "network" / "tensorrt.onnx").output, "nobody says who runs its ops"
    model = onnx.load(tmp_path / "network" / "tensorrt.onnx", load_external_data=False)
    assert [node.op_type for node in plugin_nodes(model)] == ["wide_ffn_up_fp8_static", "wide_ffn_down_fp8_static"] * 2
    refused = call(*export, "--target", "tensorrt:float16", "-o", tmp_path / "refused")
    assert refused.exit_code == 2
    assert "the plugins for TensorRT compute in bfloat16" in refused.output
    assert not (tmp_path / "refused").exists()
