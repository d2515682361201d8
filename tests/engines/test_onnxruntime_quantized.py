"""Quantized networks in ONNX Runtime against the fake-quantized reference, and builds that must not pass as fast.

Two computations of one quantized model differ by more than their float rounding where an activation lies on the
boundary between two codes: one of them rounds it up, the other down, and every later token that attends to it feels
it. Most positions meet none. So a quarter of all positions is held to `TOLERANCE` (a wrong scale, bias or row would
spare none), and all of them to what quantization itself costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from engines import onnxruntime as backend
from engines.onnxruntime import OnnxRuntime
from engines.onnxruntime_kernels import session_config
from exporter.dtypes import FLOAT32, INT8
from exporter.errors import EngineError
from exporter.graph import ModelGraph, linear_names
from exporter.lazy_quantized import quantized as quantized_tensor
from exporter.lazy_quantized import row_scales
from exporter.reference import Reference
from exporter.writers import onnx as writer
from exporter.writers.files import save_folder
from exporter.writers.onnx import PRESETS, Options
from tests.engines.test_onnxruntime import FIXED, GRAPHS, LENGTHS, SYMBOLIC, Recorded, open_graph
from tests.tiny import quantized_graph, tiny_graph

pytestmark = pytest.mark.skipif(bool(OnnxRuntime().missing()), reason="; ".join(OnnxRuntime().missing()))

TOLERANCE = 1e-4  # max |difference| of logits, whose standard deviation is about 1
UNPACKED = Options(networks=(replace(SYMBOLIC.networks[0], pack_qkv=False, pack_gate_up=False),))

FORMATS = {
    "int8-smoothquant": "int8 (W8A8 static)",
    "int8-smoothquant-token": "int8 (W8A8 per token)",
    "fp8": "fp8 (W8A8 static), emulated",
    "fp8-rowwise": "fp8 (W8A8 per token), emulated",
}
CASES = {
    "plain": (SYMBOLIC, UNPACKED),
    "all biases": (SYMBOLIC, UNPACKED),
    "fused": (SYMBOLIC, UNPACKED),
    "variable heads and widths": (SYMBOLIC,),
    "linear sublayers": (SYMBOLIC,),
    "parallel": (SYMBOLIC, UNPACKED),
    "relu": (UNPACKED,),
    "bfloat16 weights": (SYMBOLIC,),
}


@cache
def quantized(structure: str, format_name: str) -> ModelGraph:
    return quantized_graph(GRAPHS[structure](), format_name)


def differences(recorded: Recorded, graph: ModelGraph) -> np.ndarray:
    """Largest |difference| from the reference at every position that logits came out of, row after row."""
    reference = Reference(graph, resident=True)
    found = []
    for row, logits in zip(recorded.rows, recorded._logits, strict=True):
        wanted = reference.logits(torch.tensor([row]))[0].numpy()
        found += [np.abs(got - wanted[position]).max() for position, got in logits.items()]
    return np.array(found)


def compare(recorded: Recorded, graph: ModelGraph, original: ModelGraph) -> None:
    """Hold what came out against a quantized graph, by the measure of the one it was made from."""
    found = differences(recorded, graph)
    assert np.quantile(found, 0.25) < TOLERANCE
    assert found.max() < np.quantile(differences(recorded, original), 0.75)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize(
    ("structure", "options"),
    [(name, options) for name, forms in CASES.items() for options in forms],
    ids=[f"{name}-{'packed' if options is SYMBOLIC else 'unpacked'}" for name in CASES for options in CASES[name]],
)
def test_equals_the_reference(structure: str, options: Options, format_name: str, tmp_path: Path) -> None:
    """Prefill of unequal lengths, decode, and a chunk on the filled cache, of which one row gets nothing."""
    graph = quantized(structure, format_name)
    runner = open_graph(graph, options, tmp_path)
    assert runner.manifest.number_format == FORMATS[format_name]
    assert runner.manifest.options["emulated"] == format_name.startswith("fp8")
    recorded = Recorded(runner, len(LENGTHS))
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    recorded.decode(recorded.prefill(5, 1, 3))
    recorded.prefill(5, 0, 3)
    compare(recorded, graph, GRAPHS[structure]())


@pytest.mark.parametrize("structure", ["plain", "all biases", "relu"])
@pytest.mark.parametrize("options", [SYMBOLIC, UNPACKED], ids=["packed", "unpacked"])
def test_weight_only_rounds_inputs_as_if_per_token(structure: str, options: Options, tmp_path: Path) -> None:
    """ONNX Runtime's weight-only kernel rounds inputs in blocks of channels; here one block is all of them."""
    runner = open_graph(quantized(structure, "int8-weight-only"), options, tmp_path)
    assert runner.manifest.number_format == "int8 (weight only, kernel rounds inputs)"
    recorded = Recorded(runner, len(LENGTHS))
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    compare(recorded, quantized(structure, "int8-smoothquant-token"), GRAPHS[structure]())


