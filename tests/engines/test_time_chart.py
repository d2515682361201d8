"""The chart of where the time went: parts of bars, and the section of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.results import Results
from engines.time_chart import PARTS, time_charts, time_layout, time_note
from tests.engines.test_report import BASELINE, FUSED, REALISTIC, engine_of, report_files, with_changes


def profile_of(
    phase: str, *times: tuple[str, int | None, str, float], batch: int = 1, summary: str = "kernel_medians"
) -> dict[str, Any]:
    kernels = [
        {"kind": kind, "block": block, "name": name, "time_us": time, "executions": 1}
        for kind, block, name, time in times
    ]
    total = sum(time for *_, time in times)
    tokens, position = (32, 0) if phase == "prefill" else (1, 32)
    return {
        "phase": phase,
        "batch": batch,
        "tokens": tokens,
        "position": position,
        "calls": 3,
        "summary": summary,
        "profiler": "test",
        "total_us": total,
        "kernels": kernels,
    }


DECODE = [
    ("attention", 0, "Gemm", 600.0),
    ("attention", 1, "Gemm", 400.0),
    ("attention", 1, "Attention", 200.0),
    ("ffn", 0, "Gemm", 2000.0),
    ("lm_head", None, "Gemm", 300.0),
    ("norm", 0, "RMSNormalization", 200.0),
    ("other", None, "<script>alert(1)</script>", 200.0),
    ("between", None, "between kernels", 100.0),
]
PROFILED = with_changes(
    engines=[
        engine_of("baseline", BASELINE, profiles=[profile_of("prefill", *DECODE), profile_of("decode", *DECODE)]),
        REALISTIC["engines"][1],
        engine_of("fused", FUSED, profiles=[profile_of("decode", *DECODE[:4]), profile_of("decode", *DECODE, batch=4)]),
    ]
)


def charts() -> list:
    return time_charts(Results.model_validate(PROFILED).engines)


def test_what_is_held_against_what() -> None:
    """Profiles of one phase at one shape; an engine without any is left out."""
    assert [(chart.title, chart.subtitle, [engine.label for engine, _ in chart.rows]) for chart in charts()] == [
        ("One call of decode", "batch 1, after 32 tokens", ["baseline", "fused"]),
        ("One call of decode", "batch 4, after 32 tokens", ["fused"]),
        ("One call of prefill", "batch 1, 32 tokens each", ["baseline"]),
    ]
    assert len({chart.file for chart in charts()}) == 3


def test_bars_are_whole_and_to_scale() -> None:
    layout = time_layout(charts()[0])
    baseline, fused = layout.rows
    for row in layout.rows:
        assert [segment.part for segment in row.segments] == list(PARTS)
        for one, other in zip(row.segments, row.segments[1:], strict=False):
            assert one.x + one.width == pytest.approx(other.x)
    widths = [segment.width for segment in baseline.segments]
    assert [width / sum(widths) for width in widths] == pytest.approx([0.3, 0.5, 0.075, 0.1, 0.025])
    assert sum(segment.width for segment in fused.segments) == pytest.approx(sum(widths) * 3200 / 4000)
    assert sum(widths) + 8 + 62 == pytest.approx(layout.width)
    assert [segment.share for segment in baseline.segments] == ["30 %", "50 %", "", "", ""]
    assert (baseline.total, fused.total) == ("4.00 ms", "3.20 ms")
    assert [text for _, text in layout.ticks] == ["0", "1", "2", "3", "4"]


def test_the_table_names_the_longest_kernels() -> None:
    layout = time_layout(charts()[0])
    cells = {part.name: cells[0] for part, cells in layout.table}
    assert (cells["Attention"].time, cells["Attention"].share) == ("1.20", "30 %")
    assert cells["Attention"].kernels == "Gemm 1.00, Attention 0.200"


def test_a_call_that_took_no_time() -> None:
    chart = time_charts(
        Results.model_validate(
            with_changes(engines=[engine_of("baseline", BASELINE, profiles=[profile_of("decode")])], cells=[])
        ).engines
    )[0]
    layout = time_layout(chart)
    assert all(segment.width == 0 for segment in layout.rows[0].segments)


MEDIANS, ONE_CALL = "sum of these medians", "the one of median duration"


def test_the_note_says_which_call_is_shown() -> None:
    """Older files have the call of median duration; beside newer ones it is said of whom which holds."""

    def note(**summaries: str) -> str:
        engines = [
            engine_of(label, BASELINE, profiles=[profile_of("decode", *DECODE, summary=summary)])
            for label, summary in summaries.items()
        ]
        return time_note(time_charts(Results.model_validate(with_changes(engines=engines, cells=[])).engines))

    assert MEDIANS in note(a="kernel_medians", b="kernel_medians")
    assert ONE_CALL not in note(a="kernel_medians", b="kernel_medians")
    assert ONE_CALL in note(a="median_call")
    assert MEDIANS not in note(a="median_call")
    both = note(a="kernel_medians", b="median_call", c="kernel_medians")
    assert both.index("a and c: ") < both.index(MEDIANS) < both.index("b: ") < both.index(ONE_CALL)


def test_section_of_a_report(tmp_path: Path) -> None:
    files = report_files(tmp_path, PROFILED, count=None)
    page, text = files["report.html"].decode(), files["report.md"].decode()
    assert '<section id="time">' in page
    assert '<a href="#time">Where did the time go</a>' in page
    assert "alert(1)</script>" not in page.split('<script type="application/json"')[0]
    assert "&lt;script&gt;alert(1)" in page
    assert "| FFN | 2.00 (50 %) | 2.00 (62 %) |" in text
    assert MEDIANS in page
    assert MEDIANS in text
    assert {"time_decode_batch_1_32.png", "time_decode_batch_1_32.svg", "time_prefill_batch_1_32.png"} <= set(files)


def test_a_report_without_profiles_has_no_such_section(tmp_path: Path) -> None:
    files = report_files(tmp_path, REALISTIC)
    assert 'id="time"' not in files["report.html"].decode()
    assert "Where did the time go" not in files["report.md"].decode()
