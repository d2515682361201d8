"""Measuring block sizes on a GPU, for one FFN:

    python -m plugins.wide_ffn.tune --hidden 16384 --width 53248 --weights float8_e4m3fn --activations static

First `gate_up` is tuned beside the rule's `down`, then `down` beside the best `gate_up`: tiles, then other depths and
stages of the best tile, then how many programs share the work. Kernels are compiled in all processors at once, into
Triton's cache, where later problems of the same format find them. A time is that of the whole op in a CUDA graph, over
weights that take turns, so that none is still in the L2 cache when it is read again; the median of many replays, and of
what is much slower than the best so far one replay. What does not fit into a multiprocessor is passed over, and what
computes something else is reported. The best configuration goes to `configs/sm_90.json`, beside it its time, that of
the rule and that of the library. Needs torch and triton alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from exporter.errors import FuselageError, TargetError
from plugins.wide_ffn.configs import (
    BUCKETS,
    FOLDER,
    ITEMSIZE,
    MATRICES,
    MOST_REGISTERS,
    SCHEMA,
    SHARED_BYTES,
    Config,
    Norm,
    Tiling,
    bucket_of,
    ceil_div,
    config_by_rule,
    fewest_splits,
    read_again,
    row_of,
)

COLD_BYTES = 512 << 20  # of weights that take turns: several times the L2 cache
TOLERANCE = 1e-2  # between two configurations: sums in another order
SLOW = 1.5  # times the best so far: not worth a second look
KernelName = Literal["gate_up", "down"]
PROGRAMS = (1, 2, 3)  # of `gate_up` per multiprocessor
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
ROWS = (32, 64, 128, 256)
WARPS = (2, 4, 8)
STAGES = (3, 4, 5, 6, 8)


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


def tiles(problem: Problem, kernel: KernelName, base: Tiling) -> list[Tiling]:
    """Every tile of the base's depth that the tensor cores take, in every number of stages that may fit.

    Two warps are half a warp group: Triton then multiplies with mma.sync, which pays where codes become bfloat16.
    """
    bucket = bucket_of(problem.tokens)
    return [
        Tiling(rows, base.depth, warps, stages, MOST_REGISTERS if warps == 2 else None)
        for rows, warps, stages in product(ROWS, WARPS, STAGES[::2])
        if MATRICES[kernel] * rows >= 16 * warps
        and (warps > 2 or (problem.weights != "bfloat16" and problem.activations == "none"))
        and MATRICES[kernel] * rows * bucket <= 128 * 32 * warps  # sums in registers: 128 of each thread
        and _step_bytes(problem, MATRICES[kernel] * rows, base.depth) * stages <= SHARED_BYTES
    ]


def neighbours(problem: Problem, kernel: KernelName, best: Tiling) -> list[Tiling]:
    """The same tile in other numbers of stages, and half or twice as deep; FP8 sums end after 128 products."""
    most = 128 if problem.weights == "float8_e4m3fn" else 256 // ITEMSIZE[problem.weights]
    return [
        replace(best, depth=depth, stages=stages)
        for depth, stages in product((best.depth // 2, best.depth, best.depth * 2), STAGES)
        if 64 // ITEMSIZE[problem.weights] <= depth <= most
        and (depth == best.depth or stages != 3)
        and _step_bytes(problem, MATRICES[kernel] * best.rows, depth) * stages <= SHARED_BYTES
    ]


def _step_bytes(problem: Problem, weight_rows: int, depth: int) -> int:
    """Shared memory of one stage, with activations of one byte: the least it takes."""
    return (weight_rows * ITEMSIZE[problem.weights] + bucket_of(problem.tokens)) * depth


def compilers(workers: int | None = None) -> Executor:
    """Processes for `compile_config`, one per processor if not given; they must not be forked, because of CUDA."""
    return ProcessPoolExecutor(workers, get_context("spawn"))


def compile_config(problem: Problem, config: Config) -> str | None:
    """Compile the kernels of a call into Triton's cache; what the compiler says if it cannot."""
    from triton.errors import TritonError

    from plugins.wide_ffn.launch import wide_ffn_by_kernels

    try:
        wide_ffn_by_kernels(*problem.arguments(torch.device("meta")), config=config)
    except (TritonError, RuntimeError) as error:  # the latter from the passes over Triton's intermediate code
        return f"{type(error).__name__}: {error}"
    return None


