"""Block sizes of the kernels for a call: measured ones where a tuner has left some, else from a rule.

The rule, for compute capability 9.0 (132 multiprocessors, 227 KiB of shared memory each):

    tokens   padded to 16, 32 or 64, the columns of one tensor-core instruction
    norm     before `gate_up`, in a launch of its own. Inside, every program of `gate_up` reads all of x for the norm
             before its first weight (512 KB each for 32 tokens of 8192, some 12 us at what the L2 cache gives), and
             norms and rounds a tile of x at every step, which for 32 tokens takes 40 % of what the multiprocessors
             can issue (`plugins.wide_ffn.machine_code`). A launch costs some 2 us
    depth    128 bytes of a weight row: one line of the cache, and one row of a swizzled tile in shared memory
    rows     so many that activations, which come from the L2 cache with every tile, are at most a quarter of a tile's
             bytes (`down` with a scale per token reads bfloat16, and rounds them again for each tile: twice the rows);
             of `gate_up` fewer where tiles would not go round the multiprocessors
    warps    one warp group of 4, or two from 128 by 32 sums on, for which one runs out of registers. Half of one where
             codes become bfloat16 on their way and tokens are 16: Triton then turns to the tensor-core instructions of
             single warps (mma.sync), for which it reads codes from shared memory 8 bytes at a time, not 2, and widens
             them in half as many instructions; with more tokens those need too many registers
    resident programs per multiprocessor: what registers and shared memory allow
    stages   so many copies that `FLIGHT_BYTES` are on their way to a multiprocessor while the tensor cores hold one
             stage: latency times bandwidth is 20 to 30 KB (0.8 us * 4.8 TB/s / 132), and nothing may drain it
    programs of `gate_up`: as many as are resident at most, each with the same number of tiles
    splits   of `down`: so many that all programs are resident at once, each at least `MIN_STEPS` steps long; never so
             few that a sum of int8 products could leave 32 bits

No GPU has measured any of this yet: `configs/sm_90.json` is empty until `plugins.wide_ffn.tune` fills it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from exporter.errors import EngineError

FOLDER = Path(__file__).parent / "configs"
SCHEMA = 2
BUCKETS = (16, 32, 64)
MATRICES = {"norm": 0, "gate_up": 2, "down": 1}  # weights that a tile of a kernel has its rows of
MULTIPROCESSORS = 132  # of an H100 or H200 SXM
ITEMSIZE: dict[str, int] = {"bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}
SHARED_BYTES = 227 << 10  # of a multiprocessor, and of one program at most
RESERVED_BYTES = 1 << 10  # of those, per program
REGISTERS = 1 << 16  # of a multiprocessor
MOST_REGISTERS = 255  # of a thread
FLIGHT_BYTES = 128 << 10
MOST_STAGES = 8
MIN_STEPS = 8
# Whether a product and a sum may become one fused multiply-add, said with every launch and every compilation: what is
# tested has them, and Triton's own answer, yes up to 3.9, is to be no from 3.10 on.
FP_FUSION = True
LONGEST_INT8_SUM = 2**31 // 128**2 - 1  # products of codes that surely fit in 32 bits
Norm = Literal["before", "inside"]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one kernel is cut.

    Args:
        rows: weight rows per tile (of gate and of up each).
        depth: elements of the reduced dimension per step.
        warps: per program.
        stages: steps whose copies are in flight.
        registers: of a thread at most; as many as the assembler likes if None.
    """

    rows: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """All launches of one kind of call."""

    tokens: int  # padded: one of BUCKETS
    norm: Norm  # in a launch before `gate_up`, or in each of its programs
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
    norm: Norm | None = None,
    multiprocessors: int = MULTIPROCESSORS,
) -> Config:
    """The fastest measured configuration of exactly this call if there is one, else that of the rule.

    Args:
        norm: where it has to be; the caller does not mind if not given.
    """
    bucket = bucket_of(tokens)
    measured = _measured("sm_90").get((bucket, hidden, width, weights, activations), {})
    fitting = [config for config in measured if norm in (None, config.norm)]
    if fitting:
        return min(fitting, key=lambda config: measured[config])
    return config_by_rule(bucket, hidden, width, weights, activations, norm or "before", multiprocessors)


def bucket_of(tokens: int) -> int:
    """The smallest of BUCKETS that holds so many tokens."""
    return next(bucket for bucket in BUCKETS if tokens <= bucket)


