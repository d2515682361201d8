"""`predict`, `report --compare` and the predicted gains in a suggested plan, as a user meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import build
from engines.results import json_from_results, read_results
from exporter.plan import read_plan

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
ULTRA = DATA / "nemotron-ultra-253b.structure.json"
BEFORE = DATA / "nemotron-ultra-253b-before-fusion.structure.json"
LLAMA = DATA / "llama-3.1-405b.config.json"
DEMO = ROOT / "benchmarks" / "results" / "demo_cpu.json"
PLAN = "drop_attention: [[66, 75]]\nfuse: [[66, 70], [71, 74]]\n"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(build.main, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_predict_prints_what_it_rests_on() -> None:
    output = done("predict", ULTRA, "--format", "fp8", "--price-per-gpu-hour", 2.5)
    assert output.startswith("Predicted, not measured: fp8, KV cache in bfloat16, 1,024 tokens of context.\n")
    assert "23.5 us per sequential sublayer" in output
    row = next(line for line in output.splitlines() if line.startswith("nemotron-ultra-253b"))
    latency_ms, per_user = (float(word) for word in row.split()[5:7])
    assert latency_ms == pytest.approx(1000 / 70.92, rel=0.025)
    assert per_user == pytest.approx(70.92, rel=0.025)
    assert row.split()[-2] == "yes"
    assert float(row.split()[-1]) == pytest.approx(2.5 * 8 / 3600 / per_user * 1e6, rel=0.01)


def test_predict_writes_a_sweep(tmp_path: Path) -> None:
    plan = tmp_path / "shorter.yaml"
    plan.write_text(PLAN)
    arguments = ["--plan", plan, "--gpu", "h100-sxm,b200", "--tp", "4..16", "--batch", "1,64", "--format", "fp8"]
    output = done("predict", LLAMA, *arguments, "-o", tmp_path / "out")
    assert re.search(r"fuse \[66, 70\] +-4 ", output)
    figures = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert figures["kind"] == "predicted"
    points = {(p["model"], p["gpu"], p["tp_size"], p["batch"]): p for p in figures["points"]}
    assert len(points) == len(figures["points"]) == 2 * 2 * 3 * 2
    saved = [
        points["llama-3.1-405b", "H100 SXM", tp, 1]["decode_ms"]
        - points["llama-3.1-405b, shorter", "H100 SXM", tp, 1]["decode_ms"]
        for tp in (4, 8, 16)
    ]
    whole = figures["gains"][-1]
    assert (whole["line"], whole["sublayers_saved"]) == ("the whole plan", 10 + 4 + 3)
    assert [1000 * ms for ms in saved] == pytest.approx([on["saved_us"] for on in whole["on"][:3]])
    assert [points["llama-3.1-405b", "H100 SXM", tp, 1]["fits"] for tp in (4, 8)] == [False, True]
    for name in ("speedup_over_tp.png", "throughput.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    refused = call("predict", LLAMA, *arguments, "-o", tmp_path / "out")
    assert refused.exit_code == 2


def test_predict_compares_with_a_reference() -> None:
    output = done("predict", ULTRA, "--reference", BEFORE, "--format", "fp8", "--kv-cache", "fp8")
    rows = [line.split() for line in output.splitlines() if line.startswith("nemotron")][:2]
    assert [row[0] for row in rows] == ["nemotron-ultra-253b-before-fusion", "nemotron-ultra-253b"]
    assert float(rows[0][5]) / float(rows[1][5]) == pytest.approx(70.92 / 63.38, rel=0.03)
    assert "KV cache in float8_e4m3fn" in output


def test_predict_calibrates() -> None:
    rates = ROOT / "benchmarks" / "published_rates.yaml"
    output = done("predict", ULTRA, "--format", "fp8", "--calibrate", rates)
    assert "Fitted: memory_efficiency 0.9678, sublayer_us 23.52" in output
    assert re.search(r"Ultra-253B on H200 +8x H200 SXM +11\.105 +11\.367 +\+2\.36 +\+3\.6", output)
    hardware = ["--gpus", ROOT / "benchmarks" / "cpu.yaml", "--gpu", "epyc", "--tp", 1]
    output = done("predict", ROOT / "demo" / "model", *hardware, "--format", "float32", "--calibrate", DEMO)
    assert "compute_efficiency" in output
    assert "2 cores of an AMD EPYC" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h100"], "unknown GPU: expected h100-sxm, h100-pcie, "),
        (["--tp", "3"], "the tensor-parallel size divides the attention heads: expected a divisor of 128, found 3"),
        (["--tp", "32"], "no link is known between so many H100 SXM: expected a tensor-parallel size of at most 16"),
        (["--tp", "8..4"], "'8..4' is not a range like 1..16"),
        (["--batch", "0"], "not a list of whole numbers"),
        (["--format", "fp4"], "unknown number format: expected "),
        (["--format", "fp8", "--gpu", "a100-80gb"], "A100 SXM 80 GB has no matrix products in float8_e4m3fn"),
        (["--context", "1000000"], "not made for so long a context"),
        (["--calibrate", DEMO, "--gpu", "h100-sxm,h200"], "does not say which hardware"),
        (["--calibrate", "nothing.json"], "nothing.json"),
        (["--gpus", DEMO], "demo_cpu.json"),
    ],
)
def test_what_cannot_be_predicted(arguments: list[object], message: str) -> None:
    result = call("predict", ULTRA, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_a_suggested_plan_says_what_it_is_predicted_to_gain(tmp_path: Path) -> None:
    text = ROOT / "demo" / "model" / "heldout.txt"
    wishes = ["--context", 32, "--max-windows", 1, "--drop", 3, "--gpu", "h100-sxm", "--tp", 4]
    done("analyze", ROOT / "demo" / "model", "--text", text, *wishes, "-o", tmp_path / "out")
    plan = tmp_path / "out" / "plan.yaml"
    assert len(read_plan(plan).dropped_layers) == 3
    said = " ".join(plan.read_text().replace("#", " ").split())
    assert (
        len(re.findall(r"saves 1 sequential sublayer: predicted \d+ us \(\d+\.\d %\) less per decode step on", said))
        == 3
    )
    assert re.search(r"All of it saves \d+ sequential sublayers?: predicted .* on 4x H100 SXM, \w+\.", said)


def test_gains_that_cannot_be_predicted_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    arguments = ["--text", tmp_path / "no.txt", "--gpu", "h100-sxm", "--tp", 3, "-o", tmp_path / "out"]
    result = call("analyze", ROOT / "demo" / "model", *arguments)
    assert result.exit_code == 2
    assert "the tensor-parallel size divides the attention heads" in result.output


# --- report --compare


@pytest.fixture
def slower(tmp_path: Path) -> Path:
    """The demo's results with every sample of one engine half as long again."""
    results = read_results(DEMO)
    cells = [
        cell.model_copy(
            update={
                "ttft_ms": tuple(1.5 * ms for ms in cell.ttft_ms),
                "step_ms": tuple(tuple(1.5 * ms for ms in steps) for steps in cell.step_ms),
                "request_ms": tuple(1.5 * ms for ms in cell.request_ms),
            }
        )
        if cell.engine == "fused"
        else cell
        for cell in results.cells
    ]
    path = tmp_path / "after.json"
    path.write_bytes(json_from_results(results.model_copy(update={"cells": tuple(cells)})))
    return path


