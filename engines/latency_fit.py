"""Fit the latency model's constants to measured latencies, and say how far off it is.

The fit minimizes the largest relative error, or their sum, which a few outliers do not move. Where it is known which
term of each stage's roofline is the larger one, a predicted latency is linear in (1 / memory_efficiency, sublayer_us,
1 / compute_efficiency), so that both are linear programs; they are solved again until what was found no longer changes
which term is the larger one. That can end in a local minimum: the search begins where memory bounds all, where compute
does, and in between.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.hardware import Gpu, gpu_named
from engines.latency_model import (
    PUBLISHED,
    Constants,
    Deployment,
    Prediction,
    Tokens,
    number_format,
    predict,
    structure_from_graph,
)
from engines.results import Results, read_results
from exporter.errors import EngineError
from exporter.plan import read_yaml, validation_error
from exporter.read import open_model
from exporter.structure import Structure

NAMES = tuple(field.name for field in fields(Constants))
MOST_ROUNDS = 50  # of linear programs; a handful suffices
LEAST_SUBLAYER_US = 1e-3
FEW = 8  # observations, of which no outlier can be told

Criterion = Literal["largest", "sum"]  # of the absolute relative errors, to be minimized

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One measured latency, and what the model has to know to predict it."""

    name: str
    structure: Structure
    deployment: Deployment  # its constants are where a fit begins
    tokens: Tokens
    latency_us: float

    def predicted(self, constants: Constants) -> Prediction:
        return predict(self.structure, replace(self.deployment, constants=constants), self.tokens)

    def error(self, constants: Constants) -> float:
        """(predicted - measured) / measured."""
        return self.predicted(constants).latency_us / self.latency_us - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Fitted constants, and what they make of what they were fitted to."""

    constants: Constants
    errors: tuple[float, ...]  # in the order of the observations, signed
    fitted: tuple[str, ...]  # the constants that the observations determine; the others are as they were

    def loss(self, criterion: Criterion) -> float:
        absolute = [abs(error) for error in self.errors]
        return max(absolute) if criterion == "largest" else sum(absolute)


def fit_constants(
    observations: Sequence[Observation], criterion: Criterion = "largest", *, start: Constants = PUBLISHED
) -> Fit:
    """Choose the constants with the smallest errors. What the observations do not determine stays as in `start`.

    Raises:
        EngineError: there are no observations.
    """
    if not observations:
        raise EngineError("nothing to fit constants to", expected="at least one measured latency", found=0)
    best = _fit_from(start, observations, criterion)
    if len(observations) < len(NAMES):
        return best  # so few cannot tell a search from another start from this one
    for slower in ("compute_efficiency", "memory_efficiency"):
        other = replace(start, **{slower: getattr(start, slower) / 100})
        found = _fit_from(other, observations, criterion)
        # Not by a rounding error: what the observations do not determine would come from the shifted start.
        if found.loss(criterion) < best.loss(criterion) * (1 - 1e-6):
            best = found
    return best


def criterion_for(observations: Sequence[Observation]) -> Criterion:
    """What to minimize: the largest error of a few published figures, the sum over many samples of our own."""
    return "largest" if len(observations) < FEW else "sum"


def leave_one_out(observations: Sequence[Observation], criterion: Criterion = "largest") -> list[float]:
    """The error for each observation of the constants that the others alone would give.

    Raises:
        EngineError: without one of them too few are left to fit to.
    """
    fit = fit_constants(observations, criterion)
    if len(observations) <= len(fit.fitted):
        raise EngineError(
            "constants are held against what they were not fitted to",
            expected=f"at least {len(fit.fitted) + 1} measured latencies, for {', '.join(fit.fitted)}",
            found=len(observations),
        )
    return [
        one.error(_fit_from(fit.constants, [other for other in observations if other is not one], criterion).constants)
        for one in observations
    ]


def _fit_from(start: Constants, observations: Sequence[Observation], criterion: Criterion) -> Fit:
    """The best fit on the way from `start` to where nothing changes any more, or to where the way has been before."""
    fits, seen = [_fit_once(observations, criterion, start)], [astuple(start)]
    while len(fits) < MOST_ROUNDS:
        found = astuple(fits[-1].constants)
        if any(np.allclose(found, before, rtol=1e-9, atol=0) for before in seen):
            break
        seen.append(found)
        fits.append(_fit_once(observations, criterion, fits[-1].constants))
    return min(fits, key=lambda fit: fit.loss(criterion))


def _fit_once(observations: Sequence[Observation], criterion: Criterion, constants: Constants) -> Fit:
    from scipy.optimize import linprog

    rows, targets = [], []
    for one in observations:
        stages = one.predicted(constants).stages
        memory = sum(stage.memory_us for stage in stages if stage.is_memory_bound) * constants.memory_efficiency
        compute = sum(stage.compute_us for stage in stages if not stage.is_memory_bound) * constants.compute_efficiency
        sublayers = sum(stage.stage.kind != "lm_head" for stage in stages)
        fixed = sum(stage.all_reduce_us for stage in stages)
        rows.append(np.array([memory, sublayers, compute]) / one.latency_us)
        targets.append(1 - fixed / one.latency_us)
    matrix, target = np.array(rows), np.array(targets)
    is_fitted = [bool(column.any()) for column in matrix.T]
    if len(observations) < sum(is_fitted):
        raise EngineError(
            "too few measured latencies to fit the constants",
            expected=f"at least {sum(is_fitted)}, for {', '.join(itertools.compress(NAMES, is_fitted))}",
            found=len(observations),
        )
    known = (1 / constants.memory_efficiency, constants.sublayer_us, 1 / constants.compute_efficiency)
    least = (1.0, LEAST_SUBLAYER_US, 1.0)  # nothing is faster than its rate
    bounds = [(low, None) if free else (value, value) for low, value, free in zip(least, known, is_fitted, strict=True)]
    # -slack <= predicted / measured - 1 <= slack, with one slack for all or one for each.
    slack = np.ones((len(target), 1)) if criterion == "largest" else np.eye(len(target))
    solved = linprog(
        c=[0, 0, 0, *np.ones(slack.shape[1])],
        A_ub=np.block([[matrix, -slack], [-matrix, -slack]]),
        b_ub=np.concatenate([target, -target]),
        bounds=[*bounds, *[(0, None)] * slack.shape[1]],
    )
    if solved.x is None:
        raise AssertionError(f"Bug: the linear program has no solution ({solved.message})")
    memory, sublayer_us, compute = (float(value) for value in solved.x[:3])
    found = Constants(memory_efficiency=1 / memory, sublayer_us=sublayer_us, compute_efficiency=1 / compute)
    return Fit(
        constants=found,
        errors=tuple(one.error(found) for one in observations),
        fitted=tuple(itertools.compress(NAMES, is_fitted)),
    )


# --- Where measured latencies come from


class _Rate(BaseModel):
    """A published decode rate."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    model: str  # config or structure file, beside this one
    gpu: str
    tp_size: Positive
    format: str
    batch: Positive
    context: Positive
    decode_tokens_per_s: Rate  # of one sequence


