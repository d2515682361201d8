"""Other people's programs, and what they start."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO


def run_program(
    command: Sequence[str],
    *,
    stdout: int | IO[str],
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """`subprocess.run`, but if it is interrupted, all that the program has started is ended with it.

    Compilers and workers that their parent's end does not reach would go on, in folders that are gone.

    Raises:
        OSError: the program does not start.
    """
    # A session of its own: Ctrl-C comes to us alone, and one signal reaches all of it.
    with subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env, start_new_session=True) as process:
        try:
            printed, _ = process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, printed)
