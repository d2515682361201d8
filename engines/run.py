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
from engines.results import Accuracy, json_from_results, read_results
from exporter.dtypes import BY_NAME
from exporter.graph import ModelGraph
from exporter.pipeline import Step, apply_plan, checkpoint_writing, network_writing, run_step, save, source_fingerprint
from exporter.plan import Plan, read_plan
from exporter.read import Checkpoint, open_model
from exporter.recipe import AnalysisRecipe, BenchRecipe, EvaluateRecipe, Recipe, VariantRecipe
from exporter.safetensors_io import read_json
from exporter.writers.files import Manifest, check_folder, json_bytes, save_folder
from exporter.writers.onnx import options_for

Notify = Callable[[str, bool], None]  # (step, whether it was made now; False: it was there already)
RESULTS_FILE = "results.json"
EVALUATION_FILE = "evaluation.json"
PLAN_FILE = "plan.yaml"


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
    plans = {variant.name: variant.plan for variant in recipe.variants if variant.plan != "auto"}
    graphs = {
        variant.name: apply_plan(source.graph, plans[variant.name], norm=variant.norm)
        for variant in recipe.variants
        if variant.name in plans
    }
    source_key = source_fingerprint(recipe.model)
    if recipe.analysis is not None:
        step = _analysis_step(recipe.analysis, output / "analysis", source, source_key)
        _done(step, tell)
        suggested = read_plan(step.folder / PLAN_FILE)
        for variant in recipe.variants:
            if variant.plan == "auto":
                plans[variant.name] = suggested
                graphs[variant.name] = apply_plan(source.graph, suggested, norm=variant.norm)
    engines: list[tuple[Path, Manifest]] = []
    evaluations: dict[str, tuple[Path, Manifest]] = {}
    for variant in recipe.variants:
        folder = output / variant.name
        origin, graph, origin_key = source, graphs[variant.name], source_key
        if variant.checkpoint and graph is not source.graph:
            step = _checkpoint_step(variant, plans[variant.name], folder / "checkpoint", source, graph, source_key)
            origin_key = {"manifest": _done(step, tell).fingerprint}
            origin = open_model(step.folder, need_weights=True)
            graph = origin.graph
        network = _done(
            _network_step(recipe, variant, plans[variant.name], folder / "network", origin, graph, origin_key), tell
        )
        step = _engine_step(variant, folder / "engine", folder / "network", network)
        engines.append((step.folder, _done(step, tell)))
        if recipe.evaluate is not None:
            step = _evaluate_step(
                recipe.evaluate, variant, plans[variant.name], folder / "evaluation", source, graph, origin_key
            )
            evaluations[variant.name] = step.folder, _done(step, tell)
    if recipe.bench is None:
        return output
    step = _bench_step(recipe.bench, output / "benchmark", engines, bench_progress)
    manifest = _done(step, tell)
    if evaluations:
        step = _results_step(output / "results", step.folder, manifest, evaluations)
        manifest = _done(step, tell)
    step = _report_step(recipe, output / "report", step.folder, manifest)
    _done(step, tell)
    return step.folder


def _done(step: Step, tell: Notify) -> Manifest:
    manifest, made = run_step(step)
    tell(step.name, made)
    return manifest


def _analysis_step(wanted: AnalysisRecipe, folder: Path, source: Checkpoint, source_key: Mapping[str, Any]) -> Step:
    def make(details: Mapping[str, Any]) -> None:
        from exporter.analysis.dependency import measure_dependency  # imports torch
        from exporter.analysis.plan import Constraints
        from exporter.suggest import Wishes, analysis_files, suggest
        from exporter.text import open_tokenizer, token_windows

        tokenizer = open_tokenizer(source.path, source.graph.vocab_size)
        tokens = token_windows(wanted.text, tokenizer, context=wanted.context, max_windows=wanted.max_windows)
        constraints = Constraints(
            max_width=wanted.max_width, max_dependency=wanted.max_dependency, keep_last=wanted.keep_last
        )
        wishes = Wishes(drop=wanted.drop, greedy=wanted.greedy, constraints=constraints)
        dependency = measure_dependency(source.graph, tokens)
        suggestion = suggest(source.graph, dependency, wishes, tokens=tokens)
        origin = f"measured on {dependency.tokens:,} tokens of {wanted.text.name}, model {source.path.name}"
        files = analysis_files(source.graph, dependency, suggestion, constraints=constraints, source=origin)
        save_folder(folder, files, kind="analysis", details=details, force=True)

    text = source_fingerprint(wanted.text)
    inputs = {"source": source_key, "text": text, "analysis": wanted.model_dump(mode="json")}
    return Step(name="analysis", folder=folder, kind="analysis", inputs=inputs, make=make)


