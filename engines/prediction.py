"""Predictions as tables for a terminal and as JSON. Everything here says that it is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from engines.latency_fit import Fit, Observation
from engines.latency_model import Constants, Deployment, NumberFormat, largest_batch, largest_context
from engines.what_if import Gain, Point
from exporter.structure import Structure

PREDICTION_SCHEMA: Final = 1
FITS = {True: "yes", False: "no"}


def assumptions(number: NumberFormat, constants: Constants, context: int) -> Text:
    """What the predictions rest on, in a few lines."""
    return Text(
        f"Predicted, not measured: {number.name}, KV cache in {number.kv_dtype}, {context:,} tokens of context.\n"
        f"Constants: {100 * constants.memory_efficiency:.1f} % of the memory rate, "
        f"{constants.sublayer_us:.1f} us per sequential sublayer, "
        f"{100 * constants.compute_efficiency:.0f} % of the rate of matrix products.\n"
        f"Prefill: {context:,} tokens per sequence. Most sequences: at this context. Longest: context at this batch.",
        style="dim",
    )


def points_table(points: Sequence[Point], price_per_gpu_hour: float | None = None) -> Table:
    """One row per point: times and rates, whether it fits the GPU's memory, and what it is over the first model."""
    first = {(p.deployment.name, p.batch): p.prediction.latency_ms for p in points if p.model == points[0].model}
    has_others = any(point.model != points[0].model for point in points)
    table = _table("model", "on")
    for name in ("batch", "decode ms", "tokens/s\nper user", "tokens/s", "prefill ms", "fits"):
        table.add_column(name, justify="right")
    if has_others:
        table.add_column("decodes\nfaster", justify="right")
    if price_per_gpu_hour is not None:
        table.add_column("per million\ntokens", justify="right")
    for point in points:
        decode = point.prediction
        row = [
            point.model,
            point.deployment.name,
            f"{point.batch:,}",
            f"{decode.latency_ms:.2f}",
            f"{decode.tokens_per_s_per_user:,.2f}",
            f"{decode.tokens_per_s:,.0f}",
            f"{point.prefill.latency_ms:,.1f}",
            FITS[point.memory.fits],
        ]
        if has_others:
            faster = first[point.deployment.name, point.batch] / decode.latency_ms
            row.append("" if point.model == points[0].model else f"{faster:.2f}×")
        if price_per_gpu_hour is not None:
            row.append(f"{point.cost_per_million_tokens(price_per_gpu_hour):,.2f}")
        table.add_row(*row, style="" if point.memory.fits else "dim")
    return table


def parts_table(points: Sequence[Point]) -> Table:
    """One row per point: where the time of a decode step goes, in ms."""
    table = _table("decode step", "on")
    for name in ("batch", "memory", "compute", "sublayers", "all-reduce", "ms"):
        table.add_column(name, justify="right")
    for point in points:
        parts = (f"{ms:.2f}" for ms in point.prediction.parts_ms().values())
        total = f"{point.prediction.latency_ms:.2f}"
        table.add_row(point.model, point.deployment.name, f"{point.batch:,}", *parts, total)
    return table


def memory_table(models: Sequence[tuple[str, Structure]], points: Sequence[Point], context: int) -> Table:
    """One row per point: what fills a GPU's memory, in GiB, and what would still fit."""
    table = _table("GiB of a GPU", "on")
    for name in ("batch", "weights", "KV\ncache", "activations", "usable", "most\nsequences", "longest"):
        table.add_column(name, justify="right", no_wrap=True)
    structures = dict(models)
    for point in points:
        structure, memory = structures[point.model], point.memory
        sizes = (memory.weight_bytes, memory.kv_bytes, memory.activation_bytes, memory.usable_bytes)
        table.add_row(
            point.model,
            point.deployment.name,
            f"{point.batch:,}",
            *(f"{nbytes / 2**30:.2f}" for nbytes in sizes),
            f"{largest_batch(structure, point.deployment, context):,}",
            f"{largest_context(structure, point.deployment, point.batch):,}",
        )
    return table


