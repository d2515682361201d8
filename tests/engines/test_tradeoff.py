"""The accuracy-latency chart: where points and labels stand, whatever the numbers are."""

from __future__ import annotations

from itertools import combinations

import pytest

from engines.charts import CHART_BOTTOM, CHART_HEIGHT, CHART_LEFT, CHART_TOP, CHART_WIDTH
from engines.point_charts import RIGHT, ticks_between
from engines.results import Spread
from engines.tradeoff import (
    CHARACTER_WIDTH,
    RADIUS,
    Dot,
    Point,
    Tradeoff,
    tradeoff_images,
    tradeoff_layout,
)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (43.2, 50.4, [42, 44, 46, 48, 50, 52]),
        (0.98, 2.11, [0.5, 1, 1.5, 2, 2.5]),
        (0.0, 0.0003, [0, 0.0001, 0.0002, 0.0003]),
        (5.0, 5.0, [5, 5.002]),  # one value: the axis has a length all the same
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, ticks: list[float]) -> None:
    assert ticks_between(low, high) == pytest.approx(ticks)


def chart(points: list[tuple[str, float, float]]) -> Tradeoff:
    """From (label, median latency, accuracy); rounds spread by a tenth."""
    return Tradeoff(
        "a.png",
        "Accuracy and latency",
        "batch 1",
        "ms",
        "perplexity",
        tuple(
            Point(label, index, Spread(median=ms, low=0.9 * ms, high=1.1 * ms), accuracy)
            for index, (label, ms, accuracy) in enumerate(points)
        ),
    )


CHARTS = {
    "demo": [("baseline", 1.9, 43.58), ("dropped", 1.8, 44.85), ("fused", 1.6, 45.65), ("auto", 1.5, 50.24)],
    "close": [("baseline", 2.0, 10.0), ("dropped", 1.98, 10.01), ("fused", 1.96, 10.02)],
    "at_the_edges": [("leftmost of all", 1.0, 20.0), ("rightmost of all", 9.0, 10.0), ("middle", 5.0, 15.0)],
}


def box(dot: Dot) -> tuple[float, float, float, float]:
    """Of a label, a little smaller than what was reserved for it."""
    width = (CHARACTER_WIDTH - 0.5) * len(dot.text)
    left = dot.text_x - {"start": 0, "middle": width / 2, "end": width}[dot.anchor]
    return left, dot.text_y - 8, left + width, dot.text_y


@pytest.mark.parametrize("case", CHARTS)
def test_labels_hide_nothing_and_stay_inside(case: str) -> None:
    layout = tradeoff_layout(chart(CHARTS[case]))
    for one, other in combinations([box(dot) for dot in layout.dots], 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    for left, top, right, bottom in map(box, layout.dots):
        assert CHART_LEFT <= left < right <= CHART_WIDTH
        assert CHART_TOP <= top < bottom <= CHART_HEIGHT - CHART_BOTTOM
        for dot in layout.dots:
            low, high = dot.whisker or (dot.x - RADIUS, dot.x + RADIUS)
            assert not (left < high and low < right and top < dot.y < bottom)


def test_points_stand_where_their_values_are() -> None:
    layout = tradeoff_layout(chart([("a", 2.0, 30.0), ("b", 4.0, 10.0)]))
    a, b = layout.dots
    assert a.x < b.x
    assert a.y < b.y  # pixels count downwards: 30 is above 10
    assert a.whisker is not None
    assert a.whisker[0] < a.x < a.whisker[1]
    ticks = {text: x for x, text in layout.x_ticks}
    assert (a.x - ticks["2"]) == pytest.approx(0)
    assert {text: y for y, text in layout.y_ticks}["30"] == pytest.approx(a.y)
    assert [dot.series for dot in layout.dots] == [0, 1]
    assert a.tooltip == "a: perplexity 30.0, 2.00 ms (1.80 to 2.20 over the rounds)"


@pytest.mark.parametrize(
    "points",
    [
        [("a", 1.0, 5.0), ("b", 1.0, 5.0)],
        [("a", 1e-300, 1e-300), ("b", 1.0, 1.0)],
        [("a", 1.0, 1.0), ("b", 1e308, 1.7e308)],
        [("$\\frac{$" * 20, 1.0, 1.0), ("_b", 1.0, 2.0)],
    ],
    ids=["same", "tiny", "huge", "labels"],
)
def test_any_numbers_and_labels_can_be_drawn(points: list[tuple[str, float, float]]) -> None:
    layout = tradeoff_layout(chart(points))
    for dot in layout.dots:
        assert CHART_LEFT <= dot.x <= CHART_WIDTH - RIGHT
        assert CHART_TOP <= dot.y <= CHART_HEIGHT - CHART_BOTTOM
    png, svg = tradeoff_images(layout)
    assert png.startswith(b"\x89PNG")
    assert b"<svg" in svg
