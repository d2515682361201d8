"""The demo's task in lm-evaluation-harness: on the model as it is and on a folder that we wrote, without a network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from exporter.analysis.tasks import check_tasks, run_tasks
from exporter.errors import FuselageError
from tests.command_line import done

pytestmark = pytest.mark.peers

DEMO = Path(__file__).parents[2] / "demo"
TASKS = DEMO / "tasks"
PLAN = "drop_attention: [[8, 14]]\nfuse: [[8, 13]]\n"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"the harness reaches for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    (folder / "plan.yaml").write_text(PLAN)
    done("transform", DEMO / "model", "--plan", folder / "plan.yaml", "-o", folder / "model")
    return folder / "model"


@torch.inference_mode()
def accuracy(model: Path, count: int) -> float:
    """How often the true continuation of the first samples is the likeliest: token by token, no harness."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=True).eval()
    right = 0
    for line in (TASKS / "fuselage_demo.jsonl").read_text("utf-8").splitlines()[:count]:
        sample = json.loads(line)
        start = len(tokenizer(sample["context"]).input_ids)
        scores = []
        for choice in sample["choices"]:
            ids = torch.tensor([tokenizer(sample["context"] + choice).input_ids])
            logits = loaded(input_ids=ids).logits[0, start - 1 : -1].float().log_softmax(-1)
            scores.append(logits.gather(-1, ids[0, start:, None]).sum().item())
        right += scores.index(max(scores)) == sample["answer"]
    return right / count


def test_accuracy_is_that_of_transformers_alone(fused: Path) -> None:
    for model, trust in ((DEMO / "model", False), (fused, True)):
        scores = run_tasks(model, ["fuselage_demo"], include_path=TASKS, limit=40, trust_remote_code=trust)
        assert [(score.metric, score.samples) for score in scores] == [("acc", 40), ("acc_norm", 40)]
        assert scores[0].value == pytest.approx(accuracy(model, 40), abs=1.5 / 40)  # a near tie may fall either way
        assert scores[0].value > 0.3  # guessing gives 0.25


def test_the_command_prints_and_writes_the_scores(tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    arguments = ["evaluate", DEMO / "model", "--tasks", "fuselage_demo", "--include-path", TASKS, "--limit", 8]
    printed = done(*arguments, "-o", output).output
    first = json.loads(output.read_text())["tasks"][0]
    assert (first["task"], first["metric"], first["samples"]) == ("fuselage_demo", "acc", 8)
    assert f"{first['value']:.4f}" in printed


def test_code_of_a_model_is_run_on_request_only(fused: Path) -> None:
    with pytest.raises(FuselageError, match=r"brings code of its own.*--trust-remote-code"):
        check_tasks(fused, ["fuselage_demo"], include_path=TASKS)


def test_unknown_tasks_and_folders_are_named() -> None:
    with pytest.raises(FuselageError, match="no such task: found no_such_task"):
        check_tasks(DEMO / "model", ["fuselage_demo", "no_such_task"], include_path=TASKS)
    with pytest.raises(FuselageError, match="no such folder of tasks"):
        check_tasks(DEMO / "model", ["fuselage_demo"], include_path=TASKS / "nowhere")
