"""One process, one engine: runs a few requests under the runtime's own profiler and says where their time went.

Started by `engines.profiling`, apart from the benchmark, because profiling costs time. It writes one line of JSON:

    {"event": "profiles", "profiles": [...]}    `engines.profile.Profile`, of prefill and, if there is one, of decode
    {"event": "error", "problem": ...}
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from engines import tensorrt_library
from engines.base import read_engine_manifest
from engines.onnxruntime import OnnxRuntime
from engines.onnxruntime_profile import profiles_of_calls
from engines.profile import Phase, Profile, attention_blocks
from engines.results import RequestShape
from engines.tensorrt import TensorRt
from engines.tensorrt_profile import profile_requests
from engines.worker import Failure, Send, add_cpu_options, pin, reporting, timed_request, token_ids
from exporter.structure import Sealed

REQUESTS = 9  # that count, after one of warm-up; each has one prefill
STEPS = 4  # of decode in each, at most


class Profiles(Sealed):
    """What the process found."""

    event: Literal["profiles"] = "profiles"
    profiles: tuple[Profile, ...]


Reply = TypeAdapter[Profiles | Failure](Annotated[Profiles | Failure, Field(discriminator="event")])


def profile_onnxruntime(engine: Path, shape: RequestShape, threads: int | None, seed: int) -> tuple[Profile, ...]:
    """Profile requests of an ONNX Runtime engine."""
    manifest = read_engine_manifest(engine)
    output_len = min(shape.output_len, STEPS + 1)
    request: list[Phase | None] = ["prefill", *["decode"] * (output_len - 1)]  # type: ignore[list-item]
    input_ids = token_ids(shape.batch, shape.input_len, vocab_size=manifest.vocab_size, seed=seed)
    with tempfile.TemporaryDirectory() as temporary:
        runner = OnnxRuntime().open(engine, threads=threads, profile=Path(temporary, "profile"))
        try:
            for _ in range(1 + REQUESTS):
                timed_request(runner, input_ids, output_len)
            file = runner.end_profile()
        finally:
            runner.close()
        return profiles_of_calls(
            file,
            [None] * len(request) + request * REQUESTS,
            batch=shape.batch,
            input_len=shape.input_len,
            slot_blocks=attention_blocks(manifest.structure),
        )


def profile_tensorrt(engine: Path, shape: RequestShape, threads: int | None, seed: int) -> tuple[Profile, ...]:
    """Profile requests of a TensorRT engine. Never executed: see `engines.tensorrt_profile`."""
    runner = TensorRt().open(engine, threads=threads)
    manifest = runner.manifest
    try:
        return profile_requests(
            tensorrt_library.load(),
            runner,
            token_ids(shape.batch, shape.input_len, vocab_size=manifest.vocab_size, seed=seed),
            min(shape.output_len, STEPS + 1),
            requests=REQUESTS,
            slot_blocks=attention_blocks(manifest.structure),
        )
    finally:
        runner.close()


# Backend -> how its engines are profiled.
PROFILERS: dict[str, Callable[[Path, RequestShape, int | None, int], tuple[Profile, ...]]] = {
    "onnxruntime": profile_onnxruntime,
    "tensorrt": profile_tensorrt,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile one engine; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engines.profile_worker", description="Profile one engine.")
    parser.add_argument("engine", type=Path, help="engine folder")
    parser.add_argument("--backend", required=True, choices=PROFILERS, help="the backend that built it")
    parser.add_argument("--shape", required=True, type=int, nargs=3, metavar=("BATCH", "INPUT", "OUTPUT"))
    parser.add_argument("--seed", type=int, default=0, help="of the input tokens")
    add_cpu_options(parser)
    options = parser.parse_args(arguments)

    def work(send: Send) -> None:
        pin(options.cpus)  # before a runtime starts threads: they inherit it
        profile = PROFILERS[options.backend]
        send(Profiles(profiles=profile(options.engine, RequestShape(*options.shape), options.threads, options.seed)))

    return reporting(work)


if __name__ == "__main__":
    sys.exit(main())
