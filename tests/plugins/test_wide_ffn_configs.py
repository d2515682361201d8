"""Block sizes: the rule's promises, measured ones in a file, and what the tuner would try."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import plugins.wide_ffn.op  # noqa: F401  registers torch.ops.fuselage.wide_ffn
from exporter.errors import EngineError, TargetError
from plugins.wide_ffn import configs, tune
from plugins.wide_ffn.configs import BUCKETS, Config, Norm, Tiling, bucket_of, config_by_rule, config_for, row_of

ROOT = Path(__file__).parents[2]
FORMATS = [("bfloat16", "none"), ("float8_e4m3fn", "static"), ("int8", "static"), ("int8", "token"), ("int8", "none")]
SIZES = [(64, 96), (4096, 14336), (8192, 28672), (16384, 53248), (16384, 425984), (16384, 524288), (4096, 131071)]


# Prints how many kernels tensors without memory compile into Triton's cache, how many more real ones then do, and what
# all were compiled with.
COMPILED_AHEAD = """
import json
import os
from pathlib import Path
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from plugins.wide_ffn import kernels, tune
from plugins.wide_ffn.configs import config_by_rule
from plugins.wide_ffn.launch import wide_ffn_by_kernels

class Hopper:
    get_current_device = get_current_stream = lambda self, device=0: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

def entries():
    return sum(name.endswith(".cubin") for _, _, files in os.walk(knobs.cache.dir) for name in files)

driver.set_active(Hopper())
problem = tune.Problem(2, 256, 512, "float8_e4m3fn", "static")
config = config_by_rule(16, 256, 512, "float8_e4m3fn", "static")
assert tune.compile_config(problem, config) is None
print(ahead := entries())
for kernel in (kernels.norm, kernels.gate_up, kernels.down):
    kernel.device_caches.clear()
    type(kernel).__getitem__ = lambda kernel, grid: lambda *args, **options: kernel.warmup(*args, grid=grid, **options)
