"""Results files: which engines were timed, on what, and every raw sample; the statistics are derived, never stored.

Beside them stand the models that were only evaluated, for the report to compare in accuracy.

Units are in the keys: `_ms`, `_s`, `_bytes`, `_gib` (2**30 bytes). One *cell* is one engine at one request shape
(batch x input_len x output_len), one *round* one request of that shape. Of a request's `output_len` tokens prefill
gives the first, so a round has one `ttft_ms` and `output_len - 1` entries of `step_ms`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Final, Literal, NamedTuple

import numpy as np
from pydantic import (
    AwareDatetime,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from engines.profile import Profile
from exporter.errors import EngineError, IncompleteError
from exporter.structure import Count, Positive, Sealed, Structure, Text

RESULTS_SCHEMA: Final = 2  # 2: engines may have `stopped`
READ_SCHEMAS: Final = (1, 2)
MAX_RESULTS_BYTES = 64 * 2**20
MAX_TOKENS = 1_000_000  # timed in one benchmark; with three numbers for each the file has some 40 MiB
LEAST_STEPS: Final = {50: 1, 90: 10, 99: 100}  # percentile -> of how many: beyond it one is expected, p50 aside
SHOWN_PROBLEMS = 5
SHOWN_CHARACTERS = 200

Kind = Literal["measured", "emulated", "predicted"]
# A label ends up in tables, file comments and terminals: one line, no control characters.
Label = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
# Of ms, s or GiB. The bounds are far from anything real, and keep finite whatever is computed from such numbers.
Duration = Annotated[float, Field(ge=1e-12, le=1e15, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class GpuState(Sealed):
    """A GPU of the machine, as its driver describes it; None is what it does not tell."""

    name: Text
    driver: Text  # version
    sm_clock_mhz: Amount | None  # right after the last request
    max_sm_clock_mhz: Amount | None
    memory_clock_mhz: Amount | None  # right after the last request
    power_limit_w: Amount | None


class Environment(Sealed):
    """Machine, software and settings of one benchmark."""

    cpu: Text
    cores: Positive  # logical
    memory_gib: Duration
    os: Text
    python: Text
    clock: Text  # what took the samples
    threads: Positive | None  # asked of every runtime; None: the runtime's own choice
    pinned_cpus: tuple[Count, ...] | None  # None: not pinned
    warmup_rounds: Count  # before the rounds that were kept, per cell
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None  # of the input tokens; None: another program chose them
    # Engines took turns, round by round, in the orders of `engines.bench.balanced_orders` (in older files each mostly
    # after the same one); else they were timed one after the other.
    interleaved: bool = True
    gpus: tuple[GpuState, ...] = Field(default=(), max_length=100)  # empty: no engine ran on one, or nobody could tell
    utc: AwareDatetime  # when the benchmark began
    command: tuple[Text, ...]  # the exact command line, word by word


class TaskScore(Sealed):
    """One metric of one task of the evaluation harness."""

    task: Label
    metric: Label
    value: Annotated[float, Field(allow_inf_nan=False)]
    stderr: Amount | None = None  # standard error over the samples
    higher_is_better: bool | None = None  # None: the task does not say
    samples: Count


class Accuracy(Sealed):
    """Quality of a model on held-out text and tasks; None is what was not measured."""

    perplexity: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # of a broken model beyond bounds
    kl_divergence: Amount | None = None  # from the reference model, nats per token
    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None  # with the reference model
    tasks: tuple[TaskScore, ...] = Field(default=(), max_length=1000)


class Stopped(Sealed):
    """Where the benchmark of an engine ended early, and why; the samples until then were kept."""

    batch: Positive
    input_len: Positive
    output_len: Positive
    rounds: Count  # kept at this request shape
    rounds_asked: Positive
    problem: Text

    @property
    def where(self) -> str:
        shape = RequestShape(self.batch, self.input_len, self.output_len)
        return f"after {self.rounds} of {self.rounds_asked} rounds at {shape}"


class EngineResult(Sealed):
    """One engine, and what does not depend on the request; None is what does not apply (predicted figures)."""

    label: Label
    kind: Kind  # of its figures
    backend: Text
    device: Text  # "cpu", or the accelerator's name
    runtime: dict[str, Text]  # versions of what ran it
    program: Literal["cpp", "python"] | None = None  # which of our programs took the samples; None: another one
    dtype: Text  # of activations and KV cache
    number_format: Text | None = None  # of quantized linears, as the engine runs them
    plugins: tuple[Text, ...] = Field(default=(), max_length=100)  # custom ops in place of standard ones
    network_sha256: Text | None = None
    engine_bytes: Count | None = None  # the whole folder
    weight_bytes: Count
    kv_bytes_per_token: Count  # in the engine's own cache dtype
    load_time_s: Duration | None = None  # a fresh process opens the engine; with the Python program, hashes checked
    # Resident memory of that process; with the Python program, interpreter included.
    peak_memory_gib: Duration | None = None
    structure: Structure
    accuracy: Accuracy | None = None
    profiles: tuple[Profile, ...] = Field(default=(), max_length=100)  # of runs apart from the timed ones
    stopped: Stopped | None = None  # None: every request shape has all of its rounds

    @property
    def arithmetic(self) -> str:
        """What reports say of its linears, and of the custom ops that take the place of standard ones."""
        return ", ".join([self.number_format or self.dtype, *self.plugins])

    @property
    def standing(self) -> str:
        """What reports call its figures: their kind, and whether some are missing or rest on fewer rounds."""
        return self.kind if self.stopped is None else f"{self.kind}, incomplete"


class EvaluatedModel(Sealed):
    """A model that was judged on text or tasks, and not timed."""

    label: Label
    number_format: Text | None = None  # of quantized linears
    structure: Structure
    accuracy: Accuracy


class RequestShape(NamedTuple):
    """`batch` sequences of `input_len` tokens side by side, `output_len` new tokens each."""

    batch: int
    input_len: int
    output_len: int

    def __str__(self) -> str:
        return f"batch {self.batch}, input {self.input_len}, output {self.output_len}"


class Cell(Sealed):
    """Raw samples of one engine at one request shape, rounds in the order they were taken."""

    engine: Label
    batch: Positive
    input_len: Positive
    output_len: Positive
    ttft_ms: tuple[Duration, ...] = Field(min_length=1)  # [rounds] prefill and the choice of the first token
    # [rounds][output_len - 1] decode and the choice of the next token; empty if only whole requests were timed
    step_ms: tuple[tuple[Amount, ...], ...]
    request_ms: tuple[Duration, ...]  # [rounds] from the start of prefill to the last token
    # [rounds][output_len] of prefill, then of each decode step, where the program that took the samples knows them:
    # host time in the runtime's own call (a CPU's whole work, a GPU's enqueue), GPU time between events around it
    run_ms: tuple[tuple[Amount, ...], ...] | None = None
    device_ms: tuple[tuple[Amount, ...], ...] | None = None

    @model_validator(mode="after")
    def _samples_fit(self) -> Cell:
        rounds = len(self.ttft_ms)
        if len(self.step_ms) not in (0, rounds) or len(self.request_ms) != rounds:
            raise ValueError(
                f"{rounds} rounds in ttft_ms, {len(self.step_ms)} in step_ms, {len(self.request_ms)} in request_ms"
            )
        for index, steps in enumerate(self.step_ms):
            if len(steps) != self.output_len - 1:
                raise ValueError(f"round {index} has {len(steps)} steps instead of output_len - 1")
        for name, calls in (("run_ms", self.run_ms), ("device_ms", self.device_ms)):
            if calls is not None and [len(call) for call in calls] != [self.output_len] * rounds:
                raise ValueError(f"{name} is not {rounds} rounds of output_len calls")
        for index in range(rounds):
            # Timestamps only grow, so nothing but rounding can bring the whole below the first part.
            if self.request_ms[index] < self.ttft_ms[index] * (1 - 1e-9):
                raise ValueError(f"round {index} has a request shorter than its time to first token")
        return self

    @property
    def shape(self) -> RequestShape:
        return RequestShape(self.batch, self.input_len, self.output_len)

    @property
    def inter_token_ms(self) -> tuple[float, ...]:
        """(request latency - TTFT) / (output tokens - 1), one per round; empty where output_len is 1."""
        if self.output_len == 1:
            return ()
        return tuple(
            max(0.0, request - ttft) / (self.output_len - 1)
            for request, ttft in zip(self.request_ms, self.ttft_ms, strict=True)
        )


class Results(Sealed):
    """A results file."""

    results_schema: Literal[1, 2] = RESULTS_SCHEMA
    environment: Environment
    engines: tuple[EngineResult, ...] = Field(min_length=1, max_length=1000)
    evaluated: tuple[EvaluatedModel, ...] = Field(default=(), max_length=1000)
    cells: tuple[Cell, ...]

    @model_validator(mode="after")
    def _cells_fit_engines(self) -> Results:
        labels = {engine.label for engine in self.engines}
        if len(labels | {model.label for model in self.evaluated}) != len(self.engines) + len(self.evaluated):
            raise ValueError("two engines have the same label")
        seen = set()
        for cell in self.cells:
            if cell.engine not in labels:
                raise ValueError(f"a cell names engine {cell.engine!r}, which is not among the engines")
            if (cell.engine, cell.shape) in seen:
                raise ValueError(f"engine {cell.engine!r} has two cells for {cell.shape}")
            seen.add((cell.engine, cell.shape))
        return self

    @property
    def is_complete(self) -> bool:
        """Whether every engine was timed to the end."""
        return all(engine.stopped is None for engine in self.engines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, smallest and largest of one figure over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What one cell's samples say. None where output_len is 1: there is no second token to wait for.

    The steps' percentiles are also None where only whole requests were timed, or fewer than LEAST_STEPS.
    """

    rounds: int
    ttft_ms: Spread
    request_ms: Spread
    inter_token_ms: Spread | None
    step_p50_ms: float | None  # percentiles over the decode steps of all rounds
    step_p90_ms: float | None
    step_p99_ms: float | None
    output_tokens_per_s_per_user: float | None  # decode rate: 1000 / median inter-token latency
    output_tokens_per_s_total: Spread  # batch * output_len / request latency


