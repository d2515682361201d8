"""Quantized Hugging Face folders: which layout a graph gets, what its config says, the names and shapes of its scales.

The layouts are tables in `exporter.architectures.quantization`; `hf_readers` knows who reads which. A graph that comes
from a quantized folder keeps its layout, which its readers are known to take. Any other gets by default the one that
more of its readers take:

    float8_e4m3fn weights per tensor, static inputs    modelopt
    int8 weights only                                  modelopt (compressed-tensors packs such weights)
    everything else, and a mix of schemes              compressed-tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter import __version__
from exporter.architectures.quantization import (
    COMPRESSED_TENSORS,
    LAYOUTS,
    MODELOPT,
    TYPES,
    Layout,
    Scheme,
    check_codes,
    scheme_of,
)
from exporter.dtypes import FLOAT8_E4M3FN, INT8, DType
from exporter.errors import FuselageError, TargetError
from exporter.graph import (
    FFN,
    FUSED_GEMMS,
    Attention,
    InputQuantization,
    KVQuantization,
    Linear,
    LinearSublayer,
    ModelGraph,
    linears,
    members,
)
from exporter.lazy import LazyTensor, reshape

MODELOPT_FIRST = (Scheme(FLOAT8_E4M3FN, "tensor", "tensor"), Scheme(INT8, "channel", None))


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderQuantization:
    """What the config of a quantized folder says."""

    layout: Layout
    modules: Mapping[Scheme, Sequence[str]]  # the names of the linears that have it
    left_out: Sequence[str]  # the names of the others, lm_head among them
    kv_cache: bool


def quantization_of(graph: ModelGraph, table: Mapping[str, str], layout: str | None) -> FolderQuantization | None:
    """Return what a folder of `graph` says of its quantization, None if there is none.

    Args:
        graph: `check` finds no problem in it; its blocks are the folder's layers.
        table: the family's tensor names.
        layout: the name of one of `LAYOUTS`, None for the default.
    """
    modules: dict[Scheme, list[str]] = {}
    left_out = [table["lm_head"]]
    for name, linear in _named_linears(graph, table):
        scheme = scheme_of(linear)
        if scheme is None:
            left_out.append(name)
        else:
            modules.setdefault(scheme, []).append(name)
    if not modules:
        return None
    return FolderQuantization(
        layout=_layout(list(modules), layout),
        modules=modules,
        left_out=left_out,
        kv_cache=any(attention.kv_quantization is not None for _, attention in graph.attentions),
    )


def layout_to_keep(graph: ModelGraph, source: str | None) -> str | None:
    """The layout of the folder that a graph came from, None if it has none, or no word for the graph's quantization."""
    if source is None:
        return None
    every = (linear for _, sublayer in _sublayers(graph) for linear in linears(sublayer).values())
    schemes = {scheme for linear in every if (scheme := scheme_of(linear)) is not None}
    fits = schemes <= LAYOUTS[source].words.keys() and (source != MODELOPT.name or len(schemes) == 1)
    return source if fits else None


def _named_linears(graph: ModelGraph, table: Mapping[str, str]) -> Iterator[tuple[str, Linear]]:
    for layer, block in enumerate(graph.flat_blocks):
        for kind, sublayer in (("attention", block.attention), ("ffn", block.ffn)):
            for role, linear in linears(sublayer).items() if sublayer is not None else ():
                yield table[f"{kind}.{role}"].format(layer=layer), linear


def _layout(schemes: Sequence[Scheme], name: str | None) -> Layout:
    if name is not None:
        return LAYOUTS[name]
    return MODELOPT if len(schemes) == 1 and schemes[0] in MODELOPT_FIRST else COMPRESSED_TENSORS


# --- tensors


def scales(layout: Layout, stem: str, linear: Linear) -> Iterator[tuple[str, LazyTensor]]:
    """Yield a linear's scales with their names, the weight's first: it is known once the codes have been read."""
    quantization = linear.quantization
    if quantization is None:
        return
    yield f"{stem}.weight_scale", _stored(quantization.weight_scale, layout)
    if quantization.input is not None and quantization.input.scale is not None:
        yield f"{stem}.input_scale", _stored(quantization.input.scale, layout)


