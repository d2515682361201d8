"""Number formats of TensorRT-LLM checkpoints: which tensors a quantized GEMM has, and what each format asks for.

Weights are [n, k] on one rank, as everywhere: n outputs, k inputs. All scales are float32.

    quant_algo                             weight            beside it
    FP8                                    float8_e4m3fn     weights_scaling_factor, activation_scaling_factor [1]
    FP8_PER_CHANNEL_PER_TOKEN              float8_e4m3fn     per_channel_scale [n]
    W8A16                                  network's dtype   nothing: it is quantized when it is loaded
    W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN   int8              per_channel_scale [1, n]; dense, proj: smoother [1, k]
    W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN  int8              the same, and act_scale [1, 1]

SmoothQuant also has a reciprocal scale beside every norm (`scale_to_int`) and, where inputs are static, one in front of
`dense` and `proj` (`quantization_scaling_factor`). Its smoothing is folded into the weights before they come here, so
that every smoother is one. A quantized KV cache has one scale per layer for keys and values, and its reciprocal.
Sources: TensorRT-LLM 1.1, `tensorrt_llm/quantization/{quantize,layers,mode}.py`, `models/convert_utils.py`,
`models/modeling_utils.py`; alignment of FP8 and INT8 GEMMs: cuBLASLt and CUTLASS want multiples of 16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.architectures.quantization import Scheme, check_codes, scheme_of
from exporter.dtypes import FLOAT8_E4M3FN, FLOAT32, INT8, DType
from exporter.errors import FuselageError, TargetError
from exporter.graph import Attention, Linear, LinearSublayer, Quantization, linears
from exporter.lazy import LazyTensor, cast, computed, full, reshape
from exporter.lazy_quantized import dequantized, quantized
from exporter.writers.trtllm_layout import Gemm, Layer, Module

Named = Iterator[tuple[str, LazyTensor]]
Stages = Sequence[Sequence[Sequence[Module]]]  # the modules of every layer of every pipeline stage
KV_ALGOS: Mapping[DType, str] = {FLOAT8_E4M3FN: "FP8", INT8: "INT8"}
NORMS = {"attention": "input_layernorm", "ffn": "post_layernorm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What a whole model is quantized as."""

    algo: str | None  # `quantization.quant_algo`
    gemm: Callable[[Gemm, DType], Named]  # the tensors of a quantized GEMM, given the network's dtype
    module: Callable[[Module], Named] = lambda module: iter(())  # what a module has beside its GEMMs' tensors
    norm: Callable[[Module], Named] = lambda module: iter(())  # what the norm in front of a module has
    least: str  # what can be left out of it: "linear", "sublayer" (with its norm) or "nothing"
    bare_linears: bool  # whether the linear that stands for a sublayer can be quantized
    multiple: int = 1  # of n and k
    multiple_of_model: int = 1  # of n and k over all ranks, per rank
    excluded: tuple[str, ...] = ()  # module patterns that an exclusion list has to repeat
    tensor_patterns: bool = False  # whether exclusions also go by tensor name
    is_stock: bool = True  # whether the stock layers hand on what these modules return


def format_of(layers: Sequence[Layer]) -> Format:
    """The format of a model that `check` finds no problem in."""
    schemes = list(_schemes(layers))
    return FORMATS[schemes[0]] if schemes else PLAIN


def gemm_tensors(format_: Format, gemm: Gemm, dtype: DType) -> Named:
    """Yield the tensors of one GEMM by the last part of their names."""
    return (format_.gemm if gemm.is_quantized else _plain)(gemm, dtype)


def kv_tensors(attention: Attention) -> Named:
    """Yield the scale of a quantized KV cache, one for keys and values, and its reciprocal; nothing if it is not.

    Like ModelOpt's, the scale of an FP8 cache is not below 1: a small float needs no stretching.
    """
    kv = attention.kv_quantization
    if kv is None:
        return
    least = np.float32(1 if kv.dtype == FLOAT8_E4M3FN else 0)

    def larger(k_scale: LazyTensor, v_scale: LazyTensor) -> np.ndarray:
        return np.max([k_scale.numpy(), v_scale.numpy(), least]).reshape(1)

    scale = computed((1,), FLOAT32, larger, kv.k_scale, kv.v_scale)
    yield "kv_cache_scaling_factor", scale
    yield "kv_cache_rcp_scaling_factor", _reciprocal(scale)


