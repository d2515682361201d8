"""Comparing two runs: how often noise alone is flagged, how often intervals hold the truth, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from engines.regression import (
    METRICS,
    SIGNIFICANCE,
    Changes,
    adjusted_p_values,
    changes_markdown,
    changes_table,
    compare_results,
    ratio_interval,
)
from engines.results import Cell, GpuState, Results, Stopped, read_results
from exporter.errors import EngineError

DEMO = read_results(Path(__file__).parents[2] / "benchmarks" / "results" / "demo_cpu.json")
TRIALS = 1000
STEPS = 2  # after the first token


def times(rng: np.random.Generator, median: float, rounds: int) -> np.ndarray:
    """Latencies as they come: skewed to the right, 5 % apart."""
    return median * rng.lognormal(0, 0.05, rounds)


def run(rng: np.random.Generator, *, rounds: int = 8, slower: float = 1.0, engine: str | None = None) -> Results:
    """The demo's engines with drawn samples; those of one engine (None: of all) are `slower` times as long."""
    cells = []
    for cell in DEMO.cells:
        factor = slower if engine in (None, cell.engine) else 1.0
        ttft, steps = times(rng, 20 * factor, rounds), times(rng, factor, rounds)
        cells.append(
            Cell(
                engine=cell.engine,
                batch=cell.batch,
                input_len=cell.input_len,
                output_len=1 + STEPS,
                ttft_ms=tuple(ttft),
                step_ms=tuple((step,) * STEPS for step in steps),
                request_ms=tuple(ttft + STEPS * steps),
            )
        )
    return DEMO.model_copy(update={"cells": tuple(cells)})


def first_rounds(cell: Cell, count: int) -> Cell:
    kept = {name: getattr(cell, name)[:count] for name in ("ttft_ms", "step_ms", "request_ms")}
    return cell.model_copy(update=kept)


def flagged(changes: Changes) -> set[tuple[str, str]]:
    return {(change.engine, change.verdict) for change in changes.changes if change.verdict != "no difference"}


def test_intervals_hold_the_ratio_as_often_as_they_say() -> None:
    rng, rounds = np.random.default_rng(0), 10
    hits = 0
    for trial in range(TRIALS):
        found = ratio_interval(times(rng, 1.1, rounds), times(rng, 1.0, rounds), seed=trial)
        assert found.low <= found.ratio <= found.high
        hits += found.low <= 1.1 <= found.high
    assert 0.93 <= hits / TRIALS <= 0.97


def test_an_interval_is_narrower_with_more_rounds() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = times(rng, 2, 400), times(rng, 1, 400)
    few, many = ratio_interval(ours[:10], theirs[:10]), ratio_interval(ours, theirs)
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert many.low < 2 < many.high


@pytest.mark.parametrize("rounds", [5, 12])
def test_two_runs_of_the_same_rarely_differ(rounds: int) -> None:
    """At most one comparison in twenty flags any of its figures; a single test each would flag one in four."""
    rng = np.random.default_rng(rounds)
    figures, trials = 6, TRIALS // 4
    least = [
        min(adjusted_p_values([(times(rng, 1, rounds), times(rng, 1, rounds)) for _ in range(figures)]))
        for _ in range(trials)
    ]
    alarms = sum(p <= SIGNIFICANCE for p in least)
    assert 0 < alarms <= 0.05 * trials


def test_what_became_slower_is_found() -> None:
    rng = np.random.default_rng(2)
    changes = compare_results(run(rng, rounds=12), run(rng, rounds=12, slower=1.3, engine="fused"))
    assert flagged(changes) == {("fused", "slower")}
    slower = [change for change in changes.changes if change.engine == "fused"]
    assert len(slower) == 4 * len(METRICS)
    assert all(change.is_regression(0.05) for change in slower)
    assert not any(change.is_regression(0.6) for change in changes.changes)
    assert all(change.interval.low < 1.35 and change.interval.high > 1.25 for change in slower)
    back = compare_results(run(rng, slower=1.3), run(rng))
    assert {verdict for _, verdict in flagged(back)} == {"faster"}
    assert not any(change.is_regression(0) for change in back.changes)


