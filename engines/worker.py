"""One process, one engine: opens it, times requests on demand, reports its own memory.

Started by `engines.bench`, which talks to it in JSON lines and knows nothing else of it; any program that speaks the
same lines can take its place:

    worker -> {"event": "ready", "protocol": 1, "load_time_s": ..., "runtime": {...}, "device": ..., "clock": ...,
               "program": "python"}
    bench  -> {"op": "run", "batch": B, "input_len": S, "output_len": N, "seed": n, "with_tokens": false}
    worker -> {"event": "sample", "ttft_ms": ..., "step_ms": [N - 1 numbers], "request_ms": ...}
    bench  -> {"op": "close"}
    worker -> {"event": "closed", "peak_memory_gib": ...}        and exits; the end of its input makes it exit, too
    worker -> {"event": "error", "problem": ...}                 at any time, and exits

Every round of a request has the same input: token k of the batch, counted row by row, is output k of the SplitMix64
generator that starts from `seed`, modulo vocab_size. A worker that knows them adds `run_ms` and `device_ms` to a sample
(`engines.results.Cell`), and one that was asked for them the generated `tokens`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, TextIO

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter

from engines.base import EngineManifest, Runner
from engines.results import Amount, Duration
from exporter.errors import EngineError, FuselageError
from exporter.structure import Sealed

PROTOCOL: Final = 1
CLOCK = "time.perf_counter_ns"
LINUX_STATUS = Path("/proc/self/status")


class Run(Sealed):
    """Time one request."""

    op: Literal["run"] = "run"
    batch: int = Field(ge=1)
    input_len: int = Field(ge=1)
    output_len: int = Field(ge=1)
    seed: int = Field(ge=0, lt=2**64)
    with_tokens: bool = False  # whether the sample is to hold what was generated


class Close(Sealed):
    """Say goodbye and exit."""

    op: Literal["close"] = "close"


class Ready(Sealed):
    """The engine is open."""

    event: Literal["ready"] = "ready"
    protocol: Literal[1] = PROTOCOL
    load_time_s: Duration
    runtime: dict[str, str]  # versions of what runs the engine
    device: str  # "cpu", or the accelerator's name
    clock: str  # what takes the samples
    program: Literal["cpp", "python"] = "python"  # that speaks


class Sample(Sealed):
    """One timed request."""

    event: Literal["sample"] = "sample"
    ttft_ms: Duration
    step_ms: tuple[Amount, ...]
    request_ms: Duration
    run_ms: tuple[Amount, ...] | None = None  # of prefill, then of each decode step
    device_ms: tuple[Amount, ...] | None = None
    tokens: tuple[tuple[int, ...], ...] | None = None  # [output_len][B], if asked for


class Closed(Sealed):
    """The process has done its work."""

    event: Literal["closed"] = "closed"
    peak_memory_gib: Duration  # the most resident memory the process ever had


class Failure(Sealed):
    """The process cannot go on."""

    event: Literal["error"] = "error"
    problem: str


Send = Callable[[BaseModel], None]
Order = TypeAdapter[Run | Close](Annotated[Run | Close, Field(discriminator="op")])
Reply = TypeAdapter[Ready | Sample | Closed | Failure](
    Annotated[Ready | Sample | Closed | Failure, Field(discriminator="event")]
)


def token_ids(batch: int, input_len: int, *, vocab_size: int, seed: int) -> np.ndarray:
    """Make input ids, int64 [batch, input_len] in [0, vocab_size): SplitMix64 outputs modulo vocab_size.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. A counter-based generator
    of four lines, so that a worker in another language makes the same tokens.
    """
    counter = np.arange(1, batch * input_len + 1, dtype=np.uint64)
    z = np.uint64(seed) + counter * np.uint64(0x9E3779B97F4A7C15)  # array arithmetic wraps around at 2**64
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z % np.uint64(vocab_size)).astype(np.int64).reshape(batch, input_len)


def timed_request(
    runner: Runner,
    input_ids: np.ndarray,
    output_len: int,
    *,
    with_tokens: bool = False,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> Sample:
    """Generate `output_len` tokens greedily for `input_ids` int64 [B, S] and time every one of them.

    `Runner.start` is not timed: a server has its room before a request arrives. What a runtime puts off until the first
    call, such as growing the cache, is.
    """
    batch, input_len = input_ids.shape
    lengths = np.full(batch, input_len, dtype=np.int64)
    runner.start(batch, input_len + output_len)
    stamps_ns = [clock_ns()]
    tokens = runner.prefill_greedy(input_ids, lengths)
    stamps_ns.append(clock_ns())
    generated = [tokens]
    for _ in range(output_len - 1):
        tokens = runner.decode_greedy(tokens)
        stamps_ns.append(clock_ns())
        generated.append(tokens)
    ttft_ms, *step_ms = ((after - before) / 1e6 for before, after in itertools.pairwise(stamps_ns))
    return Sample(
        ttft_ms=ttft_ms,
        step_ms=tuple(step_ms),
        request_ms=(stamps_ns[-1] - stamps_ns[0]) / 1e6,
        tokens=tuple(tuple(row.tolist()) for row in generated) if with_tokens else None,
    )


def serve(runner: Runner, lines: Iterable[str], send: Send) -> None:
    """Answer JSON lines until a `close` or the end of `lines`."""
    vocab_size = runner.manifest.vocab_size
    for line in lines:
        order = Order.validate_json(line)
        if isinstance(order, Close):
            send(Closed(peak_memory_gib=peak_memory_bytes() / 2**30))
            return
        input_ids = token_ids(order.batch, order.input_len, vocab_size=vocab_size, seed=order.seed)
        gc.collect()
        gc.disable()  # a collection in the middle of a step would be timed as the engine's
        try:
            sample = timed_request(runner, input_ids, order.output_len, with_tokens=order.with_tokens)
        finally:
            gc.enable()
        send(sample)


def peak_memory_bytes() -> int:
    """Return the largest resident memory this process has had.

    On Linux from VmHWM: `ru_maxrss` survives exec there, so a small child of a large parent would report the parent's.
    """
    if LINUX_STATUS.exists():
        for line in LINUX_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one engine on stdin and stdout; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engines.worker", description="Time requests of one engine.")
    parser.add_argument("engine", type=Path, help="engine folder")
    parser.add_argument("--backend", required=True, help="name of the backend that opens it")
    add_cpu_options(parser)
    options = parser.parse_args(arguments)

    def work(send: Send) -> None:
        pin(options.cpus)  # before a runtime starts threads: they inherit it
        _serve_engine(options.engine, options.backend, options.threads, send)

    return reporting(work)


def reporting(work: Callable[[Send], None]) -> int:
    """Run `work` with a way to send messages on stdout, of which its failure is one; returns the exit status."""
    protocol = take_stdout()

    def send(message: BaseModel) -> None:
        protocol.write(message.model_dump_json() + "\n")
        protocol.flush()

    try:
        work(send)
    except FuselageError as error:
        send(Failure(problem=str(error)))
        return 2
    except Exception as error:
        send(Failure(problem=f"{type(error).__name__}: {error}"))
        raise
    return 0


def _serve_engine(engine: Path, backend: str, threads: int | None, send: Send) -> None:
    from engines.backends import backend_named

    began_ns = time.perf_counter_ns()
    runner = backend_named(backend).open(engine, threads=threads)
    load_time_s = (time.perf_counter_ns() - began_ns) / 1e9
    try:
        send(
            Ready(
                load_time_s=load_time_s,
                runtime=runtime_versions(runner.manifest),
                device=str(runner.manifest.options.get("device", "cpu")),
                clock=CLOCK,
            )
        )
        serve(runner, sys.stdin, send)
    finally:
        runner.close()


def runtime_versions(manifest: EngineManifest) -> dict[str, str]:
    """Return the versions installed here of the packages that the engine was built with."""
    versions = {}
    for name, built_with in manifest.runtime.items():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # not a Python package: the manifest is all there is to know
            versions[name] = f"{built_with} (at build)"
    return versions


def take_stdout() -> TextIO:
    """Keep stdout for the protocol and send what anybody else prints, C libraries included, to stderr."""
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return protocol


def pin(cpus: Sequence[int] | None) -> None:
    """Keep this process, and the threads it will have, on these CPUs; None: anywhere."""
    if cpus is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise EngineError("this system cannot pin a process to CPUs", hint="run without --cpus")
    os.sched_setaffinity(0, cpus)


def cpu_options(threads: int | None, cpus: Sequence[int] | None) -> list[str]:
    """Write threads and CPUs as options of a program that opens an engine; None: none."""
    options = [] if threads is None else ["--threads", str(threads)]
    return options if cpus is None else [*options, "--cpus", ",".join(map(str, cpus))]


def add_cpu_options(parser: argparse.ArgumentParser) -> None:
    """Let a program take what `cpu_options` writes."""
    parser.add_argument("--threads", type=int, help="threads of the runtime (default: its own choice)")
    parser.add_argument("--cpus", type=cpu_list, help="pin the process to these CPUs, e.g. 0,1")


def cpu_list(text: str) -> tuple[int, ...]:
    """Parse "0,1"."""
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
