"""Running a recipe: one folder per step, finished steps kept.

OUTPUT/<variant>/checkpoint     Hugging Face folder, where the plan changes the model and the recipe wants one
OUTPUT/<variant>/network        network definition
OUTPUT/<variant>/engine         engine
OUTPUT/<variant>/evaluation     evaluation.json, where the recipe evaluates
OUTPUT/<variant>/quantization   what rounding costs, and how each site is smoothed, where the variant is quantized
OUTPUT/calibration              activation ranges of the model, where a variant is quantized
OUTPUT/analysis                 measurements and a suggested plan, where the recipe analyzes
OUTPUT/benchmark                results.json of the benchmark
OUTPUT/results                  the same with the variants' accuracy
OUTPUT/report                   report.html, report.md, report.csv, charts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.backends import backend_named
from engines.base import Backend
from engines.bench import Progress, bench_engines, request_grid
from engines.cpp_program import refuse_missing, worker_for
from engines.hardware import gpu_named, read_gpus
from engines.latency_model import stages_of, structure_from_graph
from engines.machine import cpus_for
from engines.prediction_report import Wanted
from engines.profiling import profiler_problems
from engines.report import report_from_results
from engines.results import Accuracy, EvaluatedModel, json_from_results, read_results
from engines.tensorrt_llm import BuildSettings, TensorRtLlm
from exporter.analysis.tasks import check_tasks, run_tasks
from exporter.dtypes import BY_NAME, DType
from exporter.errors import EngineError, raise_all
from exporter.graph import ModelGraph, structure
from exporter.manifests import ERRORS_FILE, PLAN_FILE
from exporter.network import NETWORK_KIND
from exporter.passes.quantize_linears import structure_quantized
from exporter.pipeline import (
    Step,
    apply_plan,
    checkpoint_writing,
    network_writing,
    refuse_overlap,
    run_step,
    save,
    source_fingerprint,
    trtllm_writing,
)
from exporter.plan import Plan, read_plan
from exporter.read import Checkpoint, open_model
from exporter.recipe import (
    STEP_FOLDERS,
    AnalysisRecipe,
    BenchRecipe,
    CalibrationRecipe,
    EvaluateRecipe,
    NetworkRecipe,
    PredictRecipe,
    Recipe,
    TensorRtLlmRecipe,
    VariantRecipe,
    WindowsRecipe,
)
from exporter.safetensors_io import read_json
from exporter.writers import hf, trtllm
from exporter.writers.files import Manifest, check_folder, json_bytes, refuse_foreign, save_folder
from exporter.writers.onnx import check_structure
from exporter.writers.onnx_options import Options as OnnxOptions
from exporter.writers.onnx_options import options_for
from exporter.writers.onnx_quantization import number_format
from exporter.writers.trtllm_config import CHECKPOINT_KIND

if TYPE_CHECKING:
    import numpy as np

    from exporter.analysis.evaluate import HeldModel

Notify = Callable[[str, bool], None]  # (step, whether it was made now; False: it was there already)
Note = Callable[[str], None]
RESULTS_FILE = "results.json"
EVALUATION_FILE = "evaluation.json"


def run_recipe(
    recipe: Recipe,
    output: Path,
    *,
    notify: Notify | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Path:
    """Carry out a recipe; returns the report's folder (the output folder if the recipe has no benchmark).

    `note` is called with what people should know: that a program is built, or which one stood in for another;
    `progress` before each step of a build, by backends that know, and of the benchmark.

    Every plan, and every quantization, is applied to the model's structure before the first file is written, and held
    against what its network can express, so that what does not fit is known at once, and so is a task that nobody
    knows. Steps that are complete and whose inputs are the same are not repeated.

    Raises:
        FuselageError: of the step that failed; the steps before it stay.
    """
    tell = notify if notify is not None else lambda step, made: None
    backend = _backend(recipe, progress)
    raise_all([EngineError(problem) for problem in backend.missing()])
    if recipe.bench is not None and recipe.bench.runtime == "cpp":
        refuse_missing(backend.name)
    if recipe.bench is not None and recipe.bench.profile:
        raise_all(profiler_problems([backend.name]))
    for name in (*STEP_FOLDERS, *(variant.name for variant in recipe.variants)):
        refuse_overlap(recipe.model, output / name)
    refuse_foreign(output)
    source = open_model(recipe.model, need_weights=True)
    _check_texts(recipe, source)
    prediction = None if recipe.predict is None else _prediction(recipe.predict, source.graph)
    plans = {variant.name: variant.plan for variant in recipe.variants if variant.plan != "auto"}
    graphs = {
        variant.name: apply_plan(source.graph, plans[variant.name], norm=variant.norm)
        for variant in recipe.variants
        if variant.name in plans
    }
    for variant in recipe.variants:
        if variant.name in graphs:
            _check_variant(recipe, variant, graphs[variant.name])
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        wanted = recipe.evaluate
        check_tasks(
            recipe.model,
            wanted.tasks,
            include_path=wanted.include_path,
            trust_remote_code=wanted.trust_remote_code,
        )
    source_key = source_fingerprint(recipe.model)
    analysis: tuple[Path, Manifest] | None = None
    if recipe.analysis is not None:
        step = _analysis_step(recipe.analysis, output / "analysis", source, source_key)
        analysis = step.folder, _done(step, tell)
        suggested = read_plan(step.folder / PLAN_FILE)
        for variant in recipe.variants:
            if variant.plan == "auto":
                plans[variant.name] = suggested
                graphs[variant.name] = apply_plan(source.graph, suggested, norm=variant.norm)
                _check_variant(recipe, variant, graphs[variant.name])
    calibration: tuple[Path, Manifest] | None = None
    if recipe.calibration is not None and any(variant.quantize is not None for variant in recipe.variants):
        step = _calibration_step(recipe.calibration, output / "calibration", source, source_key)
        calibration = step.folder, _done(step, tell)
    engines: list[tuple[Path, Manifest]] = []
    evaluations: dict[str, tuple[Path, Manifest]] = {}
    held: dict[str, HeldModel] = {}
    quantizations: dict[str, tuple[Path, Manifest]] = {}
    untimed: dict[str, dict[str, Any]] = {}
    for variant in recipe.variants:
        folder = output / variant.name
        origin, graph, origin_key = source, graphs[variant.name], source_key
        if recipe.calibration is not None and calibration is not None and variant.quantize is not None:
            step = _quantization_step(
                recipe.calibration, variant, plans[variant.name], folder / "quantization", source, graph, calibration
            )
            quantizations[variant.name] = step.folder, _done(step, tell)
        if variant.checkpoint and (graph is not source.graph or variant.quantize is not None):
            step = _checkpoint_step(
                variant,
                plans[variant.name],
                folder / "checkpoint",
                source,
                graph,
                source_key,
                calibration,
                quantizations.get(variant.name),
            )
            origin_key = {"manifest": _done(step, tell).fingerprint}
            origin = open_model(step.folder, need_weights=True)
            graph = origin.graph
        if variant.bench:
            network = _done(
                _network_step(recipe, variant, plans[variant.name], folder / "network", origin, graph, origin_key), tell
            )
            step = _engine_step(recipe, backend, variant, folder / "engine", folder / "network", network)
            engines.append((step.folder, _done(step, tell)))
        if recipe.evaluate is not None:
            step = _evaluate_step(
                recipe.evaluate,
                variant,
                plans[variant.name],
                folder / "evaluation",
                source,
                origin,
                graph,
                origin_key,
                held,
            )
            evaluations[variant.name] = step.folder, _done(step, tell)
        if not variant.bench:
            untimed[variant.name] = {"structure": structure(graph), "number_format": number_format(graph)}
    if recipe.bench is None:
        return output
    step = _bench_step(recipe.bench, output / "benchmark", engines, progress, note)
    manifest = _done(step, tell)
    if evaluations:
        step = _results_step(output / "results", step.folder, manifest, evaluations, untimed)
        manifest = _done(step, tell)
    step = _report_step(recipe, output / "report", step.folder, manifest, analysis, quantizations, prediction)
    _done(step, tell)
    return step.folder


def _check_variant(recipe: Recipe, variant: VariantRecipe, graph: ModelGraph) -> None:
    """Raise what keeps a variant from being written as a Hugging Face folder or as a network; reads nothing."""
    if variant.quantize is not None:
        graph = structure_quantized(graph, variant.quantize)
        raise_all(hf.check(graph, hf.Options()))
    if not variant.bench:
        return
    if isinstance(recipe.network, TensorRtLlmRecipe):
        raise_all(trtllm.check(graph, _trtllm_options(recipe.network)))
    else:
        raise_all(check_structure(graph, _onnx_options(recipe.network, variant)))


def _check_texts(recipe: Recipe, source: Checkpoint) -> None:
    """Raise what would keep the recipe's texts from being measured, and a wish that no measurement could fulfil."""
    from exporter.text import check_context, check_text, open_tokenizer

    measured = [
        (wanted.text, wanted.context)
        for wanted in (recipe.analysis, recipe.calibration, recipe.evaluate)
        if wanted is not None and wanted.text is not None
    ]
    for text, context in measured:
        check_text(text)
        check_context(context, source.graph.max_position_embeddings)
    if measured:
        open_tokenizer(source.path, source.graph.vocab_size)
    if recipe.analysis is not None:
        from exporter.suggest import Wishes, check_wishes  # imports torch

        check_wishes(source.graph, Wishes(drop=recipe.analysis.drop))


