"""What machine this is, as far as timings depend on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

SYSTEM_CPUS = Path("/sys/devices/system/cpu")


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
