"""Running a recipe: one folder per step, finished steps kept.

OUTPUT/<variant>/distilled      Hugging Face folder of what the plan gives, trained, where the variant is distilled
OUTPUT/<variant>/checkpoint     Hugging Face folder, where the plan changes the model and the recipe wants one
OUTPUT/<variant>/network        network definition, unless the engine is built from the Hugging Face folder
OUTPUT/<variant>/engine         engine
OUTPUT/<variant>/evaluation     evaluation.json, where the recipe evaluates
OUTPUT/<variant>/quantization   what rounding costs, and how each site is smoothed, where the variant is quantized
OUTPUT/calibration              activation ranges of the model, where a variant is quantized
OUTPUT/<variant>/calibration    those of the distilled model, where the variant is distilled and quantized
OUTPUT/analysis                 measurements and a suggested plan, where the recipe analyzes
OUTPUT/benchmark                results.json of the benchmark
OUTPUT/results                  the same with the variants' accuracy
OUTPUT/report                   report.html, report.md, report.csv, charts

Here is the order of the steps. A new one is a function in `engines.run_models` or `engines.run_engines`, and its line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.base import Backend, Foreseen
from engines.bench import Progress
from engines.run_engines import (
    Note,
    backends_of,
    bench_step,
    check_engine,
    check_prediction,
    engine_step,
    missing_runtimes,
    network_step,
    prediction_of,
    report_step,
    results_step,
)
from engines.run_models import (
    SAVED_RUN,
    Done,
    Variant,
    analysis_step,
    calibration_step,
    check_measuring,
    check_model,
    checkpoint_step,
    distill_step,
    evaluate_step,
    missing_devices,
    quantization_step,
)
from exporter.analysis import tasks
from exporter.errors import FuselageError, raise_all
from exporter.graph import ModelGraph, structure
from exporter.manifests import PLAN_FILE
from exporter.pipeline import Step, apply_plan, finished, refuse_edited, refuse_overlap, run_step, source_fingerprint
from exporter.plan import Plan, read_plan
from exporter.read import open_model
from exporter.recipe import STEP_FOLDERS, Recipe, VariantRecipe
from exporter.writers.files import refuse_foreign, space_problems
from exporter.writers.onnx_quantization import number_format

if TYPE_CHECKING:
    from exporter.analysis.evaluate import HeldModel

Notify = Callable[[str, bool], None]  # (step, whether it was made now; False: it was there already)


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
    knows. Steps that are complete and whose inputs are the same are not repeated. Files that people changed in the
    folders of steps, or put there, are refused: `run` would replace them.

    Raises:
        FuselageError: this machine lacks something, or that of the step that failed; the steps before it stay.
    """

    def made(step: Step) -> Done:
        manifest, now = run_step(step)
        if notify is not None:
            notify(step.name, now)
        return Done(folder=step.folder, fingerprint=manifest.fingerprint)

    backends = backends_of(recipe, progress)
    raise_all(dry_run_recipe(recipe, output).missing)
    _, result = _carry_out(recipe, output, backends, made, need_weights=True, progress=progress, note=note)
    return result


@dataclass(frozen=True, slots=True)
class ForeseenStep:
    """A step as a dry run sees it."""

    name: str
    folder: Path
    is_there: bool  # complete; False: it would be made, unless the steps before it turn out as they were
    total_bytes: int | None  # of a model or network; None: it is neither


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeseenVariant:
    """A variant as a dry run sees it."""

    name: str
    structure: ModelGraph | None  # what plan and quantization give; None: its plan is yet to be suggested
    backend: str | None  # None: it is not timed
    engine: Foreseen | None  # None: there is none, or its plan is yet to be suggested


@dataclass(frozen=True, slots=True)
class DryRun:
    """What `run_recipe` would do."""

    variants: list[ForeseenVariant]
    steps: list[ForeseenStep]
    missing: list[FuselageError]  # on this machine: what `run_recipe` would stop for


def dry_run_recipe(recipe: Recipe, output: Path) -> DryRun:
    """Check a recipe as `run_recipe` does, and say what it would do; nothing is written.

    Neither weights nor the runtime need be there, so that a recipe for another machine can be checked on this one.

    Raises:
        FuselageError: as `run_recipe` before its first step, but for what this machine lacks.
    """
    steps: list[ForeseenStep] = []

    def seen(step: Step) -> Done:
        manifest = finished(step)
        total_bytes = None if step.total_bytes is None else step.total_bytes()
        steps.append(ForeseenStep(step.name, step.folder, manifest is not None, total_bytes))
        fingerprint = f"that of step {step.key}" if manifest is None else manifest.fingerprint
        return Done(folder=step.folder, fingerprint=fingerprint, is_there=manifest is not None)

    backends = backends_of(recipe, progress=None)
    planned, _ = _carry_out(recipe, output, backends, seen, need_weights=False)
    variants = [_foreseen(wanted, planned.get(wanted.name)) for wanted in recipe.variants]
    return DryRun(variants, steps, [*_missing(recipe, backends), *_space_problems(steps, output)])


def _space_problems(steps: Sequence[ForeseenStep], output: Path) -> Iterator[FuselageError]:
    """Whether the models and networks that are yet to be written have room, each beside the one that it replaces.

    Engines, which share the networks' files where they can, are not counted, nor is what follows from an analysis.
    """
    needed = kept = 0
    for step in steps:
        if step.total_bytes is not None and not step.is_there:
            needed = max(needed, kept + step.total_bytes)
            kept += step.total_bytes - _bytes_of_folder(step.folder)
    disk = next(path for path in (output.absolute(), *output.absolute().parents) if path.is_dir())
    yield from space_problems(disk, needed, of="the models and networks of the recipe")


