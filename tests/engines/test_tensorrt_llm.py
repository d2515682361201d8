"""The TensorRT-LLM backend without TensorRT-LLM: commands, memory, what is missing; and with stand-ins of its programs.

`trtllm-build` is a script that writes what it was called with, the executor's bindings are a module of the same names.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import tensorrt_llm
from engines.backends import BACKENDS
from engines.base import EngineManifest, read_engine_manifest
from engines.bench import bench_engines, python_worker
from engines.report import report_from_results
from engines.results import RequestShape, Results, json_from_results, results_from_json, statistics
from engines.run import run_recipe
from engines.tensorrt_llm import BuildSettings, TensorRtLlm, build_command, describe_build, memory_per_gpu
from engines.tensorrt_llm_worker import main, open_executor, serve, timed_request
from engines.trtllm_bench import results_from_trtllm_bench
from engines.worker import Close, Closed, Run, Sample, token_ids
from exporter.calibration import calibrate, ranges_of
from exporter.errors import CheckpointError, EngineError, FuselageError
from exporter.graph import ModelGraph, structure
from exporter.passes.quantize_linears import quantize_linears
from exporter.quantization import read_quantization, recipe_with
from exporter.recipe import read_recipe
from exporter.writers import hf, trtllm
from exporter.writers.files import save_folder
from exporter.writers.trtllm_config import CHECKPOINT_KIND, CheckpointManifest, RankFile, read_checkpoint_manifest
from tests.command_line import call
from tests.tiny import quantized_graph, tiny_graph

# What trtllm-build of 1.1 and 1.2 takes (tensorrt_llm/commands/build.py, plugin/plugin.py), as far as it is used.
FLAGS = {
    "checkpoint_dir", "output_dir", "model_cls_file", "model_cls_name", "max_batch_size", "max_input_len",
    "max_seq_len", "max_num_tokens", "max_beam_width", "kv_cache_type", "workers", "gemm_plugin",
    "gemm_swiglu_plugin", "low_latency_gemm_plugin", "use_paged_context_fmha", "use_fp8_context_fmha",
}  # fmt: skip


def checkpoint(graph: ModelGraph, folder: Path, **options: Any) -> Path:
    save_folder(folder, trtllm.emit(graph, trtllm.Options(**options)), kind=CHECKPOINT_KIND, details={})
    return folder


def options_of(folder: Path, **settings: Any) -> dict[str, str]:
    command = build_command(folder, Path("out"), read_checkpoint_manifest(folder), BuildSettings(**settings))
    assert command[0] == "trtllm-build"
    names, values = command[1::2], command[2::2]
    assert {name.removeprefix("--") for name in names} <= FLAGS
    return dict(zip((name.removeprefix("--") for name in names), values, strict=True))


PLAIN = tiny_graph("AF F", num_key_value_heads=2)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (None, {}, {"gemm_plugin": "auto", "use_paged_context_fmha": "enable"}),
        ("fp8", {}, {"gemm_plugin": "fp8", "gemm_swiglu_plugin": "fp8", "use_fp8_context_fmha": "disable"}),
        ("fp8", {}, {"use_paged_context_fmha": "enable"}),
        ("fp8", {"low_latency": True}, {"low_latency_gemm_plugin": "fp8"}),
        ("int8-smoothquant-token", {}, {"gemm_plugin": "auto", "use_paged_context_fmha": "enable"}),
    ],
)
def test_command(name: str | None, settings: dict[str, Any], expected: dict[str, str], tmp_path: Path) -> None:
    graph = PLAIN if name is None else quantized_graph(PLAIN, name)
    folder = checkpoint(graph, tmp_path / "checkpoint", tp_size=2)
    options = options_of(folder, **settings)
    assert expected.items() <= options.items()
    lengths = {"max_input_len": "512", "max_seq_len": "512", "max_beam_width": "1"}
    assert {**lengths, "workers": "2", "kv_cache_type": "paged"}.items() <= options.items()
    assert ("model_cls_file" in options) == (name == "int8-smoothquant-token")
    assert ("gemm_swiglu_plugin" in options) == (name == "fp8" and not settings)


@pytest.mark.parametrize(
    ("exclude", "swiglu", "attention"),
    [([], True, "enable"), (["blocks.0.ffn.*"], False, "enable"), (["blocks.0.attention.o_proj"], True, "disable")],
)
def test_a_flag_for_all_needs_all(exclude: list[str], swiglu: bool, attention: str, tmp_path: Path) -> None:
    recipe = recipe_with(read_quantization("fp8"), kv_cache="fp8", exclude=exclude)
    graph = quantize_linears(PLAIN, recipe, ranges_of(calibrate(PLAIN, np.zeros((1, 8), int), text="zeros"), PLAIN))
    options = options_of(checkpoint(graph, tmp_path / "checkpoint"))
    assert ("gemm_swiglu_plugin" in options, options["use_fp8_context_fmha"]) == (swiglu, attention)
    assert options["use_paged_context_fmha"] == attention


def test_our_class_is_found_by_the_build_and_by_its_workers(tmp_path: Path) -> None:
    folder = checkpoint(tiny_graph("(AF AF)"), tmp_path / "with space", tp_size=2)
    options = options_of(folder)
    assert Path(options["model_cls_file"]).read_text() == trtllm.NETWORK.read_text()
    assert f"class {options['model_cls_name']}(" in trtllm.NETWORK.read_text()
    text = describe_build(folder, tmp_path / "out", BuildSettings())
    assignment, without_cache, *command = shlex.split(text.splitlines()[0])
    assert assignment.startswith(f"PYTHONPATH={folder}")
    assert without_cache == "PYTHONDONTWRITEBYTECODE=1"
    assert command[:3] == ["trtllm-build", "--checkpoint_dir", str(folder)]
    assert not (tmp_path / "out").exists()


def manifest_with(**changes: Any) -> CheckpointManifest:
    rank = RankFile(file="rank0.safetensors", layers=(0, 2), weight_bytes=10, kv_bytes_per_token=100, widest_gemm=4096)
    known: dict[str, Any] = {
        "model_class": None, "dtype": "bfloat16", "quant_algo": None, "kv_cache_quant_algo": None, "tp_size": 1,
        "pp_size": 1, "vocab_size": 1000, "max_positions": 2048, "ranks": (rank,),
        "structure": structure(tiny_graph("AF", hidden_size=512)),
    }  # fmt: skip
    return CheckpointManifest(**{**known, **changes})


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_memory_by_hand(dtype: str, itemsize: int) -> None:
    settings = BuildSettings(max_batch_size=4, max_seq_len=9999, max_num_tokens=256)
    (memory,) = memory_per_gpu(manifest_with(dtype=dtype), settings)
    assert memory.weights == 10
    assert memory.kv_cache == 4 * 2048 * 100
    assert memory.activations == itemsize * 256 * (4096 + 3 * 512) + 4 * 4 * 1000
    assert memory.total == memory.weights + memory.kv_cache + memory.activations


@pytest.mark.parametrize("settings", [{"max_batch_size": 0}, {"workers": 0}, {"low_latency": True}])
def test_settings_that_do_not_fit(settings: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        build_command(Path("in"), Path("out"), manifest_with(), BuildSettings(**settings))


# --- what is missing


def pretend(monkeypatch: pytest.MonkeyPatch, version: str | None, *, program: str | None, gpus: int) -> None:
    def found(name: str) -> str:
        if version is None or name != "tensorrt_llm":
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setattr(tensorrt_llm.shutil, "which", lambda name: program)
    monkeypatch.setattr(tensorrt_llm, "_gpus", lambda: ["NVIDIA H100 80GB HBM3"] * gpus)


@pytest.mark.parametrize(
    ("version", "program", "gpus", "words"),
    [
        (None, "x", 8, ["not installed", "pip install tensorrt_llm==1.2.1", "release:1.2.1"]),
        ("1.0.0", "x", 8, ["1.0.0", "1.1 and 1.2", "pip install"]),
        ("1.3.0rc22", "x", 8, ["1.3.0rc22", "export --to hf"]),
        ("1.2.1", None, 8, ["trtllm-build is not on the PATH"]),
        ("1.2.1", "x", 0, ["no NVIDIA GPU"]),
        ("1.1.0", "x", 1, []),
        ("1.2.1", "x", 8, []),
    ],
)
def test_missing(
    version: str | None, program: str | None, gpus: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, version, program=program, gpus=gpus)
    problems = TensorRtLlm().missing()
    assert len(problems) == bool(words)
    for word in words:
        assert word in problems[0]


def test_command_line(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_folder(model, hf.emit(PLAIN, hf.Options()), kind="checkpoint", details={})
    export = ["export", model, "--to", "trtllm", "--tp", 2, "-o", tmp_path / "checkpoint"]
    result = call(*export, "--dry-run", "--list-tensors", "--format", "fp8", "--kv-cache", "int8")
    assert result.exit_code == 0, result.output
    assert "rank1.safetensors  transformer.layers.1.ffn.proj.weights_scaling_factor  float32[1]" in result.output
    assert "kv_cache_rcp_scaling_factor" in result.output
    assert "needs calibration" in call(*export, "--format", "fp8").output
    assert call(*export, "--format", "int8-smoothquant", "--calibration", model).exit_code == 2
    assert call(*export, "--kv-cache", "fp8").exit_code == 2
    assert call(*export, "--format", "fp8-rowwise").exit_code == 0
    engine = ["engine", tmp_path / "checkpoint", "-o", tmp_path / "engine"]
    result = call(*engine, "--backend", "tensorrt-llm", "--dry-run", "--max-batch", 2)
    assert result.exit_code == 0, result.output
    assert "--max_batch_size 2" in result.output
    assert call(*engine, "--dry-run").exit_code == 2  # another backend
    result = call(*engine, "--backend", "tensorrt-llm")
    assert (result.exit_code, "not installed" in result.output) == (2, True)
    assert not (tmp_path / "engine").exists()


# --- building, with a stand-in for trtllm-build

# Its first lines are a shell's, as pip writes them where an interpreter's path has spaces.
SCRIPT = """#!/bin/sh
'''exec' '{python}' "$0" "$@"
' '''
import json, os, py_compile, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if os.environ.get("FAIL"):
    sys.exit(3)