def gains_table(gains: Sequence[Gain], deployments: Sequence[Deployment]) -> Table:
    """One row per deployment and line of a plan: what the line takes off a decode step, in us and percent."""
    table = _table("line of the plan", "on")
    for name in ("sublayers", "decode us", "decode %"):
        table.add_column(name, justify="right")
    for index, deployment in enumerate(deployments):
        for gain in gains:
            saved = f"-{gain.saved_us[index]:,.0f}", f"-{100 * gain.saved_share[index]:.1f}"
            table.add_row(gain.what, deployment.name, f"-{gain.sublayers_saved}", *saved)
    return table


def fit_table(observations: Sequence[Observation], fit: Fit, left_out: Sequence[float]) -> Table:
    """One row per measured latency: what the fitted constants predict, and what those of the others alone would."""
    table = _table("measured", "on")
    for name in ("ms", "predicted", "error %", "left out %"):
        table.add_column(name, justify="right")
    for one, error, other in zip(observations, fit.errors, left_out, strict=True):
        table.add_row(
            one.name,
            one.deployment.name,
            f"{one.latency_us / 1000:.3f}",
            f"{one.latency_us / 1000 * (1 + error):.3f}",
            f"{100 * error:+.2f}",
            f"{100 * other:+.2f}",
        )
    return table


def fit_text(fit: Fit, left_out: Sequence[float]) -> str:
    """The fitted constants, and how far off they are, in two lines."""
    constants = asdict(fit.constants)
    outside = [abs(error) for error in left_out]
    shown = ", ".join(f"{name} {constants[name]:.4g}" for name in fit.fitted)
    return (
        f"Fitted: {shown}\nError: mean {100 * fit.loss('sum') / len(fit.errors):.2f} %,"
        f" largest {100 * fit.loss('largest'):.2f} %;"
        f" each left out of its fit: mean {100 * sum(outside) / len(outside):.2f} %, largest {100 * max(outside):.2f} %"
    )


def prediction_json(
    points: Sequence[Point],
    gains: Sequence[Gain],
    deployments: Sequence[Deployment],
    *,
    price_per_gpu_hour: float | None,
) -> dict[str, Any]:
    """All figures as plain JSON data.

    Args:
        deployments: those that the gains are for, in their order.
    """
    return {
        "prediction_schema": PREDICTION_SCHEMA,
        "kind": "predicted",
        "points": [_point_entry(point, price_per_gpu_hour) for point in points],
        "gains": [
            {
                "line": gain.what,
                "sublayers_saved": gain.sublayers_saved,
                "on": [
                    {"gpu": placed.gpu.name, "tp_size": placed.tp_size, "saved_us": us, "saved_share": share}
                    for placed, us, share in zip(deployments, gain.saved_us, gain.saved_share, strict=True)
                ],
            }
            for gain in gains
        ],
    }


def _point_entry(point: Point, price_per_gpu_hour: float | None) -> dict[str, Any]:
    decode, deployment, memory = point.prediction, point.deployment, point.memory
    return {
        "model": point.model,
        "gpu": deployment.gpu.name,
        "tp_size": deployment.tp_size,
        "format": deployment.format.name,
        "kv_dtype": deployment.format.kv_dtype.name,
        "constants": asdict(deployment.constants),
        "batch": point.batch,
        "context": decode.tokens.context,
        "decode_ms": decode.latency_ms,
        "decode_parts_ms": decode.parts_ms(),
        "tokens_per_s_per_user": decode.tokens_per_s_per_user,
        "tokens_per_s": decode.tokens_per_s,
        "prefill_ms": point.prefill.latency_ms,
        "memory_per_gpu_bytes": {**asdict(memory), "total_bytes": memory.total_bytes},
        "fits": memory.fits,
        "cost_per_million_tokens": None
        if price_per_gpu_hour is None
        else point.cost_per_million_tokens(price_per_gpu_hour),
    }


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, overflow="fold")
    return table
