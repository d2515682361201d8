"""Ratios of the comparison: which of them have intervals, how rounds are paired, and the same figures as CSV."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import pytest

from engines.comparison_table import METRICS, Figures, Intervals, comparison_rows, csv_of, intervals_of
from engines.intervals import ratio_interval
from engines.results import Comparison, RequestShape, comparison_from_results, results_from_json, statistics
from tests.engines.test_report import ENGINES, REALISTIC, with_changes

SHAPE = RequestShape(1, 128, 64)


def compared(*documents: dict, baseline: str | None = None) -> tuple[Comparison, Figures, Intervals]:
    sources = [(f"{i}.json", results_from_json(json.dumps(one).encode())) for i, one in enumerate(documents)]
    comparison = comparison_from_results(sources, baseline=baseline)
    return comparison, {key: statistics(cell) for key, cell in comparison.cells.items()}, intervals_of(comparison)


def is_at(cell: dict, engine: str) -> bool:
    return (cell["engine"], cell["batch"], cell["input_len"]) == (engine, 1, 128)


def samples(engine: str) -> list[float]:
    cell = next(cell for cell in REALISTIC["cells"] if is_at(cell, engine))
    return [(r - t) / 63 for r, t in zip(cell["request_ms"], cell["ttft_ms"], strict=True)]


def split(document: dict, engine: str) -> tuple[dict, dict]:
    """The same in two files, one engine alone in the second."""
    parts = []
    for alone in (False, True):
        engines = [e for e in document["engines"] if (e["label"] == engine) == alone]
        cells = [c for c in document["cells"] if (c["engine"] == engine) == alone]
        parts.append({**document, "engines": engines, "cells": cells})
    return parts[0], parts[1]


def test_rounds_of_engines_that_took_turns_are_paired_and_no_others() -> None:
    _, _, together = compared(REALISTIC)
    _, _, apart = compared(*split(REALISTIC, "fused"))
    _, _, in_line = compared({**REALISTIC, "environment": {**REALISTIC["environment"], "interleaved": False}})
    key = ("fused", SHAPE, "inter_token_ms")
    ours, theirs = samples("fused"), samples("baseline")
    for found, paired in ((together[key], True), (apart[key], False), (in_line[key], False)):
        expected = ratio_interval(ours, theirs, paired=paired)
        assert (found.ratio, found.low, found.high) == pytest.approx((expected.ratio, expected.low, expected.high))
    assert together[key] != apart[key]
    _, _, uneven = compared(fewer({**REALISTIC, "cells": [doubled(cell) for cell in REALISTIC["cells"]]}, "fused", 9))
    assert uneven[key] == ratio_interval((ours * 2)[:9], theirs * 2)
    assert apart["attention-dropped", SHAPE, "ttft_ms"] == together["attention-dropped", SHAPE, "ttft_ms"]


def doubled(cell: dict) -> dict:
    """The cell with every round twice."""
    return {**cell, **{key: cell[key] * 2 for key in ("ttft_ms", "step_ms", "request_ms")}}


def fewer(document: dict, engine: str, rounds: int) -> dict:
    cells = [
        {**cell, **{key: cell[key][:rounds] for key in ("ttft_ms", "step_ms", "request_ms")}}
        if cell["engine"] == engine
        else cell
        for cell in document["cells"]
    ]
    return {**document, "cells": cells}


WITHOUT: dict[str, tuple[dict, set[str]]] = {
    "all measured": (REALISTIC, {"attention-dropped", "fused"}),
    "too few rounds": (fewer(REALISTIC, "fused", 4), {"attention-dropped"}),
    "too few of the baseline": (fewer(REALISTIC, "baseline", 4), set()),
    "emulated": (with_changes(engines=[*ENGINES[:2], {**ENGINES[2], "kind": "emulated"}]), {"attention-dropped"}),
    "baseline not timed": (
        with_changes(cells=[cell for cell in REALISTIC["cells"] if cell["engine"] != "baseline"]),
        set(),
    ),
}


@pytest.mark.parametrize(("document", "labels"), WITHOUT.values(), ids=WITHOUT.keys())
def test_which_ratios_have_an_interval(document: dict, labels: set[str]) -> None:
    assert {label for label, _, _ in compared(document)[2]} == labels


@pytest.mark.parametrize("rounds", [1, 5])
def test_times_of_zero_have_no_interval_and_cost_the_others_none(rounds: int) -> None:
    """A clock may be too coarse for a step; ratios to nothing mean nothing."""
    for still, expected in (("fused", {"attention-dropped"}), ("baseline", set())):
        cells = [
            {**cell, "request_ms": [*cell["ttft_ms"][:rounds], *cell["request_ms"][rounds:]]}
            if is_at(cell, still)
            else cell
            for cell in REALISTIC["cells"]
        ]
        _, _, found = compared(with_changes(cells=cells))
        assert {label for label, shape, name in found if (shape, name) == (SHAPE, "inter_token_ms")} == expected


def test_a_ratio_of_rates_has_the_inverse_interval_of_times() -> None:
    comparison, figures, intervals = compared(REALISTIC)
    rows = {row.name: row for row in comparison_rows(comparison, figures, intervals, SHAPE)}
    times, rates = (rows[name].values[2] for name in ("Inter-token latency", "Output tokens/s per user"))
    low, high = (float(part) for part in times.interval.split("–"))
    inverse_low, inverse_high = (float(part) for part in rates.interval.split("–"))
    assert (1 / high, 1 / low) == pytest.approx((inverse_low, inverse_high), rel=0.02)
    assert (times.verdict, rates.verdict) == ("better", "better")
    assert rows["Decode step p99"].values[2].interval == ""
    assert rows["Weights"].values[2].interval == ""


def test_a_difference_within_the_noise_is_none() -> None:
    """Medians 10 % apart, rounds that differ by more."""
    noise = np.array([0.7, 0.9, 1.0, 1.3, 1.6])
    cells = [
        {
            "engine": label,
            "batch": 1,
            "input_len": 128,
            "output_len": 64,
            "ttft_ms": list(ms * ordered),
            "step_ms": [[ms] * 63] * 5,
            "request_ms": list(64 * ms * ordered),
        }
        for label, ms, ordered in (("baseline", 1.0, noise), ("fused", 1.1, noise[::-1]))
    ]
    comparison, figures, intervals = compared(with_changes(engines=[ENGINES[0], ENGINES[2]], cells=cells))
    row = comparison_rows(comparison, figures, intervals, SHAPE)[0]
    assert (row.values[1].ratio, row.values[1].verdict) == ("1.10×", "same")
    assert row.values[1].interval


def verdicts(document: dict, engine: int = 2) -> dict[str, str]:
    rows = comparison_rows(*compared(document), SHAPE)
    return {row.name: row.values[engine].verdict for row in rows if row.values[engine].ratio}


SURE = {"Engine folder", "Weights", "KV cache per token", "Sequential sublayers"}
IN_MEASURED_TIMES = {metric.name for metric in METRICS if metric.samples is not None}


def with_memory(ratio: float) -> dict:
    """REALISTIC, the third engine with so many times the baseline's peak memory, and three times its load time."""
    base = ENGINES[0]
    changed = {"peak_memory_gib": ratio * base["peak_memory_gib"], "load_time_s": 3 * base["load_time_s"]}
    return with_changes(engines=[base, ENGINES[1], {**ENGINES[2], **changed}])


