"""The machine that a benchmark runs on: which of its CPUs are taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engines import machine
from engines.machine import cpus_for

# For each CPU the CPUs of its core, as Linux lists them.
APART, SIDE_BY_SIDE = ("0,4", "1,5", "2,6", "3,7") * 2, ("0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7")
ALL = range(8)


@pytest.mark.parametrize(
    ("siblings", "usable", "threads", "taken"),
    [
        (APART, ALL, 2, [0, 1]),
        (APART, ALL, 5, [0, 1, 2, 3, 4]),
        (SIDE_BY_SIDE, ALL, 2, [0, 2]),
        (SIDE_BY_SIDE, ALL, 5, [0, 1, 2, 4, 6]),
        (SIDE_BY_SIDE, [1, 2, 3], 2, [1, 2]),
        (SIDE_BY_SIDE, ALL, None, [*ALL]),
        (SIDE_BY_SIDE, ALL, 99, [*ALL]),
        ((), ALL, 3, [0, 1, 2]),
    ],
)
def test_threads_get_cores_of_their_own(siblings, usable, threads, taken, tmp_path: Path, monkeypatch) -> None:
    for cpu, listed in enumerate(siblings):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{listed}\n")
    monkeypatch.setattr(machine, "SYSTEM_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(usable))
    assert cpus_for(threads) == taken
