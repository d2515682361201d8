"""How sure a ratio of two engines' times is: bootstrap confidence intervals of ratios of medians.

A round is one sample: the steps within one are not independent. Engines that took turns were slowed down by the same
neighbours in the same rounds, so their rounds are drawn together (paired); engines of different runs are drawn apart.

Source of the method: Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 13 (the percentile interval).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2001  # the 2.5 % quantile is then one of them, the 51st from below, and needs no interpolation
LEAST_ROUNDS = 5  # the range of four samples holds the median in 87.5 % of cases only, of five in 94 %
MOST_AT_ONCE = 1 << 22  # numbers in memory while medians are taken


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioInterval:
    """A ratio of medians, and its bootstrap confidence interval."""

    ratio: float
    low: float
    high: float

    @property
    def inverse(self) -> RatioInterval:
        """Of the rates whose times these are."""
        return RatioInterval(ratio=1 / self.ratio, low=1 / self.high, high=1 / self.low)

    @property
    def holds_one(self) -> bool:
        """Whether the two may be equal."""
        return self.low <= 1 <= self.high


def ratio_interval(
    samples: Sequence[float], baseline: Sequence[float], *, paired: bool = False, seed: int = 0
) -> RatioInterval:
    """Estimate median(samples) / median(baseline), by the percentile bootstrap.

    Args:
        samples, baseline: at least two each, positive.
        paired: the n-th sample of both was taken in the same round.
    """
    (found,) = ratio_intervals([samples], baseline, paired=paired, seed=seed)
    return found


def ratio_intervals(
    samples: Sequence[Sequence[float]], baseline: Sequence[float], *, paired: bool, seed: int = 0
) -> list[RatioInterval]:
    """Estimate the ratios of many engines to one baseline at once.

    Args:
        samples: [engines][rounds], positive.
        baseline: [rounds], positive; as many as of each engine if they are paired.
    """
    ours, theirs = np.asarray(samples, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if paired:
        draws, counts = _draws(theirs.size, seed)
        medians, of_baseline = _medians(ours, draws), _medians(theirs[None, :], draws)
    else:
        middles, middles_of_baseline, counts = _middles(ours.shape[1], theirs.size, seed)
        medians = np.sort(ours, axis=1)[:, middles].mean(axis=-1)
        of_baseline = np.sort(theirs)[middles_of_baseline].mean(axis=-1)
    with np.errstate(over="ignore"):
        ratios = np.median(ours, axis=1) / np.median(theirs)
        resampled = medians / of_baseline
    order = np.argsort(resampled, axis=1)
    ranks = np.cumsum(counts[order], axis=1)  # of each resample's last occurrence, from 1
    tail = round((1 - CONFIDENCE) / 2 * (RESAMPLES - 1))
    lows, highs = (
        np.take_along_axis(resampled, np.take_along_axis(order, (ranks <= rank).sum(axis=1)[:, None], 1), 1)[:, 0]
        for rank in (tail, RESAMPLES - 1 - tail)
    )
    return [
        RatioInterval(ratio=float(ratio), low=float(low), high=float(high))
        for ratio, low, high in zip(ratios, lows, highs, strict=True)
    ]


def _medians(samples: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The median of every draw from every row: [n, rounds], [m, rounds] -> [n, m]."""
    rows = max(1, MOST_AT_ONCE // draws.size)
    return np.concatenate([np.median(samples[i : i + rows, draws], axis=-1) for i in range(0, len(samples), rows)])


@lru_cache(maxsize=16)
def _draws(rounds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The different draws of rounds, each in ascending order [m, rounds], and how often each was drawn [m].

    Of five rounds there are 126.
    """
    return np.unique(_sorted_draws(rounds, seed), axis=0, return_counts=True)


@lru_cache(maxsize=16)
def _middles(rounds: int, rounds_of_baseline: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What makes the medians of two runs that are drawn apart, where samples are sorted.

    Returns:
        The two middle indices of the different pairs of draws, [m, 2] of each run, and how often each was drawn [m].
        Of five rounds and five there are 25.
    """
    drawn = [_sorted_draws(rounds, seed), _sorted_draws(rounds_of_baseline, seed + 1)]
    middles = [draws[:, [(draws.shape[1] - 1) // 2, draws.shape[1] // 2]] for draws in drawn]
    pairs, counts = np.unique(np.hstack(middles), axis=0, return_counts=True)
    return pairs[:, :2], pairs[:, 2:], counts


def _sorted_draws(rounds: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds)), axis=1)
