"""The accuracy-latency chart: one point per engine, laid out once, drawn as SVG by the page and for files here.

Source of the form: Bercovich et al., "FFN Fusion", arXiv:2503.18908, figure 6. Coordinates are pixels, y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from engines.charts import (
    CHART_BOTTOM,
    CHART_HEIGHT,
    CHART_LEFT,
    CHART_TOP,
    CHART_WIDTH,
    SERIES_COLORS,
    images_of,
)
from engines.point_charts import MOST, Box, Frame, across, framed_figure, ticks_between, upwards
from engines.report_words import digits, shortened
from engines.results import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RADIUS = 4.5
TEXT_HEIGHT = 11.0
CHARACTER_WIDTH = 5.9  # of the page's fonts at that height, on average and a little more
LONGEST_LABEL = 22
ROOM = 0.08  # of the data's span, left free on every side

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True)
class Point:
    """One engine: where it stands, and which colour it has in the other charts."""

    label: str
    series: int
    latency: Spread  # ms
    accuracy: float


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """One chart; the first point is the baseline."""

    file: str
    title: str
    subtitle: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Dot:
    """A point in pixels with its label beside it; the whisker spans the rounds."""

    series: int
    x: float
    y: float
    whisker: tuple[float, float] | None
    text: str
    text_x: float
    text_y: float  # of the foot of the letters
    anchor: Anchor
    tooltip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(Frame):
    """A chart, laid out."""

    chart: Tradeoff
    dots: tuple[Dot, ...]
    radius: float = RADIUS


def tradeoff_layout(chart: Tradeoff) -> Layout:
    """Lay out a chart; every label stands where it hides nothing, if there is such a place."""
    x_ticks = _ticks([value for point in chart.points for value in (point.latency.low, point.latency.high)])
    y_ticks = _ticks([point.accuracy for point in chart.points])
    x_of = partial(across, low=x_ticks[0], high=x_ticks[-1])
    y_of = partial(upwards, low=y_ticks[0], high=y_ticks[-1])
    frame = Frame(
        x_ticks=tuple((x_of(tick), f"{tick:,.6g}") for tick in x_ticks),
        y_ticks=tuple((y_of(tick), f"{tick:,.6g}") for tick in y_ticks),
    )
    places = [(x_of(point.latency.median), y_of(point.accuracy)) for point in chart.points]
    whiskers = [(x_of(point.latency.low), x_of(point.latency.high)) for point in chart.points]
    taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in places]
    taken += [(low, y - 1, high, y + 1) for (low, high), (_, y) in zip(whiskers, places, strict=True)]
    base_x, base_y = places[0]
    taken += [(frame.left, base_y - 1, frame.right, base_y + 1), (base_x - 1, frame.top, base_x + 1, frame.bottom)]
    dots = []
    for point, (x, y), whisker in zip(chart.points, places, whiskers, strict=True):
        text = shortened(point.label, LONGEST_LABEL)
        text_x, text_y, anchor, box = _label_place(x, y, CHARACTER_WIDTH * len(text), taken)
        taken.append(box)
        spread = point.latency
        dots.append(
            Dot(
                series=point.series % len(SERIES_COLORS["light"]),
                x=x,
                y=y,
                whisker=whisker if spread.high > spread.low else None,
                text=text,
                text_x=text_x,
                text_y=text_y,
                anchor=anchor,
                tooltip=f"{point.label}: {chart.y_label} {digits(point.accuracy)}, {digits(spread.median)} ms"
                f" ({digits(spread.low)} to {digits(spread.high)} over the rounds)",
            )
        )
    return Layout(chart=chart, dots=tuple(dots), x_ticks=frame.x_ticks, y_ticks=frame.y_ticks)


def _label_place(x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[float, float, Anchor, Box]:
    """Choose among the places around a point the one that hides least: (x, y of the foot, anchor, box)."""
    room = (CHART_LEFT, CHART_TOP, CHART_WIDTH, CHART_HEIGHT - CHART_BOTTOM)
    aside = RADIUS + 3
    places: list[tuple[float, float, Anchor, Box]] = []
    anchors: dict[Anchor, tuple[float, float]] = {
        "start": (aside, 0),
        "end": (-aside, -width),
        "middle": (0, -width / 2),
    }
    for anchor, (shift, start) in anchors.items():
        for foot in (-8.0, 16.0) if anchor == "middle" else (4.0, -8.0, 16.0):
            edge, base = x + shift + start, y + foot
            places.append((x + shift, base, anchor, (edge, base - TEXT_HEIGHT + 2, edge + width, base + 2)))

    def hidden(place: tuple[float, float, Anchor, Box]) -> float:
        box = place[-1]
        return sum(_overlap(box, other) for other in taken) + _area(box) - _overlap(box, room)

    return min(places, key=hidden)  # of equal ones the first


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _area(box: Box) -> float:
    return _overlap(box, box)


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = min(values), min(max(values), MOST)
    room = ROOM * (high - low)
    return ticks_between(max(low - room, 0.0), high + room)


def tradeoff_images(layout: Layout) -> tuple[bytes, bytes]:
    """Draw a layout with matplotlib, light colours, one pixel of the layout to the point: (PNG, SVG)."""

    def draw() -> Figure:
        chart = layout.chart
        title = f"{chart.title} ({chart.subtitle})"
        figure, axes = framed_figure(layout, title, chart.x_label, chart.y_label, beside=22)
        colors = SERIES_COLORS["light"]
        base = layout.dots[0]
        axes.plot([base.x, base.x], [layout.top, layout.bottom], color="#97a1ad", linewidth=0.7, linestyle=(0, (3, 3)))
        axes.plot([layout.left, layout.right], [base.y, base.y], color="#97a1ad", linewidth=0.7, linestyle=(0, (3, 3)))
        for dot in layout.dots:
            color = colors[dot.series]
            if dot.whisker is not None:
                axes.plot(dot.whisker, [dot.y, dot.y], color=color, linewidth=0.9)
            face = "#ffffff" if dot is base else color
            axes.plot(dot.x, dot.y, "o", markersize=2 * RADIUS, color=color, markerfacecolor=face, markeredgewidth=2)
            alignment = {"start": "left", "middle": "center", "end": "right"}[dot.anchor]
            axes.text(dot.text_x, dot.text_y, dot.text, ha=alignment, va="baseline", fontsize=9, color="#17212d")
        return figure

    return images_of(draw)
