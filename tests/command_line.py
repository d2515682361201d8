"""`build.py` as a user calls it, in this process."""

from __future__ import annotations

import signal

from click.testing import CliRunner, Result

import build


def call(*arguments: object) -> Result:
    return CliRunner().invoke(build.main, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def interrupt(*arguments: object, **options: object) -> None:
    """Stand in for work that the user stops."""
    signal.raise_signal(signal.SIGINT)
