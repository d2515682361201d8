"""Fusion against equation 5 evaluated directly, and every rule that a run can break."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from exporter.dtypes import FLOAT16
from exporter.errors import PlanError
from exporter.graph import FFN, Activation, Block, Linear, ModelGraph
from exporter.lazy import cast
from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.reference import Reference
from tests.tiny import tiny_graph

ACTIVATIONS = {
    Activation.SILU: lambda x: x / (1 + np.exp(-x)),
    Activation.RELU: lambda x: np.maximum(x, 0),
}


def ffns_of(graph: ModelGraph) -> list[FFN]:
    return [block.ffn for block in graph.flat_blocks if isinstance(block.ffn, FFN)]


def equation_5(x: np.ndarray, ffns: list[FFN], norm_of_last: bool = False) -> np.ndarray:
    """sum_i FFN_i(n_i(x)) in NumPy, float64: x [S, D] -> [S, D]."""
    total = np.zeros_like(x)
    for ffn in ffns:
        source = ffns[-1].norm if norm_of_last else ffn.norm
        normed = source.weight.numpy().astype(np.float64) * x
        normed /= np.sqrt((x**2).mean(-1, keepdims=True) + source.eps)

        def affine(linear, values):
            bias = 0 if linear.bias is None else linear.bias.numpy().astype(np.float64)
            return values @ linear.weight.numpy().astype(np.float64).T + bias

        gate = ACTIVATIONS[ffn.activation](affine(ffn.gate_proj, normed))
        total += affine(ffn.down_proj, gate * affine(ffn.up_proj, normed))
    return total


def fused_output(graph: ModelGraph, x: np.ndarray) -> np.ndarray:
    """What the only block of a graph adds to x, through the reference in float64."""
    reference = Reference(graph, dtype=torch.float64)
    span = reference.span((1, len(x)), None)
    return (reference.block(0)(torch.from_numpy(x)[None], span)[0] - torch.from_numpy(x)).numpy()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def biases_in_one() -> ModelGraph:
    plain, biased = (
        tiny_graph("F F F", dtype="float64", intermediate_size=[100, 37, 211], ffn_bias=bias) for bias in (False, True)
    )
    return replace(plain, blocks=(plain.blocks[0], biased.blocks[1], plain.blocks[2]))


@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(tiny_graph("F F F", dtype="float64"), id="equal_widths"),
        pytest.param(tiny_graph("F F F", dtype="float64", intermediate_size=[256, 64, 192]), id="different_widths"),
        pytest.param(tiny_graph("F F F", dtype="float64", intermediate_size=[100, 37, 211]), id="padded"),
        pytest.param(
            tiny_graph("F F F", dtype="float64", intermediate_size=[100, 37, 211], ffn_bias=True), id="biases"
        ),
        pytest.param(biases_in_one(), id="biases_in_one"),
        pytest.param(tiny_graph("F F F", dtype="float64", activation=Activation.RELU), id="relu"),
    ],
)
def test_fused_equals_equation_5_in_float64(graph: ModelGraph, norm: str) -> None:
    fused = fuse_ffn(graph, [(0, 2)], norm=norm)
    x = np.random.default_rng(0).standard_normal((7, 64))
    error = relative_error(fused_output(fused, x), equation_5(x, ffns_of(graph), norm_of_last=norm == "last"))
    assert error <= 1e-12


def test_folding_in_bfloat16_costs_no_more_than_bfloat16_weights_do() -> None:
    exact = tiny_graph("F F F F", dtype="float32", hidden_size=128, intermediate_size=512)
    rounded = tiny_graph("F F F F", dtype="bfloat16", hidden_size=128, intermediate_size=512)
    x = np.random.default_rng(0).standard_normal((32, 128))
    truth = equation_5(x, ffns_of(exact))
    rounding = relative_error(equation_5(x, ffns_of(rounded)), truth)  # of the checkpoint itself
    folding = relative_error(fused_output(fuse_ffn(rounded, [(0, 3)]), x), truth)
    assert rounding > 1e-4
    assert folding <= 2 * rounding


def test_structure_of_a_fused_graph() -> None:
    graph = fuse_ffn(tiny_graph("AF F F - F AF", intermediate_size=[128, 100, 200]), [(1, 4)])
    assert [entry.source_layers for entry in graph.blocks] == [(0,), (1, 2, 3, 4), (5,)]
    block = graph.blocks[1]
    assert isinstance(block, Block)
    assert isinstance(block.ffn, FFN)
    assert [(s.source_layer, s.width) for s in block.ffn.segments] == [(1, 100), (2, 200), (4, 128)]
    assert (block.ffn.intermediate_size, block.ffn.padding) == (512, 84)
    assert graph.sequential_sublayers == 5


def test_several_runs_and_a_second_fusion_of_fused_blocks() -> None:
    graph = tiny_graph("F F AF F F F F", dtype="float64", intermediate_size=[100, 60], ffn_bias=True)
    in_two_steps = fuse_ffn(fuse_ffn(graph, [(5, 6), (3, 4), (0, 1)]), [(3, 6)])
    at_once = fuse_ffn(graph, [(0, 1), (3, 6)])
    assert [entry.source_layers for entry in in_two_steps.blocks] == [(0, 1), (2,), (3, 4, 5, 6)]
    for found, expected in zip(ffns_of(in_two_steps), ffns_of(at_once), strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):  # the first fusion's padding is not between the segments
            np.testing.assert_array_equal(getattr(found, name).weight.numpy(), getattr(expected, name).weight.numpy())
        np.testing.assert_array_equal(found.gate_proj.bias.numpy(), expected.gate_proj.bias.numpy())
    tokens = torch.arange(9)[None]
    both = [Reference(g, dtype=torch.float64).logits(tokens) for g in (in_two_steps, at_once)]
    torch.testing.assert_close(*both, atol=1e-12, rtol=0)


def mixed(activation: Activation | None = None, eps: float | None = None, in_float16: str | None = None) -> ModelGraph:
    """Two FFNs that differ in one respect."""
    graph = tiny_graph("F F")
    first, second = graph.flat_blocks
    assert isinstance(second.ffn, FFN)
    norm = replace(second.ffn.norm, eps=eps or second.ffn.norm.eps)
    ffn = replace(second.ffn, norm=norm, activation=activation or second.ffn.activation)
    if in_float16 is not None:
        ffn = replace(ffn, **{in_float16: Linear(weight=cast(getattr(ffn, in_float16).weight, FLOAT16))})
    return replace(graph, blocks=(first, replace(second, ffn=ffn)))


def reordered(pattern: str, *order: int) -> ModelGraph:
    """A graph with its blocks in another order than their source layers, as a folder's config may give them."""
    graph = tiny_graph(pattern)
    return replace(graph, blocks=tuple(graph.blocks[index] for index in order))


