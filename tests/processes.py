"""Processes that are to end."""

from __future__ import annotations

import contextlib
import time

import psutil


def assert_ends(pid: int) -> None:
    """Wait until a process is gone. A zombie is: its parent is dead, and who inherits it takes notice when it will."""
    deadline = time.monotonic() + 10  # a signal takes its time
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
