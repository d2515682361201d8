"""Commands that carry out a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import PATH, quiet_option
from commands.terminal import note_printer, resumable, say_written, step_progress

DEMO_RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"


@click.command(epilog="Example: python build.py run recipes/demo.yaml -o out/demo")
@click.argument("recipe", type=PATH)
@click.option("-o", "--output", type=PATH, help="Folder of all steps; out/<recipe> if not given.")
@quiet_option
def run(recipe: Path, output: Path | None, quiet: bool) -> None:
    """Carry out a recipe; steps that are complete are not repeated."""
    _run(recipe, output or Path("out") / recipe.stem, quiet)


@click.command()
@click.option("-o", "--output", default=Path("out/demo"), show_default=True, type=PATH, help="Folder of all steps.")
@quiet_option
def demo(output: Path, quiet: bool) -> None:
    """Run the recipe of the bundled model: baseline, attention dropped, FFNs fused, and what a measured plan gives."""
    _run(DEMO_RECIPE, output, quiet)


def _run(recipe_path: Path, output: Path, quiet: bool) -> None:
    from engines.run import run_recipe
    from exporter.recipe import read_recipe

    def notify(step: str, made: bool) -> None:
        if not quiet:
            click.echo(f"{'made' if made else 'kept'}  {step}")

    with resumable(), step_progress(quiet) as progress:
        result = run_recipe(
            read_recipe(recipe_path), output, notify=notify, progress=progress, note=note_printer(quiet)
        )
    say_written(quiet, result / "report.html" if (result / "report.html").exists() else result)