def _done(step: Step, tell: Notify) -> Manifest:
    manifest, made = run_step(step)
    tell(step.name, made)
    return manifest


def _windows(text: Path, wanted: WindowsRecipe, source: Checkpoint) -> np.ndarray:
    """A text in the model's tokens, int64 [windows, context]."""
    from exporter.text import open_tokenizer, token_windows

    tokenizer = open_tokenizer(source.path, source.graph.vocab_size)
    return token_windows(
        text,
        tokenizer,
        vocab_size=source.graph.vocab_size,
        max_positions=source.graph.max_position_embeddings,
        context=wanted.context,
        max_windows=wanted.max_windows,
    )


def _analysis_step(wanted: AnalysisRecipe, folder: Path, source: Checkpoint, source_key: Mapping[str, Any]) -> Step:
    def make(details: Mapping[str, Any]) -> None:
        from exporter.analysis.dependency import measure_dependency  # imports torch
        from exporter.analysis.plan import Constraints
        from exporter.suggest import Wishes, analysis_files, source_text, suggest

        tokens = _windows(wanted.text, wanted, source)
        constraints = Constraints(
            max_width=wanted.max_width, max_dependency=wanted.max_dependency, keep_last=wanted.keep_last
        )
        wishes = Wishes(drop=wanted.drop, greedy=wanted.greedy, constraints=constraints)
        dependency = measure_dependency(source.graph, tokens)
        suggestion = suggest(source.graph, dependency, wishes, tokens=tokens)
        origin = source_text(dependency, wanted.text, source.path)
        files = analysis_files(dependency, suggestion, constraints=constraints, source=origin)
        save_folder(folder, files, kind="analysis", details=details, force=True)

    text = source_fingerprint(wanted.text)
    inputs = {"source": source_key, "text": text, "analysis": wanted.model_dump(mode="json")}
    return Step(name="analysis", folder=folder, kind="analysis", inputs=inputs, make=make)