if "--model_cls_file" in options and not sys.dont_write_bytecode:
    py_compile.compile(options["--model_cls_file"])  # as an import would
mapping = json.load(open(os.path.join(options["--checkpoint_dir"], "config.json")))["mapping"]
for rank in range(mapping["world_size"]):
    open(os.path.join(options["--output_dir"], f"rank{{rank}}.engine"), "wb").write(b"engine")
with open(os.path.join(options["--output_dir"], "config.json"), "w") as config:
    json.dump({{"argv": sys.argv, "path": os.environ.get("PYTHONPATH")}}, config)
"""


@pytest.fixture
def toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "trtllm-build"
    program.parent.mkdir()
    program.write_text(SCRIPT.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    pretend(monkeypatch, "1.2.1", program=str(program), gpus=2)


@pytest.mark.usefixtures("toolchain")
def test_build(tmp_path: Path) -> None:
    folder = checkpoint(tiny_graph("AF (AF AF)"), tmp_path / "checkpoint", tp_size=4)
    engine = TensorRtLlm(BuildSettings(max_batch_size=3)).build(folder, tmp_path / "engine", label="two", force=False)
    assert {path.name for path in engine.iterdir()} == {
        "config.json", "engine.json", "models.py", "fuselage.manifest.json", *(f"rank{r}.engine" for r in range(4)),
    }  # fmt: skip
    seen = json.loads((engine / "config.json").read_text())
    assert seen["path"].split(":")[0] == str(folder)
    manifest = read_engine_manifest(engine)
    assert (manifest.backend, manifest.label, manifest.max_positions) == ("tensorrt-llm", "two", 512)
    assert manifest.options["command"] == ["trtllm-build", *seen["argv"][1:]]
    assert seen["argv"][seen["argv"].index("--workers") + 1] == "2"  # the GPUs that there are
    assert manifest.kv_bytes_per_token == 4 * 3 * 2 * 1 * 16 * 2  # ranks, layers, k and v, heads, size, bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "checkpoint", "engine"]
    one_by_one = TensorRtLlm(BuildSettings(workers=1)).build(folder, tmp_path / "a" / "b", label=None, force=False)
    command = read_engine_manifest(one_by_one).options["command"]
    assert command[command.index("--workers") + 1] == "1"
    with pytest.raises(EngineError, match="bench"):
        TensorRtLlm().open(engine, threads=None)
    module, *options = python_worker(engine, manifest, 4, [0])[2:]
    assert (module, options) == ("engines.tensorrt_llm_worker", [str(engine), "--threads", "4", "--cpus", "0"])


RECIPE = """
model: model
network: {to: trtllm, tp: 2}
engine: {max_batch: 3}
variants:
  - name: plain
  - {name: parallel, plan: {parallel: [[0, 1]]}, checkpoint: false}
