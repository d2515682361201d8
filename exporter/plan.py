"""Plans: which attentions and FFNs are dropped, which FFN runs are fused, which blocks run in parallel.

A plan is YAML; layers are the source model's numbers, ranges include both ends, as the paper writes them:

    drop_attention: [9, 10, [11, 14]]
    drop_ffn: [20]
    fuse: [[9, 13]]
    parallel: [[2, 5]]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from exporter.errors import PlanError
from exporter.manifests import shown

MAX_YAML_BYTES = 1 << 18  # the parser takes ten seconds for a MB
MAX_YAML_DEPTH = 16  # a recipe has 6 levels
MAX_LAYER = 1 << 16


def _layer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_LAYER:
        raise PydanticCustomError("layer", f"expected a layer, a whole number from 0 to {MAX_LAYER - 1}")
    return value


def _range(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PydanticCustomError("range", "expected a range of two layers, like [3, 8]")
    return _layer(value[0]), _layer(value[1])


def _layer_or_range(value: Any) -> int | tuple[int, int]:
    if isinstance(value, list | tuple):
        return _range(value)
    if not isinstance(value, int):
        raise PydanticCustomError("layer", "expected a layer, or a range like [3, 8]")
    return _layer(value)


def _list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("list", "expected a list in brackets, of ranges like [3, 8]")
    return list(value)


LayerRange = Annotated[tuple[int, int], BeforeValidator(_range)]
LayerOrRange = Annotated[int | tuple[int, int], BeforeValidator(_layer_or_range)]
Ranges = Annotated[list[LayerRange], BeforeValidator(_list)]
Layers = Annotated[list[LayerOrRange], BeforeValidator(_list)]


class Plan(BaseModel):
    """A validated plan. Whether it fits a model is known only with the model: see `exporter.pipeline.apply_plan`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    drop_attention: Layers = []
    drop_ffn: Layers = []
    fuse: Ranges = []
    parallel: Ranges = []

    @property
    def dropped_layers(self) -> list[int]:
        """`drop_attention` with its ranges spelled out."""
        return _spelled_out("drop_attention", self.drop_attention)

    @property
    def dropped_ffn_layers(self) -> list[int]:
        """`drop_ffn` with its ranges spelled out."""
        return _spelled_out("drop_ffn", self.drop_ffn)


def _spelled_out(key: str, entries: Sequence[int | tuple[int, int]]) -> list[int]:
    layers: set[int] = set()
    for entry in entries:
        first, last = (entry, entry) if isinstance(entry, int) else entry
        if first > last:
            raise PlanError("a range goes from its lower to its higher layer", found=[first, last])
        # Before they are spelled out: a small file could name the same long range a thousand times.
        if not layers.isdisjoint(range(first, last + 1)):
            raise PlanError(f"a layer is listed twice in {key}", found=[first, last])
        layers.update(range(first, last + 1))
    return sorted(layers)


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: the file is missing, too large, not YAML, or does not have the form of a plan.
    """
    return plan_from_data(read_yaml(path), path)


def plan_from_data(data: Any, file: Path | None = None, where: str | None = None) -> Plan:
    """Validate a plan that was parsed already: a recipe holds plans inline, and `where` says at which key."""
    if not isinstance(data, dict):
        problem = "not a plan" if where is None else f"{where}: not a plan"
        raise PlanError(problem, file=file, expected=f"keys {', '.join(Plan.model_fields)}", found=shown(data, 60))
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, Plan, file, where) from error


def read_yaml(path: Path) -> Any:
    """Parse a YAML file: bounded size, plain data only, no aliases (a few of them can stand for gigabytes).

    Raises:
        PlanError: as described; names the line where the parser does.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)  # /dev/zero has no size to ask for
        text = raw.decode("utf-8")
    except OSError as error:
        raise PlanError(f"cannot be read ({error.strerror or error})", file=path) from error
    except ValueError as error:  # not UTF-8, or a NUL byte in the name
        raise PlanError(f"cannot be read ({error})", file=path) from error
    if len(raw) > MAX_YAML_BYTES:
        raise PlanError("file is too large for a plan or recipe", file=path, expected=f"<= {MAX_YAML_BYTES} bytes")
    try:
        _check_events(text, path)
        return yaml.load(text, Loader=_PlainData)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of 5000 digits, say
        raise PlanError(f"not valid YAML ({' '.join(str(error).split())[:160]})", file=path) from error


def _check_events(text: str, path: Path) -> None:
    """Refuse what would make the parser's work explode, while parsing it only as far as that."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise PlanError("aliases (*name) are not allowed here", file=path)
        if isinstance(event, yaml.ScalarEvent) and "\0" in event.value:  # which no path, name or text may have
            raise PlanError("a text has a NUL character", file=path, found=shown(event.value, 60))
        # The library's own constructors fail in ways of their own on a "!!bool" that is none.
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise PlanError("tags (!name) are not allowed here", file=path, found=event.tag[:60])
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise PlanError("nested too deeply for a plan or recipe", file=path, expected=f"<= {MAX_YAML_DEPTH} levels")


class _PlainData(yaml.SafeLoader):
    """The safe loader, to which dates are text, without its habit of letting the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _text(loader: _PlainData, node: yaml.ScalarNode) -> str:
    return loader.construct_scalar(node)


_PlainData.add_constructor("tag:yaml.org,2002:timestamp", _text)
# To YAML 1.1 a number with an exponent and no point, like 1e-4, is text; to YAML 1.2, and to people, it is a number.
_PlainData.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def validation_error(
    error: ValidationError, model: type[BaseModel], file: Path | None, where: str | None = None
) -> PlanError:
    """The first of pydantic's complaints as our error.

    Args:
        model: what the data was validated as.
        where: its place in the file, if it is not all of it.
    """
    problems = error.errors(include_url=False)
    # A misspelled key is two of them: the missing one comes first, and only the other says what to correct.
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    key = ".".join(map(str, problem["loc"] if where is None else (where, *problem["loc"])))
    what = {"extra_forbidden": "unknown key", "missing": "key is missing"}.get(problem["type"], problem["msg"])
    is_told = problem["type"] in ("missing", "too_long", "too_short")  # by the message
    found = None if is_told else shown(problem["input"], 60)
    table = _table_at(model, problem["loc"][:-1]) if problem["type"] == "extra_forbidden" else None
    expected = f"one of {', '.join(table.model_fields)}" if table is not None and table.model_fields else None
    return PlanError(f"{key}: {what}", file=file, expected=expected, found=found)


def _table_at(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel] | None:
    """The model of what lies at pydantic's location `loc`; None if it is not one."""
    for name in loc:
        if isinstance(name, str):  # a number is a place in a list, which the list's annotation speaks of
            field = model.model_fields.get(name)
            tables = [] if field is None else [part for part in _parts(field.annotation) if _is_table(part)]
            if len(tables) != 1:
                return None
            (model,) = tables
    return model


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation, and what it is made of: of `list[X] | None` also `X`."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _is_table(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)