@pytest.mark.parametrize(
    ("graph", "runs", "message"),
    [
        pytest.param(tiny_graph("AF F AF F"), [(1, 3)], "contains an attention, in layer 2", id="attention"),
        pytest.param(tiny_graph("F F F"), [(0, 1), (1, 2)], r"overlap: found \[0, 1\] and \[1, 2\]", id="overlap"),
        pytest.param(tiny_graph("F F"), [(1, 0)], "from its lower to its higher", id="reversed"),
        pytest.param(tiny_graph("F F"), [(0, 5)], "layer 5 is not in the model", id="out_of_range"),
        pytest.param(tiny_graph("AF F AF"), [(1, 1)], "at least two FFNs", id="run_of_one"),
        pytest.param(tiny_graph("F - -"), [(0, 2)], "at least two FFNs", id="empty_blocks_only"),
        pytest.param(tiny_graph("(F F) F"), [(0, 2)], "parallel group already", id="parallel"),
        pytest.param(drop_attention(tiny_graph("F AL F"), [1]), [(0, 2)], "block 1: .*layer in place", id="linear"),
        pytest.param(
            mixed(activation=Activation.GELU), [(0, 1)], "activations: found .*'silu', 'gelu'", id="activations"
        ),
        pytest.param(mixed(eps=1e-6), [(0, 1)], "different values of rms_norm_eps: .*1e-05, 1e-06", id="eps"),
        pytest.param(mixed(in_float16="gate_proj"), [(0, 1)], "gate_proj: found .*'float32', 'flo", id="gate_dtypes"),
        pytest.param(mixed(in_float16="down_proj"), [(0, 1)], "different dtypes of down_proj", id="down_dtypes"),
        pytest.param(fuse_ffn(tiny_graph("F F F F"), [(1, 2)]), [(2, 3)], "cuts through a block", id="cut"),
        pytest.param(reordered("F F F", 1, 0, 2), [(0, 1)], "not in the order .*: found 0 after 1", id="order"),
        pytest.param(reordered("F F F", 1, 0, 2), [(0, 2)], "not in the order .*: found 0 after 1", id="order_around"),
    ],
)
def test_a_run_that_breaks_a_rule_is_refused(graph: ModelGraph, runs: list, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fuse_ffn(graph, runs)


@pytest.mark.parametrize("first", ["fold", "last"])
@pytest.mark.parametrize("run", [(0, 1), (1, 2)])
def test_one_norm_for_all_is_not_put_on_top_of_folded_norms(first: str, run: tuple[int, int]) -> None:
    fused = fuse_ffn(tiny_graph("F F F"), [run], norm=first)
    with pytest.raises(PlanError, match=rf"fused already.*found layers \[\[{run[0]}, {run[1]}\]\]"):
        fuse_ffn(fused, [(0, 2)], norm="last")
