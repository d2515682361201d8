"""What a recipe's run refuses before its first step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from engines.run import run_recipe
from exporter.errors import FuselageError
from exporter.recipe import Recipe
from exporter.writers import hf
from exporter.writers.files import save_folder
from tests.exporter.analysis.test_evaluate import word_tokenizer
from tests.tiny import tiny_graph

VARIANTS = [{"name": "a"}, {"name": "b", "plan": "auto"}]
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "text_missing": ({"evaluate": {"text": "nowhere.txt"}}, "out", "nowhere.txt: no such text"),
    "calibration_missing": ({"calibration": {"text": "nowhere.txt"}}, "out", "nowhere.txt: no such text"),
    "too_many_drops": ({"analysis": {"text": "text.txt", "drop": 3}}, "out", "fewer attentions to drop"),
    "no_tokenizer": ({"model": "bare", "evaluate": {"text": "text.txt"}}, "out", "no tokenizer.json"),
    "output_in_the_model": ({}, "model/out", "inside each other"),
    "model_in_a_step": ({"model": "out/report"}, "out", "inside each other"),
    "model_in_a_variant": ({"model": "out/a/checkpoint"}, "out", "inside each other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_known_beforehand_is_refused_beforehand(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, output, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "bare"):
        save_folder(Path(folder), hf.emit(tiny_graph("AF F AF"), hf.Options()), kind="checkpoint", details={})
    word_tokenizer(Path("model"), 320)
    Path("text.txt").write_text("w1 w2 w3 " * 50)
    before = sorted(os.walk(tmp_path))
    defaults = {"model": "model", "variants": VARIANTS, "analysis": {"text": "text.txt"}}
    with pytest.raises(FuselageError, match=message):
        run_recipe(Recipe.model_validate(defaults | keys), Path(output))
    assert sorted(os.walk(tmp_path)) == before
