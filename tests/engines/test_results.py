"""Results files: what is accepted, what is refused and how, and statistics against numbers computed by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from engines.results import (
    MAX_RESULTS_BYTES,
    Cell,
    RequestShape,
    Results,
    comparison_from_results,
    engine_label,
    json_from_results,
    ratio,
    read_results,
    refuse_incomplete,
    results_from_json,
    statistics,
)
from exporter.errors import EngineError, IncompleteError

ATTENTION = {
    "kind": "attention",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": None,
}
FFN = {"kind": "gated", "intermediate_size": 256, "segments": [{"source_layer": 0, "width": 200}], "padding": 56}
STRUCTURE = {
    "hidden_size": 32,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "num_parameters": 5000,
    "weight_bytes": 20000,
    "kv_bytes_per_token": 128,
    "sequential_sublayers": 2,
    "blocks": [{"source_layers": [0], "attention": ATTENTION, "ffn": FFN}],
}
ENGINE = {
    "label": "baseline",
    "kind": "measured",
    "backend": "onnxruntime",
    "device": "cpu",
    "runtime": {"onnxruntime": "1.32.0"},
    "dtype": "float32",
    "network_sha256": "00" * 32,
    "engine_bytes": 30000,
    "weight_bytes": 20000,
    "kv_bytes_per_token": 128,
    "load_time_s": 0.5,
    "peak_memory_gib": 0.125,
    "structure": STRUCTURE,
}
CELL = {
    "engine": "baseline",
    "batch": 2,
    "input_len": 16,
    "output_len": 3,
    "ttft_ms": [10.0, 12.0, 11.0],
    "step_ms": [[2.0, 4.0], [3.0, 3.0], [5.0, 9.0]],
    "request_ms": [16.0, 18.0, 25.0],
}
ENVIRONMENT = {
    "cpu": "Some CPU",
    "cores": 2,
    "memory_gib": 23.5,
    "os": "Linux",
    "python": "3.11.7",
    "clock": "time.perf_counter_ns",
    "threads": 2,
    "pinned_cpus": [0, 1],
    "warmup_rounds": 1,
    "seed": 0,
    "utc": "2026-11-22T12:00:00Z",
    "command": ["python", "build.py", "bench", "a b"],
}
DOCUMENT = {"results_schema": 1, "environment": ENVIRONMENT, "engines": [ENGINE], "cells": [CELL]}


SCORE = {"task": "t", "metric": "acc", "value": 0.5, "stderr": 0.01, "higher_is_better": True, "samples": 9}
EVALUATED = {"label": "removed", "structure": STRUCTURE, "accuracy": {"perplexity": 9.5, "tasks": [SCORE]}}


def changed(path: str, value: object) -> bytes:
    """DOCUMENT as JSON with the entry at a dotted path replaced."""
    document = copy.deepcopy(DOCUMENT)
    *parents, last = path.split(".")
    place = document
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(document).encode()


def results_of(*labels: str, hidden_size: int = 32, vocab_size: int = 100, cells: bool = True) -> Results:
    structure = {**STRUCTURE, "hidden_size": hidden_size, "vocab_size": vocab_size}
    document = {
        **DOCUMENT,
        "engines": [{**ENGINE, "label": label, "structure": structure} for label in labels],
        "cells": [{**CELL, "engine": label} for label in labels] if cells else [],
    }
    return results_from_json(json.dumps(document).encode())


def test_statistics_by_hand():
    figures = statistics(Cell(**CELL))
    assert figures.rounds == 3
    assert (figures.ttft_ms.low, figures.ttft_ms.median, figures.ttft_ms.high) == (10.0, 11.0, 12.0)
    # (16 - 10) / 2, (18 - 12) / 2, (25 - 11) / 2
    assert Cell(**CELL).inter_token_ms == (3.0, 3.0, 7.0)
    assert figures.inter_token_ms is not None
    assert figures.inter_token_ms.median == 3.0
    # Sorted steps 2 3 3 4 5 9, linear interpolation at rank 2.5
    assert figures.step_p50_ms == pytest.approx(3.5)
    assert (figures.step_p90_ms, figures.step_p99_ms) == (None, None)  # of six
    assert figures.output_tokens_per_s_per_user == pytest.approx(1000 / 3)
    # 2 sequences x 3 tokens in 16, 18 and 25 ms
    assert figures.output_tokens_per_s_total.median == pytest.approx(6000 / 18)
    assert (figures.output_tokens_per_s_total.low, figures.output_tokens_per_s_total.high) == pytest.approx((240, 375))


@pytest.mark.parametrize(
    ("steps", "p50", "p90", "p99"),
    # Steps of 1, 2, 3, ... ms: at rank q * (n - 1) from 0.
    [
        (1, 1, None, None),
        (9, 5, None, None),
        (10, 5.5, 9.1, None),
        (99, 50, 89.2, None),
        (100, 50.5, 90.1, 99.01),
        (1000, 500.5, 900.1, 990.01),
    ],
)
def test_percentiles_take_enough_steps(steps, p50, p90, p99):
    figures = statistics(
        Cell(
            engine="a",
            batch=1,
            input_len=4,
            output_len=steps + 1,
            ttft_ms=(1.0,),
            step_ms=(tuple(float(step) for step in range(steps, 0, -1)),),
            request_ms=(1e6,),
        )
    )
    assert [figures.step_p50_ms, figures.step_p90_ms, figures.step_p99_ms] == [
        expected if expected is None else pytest.approx(expected) for expected in (p50, p90, p99)
    ]


def test_one_output_token_has_no_inter_token_latency():
    figures = statistics(
        Cell(
            engine="a", batch=1, input_len=4, output_len=1, ttft_ms=(5.0, 7.0), step_ms=((), ()), request_ms=(5.0, 7.0)
        )
    )
    assert figures.inter_token_ms is None
    assert figures.step_p99_ms is None
    assert figures.output_tokens_per_s_per_user is None
    assert figures.output_tokens_per_s_total.median == pytest.approx(1000 / 6)


def test_tokens_that_came_all_at_once_have_no_rate():
    figures = statistics(Cell(**{**CELL, "request_ms": CELL["ttft_ms"], "step_ms": []}))
    assert figures.inter_token_ms is not None
    assert figures.inter_token_ms.high == 0
    assert (figures.step_p50_ms, figures.output_tokens_per_s_per_user) == (None, None)


@pytest.mark.parametrize(
    ("value", "baseline", "expected"),
    [
        (3.0, 4.0, 0.75),
        (None, 4.0, None),
        (3.0, None, None),
        (3.0, 0.0, None),
        (0, 5, 0.0),
        (1e300, 1e-300, None),
        (-1.0, -2.0, None),
        (0.5, -0.1, None),
        (-0.5, 0.1, None),
    ],
)
def test_ratio(value, baseline, expected):
    assert ratio(value, baseline) == expected


def test_a_file_comes_back_as_written(tmp_path):
    results = results_from_json(json.dumps({**DOCUMENT, "evaluated": [EVALUATED]}).encode())
    path = tmp_path / "results.json"
    path.write_bytes(json_from_results(results))
    assert read_results(path) == results
    written = json.loads(path.read_bytes())
    assert written["engines"][0]["structure"] == STRUCTURE
    assert written["evaluated"][0]["accuracy"]["tasks"] == [SCORE]


STOPPED = {"batch": 2, "input_len": 16, "output_len": 3, "rounds": 3, "rounds_asked": 50, "problem": "killed\nby hand"}


def test_a_file_of_the_first_version_is_read_and_written_as_one_of_the_second():
    """Whose new key the first version's readers would refuse, had they not refused its version."""
    first = results_from_json(json.dumps(DOCUMENT).encode())
    assert first.is_complete
    written = json.loads(json_from_results(first))
    assert (written["results_schema"], written["engines"][0]["stopped"]) == (2, None)
    assert results_from_json(json_from_results(first)) == first


