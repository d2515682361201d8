"""The benchmark against workers that are scripts: order, input, samples, and every way a worker can go wrong."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from engines.base import EngineManifest, Runner
from engines.bench import balanced_orders, bench_engines, python_worker, request_grid
from engines.results import Results, json_from_results, refuse_incomplete, results_from_json
from engines.worker import Close, Closed, Run, Sample, peak_memory_bytes, serve, timed_request, token_ids
from exporter.errors import CheckpointError, EngineError, FuselageError, IncompleteError
from exporter.structure import MAX_TEXT
from tests.processes import assert_ends

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 50
STRUCTURE = {
    "hidden_size": 32,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "num_parameters": 5000,
    "weight_bytes": 20000,
    "kv_bytes_per_token": 128,
    "sequential_sublayers": 0,
    "blocks": [{"source_layers": [0], "attention": None, "ffn": None}],
}


def manifest_of(label: str = "baseline", **fields: object) -> EngineManifest:
    values: dict = {
        "backend": "fake",
        "runtime": {"numpy": "0.0", "libfast": "7"},
        "machine": {},
        "label": label,
        "network_file": "network.onnx",
        "network_sha256": "00" * 32,
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "max_positions": 64,
        "capacity": None,
        "cache": (),
        "kv_bytes_per_token": 128,
        "weight_bytes": 20000,
        "structure": STRUCTURE,
        "options": {},
    }
    return EngineManifest(**{**values, **fields})


def engine_folder(parent: Path, label: str, **fields: object) -> Path:
    folder = parent / label.replace("/", "-")
    folder.mkdir()
    (folder / "engine.json").write_text(manifest_of(label, **fields).model_dump_json())
    (folder / "weights.bin").write_bytes(bytes(1000))
    return folder


class FakeRunner(Runner):
    """Says token (last token + 1) mod V and remembers what it was asked."""

    def __init__(self) -> None:
        self.manifest = manifest_of()
        self.calls: list[tuple] = []

    def start(self, batch: int, capacity: int) -> None:
        self.calls.append(("start", batch, capacity))

    def prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.calls.append(("prefill", input_ids.tolist(), lengths.tolist()))
        return self._logits_after(input_ids[:, -1])

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        assert tokens.dtype == np.int64
        self.calls.append(("decode", tokens.tolist()))
        return self._logits_after(tokens)

    def _logits_after(self, tokens: np.ndarray) -> np.ndarray:
        return np.eye(VOCAB_SIZE, dtype=np.float32)[(tokens + 1) % VOCAB_SIZE]

    def close(self) -> None:
        self.calls.append(("close",))


def test_a_request_is_prefill_and_greedy_decode_with_every_step_timed():
    runner = FakeRunner()
    stamps = iter([1_000_000, 4_500_000, 5_000_000, 7_000_000])
    sample = timed_request(runner, np.array([[3, 5], [9, 49]]), 3, clock_ns=lambda: next(stamps))
    assert sample == Sample(ttft_ms=3.5, step_ms=(0.5, 2.0), request_ms=6.0)
    assert runner.calls == [
        ("start", 2, 5),
        ("prefill", [[3, 5], [9, 49]], [2, 2]),
        ("decode", [6, 0]),
        ("decode", [7, 1]),
    ]


def test_token_ids_are_splitmix64():
    # The published outputs for seed 1234567 (Vigna's reference implementation).
    outputs = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    ids = token_ids(1, 5, vocab_size=2**31 - 1, seed=1234567)
    assert ids.tolist() == [[output % (2**31 - 1) for output in outputs]]
    batch = token_ids(2, 3, vocab_size=VOCAB_SIZE, seed=2**64 - 1)
    assert (batch.shape, batch.dtype) == ((2, 3), np.int64)
    assert 0 <= batch.min() <= batch.max() < VOCAB_SIZE


def test_serve_answers_until_close():
    sent: list = []
    run = Run(batch=1, input_len=4, output_len=1, seed=3)
    serve(FakeRunner(), [run.model_dump_json(), Close().model_dump_json(), "never read"], sent.append)
    assert [type(message) for message in sent] == [Sample, Closed]
    assert sent[0].step_ms == ()
    assert sent[1].peak_memory_gib * 2**30 <= peak_memory_bytes()


def test_peak_memory_remembers_what_was_freed():
    block = np.ones(40 * 2**20, dtype=np.uint8)
    high = psutil.Process().memory_info().rss
    del block
    assert peak_memory_bytes() >= high * 0.99


# The real worker program around a backend that exists only in the test; it prints where it must not.
WORKER = """
import os, sys, types
sys.path.insert(0, {root!r})
sys.path.insert(0, {here!r})
from test_bench import FakeRunner
from exporter.errors import EngineError