@pytest.mark.parametrize(("rounds", "is_seen"), [(5, False), (6, False), (7, True), (8, True), (9, True)])
def test_rounds_too_few_for_a_single_change_are_said(rounds: int, is_seen: bool) -> None:
    """Of 36 figures one is halved: flagged from 7 rounds on, and where it cannot be, a note says so."""
    rng = np.random.default_rng(7)
    before = run(rng, rounds=rounds)
    first = before.cells[0]
    halved = (ttft + (request - ttft) / 2 for ttft, request in zip(first.ttft_ms, first.request_ms, strict=True))
    quick = first.model_copy(update={"request_ms": tuple(halved)})
    changes = compare_results(before, before.model_copy(update={"cells": (quick, *before.cells[1:])}))
    assert len(changes.changes) == 36
    assert changes.changes[1].metric == "inter_token_ms"
    assert [change.verdict == "faster" for change in changes.changes] == [False, is_seen, *[False] * 34]
    assert [" that takes 7 rounds in both runs" in note for note in changes.notes] == [True] * (not is_seen)


def test_figures_are_medians_of_both_runs() -> None:
    rng = np.random.default_rng(3)
    before, after = run(rng), run(rng)
    change = compare_results(before, after).changes[1]
    assert (change.metric, change.engine) == ("inter_token_ms", "baseline")
    assert change.before_ms == pytest.approx(np.median(before.cells[0].inter_token_ms))
    assert change.after_ms == pytest.approx(np.median(after.cells[0].inter_token_ms))
    assert change.interval.ratio == pytest.approx(change.after_ms / change.before_ms)


def test_an_engine_that_stopped_in_one_run_is_said_to_be_incomplete() -> None:
    rng = np.random.default_rng(0)
    before, after = run(rng), run(rng)
    label, shape = DEMO.engines[1].label, after.cells[0].shape
    stopped = Stopped(**shape._asdict(), rounds=3, rounds_asked=8, problem="killed")
    engines = tuple(e.model_copy(update={"stopped": stopped}) if e.label == label else e for e in after.engines)
    cut = [cell if cell.engine != label else first_rounds(cell, 3) for cell in after.cells if cell.shape == shape]
    found = compare_results(before, after.model_copy(update={"engines": engines, "cells": tuple(cut)}))
    assert f"Engine {label} is incomplete in the run after: it stopped after 3 of 8 rounds at {shape}." in found.notes
    assert f"Too few rounds to compare: {label}, {shape}." in found.notes
    assert {change.engine for change in found.changes} == {cell.engine for cell in cut} - {label}
    assert found.regressions(threshold=100) == [f"engine {label} ran to the end before, and stopped after"]
    assert f"**Ran to the end before, and stopped after: {label}.**" in changes_markdown(found, None)
    unopened = tuple(e.model_copy(update={"device": "cuda"}) if e.label == label else e for e in engines)
    others = tuple(cell for cell in cut if cell.engine != label)
    found = compare_results(before, after.model_copy(update={"engines": unopened, "cells": others}))
    assert {change.engine for change in found.changes} == {cell.engine for cell in others}
    assert found.stopped == (label,)
    both = compare_results(
        before.model_copy(update={"engines": unopened}), after.model_copy(update={"engines": unopened, "cells": others})
    )
    assert both.stopped == ()  # it was like that before
    left = tuple(cell for cell in cut if cell.engine == label)
    with pytest.raises(EngineError, match="too few rounds"):  # and there is nothing else
        compare_results(before, after.model_copy(update={"engines": engines, "cells": left}))
    assert not any("incomplete" in note for note in compare_results(before, after).notes)


def test_requests_of_one_token_have_no_time_between_tokens() -> None:
    first = DEMO.cells[0]
    for cell in (
        first.model_copy(update={"output_len": 1, "step_ms": ((),) * 7}),
        first.model_copy(update={"request_ms": first.ttft_ms, "step_ms": ()}),  # all of them came with the first
    ):
        results = DEMO.model_copy(update={"cells": (cell,)})
        assert [change.metric for change in compare_results(results, results).changes] == ["ttft_ms", "request_ms"]
        with pytest.raises(EngineError, match="nothing of that metric"):
            compare_results(results, results, metrics=["inter_token_ms"])