bench: null
"""


@pytest.mark.usefixtures("toolchain")
def test_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "model", hf.emit(tiny_graph("AF AF AF"), hf.Options()), kind="checkpoint", details={})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "recipe.yaml", BACKENDS)
    made: list[str] = []
    run_recipe(recipe, tmp_path / "out", notify=lambda step, now: made.append(step) if now else None)
    assert made == ["plain: network", "plain: engine", "parallel: network", "parallel: engine"]
    manifest = read_engine_manifest(tmp_path / "out" / "parallel" / "engine")
    assert "--model_cls_name" in manifest.options["command"]
    assert manifest.options["command"][manifest.options["command"].index("--max_batch_size") + 1] == "3"
    run_recipe(recipe, tmp_path / "out", notify=lambda step, now: made.append(step) if now else None)
    assert len(made) == 4
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("max_batch: 3", "max_batch: 4"))
    run_recipe(read_recipe(tmp_path / "recipe.yaml", BACKENDS), tmp_path / "out")
    manifest = read_engine_manifest(tmp_path / "out" / "parallel" / "engine")
    assert manifest.options["command"][manifest.options["command"].index("--max_batch_size") + 1] == "4"
    pretend(monkeypatch, None, program=None, gpus=0)
    with pytest.raises(EngineError, match="not installed"):
        run_recipe(recipe, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.usefixtures("toolchain")
@pytest.mark.parametrize("case", ["status", "altered", "no checkpoint", "full disk"])
def test_a_build_that_fails_leaves_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(PLAIN, tmp_path / "checkpoint")
    words = {"status": "status 3", "altered": "altered", "no checkpoint": "another kind", "full disk": "disk space"}[
        case
    ]
    if case == "full disk":
        weight_bytes = sum(rank.weight_bytes for rank in read_checkpoint_manifest(folder).ranks)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=weight_bytes - 1))
    elif case == "status":
        monkeypatch.setenv("FAIL", "1")
    elif case == "altered":
        content = bytearray((folder / "rank0.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "rank0.safetensors").write_bytes(content)
    else:
        folder = tmp_path / "model"
        save_folder(folder, hf.emit(PLAIN, hf.Options()), kind="checkpoint", details={})
    with pytest.raises(FuselageError, match=words):
        TensorRtLlm().build(folder, tmp_path / "engines" / "plain", label=None, force=False)
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("content", [{}, {"checkpoint_schema": 2}, {"checkpoint_schema": 1}])
def test_a_manifest_that_is_not_ours(content: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        read_checkpoint_manifest(tmp_path)


# --- running, with a stand-in for tensorrt_llm.bindings.executor


def test_the_worker_is_pinned_before_it_opens_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Any] = []
    monkeypatch.setattr("engines.tensorrt_llm_worker.pin", pinned.append)
    monkeypatch.setattr("engines.tensorrt_llm_worker.reporting", lambda work: work(print))
    with pytest.raises(CheckpointError, match="no such"):
        main([str(tmp_path / "engine"), "--threads", "4", "--cpus", "0,1"])
    assert pinned == [(0, 1)]


class Clock:
    """Every look at it takes a millisecond."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 10**6
        return self.now


