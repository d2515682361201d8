"""Grouped bars and structure strips: laid out for the page's SVG, drawn by matplotlib for files."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engines.report_words import digits, named, shortened
from engines.results import EngineResult, Spread
from engines.structure_strip import TARGET_WIDTH, Strip, roles_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 144
CHARACTERS_PER_INCH = 12.5  # of a picture's texts of 9 points, on average and a little less
KEY_CHARACTERS = 9  # what a colour and its space in a legend take
# For characters that matplotlib's own font lacks, where the system has one of them.
FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei")

SERIES_COLORS = {
    "light": ("#8792a0", "#1f6fb2", "#d2691e", "#128069", "#7d55c7", "#b83b72", "#8a7416", "#4d7f2a"),
    "dark": ("#8b96a5", "#5aa9e6", "#f0964b", "#3fc1a2", "#ab8cf0", "#ee7fae", "#d4b94a", "#8fc266"),
}
STRIP_COLORS = {
    "light": {
        "ffn": "#aab4c0",
        "segment-0": "#0f7a63",
        "segment-1": "#6fc2ab",
        "segment-2": "#2f9c83",
        "segment-3": "#a9dccd",
        "padding": "#dfe3e8",
        "attention": "#a9c4e4",
        "key-value": "#2f5f9a",
        "linear": "#c9a6dd",
        "outline": "#97a1ad",
    },
    "dark": {
        "ffn": "#5c6876",
        "segment-0": "#1c8f76",
        "segment-1": "#8adcc5",
        "segment-2": "#3db398",
        "segment-3": "#c3eee2",
        "padding": "#333c47",
        "attention": "#3d5f88",
        "key-value": "#8fc0f5",
        "linear": "#a57cc0",
        "outline": "#6d7987",
    },
}

LineStyle = Literal["-", "--", ":"]


@dataclass(frozen=True, slots=True)
class Chart:
    """Grouped bars: one group per x, one bar per engine; None where an engine has no cell."""

    file: str
    title: str
    subtitle: str
    x_label: str
    y_label: str
    x: tuple[int, ...]
    bars: tuple[tuple[Spread | None, ...], ...]  # [engines][x]
    ratios: tuple[tuple[str, ...], ...]  # [engines][x] of the bar to the baseline's, in words; empty where it has none


def axis_ticks(largest: float) -> list[float]:
    """Return round numbers from 0 to at least `largest`, about four steps."""
    if largest <= 0:
        return [0.0, 1.0]
    rough = largest / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * (1 - 1e-9))
    return [step * index for index in range(math.ceil(largest / step - 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar in pixels, y downwards; the whisker spans the rounds."""

    series: int
    x: float
    y: float
    width: float
    height: float
    whisker: tuple[float, float] | None
    text: str  # on top, empty where the bars are too narrow
    tooltip: str


CHART_WIDTH, CHART_HEIGHT = 360.0, 230.0
CHART_LEFT, CHART_RIGHT, CHART_TOP, CHART_BOTTOM = 46.0, 6.0, 16.0, 36.0
# Of a bar's value, and between two of them. Where one does not fit its bar, all are shorter; or none is written.
CHARACTER_WIDTH, TEXT_GAP = 5.2, 2.0


