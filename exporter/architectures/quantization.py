"""Quantized Hugging Face folders: the two layouts, each a table, and the validated meaning of their configs.

Both keep a linear's codes as `<linear>.weight`, [out, in], and scales that multiply: w = weight * weight_scale.

                      modelopt                                        compressed-tensors
    config            config.json, hf_quant_config.json               config.json
    weight_scale      [], or one per row [out]                        [1], or one per row [out, 1]
    input_scale       [], where static                                [1], where static
    KV cache          self_attn.k_proj.k_scale, .v_proj.v_scale, []   self_attn.k_scale, .v_scale, [1]
    what is left out  wildcards over module names                     names, class names, "re:" and an expression

Sources: what nvidia-modelopt 0.47.0 exports (`modelopt/torch/export`: `convert_hf_config.py`, `quant_utils.py`), and
compressed-tensors 0.20.0 (`quantization/quant_args.py`, `quantization/quant_config.py`, `utils/match.py`).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import SchemaError, SchemaValidator, core_schema

from exporter.dtypes import FLOAT8_E4M3FN, INT8, DType
from exporter.errors import CheckpointError, TargetError
from exporter.graph import Linear
from exporter.manifests import shown

HF_QUANT_CONFIG = "hf_quant_config.json"  # ModelOpt's; its older versions write nothing into config.json
MAX_WILDCARDS, MAX_EXPRESSIONS = 1024, 64  # every linear is held against every one; an expression can take 10 MB
MAX_EXPRESSION = 1000  # characters


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear is quantized, in the words of compressed-tensors' strategies."""

    codes: DType  # float8_e4m3fn or int8, of the weight and, where it is quantized, of the input
    weight: Literal["tensor", "channel"]  # one scale, or one per row
    input: Literal["tensor", "token"] | None  # one static scale, or one per token as it comes; None: weight only

    def __str__(self) -> str:
        inputs = "inputs as they are" if self.input is None else f"inputs per {self.input}"
        return f"{self.codes} weights per {self.weight}, {inputs}"


def scheme_of(linear: Linear) -> Scheme | None:
    """How a linear is quantized, None if it is not."""
    if linear.quantization is None:
        return None
    inputs = linear.quantization.input
    return Scheme(
        codes=linear.weight.dtype,
        weight="channel" if linear.quantization.weight_scale.shape else "tensor",
        input=None if inputs is None else "token" if inputs.scale is None else "tensor",
    )


