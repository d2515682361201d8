"""What a command shows while it works and when it is done: progress bars, notes, what was written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

WIDE = 140  # characters of a table that is piped somewhere
LINES = 20  # of progress that is piped somewhere


def wide_console() -> Any:
    """A terminal as wide as it is; where there is none, wide enough for our tables. Shows labels as they are."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDE, markup=False, emoji=False)


def note_printer(quiet: bool) -> Callable[[str], None]:
    """What people should know and no other program reads."""
    return lambda text: None if quiet else click.echo(f"note: {text}", err=True)


def say_written(quiet: bool, what: Path) -> None:
    """The closing words of a command."""
    if not quiet:
        click.echo(f"wrote {what}")


@contextmanager
def _byte_progress(quiet: bool, text: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A progress bar that is advanced by bytes; nothing where nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def _print_progress(done: int, total: int, text: str) -> None:
    if done * LINES // total > (done - 1) * LINES // total:
        click.echo(f"{done}/{total}  {text}", err=True)


@contextmanager
def resumable(goes_on: bool = True) -> Iterator[None]:
    """Work that Ctrl-C only puts off: says so, where the same command goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        if goes_on:
            click.echo("\ninterrupted: the same command goes on from here", err=True)
        raise


@contextmanager
def step_progress(
    quiet: bool, *, ticks: bool = True, lines: bool = False
) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar that is told (done, total, what comes next); nothing where there is no terminal.

    Args:
        ticks: whether its clock runs in between, for which a thread of ours draws ten times a second.
        lines: where there is no terminal, print about `LINES` lines instead.
    """
    if quiet or not sys.stderr.isatty():
        yield _print_progress if lines and not quiet else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=ticks) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text, refresh=True)


def carry_out(writing: Any, dry_run: bool, quiet: bool) -> None:
    """Save what was prepared (an `exporter.pipeline.Writing`), or list its files."""
    from exporter.pipeline import save

    if dry_run:
        for name, size in writing.plan.items():
            click.echo(f"{size:>16,}  {name}")
        click.echo(f"{writing.total_bytes:>16,}  bytes in all; nothing was written")
        return
    with _byte_progress(quiet, f"writing {writing.output}", writing.total_bytes) as progress:
        save(writing, progress)
    say_written(quiet, writing.output)
