"""A report with an analysis beside the results: what it shows of it, and which folders it refuses."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.analysis import read_analysis
from exporter.errors import FuselageError
from tests.engines.test_report import LAYERS, REALISTIC, Page, rendered

MATRIX = [[0.1 + 0.01 * (i + j) if i < j else None for j in range(LAYERS)] for i in range(LAYERS)]
CURVE = [0.5] * LAYERS
MEASURED: dict[str, Any] = {
    "source_layers": [[layer] for layer in range(LAYERS)],
    "first": 0,
    "last": LAYERS - 1,
    "tokens": 1234,
    "matrices": {"ffn": MATRIX},
    "distance_of_output": CURVE,
    "distance_of_contribution": CURVE,
    "relative_contribution": CURVE,
    "importance": {},
    "kl": {},
}
PLAN = "# a reason\ndrop_attention: [[5, 10]]\nfuse: [[5, 9]]\n"


def analysis(folder: Path, *, plan: str = PLAN, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "dependency.json").write_text(json.dumps({**MEASURED, **changes}))
    (folder / "plan.yaml").write_text(plan)
    return folder


def test_pictures_are_in_the_page_in_both_themes_and_beside_it(tmp_path: Path) -> None:
    files = rendered(tmp_path, REALISTIC, analysis=analysis(tmp_path / "analysis"), count=None)
    page = Page(files["report.html"])
    pictures = [attributes for tag, attributes in page.elements if tag in ("source", "img")]
    addresses = [str(picture.get("src") or picture.get("srcset")) for picture in pictures]
    head = "data:image/png;base64,"
    assert all(address.startswith(head) for address in addresses)
    dark, light = (base64.b64decode(address.removeprefix(head)) for address in addresses)
    assert light == files["dependency_ffn.png"]
    assert b"<svg" in files["dependency_ffn.svg"]
    assert dark.startswith(b"\x89PNG")
    assert dark != light
    assert pictures[0]["media"] == "screen and (prefers-color-scheme: dark)"
    policy = next(str(a["content"]) for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert "img-src data:;" in policy
    assert "Measured on 1,234 tokens" in page.text
    markdown = files["report.md"].decode()
    assert "(dependency_ffn.png)" in markdown
    for text in (page.text, markdown):
        assert PLAN in text


def test_hostile_plans_stay_text(tmp_path: Path) -> None:
    hostile = "# </pre><script>alert(1)</script> ``` <b>&\n" + PLAN
    tame, untamed = (
        analysis(tmp_path / name, plan=plan, matrices={}) for name, plan in (("tame", PLAN), ("hostile", hostile))
    )
    usual = Page(rendered(tmp_path, REALISTIC, analysis=tame)["report.html"])
    files = rendered(tmp_path, REALISTIC, analysis=untamed)
    page = Page(files["report.html"])
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in usual.elements]
    assert hostile in page.text
    assert f"````\n{hostile}\n````" in files["report.md"].decode()


def test_null_is_nothing_measured(tmp_path: Path) -> None:
    found = read_analysis(analysis(tmp_path / "a", importance={"attention": [None, *CURVE[1:]]}))
    np.testing.assert_array_equal(np.isnan(found.matrices["ffn"]), np.tril(np.ones((LAYERS, LAYERS), bool)))
    assert [picture.file for picture in found.pictures] == ["dependency_ffn.png", "importance_attention.png"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no_matrices": ({"matrices": None}, "dependency.json: the measurements are malformed: matrices"),
    "unknown_kind": ({"matrices": {"mlp": MATRIX}}, "matrices.mlp"),
    "text_for_a_number": ({"matrices": {"ffn": [["a"] * LAYERS] * LAYERS}}, "matrices.ffn.0.0"),
    "not_square": ({"matrices": {"ffn": MATRIX[:-1]}}, "a matrix is not 16 x 16"),
    "ragged": ({"matrices": {"ffn": [*MATRIX[:-1], [0.1]]}}, "a matrix is not 16 x 16"),
    "range": ({"last": LAYERS}, "blocks 0 to 16 of 16 were measured"),
    "importance": ({"importance": {"ffn": [0.1]}}, "an importance is not of the 16 blocks"),
    "unknown_key": ({"more": 1}, "more: Extra inputs"),
    "plan": ({"plan": "fuse: [1]\n"}, "plan.yaml: fuse.0"),
    "other_model": (
        {"source_layers": [[layer + 1] for layer in range(LAYERS)]},
        "the analysis is of another model than 'baseline': expected layers 0–15, found layers 1–16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_analysis_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(FuselageError) as caught:
        rendered(tmp_path, REALISTIC, analysis=analysis(tmp_path / "analysis", **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["dependency.json", "plan.yaml"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = analysis(tmp_path / "analysis")
    (folder / name).unlink()
    with pytest.raises(FuselageError, match=name):
        rendered(tmp_path, REALISTIC, analysis=folder)