class FakeExecutor:
    """Streams `tokens_per_response` tokens of every request in turn; what is not streamed comes as a whole."""

    def __init__(self, model_path: str, model_type: str, executor_config: Any) -> None:
        self.arguments = (model_path, model_type, executor_config)
        self.left: dict[int, int] = {}
        self.prompts: list[list[int]] = []
        self.tokens_per_response, self.error, self.missing_tokens = 1, False, 0

    def enqueue_request(self, request: Any) -> int:
        self.prompts.append(request.input_token_ids)
        self.left[len(self.prompts)] = request.max_tokens - self.missing_tokens
        self.is_streaming = request.streaming
        return len(self.prompts)

    def await_responses(self, request_id: int) -> list[Any]:
        left = self.left[request_id]
        count = min(self.tokens_per_response, left) if self.is_streaming else left
        self.left[request_id] -= count
        result = types.SimpleNamespace(output_token_ids=[[1] * count], is_final=not self.left[request_id])
        return [types.SimpleNamespace(result=result, has_error=lambda: self.error, error_msg="out of memory")]


def record(name: str, *fields: str) -> Any:
    """A class of the bindings that keeps what it was made with, and takes nothing else."""

    def __init__(self: Any, *arguments: Any, **keywords: Any) -> None:
        named = dict(zip(fields, arguments, strict=False))
        assert set(keywords) <= set(fields) - set(named), f"{name} does not take {keywords}"
        self.__dict__.update(dict.fromkeys(fields) | named | keywords)

    return type(name, (), {"__init__": __init__})


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("tensorrt_llm.bindings.executor")
    module.__dict__.update(
        Executor=FakeExecutor,
        ExecutorConfig=record("ExecutorConfig", "max_beam_width", "max_batch_size", "kv_cache_config"),
        KvCacheConfig=record("KvCacheConfig", "enable_block_reuse", "max_tokens", "free_gpu_memory_fraction"),
        ParallelConfig=record("ParallelConfig", "type", "mode", "device_ids", "participant_ids", "orchestrator_config"),
        OrchestratorConfig=record("OrchestratorConfig", "is_orchestrator", "worker_executable_path"),
        Request=record("Request", "input_token_ids", "max_tokens", "streaming"),
        ModelType=types.SimpleNamespace(DECODER_ONLY="decoder"),
        CommunicationType=types.SimpleNamespace(MPI="mpi"),
        CommunicationMode=types.SimpleNamespace(LEADER="leader", ORCHESTRATOR="orchestrator"),
    )
    package, parent = types.ModuleType("tensorrt_llm"), types.ModuleType("tensorrt_llm.bindings")
    package.__file__ = "/site/tensorrt_llm/__init__.py"
    package.bindings, parent.executor = parent, module  # type: ignore[attr-defined]
    for one in (package, parent, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    return module


def engine_manifest(world_size: int) -> EngineManifest:
    return EngineManifest(
        backend="tensorrt-llm", runtime={}, machine={}, label="x", network_file="config.json", network_sha256="0",
        dtype="bfloat16", vocab_size=100, max_positions=64, capacity=None, cache=(), kv_bytes_per_token=1,
        weight_bytes=1, structure=structure(PLAIN), options={"world_size": world_size, "max_batch_size": 2},
    )  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 8])
