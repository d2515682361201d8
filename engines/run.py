"""Running a recipe: one folder per step, finished steps kept.

OUTPUT/<variant>/checkpoint     Hugging Face folder, where the plan changes the model and the recipe wants one
OUTPUT/<variant>/network        network definition
OUTPUT/<variant>/engine         engine
OUTPUT/results                  results.json of the benchmark
OUTPUT/report                   report.html, report.md, pictures
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines.backends import backend_named
from engines.bench import Progress as BenchProgress
from engines.bench import bench_engines, request_grid
from engines.machine import cpus_for
from engines.report import report_from_results
from engines.results import json_from_results
from exporter.dtypes import BY_NAME
from exporter.pipeline import Step, apply_plan, checkpoint_writing, network_writing, run_step, save, source_fingerprint
from exporter.read import Checkpoint, open_model
from exporter.recipe import BenchRecipe, Recipe, VariantRecipe
from exporter.writers.files import Manifest, check_folder, save_folder
from exporter.writers.onnx import options_for

Notify = Callable[[str, bool], None]  # (step, whether it was made now; False: it was there already)
RESULTS_FILE = "results.json"


def run_recipe(
    recipe: Recipe, output: Path, *, notify: Notify | None = None, bench_progress: BenchProgress | None = None
) -> Path:
    """Carry out a recipe; returns the report's folder (the output folder if the recipe has no benchmark).

    Every plan is applied to the model's structure before the first file is written, so that a plan that does not fit
    is known at once. Steps that are complete and whose inputs are the same are not repeated.

    Raises:
        FuselageError: of the step that failed; the steps before it stay.
    """
    tell = notify if notify is not None else lambda step, made: None
    source = open_model(recipe.model, need_weights=True)
    graphs = {variant.name: apply_plan(source.graph, variant.plan, norm=variant.norm) for variant in recipe.variants}
    source_key = source_fingerprint(recipe.model)
    engines: list[tuple[Path, Manifest]] = []
    for variant in recipe.variants:
        folder = output / variant.name
        origin, graph, origin_key = source, graphs[variant.name], source_key
        if variant.checkpoint and graph is not source.graph:
            step = _checkpoint_step(variant, folder / "checkpoint", source, graph, source_key)
            origin_key = {"manifest": _done(step, tell).fingerprint}
            origin = open_model(step.folder, need_weights=True)
            graph = origin.graph
        network = _done(_network_step(recipe, variant, folder / "network", origin, graph, origin_key), tell)
        step = _engine_step(variant, folder / "engine", folder / "network", network)
        engines.append((step.folder, _done(step, tell)))
    if recipe.bench is None:
        return output
    step = _bench_step(recipe.bench, output / "results", engines, bench_progress)
    step = _report_step(recipe, output / "report", step.folder, _done(step, tell))
    _done(step, tell)
    return step.folder


def _done(step: Step, tell: Notify) -> Manifest:
    manifest, made = run_step(step)
    tell(step.name, made)
    return manifest


def _checkpoint_step(
    variant: VariantRecipe, folder: Path, source: Checkpoint, graph: Any, source_key: Mapping[str, Any]
) -> Step:
    plan = variant.plan.model_dump(mode="json")

    def make(details: Mapping[str, Any]) -> None:
        details = {**details, "plan": plan, "norm": variant.norm}
        save(checkpoint_writing(source, graph, folder, details=details, force=True))

    inputs = {"source": source_key, "plan": plan, "norm": variant.norm}
    return Step(name=f"{variant.name}: checkpoint", folder=folder, kind="checkpoint", inputs=inputs, make=make)


def _network_step(
    recipe: Recipe, variant: VariantRecipe, folder: Path, origin: Checkpoint, graph: Any, origin_key: Mapping[str, Any]
) -> Step:
    wanted = recipe.network
    options = options_for({wanted.target: BY_NAME[wanted.dtype]}, max_positions=wanted.max_positions)

    def make(details: Mapping[str, Any]) -> None:
        save(network_writing(origin, graph, folder, options=options, details=details, force=True))

    inputs = {
        "source": origin_key,
        "plan": variant.plan.model_dump(mode="json"),
        "norm": variant.norm,
        "network": wanted.model_dump(mode="json"),
    }
    return Step(name=f"{variant.name}: network", folder=folder, kind="network", inputs=inputs, make=make)


def _engine_step(variant: VariantRecipe, folder: Path, network_folder: Path, network: Manifest) -> Step:
    backend = backend_named("onnxruntime")

    def make(details: Mapping[str, Any]) -> None:
        backend.build(network_folder, folder, label=variant.name, details=details, force=True)

    inputs = {"network": network.fingerprint, "label": variant.name, "backend": backend.name}
    return Step(name=f"{variant.name}: engine", folder=folder, kind="engine", inputs=inputs, make=make)


def _bench_step(
    bench: BenchRecipe, folder: Path, engines: list[tuple[Path, Manifest]], progress: BenchProgress | None
) -> Step:
    def make(details: Mapping[str, Any]) -> None:
        results = bench_engines(
            [engine for engine, _ in engines],
            request_grid(bench.batch, bench.input_len, bench.output_len),
            rounds=bench.rounds,
            warmup=bench.warmup,
            threads=bench.threads,
            cpus=cpus_for(bench.threads),
            seed=bench.seed,
            progress=progress,
        )
        save_folder(folder, [(RESULTS_FILE, json_from_results(results))], kind="results", details=details, force=True)

    inputs = {"engines": [manifest.fingerprint for _, manifest in engines], "bench": bench.model_dump(mode="json")}
    return Step(name="benchmark", folder=folder, kind="results", inputs=inputs, make=make)


def _report_step(recipe: Recipe, folder: Path, results: Path, manifest: Manifest) -> Step:
    def make(details: Mapping[str, Any]) -> None:
        check_folder(results, "results", hashes=True)
        files = report_from_results([results / RESULTS_FILE], baseline=recipe.baseline_name, title=recipe.title)
        save_folder(folder, files, kind="report", details=details, force=True)

    inputs = {"results": manifest.fingerprint, "baseline": recipe.baseline_name, "title": recipe.title}
    return Step(name="report", folder=folder, kind="report", inputs=inputs, make=make)
