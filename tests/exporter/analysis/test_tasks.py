"""Scores out of what the harness returns, what is refused before it runs, and the demo's task.

The harness itself is run in tests/peers/test_lm_eval.py.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from exporter.analysis.tasks import TaskScore, check_tasks, run_tasks, scores_from_harness
from exporter.errors import FuselageError

DEMO = Path(__file__).parents[3] / "demo"
HTTP = sys.modules[HTTPError.__module__.partition(".")[0]]  # httpx or httpx2, whichever huggingface_hub is made with

# As lm-evaluation-harness 0.4.13 returns it, what is not read left out.
FOUND = {
    "results": {
        "cloze": {
            "name": "cloze",
            "alias": "cloze",
            "sample_len": 8,
            "acc,none": 0.375,
            "acc_stderr,none": 0.18,
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": "N/A",
        },
        "group": {"alias": "group", "ppl,none": 12, "ppl_stderr,none": 0.5},
        "empty": {"alias": "empty", " ": ""},
    },
    "higher_is_better": {"cloze": {"acc": True, "exact_match": True}, "group": {"ppl": False}},
    "n-samples": {"cloze": {"original": 100, "effective": 8}, "other": {"original": 3, "effective": 3}},
    "group_subtasks": {"group": ["inner"], "inner": ["cloze", "other"]},
}


def test_scores_from_what_the_harness_returns() -> None:
    def score(task: str, metric: str, value: float, stderr: float | None, better: bool, samples: int) -> TaskScore:
        return TaskScore(task=task, metric=metric, value=value, stderr=stderr, higher_is_better=better, samples=samples)

    assert scores_from_harness(FOUND) == [
        score("cloze", "acc", 0.375, 0.18, True, 8),
        score("cloze", "exact_match (strict-match)", 0.25, None, True, 8),
        score("group", "ppl", 12.0, 0.5, False, 11),
    ]


def test_the_missing_harness_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(FuselageError, match=r"not installed. Install it: pip install 'lm_eval\[hf\]>="):
        check_tasks(DEMO / "model", ["fuselage_demo"])


@pytest.mark.parametrize(
    ("error", "is_unreachable"),
    [
        (ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub (ConnectError)"), True),  # datasets
        (OfflineModeIsEnabled("Cannot reach https://huggingface.co"), True),
        (LocalEntryNotFoundError("not on the disk, and the Hub cannot be reached"), True),
        (HTTP.ConnectError("[Errno -2] Name or service not known"), True),
        (HTTP.ReadTimeout("timed out"), True),
        (HTTP.DecodingError("a page that is none"), False),
        (FileNotFoundError("no dataset of this name"), False),
        (BrokenPipeError("a process of ours died"), False),
        (KeyError("doc_to_text"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_a_network_that_is_missing_is_said_to_be(
    error: Exception, is_unreachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simple_evaluate(**options: object) -> None:
        raise error

    manager = SimpleNamespace(match_tasks=list)
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=lambda **options: manager))
    with pytest.raises(FuselageError if is_unreachable else type(error)) as raised:
        run_tasks(DEMO / "model", ["hellaswag"])
    assert ("cannot be fetched" in str(raised.value)) == is_unreachable


def test_the_demo_task_is_what_its_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_task.py", "-o", str(tmp_path / "again.jsonl")])
    runpy.run_path(str(DEMO / "make_task.py"), run_name="__main__")
    assert (tmp_path / "again.jsonl").read_bytes() == (DEMO / "tasks" / "fuselage_demo.jsonl").read_bytes()


def test_samples_of_the_demo_task_have_one_true_continuation() -> None:
    text = " ".join((DEMO / "model" / "heldout.txt").read_text("utf-8").split())
    samples = [json.loads(line) for line in (DEMO / "tasks" / "fuselage_demo.jsonl").read_text("utf-8").splitlines()]
    assert len(samples) > 100
    for sample in samples:
        assert len(set(sample["choices"])) == 4
        followed = [choice for choice in sample["choices"] if sample["context"] + choice in text]
        assert followed == [sample["choices"][sample["answer"]]]
    answers = [sample["answer"] for sample in samples]
    assert max(answers.count(place) for place in range(4)) < len(samples) / 2  # the place gives nothing away
