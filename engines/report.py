"""Results files -> one HTML page, one Markdown page and PNG charts. Renders what the files say and runs nothing.

Everything in a results file is untrusted text: HTML is escaped by jinja2, Markdown by `_markdown_escaped`, and the data
embedded for download cannot end its script element.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from engines.accuracy import accuracy_table, findings
from engines.analysis import Analysis, check_same_layers, read_analysis
from engines.charts import (
    SERIES_COLORS,
    STRIP_COLORS,
    Chart,
    bar_layout,
    chart_png,
    structure_png,
)
from engines.quantization_errors import QuantizationErrors, read_quantization_errors
from engines.report_words import (
    NOTHING,
    Unit,
    Value,
    Verdict,
    compared,
    depth_text,
    digits,
    formatted,
    is_same,
    joined,
    named,
    pace_of,
    spread_text,
)
from engines.results import (
    Comparison,
    EngineResult,
    Environment,
    RequestShape,
    Spread,
    Statistics,
    comparison_from_results,
    json_from_results,
    ratio,
    read_results,
    statistics,
)
from engines.structure_strip import Strip, flat_blocks, roles_of, strips_from_structures
from engines.tradeoff import Point, Tradeoff, tradeoff_layout, tradeoff_png

TEMPLATES = Path(__file__).parent / "templates"
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
MACHINES_NOTE = (
    "The results files differ in machine or settings (see Environment): ratios across them compare those as well."
)
DEVICES_NOTE = "The engines are of different devices: ratios across them compare hardware as well as models."


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the comparison: where its value comes from and which direction is good (0: neither)."""

    group: str
    name: str
    unit: Unit
    better: Literal[-1, 0, 1]
    value: Callable[[EngineResult, Statistics | None], float | None]


def _timing(value: Callable[[Statistics], float | None]) -> Callable[[EngineResult, Statistics | None], float | None]:
    return lambda engine, figures: None if figures is None else value(figures)


def _accuracy(name: str) -> Callable[[EngineResult, Statistics | None], float | None]:
    return lambda engine, figures: getattr(engine.accuracy, name, None)


