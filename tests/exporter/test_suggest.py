"""Suggestions as a whole: greedy drops against a search by hand, and wishes that no measurement could fulfil."""

from __future__ import annotations

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


def test_greedy_drops_are_those_of_a_search_by_hand() -> None:
    whole = graph = tiny_graph("AF AF F AF AF")
    ids, left, expected = torch.from_numpy(TOKENS), [0, 1, 3, 4], []

    def loss(before: ModelGraph, layer: int) -> float:
        ends = [Reference(one).hidden_states(ids, None) for one in (before, drop_attention(before, [layer]))]
        return (1 - F.cosine_similarity(*ends, dim=-1)).mean().item()

    while len(expected) < 3:
        best = min(left, key=lambda layer: loss(graph, layer))
        left.remove(best)
        expected.append(best)
        graph = drop_attention(graph, [best])
    wishes = Wishes(drop=3, greedy=True)
    found = suggest(whole, measure_dependency(whole, TOKENS), wishes, tokens=TOKENS)
    assert [drop.layer for drop in found.drops] == expected


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


def test_no_more_drops_than_attentions_that_were_measured() -> None:
    graph = tiny_graph("AF AF AF AF")
    with pytest.raises(PlanError, match="fewer attentions were measured: expected at most 2 drops, found 3"):
        suggest(graph, measure_dependency(graph, TOKENS, blocks=(1, 2)), Wishes(drop=3))
