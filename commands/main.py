"""The command line: which commands there are, and exit codes.

Exit codes: 0 done; 1 a bug (with its traceback); 2 bad input, a refused request, or something missing on this machine;
3 a regression (`report --compare --fail-on-regression`).
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Any

import click

from commands import models, networks, recipes, studies, timing
from exporter.errors import FuselageError


class Commands(click.Group):
    """Turns our errors, and those of standard output, into one line and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # an encoding without our characters, of rules or of "×", has "?"
        try:
            return super().main(*args, **kwargs)
        except OSError:
            reason = _refusal_of_stdout()
            if reason is None:
                raise
            click.echo(f"error: standard output cannot be written ({reason})", err=True)
            sys.exit(2)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FuselageError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)


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
