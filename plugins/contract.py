"""Custom ops as data: what each takes and gives, for everyone who emits, registers or runs one.

Shapes are symbols or numbers; a symbol stands for one number throughout a call. Dtypes are spelled as in
`exporter/dtypes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A tensor that an op takes.

    Args:
        dtypes: any of these, or, with `like`, the dtype of that earlier input.
        shapes: alternatives.
        present_if: (name, values): given exactly when that earlier input's dtype, or that attribute's value, is one
            of the values. None: always given, unless it is `optional`.
        optional: the caller's choice.
    """

    name: str
    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    like: str | None = None
    present_if: tuple[str, tuple[str, ...]] | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """A constant of a call."""

    name: str
    type: type[float] | type[str]
    allowed: tuple[str, ...] = ()  # of a string


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A tensor that an op gives."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomOp:
    """One op: `namespace::name`, in a version that changes when a caller would have to."""

    namespace: str
    name: str
    version: str
    inputs: tuple[Input, ...]
    attributes: tuple[Attribute, ...]
    outputs: tuple[Output, ...]

    def problems(
        self, tensors: Mapping[str, tuple[str, tuple[int, ...]] | None], attributes: Mapping[str, float | str]
    ) -> list[str]:
        """What is wrong with a call, one sentence each; nothing if it can be made.

        Args:
            tensors: (dtype, shape) by input name, None or left out where an input is not given.
        """
        found = [
            f"{attribute.name} is one of {', '.join(attribute.allowed)}: found {attributes[attribute.name]}"
            for attribute in self.attributes
            if attribute.allowed and attributes[attribute.name] not in attribute.allowed
        ]
        sizes: dict[str, int] = {}
        for one in self.inputs:
            given = tensors.get(one.name)
            if one.present_if is not None:
                name, values = one.present_if
                value = _dtype(tensors.get(name)) if name in tensors else attributes[name]
                if (given is not None) != (value in values):
                    wanted = "not taken" if given is not None else "needed"
                    found.append(f"{one.name} is {wanted} where {name} is {value}")
                    continue
            if given is None:
                if one.present_if is None and not one.optional:
                    found.append(f"{one.name} is missing")
                continue
            dtype, shape = given
            dtypes = one.dtypes if one.like is None else (_dtype(tensors.get(one.like)),)
            if dtype not in dtypes:
                found.append(f"{one.name} is {' or '.join(map(str, dtypes))}: found {dtype}")
            if not any(_fits(shape, wanted, sizes) for wanted in one.shapes):
                known = " or ".join(_text(wanted, sizes) for wanted in one.shapes)
                found.append(f"{one.name} has the shape {known}: found {list(shape)}")
        return found


def _dtype(given: tuple[str, tuple[int, ...]] | None) -> str | None:
    return None if given is None else given[0]


def _fits(shape: tuple[int, ...], wanted: Shape, sizes: dict[str, int]) -> bool:
    """Whether a shape is of the wanted form; if so, its symbols are known from then on."""
    if len(shape) != len(wanted):
        return False
    symbols = {symbol: size for symbol, size in zip(wanted, shape, strict=True) if isinstance(symbol, str)}
    fits = all(
        size == (wish if isinstance(wish, int) else sizes.get(wish, size))
        for wish, size in zip(wanted, shape, strict=True)
    )
    if fits:
        sizes |= symbols
    return fits


def _text(wanted: Shape, sizes: dict[str, int]) -> str:
    return "[" + ", ".join(str(sizes.get(wish, wish) if isinstance(wish, str) else wish) for wish in wanted) + "]"


CODES = ("float8_e4m3fn", "int8")


def _scale(weight: str, rows: str) -> Input:
    """One scale for all of a weight, or one per output channel."""
    return Input(name=f"{weight}_scale", dtypes=("float32",), shapes=((rows,), (1,)), present_if=(weight, CODES))


def _input_scale(name: str) -> Input:
    return Input(name=name, dtypes=("float32",), shapes=((1,),), present_if=("activations", ("static",)))