class Noisy(FakeRunner):
    def prefill(self, input_ids, lengths):
        print("python noise")
        os.write(1, b"C noise\\n")
        {prefill}
        return super().prefill(input_ids, lengths)

class Backend:
    def open(self, engine, *, threads):
        assert threads == {threads!r}, threads
        {opening}
        return Noisy()

backends = types.ModuleType("engines.backends")
backends.backend_named = lambda name: Backend()
sys.modules["engines.backends"] = backends
from engines.worker import main
sys.exit(main())
"""


def scripted(tmp_path: Path, *, prefill: str = "pass", opening: str = "pass", only: str = "", text: str | None = None):
    """A worker command that runs WORKER with the given lines in it; those lines only for the engine labelled `only`."""

    def command(engine, manifest, threads, cpus):
        mine = not only or manifest.label == only
        source = WORKER.format(
            root=str(ROOT),
            here=str(Path(__file__).parent),
            prefill=prefill if mine else "pass",
            opening=opening if mine else "pass",
            threads=threads,
        )
        script = tmp_path / f"worker-{manifest.label}.py"
        script.write_text(text if mine and text is not None else source)
        return [sys.executable, str(script), *python_worker(engine, manifest, threads, cpus)[3:]]

    return command


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = children()  # multiprocessing's resource tracker, once anything has started it, stays
    yield
    assert [child for child in children() if child not in before] == []


def test_engines_are_timed_in_turns_and_samples_kept(tmp_path):
    emulated = {"options": {"emulated": True}, "number_format": "fp8 (W8A8 static), emulated"}
    engines = [engine_folder(tmp_path, "baseline"), engine_folder(tmp_path, "fused", **emulated)]
    grid = request_grid([1, 2], [4], [3, 1])
    cpu = min(os.sched_getaffinity(0))
    seen: list[tuple[int, int, str]] = []
    results = bench_engines(
        engines,
        grid,
        rounds=2,
        warmup=1,
        threads=1,
        cpus=[cpu],
        seed=2**64 - 1,
        progress=lambda *step: seen.append(step),
        worker=scripted(tmp_path),
    )
    assert results_from_json(json_from_results(results)) == results
    assert [(cell.engine, cell.shape) for cell in results.cells] == [
        (label, shape) for shape in grid for label in ("baseline", "fused")
    ]
    assert {(len(cell.ttft_ms), len(cell.step_ms[0])) for cell in results.cells} == {(2, 2), (2, 0)}
    baseline, fused = results.engines
    assert (baseline.kind, fused.kind) == ("measured", "emulated")
    assert (baseline.number_format, fused.number_format) == (None, "fp8 (W8A8 static), emulated")
    assert baseline.engine_bytes == 1000 + (engines[0] / "engine.json").stat().st_size
    assert baseline.runtime == {"numpy": np.__version__, "libfast": "7 (at build)"}
    assert baseline.peak_memory_gib is not None
    assert 0.01 < baseline.peak_memory_gib < 2
    assert (results.environment.threads, results.environment.pinned_cpus) == (1, (cpu,))
    assert results.environment.command == tuple(sys.orig_argv)
    # One warm-up and two kept rounds of each shape, in an order that changes from round to round.
    first_shape = [text.partition(",")[0] for _, _, text in seen[2:8]]
    assert first_shape == ["baseline", "fused", "fused", "baseline", "baseline", "fused"]
    assert [done for done, _, _ in seen] == [*range(2 + 4 * 3 * 2), 26]
    assert {total for _, total, _ in seen} == {26}


@pytest.mark.parametrize("count", range(1, 13))
def test_every_engine_runs_equally_often_in_every_place_and_after_every_other(count: int) -> None:
    cycle = count * (1 + count % 2)
    orders = list(itertools.islice(balanced_orders(count), 4 * cycle))
    for place in range(count):
        assert Counter(order[place] for order in orders) == dict.fromkeys(range(count), len(orders) // count)
    others = list(itertools.permutations(range(count), 2))
    for start in range(0, len(orders), cycle):
        within = Counter(pair for order in orders[start : start + cycle] for pair in itertools.pairwise(order))
        assert within == dict.fromkeys(others, cycle // count)
    # As the machine sees them: round after round, the last engine of one before the first of the next.
    all_turns = Counter(itertools.pairwise(itertools.chain(*orders)))
    often = [all_turns[pair] for pair in others] or [0]
    assert max(often) - min(often) <= 2


def test_orders_of_few_engines() -> None:
    assert list(itertools.islice(balanced_orders(2), 4)) == [(0, 1), (1, 0), (0, 1), (1, 0)]
    assert list(itertools.islice(balanced_orders(3), 6)) == [
        (0, 1, 2),
        (1, 2, 0),
        (2, 0, 1),
        (0, 2, 1),
        (1, 0, 2),
        (2, 1, 0),
    ]


def test_engines_are_loaded_one_at_a_time_where_asked(tmp_path):
    engines = [engine_folder(tmp_path, label) for label in ("baseline", "fused")]
    commands = scripted(tmp_path)
    alive: list[int] = []

    def counting(engine, manifest, threads, cpus):
        alive.append(len(children()))
        return commands(engine, manifest, threads, cpus)

    seen: list[str] = []
    before = len(children())
    results = bench_engines(
        engines,
        request_grid([1, 2], [4], [3]),
        rounds=2,
        warmup=1,
        one_at_a_time=True,
        progress=lambda done, total, text: seen.append(text),
        worker=counting,
    )
    assert alive == [before, before], "the first engine is closed before the second is loaded"
    turns = [text.partition(",")[0] for text in seen]
    assert turns == ["loading baseline", *["baseline"] * 6, "loading fused", *["fused"] * 6, "done"]
    assert [(cell.engine, cell.batch) for cell in results.cells] == [
        ("baseline", 1),
        ("fused", 1),
        ("baseline", 2),
        ("fused", 2),
    ]
    assert {len(cell.ttft_ms) for cell in results.cells} == {2}
    assert not results.environment.interleaved
    assert results_from_json(json_from_results(results)) == results


@pytest.mark.parametrize(("threads", "in_the_machine", "expected"), [(None, 64, 1), (None, 1, None), (3, 64, 3)])
def test_engines_on_some_of_the_cpus_have_a_thread_for_each(tmp_path, monkeypatch, threads, in_the_machine, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: in_the_machine)
    cpu = min(os.sched_getaffinity(0))
    asked: list[int | None] = []
    worker = scripted(tmp_path)

    def remembering(engine, manifest, threads, cpus):
        asked.append(threads)
        return worker(engine, manifest, threads, cpus)

    engines = [engine_folder(tmp_path, "baseline")]
    results = bench_engines(engines, GRID, rounds=1, threads=threads, cpus=[cpu], worker=remembering)
    assert asked == [expected]
    assert results.environment.threads == expected


def test_an_argument_that_is_not_utf8_does_not_cost_the_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["bench", os.fsdecode(b"engines/\xe9")])
    results = bench_engines([engine_folder(tmp_path, "baseline")], GRID, rounds=1, worker=scripted(tmp_path))
    assert results.environment.command == ("bench", "engines/\ufffd")
    assert results_from_json(json_from_results(results)) == results


SMI = """#!/bin/sh
echo "$@" >> {log}
echo 'NVIDIA H200, 580.95.05, 1965, 1980, 3201, 700.00'
echo 'a GPU, without quotes, 580.95.05, [N/A], [N/A], [Unknown Error], nan'
echo '"NVIDIA, made up", 580.95.05, [N/A], [N/A], [Unknown Error], nan'
exit {status}
"""


@pytest.mark.parametrize(
    ("device", "status", "names"),
    [
        ("H200", 0, ["NVIDIA H200", "NVIDIA, made up"]),
        ("H200", 9, []),  # "couldn't communicate with the NVIDIA driver"
        ("H200", None, []),  # no such program
        ("cpu", 0, []),  # nobody asks
    ],
)
def test_the_state_of_gpus_is_kept(tmp_path, monkeypatch, device, status, names):
    log = tmp_path / "log"
    if status is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(SMI.format(log=log, status=status))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")

    def worker(*arguments):
        return [part.replace('"device": "x"', f'"device": "{device}"') for part in speaking()(*arguments)]

    engine = engine_folder(tmp_path, "baseline")
    results = bench_engines([engine], TWO_SHAPES, rounds=2, worker=worker)
    assert [gpu.name for gpu in results.environment.gpus] == names
    if names:
        first, second = results.environment.gpus
        assert (first.driver, first.sm_clock_mhz, first.max_sm_clock_mhz) == ("580.95.05", 1965, 1980)
        assert (first.memory_clock_mhz, first.power_limit_w) == (3201, 700)
        assert set(second.model_dump(exclude={"name", "driver"}).values()) == {None}
    assert log.exists() == (device != "cpu" and status is not None)
    written = json_from_results(results)
    assert (b'"gpus": ' in written) == bool(names)
    assert results_from_json(written) == results


def answering(sample: str) -> dict[str, str]:
    """A worker that answers its first order with this line."""
    ready = '{"event":"ready","protocol":1,"load_time_s":1,"runtime":{},"device":"x","clock":"y"}'
    return {"text": f"print({ready!r}, flush=True)\ninput()\nprint({sample!r}, flush=True)\n"}


WORKER_FAILURES = {
    "refuses to open": ({"opening": "raise EngineError('no such file')"}, "'fused' failed: no such file$"),
    "bug when opening": ({"opening": "1 / 0"}, "'fused' failed: ZeroDivisionError: division by zero"),
    "bug in a step": ({"prefill": "raise KeyError('k')"}, "'fused' failed: KeyError: 'k'"),
    "exits": (
        {"prefill": "print('last words', file=sys.stderr, flush=True); os._exit(3)"},
        "ended early with status 3; the end of what it printed:\n(.*\n)*last words",
    ),
    "killed": ({"prefill": "os.kill(os.getpid(), 9)"}, r"ended by signal 9 \(Killed, out of memory\?\)"),
    "dies at once": ({"text": "import sys; sys.exit(7)"}, "ended early with status 7; it printed nothing"),
    "does not speak JSON": ({"text": "print('hello')"}, "does not speak the protocol.*hello"),
    "another protocol": (
        {"text": 'print(\'{"event":"ready","protocol":2,"load_time_s":1,"runtime":{},"device":"x","clock":"y"}\')'},
        "does not speak the protocol.*protocol",
    ),
    "answers out of turn": (
        {"text": 'print(\'{"event":"closed","peak_memory_gib":1}\')'},
        "answered out of turn: expected ready, found closed",
    ),
    "times another request": (
        answering('{"event":"sample","ttft_ms":1,"step_ms":[],"request_ms":1}'),
        "than asked: expected batch 1, input 4, output 3, found .* 0 steps instead of output_len - 1",
    ),
    "knows other calls than asked": (
        answering('{"event":"sample","ttft_ms":1,"step_ms":[1,1],"request_ms":3,"run_ms":[1,1]}'),
        "timed another request than asked: .* run_ms is not 1 rounds of output_len calls",
    ),
    "a request shorter than its first token": (
        answering('{"event":"sample","ttft_ms":2,"step_ms":[1,1],"request_ms":1}'),
        "timed another request than asked: .* a request shorter than its time to first token",
    ),
    "NaN sample": (
        answering('{"event":"sample","ttft_ms":NaN,"step_ms":[1,1],"request_ms":1}'),
        "does not speak the protocol",
    ),
}


@pytest.mark.parametrize(
    ("labels", "fault", "problem"),
    [(("fused",), *case) for case in WORKER_FAILURES.values()]
    + [(("baseline", "fused", "last"), *WORKER_FAILURES["killed"])],
    ids=[*WORKER_FAILURES, "killed between others"],
)
def test_a_worker_that_fails_before_anything_is_kept_is_one_error_and_leaves_no_process(
    tmp_path, labels, fault, problem
):
    engines = [engine_folder(tmp_path, label) for label in labels]
    with pytest.raises(EngineError, match=problem):
        bench_engines(engines, request_grid([1], [4], [3]), worker=scripted(tmp_path, only="fused", **fault))


ROUNDS, WARMUP = 4, 1
TWO_SHAPES = request_grid([1, 2], [4], [3])


def rounds_of(results: Results, label: str) -> list[int]:
    """How many rounds each request shape has."""
    found = {cell.shape: len(cell.ttft_ms) for cell in results.cells if cell.engine == label}
    return [found.get(shape, 0) for shape in TWO_SHAPES]


# A worker that imports nothing and takes no time; `fault` is what it does before it answers.
SPEAKER = """
import json, os, sys, time
ready = {{"event": "ready", "protocol": 1, "load_time_s": 1, "runtime": {{}}, "device": "x", "clock": "y"}}
print(json.dumps(ready), flush=True)
for count, line in enumerate(sys.stdin):
    order = json.loads(line)
    {fault}
    if order["op"] == "close":
        sys.exit(print('{{"event": "closed", "peak_memory_gib": 1}}', flush=True))
    print('{{"event": "sample", "ttft_ms": 1, "step_ms": [1, 1], "request_ms": 3}}', flush=True)
