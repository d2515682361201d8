"""Results files -> one HTML page, one Markdown page, a CSV table, charts. Renders what the files say and runs nothing.

This module chooses what is said and shown; `engines.report_pages` writes it down.
"""

from __future__ import annotations

import itertools
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.accuracy import accuracy_table, findings
from engines.analysis import Analysis, check_same_layers, read_analysis
from engines.charts import (
    Chart,
    chart_images,
    structure_images,
)
from engines.comparison_table import (
    MEMORY_NOISE,
    METRICS,
    Figures,
    Intervals,
    Row,
    comparison_rows,
    csv_of,
    have_comparable_times,
    intervals_of,
    ratio_to_baseline,
)
from engines.intervals import LEAST_ROUNDS, RatioInterval
from engines.prediction_report import METRICS as PREDICTED_METRICS
from engines.prediction_report import Calibration, Predicted, Wanted, without_predicted
from engines.quantization_errors import QuantizationErrors, read_quantization_errors
from engines.report_pages import html_page, markdown_page
from engines.report_words import (
    NOTHING,
    compared,
    depth_text,
    digits,
    interval_text,
    is_same,
    joined,
    named,
    pace_of,
    ratio_text,
    shortened,
    spread_text,
)
from engines.results import (
    Comparison,
    EngineResult,
    Environment,
    EvaluatedModel,
    GpuState,
    RequestShape,
    Spread,
    Statistics,
    comparison_from_results,
    ratio,
    read_results_bytes,
    results_from_json,
    statistics,
)
from engines.structure_strip import strips_from_structures
from engines.throughput import Layout as ThroughputLayout
from engines.throughput import (
    throughput_chart,
    throughput_images,
    throughput_layout,
)
from engines.time_chart import time_charts, time_images, time_layout, time_note
from engines.tradeoff import Point, Tradeoff, tradeoff_images, tradeoff_layout
from exporter.errors import EngineError
from exporter.structure import FFNShape, Structure

CPU_NOTE = (
    "These engines ran on a CPU, which at small batch is bound by reading weights from memory. Fusion saves sequential "
    "steps and, under tensor parallelism, one all-reduce each; it does not make weights smaller. So the figures show "
    "that the path works and what it costs here. They are not a verdict on what fusion gains on GPUs."
)
EMULATED_NOTE = (
    "Emulated: the arithmetic of a number format that this hardware lacks is imitated with another one. Such figures "
    "say what the format does to the results, not how fast hardware that has it would be."
)
PREDICTED_NOTE = "Predicted: computed by a latency model from structure and hardware figures. Nothing was run."
FILES_NOTE = (
    "The engines come from several results files: they were not timed in turns, so a drift of the machine between the "
    "files is part of every ratio."
)
TURNS_NOTE = (
    "Engines were timed one after the other, not in turns: a drift of the machine meanwhile is part of every ratio."
)
MACHINES_NOTE = (
    "The results files differ in machine or settings (see Environment): ratios across them compare those as well."
)
ROUNDS_NOTE = (
    f"No ratio of times has a confidence interval: that takes {LEAST_ROUNDS} rounds of each engine. So none is called "
    "better or worse."
)
MEMORY_NOTE = (
    "Peak memory: a fused FFN holds the activations of all its FFNs at once, which take turns in the same memory where "
    "they are not fused. They grow with its width times the tokens of a call, most in prefill: that is much beside the "
    "weights of a small model, little beside those of a large one."
)
DEVICES_NOTE = "The engines are of different devices: ratios across them compare hardware as well as models."
RUNTIMES_NOTE = (
    "The engines are of different runtimes: ratios across them compare runtimes as well as models, and, where the C++ "
    "program timed one and the Python program the other (see Engines), these too."
)


LONGEST_PROBLEM = 300  # characters of why an engine stopped; the results file has all of them
STRUCTURES = 24  # drawn below each other
CHARTED = 8  # engines in a chart, which has as many colours; tables have all
TITLED = 6  # engines named in the headline
LONGEST_TITLED = 120  # characters of their labels together, where there is more than one
COLUMNS = 9  # engines side by side; a table of more has a line for each


