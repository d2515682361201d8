"""Settings: what a dataclass of them declares, and what is out of range."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ValidationError

from engines import tensorrt_build, tensorrt_llm
from engines.backends import BACKENDS
from exporter.errors import TargetError
from exporter.recipe import TensorRtEngineRecipe, TensorRtLlmRecipe
from exporter.settings import Setting, owners_by_setting, range_problems, record_of, settings_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    count: Annotated[int | None, Setting("how many.", least=1)] = None
    level: Annotated[int, Setting("how hard.", option="effort", least=0, most=5)] = 3
    file_name: Annotated[Path | None, Setting("where.")] = None
    names: Annotated[tuple[str, ...], Setting("who.")] = ()
    secret: int = 0  # no user's choice


def test_what_is_declared() -> None:
    assert settings_of(Settings) == [
        Setting("how many.", "count", 1, name="count", type=int),
        Setting("how hard.", "effort", 0, 5, name="level", type=int),
        Setting("where.", "file-name", name="file_name", type=Path),
        Setting("who.", "names", name="names", type=tuple),
    ]


def test_a_setting_belongs_to_all_that_declare_it() -> None:
    @dataclass
    class Other:
        names: Annotated[tuple[str, ...], Setting("who.")] = ()
        count: Annotated[int | None, Setting("how many of them.", least=1)] = None

    owners = owners_by_setting({"first": Settings, "none": None, "second": Other})
    assert [(setting.help, names) for setting, names in owners.items()] == [
        ("how many.", ["first"]),
        ("how hard.", ["first"]),
        ("where.", ["first"]),
        ("who.", ["first", "second"]),
        ("how many of them.", ["second"]),
    ]


def test_a_record_is_plain_data() -> None:
    record = record_of(Settings(count=2, file_name=Path("a/b"), names=("c", "d")))
    assert record == {"count": 2, "effort": 3, "file_name": "a/b", "names": ["c", "d"]}
    assert json.loads(json.dumps(record)) == record


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
    found = [str(problem) for problem in range_problems(Settings(**chosen), TargetError)]
    assert len(found) == len(problems)
    assert all(text.startswith(expected) for text, expected in zip(found, problems, strict=True))


@pytest.mark.parametrize("backend", [name for name, kind in BACKENDS.items() if kind.settings is not None])
def test_defaults_are_in_range(backend: str) -> None:
    settings = BACKENDS[backend].settings
    assert settings is not None
    assert list(range_problems(settings(), TargetError)) == []


# By the names of options, since a network has a batch and a maximum, too; how many GPUs build is the machine's affair.
SECTIONS: dict[str, tuple[type[BaseModel], type, set[str], set[str]]] = {
    "tensorrt": (TensorRtEngineRecipe, tensorrt_build.BuildSettings, {"max_batch"}, {"backend"}),
    "tensorrt-llm": (TensorRtLlmRecipe, tensorrt_llm.BuildSettings, {"workers"}, {"to", "tp", "pp", "split_embedding"}),
}


@pytest.mark.parametrize("backend", SECTIONS)
def test_a_recipe_has_the_settings_of_a_backend(backend: str) -> None:
    section, settings, left_out, own = SECTIONS[backend]
    declared = {(setting.option or "").replace("-", "_"): setting for setting in settings_of(settings)}
    assert section.model_fields.keys() - own == declared.keys() - left_out
    known = section.model_validate({"to": "trtllm"} if "to" in own else {"backend": backend})
    assert section.model_validate(known.model_dump()) == known
    for key in declared.keys() - left_out:
        setting, default = declared[key], getattr(settings(), declared[key].name)
        assert getattr(known, key) in (default, None), key
        below = [] if setting.least is None else [setting.least - 1]
        above = [] if setting.most is None else [setting.most + 1]
        for value in below + above:
            with pytest.raises(ValidationError):
                section.model_validate({**known.model_dump(), key: value})
