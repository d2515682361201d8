"""`bench` and `run` when a real worker is killed, or hangs and is interrupted: what is kept, said, and done next."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from commands import recipes, timing
from engines.cpp_program import missing
from engines.onnxruntime import OnnxRuntime
from engines.results import Results, read_results
from exporter.writers import hf, onnx
from exporter.writers.files import save_folder
from tests.command_line import call, done
from tests.tiny import tiny_graph

pytestmark = pytest.mark.skipif(bool(OnnxRuntime().missing()), reason="; ".join(OnnxRuntime().missing()))

ROUNDS = 4
GRID = ["--batch", "1,2", "--input-len", "5", "--output-len", "4", "--rounds", ROUNDS, "--threads", "1"]
Act = Callable[[], None]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("engines")
    network = onnx.emit(tiny_graph("AF F AF"), onnx.PRESETS["onnxruntime"])
    save_folder(folder / "network", network, kind="network", details={})
    build = OnnxRuntime().build
    return [build(folder / "network", folder / label, label=label, force=False) for label in ("baseline", "fused")]


@contextmanager
def workers_end() -> Iterator[None]:
    """No process of ours is left behind."""
    before = psutil.Process().children(recursive=True)
    yield
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []


def signalled(label: str, signum: int) -> Act:
    """Send a signal to the worker of the engine in the folder of that name."""

    def act() -> None:
        workers = [
            child for child in psutil.Process().children() if any(label in Path(w).parts for w in child.cmdline())
        ]
        (worker,) = workers
        worker.send_signal(signum)

    return act


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def hang() -> None:
    """Stop the worker for good; whoever waits for it presses Ctrl-C."""
    signalled("fused", signal.SIGSTOP)()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()


def before_turn(monkeypatch: pytest.MonkeyPatch, module: object, text: str, count: int, act: Act) -> None:
    """Have a command act before the turn of that name for the `count`-th time."""

    @contextmanager
    def step_progress(quiet: bool, **options: bool) -> Iterator[Callable[[int, int, str], None]]:
        seen: list[str] = []

        def step(done: int, total: int, what: str) -> None:
            seen.append(what)
            if what == text and seen.count(text) == count:
                act()

        yield step

    monkeypatch.setattr(module, "step_progress", step_progress)


def rounds_of(results: Results) -> dict[str, list[int]]:
    """Label -> rounds of each batch."""
    found = {(cell.engine, cell.batch): len(cell.ttft_ms) for cell in results.cells}
    return {engine.label: [found.get((engine.label, batch), 0) for batch in (1, 2)] for engine in results.engines}


KILL, CRASH = signalled("fused", signal.SIGKILL), signalled("fused", signal.SIGSEGV)
# Each in the second kept round of batch 1, in which "fused" comes after "baseline".
ENDS = {
    "killed": (
        "python",
        KILL,
        [4, 4],
        "the worker of 'fused' was ended by signal 9 (Killed, out of memory?); it printed",
    ),
    "C++ program killed": ("cpp", KILL, [4, 4], "the worker of 'fused' was ended by signal 9 (Killed, out of memory?)"),
    "C++ program crashes": ("cpp", CRASH, [4, 4], "the worker of 'fused' was ended by signal 11 (Segmentation fault)"),
    "C++ program hangs": ("cpp", hang, [2, 0], "interrupted"),
    "interrupted": ("python", interrupt, [2, 0], "interrupted"),
}


@pytest.mark.parametrize(("runtime", "act", "baseline_rounds", "problem"), ENDS.values(), ids=ENDS)
def test_bench_keeps_what_it_measured(
    runtime: str,
    act: Act,
    baseline_rounds: list[int],
    problem: str,
    engines: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if runtime == "cpp" and missing("onnxruntime"):
        pytest.skip("; ".join(missing("onnxruntime")))
    before_turn(monkeypatch, timing, "fused, batch 1, input 5, output 4", 3, act)
    output = tmp_path / "out.json"
    with workers_end():
        result = call("bench", *engines, *GRID, "--runtime", runtime, "-o", output)
    assert result.exit_code == 4, result.output
    assert f"error: {output}: the benchmark is incomplete; what was measured is in this file:" in result.stderr
    assert f"  fused stopped after 1 of {ROUNDS} rounds at batch 1, input 5, output 4: " in result.stderr
    assert problem in result.stderr
    assert "`report` shows what there is" in result.stderr
    assert "fused (incomplete)" in result.stdout
    assert os.listdir(tmp_path) == ["out.json"]
    results = read_results(output)
    assert rounds_of(results) == {"baseline": baseline_rounds, "fused": [1, 0]}
    assert results.engines[1].program == runtime


@pytest.mark.parametrize("act", [KILL, interrupt], ids=["killed", "interrupted"])
def test_bench_writes_nothing_before_there_is_a_sample(
    act: Act, engines: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_turn(monkeypatch, timing, "fused, batch 1, input 5, output 4", 1, act)
    with workers_end():
        result = call("bench", *engines, *GRID, "--runtime", "python", "-o", tmp_path / "out.json")
    assert result.exit_code == (130 if act is interrupt else 2)
    assert ("Aborted!" if act is interrupt else "error: the worker of 'fused' was ended by signal 9") in result.stderr
    assert os.listdir(tmp_path) == []


RECIPE = """
model: model
variants: [{name: baseline, checkpoint: false}, {name: fused, plan: {drop_attention: [1], fuse: [[0, 1]]}}]
bench: {runtime: python, input_len: [5], output_len: [4], rounds: 4, threads: 1}
"""


def test_run_keeps_what_it_measured_and_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "model", hf.emit(tiny_graph("F AF AF"), hf.Options()), kind="checkpoint", details={})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    output = tmp_path / "out"
    before_turn(monkeypatch, recipes, "fused, batch 1, input 5, output 4", 3, KILL)
    kept = output / "benchmark" / "results.json"
    with workers_end():
        result = call("run", tmp_path / "recipe.yaml", "-o", output)
    assert result.exit_code == 4, result.output
    assert f"error: {kept}: the benchmark is incomplete" in result.stderr
    assert "fused stopped after 1 of 4 rounds" in result.stderr
    assert read_results(kept).engines[1].stopped is not None
    assert not (output / "report").exists()
    done("report", kept, "-o", tmp_path / "report", "-q")
    assert "fused is incomplete: it stopped after 1 of 4 rounds" in (tmp_path / "report" / "report.md").read_text()
    monkeypatch.undo()
    again = done("run", tmp_path / "recipe.yaml", "-o", output).output
    assert "kept  fused: engine" in again
    assert "made  benchmark" in again
    assert read_results(kept).is_complete
    assert "made" not in done("run", tmp_path / "recipe.yaml", "-o", output).output
