"""Random changes to sound input, for tests that nothing of it gets through as anything but a clear error."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 255, 1 << 16, 1 << 24, 1 << 31, 1 << 53, 1 << 63, 1 << 64, 10**12, 10**300, 0.0,
    -0.0, 0.5, 1e-300, 1e-5, 1e12, 1e300, "", "0", "8", "silu", "no_op", "llama3", "yarn", "../x", "/etc/passwd", "\0",
    "\ud800", "x" * 300, [], [[]], [0], [0, 1], {}, {"a": 1}, [None] * 20, math.inf, math.nan, "F32", "I64", "BF16",
]  # fmt: skip


def mutate(value: Any, rng: random.Random) -> Any:
    """Change one place of a JSON value: replace, drop, repeat, move or nest."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places or rng.random() < 0.01:
        return copy.deepcopy(rng.choice(ODD))
    node, key = rng.choice(places)
    match rng.randrange(8):
        case 0 | 1 | 2:
            node[key] = copy.deepcopy(rng.choice(ODD))
        case 3:
            del node[key]
        case 4:
            other, other_key = rng.choice(places)
            node[key] = copy.deepcopy(other[other_key])
        case 5 if isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] = node[key] * rng.choice([-1, 0, 2, 3, 0.5, 1 << 40]) + rng.choice([-1, 0, 1])
        case 6 if isinstance(node, dict):
            names = ["", "a", "model.x", "block_configs", "__metadata__", "model.norm.weight", str(key) + "\0"]
            node[rng.choice(names)] = node[key]
        case _:
            for _ in range(rng.choice([1, 3, 40])):
                node[key] = [node[key]] if rng.random() < 0.5 else {"x": node[key]}
    return value


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at : at + rng.choice([1, 4, 100])]
            case 2:
                out[at:at] = rng.choice(
                    [b"0", b"9" * 30, b"-", b"{", b"]", b'"', b"\\u", b"\xff", b"\0" * 8, b"1e999", b","]
                )
            case 3 if len(out) > 8:
                source = rng.randrange(len(out) - 8)
                out[at:at] = out[source : source + rng.choice([1, 8, 64])]
            case _:
                out = out[:at] if rng.random() < 0.3 else out
        if not out:
            break
    return bytes(out)