def bar_layout(chart: Chart, engines: Sequence[EngineResult]) -> dict[str, Any]:
    """Lay out a chart in a box of CHART_WIDTH x CHART_HEIGHT."""
    plot_width = CHART_WIDTH - CHART_LEFT - CHART_RIGHT
    plot_height = CHART_HEIGHT - CHART_TOP - CHART_BOTTOM
    ticks = axis_ticks(max(bar.high for row in chart.bars for bar in row if bar is not None))

    def y_of(value: float) -> float:
        return CHART_TOP + plot_height * (1 - value / ticks[-1])

    group = plot_width / len(chart.x)
    width = min(0.86 * group / len(engines), 46.0)
    medians = [bar.median for row in chart.bars for bar in row if bar is not None]

    def fits(short: Callable[[float], str]) -> bool:
        return max(len(short(median)) for median in medians) * CHARACTER_WIDTH + TEXT_GAP <= width

    text_of = next((short for short in (_short, _shorter) if fits(short)), lambda value: "")
    bars = []
    for series, (engine, row) in enumerate(zip(engines, chart.bars, strict=True)):
        for index, bar in enumerate(row):
            if bar is None:
                continue
            x = CHART_LEFT + group * (index + 0.5) + width * (series - len(engines) / 2)
            whisker = (y_of(bar.high), y_of(bar.low)) if bar.high > bar.low else None
            bars.append(
                Bar(
                    series=series % len(SERIES_COLORS["light"]),
                    x=x,
                    y=y_of(bar.median),
                    width=0.9 * width,
                    height=y_of(0) - y_of(bar.median),
                    whisker=whisker,
                    text=text_of(bar.median),
                    tooltip=f"{engine.label}, {chart.x_label} {chart.x[index]}: {digits(bar.median)} {chart.y_label}"
                    f" ({digits(bar.low)} to {digits(bar.high)} over the rounds){chart.ratios[series][index]}",
                )
            )
    return {
        "chart": chart,
        "bars": bars,
        "y_ticks": [(y_of(tick), f"{tick:,g}") for tick in ticks],
        "x_ticks": [(CHART_LEFT + group * (i + 0.5), f"{x:,}") for i, x in enumerate(chart.x)],
        "left": CHART_LEFT,
        "right": CHART_WIDTH - CHART_RIGHT,
        "middle": CHART_LEFT + plot_width / 2,
        "bottom": CHART_HEIGHT - CHART_BOTTOM,
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
    }


def _short(value: float) -> str:
    """Write a figure in as many characters as fit a bar: 0.63, 15.9, 1.05k."""
    if 1000 <= value < 1e6:
        return f"{digits(value / 1000)}k"
    return f"{value:.2f}" if 0.1 <= value < 1 else digits(value)


def _shorter(value: float) -> str:
    """Write a figure with two digits where `_short` has three: 0.63, 16, 1.1k."""
    if 1000 <= value < 1e6:
        return f"{_shorter(value / 1000)}k"
    return f"{value:.{int(value < 9.95)}f}" if value >= 1 else _short(value)


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that only itself knows of."""
    from matplotlib.figure import Figure  # without pyplot, which keeps figures in global state

    return Figure(figsize=(width, height), dpi=PNG_DPI, layout="constrained")


def png_of(draw: Callable[[], Figure]) -> bytes:
    """Draw a figure and save it as PNG."""
    return images_of(draw)[0]


def images_of(draw: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """Draw a figure and save it as PNG and as SVG; the same figure gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    settings = matplotlib.rc_context(
        {
            "font.family": ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)],
            "text.parse_math": False,  # labels are anybody's text: a dollar sign in one must not start a formula
            "font.size": 9,
            "hatch.linewidth": 0.6,
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "fuselage",  # ids are drawn at random without one
        }
    )
    with settings, warnings.catch_warnings():
        # A PNG then has a box there; SVG and page, whose text stays text, have the character.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure, png, svg = draw(), io.BytesIO(), io.BytesIO()
        # Not by savefig, which draws twice.
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
        figure.set_layout_engine("none")  # as it was just laid out
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    return png.getvalue(), svg.getvalue()


def chart_images(chart: Chart, engines: Sequence[EngineResult]) -> tuple[bytes, bytes]:
    """Draw a chart: (PNG, SVG)."""

    def draw() -> Figure:
        figure = new_figure(6, 3.6)
        axes = figure.subplots()
        colors = SERIES_COLORS["light"]
        width = 0.8 / len(engines)
        for series, row in enumerate(chart.bars):
            drawn = [(index, bar) for index, bar in enumerate(row) if bar is not None]
            axes.bar(
                [index + width * (series - (len(engines) - 1) / 2) for index, _ in drawn],
                [bar.median for _, bar in drawn],
                width=0.9 * width,
                color=colors[series % len(colors)],
                yerr=[[bar.median - bar.low for _, bar in drawn], [bar.high - bar.median for _, bar in drawn]],
                error_kw={"elinewidth": 0.9, "ecolor": "#333333"},
            )
        axes.set_xticks(range(len(chart.x)), [f"{x:,}" for x in chart.x])
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        axes.set_title(f"{chart.title} ({chart.subtitle})", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, color="#dddddd")
        axes.set_axisbelow(True)
        _legend(figure, [(named(e), colors[i % len(colors)], None, "-") for i, e in enumerate(engines)])
        return figure

    return images_of(draw)


