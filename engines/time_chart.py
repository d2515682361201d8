"""Where the time of a call went: one stacked bar per engine, and the kernels behind it.

Laid out once, drawn as SVG by the page and by matplotlib for files. Coordinates are pixels, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.charts import CHART_WIDTH, STRIP_COLORS, axis_ticks, images_of, new_figure
from engines.profile import KernelTime, Kind, Profile, Summary
from engines.report_words import digits, joined, named, shortened
from engines.results import EngineResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Part:
    """A part of every bar; `role` is a colour of the structure strips."""

    name: str
    kinds: tuple[Kind, ...]
    role: str
    has_share: bool  # whether the share can be written on its colour


PARTS = (
    Part("Attention", ("attention",), "key-value", True),
    Part("FFN", ("ffn",), "segment-0", True),
    Part("Head", ("lm_head",), "linear", False),
    Part("Norms and the rest", ("norm", "embedding", "other"), "ffn", False),
    Part("Between kernels", ("between",), "padding", False),
)
NOTE = (
    "Profiled runs, apart from those that were timed. A profiler takes some microseconds at every kernel, within the "
    "kernel's time and beside it: a sum here is more than the latency above, and small kernels look longer than they "
    "are, most of all in small models. A bar is one call, taken apart by the sublayer that each kernel belongs to; the "
    "rest is embedding, masks, shapes and what belongs to no sublayer."
)
SUMMARIES: dict[Summary, str] = {
    "kernel_medians": (
        "Each kernel has its median time over the profiled calls, and so has what passed between kernels; the total is "
        "the sum of these medians. It leaves out what interrupted single calls."
    ),
    "median_call": (
        "The call shown is the one of median duration, with whatever interrupted it: where the machine was busy, a "
        "single kernel may dominate it."
    ),
}
TOP_KERNELS = 3
LONGEST_LABEL = 34
LEFT, RIGHT, TOP, ROW, BAR, AXIS = 8.0, 62.0, 4.0, 38.0, 18.0, 34.0  # pixels; RIGHT is room for the total
SHARE_WIDTH = 26.0  # of a written share


@dataclass(frozen=True, slots=True)
class TimeChart:
    """The profiles of one phase at one shape, an engine each."""

    file: str
    title: str
    subtitle: str
    rows: tuple[tuple[EngineResult, Profile], ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar; `share` is empty where it does not fit."""

    part: Part
    x: float
    width: float
    share: str
    tooltip: str


@dataclass(frozen=True, slots=True)
class Row:
    """A bar, the engine's name above it and its total behind it."""

    label: str
    y: float
    segments: tuple[Segment, ...]
    total: str
    total_x: float


@dataclass(frozen=True, slots=True)
class Layout:
    """A chart, as the page draws it."""

    chart: TimeChart
    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, str], ...]
    table: tuple[tuple[Part, tuple[Cell, ...]], ...]  # by part, a cell per engine
    height: float
    width: float = CHART_WIDTH * 2
    bar: float = BAR
    top: float = TOP

    @property
    def bottom(self) -> float:
        return self.height - AXIS


@dataclass(frozen=True, slots=True)
class Cell:
    """What one part took of one call."""

    time: str
    share: str
    kernels: str  # the longest, with their times


def time_charts(engines: Sequence[EngineResult]) -> list[TimeChart]:
    """Gather profiles that can be held against each other: of one phase at one shape; decode first."""
    found: dict[tuple[str, int, int, int], list[tuple[EngineResult, Profile]]] = {}
    for engine in engines:
        for profile in engine.profiles:
            key = profile.phase, profile.batch, profile.tokens, profile.position
            rows = found.setdefault(key, [])
            if all(other is not engine for other, _ in rows):
                rows.append((engine, profile))
    return [
        TimeChart(
            file=f"time_{phase}_batch_{batch}_{max(tokens, position)}.png",
            title=f"One call of {phase}",
            subtitle=f"batch {batch}, {tokens} tokens each"
            if phase == "prefill"
            else f"batch {batch}, after {position} tokens",
            rows=tuple(rows),
        )
        for (phase, batch, tokens, position), rows in sorted(found.items())
    ]


