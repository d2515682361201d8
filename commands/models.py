"""Commands on a model folder: look at it, transform it, quantize it, train it."""

from __future__ import annotations

import json
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import click

from commands.help import SectionedCommand
from commands.options import (
    PATH,
    Real,
    blocks_from_text,
    context_option,
    device_option,
    dry_run_option,
    force_option,
    model_argument,
    norm_option,
    open_planned,
    output_option,
    plan_option,
    quiet_option,
    readers_option,
    refuse_given,
    shard_size_option,
    text_option,
)
from commands.terminal import carry_out, resumable, say_written, step_progress, wide_console


@click.command(epilog="Example: python build.py inspect models/Llama-3.1-8B")
@model_argument
@click.option("--json", "as_json", is_flag=True, help="The structure as JSON.")
def inspect(model: Path, as_json: bool) -> None:
    """Show a model's structure.

    Parameters, KV cache, sequential sublayers, every block.
    """
    from exporter.graph import structure
    from exporter.read import open_model
    from exporter.summary import summary

    graph = open_model(model, need_weights=False).graph
    if as_json:
        click.echo(json.dumps(structure(graph), indent=2))
    else:
        wide_console().print(summary(graph))


@click.command(epilog="Example: python build.py transform models/Llama-3.1-8B --plan plan.yaml -o out/8b-fused")
@model_argument
@plan_option
@norm_option
@output_option
@shard_size_option
@readers_option
@dry_run_option
@force_option
@quiet_option
def transform(
    model: Path,
    plan_path: Path | None,
    norm: Any,
    output: Path,
    shard_bytes: int,
    readers: tuple[str, ...],
    dry_run: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Apply a plan and write a Hugging Face folder."""
    from exporter.pipeline import checkpoint_writing
    from exporter.summary import change_text

    checkpoint, graph = open_planned(model, plan_path, norm, need_weights=not dry_run)
    writing = checkpoint_writing(
        checkpoint,
        graph,
        output,
        readers=readers,
        shard_bytes=shard_bytes,
        details={"plan": str(plan_path) if plan_path else None, "norm": norm},
        force=force,
    )
    if plan_path is not None and not quiet:
        click.echo(change_text(checkpoint.graph, graph))
    carry_out(writing, dry_run, quiet)


@click.command(
    cls=SectionedCommand,
    sections={
        "Model": ("plan_path", "norm"),
        "Format": ("format_name", "kv_cache", "exclude", "layout"),
        "Calibration": (
            *("text", "context", "max_windows", "percentile"),
            *("calibration", "save_calibration", "device", "resume"),
        ),
    },
    epilog="Example: python build.py quantize models/Llama-3.1-8B --format fp8 --text calibration.txt -o out/8b-fp8",
)
@model_argument
@plan_option
@norm_option
@click.option(
    "--format", "format_name", required=True, help="fp8, int8-smoothquant, ... (see above), or a recipe file."
)
@click.option("--text", type=PATH, help="Text to calibrate on: a file, or .jsonl.")
@context_option
@click.option("--calibration", type=PATH, help="Use a calibration of MODEL that was kept.")
@click.option("--save-calibration", type=PATH, help="Keep the calibration in this folder.")
@click.option(
    "--percentile",
    type=Real(50, 100),
    help="Clip activations at this percentile, e.g. 99.9; nowhere if not given.",
)
@click.option("--kv-cache", type=click.Choice(["fp8"]), help="Also quantize the KV cache.")  # no folder says INT8
@click.option("--exclude", multiple=True, help="Leave linears alone, e.g. 'blocks.0.*'. Repeat it for more.")
@click.option(
    "--layout",
    type=click.Choice(["modelopt", "compressed-tensors"]),
    help="Of the folder; the one that readers of the format take if not given.",
)
@click.option("--report", "report_path", type=PATH, help="Folder to write the error of every linear to.")
@shard_size_option
@readers_option
@device_option
@click.option(
    "--resume",
    type=PATH,
    help="Folder to save the calibration's work in; the same command goes on from there when killed.",
)
@output_option
@dry_run_option
@force_option
@quiet_option
def quantize(
    model: Path,
    plan_path: Path | None,
    norm: Any,
    format_name: str,
    text: Path | None,
    context: int,
    max_windows: int | None,
    calibration: Path | None,
    save_calibration: Path | None,
    percentile: float | None,
    kv_cache: str | None,
    exclude: tuple[str, ...],
    layout: str | None,
    report_path: Path | None,
    shard_bytes: int,
    readers: tuple[str, ...],
    device: str,
    resume: Path | None,
    output: Path,
    dry_run: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Quantize to FP8 or INT8 and write a Hugging Face folder.

    Formats are the recipes in recipes/quantization: fp8, fp8-rowwise, int8-smoothquant, int8-smoothquant-token,
    int8-weight-only. Those with static scales or smoothing calibrate on a text, or use a calibration that was kept.
    """
    from exporter.calibration import calibrate, calibration_files, check_belongs, read_calibration
    from exporter.hidden_states import remove_states
    from exporter.passes.quantize_linears import structure_quantized
    from exporter.pipeline import checkpoint_writing, refuse_overlap
    from exporter.quantization import read_quantization, recipe_with
    from exporter.quantize import error_files, errors_summary, split_windows
    from exporter.quantize import quantize as quantize_graph
    from exporter.text import model_windows
    from exporter.writers.files import refuse_existing, refuse_full_disk, save_folder

    recipe = recipe_with(read_quantization(format_name), kv_cache=kv_cache, exclude=exclude)
    calibrates = recipe.needs_ranges and calibration is None
    if not calibrates:
        refuse_given(("save_calibration", "percentile", "resume"), "calibrating, and nothing is calibrated here")
    for folder in (output, save_calibration, report_path):
        if folder is not None and not dry_run:
            refuse_existing(folder, force=force)
    written = [folder for folder in (output, save_calibration, report_path, resume) if folder is not None]
    for one, other in combinations(written, 2):
        refuse_overlap(one, other)
    checkpoint, graph = open_planned(model, plan_path, norm, need_weights=not dry_run)
    details = {"plan": str(plan_path) if plan_path else None, "norm": norm, "format": format_name}
    writing_of = partial(
        checkpoint_writing,
        checkpoint,
        output=output,
        readers=readers,
        shard_bytes=shard_bytes,
        layout=layout,
        details=details,
        force=force,
    )
    # What cannot be written is not calibrated. Sizes of files do not depend on ranges.
    prospect = writing_of(structure_quantized(graph, recipe))
    known = None if calibration is None else read_calibration(calibration)
    if known is not None:
        check_belongs(known, graph, checkpoint.graph)
    tokens = aside = None
    if calibrates or recipe.searches_alpha or report_path is not None:
        if text is None:
            raise click.UsageError("this needs a --text: to calibrate on, to choose alpha, or for the --report")
        tokens, aside = split_windows(model_windows(text, checkpoint, context=context, max_windows=max_windows))
    if dry_run:
        carry_out(prospect, dry_run, quiet)
        return
    refuse_full_disk(output, prospect.files.values())

    def save_ranges() -> None:
        if save_calibration is not None and known is not None:
            files = calibration_files(known)
            save_folder(save_calibration, files.items(), kind="calibration", details=details, force=force)
            say_written(quiet, save_calibration)

    with resumable(resume is not None):
        if calibrates and tokens is not None and text is not None:
            with step_progress(quiet, lines=True) as progress:
                known = calibrate(
                    checkpoint.graph,
                    tokens,
                    text=text.name,
                    percentile=percentile,
                    device=device,
                    work=resume,
                    progress=progress
                    and (lambda done, total: progress(done, total, f"calibration on {tokens.size:,} tokens")),
                )
        if resume is None:  # else it is safe there, and the same command would find the folder in its way
            save_ranges()
        with step_progress(quiet, lines=True) as progress:
            found = quantize_graph(
                graph,
                recipe,
                source=checkpoint.graph,
                calibration=known,
                tokens=aside,
                device=device,
                progress=progress,
            )
        carry_out(writing_of(found.graph), dry_run, quiet)
    if resume is not None:
        save_ranges()
    if report_path is not None and aside is not None and text is not None:
        source = f"{format_name}, {model.name}, {aside.size:,} tokens of {text.name}"
        with step_progress(quiet, lines=True) as progress:
            files = error_files(found, graph, aside, source=source, device=device, progress=progress)
        save_folder(report_path, files.items(), kind="quantization", details=details, force=force)
        if not quiet:
            wide_console().print(errors_summary(files))
        say_written(quiet, report_path)
    if resume is not None:
        remove_states(resume)


@click.command(
    cls=SectionedCommand,
    sections={
        "Models": ("teacher", "plan_path", "norm"),
        "Text": ("text", "context", "max_windows"),
        "Training": (
            *("epochs", "steps", "batch", "learning_rate", "warmup", "weight_decay"),
            *("temperature", "hidden_weight", "layers", "seed"),
        ),
        "Machine": ("device", "dtype", "accumulate", "recompute", "save_every", "resume"),
    },
    epilog="Example: python build.py distill models/Llama-3.1-8B --plan plan.yaml --teacher models/Llama-3.1-8B "
    "--text training.jsonl -o out/8b-distilled",
)
@model_argument
@click.option("--teacher", required=True, type=PATH, help="The original model, whose logits are learned.")
@plan_option
@norm_option
@text_option
@context_option
@click.option(
    "--epochs", default=1.0, show_default=True, type=Real(0, 1 << 20, min_open=True), help="Passes over the text."
)
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps, instead of --epochs.")
@click.option(
    "--batch", default=8, show_default=True, type=click.IntRange(1, 1 << 20), help="Windows per step, in all."
)
@click.option(
    "--accumulate",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Pieces that a process takes its windows in: less memory.",
)
@click.option(
    "--lr",
    "learning_rate",
    default=1e-4,
    show_default=True,
    type=Real(0, min_open=True),
    help="Learning rate after the warm-up; a cosine takes it from there to zero.",
)
@click.option("--warmup", type=click.IntRange(0), help="Steps until --lr is reached; one in twenty if not given.")
@click.option("--weight-decay", default=0.0, show_default=True, type=Real(0), help="AdamW's, of matrices.")
@click.option("--temperature", default=1.0, show_default=True, type=Real(1e-3, 1e3), help="Divides all logits.")
@click.option(
    "--hidden-weight",
    default=0.0,
    show_default=True,
    type=Real(0),
    help="Weight of the loss on hidden states.",
)
@click.option("--blocks", "layers", help="Source layers to train, e.g. 8-14,20-22; everything if not given.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="Of products; weights and optimizer state are float32.",
)
@click.option("--recompute", is_flag=True, help="Compute activations again instead of keeping them: less memory.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]), help="Where to train.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the order of the windows.")
@click.option("--save-every", default=100, show_default=True, type=click.IntRange(1), help="Steps between saves.")
@click.option("--resume", type=PATH, help="Folder to save the run in; the same command goes on from there when killed.")
@output_option
@force_option
@quiet_option
def distill(
    model: Path,
    teacher: Path,
    plan_path: Path | None,
    norm: Any,
    text: Path,
    context: int,
    max_windows: int | None,
    epochs: float,
    steps: int | None,
    layers: str | None,
    device: str,
    save_every: int,
    resume: Path | None,
    output: Path,
    force: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Train a transformed model on the original's logits.

    Applies the plan, trains, and writes a Hugging Face folder.

    Several GPUs: torchrun --nproc-per-node 8 build.py distill ... --device cuda --resume DIR
    """
    from exporter.distill import Settings, steps_of
    from exporter.distill import distill as distill_graph
    from exporter.distill_model import joined_processes
    from exporter.distill_state import remove_run
    from exporter.pipeline import checkpoint_writing, distilled_writing, refuse_overlap, source_fingerprint
    from exporter.read import open_model
    from exporter.text import model_windows
    from exporter.writers.files import refuse_full_disk

    checkpoint, graph = open_planned(model, plan_path, norm)
    original = open_model(teacher, need_weights=True)
    for folder in [teacher, *([resume] if resume else [])]:
        refuse_overlap(folder, output)
    prospect = checkpoint_writing(checkpoint, graph, output, details={}, force=force)
    refuse_full_disk(output, prospect.files.values())  # what cannot be written is not trained
    tokens = model_windows(text, checkpoint, original, context=context, max_windows=max_windows)
    settings = Settings(steps=steps or steps_of(epochs, len(tokens), how["batch"]), **how)
    with (
        joined_processes(device) as processes,
        resumable(resume is not None and processes.rank == 0),
        step_progress(quiet or processes.rank > 0, lines=True) as progress,
    ):
        distilled = distill_graph(
            graph,
            original.graph,
            tokens,
            settings,
            blocks=None if layers is None else blocks_from_text(graph, layers),
            processes=processes,
            folder=resume,
            save_every=save_every,
            identity={"model": source_fingerprint(model), "teacher": source_fingerprint(teacher), "norm": norm},
            progress=progress,
        )
    if processes.rank > 0:
        return
    sources = {"model": str(model), "plan": plan_path and str(plan_path), "norm": norm, "teacher": str(teacher)}
    details = {**sources, "text": str(text), "context": context, "blocks": layers}
    writing = distilled_writing(checkpoint, distilled, output, details=details, force=force)
    carry_out(writing, dry_run=False, quiet=quiet)
    if resume is not None:
        remove_run(resume)
