"""Timing engines against each other: one worker process per engine, rounds interleaved.

Why processes: load time and peak memory are then one engine's own. Why interleaved: a machine that slows down, or a
neighbour that comes and goes, hurts every engine alike; the order changes so that each engine runs about equally often
after each (`balanced_orders`). What a worker is does not matter here, only the lines it speaks (`engines.worker`).

An engine whose worker fails once there are samples is left out of further turns; what was measured is kept.
"""

from __future__ import annotations

import itertools
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from engines.base import EngineManifest, read_engine_manifest
from engines.machine import cpu_name, gpus_now
from engines.profiling import profile_engine, profiler_problems
from engines.results import (
    MAX_TOKENS,
    Cell,
    EngineResult,
    Environment,
    GpuState,
    RequestShape,
    Results,
    Stopped,
    check_same_model,
    validation_problems,
)
from engines.worker import Close, Closed, Failure, Ready, Reply, Run, Sample, cpu_options
from exporter.errors import EngineError, FuselageError, raise_all
from exporter.structure import MAX_TEXT, Structure

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
MAX_REPLY_BYTES = 64 * 2**20
STDERR_TAIL_BYTES = 2000
# Runtimes that answer whole requests have workers of their own.
REQUEST_WORKERS = {"tensorrt-llm": "engines.tensorrt_llm_worker"}
KNOWN_WHEN_READY = {"device", "runtime", "program", "load_time_s"}  # fields of a result that `Ready` has
GOODBYE_S = 10.0  # a worker that said it is done gets this long to exit

Message = TypeVar("Message", bound=BaseModel)
Progress = Callable[[int, int, str], None]  # (steps done, steps in all, what comes next)
WorkerCommand = Callable[[Path, EngineManifest, int | None, Sequence[int] | None], Sequence[str]]


def request_grid(
    batches: Sequence[int], input_lens: Sequence[int], output_lens: Sequence[int]
) -> tuple[RequestShape, ...]:
    """Return every combination, in the order given, repetitions dropped."""
    return tuple(dict.fromkeys(RequestShape(*values) for values in itertools.product(batches, input_lens, output_lens)))


def python_worker(
    engine: Path, manifest: EngineManifest, threads: int | None, cpus: Sequence[int] | None
) -> Sequence[str]:
    """Return the command of the worker that drives a backend of ours from Python."""
    if manifest.backend in REQUEST_WORKERS:
        command = [sys.executable, "-m", REQUEST_WORKERS[manifest.backend], str(engine)]
    else:
        command = [sys.executable, "-m", "engines.worker", str(engine), "--backend", manifest.backend]
    return [*command, *cpu_options(threads, cpus)]


