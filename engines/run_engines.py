"""The steps of a recipe from the variants' models to the report: networks, engines, benchmark, results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.backends import BACKENDS
from engines.base import Backend, Foreseen
from engines.bench import Progress, bench_engines, request_grid
from engines.cpp_program import missing_problems, worker_for
from engines.hardware import gpu_named, read_gpus
from engines.latency_model import stages_of, structure_from_graph
from engines.machine import cpus_for
from engines.prediction_of_engines import check_wanted
from engines.prediction_report import Wanted
from engines.profiling import profiler_problems
from engines.report import report_from_results
from engines.results import Accuracy, EvaluatedModel, json_from_results, read_results, refuse_incomplete
from engines.run_models import EVALUATION_FILE, Done, Variant
from exporter.errors import EngineError, raise_all
from exporter.graph import ModelGraph
from exporter.pipeline import Step, Writing, save, target_writing
from exporter.recipe import BenchRecipe, PredictRecipe, Recipe, VariantRecipe
from exporter.recipe_engines import Choice
from exporter.safetensors_io import read_json
from exporter.settings import identity_of
from exporter.targets import TARGETS
from exporter.writers.files import check_folder, save_folder
from exporter.writers.onnx_quantization import number_format

Note = Callable[[str], None]
RESULTS_FILE = "results.json"


def backends_of(recipe: Recipe, progress: Progress | None) -> dict[str, Backend]:
    """What builds the engine of each variant that has one; the runtimes need not be there.

    Raises:
        EngineError: an engine is to be profiled and cannot be.
    """
    chosen = {variant.name: variant.engine for variant in recipe.variants if variant.bench}
    if recipe.bench is not None and recipe.bench.profile:
        raise_all(profiler_problems(engine.name for engine in chosen.values()))
    return {name: BACKENDS[engine.name].make(engine.settings, progress) for name, engine in chosen.items()}


def missing_runtimes(recipe: Recipe, backends: Iterable[Backend]) -> list[EngineError]:
    """What this machine lacks to build the recipe's engines, and to measure them as the recipe asks for."""
    wants_program = recipe.bench is not None and recipe.bench.runtime == "cpp"
    problems: dict[str, EngineError] = {}  # by its words: variants lack the same
    for backend in backends:
        problems |= {problem: EngineError(problem) for problem in backend.missing()}
        problems |= {problem.problem: problem for problem in missing_problems(backend.name) if wants_program}
    return list(problems.values())


def check_engine(recipe: Recipe, variant: VariantRecipe, structure: ModelGraph) -> Foreseen:
    """Check that a structure can become a variant's engine and be timed; reads nothing.

    Raises:
        TargetError, EngineError: it cannot.
    """
    network = variant.network
    if network is not None:
        raise_all(TARGETS[network.name].check(structure, network.settings))
    settings = None if network is None else network.settings
    foreseen = BACKENDS[variant.engine.name].foresee(structure, settings, variant.engine.settings)
    if recipe.bench is not None:
        raise_all(_request_problems(recipe.bench, foreseen))
    return foreseen


def _request_problems(bench: BenchRecipe, engine: Foreseen) -> list[EngineError]:
    """Requests that an engine will not take: the benchmark itself is far behind the builds."""
    problems = []
    if bench.longest > engine.max_positions:
        problems.append(
            EngineError(
                "bench: input and output are longer than a sequence of its engine may be",
                expected=f"at most {engine.max_positions} tokens",
                found=bench.longest,
            )
        )
    if engine.batch is not None and set(bench.batch) != {engine.batch}:
        problems.append(
            EngineError(
                "bench.batch: its engine has a fixed batch",
                expected=[engine.batch],
                found=bench.batch,
                hint="give network.batch, and one recipe for each",
            )
        )
    if engine.max_batch is not None and max(bench.batch) > engine.max_batch:
        problems.append(
            EngineError(
                "bench.batch: its engine takes fewer sequences",
                expected=f"at most {engine.max_batch}",
                found=max(bench.batch),
                hint="give engine.max_batch",
            )
        )
    return problems


def prediction_of(wanted: PredictRecipe, graph: ModelGraph) -> Wanted:
    """What the report is to predict; refuses hardware that nobody knows, and sizes that the model cannot have."""
    known = read_gpus()
    try:
        for size in wanted.tp:
            stages_of(structure_from_graph(graph), size)
    except EngineError as error:
        error.problem = f"{error.problem} (predict.tp)"
        raise
    return Wanted(
        gpus=[gpu_named(name, known) for name in wanted.gpu],
        tp_sizes=wanted.tp,
        batches=wanted.batch,
        dtype=wanted.dtype,
    )


def check_prediction(wanted: Wanted, structure: ModelGraph, engine: Foreseen) -> None:
    """Raise what would keep the report from predicting the engine of a structure."""
    check_wanted(wanted, structure_from_graph(structure), number_format(structure), engine.dtype)


