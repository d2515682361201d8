"""`build.py distill` as a user meets it: the folder it writes, several processes, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from exporter.distill import _Trainer
from exporter.graph import ModelGraph
from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.read import open_model
from exporter.writers.files import check_folder
from tests.checkpoints import saved_model, word_tokenizer, write_words
from tests.command_line import call, done
from tests.exporter.test_distill import assert_same_updates, everything

ROOT = Path(__file__).parent.parent


def save_llama(folder: Path, *, vocab_size: int = 307) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 6, "max_position_embeddings": 128}
    saved_model(folder, "Llama", {**sizes, "vocab_size": vocab_size})
    word_tokenizer(folder, 300)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of six layers, a plan and a text."""
    folder = tmp_path_factory.mktemp("distill")
    save_llama(folder / "llama")
    write_words(folder / "text.txt", 800, 300)
    (folder / "plan.yaml").write_text("drop_attention: [[2, 4]]\nfuse: [[2, 3]]\n")
    return folder


def written(folder: Path) -> ModelGraph:
    return open_model(folder, need_weights=True).graph


def student(work: Path) -> ModelGraph:
    return fuse_ffn(drop_attention(written(work / "llama"), [2, 3, 4]), [(2, 3)])


def arguments(work: Path, **changes: object) -> list[str]:
    """The command on the files of `work`; options of one word are given as keywords, None leaves one out."""
    options = {
        "model": work / "llama",
        "teacher": work / "llama",
        "plan": work / "plan.yaml",
        "text": work / "text.txt",
        "context": 20,
        "steps": 12,
        "lr": 3e-3,
        **changes,
    }
    model = options.pop("model")
    return ["distill", str(model), *(str(x) for k, v in options.items() if v is not None for x in (f"--{k}", v))]


def test_a_distilled_folder_is_nearer_to_the_teacher_and_says_how_it_came_to_be(work: Path, tmp_path: Path) -> None:
    output = tmp_path / "distilled"
    lines = done(*arguments(work, output=output, steps=40, resume=tmp_path / "state")).stderr.splitlines()
    assert [line.split()[0] for line in lines if "loss" in line] == [f"{step}/40" for step in range(2, 41, 2)]
    assert not (tmp_path / "state").exists()
    record = json.loads((output / "distill.json").read_text())
    manifest = check_folder(output, "checkpoint", hashes=True)
    assert record["settings"]["steps"] == len(record["kl"]) == manifest.details["steps"] == 40
    assert manifest.details["teacher"] == str(work / "llama")
    assert manifest.details["kl_of_last_steps"] == pytest.approx(np.mean(record["kl"][-4:]))
    kl = []
    for name, model, plan in (("before", work / "llama", ["--plan", work / "plan.yaml"]), ("after", output, [])):
        text = ["--text", work / "text.txt", "--context", 20]
        done("evaluate", model, *plan, "--reference", work / "llama", *text, "-o", tmp_path / f"{name}.json")
        kl.append(json.loads((tmp_path / f"{name}.json").read_text())["kl_divergence"])
    assert kl[1] < 0.5 * kl[0]
    assert kl[0] == pytest.approx(np.mean(record["kl"][:4]), rel=0.5)


def test_chosen_layers_are_trained_and_the_rest_is_copied(work: Path, tmp_path: Path) -> None:
    done(*arguments(work, output=tmp_path / "out", blocks="2-3,5-5", epochs=0.5, steps=None))
    assert len(json.loads((tmp_path / "out" / "distill.json").read_text())["kl"]) == 2  # 40 windows, half of 5 steps
    before, after = everything(student(work)), everything(written(tmp_path / "out"))
    assert {name.split(".")[1] for name in before if (before[name] != after[name]).any()} == {"2", "4"}