def bench_engines(
    engines: Sequence[Path],
    grid: Sequence[RequestShape],
    *,
    rounds: int = 8,
    warmup: int = 1,
    threads: int | None = None,
    cpus: Sequence[int] | None = None,
    seed: int = 0,
    one_at_a_time: bool = False,
    progress: Progress | None = None,
    profile: bool = False,
    worker: WorkerCommand = python_worker,
) -> Results:
    """Time every engine at every request shape and keep all samples.

    An engine that fails before the first sample of any engine is an error. After it the others go on, and what is known
    of the failed one is marked as `stopped`; so are all that are not done where the user interrupts.

    Args:
        engines: engine folders; the first is what reports take as the baseline.
        grid: request shapes, see `request_grid`.
        rounds: requests per engine and shape that are kept.
        warmup: requests per engine and shape before those, thrown away.
        threads: threads of each runtime; None leaves the choice to it, or takes one for each of `cpus` where these are
            not all of the machine's: ONNX Runtime's choice is a thread on every core, whatever it is pinned to.
        cpus: CPUs that every worker is pinned to; None does not pin.
        seed: of the input tokens, the same for all engines and rounds.
        one_at_a_time: an engine is closed before the next one is loaded, where memory does not hold all of them. Rounds
            are then not interleaved: what slows the machine down may fall on one engine alone.
        progress: called before each step.
        profile: before that, run every engine under its runtime's profiler, at the first request shape.
        worker: the command that serves one engine.

    Raises:
        FuselageError: a folder, a label, a shape or a setting is wrong (all problems at once, before anything starts).
        EngineError: a worker failed or died before there was a sample to keep.
        KeyboardInterrupt: likewise.
    """
    began = datetime.now(timezone.utc)
    problems = _setting_problems(grid, rounds=rounds, warmup=warmup, threads=threads, cpus=cpus, seed=seed)
    tokens = len(engines) * rounds * sum(shape.output_len for shape in grid)
    if tokens > MAX_TOKENS:
        problems.append(
            EngineError(
                "a results file does not hold so many timed tokens",
                expected=f"at most {MAX_TOKENS:,}",
                found=f"{tokens:,}",
                hint="take fewer rounds, or fewer request shapes or engines at a time",
            )
        )
    raise_all(problems)
    if threads is None and cpus is not None and len(set(cpus)) < (os.cpu_count() or 1):
        threads = len(set(cpus))
    manifests, described = _checked_engines(engines, grid)
    if profile:
        raise_all(profiler_problems(manifest.backend for manifest in manifests))
    report = progress if progress is not None else lambda done, total, text: None
    total = len(engines) * (1 + len(grid) * (warmup + rounds) + profile)
    steps = itertools.count()
    record = _Record(described, grid, rounds)

    # Profiles come first: what fails in them would else cost the samples.
    for engine, manifest in zip(engines, manifests, strict=True) if profile else ():
        report(next(steps), total, f"profiling {manifest.label}")
        profiles = profile_engine(engine, manifest, grid[0], threads=threads, cpus=cpus, seed=seed)
        record.learn(manifest.label, profiles=profiles)
    folders = list(zip(engines, manifests, strict=True))
    try:
        for together in [[one] for one in folders] if one_at_a_time else [folders]:
            with ExitStack() as stack:
                workers: list[_Worker] = []
                for engine, manifest in together:  # one after the other: loading is timed
                    report(next(steps), total, f"loading {manifest.label}")
                    with record.stopping(manifest.label):
                        command = worker(engine.resolve(), manifest, threads, cpus)
                        turn = stack.enter_context(_Worker(manifest.label, command))
                        workers.append(turn)
                        record.opened(turn.label, turn.ready)
                for shape, round_index, turn in _turns(grid, warmup + rounds, workers):
                    report(next(steps), total, f"{turn.label}, {shape}")
                    run = Run(batch=shape.batch, input_len=shape.input_len, output_len=shape.output_len, seed=seed)
                    with record.stopping(turn.label):
                        sample = turn.time(run)
                        if round_index >= warmup:
                            record.keep(turn.label, shape, sample)
                record.look_at_gpus()
                for turn in workers:
                    if not turn.is_ended:
                        with record.stopping(turn.label):
                            closed = turn.ask(Close(), Closed)
                            record.learn(turn.label, peak_memory_gib=closed.peak_memory_gib)
    except KeyboardInterrupt:
        if not record.has_samples:
            raise
        record.interrupt()
    report(total, total, "done")

    return Results(
        environment=environment_here(
            clock=", ".join(sorted(record.clocks)),
            threads=threads,
            pinned_cpus=None if cpus is None else tuple(cpus),
            warmup_rounds=warmup,
            seed=seed,
            interleaved=not one_at_a_time,
            gpus=record.gpus,
            utc=began,
        ),
        engines=record.engines,
        cells=record.cells,
    )


