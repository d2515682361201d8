"""The table that `bench` prints: whose figures stand where, and how they are written."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from engines.results import Cell, Results, Stopped, read_results, statistics
from engines.results_table import results_table
from tests.engines.test_results import CELL, STOPPED, results_of

HEADER = 3  # lines


def printed(results: Results) -> list[list[str]]:
    """The lines of the table, each in its columns; these are at least two spaces apart."""
    console = Console(file=io.StringIO(), width=140, markup=False)
    console.print(results_table(results))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [[text.strip() for text in line.split("  ") if text.strip()] for line in lines]


def test_figures_are_medians_with_the_engines_of_a_request_side_by_side() -> None:
    results = results_of("b", "[bold]a")
    first, second = results.cells
    slower = Cell(**{**CELL, "engine": "[bold]a", "ttft_ms": [1000.0] * 3, "request_ms": [1008.0] * 3})
    no_steps = {"output_len": 1, "step_ms": [[], [], []], "request_ms": [10.0, 12.0, 11.0]}
    once = [Cell(**{**CELL, "engine": cell.engine, **no_steps}) for cell in (first, second)]
    assert printed(results.model_copy(update={"cells": (first, *once, slower)}))[HEADER:] == [
        ["b", "2", "16", "3", "11", "3.00", "333.3"],  # 6 tokens in 18 ms
        ["[bold]a", "2", "16", "3", "1,000", "4.00", "6.0", "0.75×"],  # 6 tokens in 1008 ms
        ["b", "2", "16", "1", "11.0", "–", "182"],  # 2 tokens in 11 ms
        ["[bold]a", "2", "16", "1", "11.0", "–", "182"],
    ]


def test_an_engine_alone_is_compared_with_nothing() -> None:
    *header, row = printed(results_of("b"))
    assert header == [
        ["Time to", "Inter-token", "Output"],
        ["first token", "latency", "tokens/s"],
        ["engine", "batch", "input", "output", "ms", "ms", "in total"],
    ]
    assert row == ["b", "2", "16", "3", "11.0", "3.00", "333"]


def test_what_an_engine_gains_over_the_first_has_an_interval() -> None:
    demo = read_results(Path(__file__).parents[2] / "benchmarks" / "results" / "demo_cpu.json")
    gains = {tuple(line[:4]): line[7:] for line in printed(demo)}
    first, second = (engine.label for engine in demo.engines[:2])
    assert gains[first, "1", "32", "48"] == []
    [gain] = gains[second, "1", "32", "48"]
    ratio, low, high = map(float, re.split("× |–", gain))
    paces = {
        cell.engine: statistics(cell).output_tokens_per_s_per_user for cell in demo.cells if cell.shape == (1, 32, 48)
    }
    assert ratio == pytest.approx(paces[second] / paces[first], abs=0.005)
    assert low <= ratio <= high


def test_figures_are_whole_on_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=80, markup=False)
    demo = read_results(Path(__file__).parents[2] / "benchmarks" / "results" / "demo_cpu.json")
    console.print(results_table(demo))
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_incomplete_engine_is_called_so_and_has_no_figures_where_it_was_not_timed() -> None:
    results = results_of("b", "a")
    stopped = results.engines[1].model_copy(update={"stopped": Stopped.model_validate(STOPPED)})
    results = results.model_copy(update={"engines": (results.engines[0], stopped), "cells": results.cells[:1]})
    assert printed(results)[HEADER:] == [
        ["b", "2", "16", "3", "11.0", "3.00", "333"],
        ["a (incomplete)", "2", "16", "3", "–", "–", "–"],
    ]