def test_an_engine_that_stopped_comes_back_and_is_told_about():
    engines = [{**ENGINE, "label": "whole"}, {**ENGINE, "stopped": STOPPED}]
    document = {**DOCUMENT, "results_schema": 2, "engines": engines}
    results = results_from_json(json.dumps(document).encode())
    assert results_from_json(json_from_results(results)) == results
    assert not results.is_complete
    assert [engine.standing for engine in results.engines] == ["measured", "measured, incomplete"]
    with pytest.raises(IncompleteError) as caught:
        refuse_incomplete(results, Path("out.json"))
    assert str(caught.value).splitlines() == [
        "out.json: the benchmark is incomplete; what was measured is in this file:",
        "  baseline stopped after 3 of 50 rounds at batch 2, input 16, output 3: killed",
        "by hand",
        "`report` shows what there is; where memory ran out, time the engines one at a time",
    ]
    refuse_incomplete(results_of("baseline"), Path("out.json"))


def test_unknown_keys_of_the_structure_survive():
    results = results_from_json(changed("engines.0.structure.blocks.0.ffn.format", "fp8_e4m3"))
    assert json.loads(json_from_results(results))["engines"][0]["structure"]["blocks"][0]["ffn"]["format"] == "fp8_e4m3"


REFUSED = {
    "empty": (b"", "not JSON"),
    "cut off": (json.dumps(DOCUMENT).encode()[:-20], "not JSON"),
    "not UTF-8": (b'{"results_schema": 1, "x": "\xff"}', "not JSON"),
    "too deep": (b"[" * 100_000, "not JSON"),
    "NaN sample": (changed("cells.0.ttft_ms.0", float("nan")), "not JSON"),
    "infinite sample": (json.dumps(DOCUMENT).replace("16.0", "1e999").encode(), "finite number"),
    "sample beyond reason": (changed("cells.0.request_ms.0", 1e300), "cells.0.request_ms.0: Input should be less"),
    "step beyond reason": (changed("cells.0.step_ms.0.1", 1e300), "cells.0.step_ms.0.1: Input should be less"),
    "sample of no time": (changed("cells.0.ttft_ms.0", 5e-324), "cells.0.ttft_ms.0: Input should be greater"),
    "a list": (b"[]", "not a results file"),
    "no version": (b"{}", "not a results file"),
    "next version": (changed("results_schema", 3), "another schema version: expected 1 or 2, found 3"),
    "version is text": (changed("results_schema", "1" * 5000), "another schema version"),
    "unknown key": (changed("engines.0.speed", 1), "engines.0.speed: Extra inputs"),
    "number as text": (changed("cells.0.batch", "2"), "cells.0.batch"),
    "zero batch": (changed("cells.0.batch", 0), "cells.0.batch"),
    "huge batch": (changed("cells.0.batch", 2**200), "cells.0.batch"),
    "negative time": (changed("cells.0.ttft_ms.0", -1.0), "cells.0.ttft_ms.0"),
    "no rounds": (changed("cells.0.ttft_ms", []), "cells.0.ttft_ms"),
    "rounds differ": (changed("cells.0.request_ms", [16.0]), "3 rounds in ttft_ms"),
    "calls differ": (changed("cells.0.run_ms", [[1.0]] * 3), "run_ms is not 3 rounds of output_len calls"),
    "rounds of calls differ": (changed("cells.0.device_ms", [[1.0] * 3]), "device_ms is not 3 rounds of output_len"),
    "another program": (
        changed("engines.0.program", "fortran"),
        "engines.0.program: Input should be 'cpp' or 'python'",
    ),
    "steps differ": (changed("cells.0.step_ms.1", [3.0]), "round 1 has 1 steps"),
    "request before first token": (changed("cells.0.request_ms.2", 1.0), "round 2 has a request shorter"),
    "cell without engine": (changed("cells.0.engine", "other"), "names engine 'other'"),
    "cell twice": (changed("cells", [CELL, CELL]), "two cells for batch 2, input 16, output 3"),
    "stopped nowhere": (changed("engines.0.stopped", {"problem": "killed"}), "engines.0.stopped.batch: Field required"),
    "label twice": (changed("engines", [ENGINE, ENGINE]), "same label"),
    "label of an engine and of an evaluated model": (
        json.dumps({**DOCUMENT, "evaluated": [{**EVALUATED, "label": "baseline"}]}).encode(),
        "same label",
    ),
    "evaluated without accuracy": (
        json.dumps({**DOCUMENT, "evaluated": [{**EVALUATED, "accuracy": None}]}).encode(),
        "evaluated.0.accuracy",
    ),
    "no engines": (changed("engines", []), "engines"),
    "empty label": (changed("engines.0.label", ""), "engines.0.label"),
    "label of two lines": (changed("engines.0.label", "a\nb"), "engines.0.label"),
    "half a character": (changed("engines.0.backend", "\ud800"), "not JSON"),
    "naive time": (changed("environment.utc", "2026-11-22T12:00:00"), "environment.utc"),
    "unknown kind": (changed("engines.0.kind", "guessed"), "engines.0.kind"),
    "segments too wide": (
        changed("engines.0.structure.blocks.0.ffn.padding", 57),
        "segments and padding cover 257 of 256",
    ),
    "unknown sublayer": (changed("engines.0.structure.blocks.0.attention.kind", "mamba"), "attention"),
    "too many blocks": (
        changed("engines.0.structure.blocks", [{"source_layers": [0], "attention": None, "ffn": None}] * 5000),
        "blocks",
    ),
}