def test_what_may_be_called_better_or_worse() -> None:
    """Times with an interval, and what is exact; of percentiles and load times nobody knows the noise."""
    judged = verdicts(with_memory(1.58))
    assert {name for name, verdict in judged.items() if verdict == "better"} >= IN_MEASURED_TIMES | {"Engine folder"}
    assert {judged[name] for name in SURE} <= {"better", "same"}
    assert judged["Peak memory"] == "worse"
    unsure = ("Decode step p50", "Decode step p90", "Decode step p99", "Load time")
    assert {judged[name] for name in unsure} == {"neutral"}


def test_accuracy_is_lost_where_perplexity_and_divergence_grow_and_agreement_shrinks() -> None:
    accuracies = [
        {"perplexity": 8.0, "kl_divergence": 0.1, "top1_agreement": 0.9},
        {"perplexity": 9.0, "kl_divergence": 0.2, "top1_agreement": 0.8},
    ]
    for (first, second), verdict in ((accuracies, "worse"), (accuracies[::-1], "better")):
        engines = [{**ENGINES[0], "accuracy": first}, ENGINES[1], {**ENGINES[2], "accuracy": second}]
        found = verdicts(with_changes(engines=engines))
        names = ("Perplexity", "KL divergence, nats per token", "Top-1 agreement")
        assert [found[name] for name in names] == [verdict] * 3


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.5, "better"), (0.96, "better"), (0.98, "neutral"), (1.02, "neutral"), (1.04, "worse")]
)
def test_memory_has_some_noise(ratio: float, verdict: str) -> None:
    assert verdicts(with_memory(ratio))["Peak memory"] == verdict


