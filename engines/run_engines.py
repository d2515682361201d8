"""The steps of a recipe from the variants' models to the report: networks, engines, benchmark, results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.backends import backend_named
from engines.base import Backend
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
from exporter.recipe import BenchRecipe, NetworkRecipe, PredictRecipe, Recipe, TensorRtLlmRecipe, VariantRecipe
from exporter.safetensors_io import read_json
from exporter.targets import TARGETS
from exporter.writers import onnx_options, trtllm
from exporter.writers.files import check_folder, save_folder
from exporter.writers.onnx_quantization import number_format

Note = Callable[[str], None]
RESULTS_FILE = "results.json"


def backend_of(recipe: Recipe, progress: Progress | None) -> Backend:
    """What builds a recipe's engines; the runtime itself need not be there.

    Raises:
        EngineError: the recipe's options do not fit, or its engines cannot be profiled.
    """
    wanted = recipe.network
    if isinstance(wanted, TensorRtLlmRecipe):
        sizes = {"max_batch_size": wanted.max_batch, "max_seq_len": wanted.max_seq_len}
        tokens = {"max_num_tokens": wanted.max_num_tokens, "low_latency": wanted.low_latency}
        backend = backend_named("tensorrt-llm", sizes | tokens)
    else:
        options = {} if recipe.engine is None else recipe.engine.model_dump(exclude={"backend"}, exclude_unset=True)
        backend = backend_named(wanted.target, options, progress)
    if recipe.bench is not None and recipe.bench.profile:
        raise_all(profiler_problems([backend.name]))
    return backend


def missing_runtimes(recipe: Recipe, backend: Backend) -> list[EngineError]:
    """What this machine lacks to build the recipe's engines, and to measure them as the recipe asks for."""
    problems = [EngineError(problem) for problem in backend.missing()]
    if recipe.bench is not None and recipe.bench.runtime == "cpp":
        problems += missing_problems(backend.name)
    return problems


def check_network(recipe: Recipe, variant: VariantRecipe, structure: ModelGraph) -> None:
    """Raise what keeps a structure from being written as a variant's network and from being timed; reads nothing."""
    positions = structure.max_position_embeddings
    if recipe.bench is not None and recipe.bench.longest > positions:
        raise EngineError(
            "bench: input and output are longer than the model was made for",
            expected=f"at most {positions} tokens",
            found=recipe.bench.longest,
        )
    raise_all(TARGETS[recipe.network.to].check(structure, _target_settings(recipe.network, variant)))


def prediction_of(wanted: PredictRecipe, graph: ModelGraph) -> Wanted:
    """What the report is to predict; refuses hardware that nobody knows, and sizes that the model cannot have."""
    known = read_gpus()
    for size in wanted.tp:
        stages_of(structure_from_graph(graph), size)
    return Wanted(
        gpus=[gpu_named(name, known) for name in wanted.gpu],
        tp_sizes=wanted.tp,
        batches=wanted.batch,
        dtype=wanted.dtype,
    )


def check_prediction(wanted: Wanted, recipe: Recipe, variant: VariantRecipe, structure: ModelGraph) -> None:
    """Raise what would keep the report from predicting a variant's engine."""
    network = recipe.network
    dtype = structure.dtype.name if isinstance(network, TensorRtLlmRecipe) else variant.dtype or network.dtype
    check_wanted(wanted, structure_from_graph(structure), number_format(structure), dtype)


def network_step(recipe: Recipe, variant: Variant) -> Step:
    """Write a variant's network definition."""
    wanted, folder = recipe.network, variant.folder / "network"
    if not isinstance(wanted, TensorRtLlmRecipe) and variant.recipe.dtype is not None:
        wanted = wanted.model_copy(update={"dtype": variant.recipe.dtype})
    settings = _target_settings(wanted, variant.recipe)

    def writing(graph: ModelGraph, details: Mapping[str, Any]) -> Writing:
        origin = variant.checkpoint
        return target_writing(wanted.to, origin, graph, folder, settings=settings, details=details, force=True)

    return Step(
        name=f"{variant.name}: network",
        folder=folder,
        kind=TARGETS[wanted.to].kind,
        inputs={"source": variant.key, **variant.described, "network": wanted.model_dump(mode="json")},
        make=lambda details: save(writing(variant.graph, details)),
        total_bytes=lambda: writing(variant.graph, {}).total_bytes,
    )


def _target_settings(wanted: NetworkRecipe | TensorRtLlmRecipe, variant: VariantRecipe) -> Any:
    """What a recipe chooses about a variant's network, as settings of the target `wanted.to`."""
    if isinstance(wanted, TensorRtLlmRecipe):
        return trtllm.Options(tp_size=wanted.tp, pp_size=wanted.pp, split_embedding=wanted.split_embedding)
    target = f"{wanted.target}:{variant.dtype or wanted.dtype}"
    return onnx_options.Settings(targets=(target,), max_positions=wanted.max_positions, batch=wanted.batch)


def engine_step(recipe: Recipe, backend: Backend, variant: Variant, network: Done) -> Step:
    """Build a variant's engine."""
    folder = variant.folder / "engine"

    def make(details: Mapping[str, Any]) -> None:
        backend.build(network.folder, folder, label=variant.name, details=details, force=True)

    inputs: dict[str, Any] = {"network": network.fingerprint, "label": variant.name, "backend": backend.name}
    settings = recipe.network if isinstance(recipe.network, TensorRtLlmRecipe) else recipe.engine
    if settings is not None:
        inputs["engine"] = settings.model_dump(mode="json")
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
