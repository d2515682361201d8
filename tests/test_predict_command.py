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
from tests.engines.test_report import ERRORS

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
    output = done("predict", ULTRA, "--format", "fp8", "--tp", 8, "--price-per-gpu-hour", 2.5)
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
    assert re.search(r"fuse \[66, 70\] +4x H100 SXM +-4 ", output)
    parts = output.partition("\ndecode step ")[2].partition("\n\n")[0]
    assert {line.split()[-6] for line in parts.splitlines()[1:]} == {"1"}  # the first batch alone
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
    for on in whole["on"]:
        figure = rf"-{on['saved_us']:,.0f} +-{100 * on['saved_share']:.1f}\n"
        assert re.search(rf"the whole plan +{on['tp_size']}x {on['gpu']} +-17 +{figure}", output)
    assert (whole["line"], whole["sublayers_saved"]) == ("the whole plan", 10 + 4 + 3)
    assert [1000 * ms for ms in saved] == pytest.approx([on["saved_us"] for on in whole["on"][:3]])
    assert [points["llama-3.1-405b", "H100 SXM", tp, 1]["fits"] for tp in (4, 8)] == [False, True]
    row = next(line for line in output.splitlines() if line.startswith("llama-3.1-405b, shorter"))  # at TP 4, batch 1
    before, after = (points[name, "H100 SXM", 4, 1] for name in ("llama-3.1-405b", "llama-3.1-405b, shorter"))
    assert row.split()[-1] == f"{before['decode_ms'] / after['decode_ms']:.2f}×"
    for name in ("speedup_over_tp.png", "throughput.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    refused = call("predict", LLAMA, *arguments, "-o", tmp_path / "out")
    assert refused.exit_code == 2


def test_predict_compares_with_a_reference() -> None:
    output = done("predict", ULTRA, "--reference", BEFORE, "--tp", 8, "--format", "fp8", "--kv-cache", "fp8")
    rows = [line.split() for line in output.splitlines() if line.startswith("nemotron")][:2]
    assert [row[0] for row in rows] == ["nemotron-ultra-253b-before-fusion", "nemotron-ultra-253b"]
    assert float(rows[0][5]) / float(rows[1][5]) == pytest.approx(70.92 / 63.38, rel=0.03)
    assert "KV cache in float8_e4m3fn" in output


def test_sizes_of_a_range_that_do_not_divide_the_heads_are_left_out() -> None:
    result = call("predict", ROOT / "demo" / "model", "--tp", "1..8", "--context", 64)
    assert (result.exit_code, result.stderr) == (0, "note: --tp 8: left out, the attention heads do not divide\n")
    sizes = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("model ")]
    assert "8x" not in sizes
    assert {"2x", "4x"} <= set(sizes)


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
        (["--tp", "1,3"], "expected a divisor of 128, found 3"),
        (["--tp", "3..12"], "expected a divisor of 128, found 3"),
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
    markdown = (tmp_path / "changes.md").read_text()
    slower_rows = [line for line in markdown.splitlines() if line.endswith("**slower** |")]
    assert len(slower_rows) == sum(change["verdict"] == "slower" for change in changes) == 9
    assert slower_rows[0].startswith("| fused | batch 1, input 32, output 48 | inter-token | 0.501 | 0.751 | 1.500 | ")
    assert "**Of 36 figures: 9 slower, 27 no difference.**" in markdown
    assert markdown.count("**") == 2 * (1 + 9)
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == 2 + 36


def test_a_comparison_names_its_threshold_and_escapes_what_it_prints(slower: Path, tmp_path: Path) -> None:
    before, after = (tmp_path / f"{name}.json" for name in ("before", "hostile"))
    for source, target in ((DEMO, before), (slower, after)):
        target.write_text(source.read_text().replace('"fused"', '"<b>@all|`"'))
    result = call("report", "--compare", before, after, "--fail-on-regression", "5%", "-o", tmp_path / "changes.json")
    assert result.exit_code == 3
    markdown = (tmp_path / "changes.md").read_text()
    assert "9 slower by more than 5.0%." in markdown
    assert "<b>" not in markdown
    assert "@all" not in markdown
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")} == {10}


def test_one_metric_alone(slower: Path, tmp_path: Path) -> None:
    done("report", "--compare", DEMO, slower, "--metric", "ttft_ms", "-o", tmp_path / "changes.json")
    changes = json.loads((tmp_path / "changes.json").read_text())["changes"]
    assert {change["metric"] for change in changes} == {"ttft_ms"}
    assert len(changes) == 12