def _bytes_of_folder(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _foreseen(wanted: VariantRecipe, variant: Variant | None) -> ForeseenVariant:
    return ForeseenVariant(
        name=wanted.name,
        structure=None if variant is None else variant.expected,
        backend=wanted.engine.name if wanted.bench else None,
        engine=None if variant is None else variant.engine,
    )


@contextmanager
def _named_in_errors(variant: VariantRecipe) -> Iterator[None]:
    try:
        yield
    except FuselageError as error:
        error.problem = f"variant {variant.name!r}: {error.problem}"
        raise


def _missing(recipe: Recipe, backends: Mapping[str, Backend]) -> list[FuselageError]:
    problems: list[FuselageError] = [*missing_runtimes(recipe, backends.values()), *missing_devices(recipe)]
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        problems += tasks.missing()
    return problems


def _carry_out(
    recipe: Recipe,
    output: Path,
    backends: Mapping[str, Backend],
    made: Callable[[Step], Done],
    *,
    need_weights: bool,
    progress: Progress | None = None,
    note: Note | None = None,
) -> tuple[dict[str, Variant], Path]:
    """Check everything, then have every step `made`, or looked at in a dry run.

    Args:
        backends: by the names of the variants that are timed.

    Returns:
        The variants as planned, by name, and the folder of the last step.
    """
    steps: dict[tuple[str, str], Done] = {}

    def once(step: Step) -> Done:
        """Variants that have a step in common, one plan in two engines say, share the folder of the first."""
        if (step.kind, step.key) not in steps:
            steps[step.kind, step.key] = made(step)
        return steps[step.kind, step.key]

    folders = [output / name for name in (*STEP_FOLDERS, *(variant.name for variant in recipe.variants))]
    for folder in folders:
        refuse_overlap(recipe.model, folder)
    refuse_foreign(output, deeper=f"*/{SAVED_RUN}/*/*")
    for folder in folders:
        for made_before in (folder, *sorted(folder.glob("*"))):
            refuse_edited(made_before)
    source = open_model(recipe.model, need_weights=need_weights)
    source_key = source_fingerprint(recipe.model)
    check_measuring(recipe, source)
    prediction = None if recipe.predict is None else prediction_of(recipe.predict, source.graph)

    def planned(wanted: VariantRecipe, plan: Plan) -> Variant:
        with _named_in_errors(wanted):
            graph = apply_plan(source.graph, plan, norm=wanted.norm)
            expected = check_model(wanted, graph, source.graph)
            engine = check_engine(recipe, wanted, expected) if wanted.bench else None
            if engine is not None and prediction is not None:
                check_prediction(prediction, expected, engine)
        folder = output / wanted.name
        return Variant(
            recipe=wanted,
            plan=plan,
            folder=folder,
            checkpoint=source,
            graph=graph,
            expected=expected,
            engine=engine,
            key=source_key,
        )

    variants = {wanted.name: planned(wanted, wanted.plan) for wanted in recipe.variants if wanted.plan != "auto"}
    for wanted in recipe.variants:
        if wanted.plan == "auto":
            planned(wanted, Plan())  # what fits no plan is not to be found after hours of analysis
    analysis = calibration = None
    if recipe.analysis is not None:
        analysis = once(analysis_step(recipe.analysis, output / "analysis", source, source_key))
        if analysis.is_there:
            suggested = read_plan(analysis.folder / PLAN_FILE)
            variants |= {wanted.name: planned(wanted, suggested) for wanted in recipe.variants if wanted.plan == "auto"}
    calibrate = recipe.calibration
    if calibrate is not None and any(wanted.quantize and not wanted.distill for wanted in recipe.variants):
        calibration = once(calibration_step(calibrate, output / "calibration", source, source_key))
    engines: list[Done] = []
    quantizations: dict[str, Done] = {}
    evaluations: dict[str, Done] = {}
    untimed: dict[str, dict[str, Any]] = {}
    held: dict[str, HeldModel] = {}
    for wanted in recipe.variants:
        variant, ranges, rounding = variants.get(wanted.name), calibration, None
        if variant is None:  # in a dry run: its steps follow from an analysis that is yet to be made
            engines += [analysis] if wanted.bench and analysis is not None else []
            continue
        if wanted.distill is not None:
            variant = variant.written(once(distill_step(wanted.distill, variant, progress)), variant.graph)
            if wanted.quantize is not None and calibrate is not None:  # training has moved the ranges
                own = variant.folder / "calibration"
                ranges = once(calibration_step(calibrate, own, variant.checkpoint, variant.key, of=wanted.name))
        if wanted.quantize is not None and calibrate is not None and ranges is not None:
            rounding = once(quantization_step(calibrate, variant, wanted.quantize, ranges))
            if rounding.folder.is_relative_to(variant.folder):  # else the report has it already
                quantizations[wanted.name] = rounding
        if wanted.checkpoint and (variant.graph is not variant.checkpoint.graph or wanted.quantize is not None):
            written = once(checkpoint_step(variant, ranges, rounding))
            variant = variant.written(written, variant.expected)
        if wanted.bench:
            network = None if wanted.network is None else once(network_step(variant, wanted.network))
            engines.append(once(engine_step(backends[wanted.name], variant, network)))
        else:
            graph = variant.graph
            untimed[wanted.name] = {"structure": structure(graph), "number_format": number_format(graph)}
        if recipe.evaluate is not None:
            evaluations[wanted.name] = once(evaluate_step(recipe.evaluate, variant, source, held))
    if recipe.bench is None:
        return variants, output
    results = once(bench_step(recipe.bench, output / "benchmark", engines, progress, note))
    if evaluations:
        results = once(results_step(output / "results", results, evaluations, untimed))
    report = once(report_step(recipe, output / "report", results, analysis, quantizations, prediction))
    return variants, report.folder
