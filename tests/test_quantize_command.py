"""`build.py quantize` as a user meets it: folders that open again, calibrations that are kept, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from exporter.dtypes import FLOAT8_E4M3FN, INT8, DType
from exporter.graph import linear_names
from exporter.read import open_model
from exporter.reference import Reference
from tests.checkpoints import saved_model, word_tokenizer, write_words
from tests.command_line import call, done, interrupt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "llama"
    sizes = {"intermediate_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 128}
    saved_model(folder, "Llama", sizes)
    word_tokenizer(folder, 307)
    write_words(folder.parent / "text.txt", 400, 307)
    (folder.parent / "plan.yaml").write_text("drop_attention: [1, 2]\nfuse: [[1, 2]]\n")
    return folder


def on_text(model: Path) -> list[object]:
    return ["--text", model.parent / "text.txt", "--context", 20]


@pytest.mark.parametrize(
    ("name", "dtype", "text"),
    [
        ("fp8", FLOAT8_E4M3FN, True),
        ("fp8-rowwise", FLOAT8_E4M3FN, False),
        ("int8-smoothquant", INT8, True),
        ("int8-smoothquant-token", INT8, True),
        ("int8-weight-only", INT8, False),
    ],
)
def test_a_quantized_folder_opens_again(name: str, dtype: DType, text: bool, model: Path, tmp_path: Path) -> None:
    arguments = ["quantize", model, "--plan", model.parent / "plan.yaml", "--format", name]
    done(*arguments, *(on_text(model) if text else []), "-o", tmp_path / "out")
    graph = open_model(tmp_path / "out", need_weights=True).graph
    linears = linear_names(graph)
    assert {linear.weight.dtype for found, linear in linears.items() if found != "lm_head"} == {dtype}
    assert linears["lm_head"].quantization is None
    tokens = torch.arange(20)[None]
    found = Reference(graph).logits(tokens)
    done("transform", model, "--plan", model.parent / "plan.yaml", "-o", tmp_path / "plain")
    expected = Reference(open_model(tmp_path / "plain", need_weights=True).graph).logits(tokens)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.3


def test_a_calibration_is_kept_and_serves_what_a_plan_makes(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "calibration"
    done("quantize", model, "--format", "fp8", *on_text(model), "--save-calibration", kept, "-o", tmp_path / "a")
    plan = ["--plan", model.parent / "plan.yaml"]
    done("quantize", model, *plan, "--format", "fp8", "--calibration", kept, "-o", tmp_path / "b")
    done("quantize", model, *plan, "--format", "fp8", *on_text(model), "-o", tmp_path / "c")
    b, c = (open_model(tmp_path / name, need_weights=True).graph for name in "bc")
    for name, linear in linear_names(b).items():
        other = linear_names(c)[name]
        assert (linear.weight.numpy() == other.weight.numpy()).all()
        if linear.quantization is not None and linear.quantization.input is not None:
            assert other.quantization is not None
            assert other.quantization.input is not None
            assert linear.quantization.input.scale is not None
            assert other.quantization.input.scale is not None
            assert linear.quantization.input.scale.numpy() == other.quantization.input.scale.numpy()


def test_options(model: Path, tmp_path: Path) -> None:
    arguments = ["--kv-cache", "fp8", "--exclude", "blocks.0.*", "--percentile", 99.5, "--report", tmp_path / "report"]
    printed = done("quantize", model, "--format", "fp8", *on_text(model), *arguments, "-o", tmp_path / "out").output
    graph = open_model(tmp_path / "out", need_weights=True).graph
    assert all(attention.kv_quantization is not None for _, attention in graph.attentions)
    quantized = {name for name, linear in linear_names(graph).items() if linear.quantization is not None}
    assert quantized == {name for name in linear_names(graph) if name.startswith(("blocks.1", "blocks.2", "blocks.3"))}
    assert re.search(r"^blocks\.\S+ +\d+\.\d\d % +\d+\.\d dB ", printed, re.MULTILINE)
    described = json.loads((tmp_path / "report" / "errors.json").read_text())
    assert {row["name"] for row in described["linears"]} == quantized
    assert described["linears"][0]["relative_error"] > 0


def test_work_is_told_line_by_line_where_there_is_no_terminal(model: Path, tmp_path: Path) -> None:
    plan = ["--plan", model.parent / "plan.yaml", "--report", tmp_path / "report"]
    told = done("quantize", model, *plan, "--format", "fp8", *on_text(model), "-o", tmp_path / "out").stderr
    assert re.search(r"^0/4  calibration on [1-9][0-9]* tokens$", told, re.MULTILINE)
    for last in ("4/4  calibration", "3/3  errors", "16/16  schemes of wide FFNs"):
        assert f"\n{last}" in told


@pytest.mark.parametrize("name", ["fp8", "int8-smoothquant", "int8-weight-only"])
def test_a_dry_run_knows_the_sizes_without_calibrating(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["quantize", model, "--plan", model.parent / "plan.yaml", "--format", name, *on_text(model)]
    done(*arguments, "-o", tmp_path / "out")
    monkeypatch.setattr("exporter.calibration.calibrate", None)
    listed = done(*arguments, "--dry-run", "-o", tmp_path / "dry").output.splitlines()[:-1]
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listed}
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sizes == {name: written[name] for name in sizes}
    assert written.keys() - sizes.keys() == {"fuselage.manifest.json"}


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    printed = done("quantize", model, "--format", "int8-weight-only", "--dry-run", "-o", tmp_path / "out").output
    assert "model.safetensors" in printed
    described = done(
        "quantize", model / "config.json", "--format", "int8-weight-only", "--dry-run", "-o", tmp_path / "out"
    )
    assert next(line for line in printed.splitlines() if "safetensors" in line) in described.output  # without weights
    refused = call(
        "quantize", model / "config.json", "--format", "fp8", *on_text(model), "--dry-run", "-o", tmp_path / "out"
    )
    assert (refused.exit_code, "no tokenizer.json" in refused.output) == (2, True)
    assert "Give the model's folder" in refused.output
    assert not list(tmp_path.iterdir())


REFUSED = {
    "no_text": (["--format", "fp8"], "--text"),
    "format": (["--format", "int3"], "int8-weight-only"),
    "recipe": (["--format", "{tmp}/bad.yaml"], "bad.yaml"),
    "pattern": (["--format", "int8-weight-only", "--exclude", "decoder.*"], "matches no linear"),
    "long": (["--format", "fp8", "--text", "{text}", "--context", "129"], "longer than the model was made for"),
    "empty": (["--format", "fp8", "--text", "{tmp}/empty.txt", "--context", "20"], "empty"),
    "no_calibration": (["--format", "fp8", "--calibration", "{tmp}/none"], "calibration.json"),
    "layout": (["--format", "int8-smoothquant", "--text", "{text}", "--context", "20", "--check-for", "mlx-lm"], "mlx"),
    "readers": (["--format", "int8-weight-only", "--check-for", "vllm,sglang,mlx-lm"], "3 problems"),
    "device": (["--format", "fp8", "--text", "{text}", "--context", "20", "--device", "gpu"], "cannot use this device"),
    "nothing_to_keep": (["--format", "int8-weight-only", "--save-calibration", "{tmp}/new"], "--save-calibration"),
    "report_is_output": (["--format", "fp8", "--text", "{text}", "--report", "{tmp}/out"], "same or inside"),
    "resume_in_output": (["--format", "fp8", "--text", "{text}", "--resume", "{tmp}/out/work"], "same or inside"),
    "report_exists": (["--format", "fp8", "--text", "{text}", "--context", "20", "--report", "{tmp}"], "output exists"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_it_calibrates(case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.calibration._measured_block", None)
    arguments, message = REFUSED[case]
    (tmp_path / "bad.yaml").write_text("weights: int8\n")
    (tmp_path / "empty.txt").write_text(" \n")
    before = sorted(tmp_path.rglob("*"))
    filled = [argument.format(tmp=tmp_path, text=model.parent / "text.txt") for argument in arguments]
    result = call("quantize", model, *filled, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_found_before_it_calibrates(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.calibration._measured_block", None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    result = call("quantize", model, "--format", "fp8", *on_text(model), "-o", tmp_path / "new/out")
    assert (result.exit_code, "not enough disk space" in result.output) == (2, True), result.output
    assert not list(tmp_path.iterdir())


def test_interrupted_after_the_calibration_it_does_not_calibrate_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, work = tmp_path / "calibration", tmp_path / "work"
    command = ["quantize", model, "--format", "fp8", *on_text(model), "--save-calibration", kept, "--resume", work]
    with monkeypatch.context() as patched:
        patched.setattr("exporter.quantize.quantize", interrupt)
        result = call(*command, "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert "the same command goes on from here" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    monkeypatch.setattr("exporter.calibration._measured_block", interrupt)
    done(*command, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration", "out"]


def test_a_calibration_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "calibration"
    done("quantize", model, "--format", "fp8", *on_text(model), "--save-calibration", kept, "-o", tmp_path / "a")
    torch.manual_seed(1)
    other = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(model))
    other.save_pretrained(tmp_path / "other")
    result = call("quantize", tmp_path / "other", "--format", "fp8", "--calibration", kept, "-o", tmp_path / "b")
    assert result.exit_code == 2
    assert "another model" in result.output
    assert not (tmp_path / "b").exists()