@pytest.mark.parametrize(("content", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_file_is_one_clear_error(content, problem):
    with pytest.raises(EngineError) as caught:
        results_from_json(content, file="results.json")
    assert problem in str(caught.value)
    assert str(caught.value).startswith("results.json: ")
    assert len(str(caught.value)) < 2000


def test_a_file_is_read_up_to_a_limit(tmp_path):
    large = tmp_path / "large.json"
    with large.open("wb") as stream:
        stream.truncate(MAX_RESULTS_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(EngineError, match="too large"):
        read_results(large)
    with pytest.raises(EngineError, match="cannot be read: No such file"):
        read_results(tmp_path / "missing.json")
    with pytest.raises(EngineError, match="cannot be read: Is a directory"):
        read_results(tmp_path)


def test_comparison_orders_engines_baseline_first():
    sources = [("a.json", results_of("baseline", "dropped")), ("b.json", results_of("fused"))]
    assert [e.label for e in comparison_from_results(sources, baseline=None).engines] == [
        "baseline",
        "dropped",
        "fused",
    ]
    comparison = comparison_from_results(sources, baseline="fused")
    assert [engine.label for engine in comparison.engines] == ["fused", "baseline", "dropped"]
    assert comparison.shapes == (RequestShape(2, 16, 3),)


def with_evaluated(**changes: object) -> Results:
    return results_from_json(json.dumps({**DOCUMENT, "evaluated": [{**EVALUATED, **changes}]}).encode())


MIXED = {
    "evaluated in one file, timed in another": (
        [("a.json", with_evaluated(label="x")), ("b.json", results_of("x"))],
        None,
        "b.json: two results files have an engine labelled 'x'",
    ),
    "evaluated model of another vocabulary": (
        [("a.json", with_evaluated(structure={**STRUCTURE, "vocab_size": 7}))],
        None,
        "'baseline' and 'removed' are of different models",
    ),
    "unknown baseline": ([("a.json", results_of("x", "y"))], "z", "expected one of x, y, found z"),
    "label in two files": ([("a.json", results_of("x")), ("b.json", results_of("x"))], None, "b.json: two results"),
    "other vocabulary": (
        [("a.json", results_of("x")), ("b.json", results_of("y", vocab_size=7))],
        None,
        "different models.*expected vocab_size 100, found 7",
    ),
    "other hidden size": (
        [("a.json", results_of("x")), ("b.json", results_of("y", hidden_size=64))],
        None,
        "different models.*expected hidden_size 32, found 64",
    ),
    "no cells": ([("a.json", results_of("x", "y", cells=False))], None, "^a.json: there is nothing to report"),
    "no files": ([], None, "nothing to report"),
}


@pytest.mark.parametrize(("sources", "baseline", "problem"), MIXED.values(), ids=MIXED.keys())
def test_results_that_do_not_belong_together(sources, baseline, problem):
    with pytest.raises(EngineError, match=problem):
        comparison_from_results(sources, baseline=baseline)


def test_the_label_of_an_engine_is_one_that_results_take():
    assert engine_label("漢字 =1", Path("out/engine")) == "漢字 =1"
    assert engine_label(None, Path("out/engine")) == "engine"
    assert engine_label("a" * 100, Path()) == "a" * 100


@pytest.mark.parametrize("label", ["a" * 101, "two\nlines", "\udce9"])
def test_labels_that_results_do_not_take(label):
    for given, folder in ((label, Path("out/engine")), (None, Path("out", label))):
        with pytest.raises(EngineError, match="at most 100 characters, found '"):
            engine_label(given, folder)
