"""What a benchmark found, as a table for the terminal; the report has all of it."""

from __future__ import annotations

from typing import Any

from engines.comparison_table import TIMED
from engines.report_words import formatted, named
from engines.results import Results, statistics

SHOWN = ("Time to first token", "Inter-token latency", "Output tokens/s in total")


def results_table(results: Results) -> Any:
    """The medians of every engine and request as a `rich` table: engines side by side, in the order they were given."""
    from rich.table import Table

    metrics = [metric for metric in TIMED if metric.name in SHOWN]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("engine", overflow="fold")
    table.add_column("request", no_wrap=True)
    for metric in metrics:
        table.add_column(f"{metric.name}, ms" if metric.unit == "ms" else metric.name, justify="right")
    engines = {engine.label: engine for engine in results.engines}
    figures = {(cell.shape, cell.engine): statistics(cell) for cell in results.cells}
    for shape in dict.fromkeys(cell.shape for cell in results.cells):
        labels = [label for label in engines if (shape, label) in figures or engines[label].stopped is not None]
        columns = [
            formatted([metric.value(engines[label], figures.get((shape, label))) for label in labels], metric.unit)[1]
            for metric in metrics
        ]
        for label, *texts in zip(labels, *columns, strict=True):
            table.add_row(named(engines[label]), str(shape), *texts)
    return table
