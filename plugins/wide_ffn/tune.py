"""Measuring block sizes on a GPU, for one FFN:

    python -m plugins.wide_ffn.tune --hidden 16384 --width 53248 --weights float8_e4m3fn --activations static

Tilings that the assembler fits into a multiprocessor without spills are timed: first those of `gate_up` beside the
rule's `down`, then those of `down` beside the best `gate_up`. A time is that of the whole op in a CUDA graph, over
weights that take turns, so that none is still in the L2 cache when it is read again; the median of many replays. The
best configuration goes to `configs/sm_90.json`, beside it its time, that of the rule and that of the library. Needs
torch and triton alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from exporter.errors import FuselageError, TargetError
from plugins.wide_ffn.aot import CompiledKernel, Variant, compile_variants
from plugins.wide_ffn.configs import (
    BUCKETS,
    FOLDER,
    ITEMSIZE,
    SCHEMA,
    Config,
    Tiling,
    bucket_of,
    ceil_div,
    config_by_rule,
    fewest_splits,
    row_of,
)

SHARED_BYTES = 227 << 10  # of one program on compute capability 9.0
REGISTERS = 1 << 16  # of a multiprocessor
COLD_BYTES = 512 << 20  # of weights that take turns: several times the L2 cache
TOLERANCE = 1e-2  # between two configurations: sums in another order
PROGRAMS = (1, 2, 3)  # of `gate_up` per multiprocessor
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class Problem:
    """An FFN and a number of tokens."""

    tokens: int
    hidden: int
    width: int
    weights: str
    activations: str

    @property
    def weight_bytes(self) -> int:
        """What has to be read once: the floor of the time is this over the bandwidth of the memory."""
        return 3 * self.hidden * self.width * ITEMSIZE[self.weights]

    def arguments(self, device: torch.device) -> list[Any]:
        """Random tensors, in the op's order."""

        def weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            dtype = getattr(torch, self.weights)
            if dtype == torch.int8:
                codes = torch.randint(-127, 128, (rows, columns), dtype=dtype, device=device)
                return codes, torch.full([rows], columns**-0.5 / 64, device=device)
            values = torch.randn(rows, columns, dtype=torch.bfloat16, device=device)
            if dtype == torch.float8_e4m3fn:
                return values.to(dtype), torch.full([1], columns**-0.5, device=device)
            return values.mul_(columns**-0.5), None

        x = torch.randn(self.tokens, self.hidden, dtype=torch.bfloat16, device=device)
        norm_weight = torch.ones(self.hidden, dtype=torch.bfloat16, device=device)
        shapes = [(self.width, self.hidden)] * 2 + [(self.hidden, self.width)]
        weights, scales = zip(*(weight(*shape) for shape in shapes), strict=True)
        static = torch.full([1], 1 / 64, device=device) if self.activations == "static" else None
        return [x, norm_weight, *weights, *scales, static, static, torch.randn_like(x), 1e-5, self.activations]