# --- tensors of a GEMM


def _plain(gemm: Gemm, dtype: DType) -> Named:
    yield "weight", gemm.cut([cast(linear.weight, dtype) for linear in gemm.linears])


def _fp8(gemm: Gemm, dtype: DType) -> Named:
    scale = _largest([_of(linear).weight_scale for linear in gemm.linears])
    yield "weight", gemm.cut([_under(linear, scale) for linear in gemm.linears])
    yield "weights_scaling_factor", reshape(scale, (1,))
    yield "activation_scaling_factor", reshape(_input_scale(gemm), (1,))


def _under(linear: Linear, scale: LazyTensor) -> LazyTensor:
    """A linear's codes under a scale that it shares with others, rounded again if it is not its own."""
    own = _of(linear).weight_scale
    if own is scale:
        return linear.weight
    return quantized(dequantized(linear.weight, own), scale, linear.weight.dtype)


def _fp8_rowwise(gemm: Gemm, dtype: DType) -> Named:
    yield "weight", gemm.cut([linear.weight for linear in gemm.linears])
    yield "per_channel_scale", _row_scales(gemm)


def _weight_only(gemm: Gemm, dtype: DType) -> Named:
    """Plain weights: the layout of INT8 ones depends on the GPU, and TensorRT-LLM makes it when it loads them."""
    values = [dequantized(linear.weight, _of(linear).weight_scale) for linear in gemm.linears]
    yield "weight", cast(gemm.cut(values), dtype)


def _smooth_quant(gemm: Gemm, dtype: DType) -> Named:
    yield "weight", gemm.cut([linear.weight for linear in gemm.linears])
    scales = _row_scales(gemm)
    yield "per_channel_scale", computed((1, *scales.shape), FLOAT32, lambda row: row.numpy()[None], scales)
    if gemm.row_parallel:
        yield "smoother", full((1, len(gemm.columns)), 1.0, FLOAT32)


def _smooth_quant_static(gemm: Gemm, dtype: DType) -> Named:
    """The kernel multiplies its result by act_scale * per_channel_scale: the input's scale times the weight's."""
    yield from _smooth_quant(gemm, dtype)
    yield "act_scale", reshape(_input_scale(gemm), (1, 1))


def _row_scales(gemm: Gemm) -> LazyTensor:
    return gemm.cut_rows([_of(linear).weight_scale for linear in gemm.linears])


def _input_scale(gemm: Gemm) -> LazyTensor:
    """One for all that read the input: under SmoothQuant the norm in front of them makes its codes, once."""
    readers = (*gemm.linears, *gemm.beside)
    scales = [one.scale for linear in readers if (one := _of(linear).input) is not None]
    return _largest([scale for scale in scales if scale is not None])


def _largest(scales: Sequence[LazyTensor]) -> LazyTensor:
    """The largest of several scales []; the object itself if it is one."""
    distinct = list({id(scale): scale for scale in scales}.values())
    if len(distinct) == 1:
        return distinct[0]
    return computed((), FLOAT32, lambda *found: np.max([scale.numpy() for scale in found]), *distinct)


def _of(linear: Linear) -> Quantization:
    if linear.quantization is None:
        raise AssertionError("Bug: a linear without quantization in a quantized GEMM")
    return linear.quantization


# --- tensors of a norm and of a module


def _dynamic_norm(module: Module) -> Named:
    yield "scale_to_int", full((1,), 1.0, FLOAT32)  # there for its shape: every token has its own


def _static_norm(module: Module) -> Named:
    yield "scale_to_int", _reciprocal(_input_scale(module.gemms[0]))


def _static_module(module: Module) -> Named:
    yield "quantization_scaling_factor", _reciprocal(_input_scale(module.gemms[-1]))


def _reciprocal(scale: LazyTensor) -> LazyTensor:
    return computed((1,), FLOAT32, lambda scale: (1 / scale.numpy()).reshape(1), scale)


