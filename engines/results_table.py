"""What a benchmark found, as a table for the terminal; the report has all of it."""

from __future__ import annotations

from typing import Any

from engines.comparison_table import TIMED, intervals_of, ratio_to_baseline
from engines.report_words import compared, formatted, named
from engines.results import RequestShape, Results, comparison_from_results, statistics

# Metric -> header, in lines so short that the table fits into 80 columns.
SHOWN = {
    "Time to first token": "Time to\nfirst token\nms",
    "Inter-token latency": "Inter-token\nlatency\nms",
    "Output tokens/s in total": "Output\ntokens/s\nin total",
}
RATIO = "Output tokens/s per user"  # its ratio says how much faster than the baseline an engine is
STYLES = {"better": "green", "worse": "red"}


def results_table(results: Results) -> Any:
    """The medians of every engine and request as a `rich` table: engines side by side, in the order they were given.

    Where engines can be compared, the last column is what each gains over the first, with the 95 % interval.
    """
    from rich.table import Table
    from rich.text import Text

    metrics = [metric for metric in TIMED if metric.name in SHOWN]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("engine", overflow="fold")
    for name in ("batch", "input", "output", *(SHOWN[metric.name] for metric in metrics)):
        table.add_column(name, justify="right", no_wrap=True)
    engines = {engine.label: engine for engine in results.engines}
    figures = {(cell.engine, cell.shape): statistics(cell) for cell in results.cells}
    comparison = comparison_from_results([("", results)], baseline=None)
    intervals, ratio = intervals_of(comparison), next(metric for metric in TIMED if metric.name == RATIO)

    def gain(label: str, shape: RequestShape) -> Text:
        quotient, interval = ratio_to_baseline(comparison, figures, intervals, ratio, engines[label], shape)
        found = compared("", quotient, ratio.better, interval, is_beyond_noise=False)
        return Text(f"{found.ratio} {found.interval}".strip(), style=STYLES.get(found.verdict, ""))

    shapes = list(dict.fromkeys(cell.shape for cell in results.cells))
    gains = {(label, shape): gain(label, shape) for label in engines for shape in shapes}
    has_gains = any(gains.values())
    if has_gains:
        table.add_column("Faster per token\n95 % interval", justify="right")
    for shape in shapes:
        labels = [label for label in engines if (label, shape) in figures or engines[label].stopped is not None]
        columns = [
            formatted([metric.value(engines[label], figures.get((label, shape))) for label in labels], metric.unit)[1]
            for metric in metrics
        ]
        for label, *texts in zip(labels, *columns, strict=True):
            last = [gains[label, shape]] if has_gains else []
            table.add_row(named(engines[label]), *(f"{length:,}" for length in shape), *texts, *last)
    return table
