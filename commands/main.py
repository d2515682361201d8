"""The command line: which commands there are, and exit codes.

Exit codes: 0 done; 1 a bug (with its traceback); 2 bad input, a refused request, or something missing on this machine;
3 a regression (`report --compare --fail-on-regression`); 4 ended early, with what there is kept: a benchmark whose
engines were not all timed to the end, an engine whose timings did not get into its cache; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

import click

from commands import models, networks, recipes, studies, timing
from exporter.errors import FuselageError, IncompleteError


class Commands(click.Group):
    """Turns our errors, and those of standard output, into one line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # an encoding without our characters, of rules or of "×", has "?"
        try:
            with _unwinding_when_terminated(), _interrupts() as interrupts:
                try:
                    return super().main(*args, **kwargs)
                except SystemExit as end:  # click's "Aborted!" has the status of a bug
                    sys.exit(130 if interrupts and end.code == 1 else end.code)
                except Exception:
                    if not interrupts:
                        raise
                    click.echo("\nAborted!", err=True)  # an import that was cut short fails with an error of its own
                    sys.exit(130)
        except OSError:
            reason = _refusal_of_stdout()
            if reason is None:
                raise
            click.echo(f"error: standard output cannot be written ({reason})", err=True)
            sys.exit(2)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for argument in args:
            if not _is_text(argument):
                raise click.UsageError(f"{argument!a} is not text in UTF-8; rename the file.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FuselageError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(4 if isinstance(error, IncompleteError) else 2)
        except FileNotFoundError:
            if _is_somewhere():
                raise
            click.echo("error: the folder that this command was started in is gone", err=True)
            ctx.exit(2)


@contextmanager
def _unwinding_when_terminated() -> Iterator[None]:
    """On SIGTERM remove what is half-written, which may be as large as a model; the exit status is a shell's, 143."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Remember whether Ctrl-C came: the KeyboardInterrupt may be lost on its way, or turned into another error."""
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, in the background of a shell
        yield came
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _is_somewhere() -> bool:
    """Whether the current folder is still there, from which relative paths lead."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _is_text(argument: str) -> bool:
    """Whether manifests, reports and runtimes can say it: what no encoding reads comes as surrogates."""
    if not re.search("[\udc80-\udcff]", argument):
        return True
    try:
        os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return False
    return True  # the locale cannot read it, and opens the file all the same


def _refusal_of_stdout() -> str | None:
    """Why standard output does not take what was printed, e.g. a full disk; None if it does."""
    try:
        print(flush=True)  # unbuffered, nothing is left of what could not be written: so one more line
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # else the interpreter tries once more when it exits
        return error.strerror
    return None


@click.group(
    cls=Commands,
    commands=[
        models.inspect,
        models.transform,
        models.quantize,
        models.distill,
        networks.export,
        networks.check,
        networks.engine,
        networks.plugin,
        timing.bench,
        timing.import_bench,
        timing.report,
        studies.analyze,
        studies.evaluate,
        studies.predict,
        recipes.run,
        recipes.demo,
    ],
    epilog="In order of use: inspect, analyze, transform, export, engine, bench, report; `demo` does all of it.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="fuselage")
def main() -> None:
    """FFN Fusion for Llama-family models: from a Hugging Face folder to a measured engine.

    MODEL is a folder with config.json and safetensors files; where no weights are needed, a config.json or a
    *.structure.json will do.
    """