def test_torchrun_goes_on_with_a_run_that_one_process_began(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(*arguments(work, output=tmp_path / "expected"))

    def step(trainer: _Trainer, number: int, windows: np.ndarray) -> tuple[float, float]:
        if number == 8:
            signal.raise_signal(signal.SIGINT)
        return take_step(trainer, number, windows)

    take_step = _Trainer.step
    state = tmp_path / "state"
    command = arguments(work, output=tmp_path / "found", resume=state, **{"save-every": 3})
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "step", step)
        assert call(*command).exit_code == 130
    assert (state / "step-6").is_dir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "build.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*torchrun, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("wrote") == 1
    assert not state.exists()
    losses = [json.loads((tmp_path / name / "distill.json").read_text())["kl"] for name in ("found", "expected")]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert_same_updates(written(tmp_path / "found"), written(tmp_path / "expected"), student(work), 2e-3)


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no_teacher": ({"teacher": "{tmp}/none"}, "none: no such model folder"),
    "vocabulary": ({"teacher": "{tmp}/other_vocabulary"}, "different vocabularies: expected 310, found 307"),
    "tokens": ({"teacher": "{tmp}/other_tokens"}, "tokenizers have different tokens: found 2 that differ"),
    "no_tokenizer": ({"model": "{tmp}/no_tokenizer"}, "no tokenizer.json"),
    "not_finite": ({"model": "{tmp}/not_finite"}, "diverged in step 1"),
    "no_text": ({"text": "{tmp}/none.txt"}, "none.txt: no such text"),
    "empty_text": ({"text": "{tmp}/empty.txt"}, "text is empty"),
    "long_context": ({"context": 129}, "longer than the model was made for: expected at most 128 tokens"),
    "layer": ({"blocks": "4-9"}, "layer 9 is not in the model"),
    "cut": ({"blocks": "3-4"}, "cuts through a block"),
    "range": ({"blocks": "4"}, "'4' is not a range"),
    "epochs": ({"steps": None, "epochs": "inf"}, "inf is not in the range"),
    "temperature": ({"temperature": "1e308"}, "1e+308 is not in the range"),
    "rate": ({"lr": "nan", "steps": 1}, "'nan' is not a finite number"),
    "pieces": ({"accumulate": 3}, "expected a multiple of 3, found 8"),
    "parallel": ({"plan": "{tmp}/parallel.yaml"}, "parallel"),
    "output_exists": ({"output": "{tmp}"}, "output exists"),
    "output_is_teacher": ({"output": "{work}/llama/x"}, "inside each other"),
    "other_run": ({"resume": "{tmp}/state"}, "belongs to another run"),
    "no_folder": ({"resume": "{work}/text.txt/state"}, "text.txt: output cannot be created: not a folder"),
    "not_a_run": ({"resume": "{work}"}, "holds something else"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_ends_with_code_2_one_message_and_nothing_new(case: str, work: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    prepare = PREPARED.get(case)
    if prepare is not None:
        prepare(work, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    paths = {k: v.format(tmp=tmp_path, work=work) if isinstance(v, str) else v for k, v in changes.items()}
    result = call(*arguments(work, **{"output": tmp_path / "out", **paths}))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_found_before_it_trains(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.distill.distill", None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    result = call(*arguments(work, output=tmp_path / "out"))
    assert (result.exit_code, "not enough disk space" in result.output) == (2, True), result.output
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_refused(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    result = call(*arguments(work, output=tmp_path / "out", device="cuda"))
    assert result.exit_code == 2
    assert "needs a CUDA device of its own: expected at least 2, found 1" in result.output


def _without_tokenizer(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "llama", tmp_path / "no_tokenizer", ignore=shutil.ignore_patterns("tokenizer.json"))


def _with_infinity(work: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(work / "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
    model.save_pretrained(tmp_path / "not_finite")
    shutil.copy(work / "llama" / "tokenizer.json", tmp_path / "not_finite")


def _with_other_tokens(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "llama", tmp_path / "other_tokens")
    tokenizer = tmp_path / "other_tokens" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w7"', '"v7"'))


PREPARED: dict[str, Callable[[Path, Path], object]] = {
    "vocabulary": lambda work, tmp_path: save_llama(tmp_path / "other_vocabulary", vocab_size=310),
    "tokens": _with_other_tokens,
    "no_tokenizer": _without_tokenizer,
    "not_finite": _with_infinity,
    "empty_text": lambda work, tmp_path: (tmp_path / "empty.txt").write_text(" \n"),
    "parallel": lambda work, tmp_path: (tmp_path / "parallel.yaml").write_text("parallel: [[0, 1]]\n"),
    "other_run": lambda work, tmp_path: save_json(
        tmp_path / "state" / "run.json", {"key": "?", "parts": 1, "losses": []}
    ),
}


def save_json(path: Path, value: object) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps(value))
