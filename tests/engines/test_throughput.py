"""The latency-throughput chart: which engines have a curve, where its points stand, how predicted ones look."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from engines.charts import CHART_BOTTOM, CHART_HEIGHT, CHART_LEFT, CHART_TOP, CHART_WIDTH
from engines.point_charts import RIGHT
from engines.results import Comparison, RequestShape, comparison_from_results, results_from_json, statistics
from engines.throughput import (
    CHARACTER_WIDTH,
    TEXT_HEIGHT,
    Curve,
    CurvePoint,
    ThroughputChart,
    curves_in_words,
    logarithmic_ticks,
    throughput_chart,
    throughput_images,
    throughput_layout,
    tick_text,
)
from tests.engines.test_report import ENGINES, REALISTIC, with_changes

SHAPE = RequestShape(1, 128, 64)


def chart_of(document: dict, **options: object) -> ThroughputChart | None:
    comparison: Comparison = comparison_from_results(
        [("results.json", results_from_json(json.dumps(document).encode()))], baseline=None
    )
    figures = {key: statistics(cell) for key, cell in comparison.cells.items()}
    return throughput_chart(comparison, figures, SHAPE, file="throughput.png", **options)  # type: ignore[arg-type]


def test_points_are_what_the_table_says() -> None:
    chart = chart_of(REALISTIC)
    assert chart is not None
    assert [curve.label for curve in chart.curves] == ["baseline", "attention-dropped", "fused"]
    cell = next(c for c in REALISTIC["cells"] if (c["engine"], c["batch"], c["input_len"]) == ("fused", 4, 128))
    request = sorted(cell["request_ms"])[2]
    decode = sorted((r - t) / 63 for r, t in zip(cell["request_ms"], cell["ttft_ms"], strict=True))[2]
    point = chart.curves[2].points[1]
    assert (point.batch, point.per_user, point.total) == pytest.approx((4, 1000 / decode, 4 * 64 * 1000 / request))
    eight = chart_of(REALISTIC, devices=8, on="8x H100 SXM")
    assert eight is not None
    assert eight.curves[2].points[1].total == pytest.approx(point.total / 8)
    assert (eight.y_label, eight.title) == ("tokens/s per GPU", "Latency and throughput, predicted for 8x H100 SXM")


CHOICES = {
    "one batch": ({"cells": [cell for cell in REALISTIC["cells"] if cell["batch"] == 1]}, None),
    "two batches of one engine": (
        {"cells": [cell for cell in REALISTIC["cells"] if cell["engine"] == "fused" or cell["batch"] == 1]},
        ["fused"],
    ),
    "emulated": ({"engines": [*ENGINES[:2], {**ENGINES[2], "kind": "emulated"}]}, ["baseline", "attention-dropped"]),
}


@pytest.mark.parametrize(("changes", "labels"), CHOICES.values(), ids=CHOICES.keys())
def test_a_curve_needs_two_batches_and_real_time(changes: dict, labels: list[str] | None) -> None:
    chart = chart_of(with_changes(**changes))
    assert (None if chart is None else [curve.label for curve in chart.curves]) == labels


def drawn(points: list[list[tuple[float, float]]], *, predicted: bool = False) -> ThroughputChart:
    curves = tuple(
        Curve(f"$engine_{i}", i, predicted, tuple(CurvePoint(2**n, x, y) for n, (x, y) in enumerate(row)))
        for i, row in enumerate(points)
    )
    return ThroughputChart("a.png", "Latency and throughput", "", "tokens/s per user", "tokens/s in total", curves)


CASES = {
    "close": [[(100, 100), (90, 180), (70, 280)], [(101, 101), (90.5, 181), (70.5, 282)]],
    "wide": [[(50, 50), (40, 640), (10, 10_240)]],
    "same": [[(1.0, 1.0), (1.0, 1.0)]],
    "extreme": [[(1e-300, 1e-300), (1.7e308, 1e308)]],
}


@pytest.mark.parametrize("points", CASES.values(), ids=CASES.keys())
def test_any_points_can_be_drawn(points: list[list[tuple[float, float]]]) -> None:
    layout = throughput_layout(drawn(points))
    dots = [dot for curve in layout.curves for dot in curve.dots]
    for dot in dots:
        assert CHART_LEFT <= dot.x <= CHART_WIDTH - RIGHT
        assert CHART_TOP <= dot.y <= CHART_HEIGHT - CHART_BOTTOM
    boxes = []
    for dot in dots:
        half = CHARACTER_WIDTH * len(dot.text) / 2
        if dot.text:
            boxes.append((dot.text_x - half, dot.text_y - TEXT_HEIGHT, dot.text_x + half, dot.text_y))
    assert boxes
    for one, other in combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    png, svg = throughput_images(layout)
    assert png.startswith(b"\x89PNG")
    assert b"$engine_0" in svg


def test_no_label_breaks_an_svg() -> None:
    label = "</text><script>&\"']]>"
    curve = Curve(label, 0, False, (CurvePoint(1, 2.0, 2.0), CurvePoint(2, 1.0, 3.0)))
    chart = ThroughputChart("a.png", label, label, label, label, (curve,))
    tree = ElementTree.fromstring(throughput_images(throughput_layout(chart))[1])
    assert label in "".join(tree.itertext())
    assert not [element for element in tree.iter() if element.tag.endswith("script")]


def test_more_for_all_is_up_and_more_for_one_is_right() -> None:
    (curve,) = throughput_layout(drawn([[(100, 100), (80, 160)]])).curves
    first, second = curve.dots
    assert second.x < first.x
    assert second.y < first.y


@pytest.mark.parametrize("case", ["close", "wide"])
def test_points_stand_between_the_ticks_of_their_values(case: str) -> None:
    layout = throughput_layout(drawn(CASES[case]))
    scale = np.log if case == "wide" else np.asarray
    x_places, x_values = read_off(layout.x_ticks)
    y_places, y_values = read_off(layout.y_ticks)
    for curve, row in zip(layout.curves, CASES[case], strict=True):
        for dot, (per_user, total) in zip(curve.dots, row, strict=True):
            assert dot.x == pytest.approx(np.interp(per_user, x_values, x_places))
            assert dot.y == pytest.approx(np.interp(scale(total), scale(y_values), y_places))


def read_off(ticks: Sequence[tuple[float, str]]) -> tuple[list[float], list[float]]:
    """Places and values of an axis."""
    return [place for place, _ in ticks], [float(text.replace(",", "").replace("k", "e3")) for _, text in ticks]


def test_predicted_curves_say_so() -> None:
    chart = drawn([[(100, 100), (80, 160)]], predicted=True)
    (curve,) = throughput_layout(chart).curves
    assert curve.is_predicted
    assert "(predicted)" in curve.dots[0].tooltip
    assert curves_in_words(chart) == "$engine_0 (predicted): batch 1, 100 and 100; batch 2, 80.0 and 160."
    solid = throughput_images(throughput_layout(drawn([[(100, 100), (80, 160)]])))[1]
    dashed = throughput_images(throughput_layout(chart))[1]
    assert b"stroke-dasharray" in dashed
    assert b"stroke-dasharray" not in solid
    assert b"(predicted)" in dashed


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (15, 70, [10, 20, 50, 100]),
        (20, 100, [20, 50, 100]),
        (3, 3, [2, 5]),
        (0.5, 40_000, [0.1, 10, 1000, 100_000]),
        (5, 8000, [1, 10, 100, 1000, 10_000]),
    ],
)
def test_logarithmic_ticks_enclose(low: float, high: float, ticks: list[float]) -> None:
    assert logarithmic_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (5000, "5,000"), (20_000, "20k"), (2e6, "2M"), (1e10, "10G")]
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert tick_text(value) == text