def statistics(cell: Cell) -> Statistics:
    """Summarize a cell."""
    request = _spread(cell.request_ms)
    inter_token = _spread(cell.inter_token_ms) if cell.output_len > 1 else None
    steps = np.sort(cell.step_ms, axis=None)
    tokens = cell.batch * cell.output_len
    return Statistics(
        rounds=len(cell.ttft_ms),
        ttft_ms=_spread(cell.ttft_ms),
        request_ms=request,
        inter_token_ms=inter_token,
        step_p50_ms=_percentile(steps, 50),
        step_p90_ms=_percentile(steps, 90),
        step_p99_ms=_percentile(steps, 99),
        output_tokens_per_s_per_user=1000 / inter_token.median if inter_token and inter_token.median else None,
        output_tokens_per_s_total=Spread(
            median=1000 * tokens / request.median, low=1000 * tokens / request.high, high=1000 * tokens / request.low
        ),
    )


def _percentile(ordered: np.ndarray, percent: int) -> float | None:
    """Interpolate linearly between samples in ascending order; None where these are too few."""
    if ordered.size < LEAST_STEPS[percent]:
        return None
    return float(np.interp(percent / 100 * (ordered.size - 1), range(ordered.size), ordered))


def ratio(value: float | None, baseline: float | None) -> float | None:
    """Return value / baseline, None where it says nothing: one of them is missing or negative, or the baseline is 0."""
    if value is None or baseline is None or value < 0 or baseline <= 0:
        return None
    quotient = value / baseline
    return quotient if math.isfinite(quotient) else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Engines of one or more results files side by side, the baseline first."""

    sources: tuple[tuple[str, Results], ...]  # (file name, its content)
    engines: tuple[EngineResult, ...]
    evaluated: tuple[EvaluatedModel, ...] = ()
    cells: dict[tuple[str, RequestShape], Cell]  # by engine label and request shape

    @property
    def baseline(self) -> EngineResult:
        return self.engines[0]

    @property
    def models(self) -> tuple[EngineResult | EvaluatedModel, ...]:
        """The engines, then what was not timed."""
        return *self.engines, *self.evaluated

    @property
    def shapes(self) -> tuple[RequestShape, ...]:
        """Every request shape that occurs, in ascending order."""
        return tuple(sorted({shape for _, shape in self.cells}))


def comparison_from_results(sources: Sequence[tuple[str, Results]], *, baseline: str | None) -> Comparison:
    """Put the engines of results files side by side.

    Args:
        sources: (file name, content) pairs.
        baseline: label that ratios refer to; None takes the first engine of the first file.

    Raises:
        EngineError: nothing to compare, one label in two files, an unknown baseline, or engines of different models.
    """
    engines = {engine.label: engine for _, results in sources for engine in results.engines}
    origin: dict[str, str] = {}
    for name, results in sources:
        models: tuple[EngineResult | EvaluatedModel, ...] = (*results.engines, *results.evaluated)
        for model in models:
            if model.label in origin:
                raise EngineError(
                    f"two results files have an engine labelled {model.label!r}",
                    file=name,
                    found=f"the same label in {origin[model.label]}",
                    hint="build one of the engines with another label, or report the files separately",
                )
            origin[model.label] = name
    cells = {(cell.engine, cell.shape): cell for _, results in sources for cell in results.cells}
    if not cells:
        raise EngineError(
            "there is nothing to report", file=", ".join(name for name, _ in sources) or None, found="no cells"
        )
    first = next(iter(engines)) if baseline is None else baseline
    if first not in engines:
        raise EngineError(
            "no engine has the baseline's label", expected=f"one of {', '.join(sorted(engines))}", found=first
        )
    ordered = (engines[first], *(engine for label, engine in engines.items() if label != first))
    evaluated = tuple(model for _, results in sources for model in results.evaluated)
    comparison = Comparison(sources=tuple(sources), engines=ordered, evaluated=evaluated, cells=cells)
    check_same_model([(model.label, model.structure.model_dump()) for model in comparison.models])
    return comparison


def check_same_model(structures: Sequence[tuple[str, dict]]) -> None:
    """Refuse to compare engines whose models differ in what no pass of ours changes.

    Args:
        structures: (label, `exporter.graph.structure` dict) pairs.

    Raises:
        EngineError: names the label, expected and found.
    """
    reference_label, reference = structures[0]
    for label, structure in structures[1:]:
        for key in ("vocab_size", "hidden_size"):
            if structure.get(key) != reference.get(key):
                raise EngineError(
                    f"engines {reference_label!r} and {label!r} are of different models, a ratio would mean nothing",
                    expected=f"{key} {reference.get(key)}",
                    found=structure.get(key),
                    hint="compare variants of one model",
                )


def read_results(path: Path) -> Results:
    """Read and check a results file.

    Raises:
        EngineError: unreadable, too large, not JSON, of another schema version, or fields that break a rule.
    """
    return results_from_json(read_results_bytes(path), file=path)


def read_results_bytes(path: Path) -> bytes:
    """Read a results file without a look at what is in it.

    Raises:
        EngineError: unreadable or too large.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_RESULTS_BYTES + 1)
    except OSError as error:
        raise EngineError(
            f"the results file cannot be read: {error.strerror}", file=path, hint="it is what `bench` wrote with -o"
        ) from error
    if len(content) > MAX_RESULTS_BYTES:
        raise EngineError("the results file is too large", file=path, expected=f"at most {MAX_RESULTS_BYTES} bytes")
    return content