@dataclass(frozen=True, slots=True)
class PredictedTable:
    """The engines on one kind of hardware, as predicted."""

    part: Predicted
    shape: RequestShape | None  # None: nothing fits
    rows: Sequence[Row]
    throughput: ThroughputLayout | None


def report_from_results(
    paths: Sequence[Path],
    *,
    baseline: str | None,
    title: str | None = None,
    analysis: Path | None = None,
    quantization: Mapping[str, Path] | None = None,
    prediction: Wanted | None = None,
) -> Iterable[tuple[str, bytes]]:
    """Render results files side by side.

    Args:
        paths: results files.
        baseline: label of the engine that ratios refer to; None takes the first one.
        title: headline of the pages; None names the engines.
        analysis: a folder that `analyze` wrote, whose numbers and plan are shown too.
        quantization: name -> folder of the errors of a quantized model (`quantize --report`), shown too.
        prediction: what the latency model is to say about the engines, in a section of its own.

    Returns:
        (relative path, content) pairs: `report.html` (self-contained), `report.md`, `report.csv`, and every chart as
        PNG and SVG.

    Raises:
        EngineError: a file is malformed, the files do not belong together, or what is wanted cannot be predicted.
            Raised before the first pair.
        CheckpointError, PlanError: a file of the analysis is missing or malformed. Likewise.
    """
    contents = dict(zip(names_of(paths), map(read_results_bytes, paths), strict=True))
    sources = [
        (name, results_from_json(content, file=path))
        for path, (name, content) in zip(paths, contents.items(), strict=True)
    ]
    comparison = comparison_from_results(sources, baseline=baseline)
    study = None
    if analysis is not None:
        study = read_analysis(analysis)
        check_same_layers(study, comparison.models, analysis)
    rounding = read_quantization_errors(quantization or {})
    comparison, predicted = without_predicted(comparison, baseline)
    calibration = None
    if prediction is not None:
        from engines.prediction_of_engines import calibration_of, predicted_parts

        predicted += predicted_parts(comparison, prediction)
        calibration = None if prediction.calibrate is None else calibration_of(comparison, prediction.calibrate)
    return _rendered(contents, comparison, title, study, rounding, predicted, calibration)


def names_of(paths: Sequence[Path]) -> list[str]:
    """What a report calls its files and folders: their names, with where they lie if two have the same.

    Raises:
        EngineError: one is given twice.
    """
    twice = next((path for index, path in enumerate(paths) if path in paths[:index]), None)
    if twice is not None:
        raise EngineError("a file or folder is given twice", file=twice, hint="give each once")
    count = Counter(path.name for path in paths)
    return [path.name if count[path.name] == 1 else str(path) for path in paths]


