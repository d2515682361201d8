"""The scripts around the report: screenshots without a browser, and what a report of several files costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    kept = tmp_path / "report"
    result = script(
        "benchmarks/report_cost.py", "--files", 2, "--runs", 1, "--keep", kept, "-o", tmp_path / "cost.json"
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["files"] == 2
    assert len(found["seconds"]) == 1
    page = (kept / "report.html").read_bytes()
    assert found["page_bytes"] == len(page) > found["results_bytes"] > 50_000
    assert b"fused-001" in page
