"""The scripts around the report: screenshots without a browser, and results files as many as wanted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.report import report_from_results

ROOT = Path(__file__).parent.parent


def script(path: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


@pytest.mark.parametrize(("page", "message"), [(None, "no such report"), ("<!doctype html>", "no browser found")])
def test_screenshots_say_what_is_missing(tmp_path: Path, page: str | None, message: str) -> None:
    if page is not None:
        (tmp_path / "report.html").write_text(page)
    result = script("docs/screenshots.py", tmp_path, "-o", tmp_path / "shots", PATH=str(tmp_path))
    assert result.returncode == 1
    assert message in result.stderr
    assert not (tmp_path / "shots").exists()


def test_the_cost_of_a_report_is_measured(tmp_path: Path) -> None:
    result = script("benchmarks/report_cost.py", "--files", 4, "--runs", 1, "-o", tmp_path / "cost.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["files"] == 4
    assert len(found["seconds"]) == 1
    assert found["page_bytes"] > found["results_bytes"] > 100_000


def test_files_that_are_rendered_are_as_bench_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from report_cost import write_files

    paths = write_files(tmp_path, 2)
    name, page = next(iter(report_from_results(paths, baseline=None)))
    assert name == "report.html"
    assert b"fused-001" in page
