"""Settings: what a dataclass of them declares, and what is out of range."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from engines import tensorrt_build
from engines.backends import BACKENDS
from engines.settings import Setting, range_problems, settings_of
from exporter.recipe import TensorRtEngineRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    count: Annotated[int | None, Setting("how many.", least=1)] = None
    level: Annotated[int, Setting("how hard.", option="effort", least=0, most=5)] = 3
    file_name: Annotated[Path | None, Setting("where.")] = None
    names: Annotated[tuple[str, ...], Setting("who.")] = ()


def test_what_is_declared() -> None:
    assert settings_of(Settings) == [
        Setting("how many.", "count", 1, name="count", type=int),
        Setting("how hard.", "effort", 0, 5, name="level", type=int),
        Setting("where.", "file-name", name="file_name", type=Path),
        Setting("who.", "names", name="names", type=tuple),
    ]


@pytest.mark.parametrize(
    ("chosen", "problems"),
    [
        ({}, []),
        ({"count": 1, "level": 5}, []),
        ({"count": 0, "level": 0}, ["count is a whole number of at least 1: found 0"]),
        ({"level": 6}, ["no such level: expected 0 to 5, found 6"]),
        ({"count": -1, "level": -1}, ["count is a whole number of at least 1", "no such level"]),
    ],
)
def test_ranges(chosen: dict[str, Any], problems: list[str]) -> None:
    found = [str(problem) for problem in range_problems(Settings(**chosen))]
    assert len(found) == len(problems)
    assert all(text.startswith(expected) for text, expected in zip(found, problems, strict=True))


@pytest.mark.parametrize("backend", [name for name, kind in BACKENDS.items() if kind.settings is not None])
def test_defaults_are_in_range(backend: str) -> None:
    settings = BACKENDS[backend].settings
    assert settings is not None
    assert list(range_problems(settings())) == []


def test_a_recipe_has_the_settings_of_tensorrt() -> None:
    """By the same names; the batch is that of the recipe's network."""
    settings = {setting.name for setting in settings_of(tensorrt_build.BuildSettings)}
    assert TensorRtEngineRecipe.model_fields.keys() == settings - {"max_batch_size"} | {"backend"}