def check_codes(linear: Linear, name: str, block: int) -> Iterator[TargetError]:
    """Yield an error if a linear's weight and input have codes of two dtypes: no `Scheme` says that."""
    inputs = None if linear.quantization is None else linear.quantization.input
    if inputs is not None and inputs.dtype != linear.weight.dtype:
        yield TargetError(
            f"{name}: a linear's weight and input have codes of one dtype",
            block=block,
            expected=linear.weight.dtype,
            found=inputs.dtype,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to store a quantized folder."""

    name: str  # `quant_method` in config.json
    unit: tuple[int, ...]  # what follows a scale's own shape, [] or [out], in the file
    k_scale: str  # "{attention}" is the name of the module
    v_scale: str
    words: Mapping[Scheme, str]  # what it calls a scheme: ModelOpt's `quant_algo`, compressed-tensors' `format`


MODELOPT = Layout(
    name="modelopt",
    unit=(),
    k_scale="{attention}.k_proj.k_scale",
    v_scale="{attention}.v_proj.v_scale",
    words={
        Scheme(FLOAT8_E4M3FN, "tensor", "tensor"): "FP8",
        Scheme(FLOAT8_E4M3FN, "channel", "token"): "FP8_PER_CHANNEL_PER_TOKEN",
        Scheme(INT8, "channel", "tensor"): "W8A8_SQ_PER_CHANNEL",
        Scheme(INT8, "channel", None): "W8A16",
    },
)
COMPRESSED_TENSORS = Layout(
    name="compressed-tensors",
    unit=(1,),
    k_scale="{attention}.k_scale",
    v_scale="{attention}.v_scale",
    words={
        Scheme(codes, weight, input_): word
        for codes, word in ((FLOAT8_E4M3FN, "float-quantized"), (INT8, "int-quantized"))
        for weight in ("tensor", "channel")
        for input_ in ("tensor", "token")  # what is quantized in weights only it packs into integers of 32 bits
    },
)
TYPES: Mapping[DType, str] = {FLOAT8_E4M3FN: "float", INT8: "int"}  # what compressed-tensors calls codes of 8 bits
CODES: Mapping[str, DType] = {word: codes for codes, word in TYPES.items()}
LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (MODELOPT, COMPRESSED_TENSORS)}


@dataclass(frozen=True, slots=True)
class Modules:
    """Modules as a config lists them."""

    names: frozenset[str] = frozenset()
    wildcards: tuple[re.Pattern[str], ...] = ()
    expressions: tuple[tuple[str, SchemaValidator], ...] = ()  # in the order of their texts
    all_linears: bool = False

    def rank(self, module: str) -> tuple[int, str] | None:
        """How closely a linear is listed, the less the closer; None: not at all."""
        if module in self.names:
            return 0, ""
        if any(wildcard.match(module) for wildcard in self.wildcards):
            return 1, ""
        matching = (text for text, expression in self.expressions if expression.isinstance_python(module))
        first = next(matching, None)
        if first is not None:
            return 1, first
        return (2, "") if self.all_linears else None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSpec:
    """A quantization config, understood."""

    layout: Layout
    groups: tuple[tuple[Modules, Scheme], ...]
    ignored: Modules
    kv_codes: DType | None = None  # of the KV cache; None: it is not quantized

    def scheme_of(self, module: str) -> Scheme | None:
        """How a linear is quantized, by its module name; None if it is left as it is."""
        if self.ignored.rank(module) is not None:
            return None
        ranked = [(rank, scheme) for targets, scheme in self.groups if (rank := targets.rank(module)) is not None]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def quantization_from_config(raw: Any) -> QuantizationSpec:
    """Understand `quantization_config` of a config.json, or a whole hf_quant_config.json.

    Raises:
        CheckpointError: an unknown method, a malformed config, or a feature that no graph of ours has.
    """
    if not isinstance(raw, dict):
        raise CheckpointError("the quantization config is not a JSON object", found=shown(raw))
    producer = raw.get("producer")
    made_by = producer.get("name") if isinstance(producer, dict) else None
    method = raw.get("quant_method", MODELOPT.name if "quantization" in raw else made_by)
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError("unknown quantization method", expected=" or ".join(METHODS), found=shown(method))
    return METHODS[method](raw)


# --- what both share


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _Arguments(_Section):
    """`QuantizationArgs` of compressed-tensors, with its defaults."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    dynamic: bool | str = False
    group_size: int | None = None
    block_structure: Any = None
    actorder: Any = None


def _check_arguments(where: str, arguments: _Arguments) -> None:
    """Refuse what no `Quantization` of ours says."""
    _require(f"{where}.num_bits", arguments.num_bits, 8)
    _require(f"{where}.type", arguments.type, *CODES)
    _require(f"{where}.symmetric", arguments.symmetric, True)
    for key in ("group_size", "block_structure", "actorder"):
        _require(f"{where}.{key}", getattr(arguments, key), None)


def _kv_codes(scheme: _Arguments | None) -> DType | None:
    """The format of the KV cache by its `kv_cache_scheme`; ModelOpt leaves the strategy out."""
    if scheme is None:
        return None
    _check_arguments("kv_cache_scheme", scheme)
    _require("kv_cache_scheme.type", scheme.type, "float")
    _require("kv_cache_scheme.strategy", scheme.strategy, "tensor", None)
    _require("kv_cache_scheme.dynamic", scheme.dynamic, False)
    return CODES[scheme.type]


S = TypeVar("S", bound=_Section)


def _validated(section: type[S], raw: Any) -> S:
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part)[:40] for part in ("quantization_config", *problem["loc"]))
        missing = problem["type"] == "missing"
        raise CheckpointError(
            f"{where}: {problem['msg']}", found=None if missing else shown(problem["input"])
        ) from error


def _require(where: str, found: object, *known: object) -> None:
    if found not in known:
        raise CheckpointError(
            f"quantization_config.{where} is not supported",
            expected=" or ".join("nothing" if one is None else shown(one) for one in known),
            found=shown(found),
        )


def _bounded(patterns: Sequence[str], limit: int) -> Sequence[str]:
    if len(patterns) > limit:
        raise CheckpointError("too many patterns in the quantization config", expected=limit, found=len(patterns))
    return patterns


# --- ModelOpt


def _spelled_out(scheme: Any) -> Any:
    """ModelOpt 0.31 and 0.33 have the name of the algorithm in place of a scheme."""
    return {"num_bits": 8, "type": "float"} if scheme == "FP8" else scheme


class _ModelOptConfig(_Section):
    """Flat in config.json; hf_quant_config.json, and config.json of older versions, have it under `quantization`."""

    quant_algo: str | None
    ignore: list[str] | None = Field(None, validation_alias=AliasChoices("ignore", "exclude_modules"))
    kv_cache_scheme: Annotated[_Arguments | None, BeforeValidator(_spelled_out)] = None
    kv_cache_quant_algo: str | None = None


