"""What a program has started ends with it, where we are interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from engines.programs import run_program
from tests.processes import assert_ends


def test_a_program_runs_to_its_end() -> None:
    done = run_program(["sh", "-c", "echo $WORD; exit 3"], stdout=subprocess.PIPE, env={"WORD": "spoken"})
    assert (done.stdout, done.returncode) == (b"spoken\n", 3)
    with pytest.raises(FileNotFoundError):
        run_program(["no-such-program"], stdout=subprocess.PIPE)


def test_an_interrupt_ends_all_of_it(tmp_path: Path) -> None:
    child = tmp_path / "child"

    def interrupt() -> None:
        while not (child.exists() and child.read_text().endswith("\n")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_program(["sh", "-c", f"sleep 600 & echo $! > {child}; wait"], stdout=subprocess.PIPE)
    thread.join()
    assert_ends(int(child.read_text()))
