"""Pictures of measurements: which there are, and that plan, theme and gaps show in their pixels."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from exporter.analysis.dependency import Dependency, measure_dependency
from exporter.analysis.pictures import FRAME, THEMES, heat_map, importance_bars, pictures_of
from exporter.plan import Plan
from tests.tiny import tiny_graph


@pytest.fixture(scope="module")
def measured() -> Dependency:
    return measure_dependency(tiny_graph("AF AF F AF AF"), np.arange(40).reshape(4, 10), kl=True)


def pixels(png: bytes) -> np.ndarray:
    """[height, width, 3]"""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def count_of(color: str, image: np.ndarray) -> int:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return int((image == (red, green, blue)).all(axis=-1).sum())


def test_one_picture_per_kind_and_measure(measured: Dependency) -> None:
    names = [picture.file for picture in pictures_of(measured, Plan())]
    kinds = ("block", "attention", "ffn")
    assert names == [f"{what}_{kind}.png" for what in ("dependency", "importance", "importance_kl") for kind in kinds]
    only = measure_dependency(tiny_graph("AF AF"), np.arange(40).reshape(4, 10), kinds=("ffn",), importance=False)
    assert [picture.file for picture in pictures_of(only, Plan())] == ["dependency_ffn.png"]


def drawn(measured: Dependency, plan: Plan) -> bytes:
    """The heat map of blocks."""
    return next(iter(pictures_of(measured, plan))).draw("light")


def test_what_the_plan_fuses_is_framed_and_what_it_drops_is_hatched(measured: Dependency) -> None:
    bare, framed, hatched = (
        drawn(measured, plan) for plan in (Plan(), Plan(fuse=[(2, 3)]), Plan(drop_attention=[(1, 3)]))
    )
    assert count_of(FRAME, pixels(bare)) == 0
    assert count_of(FRAME, pixels(framed)) > 100
    assert hatched != bare
    # Layer 2 has no attention to begin with: dropping it changes nothing.
    assert drawn(measured, Plan(drop_attention=[2])) == bare
    assert drawn(measured, Plan(drop_attention=[1, 3])) == hatched


def test_layers_outside_the_measured_range_are_left_out(measured: Dependency) -> None:
    part = measure_dependency(tiny_graph("AF AF F AF AF"), np.arange(40).reshape(4, 10), blocks=(1, 2))
    assert drawn(part, Plan(fuse=[(0, 4)], drop_attention=[0])) == drawn(part, Plan())
    assert drawn(part, Plan(fuse=[(1, 2)])) != drawn(part, Plan())
    assert drawn(replace(measured, first=0), Plan(fuse=[(1, 9)])) == drawn(measured, Plan())


@pytest.mark.parametrize("theme", THEMES)
def test_a_theme_is_the_ground(theme: str) -> None:
    matrix = np.triu(np.full((3, 3), 0.2), 1)
    matrix[matrix == 0] = np.nan
    labels = ["0", "1", "2"]
    for png in (
        heat_map(matrix, labels, title="a", theme=theme),
        importance_bars(matrix[0], labels, title="a", what="b", theme=theme),
    ):
        image = pixels(png)
        assert count_of(THEMES[theme].card, image) > image.shape[0] * image.shape[1] / 4
        other = next(colors for name, colors in THEMES.items() if name != theme)
        assert count_of(other.card, image) == 0


@pytest.mark.parametrize(
    "matrix",
    [
        pytest.param(np.full((2, 2), np.nan), id="nothing"),
        pytest.param(np.zeros((2, 2)), id="zeros"),
        pytest.param(np.array([[np.nan, -1e-16], [np.nan, np.nan]]), id="rounding"),
        pytest.param(np.full((200, 200), 0.5), id="large"),
        pytest.param(np.full((1, 1), 2.0), id="one"),
    ],
)
def test_any_matrix_can_be_drawn(matrix: np.ndarray) -> None:
    labels = [str(layer) for layer in range(len(matrix))]
    assert heat_map(matrix, labels, title="a", hatched=[0], groups=[(0, 0)]).startswith(b"\x89PNG")
    assert importance_bars(matrix[0], labels, title="a", what="b").startswith(b"\x89PNG")
