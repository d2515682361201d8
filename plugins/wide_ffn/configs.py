"""Block sizes of the two kernels for a call: measured ones where a tuner has left some, else from a rule.

The rule, for compute capability 9.0 (132 multiprocessors, 227 KiB of shared memory each):

    tokens   padded to 16, 32 or 64, the columns of one tensor-core instruction
    depth    128 bytes of a weight row: one line of the cache, and one row of a swizzled tile in shared memory
    rows     64 per warp group of 4 warps; one warp group up to 32 tokens, two for 64, where registers would not suffice
    stages   as many copies in flight as take `STAGE_BYTES`, at least 3; latency times bandwidth is about 20 KB per
             multiprocessor (0.7 us * 3.35 TB/s / 132), and waiting for the tensor cores must not drain them
    programs of `gate_up`: as many as registers and shared memory let run at a time, two per multiprocessor up to 32
             tokens, one for 64, so that each takes the norm once
    splits   of `down`: so many that every multiprocessor has `WAVES` programs to go through, each at least
             `MIN_STEPS` steps long; never so few that a sum of int8 products could leave 32 bits

No GPU has measured any of this yet: `configs/sm_90.json` is empty until `plugins.wide_ffn.tune` fills it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from exporter.errors import EngineError

FOLDER = Path(__file__).parent / "configs"
SCHEMA = 1
BUCKETS = (16, 32, 64)
MULTIPROCESSORS = 132
ITEMSIZE: dict[str, int] = {"bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}
NORM_ELEMENTS = 8192  # of x that a program of `gate_up` holds at a time for the norm
STAGE_BYTES = 96 << 10
WAVES = 4
MIN_STEPS = 16
LONGEST_INT8_SUM = 2**31 // 128**2 - 1  # products of codes that surely fit in 32 bits


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one kernel is cut.

    Args:
        rows: weight rows per tile (of gate and of up each).
        depth: elements of the reduced dimension per step.
        warps: per program.
        stages: steps whose copies are in flight.
    """

    rows: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Config:
    """Both kernels for one kind of call."""

    tokens: int  # padded: one of BUCKETS
    gate_up: Tiling
    programs: int  # of gate_up
    down: Tiling
    splits: int  # of down
    origin: Literal["rule", "measured"] = "rule"


def config_for(
    *,
    tokens: int,
    hidden: int,
    width: int,
    weights: str,
    activations: str,
    multiprocessors: int = MULTIPROCESSORS,
) -> Config:
    """The measured configuration of exactly this call if there is one, else that of the rule."""
    bucket = bucket_of(tokens)
    measured = _measured("sm_90").get((bucket, hidden, width, weights, activations))
    return measured or config_by_rule(bucket, hidden, width, weights, activations, multiprocessors)


def bucket_of(tokens: int) -> int:
    """The smallest of BUCKETS that holds so many tokens."""
    return next(bucket for bucket in BUCKETS if tokens <= bucket)


def config_by_rule(
    bucket: int,
    hidden: int,
    width: int,
    weights: str,
    activations: str,
    multiprocessors: int = MULTIPROCESSORS,
) -> Config:
    """See the module's docstring."""
    gate_up, down = tilings_by_rule(bucket, weights, activations)
    tiles = ceil_div(hidden, down.rows)
    steps = ceil_div(width, down.depth)
    splits = max(1, min(ceil_div(WAVES * multiprocessors, tiles), steps // MIN_STEPS))
    return Config(
        tokens=bucket,
        gate_up=gate_up,
        programs=min(multiprocessors * (2 if bucket < 64 else 1), ceil_div(width, gate_up.rows)),
        down=down,
        splits=max(splits, fewest_splits(width, down.depth, weights, activations)),
    )


def tilings_by_rule(bucket: int, weights: str, activations: str) -> tuple[Tiling, Tiling]:
    """The tilings of `gate_up` and `down`, which depend on neither hidden nor width."""
    warps = 4 if bucket < 64 else 8
    rows = 16 * warps
    depth = 128 // ITEMSIZE[weights]
    inner_bytes = ITEMSIZE[weights] if activations == "static" else 2
    gate_up_bytes = (2 * rows * ITEMSIZE[weights] + 2 * bucket) * depth
    down_bytes = (rows * ITEMSIZE[weights] + inner_bytes * bucket) * depth
    return (
        Tiling(rows, depth, warps, max(3, STAGE_BYTES // gate_up_bytes)),
        Tiling(rows, depth, warps, max(3, STAGE_BYTES // 2 // down_bytes)),
    )


def fewest_splits(width: int, depth: int, weights: str, activations: str) -> int:
    """How many parts a sum of int8 products must at least be cut into to fit in 32 bits; 1 for other formats."""
    if weights != "int8" or activations == "none":
        return 1
    return ceil_div(ceil_div(width, depth), LONGEST_INT8_SUM // depth)


@cache
def _measured(arch: str) -> dict[tuple[int, int, int, str, str], Config]:
    """Configurations that the tuner has left for an architecture, by call."""
    file = FOLDER / f"{arch}.json"
    document = json.loads(file.read_text())
    if document.get("schema") != SCHEMA:
        raise EngineError("unknown schema of kernel configurations", file=file, expected=SCHEMA)
    return {
        (row["tokens"], row["hidden"], row["width"], row["weights"], row["activations"]): _config(row)
        for row in document["measured"]
    }


def _config(row: dict[str, Any]) -> Config:
    return Config(
        tokens=row["tokens"],
        gate_up=Tiling(**row["gate_up"]),
        programs=row["programs"],
        down=Tiling(**row["down"]),
        splits=row["splits"],
        origin="measured",
    )


def row_of(config: Config, hidden: int, width: int, weights: str, activations: str) -> dict[str, Any]:
    """A configuration as `configs/*.json` holds it; what was measured goes beside it."""
    row = {"hidden": hidden, "width": width, "weights": weights, "activations": activations, **asdict(config)}
    del row["origin"]
    return row


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
