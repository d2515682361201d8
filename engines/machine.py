"""What machine this is, as far as timings depend on it."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from pathlib import Path

SYSTEM_CPUS = Path("/sys/devices/system/cpu")
# What `gpus_now` calls it -> what nvidia-smi does (`nvidia-smi --help-query-gpu`).
GPU_TEXTS = {"name": "name", "driver": "driver_version"}
GPU_NUMBERS = {
    "sm_clock_mhz": "clocks.current.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.current.memory",
    "power_limit_w": "power.limit",
}
NVIDIA_SMI_S = 20.0  # without a persistent driver it loads the driver first


def cpu_name() -> str:
    """Return the CPU's name as the system gives it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpus_for(threads: int | None) -> list[int] | None:
    """Return the CPUs to pin a benchmark of so many threads to, of those this process may use; None: all of them.

    The first CPU of every core comes before the second of any: two threads on one core are half as fast.

    None where the system cannot pin.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    cores = [_core_of(cpu) for cpu in usable]
    turns = [cores[:index].count(core) for index, core in enumerate(cores)]  # how many of its core came before
    return sorted(cpu for _, cpu in sorted(zip(turns, usable, strict=True))[:threads])


def _core_of(cpu: int) -> str:
    """What all CPUs of one core have in common: the list of them; the number alone where the system does not tell."""
    siblings = SYSTEM_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    return siblings.read_text() if siblings.exists() else str(cpu)


def gpus_now() -> list[dict[str, str | float | None]]:
    """Return what nvidia-smi says of every NVIDIA GPU at this moment: its name, driver, clocks and power limit.

    None is what it does not tell; empty where there is no such program, or it fails.
    """
    fields = ",".join((GPU_TEXTS | GPU_NUMBERS).values())
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=NVIDIA_SMI_S
        )
    except (OSError, subprocess.SubprocessError):
        return []
    lines = csv.reader(done.stdout.splitlines(), skipinitialspace=True) if done.returncode == 0 else ()
    return [_gpu(line) for line in lines if len(line) == len(GPU_TEXTS | GPU_NUMBERS)]


def _gpu(line: list[str]) -> dict[str, str | float | None]:
    told = dict(zip(GPU_TEXTS | GPU_NUMBERS, line, strict=True))
    return {name: _number(text) if name in GPU_NUMBERS else text for name, text in told.items()}


def _number(text: str) -> float | None:
    """Of "[N/A]" and the like, None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < 1e6 else None


def version_numbers(text: str) -> tuple[int, ...]:
    """ "1.32.0" -> (1, 32, 0); a suffix such as "rc1" or "+cpu" ends the number it is on."""
    numbers = []
    for part in text.split(".")[:3]:
        digits = ""
        for character in part:
            if not character.isdigit():
                break
            digits += character
        numbers.append(int(digits or 0))
    return tuple(numbers)
