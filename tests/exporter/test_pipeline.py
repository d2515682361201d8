"""That every key of a plan is applied, and what a recipe's steps are recognized by."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporter.graph import structure
from exporter.pipeline import apply_plan, source_fingerprint
from exporter.plan import Plan
from exporter.writers.files import save_folder
from tests.tiny import tiny_graph

PLANS = {
    "drop_attention": Plan(drop_attention=[1]),
    "drop_ffn": Plan(drop_ffn=[2]),
    "fuse": Plan(fuse=[(3, 4)]),
    "parallel": Plan(parallel=[(1, 2)]),
}


@pytest.mark.parametrize("key", Plan.model_fields)
def test_every_key_of_a_plan_changes_the_model(key: str) -> None:
    graph = tiny_graph("AF AF AF F F")
    assert structure(apply_plan(graph, PLANS[key])) != structure(graph)


def test_a_model_of_others_is_recognized_by_names_sizes_and_times(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / ".git").mkdir(parents=True)
    (folder / "sub").mkdir()
    for name in ("config.json", "sub/weights", ".git/index"):
        (folder / name).write_text(name)
    known = source_fingerprint(folder)
    assert [(name, size) for name, (size, _) in known.items()] == [("config.json", 11), ("sub/weights", 11)]
    (folder / ".git" / "index").write_text("another")
    (folder / ".DS_Store").write_text("x")
    (folder / "sub" / "__pycache__").mkdir()
    (folder / "sub" / "__pycache__" / "code.cpython-311.pyc").write_text("x")
    assert source_fingerprint(folder) == known
    os.utime(folder / "sub" / "weights", (0, 0))
    assert source_fingerprint(folder) != known


def test_a_folder_of_ours_is_recognized_by_its_contents_and_a_file_alone_by_its_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_folder(tmp_path / name, [("config.json", b"{}")], kind="checkpoint", details={"name": name})
    assert source_fingerprint(tmp_path / "a") == source_fingerprint(tmp_path / "b")
    (size, _) = source_fingerprint(tmp_path / "a" / "config.json")["config.json"]
    assert size == 2