def with_tiling(problem: Problem, kernel: KernelName, base: Config, tiling: Tiling, multiprocessors: int) -> Config:
    """The configuration with another tiling of one kernel, of which two programs per multiprocessor share the work."""
    if kernel == "gate_up":
        count = ceil_div(problem.width, tiling.rows)
        return replace(base, gate_up=tiling, programs=ceil_div(count, ceil_div(count, 2 * multiprocessors)))
    at_once = 2 * multiprocessors // ceil_div(problem.hidden, tiling.rows)
    return replace(base, down=tiling, splits=min(max(at_once, _fewest(problem, tiling)), _most(problem, tiling)))


def shares(problem: Problem, kernel: KernelName, best: Config, multiprocessors: int) -> Iterator[Config]:
    """The configuration with other numbers of programs that share one kernel's work."""
    if kernel == "gate_up":
        count = ceil_div(problem.width, best.gate_up.rows)
        rounds = {ceil_div(count, several * multiprocessors) for several in PROGRAMS}
        yield from (replace(best, programs=ceil_div(count, each)) for each in sorted(rounds))
    else:
        fewest, most = _fewest(problem, best.down), _most(problem, best.down)
        yield from (replace(best, splits=splits) for splits in sorted({fewest, *SPLITS}) if fewest <= splits <= most)


def _fewest(problem: Problem, tiling: Tiling) -> int:
    return fewest_splits(problem.width, tiling.depth, problem.weights, problem.activations)


def _most(problem: Problem, tiling: Tiling) -> int:
    return ceil_div(problem.width, tiling.depth)


def tune(problem: Problem, norm: Norm = "before", *, pool: Executor, replays: int = 20) -> dict[str, Any]:
    """The best configuration of a problem on this machine's GPU, as a row of `configs/*.json`.

    Args:
        norm: in a launch before `gate_up`, or in each of its programs.
        pool: of `compilers`.

    Returns:
        The row; in "measured" also the times of the rule and the library, how many configurations were timed, which of
        them computed something else than the rule's ("wrong"), and what the compiler refused ("refused").

    Raises:
        TargetError: the GPU is not of compute capability 9.0, or the rule's result is not a number.
    """
    from triton import __version__ as triton_version
    from triton.runtime.errors import OutOfResources

    from plugins.wide_ffn.launch import wide_ffn_by_kernels
    from plugins.wide_ffn.library import wide_ffn_by_library

    device = device_or_refuse()
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    calls = [problem.arguments(device) for _ in range(max(1, ceil_div(COLD_BYTES, problem.weight_bytes)))]
    sizes = (bucket_of(problem.tokens), problem.hidden, problem.width, problem.weights, problem.activations)
    rule = config_by_rule(*sizes, norm, multiprocessors)
    expected = wide_ffn_by_kernels(*calls[0], config=rule).to(torch.float32)
    times: dict[Config, float] = {}
    wrong: list[Config] = []
    refused: dict[Config, str] = {}

    def time_us(config: Config) -> float:
        try:
            found = wide_ffn_by_kernels(*calls[0], config=config).to(torch.float32)
        except OutOfResources as refusal:
            refused[config] = str(refusal)
            return math.inf
        difference = float((found - expected).norm() / expected.norm())
        if not difference < TOLERANCE:  # also where it is NaN
            wrong.append(config)
            return math.inf
        best = min(times.values(), default=math.inf)
        return graph_us([partial(wide_ffn_by_kernels, *call, config=config) for call in calls], replays, SLOW * best)

    def fastest(configs: Iterable[Config]) -> Config:
        for config in configs:
            if config not in times:
                times[config] = time_us(config)
        return min(times, key=lambda config: times[config])

    def compiled(configs: Sequence[Config]) -> list[Config]:
        said = dict(zip(configs, pool.map(partial(compile_config, problem), configs), strict=True))
        refused.update({config: error for config, error in said.items() if error is not None})
        return [config for config, error in said.items() if error is None]

    best = fastest([rule])
    if times[rule] == math.inf:
        raise TargetError("the rule's block sizes give NaN, and nothing to compare others with", found=rule)
    for kernel in get_args(KernelName):
        for tilings in (tiles, neighbours):
            found = tilings(problem, kernel, _tiling_of(best, kernel))
            best = fastest(compiled([with_tiling(problem, kernel, best, one, multiprocessors) for one in found]))
        best = fastest(shares(problem, kernel, best, multiprocessors))
    library: dict[str, Any]
    try:  # for comparison alone: not worth what was found
        library = {"library_us": graph_us([partial(wide_ffn_by_library, *call) for call in calls], replays)}
    except RuntimeError as error:
        library = {"library_us": None, "library_error": str(error)}
    measured = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "us": times[best],
        "rule_us": times[rule],
        **library,
        "weight_bytes": problem.weight_bytes,
        "configurations": sum(time < math.inf for time in times.values()),
        "wrong": [asdict(config) for config in wrong],
        "refused": len(refused),
    }
    return row_of(best, problem.hidden, problem.width, problem.weights, problem.activations) | {"measured": measured}