def _rendered(
    contents: Mapping[str, bytes],
    comparison: Comparison,
    title: str | None,
    study: Analysis | None,
    rounding: Sequence[QuantizationErrors],
    predicted: Sequence[Predicted],
    calibration: Calibration | None,
) -> Iterable[tuple[str, bytes]]:
    figures = _figures(comparison)
    intervals = intervals_of(comparison)
    shape = headline_shape(comparison)
    charted = replace(comparison, engines=comparison.engines[:CHARTED])
    charts = _charts(charted, figures, intervals, shape)
    tradeoffs = [tradeoff_layout(chart) for chart in _tradeoffs(charted, figures, shape)]
    curves = throughput_chart(charted, figures, shape, file="throughput.png")
    throughput = None if curves is None else throughput_layout(curves)
    profiled = time_charts(charted.engines)
    times = [time_layout(chart) for chart in profiled]
    structures = _structures(comparison)
    drawn = structures[:STRUCTURES]
    strips = strips_from_structures([structure for _, structure in drawn])
    drawings = list(zip([name for name, _ in drawn], strips, strict=True))
    predictions = [_predicted_table(part, index) for index, part in enumerate(predicted)]
    parts: list[tuple[Comparison, Figures, Intervals]] = [(comparison, figures, intervals)]
    parts += [(part.comparison, _figures(part.comparison), {}) for part in predicted]
    context: dict[str, Any] = {
        "comparison": comparison,
        "title": title or _title([engine.label for engine in comparison.engines]),
        "summary": summary_sentence(comparison, figures, shape, intervals),
        "shape": shape,
        "tiles": [_tile(comparison, figures, shape, engine, intervals) for engine in charted.engines[1:]],
        "notes": _notes(comparison, intervals),
        "memory_note": MEMORY_NOTE if _wide_ffn_takes_memory(comparison) else "",
        "rows": comparison_rows(comparison, figures, intervals, shape),
        "has_intervals": bool(intervals),
        "interleaved": all(results.environment.interleaved for _, results in comparison.sources),
        "columns": COLUMNS,
        "charted": charted.engines,
        "accuracy": _accuracy_section(comparison, figures, shape, intervals),
        "tradeoffs": tradeoffs,
        "charts": charts,
        "throughput": throughput,
        "structures": structures,
        "times": times,
        "time_note": time_note(profiled),
        "predictions": predictions,
        "calibration": calibration,
        "rounding": rounding,
        "study": study,
        "pictures": [] if study is None else [(p, p.draw("light"), p.draw("dark")) for p in study.pictures],
        "cells": _cell_rows(comparison, figures, intervals),
        "environments": _environments(comparison),
        "commands": list(dict.fromkeys(shlex.join(r.environment.command) for _, r in comparison.sources)),
        "csv": csv_of(parts),
        "rounds": sorted({len(cell.ttft_ms) for cell in comparison.cells.values()}),
    }
    yield "report.html", html_page(context, drawings, contents)
    yield "report.md", markdown_page(context)
    yield "report.csv", context["csv"].encode()
    yield from _images("structure.png", structure_images(drawings))
    for chart in charts:
        yield from _images(chart.file, chart_images(chart, charted.engines))
    for layout in tradeoffs:
        yield from _images(layout.chart.file, tradeoff_images(layout))
    for curve in (throughput, *(table.throughput for table in predictions)):
        if curve is not None:
            yield from _images(curve.chart.file, throughput_images(curve))
    for time in times:
        yield from _images(time.chart.file, time_images(time.chart))
    for picture, light, _ in context["pictures"]:
        yield from _images(picture.file, (light, picture.draw("light", "svg")))


def _images(file: str, images: tuple[bytes, bytes]) -> Iterator[tuple[str, bytes]]:
    """Name the two forms of a chart after its PNG."""
    yield from zip((file, f"{file.removesuffix('.png')}.svg"), images, strict=True)


def _figures(comparison: Comparison) -> Figures:
    return {key: statistics(cell) for key, cell in comparison.cells.items()}


# --- what is said -----------------------------------------------------------------------------------------------------


def headline_shape(comparison: Comparison) -> RequestShape:
    """Choose the request shape that summary and table are about.

    Most engines (the baseline counts double), then the smallest batch, the longest output and the longest input.
    """

    def preference(shape: RequestShape) -> tuple[int, int, int, int]:
        present = sum((engine.label, shape) in comparison.cells for engine in comparison.engines)
        present += (comparison.baseline.label, shape) in comparison.cells
        return present, -shape.batch, shape.output_len, shape.input_len

    return max(comparison.shapes, key=preference)


def _title(labels: Sequence[str]) -> str:
    fitting = sum(length <= LONGEST_TITLED for length in itertools.accumulate(map(len, labels)))
    return "Latency of " + _few(labels, max(1, min(fitting, TITLED)))


