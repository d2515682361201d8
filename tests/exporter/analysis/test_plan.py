"""The planner: tables of runs, brute force over every split, the paper's model, and plans that read back."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.analysis.dependency import Dependency, measure_dependency
from exporter.analysis.plan import (
    Constraints,
    Drop,
    Group,
    Measured,
    Piece,
    split_run,
    suggest_drops,
    suggest_fusion,
    suggest_parallel,
)
from exporter.analysis.plan_text import plan_text, suggested_plan
from exporter.errors import PlanError
from exporter.graph import FFN, Activation, Block, ModelGraph
from exporter.passes.drop_attention import drop_attention
from exporter.pipeline import apply_plan
from exporter.plan import Plan, read_plan
from exporter.read import graph_from_config
from tests.tiny import quantized_graph, tiny_graph

ULTRA = Path(__file__).parents[2] / "data" / "nemotron-ultra-253b.structure.json"
SOURCE = "made up for a test"
nan = math.nan


@dataclass
class Numbers:
    """A measurement with chosen numbers."""

    source_layers: list[list[int]]
    first: int
    last: int
    matrices: dict[Any, np.ndarray] = field(default_factory=dict)
    importance: dict[Any, np.ndarray] = field(default_factory=dict)
    kl: dict[Any, np.ndarray] = field(default_factory=dict)


def small(pattern: str, widths: int | Sequence[int] = 256, **changes: Any) -> ModelGraph:
    return tiny_graph(
        pattern,
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=widths,
        vocab_size=16,
        **changes,
    )


def measured(graph: ModelGraph, matrix: np.ndarray | None = None, *, first: int = 0, **parts: Any) -> Numbers:
    layers = [list(entry.source_layers) for entry in graph.blocks]
    last = len(layers) - 1 if matrix is None else first + len(matrix) - 1
    parts.setdefault("matrices", {} if matrix is None else {"ffn": matrix, "block": matrix})
    return Numbers(layers, first, last, **parts)


def pairs(size: int, entries: dict[tuple[int, int], float], other: float = 0.0) -> np.ndarray:
    """A matrix [size, size] from its entries i < j, NaN where a matrix has none."""
    matrix = np.full((size, size), nan)
    for i, j in combinations(range(size), 2):
        matrix[i, j] = entries.get((i, j), other)
    return matrix


def ranges(groups: Sequence[Any]) -> list[tuple[int, int]]:
    return [group.layers for group in groups]


# --- Fusion


@pytest.mark.parametrize(
    ("pattern", "constraints", "expected"),
    [
        pytest.param("AF F F F AF", {}, [(1, 2)], id="last-stays-alone"),
        pytest.param("AF F F F AF", {"keep_last": False}, [(1, 3)], id="last-is-taken"),
        pytest.param("F F", {}, [], id="a-pair-less-its-last"),
        pytest.param("F F", {"keep_last": False}, [(0, 1)], id="a-pair"),
        pytest.param("F - F F", {}, [(0, 2)], id="empty-block-inside"),
        pytest.param("- F F - F - AF", {}, [(1, 2)], id="empty-blocks-around"),
        pytest.param("F F F AF F F F F", {}, [(0, 1), (4, 6)], id="attention-ends-a-run"),
        pytest.param("F F F A F F F", {}, [(0, 1), (4, 5)], id="attention-alone-ends-a-run"),
        pytest.param("F F F LF F F F", {}, [(0, 1), (4, 5)], id="linear-for-attention-ends-a-run"),
        pytest.param("F F F AL F F F", {}, [(0, 1), (4, 5)], id="linear-for-ffn-ends-a-run"),
        pytest.param("F F F (F F) F F F", {}, [(0, 1), (5, 6)], id="parallel-blocks-end-a-run"),
        pytest.param("F F F F AF F F F", {"min_run": 4}, [(0, 2)], id="short-run"),
        pytest.param("F F F F F", {"max_width": 1024}, [(0, 3)], id="just-as-wide-as-allowed"),
        pytest.param("F F F F F", {"max_width": 1023}, [(0, 1), (2, 3)], id="even-where-savings-tie"),
        pytest.param("F F F F F F", {"max_width": 512}, [(0, 1), (2, 3)], id="odd-one-stays-alone"),
        pytest.param("F F F F F", {"max_width": 511}, [], id="no-pair-fits"),
        pytest.param("AF AF AF", {}, [], id="nothing-to-fuse"),
        pytest.param("", {}, [], id="no-blocks"),
    ],
)
def test_groups(pattern: str, constraints: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    graph = small(pattern)
    assert ranges(suggest_fusion(graph, None, Constraints(**constraints))) == expected


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"activation": Activation.RELU}, id="activation"),
        pytest.param({"eps": 1e-6}, id="eps"),
        pytest.param({"dtype": "float16"}, id="dtype"),
    ],
)
def test_different_ffns_end_a_run(change: dict[str, Any]) -> None:
    graph = small("F F F F F F")
    other = small("F F F F F F", **change)
    mixed = replace(graph, blocks=graph.blocks[:3] + other.blocks[3:])
    groups = suggest_fusion(mixed, None, Constraints(keep_last=False))
    assert ranges(groups) == [(0, 2), (3, 5)]
    apply_plan(mixed, suggested_plan(fuse=groups))


def test_quantized_ffns_are_in_no_run() -> None:
    graph = quantized_graph(tiny_graph("AF F F F"), "int8-weight-only")
    assert suggest_fusion(graph, None, Constraints(keep_last=False)) == []
    with pytest.raises(PlanError, match="a quantized FFN cannot be fused"):
        apply_plan(graph, Plan(fuse=[(1, 3)]))


def test_linear_in_place_of_an_ffn_ends_a_run_of_blocks_without_attention() -> None:
    graph = small("F F F AL F F F")
    block = graph.blocks[3]
    assert isinstance(block, Block)
    mixed = replace(graph, blocks=(*graph.blocks[:3], replace(block, attention=None), *graph.blocks[4:]))
    assert ranges(suggest_fusion(mixed, None, Constraints())) == [(0, 1), (4, 5)]


def test_what_a_group_says() -> None:
    """hidden_size 8, float32: one channel of gate, up and down is 3 * 8 * 4 bytes."""
    graph = small("AF F F F AF", widths=[256, 100, 300, 256, 256])
    [group] = suggest_fusion(graph, None, Constraints(max_dependency=0.25, tp_size=4))
    assert (group.width, group.padded_width, group.sublayers_saved) == (400, 512, 1)
    assert group.bytes_per_gpu == 512 // 4 * 3 * 8 * 4
    assert group.dependency is None
    for said in ("2 of the 3 FFNs of run [1, 3]", "layer 3, stays alone", "width 400, padded to 512", "not applied"):
        assert said in group.reason
    matrix = pairs(5, {(1, 2): 0.125}, other=1.0)
    [group] = suggest_fusion(graph, measured(graph, matrix), Constraints(max_dependency=0.25, keep_last=False))
    assert group.dependency == 0.125
    assert "largest pairwise dependency 0.125 (limit 0.25)" in group.reason
    assert "alone" not in group.reason


def test_bytes_are_what_the_fused_ffn_takes() -> None:
    graph = small("F F F", widths=[100, 300, 256], dtype="bfloat16")
    [group] = suggest_fusion(graph, None, Constraints(keep_last=False))
    ffn = apply_plan(graph, suggested_plan(fuse=[group])).flat_blocks[0].ffn
    assert isinstance(ffn, FFN)
    assert ffn.intermediate_size == group.padded_width
    parts = (ffn.gate_proj, ffn.up_proj, ffn.down_proj)
    assert group.bytes_per_gpu == sum(linear.weight.nbytes for linear in parts)


@pytest.mark.parametrize("slack", [0, -1])
def test_bytes_limit_is_inclusive_and_per_gpu(slack: int) -> None:
    """Three GPUs share 768 channels of 3 * 8 * 4 bytes."""
    constraints = Constraints(max_bytes_per_gpu=256 * 96 + slack, tp_size=3)
    assert ranges(suggest_fusion(small("F F F F"), None, constraints)) == ([(0, 1)] if slack else [(0, 2)])


def test_uneven_shards_are_rounded_up() -> None:
    [group] = suggest_fusion(small("F F F"), None, Constraints(tp_size=3))
    assert group.bytes_per_gpu == 171 * 96  # 512 / 3 = 170.67 channels


def test_padding_of_an_earlier_fusion_does_not_count() -> None:
    graph = apply_plan(small("F F F F", widths=[100, 300, 112, 256]), Plan(fuse=[(0, 1)]))
    first = graph.flat_blocks[0].ffn
    assert isinstance(first, FFN)
    assert first.intermediate_size == 512
    [group] = suggest_fusion(graph, None, Constraints())
    assert (group.layers, group.width, group.padded_width, group.sublayers_saved) == ((0, 2), 512, 512, 1)


def test_dependency_limits_and_decides() -> None:
    graph = small("F F F F F F")
    # Blocks 1 and 2 depend on each other: no group may hold both.
    numbers = measured(graph, pairs(6, {(1, 2): 0.5}, other=0.1))
    limited = suggest_fusion(graph, numbers, Constraints(max_dependency=0.3))
    assert ranges(limited) == [(0, 1), (2, 4)]
    # It takes any two blocks of a group, not only neighbours.
    numbers = measured(graph, pairs(6, {(0, 2): 0.5}, other=0.1))
    assert ranges(suggest_fusion(graph, numbers, Constraints(max_dependency=0.3))) == [(0, 1), (2, 4)]
    # Five FFNs in two groups: the cut is where the worst pair is, and would be after three without it.
    numbers = measured(graph, pairs(6, {(1, 2): 0.5}, other=0.1))
    assert ranges(suggest_fusion(graph, numbers, Constraints(max_width=768))) == [(0, 1), (2, 4)]
    assert ranges(suggest_fusion(graph, None, Constraints(max_width=768))) == [(0, 2), (3, 4)]


def test_squares_tell_which_groups_are_more_even() -> None:
    """Their sums are 205 and 209; those of cubes would be 2,069 and 2,027."""
    widths = [1, 4, 5, 1, 2, 5, 5]
    chosen = [Piece(0, 2, 5, 0.1), Piece(2, 4, 6, 0.1), Piece(4, 7, 12, 0.1)]
    others = [Piece(0, 3, 10, 0.1), Piece(3, 5, 3, 0.1), Piece(5, 7, 10, 0.1)]
    assert split_run(widths, others + chosen) == chosen


def test_a_bound_that_only_a_later_group_sets_leaves_the_earlier_ones_even() -> None:
    """The prefix with the smaller dependency is not part of the best whole: the last group's is larger anyway."""
    widths = [3, 1, 1, 5, 5]
    early, even, late = Piece(0, 2, 4, 0.1), Piece(1, 3, 2, 0.2), Piece(3, 5, 10, 0.5)
    assert split_run(widths, [early, even, late]) == [even, late]
    assert split_run(widths[:3], [early, even]) == [early]


