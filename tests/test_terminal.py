"""What a terminal shows of labels and paths that `rich` would take for its markup."""

from __future__ import annotations

import io
import sys
from contextlib import AbstractContextManager

import pytest
from rich.table import Table

from commands import terminal

TEXT = "[bold]a[/b] {b} :rocket:"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_tables_show_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("engine")
    table.add_row(TEXT)
    terminal.wide_console().print(table)
    assert TEXT in capsys.readouterr().out


@pytest.mark.parametrize(
    ("progress", "done"),
    [(terminal.step_progress(False), (1, 2, TEXT)), (terminal._byte_progress(False, TEXT, 2), (1,))],
    ids=["steps", "bytes"],
)
def test_progress_shows_text_as_it_is(
    progress: AbstractContextManager, done: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    with progress as report:
        report(*done)
    assert TEXT in sys.stderr.getvalue()  # type: ignore[attr-defined]