ROOT_MODULES = ("*lm_head", "*vocab_embedding")
PLAIN = Format(algo=None, gemm=_plain, least="linear", bare_linears=True)
FORMATS: Mapping[Scheme, Format] = {
    Scheme(FLOAT8_E4M3FN, "tensor", "tensor"): Format(
        algo="FP8", gemm=_fp8, least="linear", bare_linears=True, multiple=16, excluded=ROOT_MODULES
    ),
    Scheme(FLOAT8_E4M3FN, "channel", "token"): Format(
        algo="FP8_PER_CHANNEL_PER_TOKEN",
        gemm=_fp8_rowwise,
        least="sublayer",
        bare_linears=False,
        multiple=16,
        excluded=("*ln_f", "*lm_head"),
        is_stock=False,
    ),
    Scheme(INT8, "channel", None): Format(
        algo="W8A16",
        gemm=_weight_only,
        least="linear",
        bare_linears=False,
        multiple_of_model=64,
        excluded=ROOT_MODULES,
        tensor_patterns=True,
    ),
    Scheme(INT8, "channel", "token"): Format(
        algo="W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
        gemm=_smooth_quant,
        norm=_dynamic_norm,
        least="nothing",
        bare_linears=False,
        multiple=16,
        is_stock=False,
    ),
    Scheme(INT8, "channel", "tensor"): Format(
        algo="W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
        gemm=_smooth_quant_static,
        norm=_static_norm,
        module=_static_module,
        least="nothing",
        bare_linears=False,
        multiple=16,
        is_stock=False,
    ),
}


# --- what is left out


def exclude_modules(format_: Format, stages: Stages) -> list[str] | None:
    """The module patterns of `quantization.exclude_modules`; None where the format has no such list.

    They number layers from the start of a pipeline stage, whichever stage it is: see `check_stages`.
    """
    if format_.algo is None or format_.least == "nothing":
        return None
    found = dict.fromkeys(format_.excluded)
    for layers in stages:
        for number, modules in enumerate(layers):
            for name in _left_out(format_, modules):
                found[f"transformer.layers.{number}.{name}"] = None
                if format_.tensor_patterns:
                    found[f"transformer.layers.{number}.{name}.weight"] = None
    return list(found)


def _replaceable(format_: Format, modules: Sequence[Module]) -> Iterator[str]:
    """The modules of a layer that a format replaces if they are not left out."""
    for module in modules:
        if format_.least == "sublayer":
            yield from (NORMS[module.name.partition(".")[0]], module.name)
        else:
            yield from (_join(module.name, gemm.name) for gemm in module.gemms)


def _left_out(format_: Format, modules: Sequence[Module]) -> Iterator[str]:
    """The modules of a layer that stay as they are, as the format's replacement would find them."""
    for module in modules:
        if format_.least == "sublayer":
            if not module.gemms[0].is_quantized:
                yield NORMS[module.name.partition(".")[0]]
                yield module.name
        else:
            yield from (_join(module.name, gemm.name) for gemm in module.gemms if not gemm.is_quantized)


def _join(module: str, gemm: str) -> str:
    return f"{module}.{gemm}" if gemm else module


# --- what cannot be expressed


def _schemes(layers: Sequence[Layer]) -> dict[Scheme, int]:
    """Every scheme that occurs, with the index of the first block that has it."""
    found: dict[Scheme, int] = {}
    for index, _, linear in _quantized_linears(layers):
        scheme = scheme_of(linear)
        if scheme is not None:
            found.setdefault(scheme, index)
    return found


def _quantized_linears(layers: Sequence[Layer]) -> Iterator[tuple[int, str, Linear]]:
    for layer in layers:
        for sublayer in (layer.block.attention, layer.block.ffn):
            for name, linear in linears(sublayer).items() if sublayer is not None else ():
                if linear.quantization is not None:
                    yield layer.index, name, linear


