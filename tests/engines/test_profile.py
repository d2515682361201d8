"""Profiles: which sublayer a node belongs to, what two profilers' documents say, and that no time is dropped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from engines.base import ENGINE_FILE, read_engine_manifest
from engines.bench import bench_engines, request_grid
from engines.onnxruntime import OnnxRuntime
from engines.onnxruntime_profile import profiles_of_calls
from engines.profile import Execution, Place, Profile, attention_blocks, place_of, place_of_all, profile_of
from engines.profile_worker import REQUESTS
from engines.profiling import profile_engine, profiler_problems
from engines.results import RequestShape, json_from_results, results_from_json
from engines.tensorrt_profile import layer_kernels, nodes_in_name, profile_requests
from exporter.errors import EngineError
from exporter.graph import ModelGraph, structure
from exporter.writers import onnx as writer
from exporter.writers.files import save_folder
from tests.tiny import tiny_graph

SLOTS = (0, 3)
PLACES: dict[str, Place] = {
    "blocks.0.attention.qkv_proj": Place("attention", 0),
    "blocks.12.attention.attention/Fused": Place("attention", 12),
    "blocks.3.ffn.activation/QuickGeluFusion/": Place("ffn", 3),
    "blocks.3.ffn.residual": Place("ffn", 3),
    "blocks.3.ffn.norm": Place("norm", 3),
    "blocks.3.attention.norm.weight.cast": Place("norm", 3),
    "blocks.3.attention.q_norm": Place("attention", 3),
    "blocks.3.ffnx": Place("other"),
    "present_k_1": Place("attention", 3),
    "present_v_2": Place("other"),  # there is no such slot
    "embedding": Place("embedding"),
    "embedding.cast": Place("embedding"),
    "norm": Place("norm"),
    "logits.rows": Place("lm_head"),
    "lm_head/MatMulAddFusion": Place("lm_head"),
    "mask": Place("other"),
    "val_24_q": Place("other"),
    "normal": Place("other"),
    "": Place("other"),
    "blocks.99999999999999999999.ffn": Place("other"),
}


@pytest.mark.parametrize(("node", "place"), PLACES.items())
def test_place_of_a_node(node: str, place: Place) -> None:
    assert place_of(node, SLOTS) == place


TOGETHER: dict[str, tuple[list[str], Place]] = {
    "one": (["blocks.0.ffn.gate_proj"], Place("ffn", 0)),
    "of one sublayer": (["blocks.0.ffn.gate_proj", "blocks.0.ffn.up_proj"], Place("ffn", 0)),
    "with the norm behind": (["blocks.0.attention.o_proj", "blocks.0.ffn.norm"], Place("attention", 0)),
    "with the residual before": (["blocks.0.attention.residual", "blocks.0.ffn.gate_proj"], Place("ffn", 0)),
    "residual and norm": (["blocks.0.attention.residual", "blocks.0.ffn.norm"], Place("attention", 0)),
    "of two sublayers": (["blocks.0.ffn.down_proj", "blocks.1.ffn.gate_proj"], Place("other")),
    "with something unknown": (["myl_7", "blocks.2.ffn.up_proj"], Place("ffn", 2)),
    "a norm with something unknown": (["myl_7", "blocks.2.ffn.norm"], Place("norm", 2)),
    "unknown": (["myl_7"], Place("other")),
    "nothing": ([], Place("other")),
}


@pytest.mark.parametrize(("nodes", "place"), TOGETHER.values(), ids=TOGETHER.keys())
def test_place_of_fused_nodes(nodes: list[str], place: Place) -> None:
    assert place_of_all(nodes, SLOTS) == place


def graph() -> ModelGraph:
    return tiny_graph("AF F (AF F) - LF A", num_key_value_heads=(1, 2, 4))


def test_nodes_of_a_network_belong_to_their_blocks() -> None:
    """The products of every block, from the graph alone."""
    made = graph()
    files = dict(writer.emit(made, writer.options_for({"tensorrt": None}, max_positions=64)))
    nodes = onnx.load_model_from_string(files["tensorrt.onnx"]).graph.node
    slots = attention_blocks(structure(made))
    assert slots == (0, 2, 6)
    products = Counter(place_of(node.name, slots) for node in nodes if node.op_type == "Gemm")
    expected = {Place("attention", block): 4 for block in slots} | {Place("attention", 5): 1}
    expected |= {Place("ffn", block): 3 for block in (0, 1, 2, 3, 5)} | {Place("lm_head"): 1}
    assert products == expected
    caches = Counter(place_of(node.name, slots) for node in nodes if node.op_type == "TensorScatter")
    assert caches == {Place("attention", block): 2 for block in slots}
    norms = Counter(place_of(node.name, slots).kind for node in nodes if node.op_type == "RMSNormalization")
    assert norms == {"norm": 4 + 5 + 1}


def profiled(calls: list[tuple[float, list[Execution]]]) -> Profile:
    return profile_of(calls, phase="decode", batch=1, tokens=1, position=8, profiler="test")


def times_of(profile: Profile) -> dict[tuple[str, int | None, str], tuple[float, int]]:
    return {(kernel.kind, kernel.block, kernel.name): (kernel.time_us, kernel.executions) for kernel in profile.kernels}


FFN, HEAD = Place("ffn", 0), Place("lm_head")
QUIET = [
    Execution(FFN, "Gemm", 3.0),
    Execution(FFN, "Gemm", 2.0),
    Execution(FFN, "Mul", 0.25),
    Execution(HEAD, "Gemm", 1.5),
]


def interrupted(kernel: int | None, by: float) -> tuple[float, list[Execution]]:
    """A call that takes 3 us between its kernels; what interrupts it comes in one of them, or between them."""
    executions = [
        replace(execution, time_us=execution.time_us + by) if index == kernel else execution
        for index, execution in enumerate(QUIET)
    ]
    return 3.0 + by + sum(execution.time_us for execution in QUIET), executions


def test_what_interrupts_single_calls_is_in_no_kernel() -> None:
    """Every call is interrupted, each elsewhere: there is no quiet one to choose, and yet the profile is of one."""
    profile = profiled([interrupted(kernel, 1000.0) for kernel in (0, 1, 2, 3, None)])
    assert times_of(profile) == {
        ("ffn", 0, "Gemm"): (5.0, 2),
        ("ffn", 0, "Mul"): (0.25, 1),
        ("lm_head", None, "Gemm"): (1.5, 1),
        ("between", None, "between kernels"): (3.0, 1),
    }
    assert (profile.total_us, profile.calls, profile.summary) == (9.75, 5, "kernel_medians")
    with pytest.raises(ValidationError, match="the kernels take"):
        Profile.model_validate({**profile.model_dump(), "total_us": 11.0})


@pytest.mark.parametrize("calls", [1, 2, 7, 8])
def test_each_execution_has_its_median(calls: int) -> None:
    times = np.random.default_rng(calls).exponential(size=(calls, len(QUIET)))
    gaps = np.linspace(0.5, 2.0, calls)
    profile = profiled(
        [
            (gap + sum(row), [replace(execution, time_us=time) for execution, time in zip(QUIET, row, strict=True)])
            for row, gap in zip(times.tolist(), gaps.tolist(), strict=True)
        ]
    )
    first, second, mul, head = np.median(times, axis=0)
    assert {key: time for key, (time, _) in times_of(profile).items()} == pytest.approx(
        {
            ("ffn", 0, "Gemm"): first + second,
            ("ffn", 0, "Mul"): mul,
            ("lm_head", None, "Gemm"): head,
            ("between", None, "between kernels"): np.median(gaps),
        }
    )


def test_a_kernel_that_did_not_run_took_no_time() -> None:
    twice, once = [Execution(FFN, "Gemm", 4.0), Execution(FFN, "Gemm", 2.0)], [Execution(FFN, "Gemm", 4.0)]
    for second, calls in ((2.0, [twice, twice, once]), (1.0, [twice, once]), (0.0, [once, twice, once])):
        profile = profiled([(sum(execution.time_us for execution in call), call) for call in calls])
        assert times_of(profile) == {("ffn", 0, "Gemm"): (4.0 + second, 2)}


# --- ONNX Runtime


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    options = writer.options_for({"onnxruntime": None}, max_positions=64)
    save_folder(folder / "network", writer.emit(graph(), options), kind=writer.KIND, details={})
    return OnnxRuntime().build(folder / "network", folder / "engine", label="tiny", force=False)


def test_profiles_of_an_engine(engine: Path) -> None:
    """In a process of its own; every attention and every product ran, in its block, in prefill and in decode."""
    manifest = read_engine_manifest(engine)
    found = profile_engine(engine, manifest, RequestShape(2, 8, 4), threads=1, cpus=None, seed=0)
    assert [(p.phase, p.batch, p.tokens, p.position, p.calls) for p in found] == [
        ("prefill", 2, 8, 0, REQUESTS),
        ("decode", 2, 1, 8, 3 * REQUESTS),
    ]
    for profile in found:
        attentions = {k.block: k.executions for k in profile.kernels if k.name == "Attention"}
        assert attentions == {0: 1, 2: 1, 6: 1}
        products = {(k.kind, k.block): k.executions for k in profile.kernels if k.name == "Gemm"}
        expected: dict[tuple[str, int | None], int] = {("attention", block): 2 for block in (0, 2, 6)}
        expected |= {("attention", 5): 1, ("lm_head", None): 1} | {("ffn", block): 2 for block in (0, 1, 2, 3, 5)}
        assert products == expected
        assert [k.name for k in profile.kernels if k.kind == "between"] == ["between kernels"]


def test_a_benchmark_with_profiles(engine: Path) -> None:
    """They are of the grid's first shape, and stay in the results file; one without them is what it was."""
    grid = request_grid([1], [6, 12], [3])
    results = bench_engines([engine], grid, rounds=1, warmup=0, threads=1, profile=True)
    [timed] = results.engines
    assert [(p.phase, p.tokens, p.position) for p in timed.profiles] == [("prefill", 6, 0), ("decode", 1, 6)]
    document = json_from_results(results)
    assert results_from_json(document, file="results.json") == results
    older = json.loads(document)
    for profile in older["engines"][0]["profiles"]:
        assert profile.pop("summary") == "kernel_medians"
    found = results_from_json(json.dumps(older).encode(), file="older.json").engines[0].profiles
    assert [profile.summary for profile in found] == ["median_call", "median_call"]
    del older["engines"][0]["profiles"]
    assert results_from_json(json.dumps(older).encode(), file="oldest.json").engines[0].profiles == ()


