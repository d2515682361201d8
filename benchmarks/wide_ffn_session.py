"""Tests, benchmark and tuning of the wide-FFN op on a GPU that is there for a few minutes only, in one command:

    python benchmarks/wide_ffn_session.py -o OUT --minutes 9.5 [--resume EARLIER]

    tests       tests/plugins/test_wide_ffn_gpu.py, in several processes; until they have passed with these sources
    benchmark   wide_ffn_gpu.py --tune-below: the target's cases, tuning of what misses it, those cases again, and then
                everything else; in a process of its own, because an error of the device ends it, and again after such
                an end

All of it is in OUT/log.jsonl: give the OUT of one call as EARLIER to the next, and that goes on, on a fresh machine
too. Beside it come the tests' output (tests.txt, tests.xml), the plot (log.png) and the block sizes that were found
(sm_90.json, for plugins/wide_ffn/configs). Needs what the two commands need; with pytest-xdist tests are faster.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_timing import Log, sources_sha256  # noqa: E402

CONFIGS = ROOT / "plugins" / "wide_ffn" / "configs" / "sm_90.json"
TEST_PROCESSES = 12
TEST_SHARE = 0.4  # of the time, at most
MARGIN_S = 25.0  # the benchmark stops between cases, and then says what it found
LEAST_S = 20.0  # less is not worth a start


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 when tests have passed and no case is left or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--resume", type=Path, help="output of an earlier call, to go on from")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit of all together (default: 9.5)")
    parser.add_argument("--tune-below", type=float, default=0.88, metavar="SHARE", help="of the copy (default: 0.88)")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + 60 * options.minutes
    file = options.output / "log.jsonl"
    log = Log(file)
    if options.resume is not None:
        shutil.copyfile(options.resume / file.name, file)
    if not has_passed(log):
        log.add({"tests": run_tests(options.output, TEST_SHARE * 60 * options.minutes)})
    status: int | None = 1
    known = -1
    while status and not has_ended(log, known) and len([*log.records()]) > known and left(ends) > LEAST_S + MARGIN_S:
        known = len([*log.records()])
        minutes = (left(ends) - MARGIN_S) / 60
        command = [sys.executable, str(ROOT / "benchmarks" / "wide_ffn_gpu.py"), "-o", str(file)]
        status = run([*command, "--minutes", f"{minutes:.2f}", "--tune-below", str(options.tune_below)], left(ends))
    shutil.copyfile(CONFIGS, options.output / CONFIGS.name)
    return 0 if status == 0 and has_passed(log) else 1


def left(ends: float) -> float:
    """Seconds."""
    return ends - time.monotonic()


def has_passed(log: Log) -> bool:
    """Whether the tests were executed with the sources as they are, and none failed."""
    tests = [record["tests"] for record in log.records() if "tests" in record]
    now = sources_sha256()
    return any(one["sources_sha256"] == now and one["passed"] and not one["failed"] for one in tests)


def has_ended(log: Log, known: int) -> bool:
    """Whether a benchmark has come to its regular end since the log had `known` records; no error of the device."""
    return known >= 0 and any("end" in record for record in [*log.records()][known:])


def run_tests(output: Path, seconds: float) -> dict[str, Any]:
    """Run them, at most so long; returns what became of them."""
    report = output / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(TEST_PROCESSES)]
    report.unlink(missing_ok=True)
    began = time.monotonic()
    with (output / "tests.txt").open("w") as text:
        status = run([*command, "tests/plugins/test_wide_ffn_gpu.py"], seconds, stdout=text, OMP_NUM_THREADS="2")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            counts = {name: count + int(suite.get(name, 0)) for name, count in counts.items()}
    failed = counts["failures"] + counts["errors"]
    found = {
        "passed": counts["tests"] - counts["skipped"] - failed,
        "failed": failed,
        "skipped": counts["skipped"],
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "sources_sha256": sources_sha256(),
    }
    print("".join((output / "tests.txt").read_text().splitlines(keepends=True)[-25:]), f"tests: {found}", flush=True)
    return found


def run(command: Sequence[str], seconds: float, *, stdout: Any = None, **environment: str) -> int | None:
    """Exit status of a command in the project's root; None if it and its children were killed after so many seconds."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.STDOUT if stdout is not None else None,
        env={**os.environ, **environment},
        preexec_fn=os.setpgrp,  # not a session of its own: that would outlive this process
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
