"""The latency-throughput chart: what every user gets against what all get together, one curve per engine over batches.

Laid out once, in pixels, y downwards; drawn as SVG by the page and by matplotlib for files. Curves of predicted engines
are dashed and their points hollow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from engines.charts import SERIES_COLORS, add_legend, images_of
from engines.comparison_table import Figures
from engines.point_charts import MOST, Box, Frame, across, framed_figure, ticks_between, upwards
from engines.report_words import digits
from engines.results import Comparison, RequestShape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RADIUS = 3.5
LOGARITHMIC_FROM = 6.0  # largest over smallest throughput
TEXT_HEIGHT, CHARACTER_WIDTH = 7.0, 5.2  # of a batch
DASHES = (5, 3)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One engine at one batch."""

    batch: int
    per_user: float  # tokens/s
    total: float  # tokens/s, of one device


@dataclass(frozen=True, slots=True)
class Curve:
    """One engine; its points by batch."""

    label: str
    series: int
    is_predicted: bool
    points: tuple[CurvePoint, ...]

    @property
    def name(self) -> str:
        return f"{self.label} (predicted)" if self.is_predicted else self.label


@dataclass(frozen=True, slots=True)
class ThroughputChart:
    """One chart."""

    file: str
    title: str
    subtitle: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True)
class Dot:
    """A point in pixels."""

    x: float
    y: float
    text: str  # its batch, empty where there is no room for it
    text_x: float  # of the middle
    text_y: float  # of the foot
    tooltip: str


@dataclass(frozen=True, slots=True)
class DrawnCurve:
    """A curve in pixels."""

    series: int
    is_predicted: bool
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(Frame):
    """A chart, laid out."""

    chart: ThroughputChart
    curves: tuple[DrawnCurve, ...]
    radius: float = RADIUS


def throughput_chart(
    comparison: Comparison, figures: Figures, shape: RequestShape, *, file: str, on: str = "", devices: int = 1
) -> ThroughputChart | None:
    """Choose the curves: engines that have figures at two batches or more of the shape's lengths; None without any.

    Args:
        on: the hardware, for the title.
        devices: that the engines ran on, to which the total is related.
    """
    curves = []
    for series, engine in enumerate(comparison.engines):
        points = []
        for at in sorted(one for one in comparison.shapes if one[1:] == shape[1:]):
            cell = figures.get((engine.label, at))
            if engine.kind != "emulated" and cell is not None and cell.output_tokens_per_s_per_user is not None:
                total = cell.output_tokens_per_s_total.median / devices
                points.append(CurvePoint(at.batch, cell.output_tokens_per_s_per_user, total))
        if len(points) > 1:
            curves.append(Curve(engine.label, series, engine.kind == "predicted", tuple(points)))
    if not curves:
        return None
    return ThroughputChart(
        file,
        f"Latency and throughput{', predicted for ' if on else ''}{on}",
        f"input {shape.input_len}, output {shape.output_len}, batch beside each point; upper right is better",
        "tokens/s per user",
        "tokens/s in total" if devices == 1 else "tokens/s per GPU",
        tuple(curves),
    )


