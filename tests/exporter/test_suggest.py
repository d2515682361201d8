"""Suggestions as a whole: greedy drops against a search by hand, and wishes that no measurement could fulfil."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from exporter import suggest as module
from exporter.analysis.dependency import Dependency, measure_dependency
from exporter.errors import PlanError
from exporter.graph import ModelGraph
from exporter.passes.drop_attention import drop_attention
from exporter.passes.parallelize_blocks import parallelize_blocks
from exporter.reference import Reference
from exporter.suggest import Wishes, check_wishes, suggest
from tests.tiny import tiny_graph

TOKENS = np.random.default_rng(3).integers(0, 320, (2, 10))


def cosine_distance(one: ModelGraph, other: ModelGraph) -> float:
    ends = [Reference(graph).hidden_states(torch.from_numpy(TOKENS), None) for graph in (one, other)]
    return (1 - F.cosine_similarity(*ends, dim=-1)).mean().item()


def kl_divergence(one: ModelGraph, other: ModelGraph) -> float:
    p, q = (F.log_softmax(Reference(graph).logits(torch.from_numpy(TOKENS)), dim=-1) for graph in (one, other))
    return F.kl_div(q, p, log_target=True, reduction="sum").item()


@pytest.mark.parametrize(
    ("loss", "kl", "blocks", "left"),
    [
        pytest.param(cosine_distance, False, None, [0, 1, 3, 4, 5, 6, 7], id="last hidden state"),
        pytest.param(kl_divergence, True, None, [0, 1, 3, 4, 5, 6, 7], id="logits"),
        pytest.param(cosine_distance, False, (1, 5), [1, 3, 4, 5], id="of a range"),
    ],
)
def test_greedy_drops_are_those_of_a_search_by_hand(
    loss: Callable[[ModelGraph, ModelGraph], float], kl: bool, blocks: tuple[int, int] | None, left: list[int]
) -> None:
    whole = graph = tiny_graph("AF AF F AF AF AF AF AF")
    left, expected = [*left], []

    while len(expected) < 3:
        best = min(left, key=lambda layer: loss(graph, drop_attention(graph, [layer])))
        left.remove(best)
        expected.append(best)
        graph = drop_attention(graph, [best])
    wishes = Wishes(drop=3, greedy=True)
    found = suggest(whole, measure_dependency(whole, TOKENS, kl=kl, blocks=blocks), wishes, tokens=TOKENS)
    assert [drop.layer for drop in found.drops] == expected
    assert {drop.measure for drop in found.drops} == {"kl" if kl else "cosine"}


def test_greedy_drops_are_measured_where_and_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph("AF AF AF")
    dependency = measure_dependency(graph, TOKENS)
    asked = []

    def spy(*args: Any, device: str, budget_bytes: int, **kwargs: Any) -> Dependency:
        asked.append((device, budget_bytes))
        return measure_dependency(*args, **kwargs)

    monkeypatch.setattr(module, "measure_dependency", spy)
    suggest(graph, dependency, Wishes(drop=2, greedy=True), tokens=TOKENS, device="cuda", budget_bytes=5)
    assert asked == [("cuda", 5)] * 2


def test_greedy_drops_end_where_every_one_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph("AF AF AF")
    dependency = measure_dependency(graph, TOKENS)

    def spy(left: ModelGraph, *args: Any, **kwargs: Any) -> Dependency:
        measured = measure_dependency(left, *args, **kwargs)
        if len(left.attentions) < 3:  # as it is where a variant's output is infinite
            measured.importance["attention"][:] = np.nan
        return measured

    monkeypatch.setattr(module, "measure_dependency", spy)
    with pytest.raises(PlanError, match=r"NaN or infinite: expected 2 drops, found 1\. Ask for fewer"):
        suggest(graph, dependency, Wishes(drop=2, greedy=True), tokens=TOKENS)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(
    ("graph", "count"),
    [
        pytest.param(tiny_graph("AF F LF AF"), 3, id="linears_count"),
        pytest.param(parallelize_blocks(tiny_graph("AF AF AF"), [(0, 1)]), 1, id="parallel_groups_do_not"),
    ],
)
def test_no_more_drops_than_attentions(graph: ModelGraph, count: int, greedy: bool) -> None:
    check_wishes(graph, Wishes(drop=count, greedy=greedy))
    wishes = Wishes(drop=count + 1, greedy=greedy)
    with pytest.raises(PlanError, match=rf"fewer attentions to drop: expected at most {count}, found {count + 1}"):
        suggest(graph, measure_dependency(graph, TOKENS), wishes, tokens=TOKENS)


@pytest.mark.parametrize("greedy", [False, True])
def test_no_more_drops_than_attentions_that_were_measured(greedy: bool) -> None:
    graph = tiny_graph("AF AF AF AF")
    check_wishes(graph, Wishes(drop=2), blocks=(1, 2))
    with pytest.raises(PlanError, match="the layers to measure have fewer attentions to drop: expected at most 2"):
        check_wishes(graph, Wishes(drop=3), blocks=(1, 2))
    with pytest.raises(PlanError, match="fewer attentions were measured: expected at most 2 drops, found 3"):
        suggest(graph, measure_dependency(graph, TOKENS, blocks=(1, 2)), Wishes(drop=3, greedy=greedy), tokens=TOKENS)
