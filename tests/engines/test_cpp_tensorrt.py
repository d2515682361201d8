"""The TensorRT part of the C++ benchmark program: compiled against the public headers, executed on a stand-in.

Needs the headers: TENSORRT_INCLUDE_DIR, and CUDA's in CUDA_INCLUDE_DIR or /usr/local/cuda/include. The real library has
never been executed; what the stand-in checks is said in tensorrt_stand_in.cpp.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from engines import worker
from engines.cpp_program import built_program, missing
from engines.worker import Run, token_ids
from exporter.graph import structure
from exporter.writers.files import json_bytes, save_folder
from tests.tiny import tiny_graph

HEADERS = os.environ.get("TENSORRT_INCLUDE_DIR", "")
CUDA_HEADERS = os.environ.get("CUDA_INCLUDE_DIR", "/usr/local/cuda/include")
lacking = missing("tensorrt")
pytestmark = pytest.mark.skipif(bool(lacking), reason="; ".join(lacking))

CHECKED = {"CMAKE_BUILD_TYPE": "Debug", "FUSELAGE_SANITIZE": "ON", "CMAKE_COMPILE_WARNING_AS_ERROR": "ON"}
HERE = Path(__file__).parent
VOCAB_SIZE, CAPACITY, HEADS, HEAD_DIM, MOST_SEQUENCES, LONGEST_CALL = 101, 64, 2, 8, 3, 16
PLAN = f"{VOCAB_SIZE} {CAPACITY} {HEADS} {HEAD_DIM} {MOST_SEQUENCES} {LONGEST_CALL}"
OPTIONS: dict[str, Any] = {
    "device": "cuda",
    "lean": True,
    "weight_streaming": False,
    "weight_streaming_budget": None,
    "profiles": [
        {"name": "prefill", "index": 1, "batch": [1, 1, MOST_SEQUENCES], "tokens": [1, 8, LONGEST_CALL]},
        {"name": "decode", "index": 0, "batch": [1, 1, MOST_SEQUENCES], "tokens": [1, 1, 1]},
    ],
}
MANIFEST: dict[str, Any] = {
    "engine_schema": 1,
    "backend": "tensorrt",
    "runtime": {"tensorrt": "11.1.0"},
    "machine": {},
    "label": "fused",
    "network_file": "engine.plan",
    "network_sha256": "00" * 32,
    "dtype": "float32",
    "number_format": None,
    "vocab_size": VOCAB_SIZE,
    "max_positions": CAPACITY,
    "batch": None,
    "capacity": CAPACITY,
    "cache": [
        {
            "key": "past_k_0",
            "value": "past_v_0",
            "present_key": "present_k_0",
            "present_value": "present_v_0",
            "num_key_value_heads": HEADS,
            "head_dim": HEAD_DIM,
        }
    ],
    "kv_bytes_per_token": 8 * HEADS * HEAD_DIM,
    "weight_bytes": 1,
    "structure": structure(tiny_graph("A")),
    "options": OPTIONS,
}


def aborting_classes(header: str) -> str:
    """C++ classes Aborting<T> that implement every pure function of the interfaces behind TensorRT's classes."""
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//.*", "", header), flags=re.DOTALL)
    lines = ["#include <cstdlib>", "using namespace nvinfer1;", "using namespace nvinfer1::apiv;"]
    lines.append("template <typename T> class Aborting;")
    for name in ("VRuntime", "VCudaEngine", "VExecutionContext"):
        found = re.search(rf"class {name}\b[^{{;]*\{{(.*?)\n\}};", text, re.DOTALL)
        assert found is not None
        lines.append(f"template <> class Aborting<{name}> : public {name} {{ public:")
        for function in re.findall(r"virtual\s+([^;{}]*?)\s*=\s*0;", found[1], re.DOTALL):
            lines.append(f"{' '.join(function.split())} override {{ std::abort(); }}")
        lines.append("};")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that is both TensorRT and the CUDA runtime."""
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "pure.h").write_text(aborting_classes(Path(HEADERS, "NvInferImpl.h").read_text()))
    library = folder / "libstand_in.so"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "clang++"
    includes = ["-isystem", HEADERS, "-isystem", CUDA_HEADERS, f"-I{folder}"]
    source = HERE / "tensorrt_stand_in.cpp"
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", "-w", *includes, source, "-o", library], check=True)
    return library


@pytest.fixture(scope="module")
def program(own_cache: None) -> Path:
    return built_program(lambda text: None, options=CHECKED)


def engine_of(folder: Path, changes: Mapping[str, Any], plan: str = PLAN) -> Path:
    contents = [("engine.json", json_bytes({**MANIFEST, **changes})), ("engine.plan", plan.encode())]
    save_folder(folder / "engine", contents, kind="engine", details={})
    return folder / "engine"


def serve(
    program: Path, library: Path, engine: Path, runs: Sequence[Run], **environment: str
) -> subprocess.CompletedProcess[str]:
    lines = "".join(f"{run.model_dump_json()}\n" for run in runs) + worker.Close().model_dump_json()
    done = subprocess.run(
        [program, "serve", engine, "--library", library, "--cuda-library", library],
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert "Sanitizer" not in done.stderr, done.stderr
    assert "runtime error" not in done.stderr, done.stderr
    assert "not so" not in done.stderr, done.stderr
    return done


def test_it_runs_as_tensorrt_asks(program, stand_in, tmp_path):
    """Chunked prefill, cache in place and cleared, one captured step that serves all, another batch in between."""
    runs = [
        Run(batch=2, input_len=5, output_len=7, seed=1, with_tokens=True),
        Run(batch=2, input_len=4, output_len=2, seed=2, with_tokens=True),  # the same buffers, and the same graph
        Run(batch=1, input_len=2 * LONGEST_CALL + 1, output_len=3, seed=3, with_tokens=True),  # the last chunk: 1 token
        Run(batch=3, input_len=LONGEST_CALL, output_len=CAPACITY - LONGEST_CALL, seed=4, with_tokens=True),
        Run(batch=3, input_len=1, output_len=1, seed=5, with_tokens=True),
    ]
    done = serve(program, stand_in, engine_of(tmp_path, {}), runs)
    assert done.returncode == 0, done.stderr
    ready, *answers, _ = [json.loads(line) for line in done.stdout.splitlines()]
    assert ready["device"] == "Stand-in"
    assert re.fullmatch(r"1[01]\.\d+\.\d+", ready["runtime"]["tensorrt"])
    for run, answer in zip(runs, answers, strict=True):
        rows = token_ids(run.batch, run.input_len, vocab_size=VOCAB_SIZE, seed=run.seed).tolist()
        for generated in answer["tokens"]:
            expected = [sum(row) % VOCAB_SIZE for row in rows]
            assert generated == expected
            for row, token in zip(rows, expected, strict=True):
                row.append(token)
        assert len(answer["run_ms"]) == len(answer["device_ms"]) == run.output_len
        steps = [answer["ttft_ms"], *answer["step_ms"]]
        assert all(run_ms <= step for run_ms, step in zip(answer["run_ms"], steps, strict=True))
    # Prefill is never captured: one call, one, two chunks, one. A call of one token is decode, whoever asks for it: as
    # it is once per batch size, then captured.
    decode_calls = [6 + 1, 1 + 2, CAPACITY - LONGEST_CALL - 1 + 1]
    launched = sum(calls - 1 for calls in decode_calls)
    assert f"stand-in: {1 + 1 + 2 + 1 + 3} enqueued, 3 captured, {launched} launched" in done.stderr
    # The activations; per batch size two caches, and for prefill and decode inputs and tokens on both sides, and logits
    # on the GPU. Chunks of other lengths take none, for that would be timed.
    assert f"{1 + 3 * (2 + 2 * 5)} allocated" in done.stderr


@pytest.mark.parametrize(
    ("budget", "captured"), [(1000, 0), (5000, 1), (10_000, 1)], ids=["streamed", "all there", "more than all"]
)
def test_a_step_is_captured_only_where_no_weights_are_streamed(budget, captured, program, stand_in, tmp_path):
    engine = engine_of(tmp_path, {"options": {**OPTIONS, "weight_streaming": True, "weight_streaming_budget": budget}})
    # At once: where a request has one decode step, the next request's may be the first that counts.
    done = serve(program, stand_in, engine, [Run(batch=1, input_len=2, output_len=2, seed=1)])
    assert done.returncode == 0, done.stderr
    assert f"{captured} captured, 0 launched" in done.stderr


def with_profiles(**changes: Any) -> dict[str, Any]:
    prefill, decode = OPTIONS["profiles"]
    return {"options": {**OPTIONS, "profiles": [prefill, {**decode, **changes}]}}


REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, str], str]] = {
    "no GPU": ({}, PLAN, {"STAND_IN_WITHOUT_GPU": "1"}, "CUDA finds no GPU"),
    "older CUDA": ({}, PLAN, {"STAND_IN_OLDER_CUDA": "1"}, r"CUDA of another version: expected (\d+), .* found \d+"),
    "not a plan": ({}, "ftrt", {}, "engine.plan: TensorRT does not load the engine: the magic tag does not match"),
    "empty plan": ({}, "", {}, "engine.plan: the engine cannot be read"),
    "another vocabulary": ({"vocab_size": 102}, PLAN, {}, "the engine is not what its manifest says"),
    "another dtype": ({"dtype": "bfloat16"}, PLAN, {}, "the engine is not what its manifest says"),
    "another capacity": ({"capacity": 63}, PLAN, {}, "the engine is not what its manifest says"),
    "no capacity": ({"capacity": None}, PLAN, {}, "cache of fixed capacity"),
    "no such alias": (
        {"cache": [{**MANIFEST["cache"][0], "present_key": "present_v_0", "present_value": "present_k_0"}]},
        PLAN,
        {},
        "it does not update present_v_0 in place",
    ),
    "no options": ({"options": {}}, PLAN, {}, "lean is missing"),
    "no profiles": ({"options": {**OPTIONS, "profiles": 7}}, PLAN, {}, "profiles: expected a list"),
    "no decode profile": (with_profiles(name="other"), PLAN, {}, "there is no profile decode"),
    "no such profile": (with_profiles(index=7), PLAN, {}, "TensorRT does not choose a profile"),
    "index too large": (with_profiles(index=2**40), PLAN, {}, "index: too large"),
    "sizes are two": (with_profiles(batch=[1, 2]), PLAN, {}, "batch: expected 3 sizes"),
    "no such batch": (with_profiles(batch=[2, 2, 2]), PLAN, {}, "cannot run this batch: expected 2 to 2, found 1"),
    "cache larger than the GPU": (
        {"cache": [{**MANIFEST["cache"][0], "num_key_value_heads": 2**20, "head_dim": 2**16}]},  # and than the host
        f"{VOCAB_SIZE} {CAPACITY} {2**20} {2**16} {MOST_SEQUENCES} {LONGEST_CALL}",
        {},
        "not enough GPU memory for a KV cache",
    ),
    "tokens of other sizes": (with_profiles(tokens=[1, "1", 1]), PLAN, {}, "tokens: expected a positive integer"),
}


@pytest.mark.parametrize(("changes", "plan", "environment", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_engine_is_one_error(changes, plan, environment, problem, program, stand_in, tmp_path):
    engine = engine_of(tmp_path, changes, plan)
    done = serve(program, stand_in, engine, [Run(batch=1, input_len=2, output_len=2, seed=1)], **environment)
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.search(problem, line), line
    assert isinstance(worker.Reply.validate_json(done.stdout.splitlines()[-1]), worker.Failure)


def test_a_benchmark_alone_shows_the_times_of_the_gpu(program, stand_in, tmp_path):
    libraries = ["--library", stand_in, "--cuda-library", stand_in]
    request = ["--input-len", "20", "--output-len", "4", "--rounds", "5"]
    command = [program, "bench", engine_of(tmp_path, {}), *libraries, *request]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (cell,) = json.loads(done.stdout)["cells"]
    assert [len(calls) for calls in cell["device_ms"]] == [4] * 5
    rows = [line.split()[:3] for line in done.stderr.splitlines() if " device " in line]
    assert rows == [["prefill", "device", "5"], ["decode", "device", "15"]]


def test_a_missing_library_is_one_error(program, stand_in, tmp_path):
    engine = engine_of(tmp_path, {})
    short = ["--input-len", "2", "--output-len", "2"]
    for libraries, problem in (
        (["--cuda-library", "/none/libcudart.so"], "library cannot be opened: /none/libcudart.so"),
        (["--cuda-library", "libm.so.6"], "libm.so.6: not the library that is needed: it has no cuda"),
        (["--cuda-library", stand_in, "--library", "/none/libnvinfer.so"], "cannot be opened: /none/libnvinfer.so"),
        (["--cuda-library", stand_in, "--library", "libm.so.6"], "libm.so.6: not .* it has no getInferLibVersion"),
    ):
        command = [program, "bench", engine, *short, *libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert re.search(f"^error: .*{problem}", done.stderr, re.MULTILINE), done.stderr