def test_measured_times_without_intervals_are_not_judged_and_predicted_ones_are() -> None:
    few = fewer(REALISTIC, "fused", 4)
    timed = {metric.name for metric in METRICS if metric.is_timed}
    found = verdicts(few)
    assert {found[name] for name in timed} == {"neutral"}
    predicted = with_changes(
        engines=[{**one, "kind": "predicted", "load_time_s": None, "peak_memory_gib": None} for one in ENGINES],
        cells=few["cells"],
    )
    found = verdicts(predicted)
    assert {found[name] for name in timed} == {"better"}


def table(*documents: dict) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_of([compared(*documents)]))))


def test_the_csv_has_every_figure_once_and_unrounded() -> None:
    lines = table(REALISTIC)
    keys = [(x["engine"], x["batch"], x["input_len"], x["output_len"], x["metric"]) for x in lines]
    assert len(set(keys)) == len(keys)
    timed = [metric for metric in METRICS if metric.is_timed]
    assert sum(line["batch"] != "" for line in lines) == 3 * 4 * len(timed)
    (line,) = [
        x for x in lines if (*x.values(),)[:7] == ("fused", "measured", "cpu", "1", "128", "64", METRICS[1].name)
    ]
    assert float(line["value"]) == pytest.approx(np.median(samples("fused")), rel=1e-8)
    interval = ratio_interval(samples("fused"), samples("baseline"), paired=True)
    assert [float(line[key]) for key in ("ratio", "ratio_low", "ratio_high")] == pytest.approx(
        [interval.ratio, interval.low, interval.high], rel=1e-5
    )
    assert (line["unit"], line["rounds"], line["baseline"]) == ("ms", "5", "baseline")
    large = table(with_changes(engines=[{**ENGINES[0], "weight_bytes": 812_106_113_025}, *ENGINES[1:]]))
    (weights,) = [x for x in large if (x["engine"], x["metric"]) == ("baseline", "Weights")]
    assert (weights["batch"], weights["unit"], weights["ratio"], weights["rounds"]) == ("", "bytes", "", "")
    assert weights["value"] == "812106113025"


@pytest.mark.parametrize("label", ["=1+1", "+x", "-x", "@SUM(A1)", 'a,"b"\u2028'])
def test_no_label_is_a_formula_or_breaks_the_csv(label: str) -> None:
    document: dict[str, Any] = json.loads(json.dumps(REALISTIC).replace('"fused"', json.dumps(label)))
    found = {line["engine"] for line in table(document)} - {"baseline", "attention-dropped"}
    assert found == {label if label.startswith("a") else f"'{label}"}


def test_emulated_times_are_set_against_nothing() -> None:
    lines = table(with_changes(engines=[*ENGINES[:2], {**ENGINES[2], "kind": "emulated"}]))
    emulated = [line for line in lines if line["engine"] == "fused"]
    assert {line["ratio"] == "" for line in emulated if line["batch"]} == {True}
    assert any(line["ratio"] for line in emulated if not line["batch"])
