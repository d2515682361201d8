"""Codes and scales that the pass puts on a graph, held against numpy; recipes; what the reference makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from exporter.calibration import calibrate, ranges_of
from exporter.dtypes import FLOAT8_E4M3FN, INT8
from exporter.errors import CheckpointError, PlanError
from exporter.graph import ModelGraph, linear_names
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.passes.quantize_linears import quantize_linears, structure_quantized
from exporter.quantization import QuantizationRecipe, format_names, read_quantization
from exporter.ranges import Ranges
from exporter.read import open_model
from exporter.reference import Reference
from exporter.writers import hf
from exporter.writers.files import MANIFEST, save_folder
from tests.tiny import tiny_graph

TOKENS = np.random.default_rng(1).integers(0, 320, (3, 24))
FP8 = {"dtype": "float8_e4m3fn", "scale": "tensor"}
INT8_ROWS = {"dtype": "int8", "scale": "row"}


def calibrated(graph: ModelGraph) -> Ranges:
    return ranges_of(calibrate(graph, TOKENS, text="random"), graph)


def recipe(**tables: object) -> QuantizationRecipe:
    return QuantizationRecipe.model_validate(tables)


def test_per_tensor_scales_are_shared_within_a_gemm() -> None:
    graph = tiny_graph("AF AF")
    wanted = recipe(weights=FP8, inputs=FP8, overrides=[{"match": "*.k_proj", "inputs": "none"}])
    names = linear_names(quantize_linears(graph, wanted, calibrated(graph)))
    plain = linear_names(graph)
    for group in (["q_proj", "k_proj", "v_proj"], ["o_proj"]):
        weights = [plain[f"blocks.1.attention.{name}"].weight.numpy() for name in group]
        scale = np.float32(max(np.abs(weight).max() for weight in weights)) / np.float32(448)
        for name, weight in zip(group, weights, strict=True):
            linear = names[f"blocks.1.attention.{name}"]
            assert linear.quantization is not None
            assert linear.quantization.weight_scale.numpy() == scale
            expected = torch.from_numpy(weight / scale).to(torch.float8_e4m3fn).float().numpy()
            np.testing.assert_array_equal(linear.weight.numpy().astype(np.float32), expected)
    gate, up = (names[f"blocks.0.ffn.{name}"].quantization for name in ("gate_proj", "up_proj"))
    assert gate
    assert up
    assert gate.input
    assert up.input
    assert gate.weight_scale is up.weight_scale
    assert gate.input.scale is up.input.scale
    assert names["lm_head"].quantization is None


def test_row_scales_read_the_weight_once() -> None:
    graph = tiny_graph("F")
    linear = linear_names(quantize_linears(graph, recipe(weights=INT8_ROWS)))["blocks.0.ffn.down_proj"]
    weight = linear_names(graph)["blocks.0.ffn.down_proj"].weight.numpy()
    assert linear.quantization is not None
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    np.testing.assert_array_equal(linear.weight.rows(3, 9), np.rint(weight / scale[:, None])[3:9])
    np.testing.assert_array_equal(linear.quantization.weight_scale.numpy(), scale)


@pytest.mark.parametrize("scale", ["tensor", "row"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_the_tensor_that_is_not_made_of_numbers_is_named(value: float, scale: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_folder(folder, hf.emit(tiny_graph("AF F F"), hf.Options()), kind="checkpoint", details={})
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][200, 3] = value
    save_file(tensors, folder / "model.safetensors")
    (folder / MANIFEST).unlink()
    graph = fuse_ffn(open_model(folder, need_weights=True).graph, [(1, 2)])
    quantized = quantize_linears(graph, recipe(weights={"dtype": "int8", "scale": scale}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.layers\.2\.mlp\.up_proj\.weight: .* NaN"):
        linear_names(quantized)["blocks.1.ffn.up_proj"].weight.numpy()


def fake_quantized_logits(graph: ModelGraph, quantized: ModelGraph) -> tuple[np.ndarray, np.ndarray]:
    tokens = torch.from_numpy(TOKENS)
    return Reference(quantized).logits(tokens).numpy(), Reference(graph).logits(tokens).numpy()


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("pattern", ["AF F F AF", "AF (AF AF) LF AL -"])
def test_every_format_stays_close(name: str, pattern: str) -> None:
    graph = tiny_graph(pattern, qkv_bias=True)
    if pattern.startswith("AF F F"):
        graph = fuse_ffn(graph, [(1, 2)])
    quantized = quantize_linears(graph, read_quantization(name), calibrated(graph))
    found, expected = fake_quantized_logits(graph, quantized)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < (0.2 if name.startswith("fp8") else 0.1)


def test_the_reference_rounds_inputs_as_written() -> None:
    """One linear sublayer, computed by hand: a static scale, a scale per token, and none."""
    graph = tiny_graph("L")
    plain = linear_names(graph)["blocks.0.attention.linear"].weight.numpy()
    ranges = calibrated(graph)
    tokens = torch.from_numpy(TOKENS[:1])
    x, _ = (state[0].double().numpy() for state in Reference(graph).residuals(tokens, None))
    sublayer = graph.flat_blocks[0].attention
    assert sublayer is not None
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + sublayer.norm.eps) * sublayer.norm.weight.numpy()
    rows = np.abs(plain).max(axis=1, keepdims=True) / 127
    weight = np.rint(plain / rows) * rows
    largest = ranges[0].attention["norm"].numpy() * np.abs(sublayer.norm.weight.numpy())
    for scale, steps in (
        ("tensor", largest.max() / 127),
        ("token", np.abs(normed).max(axis=1, keepdims=True) / 127),
        (None, None),
    ):
        inputs = None if scale is None else {"dtype": "int8", "scale": scale}
        quantized = quantize_linears(graph, recipe(weights=INT8_ROWS, inputs=inputs), ranges)
        _, found = (state[0].double().numpy() for state in Reference(quantized).residuals(tokens, None))
        rounded = normed if steps is None else np.clip(np.rint(normed / steps), -128, 127) * steps
        np.testing.assert_allclose(found - x, rounded @ weight.T, atol=2e-4)


def test_kv_cache_in_prefill_and_decode() -> None:
    graph = tiny_graph("AF AF")
    quantized = quantize_linears(graph, recipe(weights=INT8_ROWS, kv_cache="float8_e4m3fn"), calibrated(graph))
    reference = Reference(quantized)
    tokens = torch.from_numpy(TOKENS[:1, :9])
    whole = reference.logits(tokens)
    cache = reference.new_cache(1, 9)
    reference.step(tokens[:, :5], cache)
    for position in range(5, 9):
        last = reference.step(tokens[:, position : position + 1], cache)
    assert torch.allclose(whole[:, -1], last, atol=1e-5)
    without = quantize_linears(graph, recipe(weights=INT8_ROWS), None)
    assert (Reference(without).logits(tokens) - whole).abs().max() > 1e-3


def test_patterns_choose_linears() -> None:
    graph = tiny_graph("AF AF")
    chosen = recipe(
        weights=INT8_ROWS,
        inputs={"dtype": "int8", "scale": "token"},
        include=["lm_head"],
        exclude=["blocks.0.*"],
        overrides=[{"match": "*.down_proj", "inputs": "none"}, {"match": "*.o_proj", "weights": FP8}],
    )
    found = {}
    for name, linear in linear_names(quantize_linears(graph, chosen)).items():
        quantization = linear.quantization
        found[name] = None if quantization is None else (linear.weight.dtype, quantization.input is not None)
    assert all(found[name] is None for name in found if name.startswith("blocks.0."))
    assert found["blocks.1.ffn.down_proj"] == (INT8, False)
    assert found["blocks.1.attention.o_proj"] == (FLOAT8_E4M3FN, True)
    assert found["blocks.1.ffn.up_proj"] == found["lm_head"] == (INT8, True)


REFUSED = {
    "no_ranges": ({"weights": FP8, "inputs": FP8}, "needs calibration"),
    "nothing_excluded": ({"weights": FP8, "exclude": ["blocks.7.*"]}, "matches no linear"),
    "everything_excluded": ({"weights": INT8_ROWS, "exclude": ["*"]}, "leaves every linear out"),
    "nothing_overridden": ({"weights": FP8, "overrides": [{"match": "down"}]}, "matches no linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    tables, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        quantize_linears(tiny_graph("AF"), recipe(**tables))


def test_quantizing_or_fusing_what_is_quantized_is_refused() -> None:
    graph = quantize_linears(tiny_graph("AF F F"), recipe(weights=INT8_ROWS))
    with pytest.raises(PlanError, match="quantized already"):
        quantize_linears(graph, recipe(weights=INT8_ROWS))
    with pytest.raises(PlanError, match="Fuse first"):
        fuse_ffn(graph, [(1, 2)])


def test_heads_that_cannot_be_quantized() -> None:
    with pytest.raises(PlanError, match="tied"):
        quantize_linears(tiny_graph("AF", tied=True), recipe(weights=INT8_ROWS, include=["lm_head"]))
    with pytest.raises(PlanError, match="lm_head has no calibrated input range"):
        structure_quantized(tiny_graph("AF"), recipe(weights=FP8, inputs=FP8, include=["lm_head"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: {dtype: int4, scale: row}", "int8"),
        ("weights: {dtype: int8, scale: column}", "row"),
        ("{}", "weights"),
        ("weights: {dtype: int8, scale: row}\nsmoothing: {alpha: 2}", "alpha"),
        ("weights: {dtype: int8, scale: row}\nkv_cache: int4", "kv_cache"),
        ("[]", "not a quantization recipe"),
    ],
)
def test_malformed_recipes(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(PlanError, match=message):
        read_quantization(tmp_path / "recipe.yaml")


def test_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(PlanError, match="int8-weight-only"):
        read_quantization("int3")
