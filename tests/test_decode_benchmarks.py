"""The benchmarks of decode: what they send to the processes that load and measure contestants."""

from __future__ import annotations

import pickle
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("script", ["compare_decode", "int8_decode"])
def test_contestants_go_to_a_process_of_their_own(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    contestants = import_module(script).CONTESTANTS
    assert pickle.loads(pickle.dumps(contestants)).keys() == contestants.keys()
