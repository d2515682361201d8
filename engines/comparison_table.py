"""The comparison as a table: metrics by engines, with ratios to the baseline and how sure they are; also as CSV."""

from __future__ import annotations

import csv
import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from engines.intervals import LEAST_ROUNDS, RatioInterval, ratio_intervals
from engines.report_words import Unit, Value, compared, formatted
from engines.results import Cell, Comparison, EngineResult, RequestShape, Statistics, ratio

Figures = Mapping[tuple[str, RequestShape], Statistics]  # by engine label and request shape
Samples = Literal["ttft_ms", "inter_token_ms", "request_ms"]  # attributes of a cell, one sample per round
Intervals = Mapping[tuple[str, RequestShape, Samples], RatioInterval]

SAMPLES: Final[tuple[Samples, ...]] = ("ttft_ms", "inter_token_ms", "request_ms")
# Of peak memory, from one run of an engine to the next: in the demo, within 2 %; larger models have less of it.
MEMORY_NOISE = 0.03
CSV_COLUMNS = (
    "engine",
    "kind",
    "device",
    "batch",
    "input_len",
    "output_len",
    "metric",
    "unit",
    "value",
    "baseline",
    "ratio",
    "ratio_low",
    "ratio_high",
    "rounds",
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the comparison: where its value comes from and which direction is good (0: neither)."""

    group: str
    name: str
    unit: Unit
    better: Literal[-1, 0, 1]
    value: Callable[[EngineResult, Statistics | None], float | None]
    samples: Samples | None = None  # whose median the value is, or what it is divided by; None: it has no interval
    noise: float | None = 0.0  # how far from 1 a ratio without an interval may be by chance; None: nobody knows

    @property
    def is_timed(self) -> bool:
        """Whether it depends on the request, and on how fast the machine was."""
        return self.group in ("Latency", "Throughput")

    def is_beyond_noise(self, engine: EngineResult, quotient: float | None) -> bool:
        """Whether a ratio without an interval may be called better or worse; of measured times none may."""
        if engine.kind == "predicted":
            return True
        if quotient is None or self.noise is None or self.is_timed:
            return False
        return not 1 / (1 + self.noise) <= quotient <= 1 + self.noise


def _timing(value: Callable[[Statistics], float | None]) -> Callable[[EngineResult, Statistics | None], float | None]:
    return lambda engine, figures: None if figures is None else value(figures)


def _accuracy(name: str) -> Callable[[EngineResult, Statistics | None], float | None]:
    return lambda engine, figures: getattr(engine.accuracy, name, None)


METRICS = (
    Metric("Latency", "Time to first token", "ms", -1, _timing(lambda s: s.ttft_ms.median), "ttft_ms"),
    Metric(
        "Latency",
        "Inter-token latency",
        "ms",
        -1,
        _timing(lambda s: s.inter_token_ms.median if s.inter_token_ms else None),
        "inter_token_ms",
    ),
    Metric("Latency", "Decode step p50", "ms", -1, _timing(lambda s: s.step_p50_ms)),
    Metric("Latency", "Decode step p90", "ms", -1, _timing(lambda s: s.step_p90_ms)),
    Metric("Latency", "Decode step p99", "ms", -1, _timing(lambda s: s.step_p99_ms)),
    Metric("Latency", "Request", "ms", -1, _timing(lambda s: s.request_ms.median), "request_ms"),
    Metric(
        "Throughput",
        "Output tokens/s per user",
        "tokens/s",
        1,
        _timing(lambda s: s.output_tokens_per_s_per_user),
        "inter_token_ms",
    ),
    Metric(
        "Throughput",
        "Output tokens/s in total",
        "tokens/s",
        1,
        _timing(lambda s: s.output_tokens_per_s_total.median),
        "request_ms",
    ),
    Metric("Memory", "Peak memory", "gib", -1, lambda e, _: e.peak_memory_gib, noise=MEMORY_NOISE),
    Metric("Memory", "Load time", "s", -1, lambda e, _: e.load_time_s, noise=None),  # one sample
    Metric("Memory", "Engine folder", "bytes", -1, lambda e, _: e.engine_bytes),
    Metric("Memory", "Weights", "bytes", -1, lambda e, _: e.weight_bytes),
    Metric("Memory", "KV cache per token", "bytes", -1, lambda e, _: e.kv_bytes_per_token),
    Metric("Structure", "Sequential sublayers", "count", -1, lambda e, _: e.structure.sequential_sublayers),
    Metric("Structure", "Blocks", "count", 0, lambda e, _: len(e.structure.flat_blocks)),
    Metric(
        "Structure",
        "Attention sublayers",
        "count",
        0,
        lambda e, _: sum(block.attention is not None for block in e.structure.flat_blocks),
    ),
    Metric("Structure", "Parameters", "parameters", 0, lambda e, _: e.structure.num_parameters),
    Metric("Accuracy", "Perplexity", "perplexity", -1, _accuracy("perplexity")),
    Metric("Accuracy", "KL divergence, nats per token", "number", -1, _accuracy("kl_divergence")),
    Metric("Accuracy", "Top-1 agreement", "number", 1, _accuracy("top1_agreement")),
)
TIMED = tuple(metric for metric in METRICS if metric.is_timed)


@dataclass(frozen=True, slots=True)
class Row:
    """One metric across the engines."""

    group: str
    name: str
    unit: str
    better: int
    values: tuple[Value, ...]


def have_comparable_times(engine: EngineResult, baseline: EngineResult) -> bool:
    """Whether a ratio of their times says something: both measured or both predicted, and not emulated."""
    return engine.kind == baseline.kind != "emulated"


def intervals_of(comparison: Comparison) -> Intervals:
    """The intervals of all ratios to the baseline's times, where both have rounds enough.

    Rounds of engines that took turns with the baseline are paired.
    """
    origin = {e.label: index for index, (_, results) in enumerate(comparison.sources) for e in results.engines}
    turns = [results.environment.interleaved for _, results in comparison.sources]
    base = comparison.baseline
    found: dict[tuple[str, RequestShape, Samples], RatioInterval] = {}
    for shape in comparison.shapes:
        theirs = comparison.cells.get((base.label, shape))
        if theirs is None:
            continue
        alike: dict[tuple[bool, int], list[Cell]] = defaultdict(list)
        for engine in comparison.engines[1:]:
            ours = comparison.cells.get((engine.label, shape))
            if ours is not None and have_comparable_times(engine, base):
                rounds = len(ours.ttft_ms)
                index = origin[base.label]
                is_paired = origin[engine.label] == index and turns[index] and rounds == len(theirs.ttft_ms)
                alike[is_paired, rounds].append(ours)
        for (is_paired, rounds), cells in alike.items():
            if min(rounds, len(theirs.ttft_ms)) < LEAST_ROUNDS:
                continue
            for name in SAMPLES:
                samples = getattr(theirs, name)
                positive = [cell for cell in cells if all(sample > 0 for sample in getattr(cell, name))]
                if positive and samples and min(samples) > 0:
                    ratios = ratio_intervals([getattr(cell, name) for cell in positive], samples, paired=is_paired)
                    found |= {(cell.engine, shape, name): one for cell, one in zip(positive, ratios, strict=True)}
    return found


def comparison_rows(
    comparison: Comparison,
    figures: Figures,
    intervals: Intervals,
    shape: RequestShape,
    metrics: Sequence[Metric] = METRICS,
) -> list[Row]:
    """Build the comparison table; a metric that no engine has is left out."""
    rows = []
    for metric in metrics:
        values = [metric.value(engine, figures.get((engine.label, shape))) for engine in comparison.engines]
        if all(value is None for value in values):
            continue
        unit, texts = formatted(values, metric.unit)
        cells = [Value(texts[0])]
        for engine, text in zip(comparison.engines[1:], texts[1:], strict=True):
            quotient, interval = ratio_to_baseline(comparison, figures, intervals, metric, engine, shape)
            is_beyond_noise = metric.is_beyond_noise(engine, quotient)
            cells.append(compared(text, quotient, metric.better, interval, is_beyond_noise=is_beyond_noise))
        rows.append(Row(metric.group, metric.name, unit, metric.better, tuple(cells)))
    return rows


def ratio_to_baseline(
    comparison: Comparison,
    figures: Figures,
    intervals: Intervals,
    metric: Metric,
    engine: EngineResult,
    shape: RequestShape,
) -> tuple[float | None, RatioInterval | None]:
    """The ratio to the baseline's value, None where it would say nothing, and its interval, if there is one."""
    base = comparison.baseline
    if engine is base or (metric.is_timed and not have_comparable_times(engine, base)):
        return None, None
    value = metric.value(engine, figures.get((engine.label, shape)))
    of_baseline = metric.value(base, figures.get((base.label, shape)))
    found = None if metric.samples is None else intervals.get((engine.label, shape, metric.samples))
    if found is not None and metric.group == "Throughput":
        found = found.inverse
    return ratio(value, of_baseline), found


def csv_of(parts: Sequence[tuple[Comparison, Figures, Intervals]]) -> str:
    """Write comparisons as one tidy table: a line per engine, request shape and metric.

    Values are in the unit beside them, unrounded; what does not depend on the request has no shape. Ratios refer to
    the engine in `baseline`, which is of the same kind. Texts that a spreadsheet would take for a formula get a `'`.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for comparison, figures, intervals in parts:
        for line in _lines(comparison, figures, intervals):
            writer.writerow(line)
    return stream.getvalue()


def _lines(comparison: Comparison, figures: Figures, intervals: Intervals) -> Iterator[tuple[object, ...]]:
    unit_names = {"gib": "GiB", "count": "", "parameters": "", "perplexity": "", "number": ""}
    shapes = comparison.shapes
    timed, others = ([metric for metric in METRICS if metric.is_timed is is_timed] for is_timed in (True, False))
    for shape, metric in (*itertools.product(shapes, timed), *itertools.product(shapes[:1], others)):
        for engine in comparison.engines:
            cell = figures.get((engine.label, shape))
            value = metric.value(engine, cell)
            if value is None:
                continue
            quotient, interval = ratio_to_baseline(comparison, figures, intervals, metric, engine, shape)
            yield (
                _inert(engine.label),
                engine.kind,
                _inert(engine.device),
                *(shape if metric.is_timed else ("", "", "")),
                metric.name,
                unit_names.get(metric.unit, metric.unit),
                f"{value:.15g}",
                "" if quotient is None else _inert(comparison.baseline.label),
                "" if quotient is None else f"{quotient:.6g}",
                *(("", "") if interval is None else (f"{interval.low:.6g}", f"{interval.high:.6g}")),
                cell.rounds if metric.is_timed and cell is not None else "",
            )


def _inert(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
