"""Ranges against hooks on transformers; what fusing makes of them; files, resuming, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from exporter import calibration as module
from exporter import hidden_states
from exporter.calibration import (
    Calibration,
    CalibrationError,
    calibrate,
    calibration_files,
    check_belongs,
    ranges_of,
    read_calibration,
)
from exporter.errors import CheckpointError, FuselageError, OutputError
from exporter.graph import FFN, ModelGraph
from exporter.hidden_states import remove_states
from exporter.lazy import array
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.ranges import input_range
from exporter.read import open_model
from exporter.safetensors_io import FileTensor
from exporter.writers.files import save_folder
from tests.checkpoints import saved_model
from tests.tiny import quantized_graph, tiny_graph

ROOT = Path(__file__).parent.parent.parent
TOKENS = np.random.default_rng(1).integers(0, 97, (5, 16))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("calibration") / "llama"
    return folder, saved_model(folder, "Llama", {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 97})


def inputs_of_linears(model: transformers.LlamaForCausalLM) -> dict[str, np.ndarray]:
    """|input| of every linear by module name, [tokens, in]."""
    found: dict[str, np.ndarray] = {}

    def hook(name: str):
        def keep(_module: object, arguments: tuple[torch.Tensor, ...]) -> None:
            found[name] = arguments[0].detach().abs().flatten(0, 1).numpy()

        return keep

    handles = [
        child.register_forward_pre_hook(hook(name))
        for name, child in model.named_modules()
        if isinstance(child, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(torch.from_numpy(TOKENS))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("percentile", [None, 90.0, 100.0])
def test_against_hooks(percentile: float | None, llama: tuple[Path, transformers.LlamaForCausalLM]) -> None:
    folder, model = llama
    graph = open_model(folder, need_weights=True).graph
    ranges = ranges_of(calibrate(graph, TOKENS, text="random", percentile=percentile, batch=2), graph)
    inputs = inputs_of_linears(model)
    for layer, block in enumerate(graph.flat_blocks):
        for sublayer, module_name, names in (
            ("attention", "self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"]),
            ("ffn", "mlp", ["gate_proj", "up_proj", "down_proj"]),
        ):
            for name in names:
                magnitudes = inputs[f"model.layers.{layer}.{module_name}.{name}"]
                above = 8 if percentile == 90.0 else 0  # 10 % of 80 tokens
                expected = np.sort(magnitudes, axis=0)[-1 - above]
                found = input_range(getattr(block, sublayer), getattr(ranges[layer], sublayer), name).numpy()
                np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_keys_and_values(llama: tuple[Path, transformers.LlamaForCausalLM]) -> None:
    folder, model = llama
    graph = open_model(folder, need_weights=True).graph
    found = calibrate(graph, TOKENS, text="random").ranges
    with torch.no_grad():
        cache = model(torch.from_numpy(TOKENS), use_cache=True).past_key_values
    for layer in range(3):
        for name, values in (("key", cache.layers[layer].keys), ("value", cache.layers[layer].values)):
            expected = values.abs().amax(dim=(0, 2)).flatten().numpy()
            np.testing.assert_allclose(found[f"{layer}.attention.{name}"], expected, rtol=1e-4, atol=1e-6)


def test_fused_layers_share_what_was_measured() -> None:
    graph = tiny_graph("AF F - F F", intermediate_size=[100, 128, 60, 90])
    measured = calibrate(graph, TOKENS, text="random")
    fused = fuse_ffn(graph, [(1, 3)])
    once, twice = ranges_of(measured, fused), ranges_of(measured, fuse_ffn(fused, [(1, 4)]))
    inner = [measured.ranges[f"{layer}.ffn.down_proj"] for layer in (1, 3, 4)]
    np.testing.assert_array_equal(once[1].ffn["down_proj"].numpy()[:188], np.concatenate(inner[:2]))
    np.testing.assert_array_equal(twice[1].ffn["down_proj"].numpy()[:278], np.concatenate(inner))
    assert not twice[1].ffn["down_proj"].numpy()[278:].any()
    outer = np.max([measured.ranges[f"{layer}.ffn.norm"] for layer in (1, 3, 4)], axis=0)
    np.testing.assert_array_equal(twice[1].ffn["norm"].numpy(), outer)
    # What was measured on the fused model itself is used first, and serves what is made of that.
    again = calibrate(fused, TOKENS, text="random")
    assert "1+3.ffn.down_proj" in again.ranges
    merged = ranges_of(again, fuse_ffn(fused, [(1, 4)]))[1].ffn["down_proj"].numpy()
    np.testing.assert_array_equal(merged[:188], again.ranges["1+3.ffn.down_proj"][:188])


def test_files(tmp_path: Path) -> None:
    graph = tiny_graph("AF (AF AF) L -")
    measured = calibrate(graph, TOKENS, text="random", percentile=99.0)
    save_folder(tmp_path / "c", calibration_files(measured).items(), kind="calibration", details={})
    back = read_calibration(tmp_path / "c")
    assert replace(back, ranges={}) == replace(measured, ranges={})
    assert back.ranges.keys() == measured.ranges.keys()
    assert all((back.ranges[name] == measured.ranges[name]).all() for name in back.ranges)


def test_one_pass_over_the_weights(
    llama: tuple[Path, transformers.LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = open_model(llama[0], need_weights=True).graph
    monkeypatch.setattr(module, "fingerprint", lambda graph: "")
    read = 0
    rows = FileTensor.rows

    def counted(tensor: FileTensor, start: int, stop: int) -> np.ndarray:
        nonlocal read
        read += (stop - start) * tensor.row_nbytes
        return rows(tensor, start, stop)

    monkeypatch.setattr(FileTensor, "rows", counted)
    calibrate(graph, TOKENS, text="random", batch=1)
    blocks = sum(t.nbytes for entry in graph.blocks for t in module.weights(entry))
    assert blocks <= read <= blocks + graph.embedding.nbytes


class Killed(Exception):
    pass


def test_resumes_where_it_was_interrupted(tmp_path: Path) -> None:
    graph = tiny_graph("AF F AF F")
    whole = calibrate(graph, TOKENS, text="random", percentile=99.0)
    seen: list[int] = []

    def progress(done: int, _total: int) -> None:
        seen.append(done)
        if seen == [0, 1, 2]:
            raise Killed

    with pytest.raises(Killed):
        calibrate(graph, TOKENS, text="random", percentile=99.0, work=tmp_path / "w", progress=progress)
    with pytest.raises(FuselageError, match="another measurement"):
        calibrate(graph, TOKENS[:2], text="random", percentile=99.0, work=tmp_path / "w")
    again = calibrate(graph, TOKENS, text="random", percentile=99.0, work=tmp_path / "w", progress=progress)
    assert seen[3:] == [2, 3, 4]
    calibrate(graph, TOKENS, text="random", percentile=99.0, work=tmp_path / "w", progress=progress)
    assert seen[6:] == [4]  # nothing is left to be measured
    remove_states(tmp_path / "w")
    assert not (tmp_path / "w").exists()
    assert again.ranges.keys() == whole.ranges.keys()
    assert all(np.allclose(again.ranges[name], whole.ranges[name], rtol=1e-6) for name in whole.ranges)


# Calibrates in a child process that is killed before its first, second, ... file-system call, and then once more in
# the same folder. Prints for every kill the block that the second run began with.
VICTIMS = """
import os, signal, sys
from pathlib import Path
import numpy as np, torch
from exporter.calibration import calibrate
from exporter.hidden_states import remove_states
from tests.tiny import tiny_graph