def test_matrix_of_ffns_goes_before_that_of_blocks() -> None:
    graph = small("F F F")
    low, high = pairs(3, {}, other=0.1), pairs(3, {}, other=0.4)
    both = suggest_fusion(graph, measured(graph, low, matrices={"block": high, "ffn": low}), Constraints())
    only = suggest_fusion(graph, measured(graph, low, matrices={"block": high}), Constraints())
    assert [group.dependency for group in both + only] == [0.1, 0.4]


def test_pairs_that_were_not_measured() -> None:
    """Blocks 0 to 2 of five were measured: enough for a limit there, and nowhere else."""
    graph = small("F F F F F F")
    numbers = measured(graph, pairs(3, {}, other=0.1))
    [whole] = suggest_fusion(graph, numbers, Constraints())
    assert (whole.layers, whole.dependency) == ((0, 4), None)
    assert "not measured for all of its pairs" in whole.reason
    [limited] = suggest_fusion(graph, numbers, Constraints(max_dependency=0.3))
    assert (limited.layers, limited.dependency) == ((0, 2), 0.1)
    later = measured(graph, pairs(3, {}, other=0.1), first=2)
    assert ranges(suggest_fusion(graph, later, Constraints(max_dependency=0.3))) == [(2, 4)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_width": -1},
        {"max_width": 0},
        {"max_bytes_per_gpu": -5},
        {"max_bytes_per_gpu": 0},
        {"tp_size": 0},
        {"max_dependency": -0.1},
        {"max_dependency": nan},
        {"min_run": 1},
    ],
    ids=str,
)
def test_impossible_constraints(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        Constraints(**wrong)


def test_measurements_that_do_not_fit() -> None:
    graph = small("F F F")
    good = measured(graph, pairs(3, {}))
    cases = {
        "another graph": replace(good, source_layers=[[0], [1], [3]]),
        "range is not in the graph": replace(good, first=1, last=3),
        "matrix fits": replace(good, last=1),
        "not measured": replace(good, matrices={"attention": pairs(3, {})}),
    }
    for problem, numbers in cases.items():
        with pytest.raises(PlanError, match=problem):
            suggest_fusion(graph, numbers, Constraints())


def test_layers_out_of_order_have_no_ranges() -> None:
    graph = small("F F F")
    with pytest.raises(PlanError, match="order of their source layers"):
        suggest_fusion(replace(graph, blocks=graph.blocks[::-1]), None, Constraints())


# --- Fusion, against brute force

WORDS = st.sampled_from(["F", "F", "F", "F", "AF", "-", "A", "AL", "LF", "(AF AF)", "(F F)"])
CHECKED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw: st.DrawFn) -> tuple[ModelGraph, Numbers | None, Constraints]:
    words = draw(st.lists(WORDS, min_size=1, max_size=9) | st.lists(st.just("F"), min_size=4, max_size=9))
    widths = draw(st.lists(st.sampled_from([32, 100, 256, 300, 512]), min_size=1, max_size=8))
    graph = small(" ".join(words), widths)
    size = len(graph.blocks)
    constraints = Constraints(
        max_width=draw(st.none() | st.sampled_from([256, 512, 768, 1100, 1536])),
        max_bytes_per_gpu=draw(st.none() | st.sampled_from([96 * 128, 96 * 300, 96 * 512])),
        tp_size=draw(st.sampled_from([1, 2, 3])),
        max_dependency=draw(st.none() | st.sampled_from([0.0, 0.2, 0.4])),
        keep_last=draw(st.booleans()),
        min_run=draw(st.sampled_from([2, 3])),
    )
    if draw(st.booleans()):
        return graph, None, constraints
    entry = st.sampled_from([0.1, 0.2, 0.3, 0.5, nan] if draw(st.booleans()) else [0.1, 0.2, 0.3])
    matrix = pairs(size, {pair: draw(entry) for pair in combinations(range(size), 2)})
    return graph, measured(graph, matrix), constraints


