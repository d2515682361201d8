"""Move unevenness between channels from activations into weights: SmoothQuant, at no cost at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from exporter.dtypes import FLOAT32
from exporter.errors import PlanError
from exporter.graph import FFN, Block, Linear, ModelGraph, RMSNorm, linears, map_blocks
from exporter.lazy import LazyTensor, computed, scale_columns, scale_rows
from exporter.numerics import amax
from exporter.ranges import DOWN_PROJ, NORM, SITE_OF, BlockRanges, Ranges, SublayerRanges, input_range

# A channel's factor stays within these bounds, as ModelOpt's does (modelopt/torch/quantization/model_calib.py).
LEAST, MOST = 1e-4, 1e4

Strengths = Mapping[tuple[int, str, str], float]  # (index in flat_blocks, sublayer, site) -> alpha


def smooth_channels(graph: ModelGraph, ranges: Ranges, strengths: Strengths) -> tuple[ModelGraph, Ranges]:
    """Divide every input channel c of a site by s_c and multiply the columns that read it by s_c.

        s_c = amax_x[c]^alpha / amax_w[c]^(1 - alpha)

    amax_x: the channel's range (`exporter.ranges`); amax_w: the largest |weight| of column c over all linears that read
    the site. alpha 0 evens out the weights, 1 the activations. Two sites can be smoothed for nothing:
      "norm"       s goes into the weight of the norm in front (q/k/v, gate/up)
      "down_proj"  s goes into the rows of up_proj: down @ (act(gate x) * (up x)) is linear in up. In a wide FFN this
                   evens out what its layers brought along
    Source: Xiao et al., "SmoothQuant", arXiv:2211.10438, equation 4.

    The factors are chosen so that the norm's weight, rounded to its dtype, is exactly the old one over s: what is left
    is one rounding of each weight to its dtype. Channels without a range, and columns of zeros, keep their scale.

    Returns:
        A new graph and its ranges. No tensor byte is read; the factors are computed when a weight is.

    Raises:
        PlanError: a linear is quantized already, or a site cannot be smoothed.
    """
    possible = set(smoothable_sites(graph))
    for index, sublayer, site in strengths:
        if (index, sublayer, site) not in possible:
            raise PlanError("this site cannot be smoothed", block=index, found=f"{sublayer}.{site}")
    new_ranges = list(ranges)

    def smoothed(block: Block, index: int) -> Block:
        attention, ffn = block.attention, block.ffn
        of_attention, of_ffn = ranges[index].attention, ranges[index].ffn
        # A norm before what is behind it: its factors are then those of the weights as they were.
        if (index, "attention", NORM) in strengths:
            attention = _input_smoothed(attention, of_attention, strengths[index, "attention", NORM])
        if (index, "ffn", NORM) in strengths:
            ffn = _input_smoothed(ffn, of_ffn, strengths[index, "ffn", NORM])
        if (index, "ffn", DOWN_PROJ) in strengths and isinstance(ffn, FFN):
            ffn, of_ffn = _inner_smoothed(ffn, of_ffn, strengths[index, "ffn", DOWN_PROJ])
        new_ranges[index] = BlockRanges(of_attention, of_ffn)
        return replace(block, attention=attention, ffn=ffn)

    return map_blocks(graph, smoothed), tuple(new_ranges)


def smoothable_sites(graph: ModelGraph) -> list[tuple[int, str, str]]:
    """The sites of a graph that `smooth_channels` can treat."""
    sites = []
    for index, block in enumerate(graph.flat_blocks):
        if block.attention is not None:
            sites.append((index, "attention", NORM))
        if block.ffn is not None:
            sites.append((index, "ffn", NORM))
        if isinstance(block.ffn, FFN):
            sites.append((index, "ffn", DOWN_PROJ))
    return sites


def _input_smoothed(sublayer: Any, ranges: SublayerRanges, alpha: float) -> Any:
    readers = {name: linear for name, linear in linears(sublayer).items() if SITE_OF[name] == NORM}
    wanted = _factors(input_range(sublayer, ranges, next(iter(readers))), list(readers.values()), alpha)
    norm = _divided_norm(sublayer.norm, wanted)
    exact = computed(wanted.shape, FLOAT32, _exact_factors, sublayer.norm.weight, norm.weight)
    return replace(sublayer, norm=norm, **{name: _scaled_columns(linear, exact) for name, linear in readers.items()})


def _inner_smoothed(ffn: FFN, ranges: SublayerRanges, alpha: float) -> tuple[FFN, SublayerRanges]:
    factors = _factors(ranges[DOWN_PROJ], [ffn.down_proj], alpha)
    inverse = computed(factors.shape, FLOAT32, lambda s: 1 / s.numpy(), factors)
    up = ffn.up_proj
    bias = up.bias and computed(
        up.bias.shape, up.bias.dtype, lambda b, s: b.numpy().astype(np.float32) / s.numpy(), up.bias, factors
    )
    smoothed = replace(
        ffn,
        up_proj=replace(up, weight=scale_rows(up.weight, inverse), bias=bias),
        down_proj=_scaled_columns(ffn.down_proj, factors),
    )
    inner = computed(factors.shape, FLOAT32, lambda x, s: x.numpy() / s.numpy(), ranges[DOWN_PROJ], factors)
    return smoothed, {**ranges, DOWN_PROJ: inner}


def _factors(inputs: LazyTensor, readers: list[Linear], alpha: float) -> LazyTensor:
    """s of every channel, float32 [in]."""
    for linear in readers:
        if linear.quantization is not None:
            raise PlanError("a quantized linear cannot be smoothed", hint="smooth first, then quantize")

    def find(inputs: LazyTensor, *weights: LazyTensor) -> np.ndarray:
        columns = np.zeros(inputs.shape, np.float32)
        for weight in weights:
            for piece in weight.chunks():
                np.maximum(columns, amax(piece, axis=0), out=columns)
        return smoothing_factors(inputs.numpy(), columns, alpha)

    return computed(inputs.shape, FLOAT32, find, inputs, *(linear.weight for linear in readers))


def smoothing_factors(inputs: np.ndarray, columns: np.ndarray, alpha: float) -> np.ndarray:
    """s of every channel, float32 [C], from the largest |input| and |weight| of each; 1 where either is 0."""
    alive = (inputs > 0) & (columns > 0)
    found = np.ones(inputs.shape, np.float32)
    found[alive] = inputs[alive] ** alpha / columns[alive] ** (1 - alpha)
    return np.clip(found, LEAST, MOST)


def _divided_norm(norm: RMSNorm, factors: LazyTensor) -> RMSNorm:
    dtype = norm.weight.dtype

    def divide(weight: LazyTensor, factors: LazyTensor) -> np.ndarray:
        wide = weight.numpy().astype(np.float64)
        with np.errstate(over="ignore"):
            divided = (wide / factors.numpy()).astype(dtype.numpy)
        # A weight that this would push out of its dtype's range keeps its size.
        usable = np.isfinite(divided.astype(np.float64)) & (divided.astype(np.float64) != 0)
        return np.where(usable, divided, weight.numpy())

    return replace(norm, weight=computed(norm.weight.shape, dtype, divide, norm.weight, factors))


def _exact_factors(before: LazyTensor, after: LazyTensor) -> np.ndarray:
    """What a norm's weight was really divided by."""
    old, new = before.numpy().astype(np.float64), after.numpy().astype(np.float64)
    return np.divide(old, new, out=np.ones_like(old), where=new != 0).astype(np.float32)


def _scaled_columns(linear: Linear, factors: LazyTensor) -> Linear:
    return replace(linear, weight=scale_columns(linear.weight, factors))
