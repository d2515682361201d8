"""Put 8-bit codes and their scales in place of a graph's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from exporter.dtypes import BY_NAME, FLOAT32, DType
from exporter.errors import PlanError
from exporter.graph import (
    Attention,
    Block,
    InputQuantization,
    KVQuantization,
    Linear,
    ModelGraph,
    Quantization,
    linear_names,
    linears,
    map_blocks,
)
from exporter.lazy import LazyTensor, computed
from exporter.lazy_quantized import quantized, row_scales, tensor_scale
from exporter.numerics import scale_from_amax
from exporter.quantization import LinearFormat, QuantizationRecipe, WeightFormat, dtype_of, sharing_scale
from exporter.ranges import KEY, SITE_OF, VALUE, Ranges, SublayerRanges, input_range, unmeasured_ranges


def structure_quantized(graph: ModelGraph, recipe: QuantizationRecipe) -> ModelGraph:
    """Quantize a graph's structure, for checks and sizes before anything is calibrated.

    Static scales are tensors of shapes and no values. Otherwise as `quantize_linears`.
    """
    return quantize_linears(graph, recipe, unmeasured_ranges(graph))


def quantize_linears(graph: ModelGraph, recipe: QuantizationRecipe, ranges: Ranges | None = None) -> ModelGraph:
    """Quantize the linears of a graph as a recipe says; norms and embeddings stay.

    Args:
        ranges: of the graph's sites; needed for static input scales and for the KV cache.

    Returns:
        A new graph. No tensor byte is read: codes and scales are computed when they are.

    Raises:
        PlanError: a pattern of the recipe matches nothing, nothing is left to quantize, ranges are needed and missing,
            or a linear is quantized already.
    """
    if recipe.needs_ranges and ranges is None:
        raise PlanError("this quantization needs calibration", hint="give a text to calibrate on, or a calibration")
    names = linear_names(graph)
    recipe.check_patterns(names)
    if recipe.kv_cache is None and not any(map(recipe.format_of, names)):
        raise PlanError("the quantization recipe leaves every linear out", found=f"exclude: {recipe.exclude}")
    for name, linear in names.items():
        if linear.quantization is not None:
            raise PlanError("the model is quantized already", found=name)
    if "lm_head" in recipe.include and graph.lm_head is None:
        raise PlanError("lm_head is tied to the embedding and cannot be quantized")

    def block_quantized(block: Block, index: int) -> Block:
        parts: dict[str, Any] = {}
        for name in ("attention", "ffn"):
            part = getattr(block, name)
            if part is not None:
                known = None if ranges is None else getattr(ranges[index], name)
                parts[name] = _sublayer(part, known, recipe, f"blocks.{index}.{name}")
        return replace(block, **parts)

    head = graph.lm_head
    wanted = recipe.format_of("lm_head")
    if head is not None and wanted is not None:
        if wanted.inputs is not None and wanted.inputs.scale == "tensor":
            raise PlanError("lm_head has no calibrated input range", hint="quantize it weight-only or per token")
        head = _quantized(head, wanted, _weight_scale([head], wanted.weights), None)
    return replace(map_blocks(graph, block_quantized), lm_head=head)


def _sublayer(sublayer: Any, ranges: SublayerRanges | None, recipe: QuantizationRecipe, scope: str) -> Any:
    parts = linears(sublayer)
    formats = {name: found for name in parts if (found := recipe.format_of(f"{scope}.{name}")) is not None}
    scales = _weight_scales(parts, formats)
    input_scales: dict[tuple[str, DType], LazyTensor] = {}
    changed: dict[str, Any] = {}
    for name, wanted in formats.items():
        input_scale = None
        if wanted.inputs is not None and wanted.inputs.scale == "tensor":
            if ranges is None:
                raise AssertionError("Bug: static scales without ranges")
            key = SITE_OF[name], dtype_of(wanted.inputs)
            if key not in input_scales:
                input_scales[key] = _static_scale(input_range(sublayer, ranges, name), key[1])
            input_scale = input_scales[key]
        changed[name] = _quantized(parts[name], wanted, scales[name], input_scale)
    if isinstance(sublayer, Attention) and recipe.kv_cache is not None:
        if ranges is None:
            raise AssertionError("Bug: a quantized KV cache without ranges")
        dtype = BY_NAME[recipe.kv_cache]
        changed["kv_quantization"] = KVQuantization(
            dtype=dtype,
            k_scale=_static_scale(ranges[KEY], dtype),
            v_scale=_static_scale(ranges[VALUE], dtype),
        )
    return replace(sublayer, **changed)


def _weight_scales(parts: Mapping[str, Linear], formats: Mapping[str, LinearFormat]) -> dict[str, LazyTensor]:
    """The weight scale of every linear that has a format."""
    scales: dict[str, LazyTensor] = {}
    for name, wanted in formats.items():
        if name not in scales:
            sharing = sharing_scale(name, formats)
            scales |= dict.fromkeys(sharing, _weight_scale([parts[other] for other in sharing], wanted.weights))
    return scales


def _weight_scale(group: Sequence[Linear], wanted: WeightFormat) -> LazyTensor:
    dtype = dtype_of(wanted)
    if wanted.scale == "row":
        return row_scales(group[0].weight, dtype)
    return tensor_scale([linear.weight for linear in group], dtype)


def _static_scale(channels: LazyTensor, dtype: DType) -> LazyTensor:
    """One scale for a site: that of its largest channel."""

    def find(channels: LazyTensor) -> np.ndarray:
        return scale_from_amax(channels.numpy().max(), dtype)

    return computed((), FLOAT32, find, channels)


def _quantized(linear: Linear, wanted: LinearFormat, scale: LazyTensor, input_scale: LazyTensor | None) -> Linear:
    inputs = None
    if wanted.inputs is not None:
        inputs = InputQuantization(dtype=dtype_of(wanted.inputs), scale=input_scale)
    return replace(
        linear,
        weight=quantized(linear.weight, scale, dtype_of(wanted.weights)),
        quantization=Quantization(weight_scale=scale, input=inputs),
    )
