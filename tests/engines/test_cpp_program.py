"""The C++ benchmark program, compiled with AddressSanitizer and UBSan, against the Python one and against bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import base, cpp_program, onnxruntime, results, worker
from engines.base import EngineManifest, read_engine_manifest
from engines.bench import bench_engines, python_worker, request_grid
from engines.cpp_program import built_program, library_options, missing, worker_for
from engines.onnxruntime import OnnxRuntime
from engines.results import results_from_json
from engines.worker import Run, timed_request, token_ids
from exporter import network, safetensors_io
from exporter.dtypes import FLOAT16, FLOAT32
from exporter.errors import EngineError, FuselageError
from exporter.graph import ModelGraph
from exporter.lazy import array
from exporter.writers import files, onnx
from exporter.writers.files import save_folder
from exporter.writers.onnx import Network, Options
from tests.tiny import quantized_graph, tiny_graph

lacking = [*OnnxRuntime().missing(), *missing("onnxruntime")]
pytestmark = pytest.mark.skipif(bool(lacking), reason="; ".join(lacking))

CHECKED = {"CMAKE_BUILD_TYPE": "Debug", "FUSELAGE_SANITIZE": "ON", "CMAKE_COMPILE_WARNING_AS_ERROR": "ON"}


def quiet(text: str) -> None:
    """Nobody listens."""


def engine_of(graph: ModelGraph, folder: Path, options: Options = onnx.PRESETS["onnxruntime"]) -> Path:
    save_folder(folder / "network", onnx.emit(graph, options), kind="network", details={})
    return OnnxRuntime().build(folder / "network", folder / "engine", label="tiny", force=False)


@pytest.fixture(scope="session")
def program(own_cache: None) -> Path:
    """The program with every check that the compiler offers, warnings being errors."""
    return built_program(quiet, options={**CHECKED, "TENSORRT_INCLUDE_DIR": ""})


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_of(tiny_graph("AF F AF"), tmp_path_factory.mktemp("engine"))


def run(program: Path, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [program, *map(str, arguments)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, errors="replace", timeout=120, check=False
    )
    assert "Sanitizer" not in done.stderr, done.stderr
    assert "runtime error" not in done.stderr, done.stderr
    return done


def served(program: Path, engine: Path, orders: Sequence[Any]) -> list[dict[str, Any]]:
    """Answers to the orders, the first line (ready) left out."""
    lines = "".join(order if isinstance(order, str) else order.model_dump_json() + "\n" for order in orders)
    library = library_options(read_engine_manifest(engine))
    done = run(program, "serve", engine, *library, "--threads", 1, stdin=lines + worker.Close().model_dump_json())
    assert done.returncode == 0, done.stderr
    ready, *answers, closed = [worker.Reply.validate_json(line) for line in done.stdout.splitlines()]
    assert isinstance(ready, worker.Ready)
    assert isinstance(closed, worker.Closed)
    assert (ready.program, ready.clock, ready.device) == ("cpp", "std::chrono::steady_clock", "cpu")
    return [answer.model_dump() for answer in answers]


def test_both_sides_have_the_same_constants():
    header = (cpp_program.SOURCES / "src" / "contract.h").read_text()
    found = {
        name: eval(value) if value.startswith('"') else eval(value, {})
        for name, value in re.findall(r"inline constexpr [\w: ]+? (k\w+)(?:\[\])? = ([^;]+);", header)
    }
    assert found == {
        "kProtocol": worker.PROTOCOL,
        "kResultsSchema": results.RESULTS_SCHEMA,
        "kEngineFile": base.ENGINE_FILE,
        "kEngineKind": base.ENGINE_KIND,
        "kEngineSchema": base.ENGINE_SCHEMA,
        "kManifestFile": files.MANIFEST,
        "kMarkerFile": files.MARKER,
        "kManifestSchema": files.MANIFEST_SCHEMA,
        "kMaxJsonBytes": safetensors_io.MAX_JSON_BYTES,
        "kInputIds": network.INPUT_IDS,
        "kPositionIds": network.POSITION_IDS,
        "kCacheWrite": network.CACHE_WRITE,
        "kLogitsIndex": network.LOGITS_INDEX,
        "kLogits": network.LOGITS,
        "kNextTokens": network.NEXT_TOKENS,
        "kMinOnnxRuntime": ".".join(map(str, onnxruntime.MIN_VERSION)),
        "kCacheStep": onnxruntime.CACHE_STEP,
        "kBufferAlignment": onnxruntime.BUFFER_ALIGNMENT,
    }


def loud(graph: ModelGraph, first: int) -> ModelGraph:
    """The graph that chooses one of six tokens from `first` on: their logits are large, and some of them positive."""
    assert graph.lm_head is not None
    weight = np.array(graph.lm_head.weight.rows(0, graph.vocab_size))
    weight[first : first + 6] *= 100
    return replace(graph, lm_head=replace(graph.lm_head, weight=array(weight)))


def one_sided(graph: ModelGraph) -> ModelGraph:
    """The graph whose logits all lie on one side of zero, now above and now below, each of them several times."""
    assert graph.lm_head is not None
    weight = np.array(graph.lm_head.weight.rows(0, graph.vocab_size))
    size = 1 + np.random.default_rng(0).random(1500, np.float32)
    weight = np.resize(size, graph.vocab_size)[:, None] * weight[:1]
    return replace(graph, lm_head=replace(graph.lm_head, weight=array(weight)))


FIXED = Options(
    networks=(Network(target="tensorrt", dtype=FLOAT32, batch=2, capacity="max_positions"),),
    max_positions=140,  # the longest of RUNS
)
HALF = Options(networks=(Network(target="onnxruntime", dtype=FLOAT16),))
ENGINES: dict[str, tuple[Callable[[], ModelGraph], Options]] = {
    "variable heads": (lambda: tiny_graph("AF F AF A", num_key_value_heads=(1, 4, 2)), onnx.PRESETS["onnxruntime"]),
    "choice in the last of a block": (
        lambda: loud(tiny_graph("AF", vocab_size=2061), 2054),
        onnx.PRESETS["onnxruntime"],
    ),
    "choice inside a block": (lambda: loud(tiny_graph("AF", vocab_size=5003), 3500), onnx.PRESETS["onnxruntime"]),
    "ties, and no logit above zero": (
        lambda: one_sided(tiny_graph("AF", vocab_size=5003)),
        onnx.PRESETS["onnxruntime"],
    ),
    "no attention": (lambda: tiny_graph("F F"), onnx.PRESETS["onnxruntime"]),
    "fixed": (lambda: tiny_graph("AF AF"), FIXED),
    "float16": (lambda: tiny_graph("AF AF"), HALF),
    "int8": (lambda: quantized_graph(tiny_graph("AF AF"), "int8-smoothquant"), onnx.PRESETS["onnxruntime"]),
}
# The cache grows in the second, and the third begins anew with what the first two left behind.
RUNS = (
    Run(batch=2, input_len=3, output_len=2, seed=2**64 - 1, with_tokens=True),
    Run(batch=2, input_len=120, output_len=20, seed=7, with_tokens=True),
    Run(batch=2, input_len=1, output_len=1, seed=0, with_tokens=True),
)


@pytest.mark.parametrize(("make", "options"), ENGINES.values(), ids=ENGINES.keys())
def test_generates_the_tokens_that_python_generates(make, options, program, tmp_path):
    folder = engine_of(make(), tmp_path, options)
    runs = [*RUNS, *([] if options is FIXED else [RUNS[1].model_copy(update={"batch": 3})])]
    answers = served(program, folder, runs)
    runner = OnnxRuntime().open(folder, threads=1)
    for order, answer in zip(runs, answers, strict=True):
        ids = token_ids(order.batch, order.input_len, vocab_size=runner.manifest.vocab_size, seed=order.seed)
        assert answer["tokens"] == timed_request(runner, ids, order.output_len, with_tokens=True).tokens
    runner.close()


def test_samples_are_consistent_and_tokens_are_sent_only_when_asked(program, engine):
    (answer,) = served(program, engine, [Run(batch=1, input_len=40, output_len=6, seed=1)])
    assert answer["tokens"] is None
    assert answer["device_ms"] is None
    assert len(answer["run_ms"]) == 6
    outside = np.array([answer["ttft_ms"], *answer["step_ms"]]) - answer["run_ms"]
    assert outside.min() >= 0  # the runtime's own call is a part of the step
    assert answer["ttft_ms"] + sum(answer["step_ms"]) == pytest.approx(answer["request_ms"])


def reads_of_a_request(program: Path, engine: Path) -> int:
    """How often the program calls read(2) for one request, the line that orders it included."""
    order = Run(batch=1, input_len=3, output_len=2, seed=0).model_dump_json() + "\n"
    library = library_options(read_engine_manifest(engine))
    command = [program, "serve", engine, *library, "--threads", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        counts = []
        for line in ("", order, order):  # it is ready; after a first request; after a second one
            process.stdin.write(line)
            process.stdin.flush()
            assert '"error"' not in process.stdout.readline()
            found = re.search(r"^syscr: (\d+)$", Path(f"/proc/{process.pid}/io").read_text(), re.MULTILINE)
            assert found is not None
            counts.append(int(found[1]))
        process.stdin.close()
    return counts[2] - counts[1]


def test_caches_are_made_without_reading_files(program, engine, tmp_path):
    """They are made while prefill is timed: a model of many attentions would seem slower by what is read for each."""
    many = engine_of(tiny_graph("AF " * 6), tmp_path)
    assert reads_of_a_request(program, many) == reads_of_a_request(program, engine)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one CPU to be pinned to")
@pytest.mark.parametrize("cpu", sorted(os.sched_getaffinity(0))[:2])
def test_no_thread_leaves_the_cpus_it_is_pinned_to(cpu, program, engine):
    """ONNX Runtime binds its threads to cores by itself, unless it is told how many there are to be."""
    command = [program, "serve", engine, *library_options(read_engine_manifest(engine)), "--cpus", str(cpu)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert '"ready"' in process.stdout.readline()
        allowed = [
            re.findall(r"^Cpus_allowed_list:\t(.*)$", status.read_text(), re.MULTILINE)
            for status in Path(f"/proc/{process.pid}/task").glob("*/status")
        ]
        process.communicate("")
    assert allowed
    assert all(cpus == [str(cpu)] for cpus in allowed)


def test_a_benchmark_alone_writes_results_and_the_statistics_of_trtexec(program, engine):
    library = library_options(read_engine_manifest(engine))
    arguments = ("--batch", "1,2", "--input-len", 7, "--output-len", "5,1", "--rounds", 10, "--warmup", 1, "--seed", 3)
    cpu = min(os.sched_getaffinity(0))
    done = run(program, "bench", engine, *library, *arguments, "--threads", 1, "--cpus", cpu)
    assert done.returncode == 0, done.stderr
    found = results_from_json(done.stdout.encode())
    manifest = read_engine_manifest(engine)
    described = found.engines[0]
    assert (described.label, described.kind, described.program) == (manifest.label, "measured", "cpp")
    assert found.engines[0].engine_bytes == sum(path.stat().st_size for path in engine.iterdir())
    assert found.engines[0].structure == results.Structure.model_validate(manifest.structure)
    environment = found.environment
    assert (environment.threads, environment.pinned_cpus, environment.warmup_rounds) == (1, (cpu,), 1)
    assert (environment.seed, environment.python) == (3, "none")
    assert [tuple(cell.shape) for cell in found.cells] == [(1, 7, 5), (1, 7, 1), (2, 7, 5), (2, 7, 1)]

    rows = [line.split() for line in done.stderr.splitlines() if line.startswith(("  prefill", "  decode"))]
    wanted = []
    for cell in found.cells:
        assert cell.run_ms is not None
        run_ms = np.array(cell.run_ms)
        wanted += [("prefill", "latency", cell.ttft_ms), ("prefill", "run", run_ms[:, 0])]
        if cell.output_len > 1:
            wanted += [("decode", "latency", np.ravel(cell.step_ms)), ("decode", "run", run_ms[:, 1:].ravel())]
    assert [tuple(row[:2]) for row in rows] == [(phase, metric) for phase, metric, _ in wanted]
    for row, (_, _, values) in zip(rows, wanted, strict=True):
        x = np.asarray(values)
        # trtexec's percentile is the inverse of the empirical distribution; its deviation is the population's.
        percentiles = [np.percentile(x, p, method="inverted_cdf") for p in (90, 95, 99)]
        expected = [x.size, x.min(), x.mean(), np.median(x), *percentiles, x.max(), 100 * x.std() / x.mean()]
        found_row = [float(value) for value in row[2:]]
        np.testing.assert_allclose(found_row[:-1], expected[:-1], atol=5.1e-5, rtol=0)  # ms, as they are printed
        assert found_row[-1] == pytest.approx(expected[-1], abs=0.0051)


def test_a_terminal_does_not_obey_a_label_and_what_is_emulated_is_called_so(program, engine, tmp_path):
    manifest = read_engine_manifest(engine)
    folder = altered(engine, tmp_path, {"label": "\x1b[31mred\n", "options": {**manifest.options, "emulated": True}})
    arguments = ("--input-len", 3, "--output-len", 2, "--rounds", 1, "--threads", 1)
    done = run(program, "bench", folder, *library_options(manifest), *arguments)
    assert done.returncode == 0, done.stderr
    assert " [31mred , batch 1," in done.stderr
    assert json.loads(done.stdout)["engines"][0]["kind"] == "emulated"


def altered(engine: Path, folder: Path, changes: Mapping[str, Any], *, manifest: bool = True) -> Path:
    """A copy of an engine folder whose engine.json is changed, sizes in the manifest brought up to date."""
    copy = folder / "copy"
    shutil.copytree(engine, copy)
    document = json.loads((copy / "engine.json").read_text())
    (copy / "engine.json").write_text(json.dumps({**document, **changes}))
    if manifest:
        update_sizes(copy)
    return copy


def update_sizes(copy: Path) -> None:
    path = copy / files.MANIFEST
    document = json.loads(path.read_text())
    for name in document["files"]:
        document["files"][name]["bytes"] = (copy / name).stat().st_size
    path.write_text(json.dumps(document))


def change(**fields: Any) -> Callable[[Path, Path], Path]:
    return lambda engine, folder: altered(engine, folder, fields)


def file_changed(name: str, content: bytes | None, *, manifest: bool = True) -> Callable[[Path, Path], Path]:
    def make(engine: Path, folder: Path) -> Path:
        copy = altered(engine, folder, {})
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        if manifest and (copy / name).exists() and name != files.MANIFEST:
            update_sizes(copy)
        return copy

    return make


def resized(name: str, size: int) -> Callable[[Path, Path], Path]:
    def make(engine: Path, folder: Path) -> Path:
        copy = altered(engine, folder, {})
        os.truncate(copy / name, size)  # what is added is sparse, and takes no disk
        update_sizes(copy)
        return copy

    return make


def escaping(engine: Path, folder: Path) -> Path:
    copy = altered(engine, folder, {})
    document = json.loads((copy / files.MANIFEST).read_text())
    document["files"]["../engine/engine.json"] = {"bytes": 1, "sha256": ""}
    (copy / files.MANIFEST).write_text(json.dumps(document))
    return copy


NOT_ITS_MANIFEST = "the network is not what its manifest says"
SLOT = {"key": "past_k_0", "value": "past_v_0", "present_key": "present_k_0", "present_value": "present_v_0"}
NESTED = b"[" * 100_000
BAD_FOLDERS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "nothing there": (lambda engine, folder: folder / "none", "no such folder"),
    "a name that is no text": (lambda engine, folder: folder / "\udcff", "no such folder"),
    "an empty folder": (lambda engine, folder: folder, "engine.json: file does not exist"),
    "engine.json is a folder": (lambda engine, folder: (folder / "engine.json").mkdir() or folder, "does not exist"),
    "no manifest": (file_changed(files.MANIFEST, None), "manifest.json: file does not exist"),
    "manifest is no JSON": (file_changed(files.MANIFEST, b"{"), "manifest.json: not JSON"),
    "manifest of another kind": (
        file_changed(files.MANIFEST, b'{"manifest_schema": 1, "kind": "network"}'),
        "another kind: expected engine, found network",
    ),
    "manifest of another version": (file_changed(files.MANIFEST, b'{"manifest_schema": 2}'), "another version"),
    "manifest without files": (file_changed(files.MANIFEST, b'{"manifest_schema": 1, "kind": "engine"}'), "files is"),
    "manifest with a list of files": (
        file_changed(files.MANIFEST, b'{"manifest_schema": 1, "kind": "engine", "files": []}'),
        "engine.json is not in the manifest",
    ),
    "path leaves the folder": (escaping, "path leaves the folder"),
    "a killed run": (file_changed(files.MARKER, b""), "incomplete"),
    "file of another size": (file_changed("engine.json", b"{}", manifest=False), "engine_schema is missing"),
    "manifest not up to date": (
        lambda engine, folder: altered(engine, folder, {"label": "longer than before"}, manifest=False),
        r"engine.json: file was altered: expected \d+ bytes, found \d+",
    ),
    "engine.json is huge": (
        resized("engine.json", safetensors_io.MAX_JSON_BYTES + 1),
        "engine.json: file is too large",
    ),
    "engine.json is empty": (file_changed("engine.json", b""), "engine.json: not JSON"),
    "engine.json is binary": (file_changed("engine.json", bytes(range(256))), "engine.json: not JSON"),
    "engine.json is a list": (file_changed("engine.json", b"[]"), "engine_schema is missing"),
    "engine.json is nested": (file_changed("engine.json", NESTED), "engine.json: not JSON"),
    "engine.json has half a character": (file_changed("engine.json", b'{"a": "\xc3"}'), "engine.json: not JSON"),
    "of later days": (change(engine_schema=2), "expected engine_schema 1, found 2"),
    "no vocabulary": (change(vocab_size=0), "vocab_size: expected a positive integer"),
    "vocabulary in words": (change(vocab_size="many"), "vocab_size: expected a positive integer"),
    "vocabulary with a fraction": (change(vocab_size=320.5), "vocab_size: expected a positive integer"),
    "vocabulary of 2**64": (change(vocab_size=2**64), "vocab_size: expected a positive integer"),
    "vocabulary of 2**63 - 1": (change(vocab_size=2**63 - 1), f"larger than any memory|{NOT_ITS_MANIFEST}"),
    "another vocabulary": (change(vocab_size=321), NOT_ITS_MANIFEST),
    "negative batch": (change(batch=-1), "batch: expected a positive integer"),
    "label is a number": (change(label=7), "label: expected text"),
    "label with NUL": (change(label="a\0b"), "label: expected text without NUL"),
    "unknown dtype": (change(dtype="int3"), "not a dtype that runs here: int3"),
    "dtype without kernels": (change(dtype="bfloat16"), "expected float32 or float16, found bfloat16"),
    "another dtype": (change(dtype="float16"), NOT_ITS_MANIFEST),
    "unknown backend": (change(backend="abacus\x1b[31m"), r"no backend abacus \[31m"),
    "TensorRT, not compiled in": (change(backend="tensorrt"), "built without TensorRT"),
    "no cache": (change(cache=[]), NOT_ITS_MANIFEST),
    "cache is a word": (change(cache="none"), "cache: expected a list"),
    "cache slot without name": (change(cache=[{}]), "key is missing"),
    "cache as large as numbers go": (
        change(cache=[{**SLOT, "num_key_value_heads": 2**62, "head_dim": 2**62}]),
        f"larger than any memory|{NOT_ITS_MANIFEST}",
    ),
    "cache larger than this machine": (
        change(cache=[{**SLOT, "num_key_value_heads": 2**20, "head_dim": 2**20}]),
        f"not enough memory for the KV cache|{NOT_ITS_MANIFEST}",
    ),
    "no options": (change(options={}), "(device|session) is missing"),
    "session options are a list": (change(options={"device": "cpu", "session": []}), "session: expected an object"),
    "unusable session option": (
        change(options={"device": "cpu", "session": {"": "1"}}),
        "ONNX Runtime: Config key is empty",
    ),
    "network elsewhere": (change(network_file="../engine/network.onnx"), "is not in the manifest"),
    "network is something else": (change(network_file="engine.json"), "ONNX Runtime: .*Protobuf parsing failed"),
    "truncated network": (resized("onnxruntime.onnx", 200), "ONNX Runtime: .*Protobuf parsing failed"),
    "truncated weights": (resized("weights.safetensors", 1000), "ONNX Runtime: .*External initializer"),
    "built with a later ONNX Runtime": (change(runtime={"onnxruntime": "99.1"}), "too old: expected 99.1 or later"),
}


@pytest.mark.parametrize(("make", "problem"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_bad_engine_folder_is_one_error_line(make, problem, program, engine, tmp_path):
    folder = make(engine, tmp_path)
    library = library_options(read_engine_manifest(engine))
    done = run(program, "bench", folder, *library, "--output-len", 2, "--input-len", 3, "--threads", 1)
    refused(done, problem)
    assert done.stdout == ""
    again = run(program, "serve", folder, *library, "--threads", 1, stdin=RUNS[0].model_dump_json() + "\n")
    refused(again, problem)
    message = worker.Reply.validate_json(again.stdout.splitlines()[-1])
    assert isinstance(message, worker.Failure)


def refused(done: subprocess.CompletedProcess[str], problem: str) -> None:
    assert done.returncode == 2, done.stderr
    *before, line = done.stderr.splitlines()
    assert re.fullmatch(f"error: .*(?:{problem}).*", line), done.stderr
    assert not any(text.startswith("error: ") for text in before)


ENGINE = "{engine}"
MANY = str(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1200)  # sequences: 4 * 320 bytes of logits each
BAD_ARGUMENTS: dict[str, tuple[Sequence[str], str]] = {
    "nothing": ([], "expected a command and an engine folder"),
    "no engine": (["bench"], "expected a command and an engine folder"),
    "two engines": (["bench", "a", "b"], "expected a command and an engine folder"),
    "unknown command": (["race", ENGINE], "race: no such command"),
    "unknown option": (["bench", ENGINE, "--fast"], "--fast: no such option"),
    "unknown short option": (["bench", ENGINE, "-q"], "-q: no such option"),
    "no value": (["bench", ENGINE, "--batch"], "--batch: a value is missing"),
    "empty value": (["bench", ENGINE, "--batch", ""], "--batch: expected a whole number from 1"),
    "words": (["bench", ENGINE, "--batch", "1,two"], "--batch: expected a whole number from 1"),
    "trailing comma": (["bench", ENGINE, "--batch", "1,"], "--batch: expected a whole number from 1"),
    "zero": (["bench", ENGINE, "--output-len", "0"], "--output-len: expected a whole number from 1"),
    "negative": (["bench", ENGINE, "--input-len", "-3"], "--input-len: expected a whole number from 1"),
    "more than 64 bits": (["bench", ENGINE, "--seed", str(2**64)], "--seed: expected a whole number from 0"),
    "absurd batch": (["bench", ENGINE, "--batch", str(2**63 - 1)], "larger than any memory"),
    "large batch": (["bench", ENGINE, "--batch", str(2**40)], "not enough memory for the input tokens"),
    "many steps": (
        ["bench", ENGINE, "--batch", MANY, "--input-len", "1", "--output-len", "10"],
        "not enough memory for what is kept of every token",
    ),
    "many logits": (
        ["bench", ENGINE, "--batch", MANY, "--input-len", "1", "--output-len", "1"],
        "not enough memory for the logits",
    ),
    "absurd input": (["bench", ENGINE, "--input-len", str(2**63 - 1)], "longer than the positions the model knows"),
    "too long": (["bench", ENGINE, "--input-len", "500", "--output-len", "13"], "expected 512, found 513"),
    "absurd rounds": (["bench", ENGINE, "--rounds", str(2**62)], "--rounds: expected a whole number from 1 to"),
    "no threads": (["bench", ENGINE, "--threads", "0"], "--threads: expected a whole number from 1"),
    "absurd threads": (["bench", ENGINE, "--threads", "1025"], "--threads: expected a whole number from 1 to 1024"),
    "absurd CPU": (["bench", ENGINE, "--cpus", "100000"], "no such CPU: 100000"),
    "unavailable CPU": (["bench", ENGINE, "--cpus", "1000"], "cannot pin the process"),
    "many numbers": (["bench", ENGINE, "--batch", ",".join(map(str, range(1, 1500)))], "too many numbers"),
    "no such library": (["bench", ENGINE, "--library", "/none/lib.so"], "cannot be opened: /none/lib.so"),
    "library is a text": (["bench", ENGINE, "--library", __file__], "cannot be opened: .*test_cpp_program.py"),
    "another library": (["bench", ENGINE, "--library", "libm.so.6"], "it has no OrtGetApiBase"),
}


@pytest.mark.parametrize(("arguments", "problem"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_absurd_arguments_are_one_error_line(arguments, problem, program, engine):
    library = [] if "--library" in arguments else library_options(read_engine_manifest(engine))
    given = [engine if argument == ENGINE else argument for argument in arguments]
    done = run(program, *given[:2], *(library if len(given) > 1 else []), *given[2:])
    refused(done, problem)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("version", "problem"),
    [("1.24.9", "too old: expected 1.25 or later, found 1.24.9"), ("1.99.0", "has no C API version 16")],
)
def test_a_library_that_does_not_fit(version, problem, program, engine, tmp_path):
    """One that says it is another version, and has no table of functions."""
    source = tmp_path / "library.cpp"
    source.write_text(
        f"""
        static const void* const* table(unsigned) {{ return nullptr; }}
        static const char* version() {{ return "{version}"; }}
        struct Base {{ const void* const* (*table)(unsigned); const char* (*version)(); }};
        static Base base{{table, version}};
        extern "C" const Base* OrtGetApiBase() {{ return &base; }}
        """
    )
    library = tmp_path / "libonnxruntime.so"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "clang++"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    folder = altered(engine, tmp_path, {"runtime": {}})
    refused(run(program, "bench", folder, "--library", library), problem)


BAD_ORDERS = {
    "no JSON": ("hello", "order: not JSON"),
    "no order": ("{}", "op is missing"),
    "a list": ("[1]", "op is missing"),
    "unknown order": ('{"op": "dance"}', "expected run or close, found dance"),
    "no shape": ('{"op": "run"}', "batch is missing"),
    "negative": (
        '{"op": "run", "batch": -1, "input_len": 1, "output_len": 1, "seed": 0}',
        "batch: expected a positive",
    ),
    "seed with a sign": ('{"op": "run", "batch": 1, "input_len": 1, "output_len": 1, "seed": -1}', "seed: expected"),
    "seed is text": ('{"op": "run", "batch": 1, "input_len": 1, "output_len": 1, "seed": "1"}', "seed: expected"),
    "too long": ('{"op": "run", "batch": 1, "input_len": 512, "output_len": 1, "seed": 0}', "expected 512, found 513"),
    "absurd": (
        '{"op": "run", "batch": 1, "input_len": 9223372036854775807, "output_len": 1, "seed": 0}',
        "expected 512, found 9223372036854775807",
    ),
    "too many": (
        '{"op": "run", "batch": 1099511627776, "input_len": 1, "output_len": 1, "seed": 0}',
        "not enough memory",
    ),
}


@pytest.mark.parametrize(("order", "problem"), BAD_ORDERS.values(), ids=BAD_ORDERS.keys())
def test_a_bad_order_is_one_failure(order, problem, program, engine):
    library = library_options(read_engine_manifest(engine))
    done = run(program, "serve", engine, *library, "--threads", 1, stdin=order + "\n")
    refused(done, problem)
    message = worker.Reply.validate_json(done.stdout.splitlines()[-1])
    assert isinstance(message, worker.Failure)
    assert re.search(problem, message.problem)


def test_the_end_of_input_ends_it(program, engine):
    done = run(program, "serve", engine, *library_options(read_engine_manifest(engine)), "--threads", 1)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1  # ready


def test_help(program):
    done = run(program, "--help")
    assert done.returncode == 0
    assert "usage: fuselage-bench" in done.stdout


def test_one_benchmark_mixes_programs(engine, tmp_path):
    """What `bench` does: the C++ program, as users get it, in turns with the Python one."""
    told: list[str] = []
    cpp = worker_for("cpp", told.append)
    other = tmp_path / "other"
    shutil.copytree(engine, other)
    document = json.loads((other / "engine.json").read_text())
    (other / "engine.json").write_text(json.dumps({**document, "label": "python"}))

    def mixed(folder: Path, manifest: EngineManifest, threads: int | None, cpus: Sequence[int] | None) -> Sequence[str]:
        if manifest.label == "python":  # an engine whose label was changed, from a copy that is not
            return python_worker(engine, manifest, threads, cpus)
        return cpp(folder, manifest, threads, cpus)

    grid = request_grid([1, 2], [5], [4])
    found = bench_engines([engine, other], grid, rounds=2, threads=1, worker=mixed)
    assert [described.program for described in found.engines] == ["cpp", "python"]
    assert found.engines[0].runtime == found.engines[1].runtime
    assert found.environment.clock == "std::chrono::steady_clock, time.perf_counter_ns"
    assert [cell.run_ms is None for cell in found.cells] == [False, True] * 2
    assert results_from_json(results.json_from_results(found)) == found


def test_an_altered_engine_is_found_before_it_runs(engine, tmp_path):
    copy = altered(engine, tmp_path, {})
    path = copy / read_engine_manifest(copy).network_file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FuselageError, match="file was altered"):
        bench_engines([copy], request_grid([1], [3], [2]), worker=worker_for("cpp", quiet))


def test_without_a_compiler_the_way_out_is_python(monkeypatch, engine):
    monkeypatch.setenv("CXX", "ccache /nonexistent/c++")
    manifest = read_engine_manifest(engine)
    with pytest.raises(EngineError, match=r"no C\+\+ compiler 'ccache /nonexistent/c\+\+'.*Use --runtime python"):
        worker_for("cpp", quiet)(engine, manifest, None, None)
    told: list[str] = []
    command = worker_for("auto", told.append)
    for _ in range(2):
        assert command(engine, manifest, 1, [0]) == python_worker(engine, manifest, 1, [0])
    assert len(told) == 1
    assert re.match(r"timed with the Python program: there is no C\+\+ compiler", told[0])


def test_backends_that_it_does_not_serve_keep_their_workers(monkeypatch, engine):
    monkeypatch.setenv("CXX", "/nonexistent/c++")  # not even asked for
    manifest = read_engine_manifest(engine)
    for runtime, backend in (("cpp", "tensorrt-llm"), ("auto", "torch"), ("python", "onnxruntime")):
        other = manifest.model_copy(update={"backend": backend})
        assert worker_for(runtime, quiet)(engine, other, 2, None) == python_worker(engine, other, 2, None)


@pytest.fixture
def cuda_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None], None]:
    """A way to have CUDA headers with this text; None: without the one that is read."""

    def make(text: str | None) -> None:
        (tmp_path / "include").mkdir()
        if text is not None:
            (tmp_path / "include" / "cuda_runtime_api.h").write_text(text)
        monkeypatch.setenv("CUDA_INCLUDE_DIR", str(tmp_path / "include"))

    return make


@pytest.mark.parametrize(
    ("packages", "lean", "found"),
    [
        ([], True, []),
        (["tensorrt_libs/libnvinfer.so.11"], True, ["--library", "tensorrt_libs/libnvinfer.so.11"]),
        (["tensorrt_lean_libs/libnvinfer_lean.so.11"], False, []),
        (
            ["tensorrt_lean_libs/libnvinfer_lean.so.11"],
            True,
            ["--library", "tensorrt_lean_libs/libnvinfer_lean.so.11"],
        ),
    ],
)
def test_libraries_are_found_in_python_packages(packages, lean, found, cuda_headers, monkeypatch, engine, tmp_path):
    cuda_headers("#define CUDART_VERSION  13000\n")
    for package in packages:
        (tmp_path / package).parent.mkdir(parents=True)
        (tmp_path / package).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    manifest = read_engine_manifest(engine).model_copy(update={"backend": "tensorrt", "options": {"lean": lean}})
    assert library_options(manifest) == [str(tmp_path / name) if "/" in name else name for name in found]


@pytest.mark.parametrize(
    ("version", "found"),
    [(12080, "nvidia/cuda_runtime/lib/libcudart.so.12"), (13000, "nvidia/cu13/lib/libcudart.so.13"), (14010, None)],
)
def test_the_cuda_runtime_is_that_of_the_headers(version, found, cuda_headers, monkeypatch, engine, tmp_path):
    cuda_headers(f"/* CUDA */\n#define CUDART_VERSION  {version}\n")
    for library in ("cuda_runtime/lib/libcudart.so.12", "cu13/lib/libcudart.so.13"):
        (tmp_path / "nvidia" / library).parent.mkdir(parents=True)
        (tmp_path / "nvidia" / library).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    manifest = read_engine_manifest(engine).model_copy(update={"backend": "tensorrt"})
    assert library_options(manifest) == ([] if found is None else ["--cuda-library", str(tmp_path / found)])


@pytest.mark.parametrize(
    ("header", "problem"), [(None, "cannot be read"), ("#pragma once\n", "do not say their version")]
)
def test_no_cuda_runtime_is_guessed(header, problem, cuda_headers, engine):
    cuda_headers(header)
    manifest = read_engine_manifest(engine).model_copy(update={"backend": "tensorrt"})
    with pytest.raises(EngineError, match=rf"cuda_runtime_api.h: CUDA's headers {problem}.*Set CUDA_INCLUDE_DIR"):
        library_options(manifest)


def test_tensorrt_needs_headers(monkeypatch, engine):
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    manifest = read_engine_manifest(engine).model_copy(update={"backend": "tensorrt"})
    with pytest.raises(EngineError, match=r"set TENSORRT_INCLUDE_DIR .*Use --runtime python"):
        worker_for("cpp", quiet)(engine, manifest, None, None)


def test_a_failed_build_shows_what_the_compiler_said(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSELAGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(EngineError, match=r"does not compile(.*\n)+.*(no-such-flag)(.*\n)*.*Use --runtime python"):
        built_program(quiet, options={"CMAKE_CXX_FLAGS": "--no-such-flag"})
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSELAGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"the cache cannot be written.*Set FUSELAGE_CACHE"):
        built_program(quiet)


@pytest.mark.parametrize("variable", ["FUSELAGE_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_beside_the_caller_is_found_from_everywhere(variable, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FUSELAGE_CACHE", raising=False)
    monkeypatch.setenv(variable, "cache")
    monkeypatch.setattr(cpp_program, "_build", lambda cmake, settings, target: target.touch())
    program = built_program(quiet)
    assert program.is_absolute()
    assert program.is_relative_to(tmp_path / "cache")


def test_it_is_built_once_however_many_want_it(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSELAGE_CACHE", str(tmp_path / "cache"))
    built: list[Path] = []

    def slow_build(cmake: str, settings: Mapping[str, str], target: Path) -> None:
        built.append(target)
        time.sleep(0.2)
        target.write_text("")

    monkeypatch.setattr(cpp_program, "_build", slow_build)
    told: list[str] = []
    waiting = [threading.Thread(target=built_program, args=[told.append]) for _ in range(3)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    assert len(built) == len(told) == 1
    assert built_program(told.append) == built[0]
    assert built_program(told.append, options={"CMAKE_CXX_FLAGS": "-g"}) != built[0]  # other options, another program
    assert len(built) == 2