def naive_runs(graph: ModelGraph) -> list[list[int]]:
    """Indices of the FFNs of every run, from the definition."""

    def is_in_run(index: int) -> bool:
        entry = graph.blocks[index]
        return (
            isinstance(entry, Block) and entry.attention is None and (entry.ffn is None or isinstance(entry.ffn, FFN))
        )

    runs, current = [], []
    for index in range(len(graph.blocks)):
        if not is_in_run(index):
            runs.append(current)
            current = []
        elif not graph.blocks[index].is_empty:
            current.append(index)
    return [run for run in [*runs, current] if run]


def worst_pair(group: Sequence[int], numbers: Measured | None) -> float:
    """The largest dependency in a group; infinite where one is not known."""
    if numbers is None:
        return math.inf
    values = [numbers.matrices["ffn"][i, j] for i, j in combinations(group, 2)]
    return math.inf if any(math.isnan(value) for value in values) else max(values)


def is_legal(graph: ModelGraph, group: Sequence[int], numbers: Measured | None, limits: Constraints) -> bool:
    padded = math.ceil(width_of(graph, group) / 256) * 256
    nbytes = math.ceil(padded / limits.tp_size) * 3 * 8 * 4
    return not (
        (limits.max_width is not None and padded > limits.max_width)
        or (limits.max_bytes_per_gpu is not None and nbytes > limits.max_bytes_per_gpu)
        or (
            numbers is not None
            and limits.max_dependency is not None
            and worst_pair(group, numbers) > limits.max_dependency
        )
    )


