"""How large the inputs of a graph's linears become: what calibration finds, and what smoothing and quantization use.

A site is a place in a sublayer where linears read; ranges are per channel, so that they stay exact when channels are
scaled (a moved norm weight, smoothing) or put side by side (fusion).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exporter.dtypes import FLOAT32
from exporter.graph import FFN, Attention, LinearSublayer
from exporter.lazy import LazyTensor, computed

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