def _from_modelopt(raw: Mapping[str, Any]) -> QuantizationSpec:
    config = _validated(_ModelOptConfig, raw.get("quantization", raw))
    by_algorithm = {word: scheme for scheme, word in MODELOPT.words.items()}
    _require("quant_algo", config.quant_algo, *by_algorithm)
    _require("kv_cache_quant_algo", config.kv_cache_quant_algo, "FP8", None)
    return QuantizationSpec(
        layout=MODELOPT,
        groups=((Modules(all_linears=True), by_algorithm[str(config.quant_algo)]),),
        ignored=_modules_from_wildcards(config.ignore or ()),
        kv_codes=_kv_codes(config.kv_cache_scheme) or (FLOAT8_E4M3FN if config.kv_cache_quant_algo else None),
    )


def _modules_from_wildcards(entries: Sequence[str]) -> Modules:
    wild = [entry for entry in entries if any(character in entry for character in "*?[")]
    return Modules(
        names=frozenset(entries) - frozenset(wild),
        wildcards=tuple(re.compile(fnmatch.translate(entry)) for entry in _bounded(wild, MAX_WILDCARDS)),
    )


# --- compressed-tensors


class _Group(_Section):
    targets: list[str]
    weights: _Arguments | None = None
    input_activations: _Arguments | None = None
    output_activations: Any = None
    format: str | None = None


class _CompressedTensorsConfig(_Section):
    config_groups: dict[str, _Group]
    format: str | None = None
    ignore: list[str] | None = None
    kv_cache_scheme: _Arguments | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


def _from_compressed_tensors(raw: Mapping[str, Any]) -> QuantizationSpec:
    config = _validated(_CompressedTensorsConfig, raw)
    sparsity = (config.sparsity_config or {}).get("format")
    _require("sparsity_config.format", sparsity, None, "dense")
    _require("transform_config", config.transform_config or None, None)
    if not config.config_groups:
        raise CheckpointError("quantization_config.config_groups is empty: no weight is quantized")
    targets = [target for group in config.config_groups.values() for target in group.targets]
    if len(set(targets)) != len(targets):
        raise CheckpointError("quantization_config.config_groups: two groups have the same target")
    return QuantizationSpec(
        layout=COMPRESSED_TENSORS,
        groups=tuple(
            (_modules_from_targets(group.targets), _scheme_of_group(f"config_groups.{name[:40]}", group, config.format))
            for name, group in config.config_groups.items()
        ),
        ignored=_modules_from_targets(config.ignore or ()),
        kv_codes=_kv_codes(config.kv_cache_scheme),
    )


def _scheme_of_group(where: str, group: _Group, format_of_all: str | None) -> Scheme:
    form = group.format or format_of_all
    _require(f"{where}.format", form, "float-quantized", "int-quantized", "naive-quantized", None)
    _require(f"{where}.output_activations", group.output_activations, None)
    if group.weights is None:
        raise CheckpointError(f"quantization_config.{where} does not quantize weights")
    weights, inputs = group.weights, group.input_activations
    _check_arguments(f"{where}.weights", weights)
    _require(f"{where}.weights.strategy", weights.strategy, "tensor", "channel", None)
    _require(f"{where}.weights.dynamic", weights.dynamic, False)
    strategy: Literal["tensor", "channel"] = "channel" if weights.strategy == "channel" else "tensor"
    if inputs is None:
        return Scheme(CODES[weights.type], strategy, None)
    _check_arguments(f"{where}.input_activations", inputs)
    _require(f"{where}.input_activations.type", inputs.type, weights.type)
    token = inputs.strategy == "token"
    _require(f"{where}.input_activations.strategy", inputs.strategy, "tensor", "token", None)
    _require(f"{where}.input_activations.dynamic", inputs.dynamic, token)
    return Scheme(CODES[weights.type], strategy, "token" if token else "tensor")


def _modules_from_targets(entries: Sequence[str]) -> Modules:
    expressions = [entry[3:] for entry in entries if entry.startswith("re:")]
    return Modules(
        names=frozenset(entry for entry in entries if not entry.startswith("re:")) - {"Linear"},
        expressions=tuple((text, _expression(text)) for text in sorted(_bounded(expressions, MAX_EXPRESSIONS))),
        all_linears="Linear" in entries,
    )


def _expression(text: str) -> SchemaValidator:
    """Compile with the engine that pydantic brings along: it takes linear time, where Python's can take forever."""
    if len(text) > MAX_EXPRESSION:
        raise CheckpointError("an expression in the quantization config is too long", found=f"{len(text)} characters")
    try:
        return SchemaValidator(core_schema.str_schema(pattern=f"^(?:{text})", strict=True))
    except SchemaError as error:
        raise CheckpointError("an expression in the quantization config is not supported", found=shown(text)) from error


METHODS: Mapping[str, Callable[[Mapping[str, Any]], QuantizationSpec]] = {
    MODELOPT.name: _from_modelopt,
    COMPRESSED_TENSORS.name: _from_compressed_tensors,
}