def test_weight_only_of_any_width(tmp_path: Path) -> None:
    """Widths of 64, 448 and 256 channels: blocks of 64 and 256."""
    structure = "variable heads and widths"
    recorded = Recorded(open_graph(quantized(structure, "int8-weight-only"), SYMBOLIC, tmp_path), len(LENGTHS))
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    per_token = quantized(structure, "int8-smoothquant-token")
    assert differences(recorded, per_token).max() < 2 * differences(recorded, GRAPHS[structure]()).max()


def test_partly_quantized(tmp_path: Path) -> None:
    """What is packed elsewhere stays apart where only some of it is quantized, or not in one format."""
    original = tiny_graph("AF AF", ffn_bias=True)
    graph, token = quantized_graph(original, "int8-smoothquant"), quantized_graph(original, "int8-smoothquant-token")
    first, second = graph.blocks
    first = replace(first, attention=replace(first.attention, k_proj=original.blocks[0].attention.k_proj))
    second = replace(second, ffn=replace(second.ffn, up_proj=token.blocks[1].ffn.up_proj))
    graph = replace(graph, blocks=(first, second))
    runner = open_graph(graph, SYMBOLIC, tmp_path)
    assert runner.manifest.number_format == "int8 (W8A8 per token) + int8 (W8A8 static)"
    recorded = Recorded(runner, len(LENGTHS))
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    compare(recorded, graph, original)


@pytest.mark.parametrize("inputs", ["inputs: {dtype: int8, scale: tensor}", ""], ids=["static", "weight only"])
def test_one_scale_per_weight(inputs: str, tmp_path: Path) -> None:
    """Which q/k/v share, and gate and up."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"weights: {{dtype: int8, scale: tensor}}\n{inputs}\n")
    original = GRAPHS["all biases"]()
    graph = quantized_graph(original, str(recipe))
    recorded = Recorded(open_graph(graph, SYMBOLIC, tmp_path), len(LENGTHS))
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    if not inputs:  # see above: the kernel rounds as if per token
        recipe.write_text("weights: {dtype: int8, scale: tensor}\ninputs: {dtype: int8, scale: token}\n")
        graph = quantized_graph(original, str(recipe))
    compare(recorded, graph, original)


def test_a_quantized_head(tmp_path: Path) -> None:
    original = tiny_graph("AF")
    token = quantized_graph(original, "int8-smoothquant-token").blocks[0].ffn.gate_proj
    head = original.lm_head
    scale = row_scales(head.weight, INT8)
    head = replace(
        head,
        weight=quantized_tensor(head.weight, scale, INT8),
        quantization=replace(token.quantization, weight_scale=scale),
    )
    graph = replace(original, lm_head=head)
    recorded = Recorded(open_graph(graph, SYMBOLIC, tmp_path), len(LENGTHS))
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    compare(recorded, graph, original)


@pytest.mark.parametrize("format_name", [*FORMATS, "int8-weight-only"])
def test_the_form_for_tensorrt_computes_the_same(format_name: str, tmp_path: Path) -> None:
    """In float32 and without a single optimization, which is no engine but shows what the network says."""
    original = tiny_graph("AF (AF AF) F", ffn_bias=True)
    graph = quantized_graph(original, format_name)
    options = replace(FIXED, networks=(replace(PRESETS["tensorrt"].networks[0], dtype=FLOAT32),))
    save_folder(tmp_path / "network", writer.emit(graph, options), kind="network", details={})
    session_options = onnxruntime.SessionOptions()
    session_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "network" / "tensorrt.onnx"), session_options)
    ids = np.random.default_rng(3).integers(0, graph.vocab_size, (1, 40))
    feeds = {"input_ids": ids, "position_ids": np.arange(40)[None], "cache_write": np.zeros(1, np.int64)}
    feeds |= {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs() if i.name.startswith("past_")}
    logits = [session.run(["logits"], feeds | {"logits_index": np.array([i])})[0][0] for i in range(40)]
    wanted, exact = (Reference(one).logits(torch.from_numpy(ids))[0].numpy() for one in (graph, original))
    found = np.abs(np.stack(logits) - wanted).max(axis=1)
    assert np.quantile(found, 0.25) < TOLERANCE
    assert found.max() < np.quantile(np.abs(wanted - exact).max(axis=1), 0.75)


# -- builds that would be slow without a word


def network_of(graph: ModelGraph, options: Options, folder: Path) -> Path:
    save_folder(folder / "network", writer.emit(graph, options), kind="network", details={})
    return folder / "network"


def rewritten(network: Path, change: Callable[[onnx.NodeProto], None]) -> None:
    """Apply `change` to every node and bring the folder's manifest in line."""
    path = network / "onnxruntime.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        change(node)
    contents = [(file.name, file.read_bytes()) for file in network.iterdir() if "manifest" not in file.name]
    contents = [(name, model.SerializeToString() if name == path.name else content) for name, content in contents]
    save_folder(network, contents, kind="network", details={}, force=True)