def summary_sentence(comparison: Comparison, figures: Figures, shape: RequestShape, intervals: Intervals) -> str:
    """Say in one sentence how the variants compare with the baseline, slower ones included."""
    base = comparison.baseline
    base_ms, what = pace_of(figures.get((base.label, shape)))
    if base_ms is None or base.kind == "emulated" or len(comparison.engines) == 1:
        paces = ((engine, pace_of(figures.get((engine.label, shape)))[0]) for engine in comparison.engines)
        parts = [f"{named(engine)} takes {digits(pace)} ms {what}" for engine, pace in paces if pace is not None]
        return f"{_few(parts) if parts else 'No engine has a time per token'} at {shape}."
    parts = []
    for engine in comparison.engines[1:CHARTED]:
        pace, _ = pace_of(figures.get((engine.label, shape)))
        if pace is None:
            parts.append(f"{named(engine)} was not timed there")
            continue
        if engine.kind == "emulated":
            parts.append(f"{engine.label} is emulated and its time says nothing about its format")
            continue
        words, doubt = _speed_words(base_ms, pace, _pace_interval(engine, shape, intervals))
        parts.append(f"{named(engine)} is {words} {what}{doubt and f' ({doubt})'}")
    more = len(comparison.engines) - CHARTED
    rest = f"; {more:,} more are in the table" if more > 0 else ""
    return f"At {shape}, compared with {named(base)}: {joined(parts)}{rest}."


def _few(texts: Sequence[str], most: int = CHARTED) -> str:
    """Join texts, of many only the first ones."""
    return joined(texts) if len(texts) <= most else f"{', '.join(texts[:most])} and {len(texts) - most:,} more"


def _speed_words(baseline_ms: float, pace_ms: float, interval: RatioInterval | None) -> tuple[str, str]:
    """Say how much faster a pace is, and whether that is certain; nothing where it is."""
    faster = baseline_ms / pace_ms
    if is_same(faster):
        return "as fast", ""
    words = f"{ratio_text(faster)}× faster" if faster > 1 else f"{ratio_text(1 / faster)}× slower"
    return words, "within the noise" if is_same(faster, interval) else ""


def _pace_interval(
    engine: EngineResult | EvaluatedModel, shape: RequestShape, intervals: Intervals
) -> RatioInterval | None:
    """The interval of the ratio of paces (see `pace_of`)."""
    return intervals.get((engine.label, shape, "inter_token_ms" if shape.output_len > 1 else "ttft_ms"))


def _tile(
    comparison: Comparison, figures: Figures, shape: RequestShape, engine: EngineResult, intervals: Intervals
) -> dict[str, Any]:
    base = comparison.baseline
    base_ms, _ = pace_of(figures.get((base.label, shape)))
    pace, what = pace_of(figures.get((engine.label, shape)))
    now, before = (None if one.accuracy is None else one.accuracy.perplexity for one in (engine, base))
    cost = (
        "" if now is None or before is None else f"perplexity {now:,.2f}, {base.label}\N{NO-BREAK SPACE}{before:,.2f}"
    )
    if base_ms is None or pace is None or not have_comparable_times(engine, base):
        return {
            "engine": engine,
            "cost": cost,
            "number": NOTHING,
            "words": "its time says nothing" if engine.kind == "emulated" else "no measurement to compare",
            "interval": "",
            "verdict": "neutral",
        }
    faster = base_ms / pace
    interval = _pace_interval(engine, shape, intervals)
    verdict = compared("", faster, 1, interval, is_beyond_noise=engine.kind == "predicted").verdict
    words = "as fast" if is_same(faster) else "faster" if faster > 1 else "slower"
    _, doubt = _speed_words(base_ms, pace, interval)
    shown = interval if interval is None or faster < 1 else interval.inverse
    return {
        "engine": engine,
        "cost": cost,
        "number": f"{ratio_text(max(faster, 1 / faster))}×",
        "words": f"{words} {what}",
        "interval": interval_text(shown) + (doubt and f", {doubt}"),
        "detail": f"{digits(pace)} ms, {base.label} {digits(base_ms)} ms",
        "verdict": verdict,
    }