def structure_images(drawings: Sequence[tuple[str, Strip]]) -> tuple[bytes, bytes]:
    """Draw structures below each other, each with its name: (PNG, SVG)."""

    def draw() -> Figure:
        from matplotlib.patches import Rectangle

        strips = [strip for _, strip in drawings]
        width = max(strips[0].width, TARGET_WIDTH)
        inches = 9 / width
        titles = [textwrap.wrap(name, int(9 * CHARACTERS_PER_INCH)) for name, _ in drawings]
        lines = sum(map(len, titles))
        figure = new_figure(9, sum(strip.height * inches for strip in strips) + 0.15 * (lines + len(titles)) + 0.5)
        heights = [strip.height for strip in strips]
        rows = figure.subplots(len(strips), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for title, strip, axes in zip(titles, strips, rows, strict=True):
            axes.set_xlim(0, width)
            axes.set_ylim(strip.bottom, strip.top)
            axes.set_axis_off()
            axes.set_title("\n".join(title), loc="left", fontsize=9)
            for mark in strip.marks:
                face, hatch, style = _look(mark.role)
                axes.add_patch(
                    Rectangle(
                        (mark.x, mark.y),
                        mark.width,
                        mark.height,
                        facecolor=face,
                        hatch=hatch,
                        edgecolor=STRIP_COLORS["light"]["outline"] if face == "none" else face,
                        linestyle=style,
                        linewidth=0.8 if face == "none" else 0,
                    )
                )
            for x, y, text in strip.texts:
                axes.text(x, y, text, ha="center", va="baseline", fontsize=6.5, color="#555555")
        _legend(figure, [(text, *_look(role)) for role, text in roles_of(strips).items()])
        return figure

    return images_of(draw)


def _look(role: str) -> tuple[str, str | None, LineStyle]:
    """Return face color, hatch and line style of a mark."""
    outlined: dict[str, tuple[str | None, LineStyle]] = {
        "dropped": ("////", "-"),
        "no-ffn": ("////", "-"),
        "empty": (None, ":"),
        "parallel": (None, "--"),
    }
    if role in outlined:
        hatch, style = outlined[role]
        return "none", hatch, style
    return STRIP_COLORS["light"][role], None, "-"


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str | None, LineStyle]]) -> None:
    """Put (text, face color, hatch, line style) entries below the figure."""
    from matplotlib.patches import Patch

    outline = STRIP_COLORS["light"]["outline"]
    handles = [
        Patch(facecolor=color, hatch=hatch, linestyle=style, edgecolor=outline if color == "none" else color)
        for _, color, hatch, style in entries
    ]
    add_legend(figure, handles, [text for text, *_ in entries], loc="outside lower center", most=4)


def add_legend(figure: Figure, handles: Sequence[Any], texts: Sequence[str], *, most: int, **options: Any) -> None:
    """Put a legend outside of the axes, in as many columns as fit the figure, at most `most`.

    A text that is wider than the figure is cut.
    """
    room = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
    widths = [len(text) + KEY_CHARACTERS for text in texts]
    fitting = (
        columns
        for columns in range(min(len(texts), most), 1, -1)
        if sum(part.max() for part in np.array_split(widths, columns)) <= room
    )
    columns = next(fitting, 1)
    # Created with plain names first: matplotlib leaves out entries whose label starts with an underscore.
    names = [str(index) for index in range(len(texts))]
    legend = figure.legend(handles, names, ncols=columns, frameon=False, **options)
    for shown, text in zip(legend.get_texts(), texts, strict=True):
        shown.set_text(shortened(text, room - KEY_CHARACTERS))
