"""Dropping sublayers and running blocks side by side, against transformers-free brute force and their rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from exporter.errors import PlanError
from exporter.graph import FFN, Attention, ModelGraph
from exporter.lazy import full
from exporter.passes.drop_attention import drop_attention
from exporter.passes.drop_ffn import drop_ffn
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.passes.parallelize_blocks import parallelize_blocks
from exporter.pipeline import apply_plan
from exporter.plan import Plan
from exporter.reference import Reference
from exporter.writers.hf import as_written
from tests.tiny import tiny_graph

TOKENS = torch.arange(11)[None]
SWAPPED = replace(tiny_graph("AF AF"), blocks=tiny_graph("AF AF").blocks[::-1])  # a folder's config may say so


def logits(graph: ModelGraph) -> torch.Tensor:
    return Reference(graph, dtype=torch.float64).logits(TOKENS)


def test_a_dropped_attention_is_one_whose_output_is_zero() -> None:
    graph = tiny_graph("AF AF LF AF")
    silenced = list(graph.blocks)
    for index in (1, 2):
        attention = silenced[index].attention
        last = "o_proj" if isinstance(attention, Attention) else "linear"
        linear = getattr(attention, last)
        zero = replace(linear, weight=full(linear.weight.shape, 0.0, linear.weight.dtype))
        silenced[index] = replace(silenced[index], attention=replace(attention, **{last: zero}))
    dropped = drop_attention(graph, [1, 2])
    assert torch.equal(logits(dropped), logits(replace(graph, blocks=tuple(silenced))))
    assert not torch.allclose(logits(dropped), logits(graph))
    assert dropped.kv_slots == {0: 0, 3: 1}
    assert dropped.sequential_sublayers == 6


def test_a_dropped_ffn_is_one_whose_output_is_zero() -> None:
    graph = tiny_graph("AF AF F AL AF")
    silenced = list(graph.blocks)
    for index in (1, 2, 3):
        ffn = silenced[index].ffn
        last = "down_proj" if isinstance(ffn, FFN) else "linear"
        linear = getattr(ffn, last)
        zero = replace(linear, weight=full(linear.weight.shape, 0.0, linear.weight.dtype))
        silenced[index] = replace(silenced[index], ffn=replace(ffn, **{last: zero}))
    dropped = drop_ffn(graph, [3, 1, 2])
    assert torch.equal(logits(dropped), logits(replace(graph, blocks=tuple(silenced))))
    assert not torch.allclose(logits(dropped), logits(graph))
    assert [entry.is_empty for entry in dropped.blocks] == [False, False, True, False, False]
    assert [entry.source_layers for entry in dropped.blocks] == [(layer,) for layer in range(5)]
    assert dropped.sequential_sublayers == 6


def test_a_plan_drops_ffns_before_it_fuses() -> None:
    graph = tiny_graph("AF AF AF AF AF")
    plan = Plan(drop_attention=[(1, 3)], drop_ffn=[2], fuse=[(1, 3)])
    expected = fuse_ffn(drop_ffn(drop_attention(graph, [1, 2, 3]), [2]), [(1, 3)])
    found = apply_plan(graph, plan)
    assert torch.equal(logits(found), logits(expected))
    assert [entry.source_layers for entry in found.blocks] == [(0,), (1, 2, 3), (4,)]
    assert found.blocks[1].ffn.source_layers == (1, 3)


def test_a_group_sums_what_its_blocks_add_to_the_same_input() -> None:
    graph = tiny_graph("AF AF F AF")
    grouped = parallelize_blocks(graph, [(1, 2)])
    reference = Reference(graph, dtype=torch.float64)
    span = reference.span(TOKENS.shape, None)
    x = reference.block(0)(reference.embed(TOKENS), span)
    y = x + sum(reference.block(index)(x, span) - x for index in (1, 2))
    expected = reference.head(reference.block(3)(y, span))
    torch.testing.assert_close(logits(grouped), expected, atol=1e-12, rtol=0)
    assert grouped.sequential_sublayers == 6
    assert grouped.kv_slots == {0: 0, 1: 1, 3: 2}


@pytest.mark.parametrize(
    ("graph", "layers", "message"),
    [
        pytest.param(tiny_graph("AF F"), [1], "layer 1 has no attention", id="none_to_drop"),
        pytest.param(tiny_graph("AF AF"), [2], "layer 2 is not in the model: expected a layer from 0 to 1", id="range"),
        pytest.param(as_written(tiny_graph("AF - AF")), [1], "not in the model.*Nothing was left of it", id="gap"),
        pytest.param(tiny_graph("AF AF"), [1, 1], "listed twice", id="twice"),
        pytest.param(tiny_graph("(AF AF) AF"), [1], "parallel group already", id="parallel"),
        pytest.param(fuse_ffn(tiny_graph("AF F F"), [(1, 2)]), [1], "has no attention", id="fused"),
    ],
)
def test_a_drop_that_breaks_a_rule_is_refused(graph: ModelGraph, layers: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        drop_attention(graph, layers)


@pytest.mark.parametrize(
    ("graph", "layers", "message"),
    [
        pytest.param(tiny_graph("AF A"), [1], "layer 1 has no FFN", id="none_to_drop"),
        pytest.param(tiny_graph("AF AF"), [2], "layer 2 is not in the model: expected a layer from 0 to 1", id="range"),
        pytest.param(tiny_graph("AF AF"), [1, 1], "listed twice", id="twice"),
        pytest.param(tiny_graph("(AF AF) AF"), [1], "parallel group already", id="parallel"),
        pytest.param(fuse_ffn(tiny_graph("AF F F"), [(1, 2)]), [1], "layer 1 is part of a fused block", id="fused"),
    ],
)
def test_an_ffn_drop_that_breaks_a_rule_is_refused(graph: ModelGraph, layers: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        drop_ffn(graph, layers)


@pytest.mark.parametrize(
    ("graph", "groups", "message"),
    [
        pytest.param(tiny_graph("AF AF AF"), [(0, 1), (1, 2)], "parallel groups overlap", id="overlap"),
        pytest.param(tiny_graph("AF - AF"), [(0, 1)], "at least two blocks that do something", id="empty"),
        pytest.param(tiny_graph("(AF AF) AF"), [(0, 2)], "parallel group already", id="nested"),
        pytest.param(tiny_graph("AF AF"), [(0, 2)], "layer 2 is not in the model", id="range"),
        pytest.param(SWAPPED, [(0, 1)], "not in the order of their source layers: found 0 after 1", id="order"),
    ],
)
def test_a_group_that_breaks_a_rule_is_refused(graph: ModelGraph, groups: list, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parallelize_blocks(graph, groups)
