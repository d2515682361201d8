"""Hold the latency model against what was measured, and draw what it says about fusion.

    python benchmarks/latency_model.py

Fits the two constants to the published decode rates (`published_rates.yaml`), and all three to the demo's engines on a
CPU (`results/demo_cpu.json`); writes the figures to `results/latency_model.json` and its charts to `docs/`. Nothing is
measured here, and the same files give the same bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.hardware import read_gpus  # noqa: E402
from engines.latency_fit import (  # noqa: E402
    Fit,
    Observation,
    criterion_for,
    fit_constants,
    leave_one_out,
    read_observations,
)
from engines.latency_model import Deployment, number_format, structure_from_graph  # noqa: E402
from engines.prediction import fit_table, fit_text  # noqa: E402
from engines.prediction_charts import speedup_png, throughput_png, validation_png  # noqa: E402
from engines.what_if import Point, sweep  # noqa: E402
from exporter.read import open_model  # noqa: E402
from exporter.structure import Structure  # noqa: E402
from exporter.writers.files import json_bytes  # noqa: E402

BENCHMARKS = ROOT / "benchmarks"
DOCS = ROOT / "docs"
DATA = ROOT / "tests" / "data"
FUSED = [("Ultra-253B before fusion", "-before-fusion"), ("Ultra-253B", "")]
TP_SIZES = (1, 2, 4, 8, 16)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT = 1024


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    gpus = read_gpus()
    published = read_observations(BENCHMARKS / "published_rates.yaml", gpus)
    cpu = read_gpus(BENCHMARKS / "cpu.yaml")["epyc"]
    demo = read_observations(BENCHMARKS / "results" / "demo_cpu.json", gpus, gpu=cpu)
    figures = {
        "published": validated(published, DOCS / "latency_model_published.png"),
        "demo_cpu": validated(demo),
    }
    models = [(name, ultra(suffix)) for name, suffix in FUSED]
    fp8 = number_format("fp8", dtype="bfloat16")
    places = [
        Deployment(gpu=gpus[gpu], tp_size=n, format=fp8) for gpu in ("h100-sxm", "h200", "b200") for n in TP_SIZES
    ]
    over_tp = sweep(models, places, batches=[1], context=CONTEXT)
    (DOCS / "latency_model_speedup.png").write_bytes(speedup_png(over_tp))
    figures["speedup_over_tp"] = speedups(over_tp)
    figures["speedup_over_tp_if_all_reduce_took"] = {
        f"{factor} times as long": with_other_all_reduces(published, models, factor) for factor in (0, 2)
    }
    llama = structure_from_graph(open_model(DATA / "llama-3.1-405b.config.json", need_weights=False).graph)
    node = Deployment(gpu=gpus["h200"], tp_size=8, format=fp8)
    over_batch = sweep([("Llama-3.1-405B", llama), *models], [node], batches=BATCHES, context=CONTEXT)
    (DOCS / "latency_model_throughput.png").write_bytes(throughput_png(over_batch))
    figures["throughput_over_batch"] = [
        {
            "model": point.model,
            "batch": point.batch,
            "tokens_per_s_per_user": point.prediction.tokens_per_s_per_user,
            "tokens_per_s": point.prediction.tokens_per_s,
            "cost_relative_to_405b": first.prediction.tokens_per_s / point.prediction.tokens_per_s,
        }
        for point, first in zip(over_batch, over_batch[: len(BATCHES)] * 3, strict=True)
    ]
    (BENCHMARKS / "results" / "latency_model.json").write_bytes(json_bytes(figures))


def validated(observations: list[Observation], chart: Path | None = None) -> dict[str, Any]:
    """Fit, print, draw where a chart is wanted, and return the figures."""
    criterion = criterion_for(observations)
    fit, left_out = fit_constants(observations, criterion), leave_one_out(observations, criterion)
    Console(width=120).print(fit_table(observations, fit, left_out), fit_text(fit, left_out), "")
    if chart is not None:
        chart.write_bytes(validation_png(observations, fit, left_out, "Time per token, measured and predicted"))
    return {
        "constants": asdict(fit.constants),
        "fitted": fit.fitted,
        "mean_absolute_error": statistics.fmean(map(abs, fit.errors)),
        "mean_absolute_error_left_out": statistics.fmean(map(abs, left_out)),
        "observations": observed(observations, fit, left_out),
    }


def observed(observations: list[Observation], fit: Fit, left_out: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "measured_ms": one.latency_us / 1000,
            "predicted_ms": one.latency_us / 1000 * (1 + error),
            "error": error,
            "error_left_out": other,
        }
        for one, error, other in zip(observations, fit.errors, left_out, strict=True)
    ]


def speedups(points: list[Point]) -> list[dict[str, Any]]:
    half = len(points) // 2
    return [
        {
            "gpu": after.deployment.gpu.name,
            "tp_size": after.deployment.tp_size,
            "speedup": before.prediction.latency_us / after.prediction.latency_us,
        }
        for before, after in zip(points[:half], points[half:], strict=True)
    ]


def with_other_all_reduces(
    published: list[Observation], models: list[tuple[str, Structure]], factor: float
) -> dict[str, Any]:
    """Fit again with all-reduces that take `factor` times as long, and predict the speed-up on H100."""

    def changed(deployment: Deployment) -> Deployment:
        links = tuple(
            link.model_copy(
                update={
                    "all_reduce_us": {n: (factor * a, factor * b) for n, (a, b) in link.all_reduce_us.items()},
                }
            )
            for link in deployment.gpu.links
        )
        return replace(deployment, gpu=deployment.gpu.model_copy(update={"links": links}))

    observations = [replace(one, deployment=changed(one.deployment)) for one in published]
    fit = fit_constants(observations)
    place = replace(observations[0].deployment, constants=fit.constants)
    points = sweep(models, [replace(place, tp_size=n) for n in TP_SIZES], batches=[1], context=CONTEXT)
    return {
        "constants": asdict(fit.constants),
        "largest_error": fit.loss("largest"),
        "speedup_over_tp": speedups(points),
    }


def ultra(suffix: str) -> Structure:
    return structure_from_graph(
        open_model(DATA / f"nemotron-ultra-253b{suffix}.structure.json", need_weights=False).graph
    )


if __name__ == "__main__":
    main()
