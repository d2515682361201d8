"""Pictures of what was measured: the dependency heat map of the paper's figure 3, and importance bars."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from exporter.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 144
SMALLEST = 1e-6  # of the colour scale: below it a distance is float32 noise
TITLES = {"block": "blocks", "attention": "attentions", "ffn": "FFNs"}
FRAME = "#f0563f"

Theme = Literal["light", "dark"]
Form = Literal["png", "svg"]


@dataclass(frozen=True, slots=True)
class Colors:
    """Of one theme, the same as the report's cards."""

    card: str
    ink: str
    rule: str
    hatch: str
    bar: str


THEMES: dict[Theme, Colors] = {
    "light": Colors(card="#ffffff", ink="#17212d", rule="#97a1ad", hatch="#00000040", bar="#1f6fb2"),
    "dark": Colors(card="#161c23", ink="#e4e9ef", rule="#6d7987", hatch="#ffffff40", bar="#5aa9e6"),
}


class Measured(Protocol):
    """What of `exporter.analysis.dependency.Dependency` is drawn; n blocks, NaN where nothing was measured."""

    @property
    def source_layers(self) -> Sequence[Sequence[int]]: ...  # of every block of the graph that was measured
    @property
    def first(self) -> int: ...  # the n blocks are [first, last], indices in graph.blocks
    @property
    def last(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def matrices(self) -> Mapping[Any, np.ndarray]: ...  # kind -> [n, n], row i removed, column j compared
    @property
    def importance(self) -> Mapping[Any, np.ndarray]: ...  # kind -> [n], what the last hidden state loses
    @property
    def kl(self) -> Mapping[Any, np.ndarray]: ...  # kind -> [n], what the logits lose


class Draw(Protocol):
    """Gives the bytes of a picture."""

    def __call__(self, theme: Theme, form: Form = "png") -> bytes: ...


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file and what it shows."""

    file: str
    title: str
    draw: Draw


def pictures_of(measured: Measured, plan: Plan) -> Iterator[Picture]:
    """Yield the heat map of every kind of part, then the importance of the parts.

    Args:
        measured: importance of attentions, where it was measured, tells which blocks have none.
        plan: what it drops is hatched, what it fuses is framed; other layers than the measured ones are left out.
    """
    blocks = [measured.source_layers[index] for index in range(measured.first, measured.last + 1)]
    labels = [str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}" for layers in blocks]
    dropped = set(plan.dropped_layers)
    without = np.isnan(measured.importance.get("attention", np.zeros(len(blocks))))
    bare = [position for position, layers in enumerate(blocks) if dropped & set(layers) or without[position]]
    position_of = {layer: position for position, layers in enumerate(blocks) for layer in layers}
    groups = [
        (position_of[first], position_of[last])
        for first, last in plan.fuse
        if first in position_of and last in position_of
    ]

    def map_of(kind: str, title: str) -> Draw:
        def draw(theme: Theme, form: Form = "png") -> bytes:
            matrix = measured.matrices[kind]
            return heat_map(matrix, labels, title=title, hatched=bare, groups=groups, theme=theme, form=form)

        return draw

    def bars_of(values: np.ndarray, title: str, what: str) -> Draw:
        def draw(theme: Theme, form: Form = "png") -> bytes:
            return importance_bars(values, labels, title=title, what=what, theme=theme, form=form)

        return draw

    for kind, parts in TITLES.items():
        if kind in measured.matrices:
            title = f"Dependency of {parts}, {measured.tokens:,} tokens"
            yield Picture(f"dependency_{kind}.png", title, map_of(kind, title))
    for prefix, importance, what in (
        ("importance", measured.importance, "cosine distance of the output"),
        ("importance_kl", measured.kl, "KL divergence, nats per token"),
    ):
        for kind, parts in TITLES.items():
            if kind in importance:
                title = f"Importance of {parts}"
                yield Picture(f"{prefix}_{kind}.png", f"{title}: {what}", bars_of(importance[kind], title, what))


def heat_map(
    matrix: np.ndarray,
    labels: Sequence[str],
    *,
    title: str,
    hatched: Collection[int] = (),
    groups: Sequence[tuple[int, int]] = (),
    theme: Theme = "light",
    form: Form = "png",
) -> bytes:
    """Draw a dependency matrix, colours on a logarithmic scale.

    Args:
        matrix: [n, n] distances, row i removed, column j compared; NaN is left empty.
        labels: source layers of the n blocks.
        hatched: indices of blocks without attention.
        groups: (first, last) indices of fused groups, framed.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    colors = THEMES[theme]
    count = len(matrix)
    known = matrix[np.isfinite(matrix) & (matrix > SMALLEST)]
    low, high = (known.min(), known.max()) if known.size else (SMALLEST, 1.0)
    shown = np.where(np.isfinite(matrix), np.maximum(matrix, low), np.nan)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        norm = LogNorm(low, max(high, low * 10))
        image = axes.imshow(shown, norm=norm, cmap="viridis", interpolation="nearest", aspect="equal")
        bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
        bar.set_label("cosine distance (small: independent)")
        for index in hatched:
            place = (-0.5, index - 0.5)
            axes.add_patch(Rectangle(place, count, 1, fill=False, hatch="////", linewidth=0, edgecolor=colors.hatch))
        for first, last in groups:
            size = last - first + 1
            axes.add_patch(
                Rectangle((first - 0.5, first - 0.5), size, size, fill=False, edgecolor=FRAME, linewidth=1.8)
            )
        ticks = list(range(0, count, max(1, math.ceil(count / 24))))
        axes.set_xticks(ticks, [labels[tick] for tick in ticks], rotation=90 if count > 12 else 0)
        axes.set_yticks(ticks, [labels[tick] for tick in ticks])
        notes = ["hatched: without attention"] * bool(hatched) + ["framed: fused"] * bool(groups)
        axes.set_xlabel("\n".join(["layer whose contribution is compared", "; ".join(notes)]).strip())
        axes.set_ylabel("layer removed")
        axes.set_title(title, loc="left")

    return _image(draw, (_width(count), _width(count) - 0.5), colors, form)


def importance_bars(
    importance: np.ndarray,
    labels: Sequence[str],
    *,
    title: str,
    what: str,
    theme: Theme = "light",
    form: Form = "png",
) -> bytes:
    """Draw how much the output changes without each part, on a logarithmic scale.

    Args:
        importance: [n], NaN where a block has no such part.
        labels: source layers of the n blocks.
        what: the measure, with its unit.
    """
    from matplotlib.ticker import NullFormatter

    colors = THEMES[theme]
    known = importance[np.isfinite(importance) & (importance > SMALLEST)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(range(len(importance)), np.nan_to_num(importance), color=colors.bar, width=0.8)
        if known.size:
            axes.set_yscale("log")
            low, high = math.floor(math.log10(known.min())), math.ceil(math.log10(known.max()))
            axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
            axes.yaxis.set_minor_formatter(NullFormatter())
        for index in np.flatnonzero(np.isnan(importance)):
            axes.axvspan(index - 0.4, index + 0.4, color="none", hatch="////", ec=colors.hatch, lw=0)
        axes.spines[["top", "right"]].set_visible(False)
        ticks = list(range(0, len(labels), max(1, math.ceil(len(labels) / 24))))
        axes.set_xticks(ticks, [labels[tick] for tick in ticks], rotation=90 if len(labels) > 12 else 0)
        axes.set_xlabel("layer removed")
        axes.set_ylabel(what)
        axes.set_title(title, loc="left")

    return _image(draw, (_width(len(labels)), 2.2), colors, form)


def error_bars(errors: Sequence[tuple[str, float]], *, title: str, count: int = 30, theme: Theme = "light") -> bytes:
    """Draw the relative output errors of the worst linears as PNG.

    Args:
        errors: (name, error), the worst first; what is beyond `count` is left out, and said so.
    """
    colors = THEMES[theme]
    shown = errors[:count]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh(range(len(shown)), [100 * error for _, error in shown], color=colors.bar, height=0.75)
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.invert_yaxis()
        axes.set_xlabel("output error, % of the output's L2 norm")
        left_out = f"; the worst {len(shown)} of {len(errors)} linears" if len(shown) < len(errors) else ""
        axes.set_title((title + left_out).replace("$", r"\$"), loc="left")  # of a file's name, and no formula
        axes.spines[["top", "right"]].set_visible(False)

    return _image(draw, (6.4, 0.9 + 0.19 * max(1, len(shown))), colors, "png")


def _width(count: int) -> float:
    """Inches for so many blocks; the least is what a phone shows at about this size."""
    return max(3.8, 1.6 + 0.06 * count)


def _image(draw: Callable[[Figure], None], inches: tuple[float, float], colors: Colors, form: Form) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stream = io.BytesIO()
    with matplotlib.rc_context(
        {
            "font.size": 8,
            "axes.titlesize": 9,
            "hatch.linewidth": 0.6,
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "fuselage",  # ids are drawn at random without one
            "figure.facecolor": colors.card,
            "axes.facecolor": colors.card,
            "axes.edgecolor": colors.rule,
            "xtick.color": colors.rule,
            "ytick.color": colors.rule,
            "text.color": colors.ink,
            "axes.labelcolor": colors.ink,
            "xtick.labelcolor": colors.ink,
            "ytick.labelcolor": colors.ink,
        }
    ):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)  # without pyplot, which keeps figures in global state
        draw(figure)
        when_and_by_what = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
        figure.savefig(stream, format=form, dpi=PNG_DPI, metadata=when_and_by_what[form])
    return stream.getvalue()