def network_step(variant: Variant, wanted: Choice) -> Step:
    """Write a variant's network definition."""
    folder, origin = variant.folder / "network", variant.checkpoint

    def writing(graph: ModelGraph, details: Mapping[str, Any]) -> Writing:
        return target_writing(wanted.name, origin, graph, folder, settings=wanted.settings, details=details, force=True)

    network = {"to": wanted.name, **identity_of(wanted.settings)}
    return Step(
        name=f"{variant.name}: network",
        folder=folder,
        kind=TARGETS[wanted.name].kind,
        inputs={"source": variant.key, **variant.described, "network": network},
        make=lambda details: save(writing(variant.graph, details)),
        total_bytes=lambda: writing(variant.graph, {}).total_bytes,
    )


def engine_step(backend: Backend, variant: Variant, network: Done | None) -> Step:
    """Build a variant's engine.

    Args:
        network: what it is built from; None: the variant's Hugging Face folder.
    """
    folder = variant.folder / "engine"
    source = variant.checkpoint.path if network is None else network.folder

    def make(details: Mapping[str, Any]) -> None:
        backend.build(source, folder, label=variant.name, details=details, force=True)

    inputs = {
        # An engine of another version or machine may not even open here.
        "environment": None if backend.missing() else dataclasses.asdict(backend.environment()),
        "network": variant.key if network is None else network.fingerprint,
        "label": variant.name,
        "backend": backend.name,
        "engine": identity_of(variant.recipe.engine.settings),
    }
    return Step(name=f"{variant.name}: engine", folder=folder, kind="engine", inputs=inputs, make=make)


def bench_step(
    bench: BenchRecipe, folder: Path, engines: Sequence[Done], progress: Progress | None, note: Note | None
) -> Step:
    """Time the engines side by side."""

    def make(details: Mapping[str, Any]) -> None:
        results = bench_engines(
            [engine.folder for engine in engines],
            request_grid(bench.batch, bench.input_len, bench.output_len),
            rounds=bench.rounds,
            warmup=bench.warmup,
            threads=bench.threads,
            cpus=cpus_for(bench.threads),
            seed=bench.seed,
            one_at_a_time=bench.one_at_a_time,
            progress=progress,
            profile=bench.profile,
            worker=worker_for(bench.runtime, note if note is not None else lambda text: None),
        )
        if not results.is_complete:
            details = {**details, "step_key": None}  # kept for people to read; the next run does not take it for done
        save_folder(folder, [(RESULTS_FILE, json_from_results(results))], kind="results", details=details, force=True)
        refuse_incomplete(results, folder / RESULTS_FILE)

    inputs = {"engines": [engine.fingerprint for engine in engines], "bench": bench.model_dump(mode="json")}
    return Step(name="benchmark", folder=folder, kind="results", inputs=inputs, make=make)


def results_step(
    folder: Path, benchmark: Done, evaluations: Mapping[str, Done], untimed: Mapping[str, Mapping[str, Any]]
) -> Step:
    """Results with each engine's accuracy, which is its variant's, and with the variants that have no engine.

    Args:
        untimed: name -> structure and number format of the variants that were only evaluated.
    """

    def accuracy_of(name: str) -> Accuracy:
        found = read_json(evaluations[name].folder / EVALUATION_FILE)
        return Accuracy.model_validate({key: found[key] for key in Accuracy.model_fields if key in found})

    def make(details: Mapping[str, Any]) -> None:
        results = read_results(benchmark.folder / RESULTS_FILE)
        update = {
            "engines": tuple(e.model_copy(update={"accuracy": accuracy_of(e.label)}) for e in results.engines),
            "evaluated": tuple(
                EvaluatedModel.model_validate({"label": name, **described, "accuracy": accuracy_of(name)})
                for name, described in untimed.items()
            ),
        }
        content = json_from_results(results.model_copy(update=update))
        save_folder(folder, [(RESULTS_FILE, content)], kind="results", details=details, force=True)

    inputs = {
        "benchmark": benchmark.fingerprint,
        "evaluations": {name: evaluation.fingerprint for name, evaluation in evaluations.items()},
        "untimed": dict(untimed),
    }
    return Step(name="results", folder=folder, kind="results", inputs=inputs, make=make)


def report_step(
    recipe: Recipe,
    folder: Path,
    results: Done,
    analysis: Done | None,
    quantizations: Mapping[str, Done],
    prediction: Wanted | None,
) -> Step:
    """Put everything on one page."""

    def make(details: Mapping[str, Any]) -> None:
        check_folder(results.folder, "results", hashes=True)
        files = report_from_results(
            [results.folder / RESULTS_FILE],
            baseline=recipe.baseline_name,
            title=recipe.title,
            prediction=prediction,
            analysis=None if analysis is None else analysis.folder,
            quantization={name: errors.folder for name, errors in quantizations.items()},
        )
        save_folder(folder, files, kind="report", details=details, force=True)

    inputs = {
        "results": results.fingerprint,
        "analysis": analysis and analysis.fingerprint,
        "quantization": {name: errors.fingerprint for name, errors in quantizations.items()},
        "predict": recipe.predict and recipe.predict.model_dump(mode="json"),
        "baseline": recipe.baseline_name,
        "title": recipe.title,
    }
    return Step(name="report", folder=folder, kind="report", inputs=inputs, make=make)