def _notes(comparison: Comparison, intervals: Intervals) -> list[str]:
    kinds = {engine.kind for engine in comparison.engines}
    shown = {engine.label for engine in comparison.engines}
    timed = {label for label, _ in comparison.cells}  # the device of an engine that never opened is what it was told
    environments = [
        results.environment.model_dump(exclude={"utc", "command", "seed", "gpus"})
        | {"gpus": [(gpu.name, gpu.driver, gpu.power_limit_w) for gpu in results.environment.gpus]}
        for _, results in comparison.sources
        if shown & {engine.label for engine in results.engines}
    ]
    conditions = (
        (any(e.device == "cpu" and e.kind != "predicted" for e in comparison.engines), CPU_NOTE),
        ("emulated" in kinds, EMULATED_NOTE),
        ("predicted" in kinds, PREDICTED_NOTE),
        (len({engine.device for engine in comparison.engines if engine.label in timed}) > 1, DEVICES_NOTE),
        (len({engine.backend for engine in comparison.engines if engine.label in timed}) > 1, RUNTIMES_NOTE),
        (len(environments) > 1, FILES_NOTE),
        (len(shown) > 1 and not all(one["interleaved"] for one in environments), TURNS_NOTE),
        (any(environment != environments[0] for environment in environments), MACHINES_NOTE),
        (not intervals and _has_measured_ratios(comparison), ROUNDS_NOTE),
    )
    return [*_stopped_notes(comparison), *(note for holds, note in conditions if holds)]


def _has_measured_ratios(comparison: Comparison) -> bool:
    """Whether an engine and the baseline were both measured at one request shape."""
    base = comparison.baseline
    return base.kind == "measured" and any(
        {(engine.label, shape), (base.label, shape)} <= comparison.cells.keys()
        for engine, shape in itertools.product(comparison.engines[1:], comparison.shapes)
        if have_comparable_times(engine, base)
    )


def _stopped_notes(comparison: Comparison) -> Iterator[str]:
    for engine in comparison.engines:
        if engine.stopped is not None:
            yield (
                f"{engine.label} is incomplete: it stopped {engine.stopped.where}, and its figures rest on the rounds "
                f"until then. The cause: {shortened(engine.stopped.problem, LONGEST_PROBLEM)}"
            )


def _wide_ffn_takes_memory(comparison: Comparison) -> bool:
    """Whether an engine with a wider FFN than the baseline's has a higher peak; a GPU's memory is not measured."""
    base = comparison.baseline
    return any(
        engine.device == "cpu"
        and _widest_ffn(engine) > _widest_ffn(base)
        and (ratio(engine.peak_memory_gib, base.peak_memory_gib) or 0) > 1 + MEMORY_NOISE
        for engine in comparison.engines[1:]
    )


def _widest_ffn(engine: EngineResult) -> int:
    ffns = (block.ffn for block in engine.structure.flat_blocks)
    return max((ffn.intermediate_size for ffn in ffns if isinstance(ffn, FFNShape)), default=0)


def _predicted_table(part: Predicted, index: int) -> PredictedTable:
    comparison = part.comparison
    if not comparison.cells:
        return PredictedTable(part, None, (), None)
    figures, shape = _figures(comparison), headline_shape(comparison)
    charted = replace(comparison, engines=comparison.engines[:CHARTED])
    curves = throughput_chart(
        charted, figures, shape, file=f"throughput_predicted_{index}.png", on=part.name, devices=part.tp_size
    )
    return PredictedTable(
        part,
        shape,
        comparison_rows(comparison, figures, {}, shape, metrics=PREDICTED_METRICS),
        None if curves is None else throughput_layout(curves),
    )


def _structures(comparison: Comparison) -> list[tuple[str, Structure]]:
    """The different structures, each with the names of what has it."""
    alike: dict[Any, list[EngineResult | EvaluatedModel]] = {}
    for model in comparison.models:
        alike.setdefault(model.structure.blocks, []).append(model)
    return [
        (f"{_few([model.label for model in models])}: {depth_text(models[0])}", models[0].structure)
        for models in alike.values()
    ]