def kv_scales(layout: Layout, attention: str, quantization: KVQuantization) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the scales of a KV cache with their names; `attention` is the name of the module."""
    yield layout.k_scale.format(attention=attention), _stored(quantization.k_scale, layout)
    yield layout.v_scale.format(attention=attention), _stored(quantization.v_scale, layout)


def _stored(scale: LazyTensor, layout: Layout) -> LazyTensor:
    return reshape(scale, (*scale.shape, *layout.unit))


# --- config


def quantization_config(found: FolderQuantization, table: Mapping[str, str]) -> dict[str, Any]:
    """Return `quantization_config` of config.json."""
    return _modelopt_config(found, table) if found.layout is MODELOPT else _compressed_tensors_config(found)


def hf_quant_config(found: FolderQuantization, table: Mapping[str, str]) -> dict[str, Any]:
    """Return ModelOpt's hf_quant_config.json, which TensorRT-LLM looks at first.

    Equal to what nvidia-modelopt 0.47.0 writes but for the producer, and for wildcards where several linears of a
    module are left out: each has its own entry here, which every reader understands alike.
    """
    (scheme,) = found.modules
    return {
        "producer": _producer(),
        "quantization": {
            "quant_algo": found.layout.words[scheme],
            "kv_cache_quant_algo": "FP8" if found.kv_cache else None,
            "exclude_modules": _excluded(found, table),
        },
    }


def _modelopt_config(found: FolderQuantization, table: Mapping[str, str]) -> dict[str, Any]:
    """ModelOpt's form of compressed-tensors' keys (`modelopt/torch/export/convert_hf_config.py`)."""
    (scheme,) = found.modules
    static = {"dynamic": False, "num_bits": 8, "type": "float"}
    entry: dict[str, Any] = {}
    if found.layout.words[scheme] == "FP8":
        entry["config_groups"] = {"group_0": {"input_activations": static, "weights": static, "targets": ["Linear"]}}
    entry |= {"ignore": _excluded(found, table), "quant_algo": found.layout.words[scheme]}
    if found.kv_cache:
        entry["kv_cache_scheme"] = static
    return {**entry, "producer": _producer(), "quant_method": found.layout.name}


def _excluded(found: FolderQuantization, table: Mapping[str, str]) -> list[str]:
    return sorted([*found.left_out, table["embedding"].removesuffix(".weight")])


def _producer() -> dict[str, str]:
    return {"name": "fuselage", "version": __version__}


def _compressed_tensors_config(found: FolderQuantization) -> dict[str, Any]:
    """One group of all linears, or groups that name theirs one by one, as TensorRT-LLM wants several to do."""
    formats = [found.layout.words[scheme] for scheme in found.modules]
    same_format = len(set(formats)) == 1
    groups: dict[str, Any] = {}
    for number, (scheme, modules) in enumerate(found.modules.items()):
        group = {
            "targets": list(modules) if len(formats) > 1 else ["Linear"],
            "weights": _arguments(scheme.codes, scheme.weight),
            "input_activations": _arguments(scheme.codes, scheme.input),
        }
        groups[f"group_{number}"] = group if same_format else {**group, "format": formats[number]}
    config = {
        "quant_method": found.layout.name,
        "format": formats[0] if same_format else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(found.left_out),
        "config_groups": groups,
    }
    return {**config, "kv_cache_scheme": _arguments(FLOAT8_E4M3FN, "tensor")} if found.kv_cache else config


def _arguments(codes: DType, strategy: str | None) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": TYPES[codes],
        "symmetric": True,
        "strategy": strategy,
        "dynamic": strategy == "token",
    }


# --- what cannot be expressed


def check(graph: ModelGraph, layout: str | None) -> Iterator[FuselageError]:
    """Yield everything about a graph's quantization that its folder cannot express; `block` counts `graph.blocks`.

    Scales are read where several that must be one are not the same object; weights are not.
    """
    if layout is not None and layout not in LAYOUTS:
        yield TargetError("unknown layout of a quantized folder", expected=" or ".join(LAYOUTS), found=layout)
        return
    if graph.lm_head is not None and graph.lm_head.quantization is not None:
        yield TargetError("a quantized lm_head cannot be expressed: readers have plain weights there")
    found: dict[Scheme, int] = {}  # and the first block that has it
    for index, sublayer in _sublayers(graph):
        for name, linear in linears(sublayer).items():
            yield from check_codes(linear, name, index)
            scheme = scheme_of(linear)
            if scheme is not None:
                found.setdefault(scheme, index)
        for group in FUSED_GEMMS:
            readers = [_input_of(linears(sublayer).get(name)) for name in group]
            if differ([one.scale for one in readers if one is not None and one.scale is not None]):
                yield TargetError(f"{', '.join(group)} read one input and have one input scale", block=index)
    if found:
        yield from _unknown_schemes(found, _layout(list(found), layout))
    yield from _kv_problems(graph, any_linear=bool(found))


def _unknown_schemes(found: Mapping[Scheme, int], layout: Layout) -> Iterator[FuselageError]:
    for scheme, block in found.items():
        if scheme not in layout.words:
            yield TargetError(
                f"{layout.name} folders do not have this quantization",
                block=block,
                expected="; ".join(str(known) for known in layout.words),
                found=scheme,
            )
    if layout is MODELOPT and len(found) > 1:
        yield TargetError(
            f"a {layout.name} folder has one quantization for all linears",
            block=list(found.values())[1],
            found="; ".join(str(scheme) for scheme in found),
            hint=f"choose the layout {COMPRESSED_TENSORS.name}",
        )


def _kv_problems(graph: ModelGraph, *, any_linear: bool) -> Iterator[FuselageError]:
    caches = [(index, part.kv_quantization) for index, part in _sublayers(graph) if isinstance(part, Attention)]
    quantized = [(index, cache.dtype) for index, cache in caches if cache is not None]
    for index, cache in caches:
        if quantized and cache is None:
            yield TargetError("the KV cache is quantized in all blocks or in none", block=index)
    for index, dtype in quantized:
        if dtype != FLOAT8_E4M3FN:
            yield TargetError(
                "no reader has a KV cache of this dtype", block=index, expected="float8_e4m3fn", found=dtype
            )
    if quantized and not any_linear:
        yield TargetError(
            "a quantized KV cache needs quantized linears in these folders", hint="quantize the linears too"
        )


def _sublayers(graph: ModelGraph) -> Iterator[tuple[int, Attention | FFN | LinearSublayer]]:
    for index, entry in enumerate(graph.blocks):
        for block in members(entry):
            yield from ((index, part) for part in (block.attention, block.ffn) if part is not None)


def _input_of(linear: Linear | None) -> InputQuantization | None:
    return None if linear is None or linear.quantization is None else linear.quantization.input


def differ(scales: Sequence[LazyTensor]) -> bool:
    """Whether scales are not one number; they are read only if they are not one object."""
    distinct = {id(scale): scale for scale in scales}.values()
    if len(distinct) < 2 or not all(scale.has_bytes for scale in distinct):
        return False
    return len({float(scale.numpy()) for scale in distinct}) > 1