"""
KILLED = "count == {} and os.kill(os.getpid(), 9)"


def speaking(**faults: str):
    """A worker command that runs SPEAKER, with the faults of engines by their labels."""

    def command(engine, manifest, threads, cpus):
        return [sys.executable, "-IS", "-c", SPEAKER.format(fault=faults.get(manifest.label, "pass"))]

    return command


ENDS = {
    "killed": ("os.kill(os.getpid(), 9)", r"was ended by signal 9 \(Killed, out of memory\?\); it printed nothing"),
    "segmentation fault": (
        "os.kill(os.getpid(), 11)",
        r"was ended by signal 11 \(Segmentation fault\); it printed nothing",
    ),
    "exits": (
        "print('last words', file=sys.stderr, flush=True), os._exit(3)",
        "ended early with status 3; the end of what it printed:\nlast words",
    ),
    "fails": ("print(json.dumps({'event': 'error', 'problem': 'no memory'}), flush=True)", "failed: no memory"),
    "talks of something else, and on": (
        "print('hello', flush=True), time.sleep(600)",
        "does not speak the protocol: .*hello.*",
    ),
}


@pytest.mark.parametrize(("fault", "problem"), ENDS.values(), ids=ENDS.keys())
def test_what_was_measured_before_a_worker_ended_is_kept(tmp_path, fault, problem):
    engines = [engine_folder(tmp_path, label) for label in ("baseline", "fused", "last")]
    worker = speaking(fused=f"count == 3 and ({fault})")
    turns: list[str] = []
    results = bench_engines(
        engines,
        TWO_SHAPES,
        rounds=ROUNDS,
        warmup=WARMUP,
        progress=lambda done, total, text: turns.append(text.partition(",")[0]),
        worker=worker,
    )
    assert [rounds_of(results, label) for label in ("baseline", "fused", "last")] == [[4, 4], [2, 0], [4, 4]]
    baseline, fused, last = results.engines
    assert (baseline.stopped, last.stopped) == (None, None)
    assert fused.stopped is not None
    assert fused.stopped.where == "after 2 of 4 rounds at batch 1, input 4, output 3"
    assert re.fullmatch(f"(?s)the worker of 'fused' {problem}", fused.stopped.problem)
    assert (fused.load_time_s, fused.device, fused.program, fused.peak_memory_gib) == (1, "x", "python", None)
    assert (baseline.peak_memory_gib, last.peak_memory_gib) == (1, 1)
    # It ended in round 3; the others go on to take turns.
    turns = turns[3 + 3 * 3 :]
    assert turns[:3] == ["baseline", "last", "fused"]
    assert turns[3:] == ["baseline", "last", *["baseline", "last", "last", "baseline"] * 2, "baseline", "last", "done"]
    assert results_from_json(json_from_results(results)) == results
    with pytest.raises(IncompleteError, match=r"out.json: .*incomplete.*\n  fused stopped after 2 of 4 rounds at "):
        refuse_incomplete(results, Path("out.json"))


# Of two engines, the second fails at one of its requests: the rounds it then has, None where nothing was kept. The
# order of turns in the rounds is AB, BA, AB, BA, AB for each shape, of which the first is thrown away.
PLACES = {
    "warming up": (0, None),
    "first of all to be kept": (1, None),
    "second round": (2, [1, 0]),
    "last of a shape": (4, [3, 0]),
    "warming up for the next shape": (5, [4, 0]),
    "last of all": (9, [4, 3]),
}


@pytest.mark.parametrize(("place", "kept"), PLACES.values(), ids=PLACES.keys())
def test_where_an_engine_ended(tmp_path, place, kept):
    engines = [engine_folder(tmp_path, label) for label in ("baseline", "fused")]
    worker = speaking(fused=KILLED.format(place))
    if kept is None:
        with pytest.raises(EngineError, match="'fused' was ended by signal 9"):
            bench_engines(engines, TWO_SHAPES, rounds=ROUNDS, warmup=WARMUP, worker=worker)
        return
    results = bench_engines(engines, TWO_SHAPES, rounds=ROUNDS, warmup=WARMUP, worker=worker)
    assert (rounds_of(results, "baseline"), rounds_of(results, "fused")) == ([4, 4], kept)
    stopped = results.engines[1].stopped
    assert stopped is not None
    at = 0 if kept[0] < ROUNDS else 1
    assert (stopped.batch, stopped.rounds, stopped.rounds_asked) == (TWO_SHAPES[at].batch, kept[at], ROUNDS)


def test_the_only_engine_keeps_its_rounds(tmp_path):
    engine = engine_folder(tmp_path, "baseline")
    worker = speaking(baseline=KILLED.format(3))
    results = bench_engines([engine], TWO_SHAPES, rounds=ROUNDS, warmup=WARMUP, worker=worker)
    assert rounds_of(results, "baseline") == [2, 0]
    assert not results.is_complete


def test_an_engine_that_ends_after_its_last_round_has_all_of_them(tmp_path):
    worker = speaking(baseline="order['op'] == 'close' and os.kill(os.getpid(), 11)")
    engines = [engine_folder(tmp_path, label) for label in ("baseline", "fused")]
    results = bench_engines(engines, TWO_SHAPES, rounds=2, worker=worker)
    baseline, fused = results.engines
    assert rounds_of(results, "baseline") == rounds_of(results, "fused") == [2, 2]
    assert baseline.stopped is not None
    assert baseline.stopped.where == "after 2 of 2 rounds at batch 2, input 4, output 3"
    assert (baseline.peak_memory_gib, fused.stopped) == (None, None)


@pytest.mark.parametrize("is_altered", [False, True], ids=["does not open", "altered folder"])
def test_one_at_a_time_an_engine_that_is_never_opened_costs_the_others_nothing(tmp_path, is_altered):
    engines = [engine_folder(tmp_path, label, options={"device": "H200"}) for label in ("baseline", "fused", "last")]
    speaker = speaking()

    def worker(engine, manifest, threads, cpus):
        if manifest.label != "fused":
            return speaker(engine, manifest, threads, cpus)
        if is_altered:
            raise CheckpointError("file was altered", file="weights.bin")
        return [sys.executable, "-c", 'print(\'{"event": "error", "problem": "no such file"}\')']

    results = bench_engines(engines, TWO_SHAPES, rounds=2, one_at_a_time=True, worker=worker)
    assert [rounds_of(results, label) for label in ("baseline", "fused", "last")] == [[2, 2], [0, 0], [2, 2]]
    fused = results.engines[1]
    assert fused.stopped is not None
    assert fused.stopped.where == "after 0 of 2 rounds at batch 1, input 4, output 3"
    assert fused.stopped.problem.endswith("file was altered" if is_altered else "failed: no such file")
    assert (fused.device, fused.runtime, fused.load_time_s) == ("H200", {"numpy": "0.0", "libfast": "7"}, None)
    with pytest.raises(FuselageError, match=r"altered|no such file"):  # before anything was measured
        bench_engines(engines[1:], TWO_SHAPES, rounds=2, one_at_a_time=True, worker=worker)


def test_a_failure_that_does_not_end_is_cut(tmp_path):
    endless = f"count == 3 and print(json.dumps({{'event': 'error', 'problem': 'no' * {MAX_TEXT}}}), flush=True)"
    engine = engine_folder(tmp_path, "baseline")
    results = bench_engines([engine], TWO_SHAPES, rounds=ROUNDS, warmup=WARMUP, worker=speaking(baseline=endless))
    assert results.engines[0].stopped is not None
    assert len(results.engines[0].stopped.problem) == MAX_TEXT


def test_what_the_python_worker_measured_before_it_failed_is_kept(tmp_path):
    def worker(engine, manifest, threads, cpus):
        command = scripts if manifest.label == "fused" else speaking()
        return command(engine, manifest, threads, cpus)

    scripts = scripted(
        tmp_path, prefill="if sum(call[0] == 'prefill' for call in self.calls) == 3: raise KeyError('k')"
    )
    engines = [engine_folder(tmp_path, label) for label in ("baseline", "fused")]
    results = bench_engines(engines, TWO_SHAPES, rounds=ROUNDS, warmup=WARMUP, worker=worker)
    assert rounds_of(results, "fused") == [2, 0]
    assert results.engines[1].stopped is not None
    assert results.engines[1].stopped.problem == "the worker of 'fused' failed: KeyError: 'k'"


def test_what_a_worker_started_ends_with_it(tmp_path):
    opening = "import subprocess; raise EngineError(str(subprocess.Popen(['sleep', '600']).pid))"
    with pytest.raises(EngineError, match=r"failed: \d+$") as caught:
        bench_engines([engine_folder(tmp_path, "fused")], GRID, worker=scripted(tmp_path, opening=opening))
    assert_ends(int(str(caught.value).split()[-1]))


# Steps are two loads, then AB, BA, AB, BA, AB for each shape; one at a time, a load and ten requests of each engine.
INTERRUPTS = {
    "nothing is kept yet": (False, 4, None),
    "in a round": (False, 9, [[2, 0], [3, 0]]),
    "warming up": (False, 13, [[4, 0], [4, 0]]),
    "one at a time": (True, 9, [[4, 2], [0, 0]]),
    "one at a time, loading": (True, 11, [[4, 4], [0, 0]]),
}


@pytest.mark.parametrize(("one_at_a_time", "step", "kept"), INTERRUPTS.values(), ids=INTERRUPTS.keys())
def test_an_interrupt_ends_the_workers_and_keeps_what_was_measured(tmp_path, one_at_a_time, step, kept):
    def interrupt(done: int, total: int, text: str) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    engines = [engine_folder(tmp_path, "baseline"), engine_folder(tmp_path, "fused")]

    def bench() -> Results:
        return bench_engines(
            engines,
            TWO_SHAPES,
            rounds=ROUNDS,
            warmup=WARMUP,
            one_at_a_time=one_at_a_time,
            progress=interrupt,
            worker=speaking(),
        )

    if kept is None:
        with pytest.raises(KeyboardInterrupt):
            bench()
        return
    results = bench()
    assert [rounds_of(results, label) for label in ("baseline", "fused")] == kept
    for engine, rounds in zip(results.engines, kept, strict=True):
        problem = None if rounds == [ROUNDS, ROUNDS] else "interrupted"
        assert (engine.stopped and engine.stopped.problem) == problem


def test_an_interrupt_ends_a_worker_that_said_goodbye_and_stays(tmp_path):
    closed = json.dumps({"event": "closed", "peak_memory_gib": 1})
    stays = f"(print({closed!r}, flush=True), time.sleep(0.5), os.kill(os.getppid(), 2), time.sleep(600))"
    results = bench_engines(
        [engine_folder(tmp_path, "fused")], GRID, rounds=1, worker=speaking(fused=f"order['op'] == 'close' and {stays}")
    )
    assert results.is_complete


def test_a_worker_ends_when_its_parent_does(tmp_path):
    engine = engine_folder(tmp_path, "baseline")
    command = scripted(tmp_path)(engine, manifest_of(), None, None)
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert json.loads(worker.stdout.readline())["event"] == "ready"
    worker.stdin.close()
    assert worker.wait(timeout=30) == 0
    worker.stdout.close()


def test_a_missing_worker_program(tmp_path):
    engine = engine_folder(tmp_path, "baseline")
    with pytest.raises(EngineError, match="does not start: No such file"):
        bench_engines([engine], request_grid([1], [4], [3]), worker=lambda *_: ["/nonexistent/worker"])


GRID = request_grid([1], [4], [3])
REFUSED = {
    "no engine": ([], GRID, {}, "no engine to time"),
    "empty grid": (["a"], (), {}, "the grid is empty"),
    "zero batch": (["a"], request_grid([0], [4], [3]), {}, "positive: found batch 0"),
    "negative output": (["a"], request_grid([1], [4], [-3]), {}, "positive: found batch 1, input 4, output -3"),
    "shape twice": (["a"], GRID * 2, {}, "twice"),
    "too long": (["a"], request_grid([1], [62], [3]), {}, "model knows: expected 64, found 65"),
    "cache too small": (["small"], request_grid([1], [8], [9]), {}, "KV cache holds: expected 16, found 17"),
    "fixed batch": (["pair"], request_grid([2, 3], [8], [9]), {}, "fixed batch: expected 2, found 3"),
    "more than a file holds": (
        ["a", "b"],
        request_grid([1, 2], [4], [50]),
        {"rounds": 5001},
        "timed tokens: expected at most 1,000,000, found 1,000,200",
    ),
    "no rounds": (["a"], GRID, {"rounds": 0}, "rounds is a whole number of at least 1"),
    "negative warm-up": (["a"], GRID, {"warmup": -1}, "warm-up rounds"),
    "zero threads": (["a"], GRID, {"threads": 0}, "threads"),
    "unknown CPU": (["a"], GRID, {"cpus": [10_000]}, "not all CPUs"),
    "no CPU": (["a"], GRID, {"cpus": []}, "not all CPUs"),
    "seed too large": (["a"], GRID, {"seed": 2**64}, "64 bits"),
    "not an engine": (["nothing"], GRID, {}, "not an engine: no engine.json. Build one"),
    "manifest is no JSON": (["broken"], GRID, {}, "engine.json: "),
    "manifest of later days": (["later"], GRID, {}, "expected engine_schema 1, found 99"),
    "malformed structure": (["flat"], GRID, {}, r"engine.json: malformed .*structure.*hidden_size"),
    "unusable label": (["two\nlines"], GRID, {}, "malformed: label"),
    "same label": (["a", "a"], GRID, {}, "same label"),
    "another model": (["a", "other"], GRID, {}, "different models"),
    "several": (["a"], request_grid([0], [4], [0]), {"rounds": 0}, "2 problems:"),
}


@pytest.mark.parametrize(("labels", "grid", "settings", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_nothing_starts_before_everything_cheap_is_checked(tmp_path, labels, grid, settings, problem):
    special = {
        "small": {"capacity": 16},
        "pair": {"batch": 2},
        "later": {"engine_schema": 99},
        "other": {"structure": {**STRUCTURE, "hidden_size": 33}},
    }
    engines = []
    for index, label in enumerate(labels):
        parent = tmp_path / str(index)
        parent.mkdir()
        if label == "nothing":
            engines.append(parent)
        else:
            engines.append(engine_folder(parent, label, **special.get(label, {})))
        if label == "broken":
            (engines[-1] / "engine.json").write_text("{")
        if label == "flat":
            manifest = json.loads((engines[-1] / "engine.json").read_text())
            manifest["structure"]["hidden_size"] = 0
            (engines[-1] / "engine.json").write_text(json.dumps(manifest))

    def never(*_: object) -> list[str]:
        raise AssertionError("a worker was started")

    with pytest.raises(FuselageError, match=problem):
        bench_engines(engines, grid, worker=never, **settings)


def test_the_python_worker_reports_an_unknown_backend(tmp_path):
    with pytest.raises(EngineError, match=r"'baseline' failed: \S+"):
        bench_engines([engine_folder(tmp_path, "baseline", backend="abacus")], GRID)