def _tiling_of(config: Config, kernel: KernelName) -> Tiling:
    return config.gate_up if kernel == "gate_up" else config.down


def graph_us(calls: Sequence[Callable[[], Any]], replays: int, limit: float = math.inf) -> float:
    """Microseconds of one call: the median over replays of a graph with all of them.

    Args:
        limit: the first replay's time is enough where it is longer.
    """
    for call in calls:
        call()  # compiled and loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def times(count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 2)]
        for event in events:  # without a wait between them, which would count a launch of the graph with every replay
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) * 1000 / len(calls) for before, after in pairwise(events[1:])]

    (first,) = times(1)
    return first if first > limit else statistics.median(times(replays))


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
        return tuple(row[name] for name in ("weights", "activations", "hidden", "width", "tokens", "norm"))

    merged = {call(row): row for row in [*document["measured"], *rows]}
    return {"schema": SCHEMA, "measured": [merged[key] for key in sorted(merged)]}


def save_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a file of configurations, or begin one; from then on `config_for` knows them."""
    document = json.loads(file.read_text()) if file.exists() else {"measured": []}
    file.write_text(json.dumps(with_rows(document, rows), indent=2) + "\n")
    read_again()


def line_of(problem: Problem, row: dict[str, Any]) -> str:
    """What was found, in words."""
    found = row["measured"]
    rate = problem.weight_bytes / found["us"] / 1e6
    library = "failed" if found["library_us"] is None else f"{found['library_us']:.1f} us"
    return (
        f"{problem.tokens:>3} tokens: {found['us']:.1f} us, {rate:.2f} TB/s of weights; "
        f"rule {found['rule_us']:.1f} us, library {library}; "
        f"{found['configurations']} configurations, {found['refused']} refused, {len(found['wrong'])} wrong"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as those of `build.py`."""
    parser = argparse.ArgumentParser(prog="python -m plugins.wide_ffn.tune", description="Tune the wide FFN.")
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--weights", choices=list(ITEMSIZE), required=True)
    parser.add_argument("--activations", choices=["none", "static", "token"], default="none")
    parser.add_argument("--tokens", type=int, nargs="+", choices=BUCKETS, default=list(BUCKETS))
    parser.add_argument("--norm", choices=get_args(Norm), default="before", help="A launch of its own, or none.")
    parser.add_argument("--file", type=Path, default=FOLDER / "sm_90.json", help="Configurations, added to or new.")
    chosen = parser.parse_args(arguments)
    if chosen.weights == "bfloat16" and chosen.activations != "none":
        parser.error("bfloat16 weights take activations as they come")
    try:
        device_or_refuse()
        with compilers() as pool:
            for tokens in chosen.tokens:
                problem = Problem(tokens, chosen.hidden, chosen.width, chosen.weights, chosen.activations)
                row = tune(problem, chosen.norm, pool=pool)
                save_rows(chosen.file, [row])
                print(line_of(problem, row))
    except FuselageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
