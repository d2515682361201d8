"""Commands that carry out a recipe."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from commands.options import PATH, quiet_option
from commands.terminal import note_printer, resumable, say_written, step_progress, wide_console

if TYPE_CHECKING:
    from rich.table import Table

    from engines.run import ForeseenStep, ForeseenVariant

DEMO_RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"


@click.command(epilog="Example: python build.py run recipes/demo.yaml -o out/demo")
@click.argument("recipe", type=PATH)
@click.option("-o", "--output", type=PATH, help="Folder of all steps; out/<recipe> if not given.")
@click.option("--dry-run", is_flag=True, help="Check everything, list the steps, write nothing.")
@quiet_option
def run(recipe: Path, output: Path | None, dry_run: bool, quiet: bool) -> None:
    """Carry out a recipe, from the model to the report.

    Steps that are complete are not repeated. A dry run needs neither the weights nor the runtime, so a recipe for a GPU
    can be checked without one.
    """
    output = output or Path("out") / recipe.stem
    if dry_run:
        _foresee(recipe, output, quiet)
    else:
        _run(recipe, output, quiet)


@click.command()
@click.option("-o", "--output", default=Path("out/demo"), show_default=True, type=PATH, help="Folder of all steps.")
@quiet_option
def demo(output: Path, quiet: bool) -> None:
    """Carry out the recipe of the bundled model.

    Baseline, attention dropped, FFNs fused, 8 bits, and what a measured plan gives.
    """
    _run(DEMO_RECIPE, output, quiet)


def _run(recipe_path: Path, output: Path, quiet: bool) -> None:
    from engines.backends import BACKENDS
    from engines.run import run_recipe
    from exporter.recipe import read_recipe

    def notify(step: str, made: bool) -> None:
        if not quiet:
            click.echo(f"{'made' if made else 'kept'}  {step}")

    with resumable(), step_progress(quiet) as progress:
        result = run_recipe(
            read_recipe(recipe_path, BACKENDS), output, notify=notify, progress=progress, note=note_printer(quiet)
        )
    say_written(quiet, result / "report.html" if (result / "report.html").exists() else result)


def _foresee(recipe_path: Path, output: Path, quiet: bool) -> None:
    from engines.backends import BACKENDS
    from engines.run import dry_run_recipe
    from exporter.recipe import read_recipe
    from exporter.writers.files import size_text

    found = dry_run_recipe(read_recipe(recipe_path, BACKENDS), output)
    console = wide_console()
    console.print(_variants_table(found.variants))
    console.print()
    console.print(_steps_table(found.steps))
    for problem in found.missing:
        click.echo(f"note: this machine cannot carry it out: {problem}", err=True)
    if not quiet:
        needed = sum(step.total_bytes or 0 for step in found.steps if not step.is_there)
        place = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
        free = size_text(shutil.disk_usage(place).free)
        unknown = [variant.name for variant in found.variants if variant.structure is None]
        apart = f" without those of {', '.join(unknown)}" if unknown else ""
        sizes = f"; models and networks{apart} would take {size_text(needed)}, engines come on top, {free} are free"
        click.echo(f"nothing was written{sizes if needed else ''}")


def _variants_table(variants: Sequence[ForeseenVariant]) -> Table:
    from rich.table import Table

    from exporter.writers.onnx_quantization import number_format

    table = Table("variant", box=None, pad_edge=False, header_style="dim")
    for header in ("blocks", "sequential sublayers", "parameters"):
        table.add_column(header, justify="right")
    table.add_column("quantized linears")
    table.add_column("engine")
    for variant in variants:
        graph = variant.structure
        form = () if variant.engine is None else (variant.engine.dtype, *variant.engine.plugins)
        engine = " ".join([variant.backend or "none", *form])
        if graph is None:
            table.add_row(variant.name, "", "", "", "its plan is what the analysis will suggest", engine)
        else:
            figures = (len(graph.blocks), graph.sequential_sublayers, graph.num_parameters)
            texts = [f"{figure:,}" for figure in figures]
            table.add_row(variant.name, *texts, number_format(graph) or "none", engine)
    return table


def _steps_table(steps: Sequence[ForeseenStep]) -> Table:
    from rich.table import Table

    table = Table("", "step", box=None, pad_edge=False, header_style="dim")
    table.add_column("bytes", justify="right")
    for step in steps:
        size = "" if step.total_bytes is None else f"{step.total_bytes:,}"
        table.add_row("keep" if step.is_there else "make", step.name, size)
    return table
