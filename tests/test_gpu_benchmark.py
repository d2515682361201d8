"""The GPU benchmark's logic, at tiny sizes on a CPU: its cases, its log, and what it needs to be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exporter.read import open_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_models  # noqa: E402
import wide_ffn_gpu  # noqa: E402

# Of what this project installs, a GPU machine may have PyTorch, Triton, NumPy and ml_dtypes alone.
ABSENT = ("pydantic", "onnx", "onnx_ir", "onnxruntime", "click", "rich", "yaml", "tokenizers", "psutil", "safetensors",
          "transformers", "scipy")  # fmt: skip
ALONE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))  # an import of one of them now fails
sys.argv = ["wide_ffn_gpu.py", *sys.argv[1:]]
runpy.run_path({str(ROOT / "benchmarks" / "wide_ffn_gpu.py")!r}, run_name="__main__")
"""


def records(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def smoke(log: Path, *options: str) -> int:
    return wide_ffn_gpu.main(["--smoke", "-o", str(log), *options])


def test_runs_with_little_installed_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-c", ALONE, "--smoke", "-o", str(log), "--parts"]
    done = subprocess.run([*command, "decode"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 cases left for another run, 0 failed" in done.stdout
    wanted = [case for case in wide_ffn_gpu.cases(smoke=True) if case.part == "decode"]
    session, *found = records(log)
    assert session["session"]["device"] == "cpu"
    assert [wide_ffn_gpu.Case(**record["case"]) for record in found] == wanted
    assert all(record["samples_us"] and record["weight_bytes"] for record in found)
    # As a killed run would leave it: half of the last line.
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]) + lines[-1][:40])
    assert smoke(log, "--parts", "decode") == 0
    text = log.read_text().splitlines()
    assert "session" in json.loads(text[-2])
    assert wide_ffn_gpu.Case(**json.loads(text[-1])["case"]) == wanted[-1]


def test_contestants_agree(tmp_path: Path) -> None:
    """Every format, as one FFN and as several: that is also what the script itself insists on."""
    log = tmp_path / "log.jsonl"
    assert smoke(log, "--parts", "ffn", "fusion") == 0
    found = [record for record in records(log) if "case" in record]
    assert {record["case"]["format"] for record in found} == set(gpu_models.FORMATS)
    of_op = [record for record in found if record["case"]["contestant"].startswith("op")]
    assert all(record["relative_difference"] > 0 for record in of_op)


def test_a_contestant_that_is_wrong_is_a_result_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_ffn_gpu, "LARGEST_DIFFERENCE", 1e-12)
    monkeypatch.setattr(wide_ffn_gpu, "FORMATS", {"int8": gpu_models.FORMATS["int8"]})
    log = tmp_path / "log.jsonl"
    assert smoke(log, "--parts", "ffn") == 1
    errors = {record["case"]["contestant"]: record.get("error") for record in records(log) if "case" in record}
    assert errors["library"] is None
    assert errors["op"].startswith("ArithmeticError: the result is wrong: it differs from the library's by")


def test_a_spent_time_limit_leaves_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    assert smoke(log, "--minutes", "0", "--parts", "ffn") == 1
    assert [*records(log)[0]] == ["session"]
    assert len(records(log)) == 1
    assert f"{len([*wide_ffn_gpu._ffn_cases(True)])} cases left" in capsys.readouterr().out


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert wide_ffn_gpu.main(["--dry-run", "--parts", "ffn"]) == 0
    bytes_of_shard = 3 * 8192 * (28672 // 8) * 2
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("ffn    llama-70b, 1/8 ")
    assert f"{bytes_of_shard / 1e9:.3f} GB" in first


def test_sizes_are_those_of_the_published_models() -> None:
    data = ROOT / "tests" / "data"
    for name, file in (("super-49b", "nemotron-super-49b.structure.json"), ("llama-70b", "llama-3.3-70b.config.json")):
        graph = open_model(data / file, need_weights=False).graph
        sizes = gpu_models.DECODERS[name]
        layers = tuple(
            (block.attention and block.attention.num_key_value_heads, block.ffn.intermediate_size)
            for block in graph.flat_blocks
        )
        assert sizes.layers == layers
        assert (sizes.hidden, sizes.vocab, sizes.head_dim) == (graph.hidden_size, graph.vocab_size, graph.head_dim)
    widest = open_model(data / "nemotron-ultra-253b.structure.json", need_weights=False).graph
    assert gpu_models.LAYERS["ultra-253b, its widest"].width == max(
        block.ffn.intermediate_size for block in widest.flat_blocks if block.ffn is not None
    )
    fused = gpu_models.decoder("super-49b", gpu_models.FORMATS["bf16"], fused=True)
    assert gpu_models.LAYERS["super-49b, layers 42-50 fused"].width in {
        block.ffn.intermediate_size for block in fused.flat_blocks
    }


def test_the_plot_is_drawn_from_the_log_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    case = {"part": "ffn", "format": "fp8", "layer": "llama-70b", "shards": 8}
    lines = [{"session": {"copy_bytes_per_s": 4e12}}]
    lines += [
        {"case": {**case, "contestant": contestant, "tokens": 1}, "weight_bytes": 10**8, "samples_us": [samples]}
        for contestant, samples in (("library", 50.0), ("op", 31.25))
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert wide_ffn_gpu.main(["--report-only", "-o", str(log)]) == 0
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_share_and_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test_the_plot_is_drawn_from_the_log_alone(tmp_path)
    assert " 1:  80% x1.60" in capsys.readouterr().out
