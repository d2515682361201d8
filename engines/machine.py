"""What machine this is, as far as timings depend on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_name() -> str:
    """Return the CPU's name as the system gives it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpus_for(threads: int | None) -> list[int] | None:
    """Return the CPUs to pin a benchmark of so many threads to: the first ones this process may use, or all of them.

    None where the system cannot pin.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    return sorted(os.sched_getaffinity(0))[:threads]


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
