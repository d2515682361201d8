"""Smoothing leaves what a model computes, and evens out what is quantized; the factors against numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from exporter.calibration import calibrate, ranges_of
from exporter.errors import PlanError
from exporter.graph import FFN, Attention, ModelGraph
from exporter.lazy import array
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.passes.quantize_linears import quantize_linears
from exporter.passes.smooth_channels import smooth_channels, smoothable_sites, smoothing_factors
from exporter.quantization import read_quantization
from exporter.reference import Reference
from tests.tiny import tiny_graph

TOKENS = np.random.default_rng(1).integers(0, 320, (3, 24))


def logits(graph: ModelGraph, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return Reference(graph, dtype=dtype).logits(torch.from_numpy(TOKENS))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("norm", ["fold", "last"])
def test_the_model_stays_the_same(alpha: float, norm: str) -> None:
    graph = tiny_graph("AF F F (AF AF) LF AL -", qkv_bias=True, ffn_bias=True, dtype="float64")
    graph = fuse_ffn(graph, [(1, 2)], norm=norm)  # type: ignore[arg-type]
    ranges = ranges_of(calibrate(graph, TOKENS, text="random"), graph)
    sites = smoothable_sites(graph)
    assert len(sites) == 16
    smoothed, _ = smooth_channels(graph, ranges, dict.fromkeys(sites, alpha))
    # The factors are float32, and what divides is not exactly the inverse of what multiplies.
    assert (logits(smoothed) - logits(graph)).abs().max() < 2e-5


def test_factors_and_ranges() -> None:
    graph = tiny_graph("AF", seed=3)
    ranges = ranges_of(calibrate(graph, TOKENS, text="random"), graph)
    strengths = {(0, "ffn", "down_proj"): 0.65, (0, "ffn", "norm"): 0.5, (0, "attention", "norm"): 0.5}
    smoothed, new_ranges = smooth_channels(graph, ranges, strengths)
    old, new = graph.flat_blocks[0].ffn, smoothed.flat_blocks[0].ffn
    assert isinstance(old, FFN)
    assert isinstance(new, FFN)
    inner = ranges[0].ffn["down_proj"].numpy()
    s = inner**0.65 / np.abs(old.down_proj.weight.numpy()).max(axis=0) ** 0.35
    np.testing.assert_allclose(new.down_proj.weight.numpy(), old.down_proj.weight.numpy() * s, rtol=1e-6)
    np.testing.assert_allclose(new_ranges[0].ffn["down_proj"].numpy(), inner / s, rtol=1e-6)
    outer = ranges[0].ffn["norm"].numpy() * np.abs(old.norm.weight.numpy())
    columns = np.abs(np.concatenate([old.gate_proj.weight.numpy(), old.up_proj.weight.numpy()])).max(axis=0)
    t = (outer / columns) ** 0.5
    np.testing.assert_allclose(new.norm.weight.numpy(), old.norm.weight.numpy() / t, rtol=1e-6)
    np.testing.assert_allclose(new.gate_proj.weight.numpy(), old.gate_proj.weight.numpy() * t, rtol=1e-5)
    np.testing.assert_allclose(new.up_proj.weight.numpy(), old.up_proj.weight.numpy() * t / s[:, None], rtol=1e-5)
    before, after = graph.flat_blocks[0].attention, smoothed.flat_blocks[0].attention
    assert isinstance(before, Attention)
    assert isinstance(after, Attention)
    outer = ranges[0].attention["norm"].numpy() * np.abs(before.norm.weight.numpy())
    readers = [before.q_proj.weight.numpy(), before.k_proj.weight.numpy(), before.v_proj.weight.numpy()]
    r = (outer / np.abs(np.concatenate(readers)).max(axis=0)) ** 0.5
    np.testing.assert_allclose(after.norm.weight.numpy(), before.norm.weight.numpy() / r, rtol=1e-6)
    for linear, weight in zip((after.q_proj, after.k_proj, after.v_proj), readers, strict=True):
        np.testing.assert_allclose(linear.weight.numpy(), weight * r, rtol=1e-5)
    assert after.o_proj is before.o_proj
    # A second calibration finds the ranges that were derived.
    measured = ranges_of(calibrate(smoothed, TOKENS, text="random"), smoothed)
    np.testing.assert_allclose(measured[0].ffn["down_proj"].numpy(), inner / s, rtol=1e-4)


def test_bfloat16_norms_divide_exactly() -> None:
    """A rounded norm weight is made up for in the columns, so only the rounding of weights is left."""
    graph = tiny_graph("AF AF", dtype="bfloat16")
    ranges = ranges_of(calibrate(graph, TOKENS, text="random"), graph)
    smoothed, _ = smooth_channels(graph, ranges, dict.fromkeys(smoothable_sites(graph), 0.5))
    difference = (logits(smoothed) - logits(graph)).norm() / logits(graph).norm()
    assert difference < 2 * 2**-8


def test_dead_channels_keep_their_scale() -> None:
    graph = fuse_ffn(tiny_graph("AF F F", intermediate_size=100), [(1, 2)])
    ffn = graph.flat_blocks[1].ffn
    assert isinstance(ffn, FFN)
    assert ffn.padding == 56
    ranges = ranges_of(calibrate(graph, TOKENS, text="random"), graph)
    smoothed, _ = smooth_channels(graph, ranges, {(1, "ffn", "down_proj"): 0.5})
    new = smoothed.flat_blocks[1].ffn
    assert isinstance(new, FFN)
    assert not new.up_proj.weight.numpy()[200:].any()
    assert np.isfinite(new.down_proj.weight.numpy()).all()


def test_factors_of_dead_and_extreme_channels() -> None:
    inputs, columns = np.array([[4, 0, 4, 0, 1e9, 1e-9], [4, 9, 0, 0, 1e-9, 1e9]], np.float32)
    np.testing.assert_allclose(smoothing_factors(inputs, columns, 0.5), [1, 1, 1, 1, 1e4, 1e-4])
    np.testing.assert_allclose(smoothing_factors(inputs, columns, 0.75), [2, 1, 1, 1, 1e4, 1e-4])


def test_a_norm_weight_stays_within_its_dtype() -> None:
    """Over the factor 1/16 or 64, the first two channels' weights would be infinity and zero in float16."""
    graph = tiny_graph("F", dtype="float16")
    ffn = graph.flat_blocks[0].ffn
    assert isinstance(ffn, FFN)
    weight = np.full(64, 0.5, np.float16)
    weight[:2] = 60000, 1e-7
    columns = np.full((256, 64), 1 / 4, np.float16)
    columns[:, :2] = 16, 1 / 64
    reader = replace(ffn.gate_proj, weight=array(columns))
    ffn = replace(ffn, norm=replace(ffn.norm, weight=array(weight)), gate_proj=reader, up_proj=reader)
    graph = replace(graph, blocks=(replace(graph.flat_blocks[0], ffn=ffn),))
    ranges = ranges_of(calibrate(graph, TOKENS, text="random"), graph)
    smoothed, _ = smooth_channels(graph, ranges, {(0, "ffn", "norm"): 0.0})  # s = 1 / amax_w
    new = smoothed.flat_blocks[0].ffn
    assert isinstance(new, FFN)
    assert new.norm.weight.numpy().tolist() == [*weight[:2].tolist(), *[0.125] * 62]
    np.testing.assert_array_equal(new.gate_proj.weight.numpy()[:, :2], columns[:, :2])
    np.testing.assert_array_equal(new.up_proj.weight.numpy()[:, 2:], 1)


