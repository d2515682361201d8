"""Settings: what a dataclass of them declares, and what is out of range."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import ValidationError

from engines.backends import BACKENDS
from exporter.errors import TargetError
from exporter.settings import Setting, owners_by_setting, range_problems, record_of, settings_from_data, settings_of
from exporter.targets import TARGETS


@dataclass(frozen=True, slots=True)
class Settings:
    count: Annotated[int | None, Setting("how many.", least=1)] = None
    level: Annotated[int, Setting("how hard.", option="effort", least=0, most=5)] = 3
    file_name: Annotated[Path | None, Setting("where.")] = None
    names: Annotated[tuple[str, ...], Setting("who.")] = ()
    size: Annotated[int | None, Setting("how large.", least=2, in_bytes=True)] = None
    secret: int = 0  # no user's choice


def test_what_is_declared() -> None:
    assert settings_of(Settings) == [
        Setting("how many.", "count", 1, name="count", type=int),
        Setting("how hard.", "effort", 0, 5, name="level", type=int),
        Setting("where.", "file-name", name="file_name", type=Path),
        Setting("who.", "names", name="names", type=tuple),
        Setting("how large.", "size", 2, in_bytes=True, name="size", type=int),
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
        ("how large.", ["first"]),
        ("how many of them.", ["second"]),
    ]


def test_a_record_is_plain_data() -> None:
    record = record_of(Settings(count=2, file_name=Path("a/b"), names=("c", "d")))
    assert record == {"count": 2, "effort": 3, "file_name": "a/b", "names": ["c", "d"], "size": None}
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


@pytest.mark.parametrize(
    ("data", "chosen"),
    [
        ({}, Settings()),
        ({"count": None, "effort": 0, "names": "c"}, Settings(level=0, names=("c",))),
        ({"count": 7, "file_name": "a/b", "names": ["c", "d"]}, Settings(7, 3, Path("/home/a/b"), ("c", "d"))),
        ({"file_name": "/a"}, Settings(file_name=Path("/a"))),
        ({"size": "20GB"}, Settings(size=20 * 10**9)),
        ({"size": 5}, Settings(size=5)),
    ],
)
def test_settings_of_a_file(data: dict[str, Any], chosen: Settings) -> None:
    assert settings_from_data(Settings, data, Path("/home")) == chosen


@pytest.mark.parametrize(
    "data",
    [
        {"count": 0},
        {"count": 1.0},
        {"count": "1"},
        {"count": True},
        {"effort": 6},
        {"effort": -1},
        {"level": 3},  # the field's name, which users do not know
        {"file_name": 3},
        {"names": [3]},
        {"names": {"a": "b"}},
        {"size": "1"},
        {"size": "20 apples"},
        {"secret": 1},
    ],
)
def test_what_a_file_may_not_say(data: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings_from_data(Settings, data, Path())


@pytest.mark.parametrize(
    "settings", [kind.settings for kind in (*BACKENDS.values(), *TARGETS.values()) if kind.settings]
)
def test_what_a_manifest_says_makes_the_same_settings(settings: type) -> None:
    record = record_of(settings())
    assert settings_from_data(settings, record, Path()) == settings()