def balanced_orders(count: int) -> Iterator[tuple[int, ...]]:
    """Yield the order of 0 to `count` - 1 (at least one) in each round, without end; each follows each equally often.

    The orders are rows of a Williams square, all of which come before one comes again. After that many rounds, which
    are `count` or, where it is odd, twice as many, everyone had every place and came right after every other equally
    often. Between rounds: of the rows that are left, the next begins with what has followed the last of the round
    before least often, itself included. Of two that makes ABBA.

    Source: Williams, "Experimental designs balanced for the estimation of residual effects of treatments", Australian
    Journal of Scientific Research A 2 (1949), 149-168.
    """
    # 0, 1, -1, 2, -2, ...: the differences of neighbours are all different, modulo an even count.
    zigzag = [(index + 1) // 2 if index % 2 else -(index // 2) for index in range(count)]
    rows = [tuple((start + offset) % count for offset in zigzag) for start in range(count)]
    rows += [row[::-1] for row in rows] if count % 2 else []
    followed: Counter[tuple[int, int]] = Counter()  # (who, by whom) -> how often
    before: tuple[int, ...] = ()
    while True:
        left = list(rows)
        while left:
            row = min(left, key=lambda row: followed[before[-1], row[0]] if before else 0)
            left.remove(row)
            followed.update(itertools.pairwise((*before[-1:], *row)))
            before = row
            yield row


def _turns(
    grid: Sequence[RequestShape], rounds: int, workers: Sequence[_Worker]
) -> Iterator[tuple[RequestShape, int, _Worker]]:
    """Yield whose turn it is at which request, round by round, in balanced orders.

    A worker that has ended meanwhile has no more turns, and those of the others are balanced anew.
    """
    for shape in grid:
        present: list[_Worker] = []
        orders: Iterator[tuple[int, ...]] = iter(())
        for round_index in range(rounds):
            left = [turn for turn in workers if not turn.is_ended]
            if not left:
                return
            if left != present:
                present, orders = left, balanced_orders(len(left))
            for index in next(orders):
                yield shape, round_index, present[index]


class _Record:
    """What a benchmark has found so far."""

    def __init__(self, engines: Sequence[EngineResult], grid: Sequence[RequestShape], rounds: int) -> None:
        self._engines = {engine.label: engine for engine in engines}
        self._grid = grid
        self._rounds = rounds
        self._samples: dict[tuple[str, RequestShape], list[Sample]] = {}
        self.clocks: set[str] = set()
        self.gpus: tuple[GpuState, ...] = ()

    @property
    def engines(self) -> tuple[EngineResult, ...]:
        return tuple(self._engines.values())

    @property
    def cells(self) -> tuple[Cell, ...]:
        keys = itertools.product(self._grid, self._engines)
        return tuple(
            _cell(label, shape, self._samples[label, shape]) for shape, label in keys if (label, shape) in self._samples
        )

    @property
    def has_samples(self) -> bool:
        return bool(self._samples)

    def learn(self, label: str, **fields: Any) -> None:
        """Fill in fields of an engine's result."""
        self._engines[label] = self._engines[label].model_copy(update=fields)

    def opened(self, label: str, ready: Ready) -> None:
        """Take down what a worker says once its engine is open."""
        self.learn(label, **ready.model_dump(include=KNOWN_WHEN_READY))
        self.clocks.add(ready.clock)

    def look_at_gpus(self) -> None:
        """Take down the state of the machine's GPUs, if an engine is on one: how fast they are while they work."""
        if any(engine.device != "cpu" for engine in self.engines):
            self.gpus = tuple(GpuState.model_validate(gpu) for gpu in gpus_now())

    def keep(self, label: str, shape: RequestShape, sample: Sample) -> None:
        """Keep the sample of an engine's next round."""
        self._samples.setdefault((label, shape), []).append(sample)

    @contextmanager
    def stopping(self, label: str) -> Iterator[None]:
        """Mark the engine as stopped if it fails inside the block; with no sample to keep, let the error pass."""
        try:
            yield
        except FuselageError as error:
            if not self.has_samples:
                raise
            self._stop(label, str(error))

    def interrupt(self) -> None:
        """Mark the engines as stopped that have not said goodbye."""
        for engine in self.engines:
            if engine.peak_memory_gib is None and engine.stopped is None:
                self._stop(engine.label, "interrupted")

    def _stop(self, label: str, problem: str) -> None:
        kept = {shape: len(self._samples.get((label, shape), ())) for shape in self._grid}
        # Shapes follow one another; an engine may also fail after the last of its rounds.
        shape = next((shape for shape in self._grid if kept[shape] < self._rounds), self._grid[-1])
        stopped = Stopped(**shape._asdict(), rounds=kept[shape], rounds_asked=self._rounds, problem=problem[:MAX_TEXT])
        self.learn(label, stopped=stopped)


class _Worker:
    """A worker process whose engine is open once the `with` block begins, and which is gone after the block."""

    def __init__(self, label: str, command: Sequence[str]) -> None:
        self.label = label
        self.command = command
        self.ready: Ready

    def __enter__(self) -> _Worker:
        # A file, not a pipe: a chatty library cannot fill it up and stall the worker.
        self._stderr = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                # `-m engines.worker` searches the working directory first, which must be ours and not the user's.
                cwd=PACKAGE_ROOT,
                start_new_session=True,  # Ctrl-C comes to the parent alone, which then ends the workers
            )
        except OSError as error:
            self._stderr.close()
            raise EngineError(
                f"the worker of {self.label!r} does not start: {error.strerror}", file=self.command[0]
            ) from error
        try:
            self.ready = self._reply(Ready)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(patience_s=GOODBYE_S if error is None else 0)

    @property
    def is_ended(self) -> bool:
        return self._stderr.closed

    def ask(self, order: BaseModel, reply: type[Message]) -> Message:
        """Send one order and wait for its reply; ends the worker where this is not what it answers.

        Raises:
            EngineError: it failed or died, or does not speak the protocol.
        """
        assert self._process.stdin is not None
        # A worker that is dead or dying does not read; what it said before that is read next, and explains why.
        with suppress(BrokenPipeError):
            self._process.stdin.write(order.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()
        return self._reply(reply)

    def time(self, run: Run) -> Sample:
        """Have one request timed; fails like `ask`."""
        sample = self.ask(run, Sample)
        shape = RequestShape(run.batch, run.input_len, run.output_len)
        try:
            _cell(self.label, shape, [sample])
        except ValidationError as error:
            raise self._failure(
                "timed another request than asked", expected=str(shape), found=validation_problems(error)
            ) from error
        return sample

    def _reply(self, expected: type[Message]) -> Message:
        assert self._process.stdout is not None
        line = self._process.stdout.readline(MAX_REPLY_BYTES)
        if not line:
            raise self._failure(f"{self._end_in_words()}{self._stderr_tail()}")
        try:
            message = Reply.validate_json(line)
        except ValidationError as error:
            raise self._failure(
                f"does not speak the protocol: {validation_problems(error)}",
                expected="JSON lines as in engines/worker.py",
                found=repr(line[:100]),
            ) from error
        if isinstance(message, Failure):
            raise self._failure(f"failed: {message.problem}")
        if not isinstance(message, expected):
            raise self._failure(
                "answered out of turn", expected=expected.model_fields["event"].default, found=message.event
            )
        return message

    def _failure(self, problem: str, *, expected: object = None, found: object = None) -> EngineError:
        """End the process, which holds memory and may still compute, and return the error to raise."""
        self._end()
        return EngineError(f"the worker of {self.label!r} {problem}", expected=expected, found=found)

    def _end_in_words(self) -> str:
        try:
            status = self._process.wait(timeout=GOODBYE_S)
        except subprocess.TimeoutExpired:
            return "closed its output without a word"
        if status >= 0:
            return f"ended early with status {status}"
        cause = ", out of memory?" if -status == signal.SIGKILL else ""
        return f"was ended by signal {-status} ({signal.strsignal(-status)}{cause})"

    def _stderr_tail(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - STDERR_TAIL_BYTES))
        tail = self._stderr.read().decode(errors="replace").strip()
        return f"; the end of what it printed:\n{tail}" if tail else "; it printed nothing"

    def _end(self, *, patience_s: float = 0) -> None:
        if self.is_ended:
            return
        try:
            if patience_s:
                with suppress(subprocess.TimeoutExpired):  # then it is killed like any other
                    self._process.wait(timeout=patience_s)
        finally:  # also on KeyboardInterrupt
            with suppress(ProcessLookupError):  # it leads a session; what it started, such as ranks, goes with it
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._stderr):
                assert stream is not None
                with suppress(BrokenPipeError):  # bytes that a dead worker never read
                    stream.close()


