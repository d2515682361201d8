"""What can be chosen about an export or a build, in words that a user can be asked with.

The settings of a target or a backend are a frozen dataclass. The annotation of a field says how users choose it:

    capacity: Annotated[int | None, Setting("tokens of a fixed KV cache.", least=1)] = None

Fields without one are for callers in Python. What offers settings to users, such as the command line, reads them with
`settings_of` and needs to know no target and no backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

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
    return {
        (setting.option or setting.name).replace("-", "_"): _json(getattr(settings, setting.name))
        for setting in settings_of(type(settings))
    }


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


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _plain(hint: Any) -> Any:
    """`int` of `int | None`, `tuple` of `tuple[str, ...]`."""
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    return get_origin(hint) or hint