def test_executor(world_size: int, bindings: Any) -> None:
    executor = open_executor(Path("/engine"), engine_manifest(world_size))
    path, kind, config = executor.arguments
    assert (path, kind, config.kv_cache_config.enable_block_reuse) == ("/engine", "decoder", False)
    if world_size == 1:
        assert not hasattr(config, "parallel_config")
    else:
        assert config.parallel_config.mode == "orchestrator"
        worker = config.parallel_config.orchestrator_config.worker_executable_path
        assert worker == "/site/tensorrt_llm/bin/executorWorker"


def test_every_token_is_timed(bindings: Any) -> None:
    executor = FakeExecutor("", "", None)
    input_ids = token_ids(2, 5, vocab_size=100, seed=1)
    sample = timed_request(executor, input_ids, 4, clock_ns=Clock())
    assert executor.prompts == input_ids.tolist()
    # Two responses per step, a millisecond each; the step is over with the second.
    assert (sample.ttft_ms, sample.step_ms, sample.request_ms) == (2.0, (2.0, 2.0, 2.0), 8.0)
    executor.tokens_per_response = 3  # they can come late and together
    sample = timed_request(executor, input_ids, 4, clock_ns=Clock())
    assert (sample.ttft_ms, sample.step_ms, sample.request_ms) == (2.0, (0.0, 0.0, 2.0), 4.0)


