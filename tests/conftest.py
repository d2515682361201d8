"""Set-up that every test shares."""

from __future__ import annotations

import os
import signal

import pytest

# In the background of a script SIGINT is ignored, and tests would wait for interrupts that never come.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs are compiled into the run's own folder, once for all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    os.environ["FUSELAGE_CACHE"] = str((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache")