def _checkpoint_step(
    variant: VariantRecipe,
    plan: Plan,
    folder: Path,
    source: Checkpoint,
    graph: ModelGraph,
    source_key: Mapping[str, Any],
) -> Step:
    planned = plan.model_dump(mode="json")

    def make(details: Mapping[str, Any]) -> None:
        details = {**details, "plan": planned, "norm": variant.norm}
        save(checkpoint_writing(source, graph, folder, details=details, force=True))

    inputs = {"source": source_key, "plan": planned, "norm": variant.norm}
    return Step(name=f"{variant.name}: checkpoint", folder=folder, kind="checkpoint", inputs=inputs, make=make)


def _network_step(
    recipe: Recipe,
    variant: VariantRecipe,
    plan: Plan,
    folder: Path,
    origin: Checkpoint,
    graph: ModelGraph,
    origin_key: Mapping[str, Any],
) -> Step:
    wanted = recipe.network
    options = options_for({wanted.target: BY_NAME[wanted.dtype]}, max_positions=wanted.max_positions)

    def make(details: Mapping[str, Any]) -> None:
        save(network_writing(origin, graph, folder, options=options, details=details, force=True))

    inputs = {
        "source": origin_key,
        "plan": plan.model_dump(mode="json"),
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


def _evaluate_step(
    wanted: EvaluateRecipe,
    variant: VariantRecipe,
    plan: Plan,
    folder: Path,
    source: Checkpoint,
    graph: ModelGraph,
    origin_key: Mapping[str, Any],
) -> Step:
    def make(details: Mapping[str, Any]) -> None:
        from exporter.analysis.evaluate import evaluate  # imports torch
        from exporter.text import open_tokenizer, token_windows

        tokenizer = open_tokenizer(source.path, graph.vocab_size)
        tokens = token_windows(wanted.text, tokenizer, context=wanted.context, max_windows=wanted.max_windows)
        reference = None if graph is source.graph else source.graph
        found = json_bytes(evaluate(graph, tokens, reference=reference).to_json())
        save_folder(folder, [(EVALUATION_FILE, found)], kind="evaluation", details=details, force=True)

    inputs = {
        "source": source_fingerprint(source.path),
        "model": origin_key,
        "plan": plan.model_dump(mode="json"),
        "norm": variant.norm,
        "text": source_fingerprint(wanted.text),
        "evaluate": wanted.model_dump(mode="json"),
    }
    return Step(name=f"{variant.name}: evaluation", folder=folder, kind="evaluation", inputs=inputs, make=make)


def _results_step(
    folder: Path, benchmark: Path, manifest: Manifest, evaluations: Mapping[str, tuple[Path, Manifest]]
) -> Step:
    """Results with each engine's accuracy, which is its variant's."""

    def make(details: Mapping[str, Any]) -> None:
        results = read_results(benchmark / RESULTS_FILE)
        engines = []
        for engine in results.engines:
            found = read_json(evaluations[engine.label][0] / EVALUATION_FILE)
            accuracy = Accuracy.model_validate({name: found[name] for name in Accuracy.model_fields})
            engines.append(engine.model_copy(update={"accuracy": accuracy}))
        content = json_from_results(results.model_copy(update={"engines": tuple(engines)}))
        save_folder(folder, [(RESULTS_FILE, content)], kind="results", details=details, force=True)

    inputs = {
        "benchmark": manifest.fingerprint,
        "evaluations": {name: evaluation.fingerprint for name, (_, evaluation) in evaluations.items()},
    }
    return Step(name="results", folder=folder, kind="results", inputs=inputs, make=make)


def _report_step(recipe: Recipe, folder: Path, results: Path, manifest: Manifest) -> Step:
    def make(details: Mapping[str, Any]) -> None:
        check_folder(results, "results", hashes=True)
        files = report_from_results([results / RESULTS_FILE], baseline=recipe.baseline_name, title=recipe.title)
        save_folder(folder, files, kind="report", details=details, force=True)

    inputs = {"results": manifest.fingerprint, "baseline": recipe.baseline_name, "title": recipe.title}
    return Step(name="report", folder=folder, kind="report", inputs=inputs, make=make)
