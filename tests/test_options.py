"""Values of options: what they become, and what is refused."""

from __future__ import annotations

from typing import Any

import click
import pytest

from commands.options import BYTES, INDICES, NAMES, NUMBERS, SIZES, SizeRange
from commands.timing import SHARE


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        (NUMBERS, "1, 4", [1, 4]),
        (INDICES, "0,3", [0, 3]),
        (SIZES, "1,8,3", [1, 8, 3]),
        (SIZES, "1..16", SizeRange([1, 2, 4, 8, 16])),
        (SIZES, "3..13", SizeRange([3, 6, 12])),
        (SIZES, "5..9", SizeRange([5])),
        (BYTES, "7", 7),
        (BYTES, "500MB", 500 * 10**6),
        (BYTES, "3kb", 3000),
        (BYTES, "2TB", 2 * 10**12),
        (NAMES, "vllm, llama.cpp", ("vllm", "llama.cpp")),
        (SHARE, "2.5%", 0.025),
        (SHARE, "5 %", 0.05),
    ],
)
def test_what_is_written_becomes(option: click.ParamType, text: str, value: Any) -> None:
    found = option.convert(text, None, None)
    assert found == pytest.approx(value) if isinstance(value, float) else (found, type(found)) == (value, type(value))
    assert option.convert(found, None, None) is found


@pytest.mark.parametrize(
    ("option", "text"),
    [
        *((NUMBERS, text) for text in ("", "0", "-1", "1,,2", "1.5", "a")),
        (INDICES, "-1"),
        *((SIZES, text) for text in ("0..4", "4..2", "1..", "..4", f"1..{(1 << 20) + 1}", "0")),
        *((BYTES, text) for text in ("0", "GB", "5XB", "1.5GB", "-5GB", "5 5GB")),
        *((NAMES, text) for text in ("", "a,,b", "a,")),
        *((SHARE, text) for text in ("5", "-5%", "%", "5%%", "1e3%")),
    ],
)
def test_what_is_not_a_value(option: click.ParamType, text: str) -> None:
    with pytest.raises(click.BadParameter):
        option.convert(text, None, None)
