"""The wide FFN in TensorRT: two quick plugins per number format, compiled ahead of time into the engine.

They are `gate_up` with the norm inside and `down`: a network's nodes are the same for any number of tokens.

`register_plugins` makes them known to the process that builds an engine; `plugins.contract.wide_ffn_halves` says what
they are, and ONNX networks that `export --plugins wide_ffn` wrote refer to them. The engine then holds PTX and launch
expressions, and runs without Python, Triton or a plugin library.

A quick plugin is one kernel without workspace. So memory that the two kernels share or need is an output of one of
them; `down` counts in `arrivals`, which `gate_up` has zeroed and nothing else reads. A call has at most 64 tokens: a
network takes longer prompts in several calls, and its optimization profiles must say so.

Held against the real `tensorrt.plugin` module, whose decorators and templates run without a GPU; never executed.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import cache
from typing import Any

from exporter.errors import TargetError
from plugins.contract import WIDE_FFN_FORMATS, WIDE_FFN_MOST_TOKENS, CustomOp, wide_ffn_halves
from plugins.wide_ffn.aot import CompiledKernel, Scale, Variant, compile_variant, fit_of
from plugins.wide_ffn.configs import BUCKETS, Config, bucket_of, config_for

# TensorRT's names of dtypes: members of `DataType`, and where they differ the spelling of `AutoTuneCombination`.
TYPES = {"bfloat16": "BF16", "float8_e4m3fn": "FP8", "int8": "INT8", "int32": "INT32", "float32": "FLOAT"}
SPELLINGS = {"FLOAT": "FP32"}


@cache
def register_plugins() -> None:
    """Register the plugins of all formats with TensorRT; to be called before a network is parsed.

    Raises:
        TargetError: TensorRT is not installed, or too old for quick plugins that are compiled ahead of time.
    """
    try:
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise TargetError("TensorRT is not installed", hint="pip install tensorrt-cu13") from error
    if not hasattr(trtp, "aot_impl"):
        raise TargetError("this TensorRT has no quick plugins that are compiled ahead of time", expected=">= 10.15")
    for weights, activations in WIDE_FFN_FORMATS:
        number_format, (up, down) = _Format(weights, activations), wide_ffn_halves(weights, activations)
        _register(trtp, up, number_format, _describe_up, _implement_up)
        _register(trtp, down, number_format, _describe_down, _implement_down)


class _Format:
    """The format of a plugin, and what follows from it and from the sizes of a call."""

    def __init__(self, weights: Any, activations: Any) -> None:
        self.weights = weights
        self.activations = activations

    def config(self, hidden: int, width: int, tokens: int) -> Config:
        return config_for(
            tokens=tokens,
            hidden=hidden,
            width=width,
            weights=self.weights,
            activations=self.activations,
            norm="inside",
        )

    def largest(self, hidden: Any, width: Any, of: Callable[[Config], int]) -> int | None:
        """The largest of a config's numbers over all BUCKETS; None while TensorRT asks for dtypes and ranks only."""
        if hidden.is_fake or width.is_fake:
            return None
        return max(of(self.config(_known(hidden), _known(width), bucket)) for bucket in BUCKETS)

    def variant(self, kernel: Any, config: Config, hidden: int, width: int, **fields: Any) -> Variant:
        tiling = config.gate_up if kernel == "gate_up" else config.down
        return Variant(
            kernel=kernel,
            tokens=config.tokens,
            weights=self.weights,
            activations=self.activations,
            tiling=tiling,
            norm=config.norm,
            fit=fit_of(kernel, hidden, width, tiling.depth),
            **fields,
        )


def _describe_up(trtp: Any, op: CustomOp, number_format: _Format, tensors: dict[str, Any]) -> tuple[Any, ...]:
    from plugins.wide_ffn.kernels import ROWS_PER_COUNTER  # with Triton

    (tokens, hidden), width = tensors["x"].shape_expr, tensors["gate"].shape_expr[0]
    programs = number_format.largest(hidden, width, lambda config: config.programs)
    shapes = [
        (tokens, width),
        (trtp.ShapeExpr(programs), WIDE_FFN_MOST_TOKENS),
        (trtp.cdiv(hidden, ROWS_PER_COUNTER),),
    ]
    return _outputs(trtp, op, shapes)


def _describe_down(trtp: Any, op: CustomOp, number_format: _Format, tensors: dict[str, Any]) -> tuple[Any, ...]:
    (tokens, _), (hidden, width) = tensors["inner"].shape_expr, tensors["weight"].shape_expr
    splits = number_format.largest(hidden, width, lambda config: config.splits)
    return _outputs(trtp, op, [(trtp.ShapeExpr(splits), WIDE_FFN_MOST_TOKENS, hidden), (tokens, hidden)])