def results_from_json(content: bytes, *, file: object = None) -> Results:
    """Parse a results file's bytes; `file` is only for error messages."""
    try:
        document = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise EngineError(f"the results file is not JSON: {_clipped(error)}", file=file) from error
    if not isinstance(document, dict) or "results_schema" not in document:
        raise EngineError("this is not a results file", file=file, expected='an object with the key "results_schema"')
    if document["results_schema"] not in READ_SCHEMAS:
        raise EngineError(
            "the results file has another schema version",
            file=file,
            expected=" or ".join(map(str, READ_SCHEMAS)),
            found=_clipped(document["results_schema"]),
            hint="write it again with this version's bench command",
        )
    try:
        results = Results.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise EngineError(f"the results file is malformed: {validation_problems(error)}", file=file) from error
    return results.model_copy(update={"results_schema": RESULTS_SCHEMA})  # as which it is written again


def refuse_incomplete(results: Results, file: Path) -> None:
    """Raise IncompleteError, which names `file`, if the benchmark of an engine ended early."""
    stopped = [
        f"  {engine.label} stopped {engine.stopped.where}: {engine.stopped.problem}\n"
        for engine in results.engines
        if engine.stopped is not None
    ]
    if stopped:
        raise IncompleteError(
            f"the benchmark is incomplete; what was measured is in this file:\n{''.join(stopped)}",
            file=file,
            hint="`report` shows what there is; where memory ran out, time the engines one at a time",
        )