def time_note(charts: Sequence[TimeChart]) -> str:
    """Say what the bars are; where profiles of two kinds are shown, which engines have which."""
    labels: dict[Summary, list[str]] = {}
    for chart in charts:
        for engine, profile in chart.rows:
            labels.setdefault(profile.summary, []).append(engine.label)
    if len(labels) == 1:
        return f"{NOTE} {SUMMARIES[next(iter(labels))]}"
    said = (f"{joined(list(dict.fromkeys(found)))}: {SUMMARIES[summary]}" for summary, found in labels.items())
    return " ".join((NOTE, *said))


def time_layout(chart: TimeChart) -> Layout:
    """Lay out a chart in a box of twice CHART_WIDTH, as high as it has engines."""
    longest = max(profile.total_us for _, profile in chart.rows) / 1000 or 1.0
    width = 2 * CHART_WIDTH - LEFT - RIGHT
    rows = []
    for index, (engine, profile) in enumerate(chart.rows):
        x, segments = LEFT, []
        for part in PARTS:
            taken = _taken(profile, part)
            length = width * taken / 1000 / longest
            share = f"{100 * taken / profile.total_us:.0f} %" if profile.total_us else ""
            fits = part.has_share and length >= SHARE_WIDTH
            tooltip = f"{engine.label}, {part.name.lower()}: {_ms(taken)} ms, {share}"
            segments.append(Segment(part, x, length, share if fits else "", tooltip))
            x += length
        rows.append(
            Row(
                label=shortened(named(engine), LONGEST_LABEL),
                y=TOP + ROW * index,
                segments=tuple(segments),
                total=f"{_ms(profile.total_us)} ms",
                total_x=x + 6,
            )
        )
    return Layout(
        chart=chart,
        rows=tuple(rows),
        ticks=tuple((LEFT + width * tick / longest, f"{tick:,g}") for tick in axis_ticks(longest) if tick <= longest),
        table=tuple((part, tuple(_cell(profile, part) for _, profile in chart.rows)) for part in PARTS),
        height=TOP + ROW * len(chart.rows) + AXIS,
    )


def _taken(profile: Profile, part: Part) -> float:
    return math.fsum(kernel.time_us for kernel in profile.kernels if kernel.kind in part.kinds)


def _cell(profile: Profile, part: Part) -> Cell:
    taken = _taken(profile, part)
    by_name: dict[str, float] = {}
    for kernel in _of(profile, part):
        by_name[kernel.name] = by_name.get(kernel.name, 0.0) + kernel.time_us
    longest = sorted(by_name.items(), key=lambda item: (-item[1], item[0]))[:TOP_KERNELS]
    return Cell(
        time=_ms(taken),
        share=f"{100 * taken / profile.total_us:.0f} %" if profile.total_us else "",
        kernels=", ".join(f"{shortened(name, LONGEST_LABEL)} {_ms(time)}" for name, time in longest),
    )


def _of(profile: Profile, part: Part) -> list[KernelTime]:
    return [kernel for kernel in profile.kernels if kernel.kind in part.kinds]


def _ms(time_us: float) -> str:
    return digits(time_us / 1000)


def time_images(chart: TimeChart) -> tuple[bytes, bytes]:
    """Draw a chart: (PNG, SVG)."""

    def draw() -> Figure:
        from matplotlib.patches import Patch

        figure = new_figure(7.5, 1.3 + 0.42 * len(chart.rows))
        axes = figure.subplots()
        ends = [0.0] * len(chart.rows)
        colors = [STRIP_COLORS["light"][part.role] for part in PARTS]
        for part, color in zip(PARTS, colors, strict=True):
            taken = [_taken(profile, part) / 1000 for _, profile in chart.rows]
            axes.barh(range(len(chart.rows)), taken, left=ends, height=0.6, color=color)
            ends = [end + time for end, time in zip(ends, taken, strict=True)]
        for index, end in enumerate(ends):
            axes.text(end, index, f" {digits(end)}", va="center", fontsize=8)
        names = [shortened(named(engine), LONGEST_LABEL) for engine, _ in chart.rows]
        axes.set_yticks(range(len(chart.rows)), names)
        axes.invert_yaxis()
        axes.set_xlabel("ms per call, profiled")
        axes.set_title(f"{chart.title} ({chart.subtitle})", loc="left", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        handles = [Patch(facecolor=color) for color in colors]
        figure.legend(
            handles, [part.name for part in PARTS], loc="outside lower center", ncols=len(PARTS), frameon=False
        )
        return figure

    return images_of(draw)
