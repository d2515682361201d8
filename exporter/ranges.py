"""How large the inputs of a graph's linears become: what calibration finds, and what smoothing and quantization use.

A site is a place in a sublayer where linears read; ranges are per channel, so that they stay exact when channels are
scaled (a moved norm weight, smoothing) or put side by side (fusion).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exporter.dtypes import FLOAT32
from exporter.graph import FFN, Attention, LinearSublayer, ModelGraph, linears
from exporter.lazy import LazyTensor, computed, shape_only

NORM, O_PROJ, DOWN_PROJ, KEY, VALUE = "norm", "o_proj", "down_proj", "key", "value"

# Which site a linear reads. What is measured at "norm" is x / rms(x): the norm's weight is not part of it.
SITE_OF = {
    "q_proj": NORM,
    "k_proj": NORM,
    "v_proj": NORM,
    "o_proj": O_PROJ,
    "gate_proj": NORM,
    "up_proj": NORM,
    "down_proj": DOWN_PROJ,
    "linear": NORM,
}

SublayerRanges = Mapping[str, LazyTensor]  # site -> largest |value| of every channel, float32 [channels]


@dataclass(frozen=True, slots=True)
class BlockRanges:
    """The ranges of one of `ModelGraph.flat_blocks`; empty where there is no such sublayer."""

    attention: SublayerRanges
    ffn: SublayerRanges


Ranges = tuple[BlockRanges, ...]  # of `ModelGraph.flat_blocks`


def input_range(sublayer: Attention | FFN | LinearSublayer, ranges: SublayerRanges, linear: str) -> LazyTensor:
    """The largest |value| of every input channel of one linear, float32 [in]."""
    site = SITE_OF[linear]
    if site != NORM:
        return ranges[site]

    def with_weight(over_rms: LazyTensor, weight: LazyTensor) -> np.ndarray:
        return over_rms.numpy() * np.abs(weight.numpy().astype(np.float32))

    return computed(ranges[NORM].shape, FLOAT32, with_weight, ranges[NORM], sublayer.norm.weight)


def unmeasured_ranges(graph: ModelGraph) -> Ranges:
    """Ranges of a graph that have shapes and no values: enough for the structure of what they would be used for."""

    def sites(sublayer: Attention | FFN | LinearSublayer | None) -> SublayerRanges:
        if sublayer is None:
            return {}
        sizes = {SITE_OF[name]: linear.in_features for name, linear in linears(sublayer).items()}
        if isinstance(sublayer, Attention):
            sizes |= dict.fromkeys((KEY, VALUE), sublayer.num_key_value_heads * sublayer.head_dim)
        return {site: shape_only((size,), FLOAT32) for site, size in sizes.items()}

    return tuple(BlockRanges(attention=sites(block.attention), ffn=sites(block.ffn)) for block in graph.flat_blocks)
