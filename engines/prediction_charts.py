"""Predictions as PNG: speed-up over tensor-parallel size, throughput over latency, and predicted beside measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from engines.charts import SERIES_COLORS, new_figure, png_of
from engines.latency_fit import Fit, Observation
from engines.what_if import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = SERIES_COLORS["light"]
PREDICTED = "predicted, not measured"
Key = tuple[str, str]  # (model, GPU)


def prediction_charts(points: Sequence[Point]) -> Iterator[tuple[str, bytes]]:
    """Yield (file name, PNG) of the charts that the points are enough for."""
    tp_sizes = {point.deployment.tp_size for point in points}
    models = {point.model for point in points}
    if len(tp_sizes) > 1 and len(models) > 1:
        yield "speedup_over_tp.png", speedup_png(points)
    if len({point.batch for point in points if point.memory.fits}) > 1:
        yield "throughput.png", throughput_png(points)


def speedup_png(points: Sequence[Point]) -> bytes:
    """Draw how many times as fast as the first model the others decode, by tensor-parallel size, at the least batch."""
    batch = min(point.batch for point in points)
    latency = {
        (point.model, point.deployment.gpu.name, point.deployment.tp_size): point.prediction.latency_us
        for point in points
        if point.batch == batch
    }
    first = points[0].model
    series: dict[Key, list[tuple[int, float]]] = {}
    for (model, gpu, tp_size), us in latency.items():
        if model != first:
            series.setdefault((model, gpu), []).append((tp_size, latency[first, gpu, tp_size] / us))

    def draw() -> Figure:
        figure = new_figure(6, 3.6)
        axes = figure.subplots()
        for (model, gpu), line in series.items():
            _line(axes, sorted(line), f"{model}, {gpu}", len(axes.lines))
        sizes = sorted({tp_size for _, _, tp_size in latency})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("tensor-parallel size")
        axes.set_ylabel("speed-up")
        axes.grid(axis="y", color="#dddddd", linewidth=0.5)
        figure.legend(loc="outside lower left", frameon=False, fontsize=8)
        _finish(axes, f"Decode rate at batch {batch} over that of {first}\n({PREDICTED})")
        return figure

    return png_of(draw)


def throughput_png(points: Sequence[Point]) -> bytes:
    """Draw tokens/s per GPU over tokens/s of one user, a line per model and deployment, without what does not fit."""
    series: dict[Key, list[Point]] = {}
    for point in points:
        if point.memory.fits:
            series.setdefault((point.model, point.deployment.name), []).append(point)

    def draw() -> Figure:
        figure = new_figure(6, 3.8)
        axes = figure.subplots()
        for (model, place), line in series.items():
            ordered = sorted(line, key=lambda point: point.batch)
            xy = [
                (p.prediction.tokens_per_s_per_user, p.prediction.tokens_per_s / p.deployment.tp_size) for p in ordered
            ]
            _line(axes, xy, f"{model}, {place}", len(axes.lines))
            for point, (x, y) in zip(ordered, xy, strict=True):
                axes.annotate(str(point.batch), (x, y), (4, 3), textcoords="offset points", fontsize=6, color="#5a6775")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.grid(axis="y", color="#dddddd", linewidth=0.5)
        axes.set_xlabel("tokens/s of one user")
        axes.set_ylabel("tokens/s per GPU")
        figure.legend(loc="outside lower left", frameon=False, fontsize=8)
        _finish(axes, f"Throughput and latency, batch size beside every point\n({PREDICTED})")
        return figure

    return png_of(draw)


def validation_png(observations: Sequence[Observation], fit: Fit, left_out: Sequence[float], title: str) -> bytes:
    """Draw measured and predicted latencies side by side, with the errors beside the names."""

    def draw() -> Figure:
        figure = new_figure(7, 0.9 + 0.55 * len(observations))
        axes = figure.subplots()
        rows = range(len(observations))
        measured = [one.latency_us / 1000 for one in observations]
        predicted = [ms * (1 + error) for ms, error in zip(measured, fit.errors, strict=True)]
        axes.barh([row - 0.19 for row in rows], measured, 0.36, color=COLORS[0], label="measured")
        axes.barh([row + 0.19 for row in rows], predicted, 0.36, color=COLORS[1], label="predicted")
        for row, one, error, other in zip(rows, observations, fit.errors, left_out, strict=True):
            text = f"{100 * error:+.1f} % (left out: {100 * other:+.1f} %)"
            axes.text(one.latency_us / 1000 * (1 + max(0, error)), row, f"  {text}", va="center", fontsize=8)
        axes.set_yticks(rows, [one.name for one in observations])
        axes.set_ylim(len(observations) - 0.5, -0.5)
        axes.set_xlim(0, 1.4 * max(measured))
        axes.set_xlabel("ms")
        axes.legend(frameon=False, fontsize=8)
        _finish(axes, title)
        return figure

    return png_of(draw)


def _line(axes: Axes, xy: Sequence[tuple[float, float]], label: str, series: int) -> None:
    color, style = COLORS[1 + series % (len(COLORS) - 1)], ("-", "--", ":")[series // (len(COLORS) - 1) % 3]
    axes.plot([x for x, _ in xy], [y for _, y in xy], style, color=color, marker="o", markersize=4, label=label)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
