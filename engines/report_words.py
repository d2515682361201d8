"""Numbers and names as reports write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engines.intervals import RatioInterval
from engines.results import EngineResult, EvaluatedModel, Spread, Statistics

NOTHING = "–"
Verdict = Literal["better", "worse", "same", "neutral"]
Unit = Literal["ms", "s", "tokens/s", "bytes", "gib", "count", "parameters", "perplexity", "number"]


def formatted(values: Sequence[float | None], unit: Unit) -> tuple[str, list[str]]:
    """Write one row's values with the same unit and the same number of decimals; returns (unit, texts)."""
    present = [value for value in values if value is not None]
    largest = max(present, default=0)
    if unit == "count":
        return "", [NOTHING if value is None else f"{value:,.0f}" for value in values]
    if unit == "perplexity":  # differences that matter are small beside it
        return "", [NOTHING if value is None else f"{value:,.2f}" for value in values]
    divisor, name = 1.0, {"number": ""}.get(unit, unit)
    if unit == "gib":
        divisor, name = (1.0, "GiB") if largest >= 1 else (2.0**-10, "MiB")
    elif unit == "bytes":
        power = 0 if largest < 1 else min(int(math.log2(largest)) // 10, 3)
        divisor, name = 2.0 ** (10 * power), ("bytes", "KiB", "MiB", "GiB")[power]
    elif unit == "parameters":
        divisor, name = (1e9, "billion") if largest >= 1e9 else (1e6, "million") if largest >= 1e6 else (1.0, "")
    scaled = [None if value is None else value / divisor for value in values]
    if unit in ("bytes", "parameters") and divisor == 1:
        return name, [NOTHING if value is None else f"{value:,.0f}" for value in scaled]
    decimals = decimals_for([value for value in scaled if value is not None])
    # Far below the largest, a value would be left with less than two digits, if any: then it has decimals of its own.
    return name, [
        digits(value) if value is None or abs(value) * 10**decimals < 10 else f"{value:,.{decimals}f}"
        for value in scaled
    ]


def decimals_for(values: Sequence[float]) -> int:
    """Enough for three significant digits of the smallest value, but not more than four of the largest; signs aside."""
    exponents = [math.floor(math.log10(abs(value))) for value in values if value]
    return max(0, min(2 - min(exponents), 3 - max(exponents), 6)) if exponents else 0


def digits(value: float | None) -> str:
    if value is None:
        return NOTHING
    if 0 < abs(value) < 1e-5:  # six decimals would be nothing but zeros, or nearly
        return f"{value:.2e}"
    return f"{value:,.{decimals_for([value])}f}"


def spread_text(spread: Spread | None) -> tuple[str, str]:
    """Return the median and, where there is one, the range over the rounds."""
    if spread is None:
        return NOTHING, ""
    decimals = decimals_for([spread.median])
    low, high = f"{spread.low:,.{decimals}f}", f"{spread.high:,.{decimals}f}"
    return f"{spread.median:,.{decimals}f}", "" if low == high else f"{low}–{high}"


@dataclass(frozen=True, slots=True)
class Value:
    """One figure as text, and what it is over the baseline's, with the confidence interval of that ratio."""

    text: str
    ratio: str = ""
    verdict: Verdict = "neutral"
    interval: str = ""


def compared(
    text: str,
    quotient: float | None,
    better: int,
    interval: RatioInterval | None = None,
    *,
    is_beyond_noise: bool = True,
) -> Value:
    """Put a ratio beside a figure.

    Args:
        better: 1 where more is better, -1 where less is, 0 where neither.
        is_beyond_noise: whether a ratio without an interval may be called better or worse.
    """
    if quotient is None:
        return Value(text)
    shown, between = f"{ratio_text(quotient)}×", interval_text(interval)
    if is_same(quotient, interval):
        return Value(text, shown, "same", between)
    if better == 0 or (interval is None and not is_beyond_noise):
        return Value(text, shown, "neutral", between)
    return Value(text, shown, "better" if (quotient > 1) == (better > 0) else "worse", between)


def is_same(quotient: float, interval: RatioInterval | None = None) -> bool:
    """Whether a ratio may as well be 1; without an interval, whether it is 1 as far as it is written."""
    return ratio_text(quotient) == "1.00" if interval is None else interval.holds_one


def ratio_text(quotient: float) -> str:
    if 0 < quotient < 0.01:
        return f"{quotient:.2g}"
    return f"{quotient:.2f}" if quotient < 100 else f"{quotient:,.0f}"


def interval_text(interval: RatioInterval | None) -> str:
    return "" if interval is None else f"{ratio_text(interval.low)}–{ratio_text(interval.high)}"


def shortened(text: str, longest: int) -> str:
    """Cut a text that has more characters; an ellipsis is the last of them."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def pace_of(figures: Statistics | None) -> tuple[float | None, str]:
    """Return the latency that speed is judged by, in ms, and its name: per token if there is a second token."""
    if figures is None:
        return None, "per token"
    if figures.inter_token_ms is None:
        return figures.ttft_ms.median, "to the first token"
    return figures.inter_token_ms.median or None, "per token"


def named(engine: EngineResult) -> str:
    unusual = engine.standing.removeprefix("measured").removeprefix(", ")
    return f"{engine.label} ({unusual})" if unusual else engine.label


def depth_text(model: EngineResult | EvaluatedModel) -> str:
    blocks = len(model.structure.flat_blocks)
    return f"{blocks} blocks, {model.structure.sequential_sublayers} sequential sublayers"