def _setting_problems(
    grid: Sequence[RequestShape],
    *,
    rounds: int,
    warmup: int,
    threads: int | None,
    cpus: Sequence[int] | None,
    seed: int,
) -> list[EngineError]:
    problems = [
        EngineError(f"{name} is a whole number of at least {least}", found=value)
        for name, value, least in (
            ("the number of rounds", rounds, 1),
            ("the number of warm-up rounds", warmup, 0),
            ("the number of threads", 1 if threads is None else threads, 1),
            ("the seed", seed, 0),
        )
        if value < least
    ]
    if seed >= 2**64:
        problems.append(EngineError("the seed fits 64 bits", found=seed))
    if not grid:
        problems.append(EngineError("the grid is empty, there is nothing to time"))
    problems += [
        EngineError("batch, input length and output length are positive", found=str(shape))
        for shape in grid
        if min(shape) < 1
    ]
    if len(set(grid)) != len(grid):
        problems.append(EngineError("the grid names a request shape twice"))
    if cpus is not None:
        if not hasattr(os, "sched_getaffinity"):
            problems.append(EngineError("this system cannot pin a process to CPUs", hint="leave the CPUs out"))
        elif not cpus or not set(cpus) <= os.sched_getaffinity(0):
            problems.append(
                EngineError(
                    "not all CPUs to pin to can be used",
                    expected=f"some of {sorted(os.sched_getaffinity(0))}",
                    found=list(cpus),
                )
            )
    return problems