def test_one_token_has_no_decode(engine: Path) -> None:
    manifest = read_engine_manifest(engine)
    [profile] = profile_engine(engine, manifest, RequestShape(1, 4, 1), threads=1, cpus=None, seed=0)
    assert profile.phase == "prefill"


def test_what_cannot_be_profiled(engine: Path, tmp_path: Path) -> None:
    manifest = read_engine_manifest(engine)
    [problem] = profiler_problems(["onnxruntime", "tensorrt-llm", "tensorrt-llm"])
    assert "expected onnxruntime or tensorrt, found tensorrt-llm" in str(problem)
    other = shutil.copytree(engine, tmp_path / "other")
    changed = manifest.model_copy(update={"backend": "tensorrt-llm"}).model_dump_json()
    (other / ENGINE_FILE).write_text(changed)
    with pytest.raises(EngineError, match="cannot be profiled"):
        bench_engines([other], request_grid([1], [4], [2]), profile=True)
    with pytest.raises(EngineError, match="profiling 'tiny' failed"):
        profile_engine(tmp_path / "nothing", manifest, RequestShape(1, 4, 1), threads=1, cpus=None, seed=0)
    gone = manifest.model_copy(update={"backend": "gone"})  # which the program refuses before it can say so in JSON
    with pytest.raises(EngineError, match=r"(?s)ended with status 2.*invalid choice"):
        profile_engine(engine, gone, RequestShape(1, 4, 1), threads=1, cpus=None, seed=0)


