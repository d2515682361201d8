"""The table that `bench` prints: whose figures stand where, and how they are written."""

from __future__ import annotations

import io

from rich.console import Console

from engines.results import Cell, Results, Stopped
from engines.results_table import results_table
from tests.engines.test_results import CELL, STOPPED, results_of


def printed(results: Results) -> list[list[str]]:
    """The lines of the table, each in its columns; these are at least two spaces apart."""
    console = Console(file=io.StringIO(), width=120, markup=False)
    console.print(results_table(results))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [[text.strip() for text in line.split("  ") if text.strip()] for line in lines]


def test_figures_are_medians_with_the_engines_of_a_request_side_by_side() -> None:
    results = results_of("b", "[bold]a")
    first, second = results.cells
    slower = Cell(**{**CELL, "engine": "[bold]a", "ttft_ms": [1000.0] * 3, "request_ms": [1008.0] * 3})
    no_steps = {"output_len": 1, "step_ms": [[], [], []], "request_ms": [10.0, 12.0, 11.0]}
    once = [Cell(**{**CELL, "engine": cell.engine, **no_steps}) for cell in (first, second)]
    assert printed(results.model_copy(update={"cells": (first, *once, slower)})) == [
        ["engine", "request", "Time to first token, ms", "Inter-token latency, ms", "Output tokens/s in total"],
        ["b", "batch 2, input 16, output 3", "11", "3.00", "333.3"],  # 6 tokens in 18 ms
        ["[bold]a", "batch 2, input 16, output 3", "1,000", "4.00", "6.0"],  # 6 tokens in 1008 ms
        ["b", "batch 2, input 16, output 1", "11.0", "–", "182"],  # 2 tokens in 11 ms
        ["[bold]a", "batch 2, input 16, output 1", "11.0", "–", "182"],
    ]


def test_an_incomplete_engine_is_called_so_and_has_no_figures_where_it_was_not_timed() -> None:
    results = results_of("b", "a")
    stopped = results.engines[1].model_copy(update={"stopped": Stopped.model_validate(STOPPED)})
    results = results.model_copy(update={"engines": (results.engines[0], stopped), "cells": results.cells[:1]})
    assert printed(results)[1:] == [
        ["b", "batch 2, input 16, output 3", "11.0", "3.00", "333"],
        ["a (incomplete)", "batch 2, input 16, output 3", "–", "–", "–"],
    ]