def width_of(graph: ModelGraph, group: Sequence[int]) -> int:
    return sum(graph.blocks[index].ffn.intermediate_size for index in group)  # type: ignore[union-attr]


def partitions(run: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every way to cut a run into parts."""
    for cuts in range(len(run)):
        for inner in combinations(range(1, len(run)), cuts):
            edges = [0, *inner, len(run)]
            yield [list(run[a:b]) for a, b in pairwise(edges)]


def score(graph: ModelGraph, parts: Sequence[Sequence[int]], numbers: Measured | None) -> tuple[int, float, int]:
    """Less is better: sublayers not saved, largest dependency, sum of squared widths."""
    worst = max((worst_pair(part, numbers) for part in parts if len(part) > 1), default=-math.inf)
    return len(parts), worst, sum(width_of(graph, part) ** 2 for part in parts)


@CHECKED
@given(problem=problems())
def test_no_split_is_better(problem: tuple[ModelGraph, Numbers | None, Constraints]) -> None:
    graph, numbers, limits = problem
    groups = suggest_fusion(graph, numbers, limits)
    index_of = {entry.source_layers[0]: index for index, entry in enumerate(graph.blocks)}
    seen = 0
    for run in naive_runs(graph):
        free = run[:-1] if limits.keep_last else run
        ours = [
            [index for index in run if index_of[first] <= index <= index_of[last]]
            for first, last in ranges(groups)
            if run[0] <= index_of[first] <= run[-1]
        ]
        seen += len(ours)
        if len(run) < limits.min_run or not free:
            assert not ours
            continue
        assert all(len(part) >= 2 and set(part) <= set(free) for part in ours)
        assert all(is_legal(graph, part, numbers, limits) for part in ours)
        taken = {index for part in ours for index in part}
        found = score(graph, [*ours, *([index] for index in free if index not in taken)], numbers)
        legal = (
            parts
            for parts in partitions(free)
            if all(len(part) == 1 or is_legal(graph, part, numbers, limits) for part in parts)
        )
        assert found == min(score(graph, parts, numbers) for parts in legal)
    assert seen == len(groups)


@CHECKED
@given(problem=problems())
def test_groups_keep_the_rules_and_the_plan_applies(problem: tuple[ModelGraph, Numbers | None, Constraints]) -> None:
    graph, numbers, limits = problem
    groups = suggest_fusion(graph, numbers, limits)
    layers = [layer for first, last in ranges(groups) for layer in range(first, last + 1)]
    assert layers == sorted(set(layers))
    with_attention = {b.source_layers[0] for b in graph.flat_blocks if b.attention is not None}
    assert with_attention.isdisjoint(layers)
    if limits.keep_last:
        assert {graph.blocks[run[-1]].source_layers[0] for run in naive_runs(graph)}.isdisjoint(layers)
    transformed = apply_plan(graph, suggested_plan(fuse=groups))
    saved = sum(group.sublayers_saved for group in groups)
    assert transformed.sequential_sublayers == graph.sequential_sublayers - saved
    for group in groups:
        [ffn] = [b.ffn for b in transformed.flat_blocks if b.source_layers[0] == group.layers[0]]
        assert isinstance(ffn, FFN)
        assert (ffn.intermediate_size, ffn.intermediate_size - ffn.padding) == (group.padded_width, group.width)


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], list[Piece]]:
    """Widths of a run and candidates for its groups, up to some length, many of them equally good."""
    widths = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=2, max_size=8))
    longest = draw(st.integers(2, 4))
    spans = [(a, b) for a, b in combinations(range(len(widths) + 1), 2) if 2 <= b - a <= longest]
    numbers = draw(st.sampled_from([[0.1], [0.1, 0.2, 0.3]]))
    return widths, [Piece(a, b, sum(widths[a:b]), draw(st.sampled_from(numbers))) for a, b in spans]


@CHECKED
@given(case=splits(), seed=st.integers(0, 1000))
def test_order_of_equal_candidates_does_not_matter(case: tuple[list[int], list[Piece]], seed: int) -> None:
    widths, candidates = case
    shuffled = random.Random(seed).sample(candidates, len(candidates))
    assert split_run(widths, shuffled) == split_run(widths, candidates)


@CHECKED
@given(case=splits())
def test_no_choice_of_candidates_is_better(case: tuple[list[int], list[Piece]]) -> None:
    widths, candidates = case
    known = {(piece.start, piece.stop): piece.dependency for piece in candidates}

    def score_of(parts: Sequence[Sequence[int]]) -> tuple[int, float, int]:
        worst = [known[part[0], part[-1] + 1] for part in parts if len(part) > 1]
        return len(parts), max(worst, default=-math.inf), sum(sum(widths[i] for i in part) ** 2 for part in parts)

    chosen = [list(range(piece.start, piece.stop)) for piece in split_run(widths, candidates)]
    taken = {i for part in chosen for i in part}
    legal = (
        parts
        for parts in partitions(range(len(widths)))
        if all(len(part) == 1 or (part[0], part[-1] + 1) in known for part in parts)
    )
    found = [*chosen, *([i] for i in range(len(widths)) if i not in taken)]
    assert score_of(found) == min(map(score_of, legal))


# --- The paper's model


def ultra_before_fusion() -> ModelGraph:
    """Ultra-253B's 126 blocks as they were before the fusion.

    From the paper: the shape of Llama-3.1-405B (126 layers, hidden_size 16384, 128 heads, 8 KV heads), no attention in
    layers 66 to 115, and which layers were fused: [66, 73] [74, 85] [86, 100] [101, 114], layer 115 left alone.
    From the public config of the released model: the blocks before and after those four fused FFNs (its empty blocks
    hold no layer of the original: without them exactly 66 and 11 blocks are left, as many as the paper has layers
    there), and the widths of the four, 399,360, 425,984, 343,040 and 301,056.
    Rebuilt: the widths of layers 66 to 114. Made from widths that the model has elsewhere (53,248, 26,624 and 21,504)
    each of the four sums comes out exactly; their order within a group is ours.
    """
    raw = json.loads(ULTRA.read_text())
    known = [entry for entry in raw["blocks"] if entry != ["no_op", "no_op"]]
    mults = 7 * [4.875] + [2.4375] + 4 * [4.875] + 8 * [2.4375] + 4 * [2.4375] + 11 * [1.95] + 14 * [1.95]
    fused = [index for index, (_, mult) in enumerate(known) if mult > 10]
    assert (fused, len(known)) == ([66, 67, 68, 69], 81)
    blocks = known[:66] + [["no_op", mult] for mult in mults] + known[70:]
    return graph_from_config(
        {
            **raw["constants"],
            "num_hidden_layers": 126,
            "block_configs": [
                {
                    "attention": {"no_op": True} if heads == "no_op" else {"n_heads_in_group": heads},
                    "ffn": {"ffn_mult": mult},
                }
                for heads, mult in blocks
            ],
        }
    )


PAPER_GROUPS = {(66, 73): 399_360, (74, 85): 425_984, (86, 100): 343_040, (101, 114): 301_056}


def test_rebuilt_ultra_is_the_papers() -> None:
    graph = ultra_before_fusion()
    assert [index for index, block in enumerate(graph.flat_blocks) if block.attention is None][-50:] == [
        *range(66, 116)
    ]
    assert (len(graph.blocks), len(graph.attentions), graph.sequential_sublayers) == (126, 64, 190)
    for (first, last), width in PAPER_GROUPS.items():
        assert width_of(graph, range(first, last + 1)) == width
    assert apply_plan(graph, Plan(fuse=list(PAPER_GROUPS))).sequential_sublayers == 145


def test_ultra_gives_groups_of_the_papers_kind() -> None:
    """Structure only, and as memory limit what the paper's widest fused FFN takes on one of 8 GPUs (4.88 GiB in BF16).

    From the paper: 49 of the 50 FFNs become four, 190 sequential sublayers become 145. Ours: min_run, because the
    model has a second run (layers 54 to 60, seven FFNs) that the paper left alone, and which layers the cuts fall on.
    """
    graph = ultra_before_fusion()
    limit = 3 * 16384 * max(PAPER_GROUPS.values()) * 2 // 8
    constraints = Constraints(max_bytes_per_gpu=limit, tp_size=8, min_run=8)
    groups = suggest_fusion(graph, None, constraints)
    assert len(groups) == 4
    assert [layer for first, last in ranges(groups) for layer in range(first, last + 1)] == [*range(66, 115)]
    assert sum(group.sublayers_saved for group in groups) == 45
    assert all(group.bytes_per_gpu <= limit for group in groups)
    # More even than the paper's, which go from 301,056 to 425,984.
    assert max(group.width for group in groups) - min(group.width for group in groups) < 425_984 - 301_056
    assert apply_plan(graph, suggested_plan(fuse=groups)).sequential_sublayers == 145
    every_run = suggest_fusion(graph, None, replace(constraints, min_run=2))
    assert ranges(every_run) == [(54, 59), *ranges(groups)]
    # One byte less, and the 4 groups still fit: their widths are more even. At two thirds, it takes more of them.
    assert len(suggest_fusion(graph, None, replace(constraints, max_bytes_per_gpu=limit - 1))) == 4
    assert len(suggest_fusion(graph, None, replace(constraints, max_bytes_per_gpu=limit * 2 // 3))) > 4


# --- Full blocks side by side


def test_greedy_windows() -> None:
    graph = small("AF AF AF AF AF AF")
    # Windows of 2 by their only pair: (2, 3) first, then (4, 5), which does not overlap, then (0, 1).
    numbers = measured(graph, pairs(6, {(2, 3): 0.1, (1, 2): 0.15, (3, 4): 0.2, (4, 5): 0.3, (0, 1): 0.4}, other=9))
    groups = suggest_parallel(graph, numbers, window=2)
    assert ranges(groups) == [(2, 3), (4, 5), (0, 1)]
    assert [group.sublayers_saved for group in groups] == [2, 2, 2]
    assert ranges(suggest_parallel(graph, numbers, window=2, count=2)) == [(2, 3), (4, 5)]
    assert suggest_parallel(graph, numbers, window=2, count=0) == []
    assert ranges(suggest_parallel(graph, numbers, window=2, max_dependency=0.3)) == [(2, 3), (4, 5)]
    transformed = apply_plan(graph, suggested_plan(parallel=groups))
    assert transformed.sequential_sublayers == graph.sequential_sublayers - 6


@pytest.mark.parametrize(
    ("pattern", "window", "entries", "expected"),
    [
        pytest.param("AF AF AF AF AF", 3, {(0, 2): 0.9, (1, 3): 0.8, (2, 4): 0.7}, [(2, 4)], id="maximum"),
        pytest.param("AF AF AF AF", 3, {(0, 1): 0.5, (2, 3): 0.5, (0, 2): 0.1}, [(1, 3)], id="sum-breaks-ties"),
        pytest.param("AF AF AF AF AF", 4, {}, [(0, 3)], id="equal-windows-by-place"),
        pytest.param("AF AF F AF AF", 2, {}, [(0, 1), (3, 4)], id="a-block-without-attention-divides"),
        pytest.param("AF - AF - - AF", 3, {}, [(0, 5)], id="empty-blocks-do-not"),
        pytest.param("AF LF AF A", 2, {}, [(2, 3)], id="linear-is-no-attention"),
        pytest.param("AF (AF AF) AF AF", 2, {}, [(3, 4)], id="groups-stay-as-they-are"),
        pytest.param("AF AF AF", 4, {}, [], id="model-too-short"),
        pytest.param("AF AF AF AF", 2, {(0, 1): nan}, [(1, 2)], id="not-measured-is-not-chosen"),
    ],
)
def test_windows(pattern: str, window: int, entries: dict, expected: list[tuple[int, int]]) -> None:
    graph = small(pattern)
    groups = suggest_parallel(graph, measured(graph, pairs(len(graph.blocks), entries)), window=window)
    assert ranges(groups) == expected
    saved = sum(group.sublayers_saved for group in groups)
    transformed = apply_plan(graph, suggested_plan(parallel=groups))
    assert transformed.sequential_sublayers == graph.sequential_sublayers - saved


@CHECKED
@given(data=st.data(), size=st.integers(2, 9), window=st.integers(2, 5))
def test_greedy_equals_the_papers_words(data: st.DataObject, size: int, window: int) -> None:
    """Appendix B spelled out: look at all windows again after each choice."""
    graph = small(" ".join(["AF"] * size))
    entry = st.sampled_from([0.125, 0.25, 0.5])
    matrix = pairs(size, {pair: data.draw(entry) for pair in combinations(range(size), 2)})
    left = [range(start, start + window) for start in range(size - window + 1)]
    expected = []
    while left:
        best = min(left, key=lambda w: ([f([matrix[p] for p in combinations(w, 2)]) for f in (max, sum)], w.start))
        expected.append((best[0], best[-1]))
        left = [w for w in left if set(w).isdisjoint(best)]
    assert ranges(suggest_parallel(graph, measured(graph, matrix), window=window)) == expected


def test_parallel_refuses() -> None:
    graph = small("AF AF")
    numbers = measured(graph, pairs(2, {}))
    for wrong in ({"window": 1}, {"count": -1}, {"max_dependency": -0.5}, {"max_dependency": nan}):
        with pytest.raises(PlanError, match=next(iter(wrong))):
            suggest_parallel(graph, numbers, **wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="not measured: expected block, found ffn"):
        suggest_parallel(graph, replace(numbers, matrices={"ffn": pairs(2, {})}))


# --- Attentions to drop


def test_drops_are_ranked() -> None:
    graph = small("AF AF F LF A (AF AF) AF")
    importance = np.array([0.5, 0.2, nan, 0.1, 0.2, 0.0, 0.3])
    numbers = measured(graph, importance={"attention": importance})
    drops = suggest_drops(graph, numbers)
    # Layer 2 has none, 5 and 6 are a group, 1 goes before 4 by its number alone.
    assert [(drop.layer, drop.importance) for drop in drops] == [(3, 0.1), (1, 0.2), (4, 0.2), (7, 0.3), (0, 0.5)]
    assert {drop.measure for drop in drops} == {"cosine"}
    assert "importance 0.1, place 1 of 5" in drops[0].reason
    assert suggest_drops(graph, numbers, count=2) == drops[:2]
    assert suggest_drops(graph, numbers, count=0) == []
    assert suggest_drops(graph, numbers, max_importance=0.2) == drops[:3]
    assert suggest_drops(graph, numbers, max_importance=0.3, count=2) == drops[:2]
    dropped = apply_plan(graph, suggested_plan(drops=drops))
    assert dropped.sequential_sublayers == graph.sequential_sublayers - len(drops)


def test_drops_in_a_measured_range_by_either_measure() -> None:
    graph = small("AF AF AF AF")
    parts = {"importance": {"attention": np.array([0.1, 0.2])}, "kl": {"attention": np.array([7.0, 3.0])}}
    numbers = replace(measured(graph, first=0, **parts), first=1, last=2)
    assert [(drop.layer, drop.measure) for drop in suggest_drops(graph, numbers)] == [(2, "kl"), (1, "kl")]
    assert [drop.layer for drop in suggest_drops(graph, numbers, measure="cosine")] == [1, 2]


def test_blocks_of_several_layers_keep_their_attention() -> None:
    """As `drop_attention` has it, and no writer or pass makes such blocks yet."""
    graph = small("AF AF")
    block = graph.blocks[1]
    assert isinstance(block, Block)
    graph = replace(graph, blocks=(graph.blocks[0], replace(block, source_layers=(1, 2))))
    numbers = measured(graph, importance={"attention": np.array([0.2, 0.1])})
    assert [drop.layer for drop in suggest_drops(graph, numbers)] == [0]


def test_drops_refuse() -> None:
    graph = small("AF AF")
    numbers = measured(graph, importance={"attention": np.array([0.1, 0.2])})
    for wrong in ({"count": -1}, {"max_importance": -1.0}):
        with pytest.raises(PlanError, match=next(iter(wrong))):
            suggest_drops(graph, numbers, **wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="was not measured"):
        suggest_drops(graph, numbers, measure="kl")
    with pytest.raises(PlanError, match="fits the measured range"):
        suggest_drops(graph, replace(numbers, last=0))


# --- The plan as a file


def test_the_file_says_why(tmp_path: Path) -> None:
    graph = small("AF AF AF F F F AF AF")
    matrix = pairs(8, {(0, 1): 0.0625}, other=0.25)
    numbers = measured(graph, matrix, importance={"attention": np.array([0.5, 0.4, 0.01, nan, nan, nan, 0.6, 0.7])})
    constraints = Constraints(max_width=768, max_dependency=0.3)
    drops = suggest_drops(graph, numbers, count=1)
    dropped = drop_attention(graph, [drop.layer for drop in drops])
    fuse = suggest_fusion(dropped, numbers, constraints)
    parallel = suggest_parallel(dropped, numbers, window=2)
    parts = {"drops": drops, "fuse": fuse, "parallel": parallel}

    def depth(plan: Plan) -> int:
        return apply_plan(graph, plan).sequential_sublayers

    text = plan_text(
        constraints=constraints,
        source=SOURCE,
        gain=lambda without, with_line: f"{depth(without) - depth(with_line)} ms",
        **parts,  # type: ignore[arg-type]
    )
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    plan = read_plan(path)
    assert plan == Plan(drop_attention=[2], fuse=[(2, 4)], parallel=[(0, 1), (6, 7)])
    assert apply_plan(graph, plan).sequential_sublayers == graph.sequential_sublayers - 7
    said = " ".join(text.replace("#", " ").split())
    for words in (
        f"Numbers: {SOURCE}",
        "at most 768 channels; pairwise dependency at most 0.3; the last FFN of a run stays alone",
        "All of it saves 7 sequential sublayers: 7 ms.",
        "importance 0.01, place 1 of 5; saves 1 sequential sublayer: 1 ms - 2",
        "3 of the 4 FFNs of run [2, 5] (its last, in layer 5, stays alone); width 768;",
        "largest pairwise dependency 0.25 (limit 0.3); saves 2 sequential sublayers: 2 ms - [2, 4]",
        "largest pairwise dependency 0.0625, sum 0.0625; saves 2 sequential sublayers: 2 ms - [0, 1]",
    ):
        assert words in said
    assert all(len(line) <= 120 for line in text.splitlines())


@CHECKED
@given(problem=problems(), source=st.text(max_size=200), said=st.text(max_size=40))
def test_the_file_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    problem: tuple[ModelGraph, Numbers | None, Constraints],
    source: str,
    said: str,
) -> None:
    graph, numbers, constraints = problem
    importance = {"attention": np.arange(len(graph.blocks)) % 3 / 4.0}
    drops = suggest_drops(graph, measured(graph, importance=importance), max_importance=0.25)
    dropped = drop_attention(graph, [drop.layer for drop in drops])
    fuse = suggest_fusion(dropped, numbers, constraints)
    parallel = [] if numbers is None else suggest_parallel(dropped, numbers, window=2)
    text = plan_text(
        constraints=constraints, source=source, drops=drops, fuse=fuse, parallel=parallel, gain=lambda *_: said
    )
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(text, "utf-8")
    plan = read_plan(path)
    assert plan == suggested_plan(drops=drops, fuse=fuse, parallel=parallel)
    saved = len(drops) + sum(group.sublayers_saved for group in [*fuse, *parallel])  # type: ignore[attr-defined]
    assert apply_plan(graph, plan).sequential_sublayers == graph.sequential_sublayers - saved


def test_a_layer_number_that_no_plan_can_hold() -> None:
    with pytest.raises(PlanError):
        suggested_plan(drops=[Drop(layer=1 << 20, importance=0.0, measure="kl", reason="")])


def test_a_real_measurement_fits() -> None:
    """The protocol is what `measure_dependency` gives, also after its way through JSON."""
    graph = small("AF F F F AF AF")
    numbers = measure_dependency(graph, np.arange(16, dtype=np.int64).reshape(2, 8) % 16)
    assert isinstance(numbers, Dependency)
    [group] = suggest_fusion(graph, numbers, Constraints())
    assert isinstance(group, Group)
    assert group.dependency == numbers.matrices["ffn"][1, 2] == numbers.matrices["block"][1, 2]
    [window] = suggest_parallel(graph, numbers, window=2)
    assert (window.layers, window.dependency) == ((4, 5), numbers.matrices["block"][4, 5])
    drops = suggest_drops(graph, numbers)
    assert sorted(drop.layer for drop in drops) == [0, 4, 5]
    assert [drop.importance for drop in drops] == sorted(numbers.importance["attention"][[0, 4, 5]])