# y = residual + down @ (silu(gate @ n) * (up @ n)), n = norm_weight * x / rms(x)
WIDE_FFN = CustomOp(
    namespace="fuselage",
    name="wide_ffn",
    version="1",
    inputs=(
        Input(name="x", dtypes=("bfloat16",), shapes=(("tokens", "hidden"),)),
        Input(name="norm_weight", dtypes=("bfloat16",), shapes=(("hidden",),)),
        Input(name="gate", dtypes=("bfloat16", *CODES), shapes=(("width", "hidden"),)),
        Input(name="up", dtypes=("bfloat16", *CODES), like="gate", shapes=(("width", "hidden"),)),
        Input(name="down", dtypes=("bfloat16", *CODES), like="gate", shapes=(("hidden", "width"),)),
        _scale("gate", "width"),
        _scale("up", "width"),
        _scale("down", "hidden"),
        _input_scale("input_scale"),
        _input_scale("inner_scale"),
        Input(name="residual", dtypes=("bfloat16",), shapes=(("tokens", "hidden"),), optional=True),
    ),
    attributes=(
        Attribute(name="epsilon", type=float),
        Attribute(name="activations", type=str, allowed=("none", "static", "token")),
    ),
    outputs=(Output(name="y", dtype="bfloat16", shape=("tokens", "hidden")),),
)

WIDE_FFN_MOST_TOKENS = 64  # of all sequences, in one call of the halves below
# (weights, activations) that there are kernels for.
WIDE_FFN_FORMATS = (("bfloat16", "none"), *((codes, how) for codes in CODES for how in ("none", "static", "token")))
_SHORT = {"bfloat16": "bf16", "float8_e4m3fn": "fp8", "int8": "int8"}


def wide_ffn_halves(weights: str, activations: str) -> tuple[CustomOp, CustomOp]:
    """WIDE_FFN in one of its formats as two ops, for runtimes whose ops are one kernel each: "up", then "down".

    What the first gives the second takes, as it is. `largest_parts`, `arrivals` and `sums` are the kernels' own affair:
    their sizes and contents are no part of the contract. Nobody but the second op may take `arrivals`, for it counts in
    there. The residual is always given, and a call has at most WIDE_FFN_MOST_TOKENS tokens.
    """
    suffix = _SHORT[weights] if weights == "bfloat16" else f"{_SHORT[weights]}_{activations}"
    has_codes, is_static = weights in CODES, activations == "static"
    inner = weights if is_static else "bfloat16"
    scratch = [
        Input(name="largest_parts", dtypes=("int32",), shapes=(("programs", "most_tokens"),)),
        Input(name="arrivals", dtypes=("int32",), shapes=(("counters",),)),
    ]

    def tensor(name: str, dtype: str, *shapes: Shape) -> Input:
        return Input(name=name, dtypes=(dtype,), shapes=shapes)

    up = CustomOp(
        namespace=WIDE_FFN.namespace,
        name=f"wide_ffn_up_{suffix}",
        version=WIDE_FFN.version,
        inputs=(
            tensor("x", "bfloat16", ("tokens", "hidden")),
            tensor("norm_weight", "bfloat16", ("hidden",)),
            tensor("gate", weights, ("width", "hidden")),
            tensor("up", weights, ("width", "hidden")),
            *(tensor(f"{name}_scale", "float32", ("width",), (1,)) for name in ("gate", "up") if has_codes),
            *(tensor(f"{name}_scale", "float32", (1,)) for name in ("input", "inner") if is_static),
        ),
        attributes=(Attribute(name="epsilon", type=float),),
        outputs=(
            Output(name="inner", dtype=inner, shape=("tokens", "width")),
            *(Output(name=one.name, dtype=one.dtypes[0], shape=one.shapes[0]) for one in scratch),
        ),
    )
    down = CustomOp(
        namespace=WIDE_FFN.namespace,
        name=f"wide_ffn_down_{suffix}",
        version=WIDE_FFN.version,
        inputs=(
            tensor("inner", inner, ("tokens", "width")),
            *scratch,
            tensor("weight", weights, ("hidden", "width")),
            *([tensor("weight_scale", "float32", ("hidden",), (1,))] if has_codes else []),
            *([tensor("inner_scale", "float32", (1,))] if is_static else []),
            tensor("residual", "bfloat16", ("tokens", "hidden")),
        ),
        attributes=(),
        outputs=(
            Output(name="sums", dtype="float32", shape=("splits", "most_tokens", "hidden")),
            Output(name="y", dtype="bfloat16", shape=("tokens", "hidden")),
        ),
    )
    return up, down