def tilings(weights: str) -> list[Tiling]:
    """All that are worth compiling: whole warp groups, 64 to 256 bytes of a row at a time (FP8: 128, for its sums)."""
    most = 128 if weights == "float8_e4m3fn" else 256
    return [
        Tiling(rows, depth_bytes // ITEMSIZE[weights], warps, stages)
        for rows, depth_bytes, warps, stages in product((64, 128), (64, 128, 256), (4, 8), (3, 4, 5, 6))
        if rows >= 16 * warps and depth_bytes <= most
    ]


def variants_of(problem: Problem, kernel: Any) -> list[Variant]:
    """Each tiling of a kernel, to be compiled."""
    scale = {"bfloat16": "none", "float8_e4m3fn": "tensor", "int8": "row"}[problem.weights]
    common: dict[str, Any] = {"weights": problem.weights, "activations": problem.activations, "scale": scale}
    return [
        Variant(kernel=kernel, tokens=bucket_of(problem.tokens), tiling=tiling, fit=fit_of(problem, tiling), **common)
        for tiling in tilings(problem.weights)
    ]


def fit_of(problem: Problem, tiling: Tiling) -> Any:
    """What a compiler may take for granted about the sizes."""
    if any(size % 16 for size in (problem.hidden, problem.width)):
        return "any"
    return "even" if not any(size % tiling.depth for size in (problem.hidden, problem.width)) else "aligned"


def is_fit(kernel: CompiledKernel) -> bool:
    """Whether a kernel runs at all, and without spills."""
    return (
        kernel.spill_bytes == 0
        and kernel.shared_bytes <= SHARED_BYTES
        and kernel.registers * 32 * kernel.warps <= REGISTERS
    )


def candidates(
    problem: Problem, kernel: str, base: Config, kept: Sequence[Tiling], multiprocessors: int
) -> Iterator[Config]:
    """Configurations that differ from `base` in one kernel."""
    for tiling in kept:
        if kernel == "gate_up":
            tiles = ceil_div(problem.width, tiling.rows)
            for programs in sorted({min(tiles, several * multiprocessors) for several in PROGRAMS}):
                yield replace(base, gate_up=tiling, programs=programs)
        else:
            fewest = fewest_splits(problem.width, tiling.depth, problem.weights, problem.activations)
            most = ceil_div(problem.width, tiling.depth)
            for splits in sorted({fewest, *(splits for splits in SPLITS if fewest <= splits <= most)}):
                yield replace(base, down=tiling, splits=splits)


def tune(problem: Problem, *, replays: int = 20, workers: int | None = None) -> dict[str, Any]:
    """The best configuration of a problem on this machine's GPU, as a row of `configs/*.json`.

    Raises:
        TargetError: the GPU is not of compute capability 9.0, or a configuration computes something else.
    """
    from plugins.wide_ffn.launch import wide_ffn_by_kernels
    from plugins.wide_ffn.library import wide_ffn_by_library

    device = device_or_refuse()
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    several = ceil_div(COLD_BYTES, problem.weight_bytes) + 1
    calls = [problem.arguments(device) for _ in range(several)]
    sizes = (bucket_of(problem.tokens), problem.hidden, problem.width, problem.weights, problem.activations)
    rule = config_by_rule(*sizes, multiprocessors)
    expected = wide_ffn_by_kernels(*calls[0], config=rule).to(torch.float32)

    def time_us(config: Config) -> float:
        found = wide_ffn_by_kernels(*calls[0], config=config).to(torch.float32)
        error = float((found - expected).norm() / expected.norm())
        if not error < TOLERANCE:  # also where it is NaN
            raise TargetError("a configuration computes something else", expected=f"error < {TOLERANCE}", found=config)
        return graph_us([partial(wide_ffn_by_kernels, *call, config=config) for call in calls], replays)

    best, times = rule, {rule: time_us(rule)}
    for kernel in ("gate_up", "down"):
        compiled = compile_variants(variants_of(problem, kernel), workers=workers)
        kept = [one.variant.tiling for one in compiled if is_fit(one)]
        for config in list(candidates(problem, kernel, best, kept, multiprocessors)):
            if config not in times:
                times[config] = time_us(config)
        best = min(times, key=lambda config: times[config])
    measured = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "us": times[best],
        "rule_us": times[rule],
        "library_us": graph_us([partial(wide_ffn_by_library, *call) for call in calls], replays),
        "weight_bytes": problem.weight_bytes,
        "configurations": len(times),
    }
    return row_of(best, problem.hidden, problem.width, problem.weights, problem.activations) | {"measured": measured}


def graph_us(calls: Sequence[Callable[[], Any]], replays: int) -> float:
    """Microseconds of one call: the median over replays of a graph with all of them."""
    for call in calls:
        call()  # compiled and loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / len(calls))
    return statistics.median(times[3:])


def device_or_refuse() -> torch.device:
    """The current GPU.

    Raises:
        TargetError: there is none, or the kernels are not compiled for it.
    """
    if not torch.cuda.is_available():
        raise TargetError("PyTorch sees no GPU", hint="tuning is measuring: it needs the one that is tuned for")
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        raise TargetError("the wide FFN is tuned for other GPUs", expected="compute capability 9.0", found=capability)
    return torch.device("cuda", torch.cuda.current_device())


def with_rows(document: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The configurations of a file with others, which replace those of the same calls."""

    def call(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("weights", "activations", "hidden", "width", "tokens"))

    merged = {call(row): row for row in [*document["measured"], *rows]}
    return {"schema": SCHEMA, "measured": [merged[key] for key in sorted(merged)]}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as those of `build.py`."""
    parser = argparse.ArgumentParser(prog="python -m plugins.wide_ffn.tune", description="Tune the wide FFN.")
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--weights", choices=list(ITEMSIZE), required=True)
    parser.add_argument("--activations", choices=["none", "static", "token"], default="none")
    parser.add_argument("--tokens", type=int, nargs="+", choices=BUCKETS, default=list(BUCKETS))
    parser.add_argument("--file", type=Path, default=FOLDER / "sm_90.json", help="Configurations, read and rewritten.")
    chosen = parser.parse_args(arguments)
    if chosen.weights == "bfloat16" and chosen.activations != "none":
        parser.error("bfloat16 weights take activations as they come")
    try:
        device_or_refuse()
        for tokens in chosen.tokens:
            problem = Problem(tokens, chosen.hidden, chosen.width, chosen.weights, chosen.activations)
            row = tune(problem)
            document = with_rows(json.loads(chosen.file.read_text()), [row])
            chosen.file.write_text(json.dumps(document, indent=2) + "\n")
            found = row["measured"]
            rate = problem.weight_bytes / found["us"] / 1e6
            print(
                f"{tokens:>3} tokens: {found['us']:.1f} us, {rate:.2f} TB/s of weights; "
                f"rule {found['rule_us']:.1f} us, library {found['library_us']:.1f} us"
            )
    except FuselageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