@pytest.mark.parametrize(("field", "value", "words"), [
    ("error", True, "out of memory"), ("missing_tokens", 1, "another number of tokens"),
])  # fmt: skip
def test_an_executor_that_fails(field: str, value: Any, words: str, bindings: Any) -> None:
    executor = FakeExecutor("", "", None)
    setattr(executor, field, value)
    with pytest.raises(EngineError, match=words):
        timed_request(executor, token_ids(1, 5, vocab_size=100, seed=1), 4)


def test_the_worker_speaks_the_protocol(bindings: Any) -> None:
    lines = [Run(batch=2, input_len=3, output_len=2, seed=7).model_dump_json(), Close().model_dump_json()]
    sent: list[Any] = []
    serve(FakeExecutor("", "", None), engine_manifest(1), lines, sent.append)
    assert [type(message) for message in sent] == [Sample, Closed]
    assert len(sent[0].step_ms) == 1
    with pytest.raises(EngineError, match="fewer sequences"):
        serve(FakeExecutor("", "", None), engine_manifest(1), [lines[0].replace('"batch":2', '"batch":3')], sent.append)


EXECUTOR = """
class Anything:
    def __init__(self, *arguments, **keywords):
        self.__dict__.update(keywords)
    def __getattr__(self, name):
        raise AttributeError(name)

ExecutorConfig = KvCacheConfig = Request = Result = Response = Anything

class ModelType:
    DECODER_ONLY = 0

class Executor:
    def __init__(self, model_path, model_type, executor_config):
        self.left = {}
    def enqueue_request(self, request):
        self.left[len(self.left)] = request.max_tokens
        return len(self.left) - 1
    def await_responses(self, request_id):
        self.left[request_id] -= 1
        result = Result(output_token_ids=[[7]], is_final=self.left[request_id] == 0)
        return [Response(result=result, has_error=lambda: False)]
    def shutdown(self):
        pass
"""


