"""Profiles of engines for a results file: one process per engine, before the benchmark."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from engines.base import EngineManifest
from engines.profile import Profile
from engines.profile_worker import PROFILERS, Reply
from engines.results import RequestShape
from engines.worker import Failure, cpu_options
from exporter.errors import EngineError

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
STDERR_TAIL = 2000  # characters


def profiler_problems(backends: Iterable[str]) -> list[EngineError]:
    """Return which backends have engines that nothing here can profile."""
    return [
        EngineError(
            "engines of this backend cannot be profiled",
            expected=" or ".join(PROFILERS),
            found=backend,
            hint="benchmark without a profile",
        )
        for backend in dict.fromkeys(backends)
        if backend not in PROFILERS
    ]


def profile_engine(
    engine: Path,
    manifest: EngineManifest,
    shape: RequestShape,
    *,
    threads: int | None,
    cpus: Sequence[int] | None,
    seed: int,
) -> tuple[Profile, ...]:
    """Profile prefill and decode of one engine at one request shape.

    Raises:
        EngineError: the process failed or died.
    """
    command = [sys.executable, "-m", "engines.profile_worker", str(engine.resolve()), "--backend", manifest.backend]
    command += ["--shape", *map(str, shape), "--seed", str(seed), *cpu_options(threads, cpus)]
    with tempfile.TemporaryDirectory() as temporary:  # for what the process would leave if it is killed
        environment = {**os.environ, "TMPDIR": temporary}
        done = subprocess.run(command, capture_output=True, cwd=PACKAGE_ROOT, env=environment, check=False)
    try:
        reply = Reply.validate_json(done.stdout)
    except ValidationError as error:
        said = done.stderr.decode(errors="replace")[-STDERR_TAIL:].strip()
        raise EngineError(
            f"profiling {manifest.label!r} ended with status {done.returncode}", found=said or "no word"
        ) from error
    if isinstance(reply, Failure):
        raise EngineError(f"profiling {manifest.label!r} failed: {reply.problem}")
    return reply.profiles