def config_by_rule(
    bucket: int,
    hidden: int,
    width: int,
    weights: str,
    activations: str,
    norm: Norm = "before",
    multiprocessors: int = MULTIPROCESSORS,
) -> Config:
    """See the module's docstring."""
    gate_up = gate_up_by_rule(bucket, weights, activations, norm, width, multiprocessors)
    tiles = ceil_div(width, gate_up.rows)
    is_busy = _is_gate_up_busy(bucket, weights, activations, norm)
    each = ceil_div(tiles, multiprocessors * _resident(bucket, is_busy=is_busy))
    down = down_by_rule(bucket, weights, activations)
    at_once = multiprocessors * _resident(bucket, is_busy=activations == "token")
    splits = min(at_once // ceil_div(hidden, down.rows), ceil_div(width, down.depth) // MIN_STEPS)
    return Config(
        tokens=bucket,
        norm=norm,
        gate_up=gate_up,
        programs=ceil_div(tiles, each),
        down=down,
        splits=max(1, splits, fewest_splits(width, down.depth, weights, activations)),
    )


def gate_up_by_rule(
    bucket: int,
    weights: str,
    activations: str,
    norm: Norm = "before",
    width: int | None = None,
    multiprocessors: int = MULTIPROCESSORS,
) -> Tiling:
    """The tiling of `gate_up`; for a very wide FFN if no width is given."""
    rows = 64 if bucket == 16 else 128
    resident = _resident(bucket, is_busy=_is_gate_up_busy(bucket, weights, activations, norm))
    if width is not None:
        least = 32 if norm == "before" else 2 * bucket  # with the norm inside, each tile costs one of x
        while rows > least and ceil_div(width, rows) < multiprocessors:
            rows //= 2
        resident = min(resident, ceil_div(ceil_div(width, rows), multiprocessors))
    x_bytes = 2 if norm == "inside" or activations == "none" else ITEMSIZE[weights]
    codes_bytes = bucket * 128 if norm == "inside" else 0
    widens = _is_widened(weights, activations)
    tiling = _tiling(bucket, rows, 2 * rows, weights, x_bytes, resident, codes_bytes, widens=widens)
    # With the norm inside, 64 tokens leave no registers for the addresses of more copies.
    return replace(tiling, stages=min(tiling.stages, 3)) if norm == "inside" and bucket == 64 else tiling


def norm_depth(bucket: int, warps: int) -> int:
    """Columns of x that a program of `gate_up` holds at a time for the norm: at most 64 elements per thread."""
    return min(8192, 64 * 32 * warps) // bucket


def down_by_rule(bucket: int, weights: str, activations: str) -> Tiling:
    """The tiling of `down`; it depends on neither hidden nor width."""
    is_busy = activations == "token"
    rows = 256 if is_busy and bucket > 16 else 128
    inner_bytes = ITEMSIZE[weights] if activations == "static" else 2
    codes_bytes = bucket * 128 if is_busy else 0
    resident, widens = _resident(bucket, is_busy=is_busy), _is_widened(weights, activations)
    return _tiling(bucket, rows, rows, weights, inner_bytes, resident, codes_bytes, widens=widens)


def norm_by_rule(hidden: int) -> Tiling:
    """The tiling of `norm`: one token, 32 elements per thread, at most 16 warps."""
    depth = 1 << max(12, (hidden - 1).bit_length())
    return Tiling(1, depth, min(16, depth // 1024), 1)


def _tiling(
    bucket: int,
    rows: int,
    weight_rows: int,
    weights: str,
    activation_bytes: int,
    resident: int,
    codes_bytes: int,
    *,
    widens: bool,
) -> Tiling:
    """`codes_bytes` are those of activations that are rounded on their way to the tensor cores."""
    depth = 128 // ITEMSIZE[weights]
    step_bytes = (weight_rows * ITEMSIZE[weights] + bucket * activation_bytes) * depth
    fitting = (SHARED_BYTES // resident - RESERVED_BYTES - codes_bytes) // step_bytes
    wanted = 1 + ceil_div(FLIGHT_BYTES // resident, step_bytes)
    warps = 8 if weight_rows >= 128 and weight_rows * bucket >= 128 * 32 else 4
    if widens and bucket == 16:
        warps, fitting = 2, fitting + 1  # what mma.sync reads is in registers: one stage needs no shared memory
    registers = REGISTERS // (32 * warps * resident) // 8 * 8
    stages = min(MOST_STAGES, wanted, fitting)
    # Without a limit the assembler takes 168 registers for two warps, and spills.
    limit = min(registers, MOST_REGISTERS) if warps == 2 or registers <= MOST_REGISTERS else None
    return Tiling(rows, depth, warps, stages, limit)


def _resident(bucket: int, *, is_busy: bool) -> int:
    """Programs that a multiprocessor can have at a time; busy ones need more registers and shared memory."""
    return {16: 2, 32: 1, 64: 1}[bucket] if is_busy else {16: 3, 32: 2, 64: 1}[bucket]


def _is_gate_up_busy(bucket: int, weights: str, activations: str, norm: Norm) -> bool:
    """Whether it does more than to feed the tensor cores: norms and rounds x, widens weights, keeps largest values."""
    return norm == "inside" or activations == "token" or (_is_widened(weights, activations) and bucket > 16)


def _is_widened(weights: str, activations: str) -> bool:
    """Whether 8-bit codes of weights become bfloat16 on their way to the tensor cores."""
    return weights != "bfloat16" and activations == "none"


def fewest_splits(width: int, depth: int, weights: str, activations: str) -> int:
    """How many parts a sum of int8 products must at least be cut into to fit in 32 bits; 1 for other formats."""
    if weights != "int8" or activations == "none":
        return 1
    return ceil_div(ceil_div(width, depth), LONGEST_INT8_SUM // depth)


@cache
def _measured(arch: str) -> dict[tuple[int, int, int, str, str], dict[Config, float]]:
    """Configurations that the tuner has left for an architecture and their microseconds, by call."""
    file = FOLDER / f"{arch}.json"
    document = json.loads(file.read_text())
    if document.get("schema") != SCHEMA:
        raise EngineError("unknown schema of kernel configurations", file=file, expected=SCHEMA)
    found: dict[tuple[int, int, int, str, str], dict[Config, float]] = {}
    for row in document["measured"]:
        call = (row["tokens"], row["hidden"], row["width"], row["weights"], row["activations"])
        found.setdefault(call, {})[_config(row)] = row["measured"]["us"]
    return found


def read_again() -> None:
    """Have `config_for` look at the files again, after this process has changed one."""
    _measured.cache_clear()


def _config(row: dict[str, Any]) -> Config:
    return Config(
        tokens=row["tokens"],
        norm=row["norm"],
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