def test_an_interrupt_leaves_nothing(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # where it was

    def interrupt() -> None:
        while not list(tmp_path.rglob("profile*")):  # which ONNX Runtime's profiler writes, in the other process
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        profile_engine(engine, read_engine_manifest(engine), RequestShape(1, 4, 4), threads=1, cpus=None, seed=0)
    thread.join()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def event(name: str, ts: int, dur: int, op: str | None = None) -> dict[str, Any]:
    category = {"cat": "Session"} if op is None else {"cat": "Node", "args": {"op_name": op}}
    return {"name": name, "ts": ts, "dur": dur, **category}


def test_a_profile_file(tmp_path: Path) -> None:
    """Events in any order; those of calls that do not count, and those that are no kernel's, are left out."""
    events = [
        event("session_initialization", 0, 90),
        event("model_run", 300, 50),
        event("blocks.1.ffn.up_proj_kernel_time", 310, 30, "Gemm"),
        event("model_run", 100, 80),
        event("mask_kernel_time", 110, 60, "LessOrEqual"),
        event("mask_fence_before", 105, 5, "LessOrEqual"),
        event("model_run", 200, 40),
        event("lm_head_kernel_time", 205, 35, "Gemm"),
    ]
    (tmp_path / "profile.json").write_text(json.dumps(events))
    prefill, decode = profiles_of_calls(
        tmp_path / "profile.json", [None, "prefill", "decode"], batch=1, input_len=5, slot_blocks=()
    )
    assert [(k.kind, k.block, k.name, k.time_us) for k in prefill.kernels] == [
        ("lm_head", None, "Gemm", 35.0),
        ("between", None, "between kernels", 5.0),
    ]
    assert [(k.kind, k.block, k.time_us) for k in decode.kernels] == [("ffn", 1, 30.0), ("between", None, 20.0)]
    assert (prefill.tokens, prefill.position, decode.tokens, decode.position) == (5, 0, 1, 5)
    with pytest.raises(EngineError, match="expected 1, found 3"):
        profiles_of_calls(tmp_path / "profile.json", ["prefill"], batch=1, input_len=5, slot_blocks=())


# --- TensorRT, whose documents and classes are made up in the documented form

INSPECTED = json.dumps(
    {
        "Layers": [
            {
                "Name": "__myl_Fused_0",
                "LayerType": "kgen",
                "TacticName": "__myl_CastMulMea_0",
                "Metadata": "[ONNX Layer: blocks.0.attention.residual]\u001f[ONNX Layer: blocks.0.ffn.norm]",
            },
            {
                "Name": "gemm_1",
                "LayerType": "gemm",
                "TacticName": "sm90_xmma_gemm",
                "Metadata": "[ONNX Layer: blocks.0.ffn.gate_proj]\u001f"
                "[ONNX Layer: blocks.0.ffn.up_proj | Local Function: FusedLinear]",
            },
            {"Name": "blocks.0.attention.q_proj + blocks.0.attention.k_proj", "LayerType": "gemm"},
            {"Name": "{ForeignNode[blocks.1.ffn.norm...lm_head]}", "LayerType": "Myelin"},
        ],
        "Bindings": [],
    }
)


def test_layers_of_an_engine() -> None:
    kernels = layer_kernels(INSPECTED)
    assert kernels["gemm_1"] == (("blocks.0.ffn.gate_proj", "blocks.0.ffn.up_proj"), "sm90_xmma_gemm")
    joined = "blocks.0.attention.q_proj + blocks.0.attention.k_proj"
    assert kernels[joined] == (("blocks.0.attention.q_proj", "blocks.0.attention.k_proj"), "gemm")
    assert nodes_in_name("{ForeignNode[blocks.1.ffn.norm...lm_head]}") == ("blocks.1.ffn.norm", "lm_head")
    assert layer_kernels(json.dumps({"Layers": ["lm_head"]})) == {"lm_head": (("lm_head",), "layer")}
    for broken in ("", "{}", "[]", json.dumps({"Layers": [{}]})):
        with pytest.raises(EngineError, match="engine inspector"):
            layer_kernels(broken)


class Trt:
    """The module `tensorrt`, as far as profiles need it."""

    class IProfiler:
        pass


class FakeRunner:
    """A runner whose calls report these layers: in decode as said, in prefill twice, in the first request ten times."""

    def __init__(self, layers: dict[str, float]) -> None:
        self._layers = layers
        self._requests = 0

    def report_layers(self, trt: Any, profiler: Any) -> str:
        assert trt is Trt
        self._profiler = profiler
        return INSPECTED

    def start(self, batch: int, capacity: int) -> None:
        self._requests += 1

    def prefill_greedy(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        assert lengths.tolist() == [4, 4]
        return self._report(2.0)

    def decode_greedy(self, tokens: np.ndarray) -> np.ndarray:
        assert tokens.tolist() == [5, 5]
        return self._report(1.0)

    def _report(self, factor: float) -> np.ndarray:
        for name, ms in self._layers.items():
            self._profiler.report_layer_time(name, factor * ms * (10 if self._requests == 1 else 1))
        return np.array([5, 5])


def profiles_of_runner(layers: dict[str, float], output_len: int) -> tuple[Profile, ...]:
    return profile_requests(
        Trt, FakeRunner(layers), np.zeros((2, 4), np.int64), output_len, requests=2, slot_blocks=(0,)
    )


def test_profiles_of_a_runner() -> None:
    layers = {"__myl_Fused_0": 0.25, "gemm_1": 0.5, "{ForeignNode[a...b]}": 0.125, "lm_head": 0.0625}
    prefill, decode = profiles_of_runner(layers, 4)
    assert {(k.kind, k.block, k.name): k.time_us for k in decode.kernels} == {
        ("attention", 0, "__myl_CastMulMea_0"): 250.0,
        ("ffn", 0, "sm90_xmma_gemm"): 500.0,
        ("other", None, "layer"): 125.0,
        ("lm_head", None, "layer"): 62.5,
    }
    assert (decode.total_us, decode.calls, decode.batch, decode.tokens, decode.position) == (937.5, 6, 2, 1, 4)
    assert (prefill.total_us, prefill.calls, prefill.tokens, prefill.position) == (1875.0, 2, 4, 0)
    assert [profile.phase for profile in profiles_of_runner(layers, 1)] == ["prefill"]


def test_nothing_passes_between_layers() -> None:
    """A call is its layers and no more, in whatever order floating-point numbers are added."""
    for profile in profiles_of_runner({"a": 0.0001, "b": 0.0002, "c": 0.0003}, 2):
        assert {kernel.kind for kernel in profile.kernels} == {"other"}


def test_a_runner_that_reports_nothing() -> None:
    with pytest.raises(EngineError, match="time of no layer"):
        profiles_of_runner({}, 2)