wide_ffn_by_kernels(*problem.arguments(torch.device("cpu")), config=config)
print(entries() - ahead)
files = Path(knobs.cache.dir).rglob("[ngd]*.json")
print(*{json.loads(file.read_text()).get("enable_fp_fusion") for file in files} - {None})
"""


@pytest.mark.parametrize("norm", ["before", "inside"])
@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("weights", "activations"), FORMATS)
def test_rule(bucket: int, sizes: tuple[int, int], weights: str, activations: str, norm: Norm) -> None:
    hidden, width = sizes
    config = config_by_rule(bucket, hidden, width, weights, activations, norm)
    assert config.norm == norm
    resident = {16: 3, 32: 2, 64: 1}[bucket]
    tiles = -(-width // config.gate_up.rows)
    assert 1 <= config.programs <= min(132 * resident, tiles)
    assert tiles % config.programs == 0 or tiles // config.programs + 1 == -(-tiles // config.programs)
    assert 1 <= config.splits <= -(-width // config.down.depth)
    if tiles > config.programs and norm == "before":
        assert tiles > 132, "multiprocessors without work"
    item = {"bfloat16": 2}.get(weights, 1)
    x_item = 2 if norm == "inside" or activations == "none" else item
    inner_item = item if activations == "static" else 2
    of_down = config.splits * -(-hidden // config.down.rows)
    for rows, tiling, programs, read_item, rounds in (
        (2 * config.gate_up.rows, config.gate_up, config.programs, x_item, norm == "inside"),
        (config.down.rows, config.down, of_down, inner_item, activations == "token"),
    ):
        assert rows % (16 * tiling.warps) == 0, "the tensor cores take 64 rows per warp group"
        assert rows * bucket <= 64 * 32 * tiling.warps, "sums in registers: at most 64 of each thread"
        stages = tiling.stages - (tiling.warps == 2)  # one of those is in registers
        in_shared_memory = stages * (rows * item + bucket * read_item) * tiling.depth + (bucket * 128 if rounds else 0)
        assert tiling.stages >= 2
        at_once = min({16: 2, 32: 1, 64: 1}[bucket] if rounds else resident, -(-programs // 132))
        assert at_once * (in_shared_memory + 1024) <= 227 << 10, "programs that are to run at once do not fit"
    steps = -(-width // config.down.depth)
    longest = -(-steps // config.splits) * config.down.depth
    if weights == "int8" and activations != "none":
        assert longest * 128 * 128 < 2**31, "a sum of products of codes leaves 32 bits"
    if hidden >= 4096 and config.splits > 1 and weights != "int8":
        assert longest >= 8 * config.down.depth


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64)])
def test_bucket(tokens: int, bucket: int) -> None:
    assert bucket_of(tokens) == bucket


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs._measured.cache_clear()
    yield tmp_path
    configs._measured.cache_clear()


def test_measured_ones_come_first(folder: Path) -> None:
    call = {"hidden": 4096, "width": 14336, "weights": "int8", "activations": "token"}
    rule = config_by_rule(32, **call)
    best = replace(rule, down=Tiling(128, 256, 8, 3), splits=6)
    slower = replace(best, norm="inside", splits=5)
    rows = [row_of(slower, **call) | {"measured": {"us": 2.0}}, row_of(best, **call) | {"measured": {"us": 1.0}}]
    (folder / "sm_90.json").write_text(json.dumps({"schema": 2, "measured": rows}))
    assert config_for(tokens=20, **call) == replace(best, origin="measured")
    assert config_for(tokens=20, **call, norm="inside") == replace(slower, origin="measured")
    (folder / "sm_90.json").write_text(json.dumps({"schema": 2, "measured": rows[1:]}))
    configs._measured.cache_clear()
    assert config_for(tokens=20, **call, norm="inside") == config_by_rule(32, **call, norm="inside")
    assert config_for(tokens=1, **call) == config_by_rule(16, **call)
    assert config_for(tokens=20, **call | {"hidden": 4097}).origin == "rule"


def test_a_file_of_another_schema_is_refused(folder: Path) -> None:
    (folder / "sm_90.json").write_text('{"schema": 1, "measured": []}')
    with pytest.raises(EngineError, match=r"sm_90.json: unknown schema .*: expected 2"):
        config_for(tokens=1, hidden=64, width=64, weights="bfloat16", activations="none")


def test_the_shipped_file_can_be_read() -> None:
    document = json.loads((configs.FOLDER / "sm_90.json").read_text())
    assert all(isinstance(configs._config(row), Config) and row["measured"]["us"] > 0 for row in document["measured"])


def test_a_gpu_machine_needs_torch_and_triton_alone() -> None:
    """And NumPy, for tests: nothing else of what the rest of the project is made of."""
    pytest.importorskip("triton")
    modules = ["op", "reference", "library", "launch", "kernels", "configs", "machine_code", "aot", "tune"]
    imports = "\n".join(f"import plugins.wide_ffn.{name}" for name in modules)
    unwanted = ["pydantic", "onnx", "onnx_ir", "onnxruntime", "ml_dtypes", "safetensors", "rich", "click", "yaml"]
    banned = f"import sys\nsys.modules |= dict.fromkeys({unwanted})\n"
    done = subprocess.run([sys.executable, "-c", banned + imports], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TestTuner:
    @pytest.mark.parametrize(("weights", "activations"), FORMATS)
    @pytest.mark.parametrize("tokens", [1, 64])
    def test_candidates(self, tokens: int, weights: str, activations: str) -> None:
        problem = tune.Problem(tokens, 4096, 131072, weights, activations)
        base = config_by_rule(bucket_of(tokens), 4096, 131072, weights, activations)
        for kernel, other in (("gate_up", "down"), ("down", "gate_up")):
            best = getattr(base, kernel)
            tiles, near = tune.tiles(problem, kernel, best), tune.neighbours(problem, kernel, best)
            assert {(one.rows, one.warps) for one in tiles} > {(best.rows, best.warps)}
            assert {one.depth for one in tiles} == {best.depth}
            assert {(one.rows, one.warps) for one in near} == {(best.rows, best.warps)}
            assert {one.depth for one in near} > {best.depth}
            assert weights != "float8_e4m3fn" or max(one.depth for one in near) == 128
            found = [tune.with_tiling(problem, kernel, base, tiling, 132) for tiling in [*tiles, *near]]
            found += tune.shares(problem, kernel, base, 132)
            assert {getattr(config, other) for config in found} == {getattr(base, other)}
            assert {getattr(config, kernel) for config in found} == {best, *tiles, *near}
            for config in found:
                assert 1 <= config.programs <= 131072 // config.gate_up.rows
                longest = -(-131072 // config.down.depth // config.splits) * config.down.depth
                assert weights != "int8" or activations == "none" or longest * 128 * 128 < 2**31

    @pytest.mark.parametrize(("weights", "activations"), FORMATS)
    def test_arguments(self, weights: str, activations: str) -> None:
        """They are a call of the op, and its numbers are neither zero nor out of range."""
        problem = tune.Problem(3, 64, 96, weights, activations)
        arguments = problem.arguments(torch.device("cpu"))
        y = torch.ops.fuselage.wide_ffn(*arguments)
        assert 0.01 < float((y - arguments[10]).to(torch.float32).std()) < 100
        assert problem.weight_bytes == sum(arguments[i].nbytes for i in (2, 3, 4))

    def test_rows_replace_those_of_the_same_call(self) -> None:
        def row(tokens: int, norm: Norm, us: float) -> dict:
            call = (256, 512, "int8", "token")
            return row_of(config_by_rule(tokens, *call, norm), *call) | {"measured": {"us": us}}

        there = [row(64, "before", 3.0), row(16, "before", 2.0), row(16, "inside", 4.0)]
        document = tune.with_rows({"schema": 2, "measured": there}, [row(16, "before", 1.0)])
        found = [(one["tokens"], one["norm"], one["measured"]["us"]) for one in document["measured"]]
        assert found == [(16, "before", 1.0), (16, "inside", 4.0), (64, "before", 3.0)]

    @pytest.mark.parametrize("norm", ["before", "inside"])
    def test_search(self, monkeypatch: pytest.MonkeyPatch, norm: Norm) -> None:
        """It finds what a made-up cost favours, one choice after the other, of what compiles, fits and is right."""
        launch = pytest.importorskip("plugins.wide_ffn.launch", exc_type=ImportError)
        from triton.runtime.errors import OutOfResources

        timed: list[Config] = []

        def cost(calls: list[partial], replays: int, limit: float = 0.0) -> float:
            config = calls[0].keywords.get("config")
            if config is None:
                return 99.0  # the library
            timed.append(config)
            gate_up, down = config.gate_up, config.down
            off = abs(gate_up.rows - 64) + abs(gate_up.stages - 6) + abs(config.programs - 8)
            off += abs(down.rows - 128) + abs(down.depth - 64) + abs(config.splits - 6)
            return 10.0 + off

        def op(x: torch.Tensor, *others: object, config: Config) -> torch.Tensor:
            assert config.norm == norm
            if config.gate_up.rows == 32:
                raise OutOfResources(1, 0, "shared memory")
            return x + 1 if config.down.rows == 256 else x

        def compiled(problem: tune.Problem, config: Config) -> str | None:
            return "no" if 8 in (config.gate_up.warps, config.down.warps) else None

        monkeypatch.setattr(tune, "device_or_refuse", lambda: torch.device("cpu"))
        properties = SimpleNamespace(multi_processor_count=8)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a made-up GPU")
        monkeypatch.setattr(tune, "COLD_BYTES", 0)
        monkeypatch.setattr(tune, "graph_us", cost)
        monkeypatch.setattr(tune, "compile_config", compiled)
        monkeypatch.setattr(launch, "wide_ffn_by_kernels", op)
        row = tune.tune(tune.Problem(2, 256, 2752, "int8", "token"), norm, pool=SimpleNamespace(map=map))  # type: ignore[arg-type]
        assert (row["gate_up"]["rows"], row["gate_up"]["stages"], row["programs"]) == (64, 6, 8)
        assert (row["down"]["rows"], row["down"]["depth"], row["splits"], row["norm"]) == (128, 64, 6, norm)
        measured = row["measured"]
        assert measured["us"] == 10.0 < measured["rule_us"] < measured["library_us"]
        assert len(timed) == len(set(timed)) == measured["configurations"]
        assert all(tiling.warps == 4 for config in timed[1:] for tiling in (config.gate_up, config.down))
        assert {config["down"]["rows"] for config in measured["wrong"]} == {256}
        assert measured["refused"] > 0

        assert "library 99.0 us" in tune.line_of(tune.Problem(2, 256, 2752, "int8", "token"), row)

        def without_library(calls: list[partial], replays: int, limit: float = 0.0) -> float:
            if "config" not in calls[0].keywords:
                raise RuntimeError("no such product")
            return cost(calls, replays, limit)

        monkeypatch.setattr(tune, "graph_us", without_library)
        again = tune.tune(tune.Problem(2, 256, 2752, "int8", "token"), norm, pool=SimpleNamespace(map=map))  # type: ignore[arg-type]
        assert again["measured"] == measured | {"library_us": None, "library_error": "no such product"}
        assert "library failed" in tune.line_of(tune.Problem(2, 256, 2752, "int8", "token"), again)
        monkeypatch.setattr(launch, "wide_ffn_by_kernels", lambda x, *others, config: x * float("nan"))
        with pytest.raises(TargetError, match="the rule's block sizes give NaN"):
            tune.tune(tune.Problem(2, 256, 2752, "int8", "token"), norm, pool=SimpleNamespace(map=map))  # type: ignore[arg-type]

    def test_a_first_look_is_enough_for_what_is_slow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter([0.0, 3.0, 6.0] * 2 + [6.0, 7.0, 8.0, 10.0, 11.0])  # ms, at the end of each replay

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self) -> None:
                self.at = next(clock)

            def elapsed_time(self, later: Event) -> float:
                return later.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", nullcontext)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        calls = [lambda: None] * 2
        assert tune.graph_us(calls, replays=3, limit=1000.0) == 1500.0
        assert tune.graph_us(calls, replays=3) == 500.0

    def test_compiled_ahead_is_what_a_launch_takes(self, tmp_path: Path) -> None:
        """Tensors without memory compile into Triton's cache what real ones then find there, whatever its defaults."""
        pytest.importorskip("triton")
        done = subprocess.run(
            [sys.executable, "-c", COMPILED_AHEAD],
            cwd=ROOT,
            env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "0"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["3", "0", "True"]

    def test_a_new_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def tuned(problem: tune.Problem, norm: Norm, *, pool: object) -> dict:
            call = (256, 512, "int8", "none")
            measured = {"us": 2.0, "rule_us": 3.0, "library_us": 4.0, "configurations": 9, "refused": 0, "wrong": []}
            return row_of(config_by_rule(problem.tokens, *call, norm), *call) | {"measured": measured}

        monkeypatch.setattr(tune, "device_or_refuse", lambda: torch.device("cpu"))
        monkeypatch.setattr(tune, "tune", tuned)
        file = tmp_path / "new.json"
        assert tune.main(["--hidden", "256", "--width", "512", "--weights", "int8", "--file", str(file)]) == 0
        assert [row["tokens"] for row in json.loads(file.read_text())["measured"]] == list(configs.BUCKETS)

    def test_without_a_gpu(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "sm_90.json"
        assert tune.main(["--hidden", "64", "--width", "64", "--weights", "int8", "--file", str(file)]) == 2
        assert "PyTorch sees no GPU" in capsys.readouterr().err
        assert not file.exists()