def _accuracy_section(
    comparison: Comparison, figures: Figures, shape: RequestShape, intervals: Intervals
) -> dict[str, Any] | None:
    """Gather what the table of all variants needs; None where no accuracy was measured."""
    models = comparison.models
    if all(model.accuracy is None for model in models):
        return None
    _, what = pace_of(figures.get((comparison.baseline.label, shape)))
    emulated = {engine.label for engine in comparison.engines if engine.kind == "emulated"}
    paces = [None if m.label in emulated else pace_of(figures.get((m.label, shape)))[0] for m in models]
    sure = [_pace_interval(m, shape, intervals) for m in models]
    columns, rows = accuracy_table(models, (f"Latency {what}", paces), sure)
    return {"columns": columns, "rows": rows, "findings": findings(models)}


def _cell_rows(
    comparison: Comparison, figures: Figures, intervals: Intervals
) -> list[tuple[RequestShape, list[dict[str, Any]]]]:
    """Everything that was timed: per request shape one entry per engine."""
    table = []
    for shape in comparison.shapes:
        entries = []
        base = figures.get((comparison.baseline.label, shape))
        for engine in comparison.engines:
            found = figures.get((engine.label, shape))
            if found is None:
                continue
            quotient = None
            if engine is not comparison.baseline and have_comparable_times(engine, comparison.baseline):
                quotient = ratio(pace_of(found)[0], pace_of(base)[0])
            interval = _pace_interval(engine, shape, intervals)
            is_beyond_noise = engine.kind == "predicted"
            entries.append(
                {
                    "engine": engine,
                    "ttft": spread_text(found.ttft_ms),
                    "inter_token": spread_text(found.inter_token_ms),
                    "steps": [digits(p) for p in (found.step_p50_ms, found.step_p90_ms, found.step_p99_ms)],
                    "per_user": digits(found.output_tokens_per_s_per_user),
                    "total": digits(found.output_tokens_per_s_total.median),
                    "compared": compared("", quotient, -1, interval, is_beyond_noise=is_beyond_noise),
                    "rounds": found.rounds,
                }
            )
        table.append((shape, entries))
    return table