def test_compare_says_what_changed(slower: Path, tmp_path: Path) -> None:
    output = done("report", "--compare", DEMO, slower, "-o", tmp_path / "changes.json")
    assert re.search(r"fused +batch 1, input 256, output 48 +TTFT .* 1\.500 .* slower", output)
    assert re.search(r"baseline +batch 1, input 256, output 48 +TTFT .* 1\.000 .* no difference", output)
    changes = json.loads((tmp_path / "changes.json").read_text())["changes"]
    assert {change["engine"] for change in changes if change["verdict"] != "no difference"} == {"fused"}


@pytest.mark.parametrize(("threshold", "code"), [("5%", 3), ("49%", 3), ("51%", 0)])
def test_compare_fails_on_a_regression(slower: Path, threshold: str, code: int) -> None:
    result = call("report", "--compare", DEMO, slower, "--fail-on-regression", threshold)
    assert result.exit_code == code, result.output
    assert call("report", "--compare", slower, DEMO, "--fail-on-regression", threshold).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", DEMO], "--compare takes two results files"),
        (["--compare", DEMO, DEMO, "--fail-on-regression", "5"], "'5' is not a share like 5%"),
        (["--compare", DEMO, ULTRA], "this is not a results file"),
        ([DEMO], "Missing option '-o'"),
    ],
)
def test_what_cannot_be_compared(arguments: list[object], message: str) -> None:
    result = call("report", *arguments)
    assert result.exit_code == 2
    assert message in result.output