METRICS = (
    Metric("Latency", "Time to first token", "ms", -1, _timing(lambda s: s.ttft_ms.median)),
    Metric(
        "Latency",
        "Inter-token latency",
        "ms",
        -1,
        _timing(lambda s: s.inter_token_ms.median if s.inter_token_ms else None),
    ),
    Metric("Latency", "Decode step p50", "ms", -1, _timing(lambda s: s.step_p50_ms)),
    Metric("Latency", "Decode step p90", "ms", -1, _timing(lambda s: s.step_p90_ms)),
    Metric("Latency", "Decode step p99", "ms", -1, _timing(lambda s: s.step_p99_ms)),
    Metric("Latency", "Request", "ms", -1, _timing(lambda s: s.request_ms.median)),
    Metric("Throughput", "Output tokens/s per user", "tokens/s", 1, _timing(lambda s: s.output_tokens_per_s_per_user)),
    Metric(
        "Throughput", "Output tokens/s in total", "tokens/s", 1, _timing(lambda s: s.output_tokens_per_s_total.median)
    ),
    Metric("Memory", "Peak memory", "gib", -1, lambda e, _: e.peak_memory_gib),
    Metric("Memory", "Load time", "s", -1, lambda e, _: e.load_time_s),
    Metric("Memory", "Engine folder", "bytes", -1, lambda e, _: e.engine_bytes),
    Metric("Memory", "Weights", "bytes", -1, lambda e, _: e.weight_bytes),
    Metric("Memory", "KV cache per token", "bytes", -1, lambda e, _: e.kv_bytes_per_token),
    Metric("Structure", "Sequential sublayers", "count", -1, lambda e, _: e.structure.sequential_sublayers),
    Metric("Structure", "Blocks", "count", 0, lambda e, _: len(flat_blocks(e.structure))),
    Metric(
        "Structure",
        "Attention sublayers",
        "count",
        0,
        lambda e, _: sum(block.attention is not None for block in flat_blocks(e.structure)),
    ),
    Metric("Structure", "Parameters", "parameters", 0, lambda e, _: e.structure.num_parameters),
    Metric("Accuracy", "Perplexity", "perplexity", -1, _accuracy("perplexity")),
    Metric("Accuracy", "KL divergence, nats per token", "number", -1, _accuracy("kl_divergence")),
    Metric("Accuracy", "Top-1 agreement", "number", 1, _accuracy("top1_agreement")),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One metric across the engines."""

    group: str
    name: str
    unit: str
    better: int
    values: tuple[Value, ...]


def report_from_results(
    paths: Sequence[Path],
    *,
    baseline: str | None,
    title: str | None = None,
    analysis: Path | None = None,
    quantization: Mapping[str, Path] | None = None,
) -> Iterable[tuple[str, bytes]]:
    """Render results files side by side.

    Args:
        paths: results files.
        baseline: label of the engine that ratios refer to; None takes the first one.
        title: headline of the pages; None names the engines.
        analysis: a folder that `analyze` wrote, whose numbers and plan are shown too.
        quantization: name -> folder of the errors of a quantized model (`quantize --report`), shown too.

    Returns:
        (relative path, content) pairs: `report.html` (self-contained), `report.md` and the PNGs it shows.

    Raises:
        EngineError: a file is malformed, or the files do not belong together. Raised before the first pair.
        CheckpointError, PlanError: a file of the analysis is missing or malformed. Likewise.
    """
    comparison = comparison_from_results([(path.name, read_results(path)) for path in paths], baseline=baseline)
    study = None
    if analysis is not None:
        study = read_analysis(analysis)
        check_same_layers(study, comparison.models, analysis)
    return _rendered(comparison, title, study, read_quantization_errors(quantization or {}))


def _rendered(
    comparison: Comparison, title: str | None, study: Analysis | None, rounding: Sequence[QuantizationErrors]
) -> Iterable[tuple[str, bytes]]:
    figures = {key: statistics(cell) for key, cell in comparison.cells.items()}
    shape = headline_shape(comparison)
    charts = _charts(comparison, figures, shape)
    tradeoffs = [tradeoff_layout(chart) for chart in _tradeoffs(comparison, figures, shape)]
    strips = strips_from_structures([model.structure for model in comparison.models])
    context: dict[str, Any] = {
        "comparison": comparison,
        "title": title or "Latency of " + joined([engine.label for engine in comparison.engines]),
        "summary": summary_sentence(comparison, figures, shape),
        "shape": shape,
        "tiles": [_tile(comparison, figures, shape, engine) for engine in comparison.engines[1:]],
        "notes": _notes(comparison),
        "rows": _rows(comparison, figures, shape),
        "accuracy": _accuracy_section(comparison, figures, shape),
        "tradeoffs": tradeoffs,
        "charts": charts,
        "rounding": rounding,
        "study": study,
        "pictures": [] if study is None else [(p, p.draw("light"), p.draw("dark")) for p in study.pictures],
        "cells": _cell_rows(comparison, figures),
        "environments": [(name, _environment_items(results.environment)) for name, results in comparison.sources],
        "commands": list(dict.fromkeys(shlex.join(r.environment.command) for _, r in comparison.sources)),
        "rounds": sorted({len(cell.ttft_ms) for cell in comparison.cells.values()}),
    }
    yield "report.html", _html(context, strips, comparison)
    yield "report.md", _markdown(context)
    yield "structure.png", structure_png(comparison.models, strips)
    for chart in charts:
        yield chart.file, chart_png(chart, comparison.engines)
    for layout in tradeoffs:
        yield layout.chart.file, tradeoff_png(layout)
    for picture, light, _ in context["pictures"]:
        yield picture.file, light


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


def summary_sentence(
    comparison: Comparison, figures: dict[tuple[str, RequestShape], Statistics], shape: RequestShape
) -> str:
    """Say in one sentence how the variants compare with the baseline, slower ones included."""
    base = comparison.baseline
    base_ms, what = pace_of(figures.get((base.label, shape)))
    if base_ms is None or len(comparison.engines) == 1:
        paces = ((engine, pace_of(figures.get((engine.label, shape)))[0]) for engine in comparison.engines)
        parts = [f"{named(engine)} takes {digits(pace)} ms {what}" for engine, pace in paces if pace is not None]
        return f"{joined(parts)} at {shape}."
    parts = []
    for engine in comparison.engines[1:]:
        pace, _ = pace_of(figures.get((engine.label, shape)))
        if pace is None:
            parts.append(f"{named(engine)} was not timed there")
            continue
        if engine.kind == "emulated":
            parts.append(f"{engine.label} is emulated and its time says nothing about its format")
            continue
        words = _speed_words(base_ms, pace)
        parts.append(
            f"{named(engine)} is {words} {what}" if words != "as fast" else f"{named(engine)} is as fast {what}"
        )
    return f"At {shape}, compared with {named(base)}: {joined(parts)}."


def _speed_words(baseline_ms: float, pace_ms: float) -> str:
    faster = baseline_ms / pace_ms
    if is_same(faster):
        return "as fast"
    return f"{faster:.2f}× faster" if faster > 1 else f"{1 / faster:.2f}× slower"


def _tile(
    comparison: Comparison,
    figures: dict[tuple[str, RequestShape], Statistics],
    shape: RequestShape,
    engine: EngineResult,
) -> dict[str, Any]:
    base_ms, _ = pace_of(figures.get((comparison.baseline.label, shape)))
    pace, what = pace_of(figures.get((engine.label, shape)))
    if base_ms is None or pace is None:
        return {"engine": engine, "number": NOTHING, "words": "no measurement to compare", "verdict": "neutral"}
    if engine.kind == "emulated":
        return {"engine": engine, "number": NOTHING, "words": "its time says nothing", "verdict": "neutral"}
    faster = base_ms / pace
    verdict: Verdict = "same" if is_same(faster) else "better" if faster > 1 else "worse"
    words = {"same": "as fast", "better": "faster", "worse": "slower", "neutral": ""}[verdict]
    return {
        "engine": engine,
        "number": f"{max(faster, 1 / faster):.2f}×",
        "words": f"{words} {what}",
        "detail": f"{digits(pace)} ms, {comparison.baseline.label} {digits(base_ms)} ms",
        "verdict": verdict,
    }


def _notes(comparison: Comparison) -> list[str]:
    kinds = {engine.kind for engine in comparison.engines}
    environments = [
        results.environment.model_dump(exclude={"utc", "command", "seed", "clock"}) for _, results in comparison.sources
    ]
    conditions = (
        (any(e.device == "cpu" and e.kind != "predicted" for e in comparison.engines), CPU_NOTE),
        ("emulated" in kinds, EMULATED_NOTE),
        ("predicted" in kinds, PREDICTED_NOTE),
        (len({engine.device for engine in comparison.engines}) > 1, DEVICES_NOTE),
        (len(environments) > 1, FILES_NOTE),
        (any(environment != environments[0] for environment in environments), MACHINES_NOTE),
    )
    return [note for holds, note in conditions if holds]


def _rows(
    comparison: Comparison, figures: dict[tuple[str, RequestShape], Statistics], shape: RequestShape
) -> list[Row]:
    """Build the comparison table; a metric that no engine has is left out."""
    rows = []
    for metric in METRICS:
        values = [metric.value(engine, figures.get((engine.label, shape))) for engine in comparison.engines]
        if all(value is None for value in values):
            continue
        unit, texts = formatted(values, metric.unit)
        cells = [Value(texts[0])]
        for value, text in zip(values[1:], texts[1:], strict=True):
            cells.append(compared(text, ratio(value, values[0]), metric.better))
        rows.append(Row(metric.group, metric.name, unit, metric.better, tuple(cells)))
    return rows


def _accuracy_section(
    comparison: Comparison, figures: dict[tuple[str, RequestShape], Statistics], shape: RequestShape
) -> dict[str, Any] | None:
    """Gather what the table of all variants needs; None where no accuracy was measured."""
    models = comparison.models
    if all(model.accuracy is None for model in models):
        return None
    _, what = pace_of(figures.get((comparison.baseline.label, shape)))
    emulated = {engine.label for engine in comparison.engines if engine.kind == "emulated"}
    paces = [None if m.label in emulated else pace_of(figures.get((m.label, shape)))[0] for m in models]
    columns, rows = accuracy_table(models, (f"Latency {what}", paces))
    return {"columns": columns, "rows": rows, "findings": findings(models)}


def _cell_rows(
    comparison: Comparison, figures: dict[tuple[str, RequestShape], Statistics]
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
            quotient = ratio(pace_of(found)[0], pace_of(base)[0]) if engine is not comparison.baseline else None
            entries.append(
                {
                    "engine": engine,
                    "ttft": spread_text(found.ttft_ms),
                    "inter_token": spread_text(found.inter_token_ms),
                    "steps": [digits(p) for p in (found.step_p50_ms, found.step_p90_ms, found.step_p99_ms)],
                    "per_user": digits(found.output_tokens_per_s_per_user),
                    "total": digits(found.output_tokens_per_s_total.median),
                    "compared": compared("", quotient, -1),
                    "rounds": found.rounds,
                }
            )
        table.append((shape, entries))
    return table


def _environment_items(environment: Environment) -> list[tuple[str, str]]:
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
        ("Seed of the input tokens", str(environment.seed)),
        ("Began (UTC)", environment.utc.strftime("%Y-%m-%d %H:%M:%S")),
    ]


def _charts(
    comparison: Comparison, figures: dict[tuple[str, RequestShape], Statistics], shape: RequestShape
) -> list[Chart]:
    """Choose the cells of each chart: one length varies, the others are the headline's."""
    by_batch = tuple(s for s in comparison.shapes if s[1:] == shape[1:])
    by_input = tuple(s for s in comparison.shapes if (s.batch, s.output_len) == (shape.batch, shape.output_len))
    lengths = f"input {shape.input_len}, output {shape.output_len}"

    def chart(
        file: str,
        title: str,
        subtitle: str,
        axis: tuple[str, int],
        y_label: str,
        shapes: tuple[RequestShape, ...],
        value: Callable[[Statistics], Spread | None],
    ) -> Chart:
        cells = [[figures.get((engine.label, s)) for s in shapes] for engine in comparison.engines]
        bars = tuple(tuple(None if cell is None else value(cell) for cell in row) for row in cells)
        return Chart(file, title, subtitle, axis[0], y_label, tuple(s[axis[1]] for s in shapes), bars)

    charts = (
        chart(
            "inter_token_latency.png",
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
            f"batch {shape.batch}; lower is better",
            ("input tokens", 1),
            "ms",
            by_input,
            lambda s: s.ttft_ms,
        ),
        chart(
            "tokens_per_second.png",
            "Total throughput",
            f"{lengths}; higher is better",
            ("batch", 0),
            "tokens/s",
            by_batch,
            lambda s: s.output_tokens_per_s_total,
        ),
    )
    return [chart for chart in charts if any(bar is not None for row in chart.bars for bar in row)]


def _tradeoffs(
    comparison: Comparison, figures: dict[tuple[str, RequestShape], Statistics], shape: RequestShape
) -> list[Tradeoff]:
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


# --- pages ------------------------------------------------------------------------------------------------------------


class _Verbatim(str):
    """Text that goes into Markdown as it is."""


def _html(context: dict[str, Any], strips: Sequence[Strip], comparison: Comparison) -> bytes:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "report.js").read_text()
    style = environment.get_template("report.css.j2").render(series=SERIES_COLORS, strip=STRIP_COLORS)
    page = environment.get_template("report.html.j2").render(
        **context,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        drawings=[bar_layout(chart, comparison.engines) for chart in context["charts"]],
        strips=[(model, depth_text(model), strip) for model, strip in zip(comparison.models, strips, strict=True)],
        roles=roles_of(strips),
        embedded=[(picture.title, _address(light), _address(dark)) for picture, light, dark in context["pictures"]],
        series_count=len(SERIES_COLORS["light"]),
        downloads=[(name, _json_in_html(json_from_results(results))) for name, results in comparison.sources],
    )
    return page.encode()


def _address(png: bytes) -> str:
    """The address that holds a picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _json_in_html(content: bytes) -> Markup:
    """Make JSON safe inside a script element: `<`, `>` and `&` occur only in its strings, where they may be escaped."""
    text = content.decode()
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _markdown(context: dict[str, Any]) -> bytes:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,
        finalize=_markdown_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code_block"] = _code_block
    environment.filters["verbatim"] = _Verbatim
    return environment.get_template("report.md.j2").render(**context).encode()


def _markdown_escaped(value: Any) -> Any:
    """Escape what Markdown or GitHub would take for markup; applied to everything a template prints."""
    if isinstance(value, _Verbatim):
        return value
    text = "".join(f"\\{character}" if character in "\\`*_[]|~#$" else character for character in str(value))
    # A mention would notify somebody, an entity is the only way to write one without.
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "\n": " ", "\r": " "}
    return "".join(entities.get(character, character) for character in text)


def _code_block(text: str) -> _Verbatim:
    """Fence text with more backticks than it has in a row."""
    fence = "```"
    while fence in text:
        fence += "`"
    return _Verbatim(f"{fence}\n{text}\n{fence}")