def throughput_layout(chart: ThroughputChart) -> Layout:
    """Lay out a chart; the vertical axis is logarithmic where totals differ by much."""
    per_user = [min(point.per_user, MOST) for curve in chart.curves for point in curve.points]
    totals = [min(point.total, MOST) for curve in chart.curves for point in curve.points]
    x_ticks = ticks_between(max(0.0, min(per_user) * 0.96), max(per_user) * 1.02)
    is_logarithmic = max(totals) > LOGARITHMIC_FROM * min(totals)
    y_ticks = logarithmic_ticks(min(totals), max(totals)) if is_logarithmic else ticks_between(0.0, max(totals))
    x_of = partial(across, low=x_ticks[0], high=x_ticks[-1])

    def y_of(value: float) -> float:
        if is_logarithmic:
            return upwards(math.log(min(value, MOST)), math.log(y_ticks[0]), math.log(y_ticks[-1]))
        return upwards(value, y_ticks[0], y_ticks[-1])

    places = [[(x_of(p.per_user), y_of(p.total)) for p in curve.points] for curve in chart.curves]
    taken = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for row in places for x, y in row]
    drawn = []
    for curve, row in zip(chart.curves, places, strict=True):
        dots = []
        for point, (x, y) in zip(curve.points, row, strict=True):
            place = _free_place(x, y, f"{point.batch}", taken)
            tooltip = (
                f"{curve.name}, batch {point.batch}: {digits(point.per_user)} {chart.x_label}, "
                f"{digits(point.total)} {chart.y_label}"
            )
            text_x, text_y = place or (x, y)
            dots.append(Dot(x, y, f"{point.batch}" if place else "", text_x, text_y, tooltip))
        drawn.append(DrawnCurve(curve.series % len(SERIES_COLORS["light"]), curve.is_predicted, tuple(dots)))
    return Layout(
        chart=chart,
        curves=tuple(drawn),
        x_ticks=tuple((x_of(tick), tick_text(tick)) for tick in x_ticks),
        y_ticks=tuple((y_of(tick), tick_text(tick)) for tick in y_ticks),
    )


def _free_place(x: float, y: float, text: str, taken: list[Box]) -> tuple[float, float] | None:
    """Find room for a text beside a point and take it: (x of its middle, y of its foot), or None."""
    width = CHARACTER_WIDTH * len(text)
    for side, foot in ((1, -3), (-1, -3), (1, 9), (-1, 9)):
        middle = x + side * (RADIUS + 2 + width / 2)
        box = (middle - width / 2, y + foot - TEXT_HEIGHT, middle + width / 2, y + foot)
        if not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken):
            taken.append(box)
            return middle, y + foot
    return None


def tick_text(value: float) -> str:
    """Write a round number short: 1,000, 20k, 5M."""
    for least, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / divisor:,.6g}{unit}"
    return f"{value:,.6g}"


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, 20, ... so that they enclose [low, high]; where that would be many, powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3:
        stride = math.ceil((last - first) / 5)
        return [10.0**power for power in range(first, last + stride, stride)]
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1.0, 2.0, 5.0)]
    start = max(index for index, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    stop = min(index for index, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[start : max(stop, start + 1) + 1]


def throughput_images(layout: Layout) -> tuple[bytes, bytes]:
    """Draw a layout with matplotlib, light colours, one pixel of the layout to the point: (PNG, SVG)."""

    def draw() -> Figure:
        chart = layout.chart
        title = f"{chart.title}\n{chart.subtitle}"
        figure, axes = framed_figure(layout, title, chart.x_label, chart.y_label, beside=72)
        lines = []
        for curve in layout.curves:
            color = SERIES_COLORS["light"][curve.series]
            lines += axes.plot(
                [dot.x for dot in curve.dots],
                [dot.y for dot in curve.dots],
                marker="o",
                linestyle=(0, DASHES) if curve.is_predicted else "-",
                color=color,
                markersize=2 * RADIUS,
                markerfacecolor="#ffffff" if curve.is_predicted else color,
                linewidth=1.2,
            )
            for dot in curve.dots:
                axes.text(dot.text_x, dot.text_y, dot.text, ha="center", va="baseline", fontsize=7, color="#17212d")
        add_legend(figure, lines, [curve.name for curve in chart.curves], most=2, loc="outside lower left", fontsize=8)
        return figure

    return images_of(draw)


def curves_in_words(chart: ThroughputChart) -> str:
    """Say the curves in words, for those who do not see them."""
    return " ".join(
        f"{curve.name}: "
        + "; ".join(f"batch {p.batch}, {digits(p.per_user)} and {digits(p.total)}" for p in curve.points)
        + "."
        for curve in chart.curves
    )
