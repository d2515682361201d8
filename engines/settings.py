"""What can be chosen about a build, in words that a user can be asked with.

A backend's settings are a frozen dataclass. The annotation of each field says how users choose it:

    capacity: Annotated[int | None, Setting("tokens of a fixed KV cache.", least=1)] = None

What offers settings to users, such as the command line, reads them with `settings_of` and needs to know no backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from exporter.errors import EngineError


@dataclass(frozen=True, slots=True)
class Setting:
    """How users choose one field. Backends with the same option describe it in the same words.

    `settings_of` fills in the name and the type.
    """

    help: str
    option: str | None = None  # on a command line, without its dashes; None: the field's name
    least: int | None = None
    most: int | None = None  # with a least only
    choices: tuple[Any, ...] = ()  # the values; `str` says how each is written. Empty: any value of the type
    in_bytes: bool = False  # a size, which may be written like 20GB
    name: str = ""  # of the field
    type: Any = None  # bool, int, float, str, Path, or tuple for any number of texts


def settings_of(settings: type) -> list[Setting]:
    """The settings that a dataclass declares, in its order."""
    return [
        replace(setting, name=name, option=setting.option or name.replace("_", "-"), type=_plain(hint))
        for name, annotated in get_type_hints(settings, include_extras=True).items()
        for hint, setting in [get_args(annotated)]
    ]


def range_problems(settings: Any) -> Iterator[EngineError]:
    """What of a dataclass of settings is below the least or above the most that it may be."""
    for setting in settings_of(type(settings)):
        value, least, most = getattr(settings, setting.name), setting.least, setting.most
        if value is None or least is None:
            continue
        if most is None and value < least:
            yield EngineError(f"{setting.name} is a whole number of at least {least}", found=value)
        if most is not None and not least <= value <= most:
            yield EngineError(f"no such {setting.name}", expected=f"{least} to {most}", found=value)


def _plain(hint: Any) -> Any:
    """`int` of `int | None`, `tuple` of `tuple[str, ...]`."""
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    return get_origin(hint) or hint