def _calibration_step(
    wanted: CalibrationRecipe, folder: Path, source: Checkpoint, source_key: Mapping[str, Any]
) -> Step:
    def make(details: Mapping[str, Any]) -> None:
        from exporter.calibration import calibrate, calibration_files  # imports torch

        tokens, _ = _calibration_windows(wanted, source)
        found = calibrate(source.graph, tokens, text=wanted.text.name, percentile=wanted.percentile)
        save_folder(folder, calibration_files(found).items(), kind="calibration", details=details, force=True)

    text = source_fingerprint(wanted.text)
    inputs = {"source": source_key, "text": text, "calibration": wanted.model_dump(mode="json")}
    return Step(name="calibration", folder=folder, kind="calibration", inputs=inputs, make=make)


def _calibration_windows(wanted: CalibrationRecipe, source: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Windows to calibrate on, and others to choose alpha and measure errors on."""
    from exporter.quantize import split_windows

    return split_windows(_windows(wanted.text, wanted, source))


def _quantization_step(
    wanted: CalibrationRecipe,
    variant: VariantRecipe,
    plan: Plan,
    folder: Path,
    source: Checkpoint,
    graph: ModelGraph,
    calibration: tuple[Path, Manifest],
) -> Step:
    recipe = variant.quantize
    if recipe is None:
        raise AssertionError("Bug: a variant without a format")

    def make(details: Mapping[str, Any]) -> None:
        from exporter.calibration import read_calibration  # imports torch
        from exporter.quantize import error_files, quantize

        _, aside = _calibration_windows(wanted, source)
        known = read_calibration(calibration[0])
        found = quantize(graph, recipe, source=source.graph, calibration=known, tokens=aside)
        text = f"{variant.name}, {aside.size:,} tokens of {wanted.text.name}"
        files = error_files(found, graph, aside, source=text)
        save_folder(folder, files.items(), kind="quantization", details=details, force=True)

    inputs = {
        "calibration": calibration[1].fingerprint,
        "plan": plan.model_dump(mode="json"),
        "norm": variant.norm,
        "quantize": recipe.model_dump(mode="json"),
    }
    return Step(name=f"{variant.name}: quantization", folder=folder, kind="quantization", inputs=inputs, make=make)


def _checkpoint_step(
    variant: VariantRecipe,
    plan: Plan,
    folder: Path,
    source: Checkpoint,
    graph: ModelGraph,
    source_key: Mapping[str, Any],
    calibration: tuple[Path, Manifest] | None,
    quantization: tuple[Path, Manifest] | None,
) -> Step:
    planned = plan.model_dump(mode="json")

    def make(details: Mapping[str, Any]) -> None:
        details = {**details, "plan": planned, "norm": variant.norm}
        written = graph
        if variant.quantize is not None and calibration is not None and quantization is not None:
            from exporter.calibration import read_calibration  # imports torch
            from exporter.quantize import quantize, strengths_from_errors

            strengths = strengths_from_errors(read_json(quantization[0] / ERRORS_FILE))
            known = read_calibration(calibration[0])
            found = quantize(graph, variant.quantize, source=source.graph, calibration=known, strengths=strengths)
            written = found.graph
        save(checkpoint_writing(source, written, folder, details=details, force=True))

    inputs: dict[str, Any] = {"source": source_key, "plan": planned, "norm": variant.norm}
    if quantization is not None:
        inputs["quantization"] = quantization[1].fingerprint
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
    if not isinstance(wanted, TensorRtLlmRecipe) and variant.dtype is not None:
        wanted = wanted.model_copy(update={"dtype": variant.dtype})

    def make(details: Mapping[str, Any]) -> None:
        if isinstance(wanted, TensorRtLlmRecipe):
            ranks = _trtllm_options(wanted)
            save(trtllm_writing(origin, graph, folder, options=ranks, details=details, force=True))
        else:
            options = _onnx_options(wanted, variant)
            save(network_writing(origin, graph, folder, options=options, details=details, force=True))

    inputs = {
        "source": origin_key,
        "plan": plan.model_dump(mode="json"),
        "norm": variant.norm,
        "network": wanted.model_dump(mode="json"),
    }
    kind = CHECKPOINT_KIND if isinstance(wanted, TensorRtLlmRecipe) else NETWORK_KIND
    return Step(name=f"{variant.name}: network", folder=folder, kind=kind, inputs=inputs, make=make)


def _trtllm_options(wanted: TensorRtLlmRecipe) -> trtllm.Options:
    return trtllm.Options(tp_size=wanted.tp, pp_size=wanted.pp, split_embedding=wanted.split_embedding)


def _onnx_options(wanted: NetworkRecipe, variant: VariantRecipe) -> OnnxOptions:
    dtypes: dict[str, DType | None] = {wanted.target: BY_NAME[variant.dtype or wanted.dtype]}
    return options_for(dtypes, max_positions=wanted.max_positions, batch=wanted.batch)


def _prediction(wanted: PredictRecipe, graph: ModelGraph) -> Wanted:
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


def _backend(recipe: Recipe, progress: Progress | None) -> Backend:
    """What builds a recipe's engines."""
    wanted = recipe.network
    if not isinstance(wanted, TensorRtLlmRecipe):
        return backend_named(wanted.target, _engine_options(recipe), progress)
    settings = BuildSettings(
        max_batch_size=wanted.max_batch,
        max_seq_len=wanted.max_seq_len,
        max_num_tokens=wanted.max_num_tokens,
        low_latency=wanted.low_latency,
    )
    return TensorRtLlm(settings)


def _engine_options(recipe: Recipe) -> dict[str, Any]:
    """What a recipe chooses about the build of its engines, by the names of the backend's settings."""
    return {} if recipe.engine is None else recipe.engine.model_dump(exclude={"backend"}, exclude_unset=True)


def _engine_step(
    recipe: Recipe, backend: Backend, variant: VariantRecipe, folder: Path, network_folder: Path, network: Manifest
) -> Step:
    def make(details: Mapping[str, Any]) -> None:
        backend.build(network_folder, folder, label=variant.name, details=details, force=True)

    inputs: dict[str, Any] = {"network": network.fingerprint, "label": variant.name, "backend": backend.name}
    if recipe.engine is not None:
        inputs["engine"] = recipe.engine.model_dump(mode="json")
    return Step(name=f"{variant.name}: engine", folder=folder, kind="engine", inputs=inputs, make=make)


def _bench_step(
    bench: BenchRecipe,
    folder: Path,
    engines: list[tuple[Path, Manifest]],
    progress: Progress | None,
    note: Note | None,
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
            one_at_a_time=bench.one_at_a_time,
            progress=progress,
            profile=bench.profile,
            worker=worker_for(bench.runtime, note if note is not None else lambda text: None),
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
    origin: Checkpoint,
    graph: ModelGraph,
    origin_key: Mapping[str, Any],
    held: dict[str, HeldModel],
) -> Step:
    """Judge a variant; `held` keeps what the source makes of the text, if it is not too much, for the next variant."""

    def make(details: Mapping[str, Any]) -> None:
        from exporter.analysis.evaluate import can_be_held, evaluate, hold  # imports torch

        found: dict[str, Any] = {}
        if wanted.text is not None:
            tokens = _windows(wanted.text, wanted, source)
            if graph is not source.graph and "source" not in held and can_be_held(source.graph, tokens):
                held["source"] = hold(source.graph, tokens)
            reference = None if graph is source.graph else held.get("source", source.graph)
            found = evaluate(graph, tokens, reference=reference).to_json()
        if wanted.tasks:
            scores = run_tasks(
                origin.path,
                wanted.tasks,
                include_path=wanted.include_path,
                limit=wanted.limit,
                # What this run wrote brings our own code.
                trust_remote_code=origin is not source or wanted.trust_remote_code,
            )
            found["tasks"] = [score.to_json() for score in scores]
        save_folder(folder, [(EVALUATION_FILE, json_bytes(found))], kind="evaluation", details=details, force=True)

    inputs = {
        "source": source_fingerprint(source.path),
        "model": origin_key,
        "plan": plan.model_dump(mode="json"),
        "norm": variant.norm,
        "text": wanted.text and source_fingerprint(wanted.text),
        "tasks": wanted.include_path and source_fingerprint(wanted.include_path),
        "evaluate": wanted.model_dump(mode="json"),
    }
    return Step(name=f"{variant.name}: evaluation", folder=folder, kind="evaluation", inputs=inputs, make=make)


def _results_step(
    folder: Path,
    benchmark: Path,
    manifest: Manifest,
    evaluations: Mapping[str, tuple[Path, Manifest]],
    untimed: Mapping[str, Mapping[str, Any]],
) -> Step:
    """Results with each engine's accuracy, which is its variant's, and with the variants that have no engine.

    Args:
        untimed: name -> structure and number format of the variants that were only evaluated.
    """

    def accuracy_of(name: str) -> Accuracy:
        found = read_json(evaluations[name][0] / EVALUATION_FILE)
        return Accuracy.model_validate({key: found[key] for key in Accuracy.model_fields if key in found})

    def make(details: Mapping[str, Any]) -> None:
        results = read_results(benchmark / RESULTS_FILE)
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
        "benchmark": manifest.fingerprint,
        "evaluations": {name: evaluation.fingerprint for name, (_, evaluation) in evaluations.items()},
        "untimed": dict(untimed),
    }
    return Step(name="results", folder=folder, kind="results", inputs=inputs, make=make)


def _report_step(
    recipe: Recipe,
    folder: Path,
    results: Path,
    manifest: Manifest,
    analysis: tuple[Path, Manifest] | None,
    quantizations: Mapping[str, tuple[Path, Manifest]],
    prediction: Wanted | None,
) -> Step:
    def make(details: Mapping[str, Any]) -> None:
        check_folder(results, "results", hashes=True)
        files = report_from_results(
            [results / RESULTS_FILE],
            baseline=recipe.baseline_name,
            title=recipe.title,
            prediction=prediction,
            analysis=analysis and analysis[0],
            quantization={name: path for name, (path, _) in quantizations.items()},
        )
        save_folder(folder, files, kind="report", details=details, force=True)

    inputs = {
        "results": manifest.fingerprint,
        "analysis": analysis and analysis[1].fingerprint,
        "quantization": {name: errors.fingerprint for name, (_, errors) in quantizations.items()},
        "predict": recipe.predict and recipe.predict.model_dump(mode="json"),
        "baseline": recipe.baseline_name,
        "title": recipe.title,
    }
    return Step(name="report", folder=folder, kind="report", inputs=inputs, make=make)