torch.set_num_threads(1)
graph = tiny_graph("AF - F")
tokens = np.random.default_rng(1).integers(0, 97, (5, 16))
folder = Path(sys.argv[1])

def measure(work, progress=None):
    found = calibrate(graph, tokens, text="random", percentile=99.0, work=work, progress=progress).ranges
    remove_states(work)
    return found

CALLS = ("open", "mmap.__new__", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.mkdir")
calls = 0

def trap(fatal):
    def hook(event, arguments):
        global calls
        calls += event in CALLS
        if event in CALLS and calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

whole = measure(folder / "whole")
for fatal in range(1, 1000):
    work = folder / str(fatal)
    pid = os.fork()
    if pid == 0:
        trap(fatal)
        measure(work)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
        break
    begun = []
    again = measure(work, lambda done, total: begun.append(done))
    assert again.keys() == whole.keys()
    assert all((again[name] == whole[name]).all() for name in whole), fatal
    assert not work.exists(), fatal
    print(begun[0], flush=True)
"""


def test_killed_before_every_single_call(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", VICTIMS, str(tmp_path)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    begun = [int(line) for line in result.stdout.split()]
    assert len(begun) > 30  # as many kills
    finished = begun.index(3)
    assert begun[:finished] == sorted(begun[:finished])
    assert set(begun) == {0, 1, 2, 3}  # a block that was finished is not done again
    assert set(begun[finished:]) == {0, 3}  # and once the folder is being emptied, all of them are, or none


def test_a_commit_writes_what_is_new(tmp_path: Path) -> None:
    """Every range is written once: what a commit writes does not grow with the blocks before it."""
    before: dict[str, os.stat_result] = {}
    written: list[int] = []

    def progress(done: int, total: int) -> None:
        if done == total:
            return
        files = {path.name: path.stat() for path in tmp_path.iterdir() if path.suffix != ".float32"}
        written.append(sum(now.st_size for name, now in files.items() if now != before.get(name)))
        before.update(files)

    calibrate(tiny_graph(" ".join(["F"] * 20)), TOKENS, text="random", work=tmp_path, progress=progress)
    by_commit = written[1:]  # the first commits the embeddings
    assert len(by_commit) == 19
    assert (64 + 256) * 4 < min(by_commit) <= max(by_commit) < (64 + 256) * 4 + 500


def interrupted(work: Path) -> None:
    """Leave in `work` what a run over TOKENS leaves there when it is killed in its second block."""

    def progress(done: int, _total: int) -> None:
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        calibrate(tiny_graph("AF F"), TOKENS, text="random", work=work, progress=progress)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    refused: list[str] = []

    def progress(done: int, _total: int) -> None:
        if done == 1:
            with pytest.raises(OutputError) as caught:
                calibrate(tiny_graph("AF F"), TOKENS, text="random", work=tmp_path / "w")
            refused.append(str(caught.value))
            with pytest.raises(OutputError) as caught:
                remove_states(tmp_path / "w")
            refused.append(str(caught.value))

    calibrate(tiny_graph("AF F"), TOKENS, text="random", work=tmp_path / "w", progress=progress)
    assert len(refused) == 2
    assert all("another run is using the folder" in error for error in refused)


def test_what_is_not_its_own_is_not_removed(tmp_path: Path) -> None:
    calibrate(tiny_graph("AF F"), TOKENS, text="random", work=tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    remove_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def first_schema(work: Path) -> None:
    """progress.json as the version wrote it that kept all ranges in it."""
    saved = json.loads((work / "progress.json").read_text())
    del saved["schema"]
    (work / "progress.json").write_text(json.dumps(saved | {"sums": {"0.ffn.norm": [1.0] * 64}}))


def a_folder_for_progress(work: Path) -> None:
    (work / "progress.json").unlink()
    (work / "progress.json").mkdir()


def progress_with(**changes: object) -> Callable[[Path], object]:
    def change(work: Path) -> None:
        saved = json.loads((work / "progress.json").read_text())
        (work / "progress.json").write_text(json.dumps(saved | changes))

    return change


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "of the version before": (first_schema, "of another version of Fuselage.*Remove the folder"),
    "a folder for progress": (a_folder_for_progress, r"progress\.json: malformed"),
    "no count of commits": (progress_with(commits="3"), r"progress\.json: malformed progress \(commits: "),
    "a block before the first": (progress_with(next_block=-1), r"progress\.json: malformed progress \(next_block: "),
    "ranges are missing": (
        lambda work: (work / "found.2.safetensors").unlink(),
        r"found\.2\.safetensors: cannot be read",
    ),
    "hidden states are missing": (lambda work: (work / "x.0.float32").unlink(), r"x\.0\.float32: cannot be read"),
    "hidden states are cut short": (
        lambda work: os.truncate(work / "x.0.float32", 8),
        r"x\.0\.float32: cannot be read",
    ),
    "ranges are cut short": (
        lambda work: os.truncate(work / "found.2.safetensors", 100),
        r"found\.2\.safetensors: cannot be read",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_progress_that_cannot_be_gone_on_from(case: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    change, message = DAMAGED[case]
    change(tmp_path)
    with pytest.raises(OutputError, match=message):
        calibrate(tiny_graph("AF F"), TOKENS, text="random", work=tmp_path)


NOT_OURS: dict[str, tuple[Callable[[Path], object], str]] = {
    "windows of another length": (lambda work: None, "another measurement"),
    "a folder of the user": (lambda work: (work / "thesis.tex").write_text("x"), "something else: found thesis.tex"),
    "a folder in it": (lambda work: (work / "deeper").mkdir(), "something else: found deeper"),
    "somebody else's progress": (lambda work: (work / "progress.json").write_text("[]"), "another measurement"),
    "rubbish": (lambda work: (work / "progress.json").write_text("{"), "progress.json: malformed"),
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_a_folder_that_is_not_its_own_is_left_alone(case: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    change, message = NOT_OURS[case]
    change(tmp_path)
    before = {path.name: path.read_bytes() if path.is_file() else b"" for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=message):
        calibrate(tiny_graph("AF F"), TOKENS.reshape(10, 8), text="random", work=tmp_path)
    assert {path.name: path.read_bytes() if path.is_file() else b"" for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_found_before_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        os.ftruncate(fd, offset + size)  # what a file system leaves behind when it runs out of blocks
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hidden_states, "RESERVE", full)
    size = f"{TOKENS.size * 64 * 4:,} bytes"
    with pytest.raises(OutputError, match=f"No space left on device: expected {size}"):
        calibrate(tiny_graph("AF F"), TOKENS, text="random", work=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_with_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot hold progress: No space left on device\. Free some space"):
        calibrate(tiny_graph("AF F"), TOKENS, text="random", work=tmp_path)


def test_codes_are_not_calibrated() -> None:
    graph = quantized_graph(tiny_graph("AF"), "int8-weight-only")
    with pytest.raises(CalibrationError, match=r"quantized already: found blocks\.0\.attention\.q_proj"):
        calibrate(graph, TOKENS, text="random")


def test_spilled_states_change_nothing() -> None:
    graph = tiny_graph("AF F")
    whole, spilled = (calibrate(graph, TOKENS, text="random", budget_bytes=budget) for budget in (1 << 30, 1))
    assert all((spilled.ranges[name] == whole.ranges[name]).all() for name in whole.ranges)


def with_range(measured: Calibration, name: str, values: np.ndarray | None) -> Calibration:
    ranges = {**measured.ranges, name: values}
    return replace(measured, ranges={key: one for key, one in ranges.items() if one is not None})


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("1.ffn.down_proj", None, "block 1: the calibration has no range"),
        ("0.attention.norm", np.ones(63, np.float32), "block 0: .*another size"),
        ("1.ffn.down_proj", np.array([*[1] * 255, np.nan], np.float32), "finite"),
        ("1.ffn.down_proj", np.array([*[1] * 255, -1], np.float32), "finite"),
        ("1.ffn.down_proj", np.ones(300, np.float32), "another size"),
    ],
)
def test_ranges_that_cannot_be_used(name: str, values: np.ndarray | None, message: str) -> None:
    graph = tiny_graph("AF F")
    measured = with_range(calibrate(graph, TOKENS, text="random"), name, values)
    with pytest.raises(CalibrationError, match=message):
        ranges_of(measured, graph)


@pytest.mark.parametrize("values", [np.ones(64, np.float16), np.ones((1, 64), np.float32), np.ones(64, np.int64)])
def test_ranges_of_another_kind_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    measured = with_range(calibrate(tiny_graph("AF"), TOKENS, text="random"), "0.attention.norm", values)
    save_folder(tmp_path / "c", calibration_files(measured).items(), kind="calibration", details={})
    with pytest.raises(CalibrationError, match=r"ranges\.safetensors: 0\.attention\.norm: a range is a row of float32"):
        read_calibration(tmp_path / "c")


def test_another_model_is_refused() -> None:
    graph, other = tiny_graph("AF F"), tiny_graph("AF F", seed=1)
    measured = calibrate(graph, TOKENS, text="random")
    check_belongs(measured, other, graph)
    with pytest.raises(CalibrationError, match="another model"):
        check_belongs(measured, other)


def test_nan_weights_are_named() -> None:
    graph: ModelGraph = tiny_graph("AF F")
    ffn = graph.flat_blocks[1].ffn
    assert isinstance(ffn, FFN)
    bad = ffn.up_proj.weight.numpy().copy()
    bad[3, 4] = np.nan
    broken = replace(ffn, up_proj=replace(ffn.up_proj, weight=array(bad)))
    blocks = (graph.blocks[0], replace(graph.flat_blocks[1], ffn=broken))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        calibrate(replace(graph, blocks=blocks), TOKENS, text="random")


@pytest.mark.parametrize("percentile", [0.0, 49.0, 100.5, float("nan")])
def test_a_percentile_that_is_none(percentile: float) -> None:
    with pytest.raises(CalibrationError, match="percentile"):
        calibrate(tiny_graph("AF"), TOKENS, text="random", percentile=percentile)


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"[]",
        b'{"fingerprint": "1", "text": "", "tokens": "x", "percentile": null}',
        b'{"fingerprint": "1", "text": "", "tokens": 1, "percentile": 1' + b"0" * 400 + b"}",  # beyond a float
    ],
    ids=["empty", "a list", "a string", "a huge number"],
)
def test_malformed_files(content: bytes, tmp_path: Path) -> None:
    files = calibration_files(calibrate(tiny_graph("AF"), TOKENS, text="random"))
    save_folder(tmp_path / "c", {**files, "calibration.json": content}.items(), kind="calibration", details={})
    with pytest.raises(CalibrationError, match=r"malformed calibration \(\w*: (Input|Field)"):
        read_calibration(tmp_path / "c")
