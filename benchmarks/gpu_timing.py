"""Timing on a GPU: recorded graphs, events, the copy bandwidth to compare with, and results that survive a stop.

Imports PyTorch and NumPy, nothing else from outside. On a CPU the same functions take the host's clock, so that a
benchmark's logic can be tried; such times say nothing, and are marked.
"""

from __future__ import annotations

import datetime
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from engines.torch_model import recorded

COPY_BYTES = 1 << 30
L2_COLD = 4  # weights that take turns are so many times the L2 cache
MIN_REPEATS, MAX_REPEATS, REPEAT_S = 10, 60, 0.3


def call_times_us(call: Callable[[int], torch.Tensor], sets: int, device: torch.device) -> list[float]:
    """Microseconds of one call, one number per repetition.

    Args:
        call: works on weight set i of `sets`; on a GPU several calls in turn are one CUDA graph, and a repetition is a
            replay of it.
    """
    turns = [index % sets for index in range(sets * max(1, -(-8 // sets)))]

    def all_calls() -> torch.Tensor:
        for index in turns:
            output = call(index)
        return output

    if device.type != "cuda":
        return [total / len(turns) for total in times_us(all_calls, 2, device)]
    run = recorded(all_calls)
    first = times_us(run, 2, device)[-1]
    repeats = min(MAX_REPEATS, max(MIN_REPEATS, int(REPEAT_S * 1e6 / first)))
    return [total / len(turns) for total in times_us(run, repeats, device)]


def times_us(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Microseconds of `run`, on the device's own clock if it is a GPU."""
    if device.type != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(repeats):
            run()
            stamps.append(time.perf_counter())
        return [1e6 * (after - before) for before, after in itertools.pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def copy_bytes_per_s(device: torch.device, nbytes: int = COPY_BYTES) -> float:
    """Bytes read and bytes written per second of a large copy within the device, median of 20."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * nbytes / (statistics.median(times_us(lambda: target.copy_(source), 20, device)) / 1e6)


def sets_for(nbytes: int, device: torch.device) -> int:
    """How many sets of so many bytes must take turns for none of them to be in the L2 cache."""
    if device.type != "cuda":
        return 2
    return max(1, -(-L2_COLD * torch.cuda.get_device_properties(device).L2_cache_size // nbytes))


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, its software and how it is used."""
    found: dict[str, Any] = {
        "device": "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.orig_argv,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "copy_bytes_per_s": copy_bytes_per_s(device),
        }
        try:
            import triton

            found["triton"] = triton.__version__
        except ImportError:
            found["triton"] = None
    return found


class Log:
    """A file of JSON lines: one for each session, and one for each case as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def records(self) -> Iterator[dict[str, Any]]:
        """Everything so far; a line that a killed run left unfinished is passed over, and measured again."""
        if not self._path.exists():
            return
        for line in self._path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, on a line of its own even after an unfinished one."""
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")


class Budget:
    """A time limit that parts share: each may use its share of it, and what earlier parts left."""

    def __init__(self, minutes: float, shares: Sequence[float]) -> None:
        self._began = time.monotonic()
        self._ends = [60 * minutes * sum(shares[: part + 1]) / sum(shares) for part in range(len(shares))]

    def is_spent(self, part: int) -> bool:
        return time.monotonic() - self._began >= self._ends[part]
