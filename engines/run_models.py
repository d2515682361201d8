"""The steps of a recipe that measure the model, make the variants' models and judge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.base import Foreseen
from engines.bench import Progress
from exporter.analysis import tasks
from exporter.errors import FuselageError, raise_all
from exporter.graph import ModelGraph
from exporter.manifests import ERRORS_FILE
from exporter.passes.find_blocks import blocks_of_range
from exporter.passes.quantize_linears import structure_quantized
from exporter.pipeline import Step, Writing, checkpoint_writing, distilled_writing, save, source_fingerprint
from exporter.plan import Plan
from exporter.quantization import QuantizationRecipe
from exporter.read import Checkpoint, open_model
from exporter.recipe import (
    AnalysisRecipe,
    CalibrationRecipe,
    DistillRecipe,
    EvaluateRecipe,
    Recipe,
    VariantRecipe,
    WindowsRecipe,
)
from exporter.safetensors_io import read_json
from exporter.text import MAX_TEXT_BYTES, check_context, check_text, model_windows, open_tokenizer
from exporter.writers import hf
from exporter.writers.files import json_bytes, save_folder

if TYPE_CHECKING:
    import numpy as np

    from exporter.analysis.evaluate import HeldModel
    from exporter.distill import Settings

EVALUATION_FILE = "evaluation.json"
SAVED_RUN = "distilling"  # folder, while a variant is trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The folder of a step, complete but in a dry run."""

    folder: Path
    fingerprint: str  # of its manifest
    is_there: bool = True  # False: a dry run, and the step would be made


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A variant of a recipe, as far as it has come."""

    recipe: VariantRecipe
    plan: Plan
    folder: Path  # of its steps
    checkpoint: Checkpoint  # the source, or what a step has written
    graph: ModelGraph  # that of `checkpoint`, or what the plan makes of it
    expected: ModelGraph  # what plan and quantization give; of a quantized variant only the structure
    engine: Foreseen | None  # None: it is not timed
    key: Mapping[str, Any]  # what `checkpoint` is recognized by

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def described(self) -> dict[str, Any]:
        """What was made of the source, for the inputs of steps."""
        return {"plan": self.plan.model_dump(mode="json"), "norm": self.recipe.norm}

    @property
    def saved_run(self) -> Path:
        """What an interrupted distillation goes on from."""
        return self.folder / SAVED_RUN

    def written(self, done: Done, foreseen: ModelGraph) -> Variant:
        """The same variant, read from a model folder that a step has written, or in a dry run, would write."""
        if done.is_there:
            checkpoint = open_model(done.folder, need_weights=True)
        else:
            _, read = hf.folder_of(foreseen, hf.with_source(hf.Options(), self.checkpoint, foreseen))
            checkpoint = replace(self.checkpoint, path=done.folder, graph=read)
        return replace(self, checkpoint=checkpoint, graph=checkpoint.graph, key={"manifest": done.fingerprint})


def check_measuring(recipe: Recipe, source: Checkpoint) -> None:
    """Raise what would keep the recipe's texts or tasks from being measured, and wishes that no measurement fulfils."""
    trained = [wanted.distill for wanted in recipe.variants]
    measured = [
        (wanted.text, wanted.context)
        for wanted in (recipe.analysis, recipe.calibration, recipe.evaluate, *trained)
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
    if recipe.evaluate is not None and recipe.evaluate.tasks and not tasks.missing():
        wanted = recipe.evaluate
        tasks.check_tasks(
            recipe.model, wanted.tasks, include_path=wanted.include_path, trust_remote_code=wanted.trust_remote_code
        )


def missing_devices(recipe: Recipe) -> Sequence[FuselageError]:
    """What this machine lacks to train the recipe's variants."""
    kinds = {variant.distill.device for variant in recipe.variants if variant.distill is not None}
    if not kinds:
        return []
    from exporter.distill_model import device_problems  # imports torch

    return [problem for kind in sorted(kinds) for problem in device_problems(kind)]


def check_model(wanted: VariantRecipe, graph: ModelGraph, source: ModelGraph) -> ModelGraph:
    """Check that what a variant's plan gives, `graph`, can be trained, quantized and written; no tensor is read.

    Returns:
        What the variant's network is to be made of.

    Raises:
        FuselageError: it cannot.
    """
    if wanted.distill is not None:
        _check_distillation(wanted.distill, graph, source)
    quantized = graph if wanted.quantize is None else structure_quantized(graph, wanted.quantize)
    if wanted.checkpoint and quantized is not source:
        raise_all(hf.check(quantized, hf.Options()))
    return quantized


def _check_distillation(wanted: DistillRecipe, graph: ModelGraph, source: ModelGraph) -> None:
    from exporter.distill import check_distillation  # imports torch

    # How many windows a text has is known once it was read: till then, as many as one can have.
    settings = _distill_settings(wanted, wanted.max_windows or MAX_TEXT_BYTES // wanted.context)
    check_distillation(graph, source, settings, blocks=_trained_blocks(wanted, graph))


def analysis_step(wanted: AnalysisRecipe, folder: Path, source: Checkpoint, source_key: Mapping[str, Any]) -> Step:
    """Measure the source, and suggest a plan."""

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
    inputs = {"source": source_key, "text": text, "analysis": wanted.model_dump(mode="json", exclude={"text"})}
    return Step(name="analysis", folder=folder, kind="analysis", inputs=inputs, make=make)


def calibration_step(
    wanted: CalibrationRecipe, folder: Path, model: Checkpoint, key: Mapping[str, Any], *, of: str | None = None
) -> Step:
    """Find the activation ranges of the source, or of what was trained `of` a variant; `key` tells models apart."""

    def make(details: Mapping[str, Any]) -> None:
        from exporter.calibration import calibrate, calibration_files  # imports torch

        tokens, _ = _calibration_windows(wanted, model)
        found = calibrate(model.graph, tokens, text=wanted.text.name, percentile=wanted.percentile)
        save_folder(folder, calibration_files(found).items(), kind="calibration", details=details, force=True)

    text = source_fingerprint(wanted.text)
    inputs = {"source": key, "text": text, "calibration": wanted.model_dump(mode="json", exclude={"text"})}
    name = "calibration" if of is None else f"{of}: calibration"
    return Step(name=name, folder=folder, kind="calibration", inputs=inputs, make=make)


def distill_step(wanted: DistillRecipe, variant: Variant, progress: Progress | None) -> Step:
    """Train what a variant's plan gives on the logits of the source. Interrupted, it goes on from its last save."""
    folder = variant.folder / "distilled"

    def make(details: Mapping[str, Any]) -> None:
        import torch

        from exporter.distill import distill
        from exporter.distill_model import Processes

        source, graph = variant.checkpoint, variant.graph
        tokens = _windows(wanted.text, wanted, source)
        found = distill(
            graph,
            source.graph,
            tokens,
            _distill_settings(wanted, len(tokens)),
            blocks=_trained_blocks(wanted, graph),
            processes=Processes(0, 1, torch.device(wanted.device)),
            folder=variant.saved_run,
            save_every=wanted.save_every,
            identity={"model": variant.key, "norm": variant.recipe.norm},
            progress=progress,
        )
        described = {**variant.described, "text": str(wanted.text), "context": wanted.context}
        writing = distilled_writing(source, found, folder, details=described, force=True)
        save(replace(writing, details={**writing.details, **details}))

    def tidy() -> None:
        if variant.saved_run.is_dir():
            from exporter.distill_state import remove_run  # imports torch

            remove_run(variant.saved_run)

    inputs = {
        **variant.described,
        "source": variant.key,
        "text": source_fingerprint(wanted.text),
        # What is left out says where the text is, or is about the machine and changes the result by rounding at most.
        "distill": wanted.model_dump(mode="json", exclude={"text", "accumulate", "recompute", "device", "save_every"}),
    }

    def total_bytes() -> int:
        return checkpoint_writing(variant.checkpoint, variant.graph, folder, details={}, force=True).total_bytes

    return Step(
        name=f"{variant.name}: distillation",
        folder=folder,
        kind="checkpoint",
        inputs=inputs,
        make=make,
        tidy=tidy,
        total_bytes=total_bytes,
    )


def _distill_settings(wanted: DistillRecipe, windows: int) -> Settings:
    from exporter.distill import Settings, steps_of  # imports torch

    return Settings(
        steps=wanted.steps or steps_of(wanted.epochs, windows, wanted.batch),
        batch=wanted.batch,
        accumulate=wanted.accumulate,
        learning_rate=wanted.lr,
        warmup=wanted.warmup,
        weight_decay=wanted.weight_decay,
        temperature=wanted.temperature,
        hidden_weight=wanted.hidden_weight,
        dtype=wanted.dtype,
        seed=wanted.seed,
        recompute=wanted.recompute,
    )


def _trained_blocks(wanted: DistillRecipe, graph: ModelGraph) -> list[int] | None:
    """Indices of the blocks that hold the layers to train; None: all."""
    if wanted.blocks is None:
        return None
    ranges = [(entry, entry) if isinstance(entry, int) else entry for entry in wanted.blocks]
    return sorted({index for layers in ranges for index in blocks_of_range(graph, layers)})


def quantization_step(
    wanted: CalibrationRecipe, variant: Variant, recipe: QuantizationRecipe, calibration: Done
) -> Step:
    """Choose how each site of a variant is smoothed, and say what rounding costs.

    Args:
        calibration: of the variant's checkpoint.
    """
    folder = variant.folder / "quantization"

    def make(details: Mapping[str, Any]) -> None:
        from exporter.calibration import read_calibration  # imports torch
        from exporter.quantize import error_files, quantize

        _, aside = _calibration_windows(wanted, variant.checkpoint)
        known = read_calibration(calibration.folder)
        found = quantize(variant.graph, recipe, source=variant.checkpoint.graph, calibration=known, tokens=aside)
        text = f"{variant.name}, {aside.size:,} tokens of {wanted.text.name}"
        files = error_files(found, variant.graph, aside, source=text)
        save_folder(folder, files.items(), kind="quantization", details=details, force=True)

    inputs = {
        **variant.described,
        "source": variant.key,
        "calibration": calibration.fingerprint,
        "text": source_fingerprint(wanted.text),  # the ranges know nothing of the windows set aside
        "quantize": recipe.model_dump(mode="json"),
    }
    return Step(name=f"{variant.name}: quantization", folder=folder, kind="quantization", inputs=inputs, make=make)


def checkpoint_step(variant: Variant, calibration: Done | None, quantization: Done | None) -> Step:
    """Write a variant as a Hugging Face folder.

    Args:
        calibration, quantization: where it is quantized.
    """
    folder, recipe = variant.folder / "checkpoint", variant.recipe.quantize

    def make(details: Mapping[str, Any]) -> None:
        graph = variant.graph
        if recipe is not None and calibration is not None and quantization is not None:
            from exporter.calibration import read_calibration  # imports torch
            from exporter.quantize import quantize, strengths_from_errors

            strengths = strengths_from_errors(read_json(quantization.folder / ERRORS_FILE))
            known = read_calibration(calibration.folder)
            source = variant.checkpoint.graph
            graph = quantize(graph, recipe, source=source, calibration=known, strengths=strengths).graph
        save(writing(graph, {**details, **variant.described}))

    def writing(graph: ModelGraph, details: Mapping[str, Any]) -> Writing:
        return checkpoint_writing(variant.checkpoint, graph, folder, details=details, force=True)

    inputs: dict[str, Any] = {"source": variant.key, **variant.described}
    if recipe is not None and calibration is not None and quantization is not None:
        inputs["calibration"], inputs["quantization"] = calibration.fingerprint, quantization.fingerprint
        inputs["quantize"] = recipe.model_dump(mode="json")  # a KV cache, say, leaves no trace in `quantization`
    return Step(
        name=f"{variant.name}: checkpoint",
        folder=folder,
        kind="checkpoint",
        inputs=inputs,
        make=make,
        total_bytes=lambda: writing(variant.expected, {}).total_bytes,
    )


def evaluate_step(wanted: EvaluateRecipe, variant: Variant, source: Checkpoint, held: dict[str, HeldModel]) -> Step:
    """Judge a variant; `held` keeps what the source makes of the text, if it is not too much, for the next variant."""
    folder = variant.folder / "evaluation"

    def make(details: Mapping[str, Any]) -> None:
        from exporter.analysis.evaluate import can_be_held, evaluate, hold  # imports torch

        found: dict[str, Any] = {}
        if wanted.text is not None:
            tokens = _windows(wanted.text, wanted, source)
            is_source = variant.graph is source.graph
            if not is_source and "source" not in held and can_be_held(source.graph, tokens):
                held["source"] = hold(source.graph, tokens)
            reference = None if is_source else held.get("source", source.graph)
            found = evaluate(variant.graph, tokens, reference=reference).to_json()
        if wanted.tasks:
            scores = tasks.run_tasks(
                variant.checkpoint.path,
                wanted.tasks,
                include_path=wanted.include_path,
                limit=wanted.limit,
                # What this run wrote brings our own code.
                trust_remote_code=variant.checkpoint is not source or wanted.trust_remote_code,
            )
            found["tasks"] = [score.to_json() for score in scores]
        save_folder(folder, [(EVALUATION_FILE, json_bytes(found))], kind="evaluation", details=details, force=True)

    inputs = {
        **variant.described,
        "source": source_fingerprint(source.path),
        "model": variant.key,
        "text": wanted.text and source_fingerprint(wanted.text),
        "tasks": wanted.include_path and source_fingerprint(wanted.include_path),
        "evaluate": wanted.model_dump(mode="json", exclude={"text", "include_path"}),
    }
    return Step(name=f"{variant.name}: evaluation", folder=folder, kind="evaluation", inputs=inputs, make=make)


def _windows(text: Path, wanted: WindowsRecipe, model: Checkpoint) -> np.ndarray:
    """A text in the model's tokens, int64 [windows, context]."""
    return model_windows(text, model, context=wanted.context, max_windows=wanted.max_windows)


def _calibration_windows(wanted: CalibrationRecipe, model: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Windows to calibrate on, and others to choose alpha and measure errors on."""
    from exporter.quantize import split_windows

    return split_windows(_windows(wanted.text, wanted, model))