def json_from_results(results: Results) -> bytes:
    """Serialize to UTF-8 JSON, one line per engine, evaluated model and cell so that a diff stays readable."""
    document = results.model_dump(mode="json")
    if not results.environment.gpus:  # a key that older versions, which read this schema, refuse
        del document["environment"]["gpus"]
    parts = [f'"results_schema": {document["results_schema"]}', f'"environment": {json.dumps(document["environment"])}']
    for key in ("engines", "evaluated", "cells"):
        lines = ",\n".join(f"  {json.dumps(entry, allow_nan=False)}" for entry in document[key])
        parts.append(f'"{key}": [\n{lines}\n]')
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def engine_label(label: str | None, folder: Path) -> str:
    """Return what reports are to call an engine: its label, the folder's name if it has none.

    Raises:
        EngineError: results files do not take it: what was built or measured under it could not be kept.
    """
    text = label or folder.absolute().name
    try:
        return TypeAdapter[str](Label).validate_python(text)
    except ValidationError as error:
        raise EngineError(
            "this cannot be the label of an engine",
            expected="one line of at most 100 characters",
            found=ascii(text),
            hint="give another --label",
        ) from error


def validation_problems(error: ValidationError) -> str:
    """List where and why pydantic refused something, the first few problems on one line."""
    problems = [
        f"{'.'.join(str(part) for part in problem['loc']) or 'document'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    shown = "; ".join(_clipped(problem) for problem in problems[:SHOWN_PROBLEMS])
    return shown if len(problems) <= SHOWN_PROBLEMS else f"{shown}; and {len(problems) - SHOWN_PROBLEMS} more"


def _clipped(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _spread(samples: Sequence[float]) -> Spread:
    return Spread(median=float(median(samples)), low=min(samples), high=max(samples))