def _environments(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the files ran on: (names of the files, items), files that say the same together."""
    alike: dict[str, list[tuple[str, Environment]]] = {}
    for name, results in comparison.sources:
        key = results.environment.model_dump_json(exclude={"utc", "command"})
        alike.setdefault(key, []).append((name, results.environment))
    return [
        (_few([name for name, _ in files]), _environment_items([environment for _, environment in files]))
        for files in alike.values()
    ]


def _environment_items(environments: Sequence[Environment]) -> list[tuple[str, str]]:
    """Describe environments that differ in nothing but when they began."""
    environment = environments[0]
    began = sorted({one.utc.strftime("%Y-%m-%d %H:%M:%S") for one in environments})
    pinned = environment.pinned_cpus
    return [
        ("CPU", f"{environment.cpu}, {environment.cores} logical cores"),
        ("Memory", f"{environment.memory_gib:.1f} GiB"),
        ("System", environment.os),
        ("Python", environment.python),
        ("Threads", "the runtime's choice" if environment.threads is None else str(environment.threads)),
        ("Pinned to CPUs", "no" if pinned is None else ", ".join(str(cpu) for cpu in pinned)),
        ("Clock", environment.clock),
        ("Warm-up rounds", str(environment.warmup_rounds)),
        *((f"GPU {index}", _gpu_text(gpu)) for index, gpu in enumerate(environment.gpus)),
        ("Seed of the input tokens", "not known" if environment.seed is None else str(environment.seed)),
        ("Began (UTC)", began[0] if len(began) == 1 else f"{began[0]} to {began[-1]}"),
    ]


def _gpu_text(gpu: GpuState) -> str:
    clocks = (("SM clock", gpu.sm_clock_mhz, gpu.max_sm_clock_mhz), ("memory clock", gpu.memory_clock_mhz, None))
    parts = [f"{gpu.name}, driver {gpu.driver}"]
    for name, now, most in clocks:
        if now is not None:
            parts.append(f"{name} {now:,.0f} MHz" + ("" if most is None else f" of {most:,.0f}"))
    if len(parts) > 1:
        parts[-1] += " right after the last request"
    if gpu.power_limit_w is not None:
        parts.append(f"power limit {gpu.power_limit_w:,.0f} W")
    return ", ".join(parts)


def _charts(comparison: Comparison, figures: Figures, intervals: Intervals, shape: RequestShape) -> list[Chart]:
    """Choose the cells of each chart: one length varies, the others are the headline's."""
    by_batch = tuple(s for s in comparison.shapes if s[1:] == shape[1:])
    by_input = tuple(s for s in comparison.shapes if (s.batch, s.output_len) == (shape.batch, shape.output_len))
    lengths = f"input {shape.input_len}, output {shape.output_len}"

    def chart(
        file: str,
        name: str,
        title: str,
        subtitle: str,
        axis: tuple[str, int],
        y_label: str,
        shapes: tuple[RequestShape, ...],
        value: Callable[[Statistics], Spread | None],
    ) -> Chart:
        metric = next(one for one in METRICS if one.name == name)

        def ratio_words(engine: EngineResult, shape: RequestShape) -> str:
            quotient, interval = ratio_to_baseline(comparison, figures, intervals, metric, engine, shape)
            found = compared("", quotient, metric.better, interval)
            between = f", 95 % interval {found.interval}" if found.interval else ""
            return f"; {found.ratio} of {comparison.baseline.label}{between}" if found.ratio else ""

        cells = [[figures.get((engine.label, s)) for s in shapes] for engine in comparison.engines]
        bars = tuple(tuple(None if cell is None else value(cell) for cell in row) for row in cells)
        ratios = tuple(tuple(ratio_words(engine, s) for s in shapes) for engine in comparison.engines)
        return Chart(file, title, subtitle, axis[0], y_label, tuple(s[axis[1]] for s in shapes), bars, ratios)

    charts = (
        chart(
            "inter_token_latency.png",
            "Inter-token latency",
            "Inter-token latency",
            f"{lengths}; lower is better",
            ("batch", 0),
            "ms",
            by_batch,
            lambda s: s.inter_token_ms,
        ),
        chart(
            "time_to_first_token.png",
            "Time to first token",
            "Time to first token",
            f"batch {shape.batch}; lower is better",
            ("input tokens", 1),
            "ms",
            by_input,
            lambda s: s.ttft_ms,
        ),
        chart(
            "tokens_per_second.png",
            "Output tokens/s in total",
            "Total throughput",
            f"{lengths}; higher is better",
            ("batch", 0),
            "tokens/s",
            by_batch,
            lambda s: s.output_tokens_per_s_total,
        ),
    )
    return [chart for chart in charts if any(bar is not None for row in chart.bars for bar in row)]


def _tradeoffs(comparison: Comparison, figures: Figures, shape: RequestShape) -> list[Tradeoff]:
    """Choose the accuracy-latency charts: one per batch size at the headline's lengths, where two engines have both.

    The time of an emulated number format says nothing, so such an engine is in none.
    """
    measures = (("perplexity", "perplexity"), ("kl_divergence", "KL divergence, nats per token"))
    charts = []
    for batch in sorted({s.batch for s in comparison.shapes if s[1:] == shape[1:]}):
        timed = [
            (index, engine, cell.inter_token_ms or cell.ttft_ms)
            for index, engine in enumerate(comparison.engines)
            if engine.kind != "emulated"
            and (cell := figures.get((engine.label, shape._replace(batch=batch)))) is not None
        ]
        for name, y_label in measures:
            points = tuple(
                Point(named(engine), index, latency, value)
                for index, engine, latency in timed
                if (value := getattr(engine.accuracy, name, None)) is not None
            )
            if len(points) > 1 and points[0].series == 0:
                what = "inter-token latency" if shape.output_len > 1 else "time to first token"
                subtitle = f"batch {batch}, input {shape.input_len}, output {shape.output_len}; lower left is better"
                file = f"accuracy_latency_batch_{batch}.png"
                charts.append(Tradeoff(file, "Accuracy and latency", subtitle, f"{what}, ms", y_label, points))
                break
    return charts
