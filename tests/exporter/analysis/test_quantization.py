"""Errors, smoothing strengths and the table of schemes, each against whole graphs that are quantized and run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from exporter.analysis.quantization import (
    SCHEMES,
    SMOOTHINGS,
    _as_stored,
    compare_smoothing,
    inputs_of_blocks,
    linear_errors,
    readers_of,
    search_strengths,
)
from exporter.calibration import CalibrationError, calibrate, ranges_of
from exporter.dtypes import FLOAT32, INT8
from exporter.errors import CheckpointError
from exporter.graph import FFN, ModelGraph, linear_names, weights
from exporter.lazy import array, full
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.passes.quantize_linears import quantize_linears
from exporter.passes.smooth_channels import Strengths, smooth_channels
from exporter.quantization import QuantizationRecipe, Smoothing, read_quantization, recipe_with, sharing_scale
from exporter.quantize import error_files, quantize, split_windows
from exporter.ranges import Ranges
from exporter.reference import LoadedBlock, Reference, apply_linear
from tests.tiny import tiny_graph

CALIBRATION = np.random.default_rng(1).integers(0, 320, (6, 24))
OTHERS = np.random.default_rng(2).integers(0, 320, (3, 24))
ALPHAS = (0.3, 0.6)


def fused_graph(*, ffn_bias: bool = False) -> ModelGraph:
    """A wide FFN of two layers, the second of which is eight times as loud inside."""
    graph = tiny_graph("AF F F", intermediate_size=128, ffn_bias=ffn_bias)
    block = graph.flat_blocks[2]
    ffn = block.ffn
    assert isinstance(ffn, FFN)
    up = replace(ffn.up_proj, weight=array(ffn.up_proj.weight.numpy() * np.float32(8)))
    down = replace(ffn.down_proj, weight=array(ffn.down_proj.weight.numpy() / np.float32(8)))
    loud = replace(block, ffn=replace(ffn, up_proj=up, down_proj=down))
    return fuse_ffn(replace(graph, blocks=(*graph.blocks[:2], loud)), [(1, 2)])


def measured(graph: ModelGraph) -> Ranges:
    return ranges_of(calibrate(graph, CALIBRATION, text="random"), graph)


def ffn_output(graph: ModelGraph, plain: ModelGraph, index: int) -> np.ndarray:
    """What an FFN adds on the hidden states of the plain model, [tokens, D]."""
    reference, tokens = Reference(plain), torch.from_numpy(OTHERS)
    x = list(reference.residuals(tokens, None))[index]
    _, ffn = Reference(graph).block(index).contributions(x, reference.span(tokens.shape, None))
    assert isinstance(ffn, torch.Tensor)
    return ffn.flatten(0, 1).double().numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_inputs_are_what_linears_read() -> None:
    graph = tiny_graph("AF (AF AF) LF AL -", qk_norm=True)
    found = list(inputs_of_blocks(graph, OTHERS, batch=2))
    assert [inputs.index for inputs in found] == list(range(len(graph.flat_blocks)))
    for inputs, block in zip(found, graph.flat_blocks, strict=True):
        assert {sublayer for sublayer, _ in inputs.sites} == {
            name for name in ("attention", "ffn") if getattr(block, name) is not None
        }
    states = list(Reference(graph).residuals(torch.from_numpy(OTHERS), None))
    ffn = found[0].block.ffn
    inner = found[0].sites["ffn", "down_proj"]
    attention = found[0].sites["attention", "o_proj"] @ found[0].block.attention.o_proj.weight.T
    rebuilt = states[0].flatten(0, 1) + attention + inner @ ffn.down_proj.weight.T
    assert torch.allclose(rebuilt, states[1].flatten(0, 1), atol=1e-5)
    outer = found[0].sites["ffn", "norm"]
    gated = torch.nn.functional.silu(outer @ ffn.gate_proj.weight.T) * (outer @ ffn.up_proj.weight.T)
    assert torch.allclose(gated, inner, atol=1e-5)


def test_a_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(CheckpointError, match="block 2: weight is NaN or infinite"):
        list(inputs_of_blocks(filled(tiny_graph("AF F F"), 2, "ffn", "up_proj", np.nan), OTHERS))


@pytest.mark.parametrize("name", ["fp8", "int8-smoothquant", "int8-smoothquant-token", "int8-weight-only"])
def test_linear_errors(name: str) -> None:
    graph = fused_graph()
    ranges = measured(graph)
    quantized = quantize_linears(graph, read_quantization(name), ranges)
    errors = {error.name: error for error in linear_errors(graph, quantized, OTHERS)}
    assert errors.keys() == linear_names(graph).keys() - {"lm_head"}
    assert list(errors) == sorted(errors, key=lambda name: -errors[name].relative_error)
    # down_proj of the wide FFN by hand: its input from the plain model, everything else in numpy
    plain, codes = (linear_names(one)["blocks.1.ffn.down_proj"] for one in (graph, quantized))
    x = next(i for i in inputs_of_blocks(graph, OTHERS) if i.index == 1).sites["ffn", "down_proj"].double().numpy()
    assert codes.quantization is not None
    scale = codes.quantization.weight_scale.numpy().astype(np.float64)
    weight = codes.weight.numpy().astype(np.float64) * (scale[:, None] if scale.ndim else scale)
    rounded, saturation = x, None
    inputs = codes.quantization.input
    if inputs is not None and inputs.dtype == INT8:
        step = np.abs(x).max(1, keepdims=True) / 127 if inputs.scale is None else inputs.scale.numpy()
        rounded = np.clip(np.rint(x / step), -128, 127) * step
        saturation = None if inputs.scale is None else (np.abs(x) > 127 * step).mean()
    if name == "fp8":
        assert inputs is not None
        assert inputs.scale is not None
        step = inputs.scale.numpy()
        saturation = (np.abs(x) > 448 * step).mean()
        codes_of_x = torch.from_numpy(np.clip(x / step, -448, 448)).to(torch.float8_e4m3fn)
        rounded = codes_of_x.double().numpy() * step
    expected = relative(rounded @ weight.T, x @ plain.weight.numpy().astype(np.float64).T)
    found = errors["blocks.1.ffn.down_proj"]
    assert found.relative_error == pytest.approx(expected, rel=2e-2)
    assert found.sqnr_db == pytest.approx(-20 * np.log10(found.relative_error))
    assert (found.saturation is None) == (saturation is None)
    if saturation is not None:
        assert found.saturation == pytest.approx(saturation, abs=1e-9)


def uneven_norm() -> ModelGraph:
    graph = tiny_graph("AF F")
    block = graph.flat_blocks[1]
    assert isinstance(block.ffn, FFN)
    weight = np.exp(2 * np.random.default_rng(3).standard_normal(64)).astype(np.float32)
    ffn = replace(block.ffn, norm=replace(block.ffn.norm, weight=array(weight)))
    return replace(graph, blocks=(graph.blocks[0], replace(block, ffn=ffn)))


def brute_force_error(
    graph: ModelGraph, ranges: Ranges, recipe: QuantizationRecipe, site: str, alpha: float | None
) -> float:
    """Mean over tokens of the squared error of the linears of block 1 that read a site."""
    strengths: Strengths = {} if alpha is None else {(1, "ffn", site): alpha}
    smoothed, new = smooth_channels(graph, ranges, strengths)
    quantized = Reference(quantize_linears(smoothed, recipe, new)).block(1).members[0].ffn
    inputs = next(i for i in inputs_of_blocks(smoothed, OTHERS) if i.index == 1)
    x = inputs.sites["ffn", site]
    lost = kept = torch.zeros(len(x))
    for name, linear in readers_of(inputs.block.ffn, site).items():
        exact = x @ linear.weight.T
        lost = lost + (apply_linear(getattr(quantized, name), x) - exact).square().sum(-1)
        kept = kept + exact.square().sum(-1)
    return float((lost / kept).mean())


@pytest.mark.parametrize(
    ("site", "graph"),
    [pytest.param("down_proj", fused_graph(), id="down_proj"), pytest.param("norm", uneven_norm(), id="norm")],
)
@pytest.mark.parametrize("name", ["int8-smoothquant", "int8-smoothquant-token"])
def test_the_search_takes_the_best_of_all(name: str, site: str, graph: ModelGraph) -> None:
    recipe, ranges = read_quantization(name), measured(graph)
    errors = {alpha: brute_force_error(graph, ranges, recipe, site, alpha) for alpha in (None, *ALPHAS)}
    best = min(errors, key=lambda alpha: errors[alpha])
    assert best is not None  # what is uneven is worth smoothing
    found = search_strengths(graph, ranges, recipe, OTHERS, alphas=ALPHAS)
    assert found[1, "ffn", site] == best


def test_the_search_leaves_alone_what_smoothing_spoils() -> None:
    graph = uneven_norm()  # whose inputs nobody rounds
    assert search_strengths(graph, measured(graph), read_quantization("int8-weight-only"), OTHERS, alphas=(1.0,)) == {}


@pytest.mark.parametrize(
    "override", [{}, {"inputs": "none"}, {"weights": {"dtype": "int8", "scale": "tensor"}}], ids=str
)
def test_the_search_rounds_weights_as_they_are_stored(override: dict[str, Any]) -> None:
    graph, codes = fused_graph(), {"dtype": "float8_e4m3fn", "scale": "tensor"}
    described = {"weights": codes, "inputs": codes, "overrides": [{"match": "*.up_proj", **override}]}
    recipe = QuantizationRecipe.model_validate(described)
    plain, stored = (
        Reference(one).block(1).members[0].ffn for one in (graph, quantize_linears(graph, recipe, measured(graph)))
    )
    readers = readers_of(plain, "norm")
    assert readers.keys() == {"gate_proj", "up_proj"}
    formats = {name: recipe.format_of(f"blocks.1.ffn.{name}") for name in readers}
    for name, linear in readers.items():
        sharing = [readers[other].weight.abs().amax(0) for other in sharing_scale(name, formats)]
        found = _as_stored(linear.weight, formats[name].weights, sharing)
        torch.testing.assert_close(found, getattr(stored, name).weight, rtol=0, atol=0)


def test_the_search_leaves_excluded_linears_alone() -> None:
    graph = fused_graph()
    recipe = read_quantization("int8-smoothquant").model_copy(update={"exclude": ["blocks.1.*"]})
    assert {index for index, _, _ in search_strengths(graph, measured(graph), recipe, OTHERS)} == {0}


@pytest.mark.parametrize("ffn_bias", [False, True])
def test_schemes_against_quantized_graphs(ffn_bias: bool) -> None:
    graph = fused_graph(ffn_bias=ffn_bias)
    ranges = measured(graph)
    told: list[tuple[int, int]] = []
    found = compare_smoothing(graph, ranges, OTHERS, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, len(found)) for done in range(len(found) + 1)]
    cells = {(c.scheme, c.smoothing): c for c in found}
    assert cells.keys() == {(label, smoothing) for label, _, _ in SCHEMES for smoothing in SMOOTHINGS}
    bias = graph.flat_blocks[1].ffn.down_proj.bias  # what it adds is not in the error's denominator
    added = 0 if bias is None else bias.numpy().astype(np.float64)
    expected = ffn_output(graph, graph, 1) - added
    inner, outer = (1, "ffn", "down_proj"), (1, "ffn", "norm")
    cases: list[tuple[str, str, str, Strengths]] = [
        ("FP8, per tensor", "none", "fp8", {}),
        ("FP8, per tensor", "both inputs", "fp8", {inner: 0.65, outer: 0.65}),
        ("FP8, per row and token", "both inputs", "fp8-rowwise", {inner: 0.5, outer: 0.5}),
        ("INT8, static", "none", "int8-smoothquant", {}),
        ("INT8, static", "per channel", "int8-smoothquant", {inner: 0.65}),
        ("INT8, static", "both inputs", "int8-smoothquant", {inner: 0.65, outer: 0.65}),
        ("INT8, per token", "per channel", "int8-smoothquant-token", {inner: 0.5}),
    ]
    for scheme, smoothing, name, strengths in cases:
        smoothed, new = smooth_channels(graph, ranges, strengths)
        found = ffn_output(quantize_linears(smoothed, read_quantization(name), new), graph, 1) - added
        error = relative(found, expected)
        assert cells[scheme, smoothing].relative_error == pytest.approx(error, rel=1e-5), (scheme, smoothing)
    assert cells["INT8, static", "per segment"].relative_error < cells["INT8, static", "none"].relative_error


def test_blocks_are_run_up_to_the_last_wide_ffn(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[int] = []
    block = Reference.block

    def spy(reference: Reference, index: int) -> LoadedBlock:
        run.append(index)
        return block(reference, index)

    monkeypatch.setattr(Reference, "block", spy)
    for pattern, runs, expected in (("AF F F AF", [(1, 2)], [0, 1]), ("AF F", [], [])):
        graph = fuse_ffn(tiny_graph(pattern), runs)
        ranges = measured(graph)
        run.clear()
        compare_smoothing(graph, ranges, OTHERS)
        assert run == expected


def test_quantize_and_its_report() -> None:
    graph = fused_graph()
    calibration = calibrate(graph, CALIBRATION, text="random")
    found = quantize(graph, read_quantization("int8-smoothquant"), calibration=calibration, tokens=OTHERS)
    assert found.strengths
    files = error_files(found, graph, OTHERS, source="random")
    described = json.loads(files["errors.json"])
    assert {row["name"] for row in described["linears"]} == linear_names(graph).keys() - {"lm_head"}
    assert len(described["smoothing"]) == len(SCHEMES) * len(SMOOTHINGS)
    assert described["alpha"]["blocks.1.ffn.down_proj"] == found.strengths[1, "ffn", "down_proj"]
    assert files["errors.csv"].count(b"\n") == 1 + len(described["linears"])
    assert b"| INT8, static |" in files["errors.md"]
    assert files["errors.png"].startswith(b"\x89PNG")


def filled(graph: ModelGraph, index: int, sublayer: str, linear: str, value: float) -> ModelGraph:
    """The graph with one value all over the weight of one linear."""
    block = graph.flat_blocks[index]
    part = getattr(block, sublayer)
    weight = full(getattr(part, linear).weight.shape, value, FLOAT32)
    changed = replace(block, **{sublayer: replace(part, **{linear: replace(getattr(part, linear), weight=weight)})})
    return replace(graph, blocks=(*graph.blocks[:index], changed, *graph.blocks[index + 1 :]))


def test_zeros_in_a_model() -> None:
    """A value projection, and one layer of a wide FFN, that were pruned by setting them to zero."""
    layers = filled(filled(tiny_graph("AF F F"), 0, "attention", "v_proj", 0), 1, "ffn", "up_proj", 0)
    graph = fuse_ffn(layers, [(1, 2)])
    calibration = calibrate(graph, CALIBRATION, text="random")
    recipe = read_quantization("fp8")
    with pytest.raises(CalibrationError, match=r"block 0: .*attention\.o_proj is zero.*exclude"):
        quantize(graph, recipe, calibration=calibration)
    wanted = recipe_with(recipe, kv_cache="fp8", exclude=["blocks.0.attention.o_proj"])
    found = quantize(graph, wanted, calibration=calibration)
    described = json.loads(error_files(found, graph, OTHERS, source="random")["errors.json"])
    assert {row["name"] for row in described["linears"] if row["sqnr_db"] is None} == {"blocks.0.attention.v_proj"}
    cells = {(cell["scheme"], cell["smoothing"]): cell["relative_error"] for cell in described["smoothing"]}
    assert cells["FP8, per tensor", "per segment"] == pytest.approx(cells["FP8, per tensor", "none"], rel=0.2)


def test_what_is_excluded_is_not_smoothed_either() -> None:
    graph = fused_graph()
    recipe = recipe_with(read_quantization("int8-smoothquant"), exclude=["blocks.1.*"])
    fixed = recipe.model_copy(update={"smoothing": Smoothing(alpha=0.5)})
    found = quantize(graph, fixed, calibration=calibrate(graph, CALIBRATION, text="random"))
    assert {index for index, _, _ in found.strengths} == {0}
    assert all(a is b for a, b in zip(weights(found.graph.blocks[1]), weights(graph.blocks[1]), strict=True))


@pytest.mark.parametrize(("count", "kept", "aside"), [(1, 1, 1), (3, 3, 3), (4, 3, 1), (8, 6, 2), (100, 96, 4)])
def test_split_windows(count: int, kept: int, aside: int) -> None:
    windows = np.arange(count)[:, None]
    found, apart = split_windows(windows)
    assert (len(found), len(apart)) == (kept, aside)
    assert count < 4 or not set(found[:, 0]) & set(apart[:, 0])
