"""Block sizes: the rule's promises, measured ones in a file, and what the tuner would try."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import plugins.wide_ffn.op  # noqa: F401  registers torch.ops.fuselage.wide_ffn
from exporter.errors import EngineError
from plugins.wide_ffn import configs, tune
from plugins.wide_ffn.configs import BUCKETS, Config, Tiling, bucket_of, config_by_rule, config_for, row_of

ROOT = Path(__file__).parents[2]
FORMATS = [("bfloat16", "none"), ("float8_e4m3fn", "static"), ("int8", "static"), ("int8", "token"), ("int8", "none")]
SIZES = [(64, 96), (4096, 14336), (8192, 28672), (16384, 53248), (16384, 425984), (16384, 524288), (4096, 131071)]


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("weights", "activations"), FORMATS)
def test_rule(bucket: int, sizes: tuple[int, int], weights: str, activations: str) -> None:
    hidden, width = sizes
    config = config_by_rule(bucket, hidden, width, weights, activations)
    assert 1 <= config.programs <= min(264 if bucket < 64 else 132, -(-width // config.gate_up.rows))
    assert 1 <= config.splits <= -(-width // config.down.depth)
    for tiling in (config.gate_up, config.down):
        assert tiling.rows == 16 * tiling.warps
    steps = -(-width // config.down.depth)
    longest = -(-steps // config.splits) * config.down.depth
    if weights == "int8" and activations != "none":
        assert longest * 128 * 128 < 2**31, "a sum of products of codes leaves 32 bits"
    if hidden >= 4096 and config.splits > 1 and weights != "int8":
        assert longest >= 16 * config.down.depth


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
    rows = [row_of(best, **call) | {"measured": {"us": 1.0}}]
    (folder / "sm_90.json").write_text(json.dumps({"schema": 1, "measured": rows}))
    assert config_for(tokens=20, **call) == replace(best, origin="measured")
    assert config_for(tokens=1, **call) == config_by_rule(16, **call)
    assert config_for(tokens=20, **call | {"hidden": 4097}).origin == "rule"


def test_a_file_of_another_schema_is_refused(folder: Path) -> None:
    (folder / "sm_90.json").write_text('{"schema": 2, "measured": []}')
    with pytest.raises(EngineError, match=r"sm_90.json: unknown schema .*: expected 1"):
        config_for(tokens=1, hidden=64, width=64, weights="bfloat16", activations="none")


def test_the_shipped_file_can_be_read() -> None:
    document = json.loads((configs.FOLDER / "sm_90.json").read_text())
    assert all(isinstance(configs._config(row), Config) and row["measured"]["us"] > 0 for row in document["measured"])


def test_a_gpu_machine_needs_torch_and_triton_alone() -> None:
    """And NumPy, for tests: nothing else of what the rest of the project is made of."""
    pytest.importorskip("triton")
    modules = ["op", "reference", "library", "launch", "kernels", "configs", "aot", "tune"]
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
        tilings = tune.tilings(weights)
        assert {base.gate_up, base.down} <= set(tilings)
        for kernel, other in (("gate_up", "down"), ("down", "gate_up")):
            found = list(tune.candidates(problem, kernel, base, tilings, 132))
            assert len(found) == len(set(found)) > len(tilings)
            assert {getattr(config, other) for config in found} == {getattr(base, other)}
            assert {getattr(config, kernel) for config in found} == set(tilings)
            for config in found:
                longest = -(-131072 // config.down.depth // config.splits) * config.down.depth
                assert weights != "int8" or activations == "none" or longest * 128 * 128 < 2**31

    def test_fit(self) -> None:
        tiling = Tiling(64, 128, 4, 4)
        for sizes, fit in [((256, 384), "even"), ((256, 400), "aligned"), ((144, 256), "aligned"), ((256, 385), "any")]:
            assert tune.fit_of(tune.Problem(1, *sizes, "int8", "token"), tiling) == fit

    @pytest.mark.parametrize(("weights", "activations"), FORMATS)
    def test_arguments(self, weights: str, activations: str) -> None:
        """They are a call of the op, and its numbers are neither zero nor out of range."""
        problem = tune.Problem(3, 64, 96, weights, activations)
        arguments = problem.arguments(torch.device("cpu"))
        y = torch.ops.fuselage.wide_ffn(*arguments)
        assert 0.01 < float((y - arguments[10]).to(torch.float32).std()) < 100
        assert problem.weight_bytes == sum(arguments[i].nbytes for i in (2, 3, 4))

    def test_rows_replace_those_of_the_same_call(self) -> None:
        def row(tokens: int, us: float) -> dict:
            call = (256, 512, "int8", "token")
            return row_of(config_by_rule(tokens, *call), *call) | {"measured": {"us": us}}

        document = tune.with_rows({"schema": 1, "measured": [row(64, 3.0), row(16, 2.0)]}, [row(16, 1.0)])
        assert [(one["tokens"], one["measured"]["us"]) for one in document["measured"]] == [(16, 1.0), (64, 3.0)]

    def test_without_a_gpu(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "sm_90.json"
        assert tune.main(["--hidden", "64", "--width", "64", "--weights", "int8", "--file", str(file)]) == 2
        assert "PyTorch sees no GPU" in capsys.readouterr().err
        assert not file.exists()