def without_input_zero_points(node: onnx.NodeProto) -> None:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and ".input." in node.name:
        del node.input[2:]
        if node.op_type == "QuantizeLinear":
            node.attribute.append(onnx.helper.make_attribute("output_dtype", onnx.TensorProto.INT8))


def without_weight_zero_points(node: onnx.NodeProto) -> None:
    if node.op_type == "DequantizeLinear" and ".weight." in node.name:
        del node.input[2:]


def built(network: Path) -> Path:
    return OnnxRuntime().build(network, network.parent / "engine", label=None, force=False)


@pytest.mark.parametrize("change", [without_input_zero_points, without_weight_zero_points])
def test_refuses_products_that_stay_float(change: Callable[[onnx.NodeProto], None], tmp_path: Path) -> None:
    network = network_of(quantized("plain", "int8-smoothquant"), SYMBOLIC, tmp_path)
    rewritten(network, change)
    with pytest.raises(EngineError, match=r"8 of 8 quantized linears.*blocks\.0\.attention\.qkv_proj, its weight deq"):
        built(network)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("format_name", ["int8-smoothquant", "int8-smoothquant-token"])
def test_refuses_merged_roundings(format_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Common subexpression elimination makes one of the equal roundings of an input, and the kernels slow."""

    def eliminating(linears: object) -> dict[str, str]:
        config = session_config(linears)  # type: ignore[arg-type]
        return {key: value for key, value in config.items() if "optimizers" not in key}

    monkeypatch.setattr(backend, "session_config", eliminating)
    network = network_of(quantized("plain", format_name), UNPACKED, tmp_path)
    with pytest.raises(EngineError, match=r"10 of 14 .*q_proj by QGemm on int8.*and 6 more"):
        built(network)


def test_refuses_the_form_for_tensorrt(tmp_path: Path) -> None:
    options = replace(FIXED, networks=(replace(PRESETS["tensorrt"].networks[0], dtype=FLOAT32),))
    network = network_of(quantized("plain", "int8-smoothquant"), options, tmp_path)
    with pytest.raises(EngineError, match="Export the network for the target onnxruntime"):
        built(network)


def test_refuses_fp8_weights_that_are_dequantized_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "session_config", lambda linears: {})
    with pytest.raises(EngineError, match=r"8 of 8 .*format: found .*its weight dequantized at every step"):
        built(network_of(quantized("plain", "fp8"), SYMBOLIC, tmp_path))


def test_refuses_a_network_that_fails_while_it_runs(tmp_path: Path) -> None:
    def mistake(node: onnx.NodeProto) -> None:
        if node.name == "rows.start":
            node.op_type = "Add"  # the sequence's length, and not its product with 0: past the last row

    network = network_of(tiny_graph("AF"), SYMBOLIC, tmp_path)
    rewritten(network, mistake)
    with pytest.raises(EngineError, match=r"does not run the network .*logits\.rows"):
        built(network)
    assert not (tmp_path / "engine").exists()


def test_refuses_what_is_not_a_network(tmp_path: Path) -> None:
    network = network_of(tiny_graph("AF"), SYMBOLIC, tmp_path)
    contents = [(file.name, file.read_bytes()) for file in network.iterdir() if "manifest" not in file.name]
    contents = [(name, b"\xff" * 40 if name.endswith(".onnx") else content) for name, content in contents]
    save_folder(network, contents, kind="network", details={}, force=True)
    with pytest.raises(EngineError, match="not an ONNX network"):
        built(network)


def test_manifest_counts_the_bytes_of_codes(tmp_path: Path) -> None:
    sizes = {}
    for name, graph in (("float32", GRAPHS["plain"]()), ("int8", quantized("plain", "int8-smoothquant"))):
        engine = built(network_of(graph, SYMBOLIC, tmp_path / name))
        manifest = json.loads((engine / "engine.json").read_text())
        sizes[name] = manifest["weight_bytes"]
        assert sizes[name] == (engine / "weights.safetensors").stat().st_size
        assert manifest["number_format"] == (None if name == "float32" else "int8 (W8A8 static)")
    quantized_weights = sum(linear.weight.size for linear in linear_names(graph).values() if linear.quantization)
    assert 2.9 * quantized_weights < sizes["float32"] - sizes["int8"] < 3 * quantized_weights
