"""Rotary position embedding: inverse frequencies of its variants.

D = head_dim. A head's channel pair (i, i + D/2) is turned by `position * inverse_frequency[i]`; cos and sin are
multiplied by `attention_factor` (1 but for YaRN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): interpolation for long wavelengths, extrapolation for short ones, and a temperature."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1, see `Rope.attention_factor`
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotary embedding of a model; None in `scaling` is the original one (arXiv:2104.09864)."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Return float32 [head_dim / 2], computed in the order of transformers' `ROPE_INIT_FUNCTIONS`."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = (np.float32(1.0) / np.float32(self.theta) ** exponents).astype(np.float32)
        scaling = self.scaling
        if scaling is None:
            return plain
        if isinstance(scaling, LinearScaling):
            return plain / np.float32(scaling.factor)
        if isinstance(scaling, Llama3Scaling):
            return _llama3(plain, scaling)
        return _yarn(plain, scaling, self.theta, head_dim)

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by (YaRN, equation 22 and transformers' handling of `mscale`)."""
        scaling = self.scaling
        if not isinstance(scaling, YarnScaling):
            return 1.0
        if scaling.attention_factor is not None:
            return scaling.attention_factor

        def temperature(mscale: float) -> float:
            return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

        if scaling.mscale and scaling.mscale_all_dim:
            return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
        return temperature(1.0)

    def tables(self, positions: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin for positions 0 .. positions-1, each float32 [positions, head_dim / 2]."""
        angles = np.outer(np.arange(positions, dtype=np.float32), self.inverse_frequencies(head_dim))
        factor = np.float32(self.attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    # 0 at the longest wavelength that is fully interpolated, 1 at the shortest one that is kept
    kept = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return ((1 - kept) * plain / scaling.factor + kept * plain).astype(np.float32)


def _yarn(plain: np.ndarray, scaling: YarnScaling, theta: float, head_dim: int) -> np.ndarray:
    def channel_of(rotations: float) -> float:
        original = scaling.original_max_position_embeddings
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel_of(scaling.beta_fast), channel_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp must not divide by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (plain / scaling.factor * ramp + plain * (1 - ramp)).astype(np.float32)