class _Rates(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: str
    rates: list[_Rate] = Field(min_length=1, max_length=1000)


def read_observations(path: Path, gpus: Mapping[str, Gpu], *, gpu: Gpu | None = None) -> list[Observation]:
    """Read measured latencies: decode rates in a YAML file, or a results file of `bench`.

    Args:
        gpu: what a results file was measured on; a YAML file names the GPU of every rate.

    Raises:
        FuselageError: the file is malformed, names an unknown GPU or format, or a model that cannot be read.
    """
    if path.suffix not in (".yaml", ".yml"):
        if gpu is None:
            raise EngineError("a results file does not say which hardware to calibrate", file=path, hint="give --gpu")
        return observations_from_results(read_results(path), gpu)
    try:
        file = _Rates.model_validate(read_yaml(path))
    except ValidationError as error:
        raise validation_error(error, _Rates, path) from error
    found = []
    for rate in file.rates:
        graph = open_model(path.parent / rate.model, need_weights=False).graph
        found.append(
            Observation(
                name=rate.name,
                structure=structure_from_graph(graph),
                deployment=Deployment(
                    gpu=gpu_named(rate.gpu, gpus),
                    tp_size=rate.tp_size,
                    format=number_format(rate.format, dtype=graph.dtype.name),
                ),
                tokens=Tokens.decode(rate.batch, rate.context),
                latency_us=1e6 / rate.decode_tokens_per_s,
            )
        )
    return found


def observations_from_results(results: Results, gpu: Gpu) -> list[Observation]:
    """Medians of a results file: of every cell the time to first token, and per token after that.

    Raises:
        EngineError: figures that were not measured, or engines of quantized models, whose kernels differ by runtime.
    """
    found = []
    engines = {engine.label: engine for engine in results.engines}
    for cell in results.cells:
        engine = engines[cell.engine]
        if engine.kind != "measured" or engine.number_format is not None:
            raise EngineError(
                "constants are fitted to measured engines of models that are not quantized",
                expected="measured",
                found=f"{engine.label}: {engine.kind}, {engine.number_format or engine.dtype}",
            )
        deployment = Deployment(gpu=gpu, tp_size=1, format=number_format(engine.dtype, dtype=engine.dtype))
        # While it decodes, a sequence grows from one token more than its input to one less than input and output.
        context = cell.input_len + cell.output_len // 2
        measured = [("time to first token", Tokens.prefill(cell.batch, cell.input_len), cell.ttft_ms)]
        if cell.output_len > 1 and statistics.median(cell.inter_token_ms) > 0:
            measured.append(("decode", Tokens.decode(cell.batch, context), cell.inter_token_ms))
        found += [
            Observation(
                name=f"{engine.label}, {phase}, batch {cell.batch}, input {cell.input_len}",
                structure=engine.structure,
                deployment=deployment,
                tokens=tokens,
                latency_us=1000 * statistics.median(samples_ms),
            )
            for phase, tokens, samples_ms in measured
        ]
    return found
