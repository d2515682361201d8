"""What charts of points have in common: the box they are laid out in, round ticks, and axes drawn by matplotlib.

Coordinates are pixels, y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.charts import CHART_BOTTOM, CHART_HEIGHT, CHART_LEFT, CHART_TOP, CHART_WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 1e300  # a results file may claim any finite number; sums of these are finite too
RIGHT = 18.0  # room for half of the last number below

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The axes of a chart in a box of CHART_WIDTH x CHART_HEIGHT; a tick is its place and its text."""

    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    left: float = CHART_LEFT
    right: float = CHART_WIDTH - RIGHT
    top: float = CHART_TOP
    bottom: float = CHART_HEIGHT - CHART_BOTTOM
    width: float = CHART_WIDTH
    height: float = CHART_HEIGHT

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2


def across(value: float, low: float, high: float) -> float:
    """Where a value lies on a horizontal axis from `low` to `high`."""
    return CHART_LEFT + (CHART_WIDTH - RIGHT - CHART_LEFT) * (min(value, MOST) - low) / (high - low)


def upwards(value: float, low: float, high: float) -> float:
    """Where a value lies on a vertical axis from `low`, at the foot, to `high`."""
    foot = CHART_HEIGHT - CHART_BOTTOM
    return foot - (foot - CHART_TOP) * (min(value, MOST) - low) / (high - low)


def ticks_between(low: float, high: float) -> list[float]:
    """Return about four round numbers that enclose [low, high]; the axis need not begin at 0."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    magnitude = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= span / 4 * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, max(last, first + 1) + 1)]


def framed_figure(frame: Frame, title: str, x_label: str, y_label: str, *, beside: float) -> tuple[Figure, Axes]:
    """Make a figure with the axes of a frame drawn, light colours, one pixel of the frame to the point.

    Args:
        beside: pixels of height for the title and what else stands outside of the frame.
    """
    figure = new_figure(frame.width / 72, (frame.height + beside) / 72)
    axes = figure.subplots()
    axes.set_xlim(0, frame.width)
    axes.set_ylim(frame.height, 0)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=8)
    text: dict[str, Any] = {"fontsize": 8, "color": "#5a6775"}
    for y, label in frame.y_ticks:
        axes.plot([frame.left, frame.right], [y, y], color="#dddddd", linewidth=0.5)
        axes.text(frame.left - 6, y, label, ha="right", va="center", **text)
    for x, label in frame.x_ticks:
        axes.text(x, frame.bottom + 15, label, ha="center", va="baseline", **text)
    axes.plot([frame.left, frame.right], [frame.bottom, frame.bottom], color="#97a1ad", linewidth=0.8)
    axes.text(frame.middle, frame.bottom + 31, x_label, ha="center", va="baseline", **text)
    axes.text(frame.left, frame.top - 6, y_label, ha="left", va="baseline", **text)
    return figure, axes
