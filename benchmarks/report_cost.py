"""How long does a report of many results files take? Whole processes, the start of Python included.

    python benchmarks/report_cost.py --files 200 --runs 5 -o benchmarks/results/report_cost.json

Each file is as `bench` writes it: three engines of a 16-layer model, four request shapes, five rounds of 32 tokens.
Samples are drawn, not measured. The report has everything: intervals, tables, charts as PNG and SVG, raw data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.results import json_from_results, read_results, results_from_json  # noqa: E402

SOURCE = ROOT / "benchmarks" / "results" / "demo_cpu.json"
STEP_MS = (1.0, 0.8, 0.65)  # of the three engines
SHAPES = [(batch, input_len) for batch in (1, 4) for input_len in (32, 256)]
ROUNDS, OUTPUT_LEN = 5, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="keep the report in this folder")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), arguments.files)
        nbytes = sum(path.stat().st_size for path in paths)
        report = (arguments.keep or Path(folder) / "report").resolve()
        seconds = []
        for _ in range(arguments.runs):
            command = [sys.executable, "build.py", "report", *map(str, paths), "-o", str(report), "--force", "--quiet"]
            began = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True)
            seconds.append(time.perf_counter() - began)
        page = (report / "report.html").stat().st_size
    found = {
        "files": len(paths),
        "results_bytes": nbytes,
        "page_bytes": page,
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(f"{len(paths)} files, {nbytes / 1e6:.1f} MB: median {found['median_s']:.2f} s of {arguments.runs} runs")
    print(f"fastest {min(seconds):.2f} s, slowest {max(seconds):.2f} s; the page has {page / 1e6:.1f} MB")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")


def write_files(folder: Path, count: int) -> list[Path]:
    """Write results files whose samples are drawn; the engines of each have labels of their own."""
    source = json.loads(json_from_results(read_results(SOURCE)))
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        names = [f"{engine['label']}-{index:03d}" for engine in source["engines"]]
        began = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(hours=index)
        document = {
            "results_schema": source["results_schema"],
            "environment": {**source["environment"], "utc": began.isoformat()},
            "engines": [{**engine, "label": name} for engine, name in zip(source["engines"], names, strict=True)],
            "cells": [
                cell(name, shape, step, rng) for shape in SHAPES for name, step in zip(names, STEP_MS, strict=True)
            ],
        }
        path = folder / f"results-{index:03d}.json"
        path.write_bytes(json_from_results(results_from_json(json.dumps(document).encode())))
        paths.append(path)
    return paths


def cell(engine: str, shape: tuple[int, int], step_ms: float, rng: np.random.Generator) -> dict[str, Any]:
    batch, input_len = shape
    ttft = 0.06 * input_len * batch * step_ms * rng.lognormal(0, 0.05, ROUNDS)
    steps = step_ms * (0.7 + 0.3 * batch) * rng.lognormal(0, 0.05, (ROUNDS, OUTPUT_LEN - 1))
    return {
        "engine": engine,
        "batch": batch,
        "input_len": input_len,
        "output_len": OUTPUT_LEN,
        "ttft_ms": ttft.round(6).tolist(),
        "step_ms": steps.round(6).tolist(),
        "request_ms": (ttft + steps.sum(axis=1)).round(6).tolist(),
    }


if __name__ == "__main__":
    main()
