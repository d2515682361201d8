"""The sections `network` and `engine` of recipes: which backend builds a variant's engine, from what, and how.

    network: {target: tensorrt, dtype: bfloat16}      # options of `export`, with "_" for "-"
    engine: {backend: tensorrt, max_input_len: 2048}  # options of `engine`
    variants:
      - {name: half, network: {dtype: float16}}       # a variant's own keys go before the recipe's

Either section can name the backend: `engine` by its name, `network` by a form that only it builds from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from exporter.errors import PlanError
from exporter.manifests import shown
from exporter.plan import validation_error
from exporter.settings import settings_from_data, table_of
from exporter.targets import TARGETS

MODEL_FOLDER = {"to": "hf"}  # what a backend builds from that needs no network, but a variant's Hugging Face folder


class Backend(Protocol):
    """What recipes know of a backend, see `engines.backends`."""

    @property
    def builds_from(self) -> Mapping[str, str]:
        """The keys of `network` that it asks for, `to` among them, a key of `exporter.targets.TARGETS`."""

    @property
    def settings(self) -> type | None:
        """A dataclass as in `exporter.settings`; None: nothing can be chosen."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A target or a backend, and what was chosen about it."""

    name: str
    settings: Any  # a dataclass as in `exporter.settings`


@dataclass(frozen=True, slots=True)
class Choices:
    """How one variant's engine comes about."""

    network: Choice | None  # None: it is built from the variant's Hugging Face folder
    engine: Choice


@dataclass(frozen=True, slots=True)
class Sections:
    """`network` and `engine` of a recipe, or of one of its variants."""

    network: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""  # in front of keys, in errors


def sections_from(table: Mapping[str, Any], where: str, file: Path) -> Sections:
    """Take both sections from a recipe, or from one of its variants.

    Raises:
        PlanError: one is there and is not a mapping.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name in ("network", "engine"):
        section = {} if table.get(name) is None else table[name]
        if not isinstance(section, dict):
            raise PlanError(f"{where}{name}: a mapping of keys is wanted", file=file, found=shown(section, 60))
        found[name] = section
    return Sections(**found, where=where)


def choices_from(own: Sections, shared: Sections, backends: Mapping[str, Backend], file: Path) -> Choices:
    """Put a variant's own sections before those of its recipe.

    What the recipe says about another backend, or another form of network, does not count.

    Raises:
        PlanError: a key is unknown, a value is out of range, there is no such backend, or it does not build from such a
            network.
    """
    common = _backend_of(shared, backends, file, next(iter(backends)))
    name = _backend_of(own, backends, file, common)
    wanted, inherited = backends[name], backends[common]
    engine = {**(shared.engine if name == common else {}), **own.engine}
    form, is_same_form = wanted.builds_from, wanted.builds_from["to"] == inherited.builds_from["to"]
    network = {**(shared.network if is_same_form else {}), **own.network, **form}
    engine.pop("backend", None)
    settings = _settings(wanted.settings, engine, f"{own.where}engine", file, hint=f"the backend is {name}")
    return Choices(network=_network(network, form, own, file), engine=Choice(name, settings))


def _backend_of(sections: Sections, backends: Mapping[str, Backend], file: Path, default: str) -> str:
    """The backend that sections ask for; `default` if they leave it open."""
    forms = {key for backend in backends.values() for key in backend.builds_from}
    asked = {key: value for key, value in sections.network.items() if key in forms and value is not None}
    named = sections.engine.get("backend")
    if named is not None and (not isinstance(named, str) or named not in backends):
        raise PlanError(
            f"{sections.where}engine.backend: no such backend",
            file=file,
            expected=f"one of {', '.join(backends)}",
            found=shown(named, 60),
        )
    fitting = [name for name in backends if _fits(asked, backends[name])]
    if not fitting or (named is not None and named not in fitting):
        possible = [_written(b.builds_from) for name, b in backends.items() if named in (None, name)]
        problem = f"{named} builds from another network" if named else "no backend builds from such a network"
        raise PlanError(
            f"{sections.where}network: {problem}",
            file=file,
            expected=" or ".join(possible),
            found=_written(asked),
        )
    return named or (default if default in fitting else fitting[0])


def _fits(asked: Mapping[str, Any], backend: Backend) -> bool:
    return all(backend.builds_from.get(key) == value for key, value in asked.items())


def _written(keys: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {shown(value, 30)}" for key, value in keys.items()) + "}"


def _network(network: Mapping[str, Any], form: Mapping[str, str], own: Sections, file: Path) -> Choice | None:
    target = form["to"]
    chosen = {key: value for key, value in network.items() if key != "to"}
    if form == MODEL_FOLDER:
        if chosen:
            raise PlanError(
                f"{own.where}network.{next(iter(chosen))}: the engine is built from a Hugging Face folder, not from a "
                "network",
                file=file,
                hint="what can be chosen stands in `engine`",
            )
        return None
    return Choice(target, _settings(TARGETS[target].settings, chosen, f"{own.where}network", file))


def _settings(
    declared: type | None, data: Mapping[str, Any], where: str, file: Path, *, hint: str | None = None
) -> Any:
    kind, folder = declared or _Nothing, file.absolute().parent
    try:
        return settings_from_data(kind, data, folder)
    except ValidationError as error:
        refusal = validation_error(error, table_of(kind, folder), file, where)
        refusal.hint = hint
        raise refusal from error


@dataclass(frozen=True)
class _Nothing:
    """The settings of a backend that declares none."""