def _checked_engines(
    engines: Sequence[Path], grid: Sequence[RequestShape]
) -> tuple[list[EngineManifest], list[EngineResult]]:
    """Return each engine's manifest and what of its result is known before it runs; raises all problems at once."""
    if not engines:
        raise EngineError("there is no engine to time")
    manifests: list[EngineManifest] = []
    described: list[EngineResult] = []
    problems: list[FuselageError] = []
    for engine in engines:
        try:
            manifest = read_engine_manifest(engine)
            described.append(_described(engine, manifest))
            manifests.append(manifest)
        except FuselageError as error:
            problems.append(error)
            continue
        problems += _room_problems(engine, manifest, grid)
        if manifest.label in [other.label for other in manifests[:-1]]:
            problems.append(
                EngineError(
                    "two engines have the same label",
                    file=engine,
                    found=manifest.label,
                    hint="build one of them with another label",
                )
            )
    raise_all(problems)
    check_same_model([(manifest.label, manifest.structure) for manifest in manifests])
    return manifests, described


def _described(engine: Path, manifest: EngineManifest) -> EngineResult:
    try:
        return EngineResult(
            label=manifest.label,
            # An engine that imitates a number format which its hardware lacks says so in its backend's options.
            kind="emulated" if manifest.options.get("emulated") else "measured",
            backend=manifest.backend,
            device=str(manifest.options.get("device", "cpu")),  # device and runtime are the build's until it is open
            runtime=manifest.runtime,
            dtype=manifest.dtype,
            number_format=manifest.number_format,
            plugins=manifest.plugins,
            network_sha256=manifest.network_sha256,
            engine_bytes=sum(path.stat().st_size for path in engine.rglob("*") if path.is_file()),
            weight_bytes=manifest.weight_bytes,
            kv_bytes_per_token=manifest.kv_bytes_per_token,
            structure=Structure.model_validate(manifest.structure),
        )
    except ValidationError as error:
        raise EngineError(f"the manifest is malformed: {validation_problems(error)}", file=engine) from error


def _room_problems(engine: Path, manifest: EngineManifest, grid: Sequence[RequestShape]) -> list[EngineError]:
    limits = [("positions the model knows", manifest.max_positions)]
    if manifest.capacity is not None:
        limits.append(("tokens the KV cache holds", manifest.capacity))
    longest = max(shape.input_len + shape.output_len for shape in grid)
    problems = [
        EngineError(f"input and output are longer than the {name}", file=engine, expected=limit, found=longest)
        for name, limit in limits
        if longest > limit
    ]
    if manifest.batch is not None:
        problems += [
            EngineError("the engine has a fixed batch", file=engine, expected=manifest.batch, found=shape.batch)
            for shape in grid
            if shape.batch != manifest.batch
        ]
    return problems


def _cell(label: str, shape: RequestShape, samples: Sequence[Sample]) -> Cell:
    return Cell(
        engine=label,
        batch=shape.batch,
        input_len=shape.input_len,
        output_len=shape.output_len,
        ttft_ms=tuple(sample.ttft_ms for sample in samples),
        step_ms=tuple(sample.step_ms for sample in samples),
        request_ms=tuple(sample.request_ms for sample in samples),
        run_ms=_where_all([sample.run_ms for sample in samples]),
        device_ms=_where_all([sample.device_ms for sample in samples]),
    )


def _where_all(calls: Sequence[tuple[float, ...] | None]) -> tuple[tuple[float, ...], ...] | None:
    """What every round has, None where a worker does not know it."""
    known = tuple(call for call in calls if call is not None)
    return known if len(known) == len(calls) else None


def environment_here(
    *,
    clock: str,
    threads: int | None,
    pinned_cpus: tuple[int, ...] | None,
    warmup_rounds: int,
    seed: int | None,
    utc: datetime,
    interleaved: bool = True,
    gpus: tuple[GpuState, ...] = (),
) -> Environment:
    """Return this machine, its software and the settings of one benchmark."""
    import psutil

    return Environment(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        memory_gib=psutil.virtual_memory().total / 2**30,
        os=platform.platform(),
        python=platform.python_version(),
        clock=clock,
        threads=threads,
        pinned_cpus=pinned_cpus,
        warmup_rounds=warmup_rounds,
        seed=seed,
        interleaved=interleaved,
        gpus=gpus,
        utc=utc,
        # Arguments are bytes to the system; what is not UTF-8 in them could not be written as JSON.
        command=tuple(os.fsencode(word).decode(errors="replace") for word in sys.orig_argv),
    )