def uneven_group(spread: float, hidden: int = 256, width: int = 512) -> ModelGraph:
    """Four equal FFNs in a row whose inner ranges differ by `spread`: up rows times u, down columns over u."""
    rng = np.random.default_rng(0)
    graph = tiny_graph("A F F F F", hidden_size=hidden, intermediate_size=width, seed=5)
    uneven = np.exp(0.3 * rng.standard_normal(hidden)).astype(np.float32)
    uneven[rng.choice(hidden, hidden // 100, replace=False)] *= 8
    blocks = [graph.blocks[0]]
    for block, factor in zip(graph.flat_blocks[1:], np.geomspace(1, spread, 4), strict=True):
        ffn = block.ffn
        assert isinstance(ffn, FFN)
        norm = replace(ffn.norm, weight=array(uneven))
        rows = np.exp(0.3 * rng.standard_normal((width, 1))).astype(np.float32)
        up = replace(ffn.up_proj, weight=array((ffn.up_proj.weight.numpy() * rows * factor).astype(np.float32)))
        down = replace(ffn.down_proj, weight=array((ffn.down_proj.weight.numpy() / factor).astype(np.float32)))
        blocks.append(replace(block, ffn=replace(ffn, norm=norm, up_proj=up, down_proj=down)))
    # The norms go into gate and up, so the fused input is even; one that stays uneven is what models have.
    return fuse_ffn(replace(graph, blocks=tuple(blocks)), [(1, 4)], norm="last")


@pytest.mark.parametrize(
    ("name", "alpha", "limit"),
    [("int8-smoothquant", 0.65, 0.08), ("int8-smoothquant-token", 0.5, 0.04)],
)
def test_uneven_layers_in_one_wide_ffn(name: str, alpha: float, limit: float) -> None:
    graph = uneven_group(8.0)
    calibration, other = np.random.default_rng(2).integers(0, 320, (2, 8, 128))
    ranges = ranges_of(calibrate(graph, calibration, text="random"), graph)
    smoothed, new_ranges = smooth_channels(
        graph, ranges, {site: alpha for site in smoothable_sites(graph) if site[1] == "ffn"}
    )

    def error(quantized: ModelGraph) -> float:
        """Relative L2 error of what the wide FFN adds, the input being that of the plain model."""
        tokens = torch.from_numpy(other)
        plain = Reference(graph)
        *_, x, _ = plain.residuals(tokens, None)
        span = plain.span(tokens.shape, None)
        _, expected = plain.block(1).contributions(x, span)
        _, found = Reference(quantized).block(1).contributions(x, span)
        return float((found - expected).norm() / expected.norm())

    recipe = read_quantization(name)
    plain_error = error(quantize_linears(graph, recipe, ranges))
    smooth_error = error(quantize_linears(smoothed, recipe, new_ranges))
    assert smooth_error <= limit
    assert smooth_error < plain_error / 2


def test_refused() -> None:
    graph = tiny_graph("AF L -")
    ranges = ranges_of(calibrate(graph, TOKENS, text="random"), graph)
    for site in [(0, "attention", "o_proj"), (1, "ffn", "norm"), (2, "attention", "norm")]:
        with pytest.raises(PlanError, match="cannot be smoothed"):
            smooth_channels(graph, ranges, {site: 0.5})
    quantized = quantize_linears(graph, read_quantization("int8-weight-only"))
    with pytest.raises(PlanError, match="Smooth first"):
        smooth_channels(quantized, ranges, {(0, "ffn", "norm"): 0.5})
