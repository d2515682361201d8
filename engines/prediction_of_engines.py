"""Engines of results files as the latency model sees them: on other hardware, and beside what was measured."""

from __future__ import annotations

from dataclasses import replace

from engines.hardware import Gpu
from engines.latency_fit import Observation, criterion_for, fit_constants, leave_one_out, observations_from_results
from engines.latency_model import Deployment, NumberFormat, Tokens, memory_per_gpu, number_format, predict
from engines.prediction_report import Calibration, Predicted, Wanted
from engines.results import Cell, Comparison, EngineResult, RequestShape
from exporter.dtypes import BY_NAME
from exporter.errors import EngineError
from exporter.structure import Structure

BACKEND = "latency model"
# See docs/latency_model.md.
SOURCE = (
    "Constants of the latency model: fitted to published decode rates of models of 70 to 405 billion parameters on "
    "eight GPUs each, which it meets within 2.4 %. Far from those, in prefill and at large batches it is a guide."
)
# How results files begin to call a number format -> the recipe of recipes/quantization that it is.
RECIPES = {
    "int8 (W8A8 static": "int8-smoothquant",
    "int8 (W8A8 per token": "int8-smoothquant-token",
    "int8 (weight only": "int8-weight-only",
    "fp8 (W8A8 static": "fp8",
    "fp8 (W8A8 per token": "fp8-rowwise",
}


def predicted_parts(comparison: Comparison, wanted: Wanted) -> list[Predicted]:
    """Predict a comparison's engines on every GPU at every tensor-parallel size that is wanted.

    Raises:
        EngineError: a size that the heads or the link do not allow, or a format that the GPU does not multiply in.
    """
    return [_predicted(comparison, gpu, size, wanted) for gpu in wanted.gpus for size in wanted.tp_sizes]


def check_wanted(wanted: Wanted, structure: Structure, number_format: str | None, dtype: str) -> None:
    """Raise what `predicted_parts` would raise for an engine, before there is one.

    Args:
        number_format, dtype: as its results will have them.

    Raises:
        EngineError: a size that the heads or the link do not allow, or a format that the GPU does not multiply in.
    """
    form = _format(number_format, wanted.dtype or dtype)
    if form is None:  # it will be said instead
        return
    for gpu in wanted.gpus:
        for size in wanted.tp_sizes:
            predict(structure, Deployment(gpu=gpu, tp_size=size, format=form), Tokens.decode(1, 1))


def _predicted(comparison: Comparison, gpu: Gpu, tp_size: int, wanted: Wanted) -> Predicted:
    shapes = comparison.shapes
    if wanted.batches is not None:
        lengths = sorted({shape[1:] for shape in shapes})
        shapes = tuple(RequestShape(batch, *length) for batch in wanted.batches for length in lengths)
    engines: list[EngineResult] = []
    cells: dict[tuple[str, RequestShape], Cell] = {}
    notes: list[str] = []
    for engine in comparison.engines:
        name = wanted.dtype or engine.dtype
        if name not in BY_NAME:
            raise EngineError(
                f"engine {engine.label!r} has a dtype that cannot be predicted", expected=", ".join(BY_NAME), found=name
            )
        form = _format(engine.number_format, name)
        if form is None:
            notes.append(f"{engine.label} is not predicted: the latency model does not know {engine.number_format}.")
            continue
        placed = Deployment(gpu=gpu, tp_size=tp_size, format=form)
        fitting = [shape for shape in shapes if _fits(engine, placed, shape)]
        if len(fitting) < len(shapes):
            missing = "; ".join(str(shape) for shape in shapes if shape not in fitting)
            notes.append(f"{engine.label} does not fit into the memory at {missing}.")
        engines.append(_engine(engine, placed))
        cells |= {(engine.label, shape): _cell(engine, placed, shape) for shape in fitting}
    part = replace(comparison, sources=(), engines=tuple(engines), evaluated=(), cells=cells)
    return Predicted(name=f"{tp_size}x {gpu.name}", tp_size=tp_size, comparison=part, source=SOURCE, notes=tuple(notes))


def _format(quantized: str | None, dtype: str) -> NumberFormat | None:
    """What results files call a number format, as the latency model knows it."""
    if quantized is None:
        return number_format(dtype, dtype=dtype)
    recipe = next((recipe for start, recipe in RECIPES.items() if quantized.startswith(start)), None)
    return None if recipe is None else number_format(recipe, dtype=dtype)


def _fits(engine: EngineResult, placed: Deployment, shape: RequestShape) -> bool:
    return memory_per_gpu(engine.structure, placed, shape.batch, shape.input_len + shape.output_len).fits


def _engine(engine: EngineResult, placed: Deployment) -> EngineResult:
    memory = memory_per_gpu(engine.structure, placed, 1, 1)
    return EngineResult(
        label=engine.label,
        kind="predicted",
        backend=BACKEND,
        device=placed.name,
        runtime={},
        dtype=placed.format.dtype.name,
        number_format=None if engine.number_format is None else placed.format.name,
        weight_bytes=memory.weight_bytes,
        kv_bytes_per_token=memory.kv_bytes,
        structure=engine.structure,
    )


def _cell(engine: EngineResult, placed: Deployment, shape: RequestShape) -> Cell:
    """One predicted request; of its steps only the mean, at the context that they have on average."""
    batch, input_len, output_len = shape
    prefill = predict(engine.structure, placed, Tokens.prefill(batch, input_len)).latency_ms
    step = predict(engine.structure, placed, Tokens.decode(batch, input_len + output_len // 2)).latency_ms
    return Cell(
        engine=engine.label,
        batch=batch,
        input_len=input_len,
        output_len=output_len,
        ttft_ms=(prefill,),
        step_ms=(),
        request_ms=(prefill + (output_len - 1) * step,),
    )


def calibration_of(comparison: Comparison, gpu: Gpu) -> Calibration:
    """Fit the model to a comparison's measured engines, on hardware with these rates.

    Raises:
        EngineError: no measured engines of models that are not quantized, or too few figures of them.
    """
    is_known = {e.label: e.kind == "measured" and e.number_format is None for e in comparison.engines}
    observations: list[Observation] = []
    for _, results in comparison.sources:
        known = tuple(engine for engine in results.engines if is_known.get(engine.label, False))
        cells = tuple(cell for cell in results.cells if is_known.get(cell.engine, False))
        observations += observations_from_results(results.model_copy(update={"engines": known, "cells": cells}), gpu)
    if not observations:
        raise EngineError(
            f"nothing was measured that the latency model could be held against on {gpu.name}",
            expected="measured engines of models that are not quantized",
            found=", ".join(f"{e.label}: {e.kind}, {e.number_format or e.dtype}" for e in comparison.engines),
        )
    criterion = criterion_for(observations)
    notes = [
        f"{label} is left out: its linears are quantized, or it was not measured."
        for label, known in is_known.items()
        if not known
    ]
    runtimes = dict.fromkeys(engine.backend for engine in comparison.engines if is_known[engine.label])
    if len(runtimes) > 1:
        notes.append(f"{' and '.join(runtimes)} are fitted together, though the constants are each runtime's own.")
    return Calibration(
        gpu=gpu,
        observations=tuple(observations),
        fit=fit_constants(observations, criterion),
        left_out=tuple(leave_one_out(observations, criterion)),
        notes=tuple(notes),
    )
