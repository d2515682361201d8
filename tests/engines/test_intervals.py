"""Intervals of ratios: against scipy's bootstrap and plain loops, how often they hold the truth, that they repeat."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from engines.intervals import LEAST_ROUNDS, RESAMPLES, RatioInterval, ratio_interval, ratio_intervals

TRIALS = 1000


def drawn(rounds: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two engines that take turns: what slows a round down slows both."""
    rng = np.random.default_rng(seed)
    shared = rng.lognormal(0, 0.1, rounds)
    return 1.1 * shared * rng.lognormal(0, 0.02, rounds), shared * rng.lognormal(0, 0.02, rounds)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("rounds", [5, 8, 40])
def test_as_scipy_does_it(rounds: int, paired: bool) -> None:
    ours, theirs = drawn(rounds)
    found = ratio_interval(ours, theirs, paired=paired)
    expected = bootstrap(
        (ours, theirs),
        lambda a, b, axis=-1: np.median(a, axis=axis) / np.median(b, axis=axis),
        paired=paired,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.ratio == pytest.approx(np.median(ours) / np.median(theirs))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.01)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("rounds", "seed"), [(6, 0), (100, 7)])  # of 100 rounds hardly a resample has its like
def test_as_a_plain_loop_does_it(rounds: int, seed: int, paired: bool) -> None:
    """Every resample by itself, quantiles by numpy: the same draws give the same numbers."""
    ours, theirs = drawn(rounds)
    if not paired:  # then it does not matter which round is which
        ours, theirs = np.sort(ours), np.sort(theirs)
    first, second = (
        np.sort(np.random.default_rng(of).integers(0, rounds, (RESAMPLES, rounds)), axis=1) for of in (seed, seed + 1)
    )
    ratios = [
        np.median(ours[a]) / np.median(theirs[b]) for a, b in zip(first, first if paired else second, strict=True)
    ]
    low, high = np.quantile(ratios, (0.025, 0.975))
    found = ratio_interval(ours, theirs, paired=paired, seed=seed)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)


def test_paired_rounds_say_more_where_they_are_slowed_down_together() -> None:
    ours, theirs = drawn(12)
    paired, apart = (ratio_interval(ours, theirs, paired=paired) for paired in (True, False))
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


@pytest.mark.parametrize(("rounds", "least"), [(LEAST_ROUNDS, 0.92), (10, 0.93)])
def test_paired_intervals_hold_the_ratio_as_often_as_they_say(rounds: int, least: float) -> None:
    found = (ratio_interval(*drawn(rounds, seed), paired=True, seed=seed % 8) for seed in range(TRIALS))
    assert least <= sum(one.low <= 1.1 <= one.high for one in found) / TRIALS <= 0.99


@pytest.mark.parametrize("at_once", [None, 2000])
def test_many_at_once_are_the_same_as_one_by_one(at_once: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if at_once is not None:
        monkeypatch.setattr("engines.intervals.MOST_AT_ONCE", at_once)  # three rows of 126 draws
    rng = np.random.default_rng(0)
    samples, baseline = rng.lognormal(0, 0.1, (7, 5)), rng.lognormal(0, 0.1, 5)
    for paired in (True, False):
        together = ratio_intervals(samples, baseline, paired=paired)
        assert together == [ratio_interval(one, baseline, paired=paired) for one in samples]
        assert together == ratio_intervals(samples, baseline, paired=paired)


def test_rates_have_the_inverse() -> None:
    times = RatioInterval(ratio=0.5, low=0.4, high=0.8)
    assert times.inverse == RatioInterval(ratio=2.0, low=1.25, high=2.5)
    assert not times.holds_one
    assert RatioInterval(ratio=0.9, low=0.7, high=1.0).holds_one