def check_schemes(layers: Sequence[Layer]) -> Iterator[FuselageError]:
    """Yield what keeps a model from having one format; without any, `format_of` gives it."""
    for index, name, linear in _quantized_linears(layers):
        yield from check_codes(linear, name, index)
    found = _schemes(layers)
    for scheme, block in found.items():
        if scheme not in FORMATS:
            yield TargetError(
                "TensorRT-LLM 1.x builds no engine with this quantization",
                block=block,
                expected="; ".join(str(known) for known in FORMATS),
                found=scheme,
            )
    if len(found) > 1:
        yield TargetError(
            "a TensorRT-LLM checkpoint has one quantization for all linears",
            block=list(found.values())[1],
            found="; ".join(str(scheme) for scheme in found),
        )
    attentions = [(layer.index, a) for layer in layers if isinstance(a := layer.block.attention, Attention)]
    caches = [(index, a.kv_quantization and a.kv_quantization.dtype) for index, a in attentions]
    for index, dtype in caches:
        if dtype != caches[0][1]:
            yield TargetError(
                "the KV cache has one format in all layers",
                block=index,
                expected=caches[0][1] or "none, as in the first",
                found=dtype or "none",
                hint="calibrate and quantize all of them, or none",
            )


def check_module(format_: Format, module: Module, block: int, tp_size: int) -> Iterator[FuselageError]:
    """Yield what a format does not allow in a module of one rank."""
    states = {linear.quantization is not None for gemm in module.gemms for linear in gemm.linears}
    if format_.algo is not None and not all(states) and format_.least == "nothing":
        yield TargetError(
            f"{format_.algo} quantizes every linear of every layer",
            block=block,
            found=f"one in {module.name} that is not",
            hint="leave the exclusion out, or use FP8",
        )
    # A GEMM of several linears has one format, and the build fuses fc and gate by looking at fc alone.
    elif len(states) > 1 and (format_.least == "sublayer" or _has_mixed_gemm(module)):
        what = module.name if format_.least == "sublayer" else "q, k and v, or an FFN,"
        yield TargetError(
            f"{what} is quantized as a whole or not at all in {format_.algo}",
            block=block,
            hint="exclude all of its linears",
        )
    if True in states and isinstance(module.sublayer, LinearSublayer) and not format_.bare_linears:
        yield TargetError(
            f"{format_.algo} has no linear in place of a sublayer",
            block=block,
            hint="exclude it from the quantization, or use FP8",
        )
    for gemm in module.gemms:
        if gemm.is_quantized:
            yield from _check_sizes(format_, module, gemm, block, tp_size)


def _has_mixed_gemm(module: Module) -> bool:
    if len(module.gemms) == 3:  # an FFN
        return True
    return any(len({linear.quantization is not None for linear in gemm.linears}) > 1 for gemm in module.gemms)


def _check_sizes(format_: Format, module: Module, gemm: Gemm, block: int, tp_size: int) -> Iterator[FuselageError]:
    n, k = gemm.shape
    over_ranks = (n, k * tp_size) if gemm.row_parallel else (n * tp_size, k)
    multiple = format_.multiple_of_model * tp_size
    if n % format_.multiple or k % format_.multiple:
        expected, found = f"multiples of {format_.multiple} on each of {tp_size} ranks", f"[{n}, {k}]"
    elif format_.multiple_of_model > 1 and any(size % multiple for size in over_ranks):
        expected, found = f"multiples of {multiple}, that is {format_.multiple_of_model} * tp_size", str(over_ranks)
    else:
        return
    yield TargetError(
        f"{format_.algo} does not take a GEMM of this size ({_join(module.name, gemm.name)})",
        block=block,
        expected=expected,
        found=found,
        hint="use fewer ranks, or fuse to a width that fits",
    )


def check_stages(format_: Format, stages: Stages) -> Iterator[FuselageError]:
    """Yield exclusions that would also hit the layer of the same number in another pipeline stage."""
    if format_.algo is None or format_.least == "nothing":
        return
    left_out: dict[tuple[int, str], list[int]] = defaultdict(list)  # (layer of its stage, module) -> stages
    quantized_: dict[tuple[int, str], list[int]] = defaultdict(list)
    for stage, layers in enumerate(stages):
        for number, modules in enumerate(layers):
            out = set(_left_out(format_, modules))
            for name in _replaceable(format_, modules):
                (left_out if name in out else quantized_)[number, name].append(stage)
    for (number, name), own in left_out.items():
        if quantized_[number, name]:
            yield TargetError(
                f"an exclusion counts layers from the start of every pipeline stage, and would leave {name} of layer "
                f"{number} out of all",
                expected=f"out of the stages {own} alone",
                found=f"quantized in the stages {quantized_[number, name]}",
                hint="use one pipeline stage, or exclude the same layers in each",
            )