def _outputs(trtp: Any, op: CustomOp, shapes: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    import tensorrt

    dtypes = [getattr(tensorrt.DataType, TYPES[output.dtype]) for output in op.outputs]
    return tuple(trtp.from_shape_expr(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


def _implement_up(trtp: Any, number_format: _Format, tensors: dict[str, Any], epsilon: Any) -> tuple[Any, ...]:
    x, gate = tensors["x"], tensors["gate"]
    width, hidden = (_known(size) for size in gate.shape_expr)
    config = number_format.config(hidden, width, _most_tokens(x))
    scale, other = (_scale(tensors.get(name)) for name in ("gate_scale", "up_scale"))
    if scale != other:
        raise TargetError("the scales of gate and up are of one kind", expected=scale, found=other)
    variant = number_format.variant("gate_up", config, hidden, width, scale=scale, epsilon=epsilon.item())
    kernel = _compiled(variant)
    launch = trtp.KernelLaunchParams(config.programs, 1, 1, 32 * kernel.warps, 1, 1, kernel.shared_bytes)
    return kernel.entry, kernel.ptx, launch, _integers(trtp, x.shape_expr[0], hidden, width)


def _implement_down(trtp: Any, number_format: _Format, tensors: dict[str, Any]) -> tuple[Any, ...]:
    inner, weight = tensors["inner"], tensors["weight"]
    hidden, width = (_known(size) for size in weight.shape_expr)
    config = number_format.config(hidden, width, _most_tokens(inner))
    scale = _scale(tensors.get("weight_scale"))
    kernel = _compiled(number_format.variant("down", config, hidden, width, scale=scale))
    tiles = -(-hidden // config.down.rows)
    launch = trtp.KernelLaunchParams(tiles, config.splits, 1, 32 * kernel.warps, 1, 1, kernel.shared_bytes)
    return kernel.entry, kernel.ptx, launch, _integers(trtp, inner.shape_expr[0], hidden, width, config.programs)


@cache
def _compiled(variant: Variant) -> CompiledKernel:
    # The FFNs of a model differ in few ways, and a kernel takes seconds to compile.
    return compile_variant(variant)


def _most_tokens(tensor: Any) -> int:
    """How many tokens a call may have, from the bounds that the optimization profile gives."""
    shape = tensor.shape
    tokens = int((shape.max if shape.is_dynamic else shape)[0])
    if tokens > WIDE_FFN_MOST_TOKENS:
        raise TargetError(
            "the wide-FFN plugin takes few tokens at a time",
            expected=f"at most {WIDE_FFN_MOST_TOKENS} tokens of all sequences in one call",
            found=tokens,
            hint="build the engine for shorter calls (--max-input-len), and prompts will take several",
        )
    return bucket_of(max(1, tokens))


def _scale(scale: Any) -> Scale:
    if scale is None:
        return "none"
    return "tensor" if _known(scale.shape_expr[0]) == 1 else "row"


def _known(size: Any) -> int:
    """A size that the network fixes, as those of weights are."""
    if not size.is_constant:
        raise TargetError("the weights of a wide FFN are constants of the network")
    return int(size.constant_value())


def _integers(trtp: Any, *values: Any) -> Any:
    integers = trtp.SymIntExprs(len(values))
    for place, value in enumerate(values):
        integers[place] = trtp.SymInt32(value)
    return integers


def _register(
    trtp: Any, op: CustomOp, number_format: _Format, describe: Callable[..., Any], implement: Callable[..., Any]
) -> None:
    """Give TensorRT functions with the parameters of `op`, by name: it looks at their signatures."""
    import numpy as np
    import numpy.typing as npt

    names = [one.name for one in op.inputs]
    tensors = dict.fromkeys(names, trtp.TensorDesc)
    # As arrays of one number, which is how the parser hands them on: up to 11.0 at least, TensorRT would make a float
    # of one by `float(array)`, which NumPy refuses from 2.4 on.
    attributes = {attribute.name: npt.NDArray[np.float32] for attribute in op.attributes}
    outputs = types.GenericAlias(tuple, (trtp.TensorDesc,) * len(op.outputs))
    name = f"{op.namespace}::{op.name}"

    def described(*arguments: Any, **chosen: Any) -> Any:
        return describe(trtp, op, number_format, dict(zip(names, arguments, strict=True)))

    def tuned(*arguments: Any) -> Any:
        dtypes = [TYPES[one.dtypes[0]] for one in op.inputs] + [TYPES[one.dtype] for one in op.outputs]
        return [trtp.AutoTuneCombination(", ".join(SPELLINGS.get(one, one) for one in dtypes), "LINEAR")]

    def implemented(*arguments: Any) -> Any:
        *given, _, _ = arguments  # outputs and tactic
        return implement(trtp, number_format, dict(zip(names, given[: len(names)], strict=True)), *given[len(names) :])

    kernel = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.register(name)(_signed(described, {**tensors, **attributes}, outputs))
    trtp.autotune(name)(_signed(tuned, {**tensors, "outputs": outputs}, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(name)(_signed(implemented, {**tensors, **attributes, "outputs": outputs, "tactic": int}, kernel))


def _signed(function: Callable[..., Any], parameters: dict[str, Any], returns: Any) -> Callable[..., Any]:
    """The function with a signature that `inspect` shows."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(named, return_annotation=returns)  # type: ignore[attr-defined]
    return function
