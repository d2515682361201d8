"""Quantization recipes: which linears become 8-bit codes, under which scales. One YAML file each.

    weights: {dtype: int8, scale: row}         # row: one scale per output channel; tensor: one for all
    inputs: {dtype: int8, scale: tensor}       # tensor: static, calibrated; token: dynamic; leave out: weight only
    smoothing: {alpha: search}                 # or one number for all; leave out: none
    kv_cache: float8_e4m3fn
    exclude: ["blocks.0.*"]                    # patterns over names like blocks.3.ffn.down_proj
    overrides:
      - {match: "*.down_proj", inputs: {dtype: int8, scale: token}}

Blocks are numbered as in the graph that is quantized. `lm_head` is left alone unless `include` names it.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exporter.dtypes import BY_NAME, DType
from exporter.errors import PlanError
from exporter.graph import FUSED_GEMMS
from exporter.manifests import shown
from exporter.plan import read_yaml, validation_error

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "quantization"
CodeName = Literal["float8_e4m3fn", "int8"]
Pattern = Annotated[str, Field(min_length=1, max_length=200)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightFormat(_Table):
    """How a weight is stored."""

    dtype: CodeName
    scale: Literal["tensor", "row"]


class InputFormat(_Table):
    """How a linear's input is rounded."""

    dtype: CodeName
    scale: Literal["tensor", "token"]


class Smoothing(_Table):
    """How much of an input's unevenness moves into the weights."""

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"]


class Override(_Table):
    """Other formats for the linears that a pattern matches; the first match counts."""

    match: Pattern
    weights: WeightFormat | None = None  # None: the recipe's
    inputs: InputFormat | Literal["none"] | None = None  # None: the recipe's; "none": weight only


class QuantizationRecipe(_Table):
    """A validated recipe."""

    weights: WeightFormat
    inputs: InputFormat | None = None
    smoothing: Smoothing | None = None
    kv_cache: CodeName | None = None
    include: list[Literal["lm_head"]] = []
    exclude: list[Pattern] = []
    overrides: list[Override] = []

    def format_of(self, linear: str) -> LinearFormat | None:
        """The format of a linear by name, None if it is not quantized."""
        if (linear == "lm_head" and linear not in self.include) or _matches(linear, self.exclude):
            return None
        for override in self.overrides:
            if fnmatchcase(linear, override.match):
                inputs = self.inputs if override.inputs is None else override.inputs
                return LinearFormat(
                    weights=override.weights or self.weights, inputs=None if inputs == "none" else inputs
                )
        return LinearFormat(weights=self.weights, inputs=self.inputs)

    @property
    def needs_ranges(self) -> bool:
        """Whether anything in it is made from calibration."""
        inputs = [self.inputs, *(override.inputs for override in self.overrides)]
        static = any(isinstance(one, InputFormat) and one.scale == "tensor" for one in inputs)
        return static or self.smoothing is not None or self.kv_cache is not None

    @property
    def searches_alpha(self) -> bool:
        return self.smoothing is not None and self.smoothing.alpha == "search"

    def check_patterns(self, linears: Iterable[str]) -> None:
        """Raise PlanError if a pattern matches none of a model's linears."""
        names = list(linears)
        for pattern in [*self.exclude, *(override.match for override in self.overrides)]:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise PlanError(
                    "a pattern of the quantization recipe matches no linear",
                    expected=f"something like {names[0]}" if names else "a model with linears",
                    found=pattern,
                )


class LinearFormat(_Table):
    """What one linear becomes."""

    weights: WeightFormat
    inputs: InputFormat | None


def dtype_of(part: WeightFormat | InputFormat) -> DType:
    """The dtype of a format's codes."""
    return BY_NAME[part.dtype]


def sharing_scale(linear: str, formats: Mapping[str, LinearFormat]) -> list[str]:
    """Names of the linears of a sublayer whose weights have one scale with those of `linear`, itself among them.

    A reader that runs several linears as one GEMM would otherwise round their codes again, under one scale.
    """
    wanted = formats[linear].weights
    group = next((group for group in FUSED_GEMMS if linear in group and wanted.scale == "tensor"), (linear,))
    return [name for name in group if name in formats and formats[name].weights == wanted]


def format_names() -> list[str]:
    """The recipes that come with Fuselage: the vocabulary of --format."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_quantization(name: str | Path) -> QuantizationRecipe:
    """Read a recipe by its name in `recipes/quantization`, or from a file.

    Raises:
        PlanError: there is none of that name, or it is malformed.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
        if not os.path.isfile(path):  # a name may be too long for a file's
            raise PlanError("unknown quantization format", expected=", ".join(format_names()), found=str(name))
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise PlanError("not a quantization recipe", file=path, found=shown(data, 60))
    try:
        return QuantizationRecipe.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, QuantizationRecipe, path) from error


def recipe_with(
    recipe: QuantizationRecipe, *, kv_cache: str | None = None, exclude: Iterable[str] = ()
) -> QuantizationRecipe:
    """A recipe with a quantized KV cache ("fp8" or "int8") or further exclusions."""
    changes: dict[str, object] = {"exclude": [*recipe.exclude, *exclude]}
    if kv_cache is not None:
        changes["kv_cache"] = {"fp8": "float8_e4m3fn", "int8": "int8"}[kv_cache]
    return recipe.model_copy(update=changes)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
