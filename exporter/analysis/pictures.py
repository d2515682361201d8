"""Pictures of what was measured: the dependency heat map of the paper's figure 3, and importance bars."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 144
SMALLEST = 1e-6  # of the colour scale: below it a distance is float32 noise


def heat_map(
    matrix: np.ndarray,
    labels: Sequence[str],
    *,
    title: str,
    hatched: Collection[int] = (),
    groups: Sequence[tuple[int, int]] = (),
) -> bytes:
    """Draw a dependency matrix as PNG, colours on a logarithmic scale.

    Args:
        matrix: [n, n] distances, row i removed, column j compared; NaN is left white.
        labels: source layers of the n blocks.
        hatched: indices of blocks without attention.
        groups: (first, last) indices of fused groups, framed.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    count = len(matrix)
    figure = _figure(max(5.0, 1.6 + 0.16 * count), max(4.2, 1.1 + 0.16 * count))
    axes = figure.subplots()
    known = matrix[np.isfinite(matrix) & (matrix > SMALLEST)]
    low, high = (known.min(), known.max()) if known.size else (SMALLEST, 1.0)
    shown = np.where(np.isfinite(matrix), np.maximum(matrix, low), np.nan)
    norm = LogNorm(low, max(high, low * 10))
    image = axes.imshow(shown, norm=norm, cmap="viridis", interpolation="nearest", aspect="equal")
    bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("cosine distance (small: independent)", fontsize=8)
    for index in hatched:
        axes.add_patch(
            Rectangle((-0.5, index - 0.5), count, 1, fill=False, hatch="////", linewidth=0, edgecolor="#00000030")
        )
    for first, last in groups:
        size = last - first + 1
        axes.add_patch(
            Rectangle((first - 0.5, first - 0.5), size, size, fill=False, edgecolor="#e4572e", linewidth=1.8)
        )
    ticks = list(range(0, count, max(1, math.ceil(count / 24))))
    axes.set_xticks(ticks, [labels[tick] for tick in ticks], fontsize=7, rotation=90 if count > 12 else 0)
    axes.set_yticks(ticks, [labels[tick] for tick in ticks], fontsize=7)
    axes.set_xlabel("layer whose contribution is compared")
    axes.set_ylabel("layer removed")
    axes.set_title(title, loc="left", fontsize=10)
    notes = ["hatched: without attention"] * bool(hatched) + ["framed: fused"] * bool(groups)
    if notes:
        axes.text(0.02, 0.02, "\n".join(notes), transform=axes.transAxes, ha="left", va="bottom", fontsize=7)
    return _png(figure)


def importance_bars(importance: Mapping[Any, np.ndarray], labels: Sequence[str], *, what: str) -> bytes:
    """Draw how much the output changes without each part as PNG, one panel per kind.

    Args:
        importance: kind -> [n], NaN where a block has no such part.
        labels: source layers of the n blocks.
        what: the measure, with its unit.
    """
    figure = _figure(max(6.0, 0.9 + 0.19 * len(labels)), 0.7 + 1.7 * len(importance))
    panels = figure.subplots(len(importance), sharex=True, squeeze=False)[:, 0]
    for axes, (kind, values) in zip(panels, importance.items(), strict=True):
        axes.bar(range(len(values)), np.nan_to_num(values), color="#1f6fb2", width=0.8)
        if np.nanmax(values, initial=0.0) > 0:
            axes.set_yscale("log")
        for index in np.flatnonzero(np.isnan(values)):
            axes.axvspan(index - 0.4, index + 0.4, color="none", hatch="////", ec="#cccccc", lw=0)
        axes.set_title(f"without the {kind}", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=7)
    panels[-1].set_xticks(range(len(labels)), labels, rotation=90 if len(labels) > 16 else 0, fontsize=7)
    panels[-1].set_xlabel("layer")
    figure.supylabel(what, fontsize=9)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which keeps figures in global state
    return figure


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return stream.getvalue()
