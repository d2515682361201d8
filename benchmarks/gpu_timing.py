"""Timing on a GPU: recorded graphs, events, the bandwidths to compare with, and results that survive a stop.

Imports PyTorch and NumPy, on a GPU also Triton, nothing else from outside. On a CPU the same functions take the host's
clock, so that a benchmark's logic can be tried; such times say nothing, and are marked.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engines.torch_model import recorded

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("plugins/wide_ffn/*.py", "engines/torch_*.py", "benchmarks/*gpu*.py")

COPY_BYTES = 1 << 30
WARM_S = 0.5  # until the clocks of an idle GPU are up
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


def bandwidths(device: torch.device, nbytes: int = COPY_BYTES) -> dict[str, float]:
    """What large transfers within the device reach, bytes per second: medians, timed as calls of `call_times_us` are.

    "copy_bytes_per_s" counts bytes read and bytes written and is that of the faster of a copy by the driver
    ("memcpy_bytes_per_s") and one by a kernel ("kernel_copy_bytes_per_s"). "read_bytes_per_s" is that of a kernel that
    only reads, as an FFN does with its weights; on a GPU only.
    """
    source = torch.empty(nbytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    began = time.monotonic()
    while device.type == "cuda" and time.monotonic() - began < WARM_S:
        target.copy_(source)
        torch.cuda.synchronize()

    def bytes_per_s(call: Callable[[int], torch.Tensor], moved: int) -> float:
        return moved / (statistics.median(call_times_us(call, 1, device)) / 1e6)

    found = {
        "memcpy_bytes_per_s": bytes_per_s(lambda _: target.copy_(source), 2 * nbytes),
        "kernel_copy_bytes_per_s": bytes_per_s(lambda _: torch.bitwise_not(source, out=target), 2 * nbytes),
    }
    found["copy_bytes_per_s"] = max(found.values())
    if device.type == "cuda":
        from gpu_read import read_all

        found["read_bytes_per_s"] = bytes_per_s(lambda _: read_all(source), nbytes)
    return found


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU's clocks and state right now; None where there is no nvidia-smi."""
    names = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu", "pstate"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(names, (value.strip() for value in found.split(",")), strict=True))


def sources_sha256() -> str:
    """Over the files that decide what is measured and how; block sizes from a tuner are said with each case."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in ROOT.glob(pattern)):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


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
        "sources_sha256": sources_sha256(),
        "clock": "CUDA events" if device.type == "cuda" else "time.perf_counter",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            **bandwidths(device),
            "nvidia_smi": clocks(),  # just after a load
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

    def __init__(self, minutes: float, shares: Mapping[str, float]) -> None:
        self._began = time.monotonic()
        ends = itertools.accumulate(shares.values())
        self._ends = {part: 60 * minutes * end / sum(shares.values()) for part, end in zip(shares, ends, strict=True)}

    def is_spent(self, part: str) -> bool:
        return time.monotonic() - self._began >= self._ends[part]