def test_a_narrow_terminal_cuts_nothing_short() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(changes_table(compare_results(DEMO, DEMO)))
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_another_driver_is_said_where_both_are_known() -> None:
    before = run(np.random.default_rng(4))

    def with_driver(version: str) -> Results:
        unknown = dict.fromkeys(("sm_clock_mhz", "max_sm_clock_mhz", "memory_clock_mhz", "power_limit_w"))
        gpu = GpuState(name="H200", driver=version, **unknown)
        environment = before.environment.model_copy(update={"gpus": (gpu, gpu)})
        return before.model_copy(update={"environment": environment})

    old, new = with_driver("1"), with_driver("2")
    assert "The runs differ in gpus: H200, driver 1 before, H200, driver 2 after." in compare_results(old, new).notes
    for pair in ((old, old), (before, new), (old, before)):
        assert not [note for note in compare_results(*pair).notes if "gpus" in note]


def test_differences_beside_the_figures_are_said() -> None:
    rng = np.random.default_rng(4)
    before, after = run(rng), run(rng)
    engine = after.engines[0].model_copy(update={"runtime": {"onnxruntime": "9.0"}, "structure": structure_of("fused")})
    after = after.model_copy(
        update={
            "environment": after.environment.model_copy(
                update={"cpu": "another", "threads": 7, "clock": "another", "warmup_rounds": 0, "interleaved": False}
            ),
            "engines": (engine, *after.engines[1:]),
            "cells": after.cells[1:],
        }
    )
    assert set(compare_results(before, after).notes) == {
        "The runs differ in cpu: AMD EPYC before, another after.",
        "The runs differ in threads: None before, 7 after.",
        "The runs differ in clock: time.perf_counter_ns before, another after.",
        f"The runs differ in warmup_rounds: {before.environment.warmup_rounds} before, 0 after.",
        "The runs differ in interleaved: True before, False after.",
        "Engine baseline has another structure than before.",
        "Engine baseline ran in onnxruntime {'onnxruntime': '1.32.0'} before,"
        " in onnxruntime {'onnxruntime': '9.0'} after.",
        f"Only before: baseline, {before.cells[0].shape}.",
    }


def structure_of(label: str) -> object:
    return next(engine.structure for engine in DEMO.engines if engine.label == label)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "predicted"},
            "'baseline' differs in kind, a comparison would mean nothing: expected measured, found p",
        ),
        ({"device": "H100"}, "differs in device"),
        ({"dtype": "float16"}, "differs in dtype"),
        ({"number_format": "int8"}, "differs in number_format"),
        ({"structure": DEMO.engines[0].structure.model_copy(update={"vocab_size": 7})}, "of different models"),
    ],
)
def test_engines_that_cannot_be_compared(change: dict, message: str) -> None:
    rng = np.random.default_rng(5)
    after = run(rng)
    engines = (after.engines[0].model_copy(update=change), *after.engines[1:])
    with pytest.raises(EngineError, match=message):
        compare_results(run(rng), after.model_copy(update={"engines": engines}))


def test_runs_that_cannot_be_compared() -> None:
    rng = np.random.default_rng(6)
    with pytest.raises(EngineError, match=r"too few rounds .*: expected at least 5 in both runs, found 4"):
        compare_results(run(rng), run(rng, rounds=4))
    whole = run(rng)
    cut = whole.model_copy(update={"cells": (first_rounds(whole.cells[0], 3), *whole.cells[1:])})
    with pytest.raises(EngineError, match="too few rounds"):  # of an engine that did not stop
        compare_results(whole, cut)
    renamed = [engine.model_copy(update={"label": f"{engine.label}-2"}) for engine in DEMO.engines]
    cells = [cell.model_copy(update={"engine": f"{cell.engine}-2"}) for cell in DEMO.cells]
    other = DEMO.model_copy(update={"engines": tuple(renamed), "cells": tuple(cells)})
    with pytest.raises(EngineError, match="share no cell"):
        compare_results(DEMO, other)
