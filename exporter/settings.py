"""What can be chosen about an export or a build, in words that a user can be asked with.

The settings of a target or a backend are a frozen dataclass. The annotation of a field says how users choose it:

    capacity: Annotated[int | None, Setting("tokens of a fixed KV cache.", least=1)] = None

Fields without one are for callers in Python. What offers settings to users, the command line and recipes, reads them
with `settings_of` and `settings_from_data` and needs to know no target and no backend.
"""

from __future__ import annotations

import functools
import os.path
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from exporter.errors import FuselageError

Refusal = TypeVar("Refusal", bound=FuselageError)


@dataclass(frozen=True, slots=True)
class Setting:
    """How users choose one field. Dataclasses with the same option describe it in the same words.

    `settings_of` fills in the name and the type.
    """

    help: str
    option: str | None = None  # on a command line, without its dashes; None: the field's name
    least: int | None = None
    most: int | None = None  # with a least only
    choices: tuple[Any, ...] = ()  # the values; `str` says how each is written. Empty: any value of the type
    in_bytes: bool = False  # a size, which may be written like 20GB
    is_repeated: bool = False  # of a tuple: the option is given for each text, not once with commas in between
    is_of_machine: bool = False  # about the machine that makes it: what is made is the same
    name: str = ""  # of the field
    type: Any = None  # bool, int, float, str, Path, or tuple for any number of texts


def settings_of(settings: type) -> list[Setting]:
    """The settings that a dataclass declares, in its order."""
    return [
        replace(setting, name=name, option=setting.option or name.replace("_", "-"), type=_plain(hint))
        for name, annotated in get_type_hints(settings, include_extras=True).items()
        if get_origin(annotated) is Annotated
        for hint, setting in [get_args(annotated)]
    ]


def owners_by_setting(kinds: Mapping[str, type | None]) -> dict[Setting, list[str]]:
    """All settings of several dataclasses, each with the names of those that it belongs to; None declares nothing."""
    owners: dict[Setting, list[str]] = {}
    for name, settings in kinds.items():
        for setting in settings_of(settings) if settings is not None else []:
            owners.setdefault(setting, []).append(name)
    return owners


def record_of(settings: Any) -> dict[str, Any]:
    """What was chosen, as plain JSON data by option, for manifests."""
    return {_key(setting): _json(getattr(settings, setting.name)) for setting in settings_of(type(settings))}


def identity_of(settings: Any) -> dict[str, Any]:
    """Of `record_of`, what tells results apart."""
    of_machine = {_key(setting) for setting in settings_of(type(settings)) if setting.is_of_machine}
    return {key: value for key, value in record_of(settings).items() if key not in of_machine}


def settings_from_data(declared: type, data: Mapping[str, Any], folder: Path) -> Any:
    """Make a dataclass of settings, `declared`, from what a YAML file says.

    Args:
        data: by option, with "_" for "-". Texts stand for paths, relative to `folder`, and for choices; a text alone
            for a list of one; null for what is not chosen. Sizes are numbers of bytes, or texts like 20GB.

    Raises:
        pydantic.ValidationError: a key is unknown, or a value of the wrong kind or out of range.
    """
    names = {_key(setting): setting.name for setting in settings_of(declared)}
    chosen = dict(table_of(declared, folder).model_validate(data))
    return declared(**{names[key]: value for key, value in chosen.items() if value is not None})


@functools.cache  # pydantic takes a millisecond to make one
def table_of(declared: type, folder: Path) -> type[BaseModel]:
    """What `settings_from_data` validates data as."""
    fields: dict[str, Any] = {
        _key(setting): (_annotation(setting, folder) | None, None) for setting in settings_of(declared)
    }
    return create_model(declared.__name__, __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _annotation(setting: Setting, folder: Path) -> Any:
    """The values of a setting, as pydantic is told."""
    if setting.choices:
        values = {str(value): value for value in setting.choices}
        return Annotated[Literal[tuple(values)], AfterValidator(values.__getitem__)]
    # Pydantic's strict mode takes no text for a path, nor a list for a tuple.
    if setting.type is Path:
        return Annotated[Path, BeforeValidator(lambda v: found_from(folder, v) if isinstance(v, str) else v)]
    if setting.type is tuple:
        return Annotated[tuple[str, ...], BeforeValidator(_several)]
    if setting.in_bytes:
        return Annotated[
            int, BeforeValidator(lambda v: bytes_from_text(v) if isinstance(v, str) else v), Field(ge=setting.least)
        ]
    return Annotated[setting.type, Field(ge=setting.least, le=setting.most)]


def _several(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str) else value


def bytes_from_text(text: str) -> int:
    """Read a size like 20GB, 10**9 bytes each; ValueError if it is none."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.rstrip("BKMGTbkmgt")
    unit = text[len(number) :].upper()
    if not number.isdecimal() or int(number) < 1 or unit not in units:
        raise ValueError(f"{text!r} is not a size like 500MB or 5GB")
    return int(number) * units[unit]


def found_from(folder: Path, name: str) -> Path:
    """Where a path in a file leads, `folder` being the file's; `~` is the home folder."""
    return folder / os.path.expanduser(name)


def range_problems(settings: Any, error: type[Refusal]) -> Iterator[Refusal]:
    """What of a dataclass of settings is below the least or above the most that it may be, each as an `error`."""
    for setting in settings_of(type(settings)):
        value, least, most = getattr(settings, setting.name), setting.least, setting.most
        if value is None or least is None:
            continue
        if most is None and value < least:
            yield error(f"{setting.name} is a whole number of at least {least}", found=value)
        if most is not None and not least <= value <= most:
            yield error(f"no such {setting.name}", expected=f"{least} to {most}", found=value)


def _key(setting: Setting) -> str:
    return (setting.option or setting.name).replace("-", "_")


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _plain(hint: Any) -> Any:
    """`int` of `int | None`, `tuple` of `tuple[str, ...]`."""
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    return get_origin(hint) or hint
