"""The GPU benchmark's logic, at tiny sizes on a CPU: its cases, its log, and what it needs to be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.torch_model import ffn_on_device
from exporter.read import open_model
from plugins.wide_ffn import configs
from plugins.wide_ffn.tune import Problem
from tests.marks import needs_scales_of_rows
from tests.processes import assert_ends

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_models  # noqa: E402
import gpu_timing  # noqa: E402
import wide_ffn_gpu  # noqa: E402
import wide_ffn_session  # noqa: E402

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
    session, *found, end = records(log)
    assert session["session"]["device"] == "cpu"
    assert end == {"end": {}}
    assert [wide_ffn_gpu.Case(**record["case"]) for record in found] == wanted
    assert all(record["samples_us"] and record["weight_bytes"] for record in found)
    # As a killed run would leave it: half of the last case's line.
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-2]) + lines[-2][:40])
    assert smoke(log, "--parts", "decode") == 0
    text = log.read_text().splitlines()
    assert "session" in json.loads(text[-3])
    assert wide_ffn_gpu.Case(**json.loads(text[-2])["case"]) == wanted[-1]


@needs_scales_of_rows
def test_contestants_agree(tmp_path: Path) -> None:
    """Every format, as one FFN and as several: that is also what the script itself insists on."""
    log = tmp_path / "log.jsonl"
    assert smoke(log, "--parts", "ffn", "fusion") == 0
    found = [record for record in records(log) if "case" in record]
    assert {record["case"]["format"] for record in found} == set(gpu_models.FORMATS)
    of_op = [record for record in found if record["case"]["contestant"].startswith("op")]
    assert all(record["relative_difference"] > 0 for record in of_op)


@pytest.mark.parametrize("name", wide_ffn_gpu.COMPILED)
def test_torch_compile_takes_the_library_whole(name: str) -> None:
    """A competitor that leaves its graph halfway would be slower than it need be."""
    ffn = gpu_models.ffn_of(64, 128, gpu_models.FORMATS[name])
    library, _ = ffn_on_device(ffn, device=torch.device("cpu"), dtype=torch.bfloat16, load=gpu_models.random_tensor)
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(library, dynamic=False, fullgraph=True, backend="eager")(x), library(x))


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
    assert [[*record] for record in records(log)] == [["session"], ["end"]]
    assert f"{len([*wide_ffn_gpu._ffn_cases(True)])} cases left" in capsys.readouterr().out


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert wide_ffn_gpu.main(["--dry-run", "--parts", "ffn"]) == 0
    bytes_of_shard = 3 * 8192 * (28672 // 8) * 2
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("ffn    llama-70b, 1/8 ") and " bf16 " in line)
    assert f"{bytes_of_shard / 1e9:.3f} GB" in line


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


def test_table_and_plot_are_made_from_the_log_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert " 1:  80% x1.60" in capsys.readouterr().out  # share of the copy, and speed


def test_cases_of_the_target_come_first() -> None:
    stages = [case.stage for case in wide_ffn_gpu.cases(smoke=False)]
    assert list(dict.fromkeys(stages)) == ["target", "ffn", "fusion", "decode", "compiled"]
    of_target = [case for case in wide_ffn_gpu.cases(smoke=False) if case.stage == "target"]
    assert {case.format for case in of_target} == {"bf16", "fp8"}
    assert {case.tokens for case in of_target} == {1, 4, 16, 32}
    assert min(case.widths[0] for case in of_target) == 28672
    assert {case.contestant for case in of_target} == {"library", "op"}


@pytest.fixture
def op_case() -> wide_ffn_gpu.Case:
    return wide_ffn_gpu.Case(part="ffn", contestant="op", format="fp8", tokens=4, layer="llama-70b")


def timed(case: wide_ffn_gpu.Case, us: float, origin: str = "rule") -> dict[str, Any]:
    return {"case": asdict(case), "weight_bytes": 10**9, "samples_us": [us], "block_sizes": [{"origin": origin}]}


def test_what_misses_the_target_is_tuned_and_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op_case: wide_ffn_gpu.Case
) -> None:
    file = tmp_path / "sm_90.json"
    file.write_text('{"schema": 2, "measured": []}')
    monkeypatch.setattr(wide_ffn_gpu, "CONFIGS", file)
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.read_again()
    tuned: list[Problem] = []

    def tune(problem: Problem, *, pool: object) -> dict[str, Any]:
        tuned.append(problem)
        call = (problem.hidden, problem.width, problem.weights, problem.activations)
        measured = {"us": 2.0, "rule_us": 3.0, "library_us": 4.0, "configurations": 9, "refused": 0, "wrong": []}
        return configs.row_of(configs.config_by_rule(16, *call), *call) | {"measured": measured}

    monkeypatch.setattr(wide_ffn_gpu, "tune", tune)
    near = replace(op_case, tokens=16)
    far, enough = (replace(op_case, layer="llama-405b"), replace(op_case, shards=2))
    log = gpu_timing.Log(tmp_path / "log.jsonl")
    log.add({"session": {"copy_bytes_per_s": 4e12}})
    for case, share in ((op_case, 0.5), (far, 0.4), (enough, 0.9), (op_case, 0.8), (near, 0.8)):
        log.add(timed(case, 1e9 / (share * 4e12) * 1e6))
    assert wide_ffn_gpu.shares_of(log) == pytest.approx({op_case: 0.8, far: 0.4, enough: 0.9, near: 0.8})
    wanted = [op_case, near, far, enough]
    device = torch.device("cpu")
    assert wide_ffn_gpu.config_row(op_case.problems[0], device)["origin"] == "rule"
    spent, free = (gpu_timing.Budget(minutes, {"tuning": 1.0}) for minutes in (0, 1))
    monkeypatch.setattr(wide_ffn_gpu, "_give_back", lambda device: None)
    assert wide_ffn_gpu.tune_missed(wanted, 0.88, log, spent, None) == 2  # type: ignore[arg-type]
    assert wide_ffn_gpu.tune_missed(wanted, 0.88, log, free, None) == 0  # type: ignore[arg-type]
    # The farthest first, and both numbers of tokens at once: they are one bucket.
    assert tuned == [Problem(16, 16384, 53248, "float8_e4m3fn", "static"), op_case.problems[0]]
    assert wide_ffn_gpu.config_row(op_case.problems[0], device)["origin"] == "measured"
    assert wide_ffn_gpu.tune_missed(wanted, 0.88, log, free, None) == 0  # type: ignore[arg-type]
    assert len(tuned) == 2
    configs.read_again()


def test_an_op_with_other_block_sizes_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op_case: wide_ffn_gpu.Case
) -> None:
    monkeypatch.setattr(wide_ffn_gpu, "Ffns", lambda case, device: None)
    monkeypatch.setattr(wide_ffn_gpu, "measure_ffns", lambda case, ffns, device: {"samples_us": [1.0]})
    origins = iter(["rule", "rule", "measured"])
    monkeypatch.setattr(wide_ffn_gpu, "config_row", lambda problem, device: {"origin": next(origins)})
    log = gpu_timing.Log(tmp_path / "log.jsonl")
    wanted, budget = [op_case, replace(op_case, contestant="library")], gpu_timing.Budget(1, {"target": 1.0})
    counts = []
    for _ in range(3):
        wide_ffn_gpu.measure(wanted, log, budget, torch.device("cpu"))
        counts.append(len([*log.records()]))
    assert counts == [2, 2, 3]


class TestSession:
    """The order of things, with made-up programs."""

    @pytest.fixture
    def programs(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[dict[str, Any]]]]:
        """What the benchmark will return and leave in its log, call by call; every call takes one of them."""
        to_come: list[tuple[int, list[dict[str, Any]]]] = []

        def run(command: list[str], seconds: float, **others: Any) -> int:
            if "pytest" in command:
                report = next(part for part in command if part.startswith("--junitxml=")).partition("=")[2]
                Path(report).write_text(
                    '<testsuites><testsuite tests="9" failures="0" errors="0" skipped="2"/></testsuites>'
                )
                return 0
            assert float(command[command.index("--minutes") + 1]) < seconds / 60 <= 9
            status, found = to_come.pop(0)
            for record in found:
                gpu_timing.Log(Path(command[command.index("-o") + 1])).add(record)
            return status

        monkeypatch.setattr(wide_ffn_session, "run", run)
        return to_come

    def test_goes_on_after_a_crash_and_in_another_call(self, tmp_path: Path, programs: list[Any]) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        programs += [(1, [{"session": {}}, {"case": 1}]), (1, [{"session": {}}, {"end": {}}])]
        assert wide_ffn_session.main(["-o", str(first), "--minutes", "9"]) == 1
        assert programs == []
        tests, *_ = records(first / "log.jsonl")
        assert (tests["tests"]["passed"], tests["tests"]["skipped"]) == (7, 2)
        programs += [(0, [{"session": {}}, {"end": {}}])]
        assert wide_ffn_session.main(["-o", str(second), "--minutes", "9", "--resume", str(first)]) == 0
        assert [*records(second / "log.jsonl")[0]] == ["tests"]
        assert sum("tests" in record for record in records(second / "log.jsonl")) == 1
        assert json.loads((second / "sm_90.json").read_text())["schema"] == configs.SCHEMA

    def test_a_benchmark_that_gets_nowhere_is_not_started_again(self, tmp_path: Path, programs: list[Any]) -> None:
        programs += [(1, [{"session": {}}]), (1, []), (0, [])]
        assert wide_ffn_session.main(["-o", str(tmp_path), "--minutes", "9"]) == 1
        assert len(programs) == 1

    def test_tests_of_other_sources_do_not_count(self, tmp_path: Path, programs: list[Any], monkeypatch: Any) -> None:
        programs += [(0, [{"end": {}}])] * 2
        assert wide_ffn_session.main(["-o", str(tmp_path), "--minutes", "9"]) == 0
        monkeypatch.setattr(wide_ffn_session, "sources_sha256", lambda: "other")
        assert wide_ffn_session.main(["-o", str(tmp_path), "--minutes", "9"]) == 0
        assert sum("tests" in record for record in records(tmp_path / "log.jsonl")) == 2

    def test_skipped_is_not_passed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Really started, on a machine without a GPU: nothing is executed, and that is no success."""
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        monkeypatch.setattr(wide_ffn_session, "TEST_PROCESSES", 0)
        found = wide_ffn_session.run_tests(tmp_path, 120)
        assert (found["status"], found["passed"], found["failed"]) == (0, 0, 0)
        assert found["skipped"] > 100

    def test_what_takes_too_long_is_killed_with_its_children(self, tmp_path: Path) -> None:
        child = tmp_path / "child"
        assert wide_ffn_session.run(["sh", "-c", f"sleep 600 & echo $! > {child}; wait"], 1.0) is None
        assert_ends(int(child.read_text()))