@pytest.mark.usefixtures("toolchain")
def test_a_benchmark_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    (site / "tensorrt_llm" / "bindings").mkdir(parents=True)
    (site / "tensorrt_llm" / "__init__.py").touch()
    (site / "tensorrt_llm" / "bindings" / "__init__.py").touch()
    (site / "tensorrt_llm" / "bindings" / "executor.py").write_text(EXECUTOR)
    (site / "tensorrt_llm-1.2.1.dist-info").mkdir()
    (site / "tensorrt_llm-1.2.1.dist-info" / "METADATA").write_text("Name: tensorrt_llm\nVersion: 1.2.1\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    engine = TensorRtLlm().build(checkpoint(PLAIN, tmp_path / "in"), tmp_path / "engine", label="x", force=False)
    results = bench_engines([engine], [RequestShape(2, 3, 4)], rounds=2, warmup=1)
    (described,), (cell,) = results.engines, results.cells
    assert (described.backend, described.device) == ("tensorrt-llm", "NVIDIA H100 80GB HBM3")
    assert described.runtime == {"tensorrt_llm": "1.2.1"}
    assert [len(steps) for steps in cell.step_ms] == [3, 3]


# --- trtllm-bench

REPORT = {
    "engine": {"model": "m", "model_path": "p", "engine_dir": "e", "version": "1.2.1", "backend": "TRT",
               "dtype": "bfloat16", "kv_cache_dtype": "FP8", "quantization": "FP8", "max_input_length": 1024},
    "machine": {"name": "NVIDIA H100 80GB HBM3", "memory.total": 79.1, "clocks.mem": 2.6},
    "world_info": {"tp_size": 4, "pp_size": 2, "ep_size": None, "world_size": 8, "max_batch_size": 1},
    "request_info": {"num_requests": 2, "avg_num_concurrent_requests": 1.0, "avg_input_length": 128.0},
    "performance": {"total_latency_ms": 50.0},
    "streaming_metrics": {"avg_ttft_ms": 6.0},
}  # fmt: skip
REQUESTS = [
    {"id": 1, "num_input_tokens": 128, "output_tokens": 3, "start_timestamp": 10**9,
     "end_timestamp": 10**9 + 25 * 10**6, "time_to_first_token": 5 * 10**6, "output": "text"},
    {"id": 2, "num_input_tokens": 128, "output_tokens": 3, "start_timestamp": 2 * 10**9,
     "end_timestamp": 2 * 10**9 + 27 * 10**6, "time_to_first_token": 7 * 10**6, "output": "text"},
]  # fmt: skip


def converted(tmp_path: Path, report: Any = REPORT, requests: Any = REQUESTS, model: Path | None = None) -> Results:
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    if model is None:
        model = tmp_path / "model"
        save_folder(model, hf.emit(PLAIN, hf.Options()), kind="checkpoint", details={})
    return results_from_trtllm_bench(
        tmp_path / "report.json", tmp_path / "requests.json", model, label="fused", warmup=2
    )


def test_conversion(tmp_path: Path) -> None:
    results = converted(tmp_path)
    results = results_from_json(json_from_results(results))
    (engine,), (cell,) = results.engines, results.cells
    assert (results.environment.seed, results.environment.warmup_rounds) == (None, 2)  # its prompts are not ours
    assert (engine.backend, engine.device, engine.number_format) == ("tensorrt-llm", "8 x NVIDIA H100 80GB HBM3", "FP8")
    assert engine.kv_bytes_per_token == 2 * 2 * 16  # k and v of two heads of 16, a byte each
    assert (cell.shape, cell.ttft_ms, cell.request_ms, cell.step_ms) == ((1, 128, 3), (5.0, 7.0), (25.0, 27.0), ())
    found = statistics(cell)
    assert found.inter_token_ms is not None
    assert (found.inter_token_ms.median, found.step_p50_ms) == (10.0, None)
    assert found.output_tokens_per_s_per_user == 100.0
    (tmp_path / "a.json").write_bytes(json_from_results(results))
    files = dict(report_from_results([tmp_path / "a.json"], baseline=None))
    assert "report.html" in files
    assert "- Seed of the input tokens: not known\n" in files["report.md"].decode()


def test_the_pytorch_backend_says_so(tmp_path: Path) -> None:
    report = {**REPORT, "engine": {**REPORT["engine"], "backend": "Pytorch", "version": "1.3.0"}}
    assert converted(tmp_path, report).engines[0].backend == "tensorrt-llm (pytorch)"


@pytest.mark.usefixtures("toolchain")
def test_conversion_of_what_ran_in_an_engine(tmp_path: Path) -> None:
    folder = TensorRtLlm().build(checkpoint(PLAIN, tmp_path / "in"), tmp_path / "engine", label="x", force=False)
    (engine,), manifest = converted(tmp_path, model=folder).engines, read_engine_manifest(folder)
    assert engine.engine_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert (engine.weight_bytes, engine.network_sha256) == (manifest.weight_bytes, manifest.network_sha256)
    assert (engine.label, engine.kv_bytes_per_token) == ("fused", manifest.kv_bytes_per_token)


def test_conversion_needs_no_weights_and_counts_no_single_gpu(tmp_path: Path) -> None:
    save_folder(tmp_path / "whole", hf.emit(PLAIN, hf.Options()), kind="checkpoint", details={})
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "bare")
    report = {**REPORT, "world_info": {"tp_size": 1, "pp_size": 1}}
    (engine,) = converted(tmp_path, report, model=tmp_path / "bare").engines
    assert (engine.device, engine.weight_bytes) == ("NVIDIA H100 80GB HBM3", PLAIN.weight_bytes)


@pytest.mark.parametrize(
    ("report", "requests", "words"),
    [
        ({**REPORT, "request_info": {"num_requests": 2, "avg_num_concurrent_requests": 8.0}}, REQUESTS, "overlapped"),
        (REPORT, REQUESTS[:1], "different runs"),
        (REPORT, [REQUESTS[0], {**REQUESTS[1], "time_to_first_token": 27 * 10**6}], "--streaming"),
        (REPORT, [{**one, "output_tokens": 1, "end_timestamp": 1} for one in REQUESTS], "times that no request has"),
        (
            REPORT,
            [{**one, "time_to_first_token": 0} for one in REQUESTS],
            "time_to_first_token: Input should be greater",
        ),
        (REPORT, [{"id": 1}, {"id": 2}], "not what trtllm-bench writes"),
        ({"engine": {}}, REQUESTS, "not what trtllm-bench writes"),
    ],
)
def test_what_cannot_be_converted(report: Any, requests: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        converted(tmp_path, report, requests)
    assert words in str(error.value)