@pytest.mark.parametrize(("threshold", "code"), [("5%", 3), ("49%", 3), ("51%", 0)])
def test_compare_fails_on_a_regression(slower: Path, threshold: str, code: int) -> None:
    result = call("report", "--compare", DEMO, slower, "--fail-on-regression", threshold)
    assert result.exit_code == code, result.output
    assert call("report", "--compare", slower, DEMO, "--fail-on-regression", threshold).exit_code == 0


def test_a_model_that_fits_nowhere_has_no_chart_of_its_throughput(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    arguments = ("predict", LLAMA, "--gpu", "l40s", "--tp", 1, "--batch", "1,2", "-o", tmp_path / "out")
    done(*arguments)
    assert "--force" in call(*arguments).output
    done(*arguments, "--force")
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", DEMO], "--compare takes two results files"),
        (["--compare", DEMO, DEMO, "--fail-on-regression", "5"], "'5' is not a share like 5%"),
        (["--compare", DEMO, ULTRA], "this is not a results file"),
        ([DEMO], "Missing option '-o'"),
        (
            ["--compare", DEMO, DEMO, "--metric", "speed"],
            "unknown metric: expected ttft_ms, inter_token_ms, request_ms, found speed",
        ),
        (["--compare", DEMO, DEMO, "-o", "{tmp}/changes.md"], "its Markdown lies beside it"),
        ([DEMO, "--metric", "ttft_ms", "-o", "{tmp}/out"], "--metric belongs to --compare"),
        ([DEMO, "--baseline", "best", "-o", "{tmp}/out"], "no engine has the baseline's label: expected one of b"),
        ([DEMO, DEMO, "-o", "{tmp}/out"], "a file or folder is given twice"),
        ([DEMO, "{tmp}/copy.json", "-o", "{tmp}/out"], "two results files have an engine labelled 'baseline'"),
        ([DEMO, "{tmp}/next.json", "-o", "{tmp}/out"], "another schema version: expected 1 or 2, found 3"),
        ([DEMO, "{tmp}/wider.json", "-o", "{tmp}/out"], "are of different models, a ratio would mean nothing"),
        ([DEMO, "--predict-gpu", "h1000", "-o", "{tmp}/out"], "unknown GPU: expected h100-sxm"),
        ([DEMO, "--predict-tp", "8", "-o", "{tmp}/out"], "belong to --predict-gpu"),
        ([DEMO, "--calibrate", "epyc", "-o", "{tmp}/out"], "unknown GPU"),
        ([DEMO, "--predict-gpu", "h200", "--predict-tp", "8", "-o", "{tmp}/out"], "divides the attention heads"),
        ([DEMO, "--predict-gpu", "h200", "--predict-dtype", "int5", "-o", "{tmp}/out"], "cannot be predicted"),
        ([DEMO, "--predict-gpu", "h200", "--predict-batch", "0", "-o", "{tmp}/out"], "'0' is not a list"),
    ],
)
def test_what_cannot_be_compared(arguments: list[object], message: str, tmp_path: Path) -> None:
    document = DEMO.read_text()
    (tmp_path / "copy.json").write_text(document)
    (tmp_path / "next.json").write_text(document.replace('"results_schema": 1', '"results_schema": 3'))
    wider = document.replace('"hidden_size": 128', '"hidden_size": 256').replace('"label": "', '"label": "wider ')
    (tmp_path / "wider.json").write_text(wider.replace('"engine": "', '"engine": "wider '))
    before = set(tmp_path.iterdir())
    result = call("report", *(str(argument).format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert set(tmp_path.iterdir()) == before


def test_quantization_errors_in_folders_of_one_name_are_all_shown(tmp_path: Path) -> None:
    folders = [tmp_path / variant / "quantization" for variant in ("fp8", "int8")]  # as a recipe lays them out
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "errors.json").write_text(json.dumps(ERRORS))
    wanted = [argument for folder in folders for argument in ("--errors", folder)]
    done("report", DEMO, *wanted, "-o", tmp_path / "report")
    headings = re.findall(r"<h3 class=\"before\">(.*)</h3>", (tmp_path / "report" / "report.html").read_text())
    assert [name for name in headings if name.endswith("quantization")] == [str(folder) for folder in folders]


def test_a_report_predicts_and_shows_the_models_error(tmp_path: Path) -> None:
    hardware = ROOT / "benchmarks" / "cpu.yaml"
    wanted = ["--predict-gpu", "h100-sxm,h200", "--predict-tp", "1,2", "--predict-batch", "1..4"]
    done("report", DEMO, *wanted, "--gpus", hardware, "--calibrate", "epyc", "-o", tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {f"throughput_predicted_{index}.{form}" for index in range(4) for form in ("png", "svg")} <= names
    html = (tmp_path / "report" / "report.html").read_text()
    assert "Predicted figures on 2x H200 SXM" in html
    assert "The model beside what was measured" in html
