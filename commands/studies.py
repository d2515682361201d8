"""Commands that judge a model without an engine: which blocks matter, what a plan costs, what it should gain."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from commands.help import SectionedCommand
from commands.options import (
    BYTES,
    NAMES,
    PATH,
    SIZES,
    Real,
    SizeRange,
    block_range_from_text,
    context_option,
    device_option,
    force_option,
    model_argument,
    norm_option,
    open_planned,
    output_option,
    plan_option,
    quiet_option,
    refuse_given,
    text_option,
)
from commands.terminal import note_printer, resumable, say_written, step_progress, wide_console


@click.command(
    cls=SectionedCommand,
    sections={
        "Text": ("text", "context", "max_windows"),
        "Measurement": ("layers", "kl", "device", "budget_bytes", "resume"),
        "Suggestion": (
            *("drop", "greedy", "parallel", "window", "keep_last"),
            *("max_dependency", "max_width", "max_gib_per_gpu", "tp", "gpu"),
        ),
    },
    epilog="Example: python build.py analyze models/Llama-3.1-8B --text calibration.txt --drop 8 -o out/8b-analysis",
)
@model_argument
@text_option
@context_option
@click.option("--layers", help="Source layers to measure, e.g. 66-115; all if not given.")
@click.option("--kl", is_flag=True, help="Also measure the KL divergence of the logits; drops then go by it.")
@click.option(
    "--drop", default=0, show_default=True, type=click.IntRange(0), help="Suggest so many attentions to drop."
)
@click.option("--greedy", is_flag=True, help="Measure again after each suggested drop: a pass each.")
@click.option(
    "--parallel",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Suggest so many groups of parallel blocks.",
)
@click.option("--window", default=4, show_default=True, type=click.IntRange(2), help="Blocks of a parallel group.")
@click.option("--max-width", type=click.IntRange(1), help="Widest fused FFN to suggest; any if not given.")
@click.option(
    "--max-gib-per-gpu",
    type=Real(0, 1 << 20, min_open=True),
    help="Largest fused FFN to suggest, in GiB of one of --tp GPUs.",
)
@click.option(
    "--tp",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Tensor-parallel size, for --max-gib-per-gpu and --gpu.",
)
@click.option("--gpu", help="Say in the plan what each line is predicted to gain on --tp of these GPUs, e.g. h100-sxm.")
@click.option("--max-dependency", type=Real(min=0), help="Largest dependency in a fused group; any if not given.")
@click.option("--keep-last/--fuse-last", default=True, show_default=True, help="The last FFN of a run stays alone.")
@device_option
@click.option(
    "--memory",
    "budget_bytes",
    default="4GB",
    show_default=True,
    type=BYTES,
    help="Hidden states beyond this go to files.",
)
@click.option("--resume", type=PATH, help="Folder for those files; the same command goes on from there when killed.")
@output_option
@force_option
@quiet_option
def analyze(
    model: Path,
    text: Path,
    context: int,
    max_windows: int | None,
    layers: str | None,
    kl: bool,
    drop: int,
    greedy: bool,
    parallel: int,
    window: int,
    max_width: int | None,
    max_gib_per_gpu: float | None,
    tp: int,
    gpu: str | None,
    max_dependency: float | None,
    keep_last: bool,
    device: str,
    budget_bytes: int,
    resume: Path | None,
    output: Path,
    force: bool,
    quiet: bool,
) -> None:
    """Measure which blocks depend on which, and suggest a plan.

    Writes dependency.json, plan.yaml and pictures. Every block is applied up to three times for each block before it:
    on a CPU take little text.
    """
    from engines.hardware import gpu_named, read_gpus
    from engines.latency_model import Deployment, Tokens, format_of_graph
    from engines.what_if import gain_text
    from exporter.analysis.dependency import measure_dependency
    from exporter.analysis.plan import Constraints
    from exporter.hidden_states import remove_states
    from exporter.pipeline import apply_plan, source_fingerprint
    from exporter.read import open_model
    from exporter.suggest import Wishes, analysis_files, check_wishes, source_text, suggest
    from exporter.summary import change_text
    from exporter.text import model_windows
    from exporter.writers.files import refuse_existing, save_folder

    refuse_existing(output, force=force)
    constraints = Constraints(
        max_width=max_width,
        max_bytes_per_gpu=None if max_gib_per_gpu is None else int(max_gib_per_gpu * 2**30),
        tp_size=tp,
        max_dependency=max_dependency,
        keep_last=keep_last,
    )
    wishes = Wishes(drop=drop, greedy=greedy, parallel=parallel, window=window, constraints=constraints)
    checkpoint = open_model(model, need_weights=True)
    blocks = None if layers is None else block_range_from_text(checkpoint.graph, layers)
    check_wishes(checkpoint.graph, wishes, blocks=blocks)
    gain = None
    if gpu is not None:
        number = format_of_graph(checkpoint.graph)
        placed = Deployment(gpu=gpu_named(gpu, read_gpus()), tp_size=tp, format=number)
        gain = gain_text(checkpoint.graph, placed, Tokens.decode(1, context))
    tokens = model_windows(text, checkpoint, context=context, max_windows=max_windows)
    with resumable(resume is not None), step_progress(quiet, lines=True) as progress:
        dependency = measure_dependency(
            checkpoint.graph,
            tokens,
            blocks=blocks,
            kl=kl,
            device=device,
            budget_bytes=budget_bytes,
            work=resume,
            identity=source_fingerprint(model),
            progress=progress and (lambda done, total: progress(done, total, f"blocks on {tokens.size:,} tokens")),
        )
        suggestion = suggest(
            checkpoint.graph,
            dependency,
            wishes,
            tokens=tokens,
            device=device,
            budget_bytes=budget_bytes,
            progress=progress,
        )
    source = source_text(dependency, text, model)
    files = analysis_files(dependency, suggestion, constraints=constraints, source=source, gain=gain)
    details = {"model": str(model), "text": str(text), "context": context}
    save_folder(output, files, kind="analysis", details=details, force=force)
    if resume is not None:
        remove_states(resume)
    if not quiet:
        click.echo(f"suggested: {change_text(checkpoint.graph, apply_plan(checkpoint.graph, suggestion.plan))}")
    say_written(quiet, output)


@click.command(
    epilog="Example: python build.py evaluate out/8b-fused --reference models/Llama-3.1-8B --text held-out.txt"
)
@model_argument
@click.option("--reference", type=PATH, help="Model to compare with, e.g. the untransformed one.")
@plan_option
@norm_option
@click.option("--text", type=PATH, help='Text file, or .jsonl with a "text" per line.')
@context_option
@click.option(
    "--tasks", default=(), type=NAMES, help="Tasks of lm-evaluation-harness, e.g. hellaswag,arc_easy; not with --plan."
)
@click.option("--include-path", type=PATH, help="Folder of further tasks; their code is run.")
@click.option("--limit", type=click.IntRange(1), help="Samples per task; all if not given.")
@click.option("--trust-remote-code", is_flag=True, help="Tasks may run code that the model folder brings.")
@device_option
@click.option("-o", "--output", type=PATH, help="Also write all figures to this JSON file.")
@force_option
@quiet_option
def evaluate(
    model: Path,
    reference: Path | None,
    plan_path: Path | None,
    norm: Any,
    text: Path | None,
    context: int,
    max_windows: int | None,
    tasks: tuple[str, ...],
    include_path: Path | None,
    limit: int | None,
    trust_remote_code: bool,
    device: str,
    output: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Measure perplexity on a text, or run tasks.

    With a reference also KL divergence from it and top-1 agreement with it.
    """
    from exporter.analysis.tasks import check_tasks
    from exporter.writers.files import json_bytes, refuse_existing_file, save_file

    if text is None and not tasks:
        raise click.UsageError("Give --text, --tasks or both.")
    if text is None:
        refuse_given(("reference", "context", "max_windows"), "a text: give --text")
    if not tasks:
        refuse_given(("include_path", "limit", "trust_remote_code"), "--tasks")
    if tasks and plan_path is not None:
        raise click.UsageError("Tasks are run on a model folder: apply the plan with `transform` first.")
    if output is not None:
        refuse_existing_file(output, force=force)
    options: dict[str, Any] = {"include_path": include_path, "trust_remote_code": trust_remote_code}
    if tasks:
        check_tasks(model, tasks, **options)
    figures: dict[str, Any] = {"model": str(model)}
    if text is not None:
        checkpoint, graph = open_planned(model, plan_path, norm)
        figures |= {"reference": reference and str(reference), "text": str(text), "context": context}
        figures |= _evaluate_text(checkpoint, graph, reference, text, context, max_windows, device, quiet)
    if tasks:
        figures["tasks"] = _evaluate_tasks(model, tasks, limit=limit, device=device, quiet=quiet, **options)
    if output is not None:
        save_file(output, json_bytes(figures), force=force)
        say_written(quiet, output)


def _evaluate_text(
    checkpoint: Any,
    graph: Any,
    reference: Path | None,
    text: Path,
    context: int,
    max_windows: int | None,
    device: str,
    quiet: bool,
) -> dict[str, Any]:
    """Evaluate a graph on a text, print the figures and return them."""
    from exporter.analysis.evaluate import evaluate as evaluate_graph
    from exporter.read import open_model
    from exporter.text import model_windows

    other = None if reference is None else open_model(reference, need_weights=True)
    models = [checkpoint] if other is None else [checkpoint, other]
    tokens = model_windows(text, *models, context=context, max_windows=max_windows)
    with step_progress(quiet, lines=True) as progress:
        found = evaluate_graph(
            graph,
            tokens,
            reference=None if other is None else other.graph,
            device=device,
            progress=progress and (lambda done, total: progress(done, total, f"blocks on {tokens.size:,} tokens")),
        )
    click.echo(f"perplexity {found.perplexity:.4f} over {found.tokens:,} tokens in windows of {context}")
    if found.reference_perplexity is not None:
        click.echo(f"reference perplexity {found.reference_perplexity:.4f}")
        click.echo(f"KL(reference || model) {found.kl_divergence:.5f} nats per token, over {tokens.size:,} positions")
        click.echo(f"top-1 agreement {100 * (found.top1_agreement or 0):.2f} %, over the same")
    return found.to_json()


def _evaluate_tasks(model: Path, names: Sequence[str], *, quiet: bool, **options: Any) -> list[dict[str, Any]]:
    """Run tasks, print a table of their metrics and return them."""
    from exporter.analysis.tasks import run_tasks, scores_table

    scores = run_tasks(model, names, progress=not quiet and sys.stderr.isatty(), **options)
    wide_console().print(scores_table(scores))
    return [score.to_json() for score in scores]


@click.command(
    epilog="Example: python build.py predict models/Llama-3.1-8B --plan plan.yaml --gpu h100-sxm,h200 --tp 1..8"
)
@model_argument
@plan_option
@click.option("--reference", type=PATH, help="Model to compare with, e.g. the untransformed one.")
@click.option(
    "--gpu",
    "gpu_names",
    default="h100-sxm",
    show_default=True,
    type=NAMES,
    help="One or more GPUs of engines/gpus.yaml, e.g. h100-sxm,h200.",
)
@click.option("--gpus", "gpus_path", type=PATH, help="Hardware beside that of engines/gpus.yaml.")
@click.option(
    "--tp",
    "tp_sizes",
    default="1",
    show_default=True,
    type=SIZES,
    help="Tensor-parallel sizes: 1,8, or 1..16 for those of 1,2,4,8,16 that divide the attention heads.",
)
@click.option(
    "--batch", "batches", default="1", show_default=True, type=SIZES, help="Sequences side by side, written like --tp."
)
@click.option("--context", default=1024, show_default=True, type=click.IntRange(1), help="Tokens per sequence.")
@click.option("--format", "format_name", help="fp8, int8-smoothquant, bfloat16, ...; the model's own if not given.")
@click.option("--kv-cache", type=click.Choice(["fp8", "int8"]), help="With a quantized KV cache.")
@click.option("--price-per-gpu-hour", type=Real(min=0, min_open=True), help="Also say what a million tokens cost.")
@click.option(
    "--calibrate", type=PATH, help="Fit the constants to this results file of `bench`, or YAML file of decode rates."
)
@click.option("-o", "--output", type=PATH, help="Also write the figures and charts to this folder.")
@force_option
@quiet_option
def predict(
    model: Path,
    plan_path: Path | None,
    reference: Path | None,
    gpu_names: tuple[str, ...],
    gpus_path: Path | None,
    tp_sizes: list[int],
    batches: list[int],
    context: int,
    format_name: str | None,
    kv_cache: str | None,
    price_per_gpu_hour: float | None,
    calibrate: Path | None,
    output: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Predict latency, memory and what a plan would gain.

    From the structure and data about the hardware alone: decode, prefill, memory of a GPU, and what each line of the
    plan takes off a decode step.
    """
    from engines import prediction as shown
    from engines.hardware import gpu_named, read_gpus
    from engines.latency_fit import criterion_for, fit_constants, leave_one_out, read_observations
    from engines.latency_model import (
        PUBLISHED,
        Deployment,
        Tokens,
        format_of_graph,
        number_format,
        structure_from_graph,
    )
    from engines.prediction_charts import prediction_charts
    from engines.what_if import plan_gains, possible_tp_sizes, sweep
    from exporter.pipeline import apply_plan
    from exporter.plan import read_plan
    from exporter.read import open_model
    from exporter.writers.files import json_bytes, refuse_existing, save_folder

    if output is not None:
        refuse_existing(output, force=force)
    known = read_gpus() | ({} if gpus_path is None else read_gpus(gpus_path))
    gpus = [gpu_named(name, known) for name in gpu_names]
    graph = open_model(model, need_weights=False).graph
    graphs = {_model_name(model): graph}
    if reference is not None:
        name = str(reference) if _model_name(reference) in graphs else _model_name(reference)
        graphs = {name: open_model(reference, need_weights=False).graph} | graphs  # what others are compared with
    plan = None if plan_path is None else read_plan(plan_path)
    if plan is not None and plan_path is not None:
        graphs[f"{_model_name(model)}, {plan_path.stem}"] = apply_plan(graph, plan)
    own = format_of_graph(graph) if format_name is None else number_format(format_name, dtype=graph.dtype.name)
    number = own if kv_cache is None else own.with_kv_cache(kv_cache)
    console, constants = wide_console(), PUBLISHED
    if calibrate is not None:
        observations = read_observations(calibrate, known, gpu=gpus[0] if len(gpus) == 1 else None)
        criterion = criterion_for(observations)
        fit, left_out = fit_constants(observations, criterion), leave_one_out(observations, criterion)
        console.print(shown.fit_table(observations, fit, left_out), shown.fit_text(fit, left_out), "")
        constants = fit.constants
    models = [(name, structure_from_graph(one)) for name, one in graphs.items()]
    if isinstance(tp_sizes, SizeRange):
        possible = possible_tp_sizes(models, tp_sizes)
        impossible = [str(size) for size in tp_sizes if size not in possible]
        if impossible:
            note_printer(quiet)(f"--tp {', '.join(impossible)}: left out, the attention heads do not divide")
        tp_sizes = possible
    placed = [
        Deployment(gpu=gpu, tp_size=size, format=number, constants=constants) for gpu in gpus for size in tp_sizes
    ]
    points = sweep(models, placed, batches=batches, context=context)
    gains = [] if plan is None else plan_gains(graph, plan, placed, Tokens.decode(batches[0], context))
    console.print(shown.assumptions(number, constants, context), "")
    at_first_batch = [point for point in points if point.batch == batches[0]]
    console.print(shown.points_table(points, price_per_gpu_hour), "", shown.parts_table(at_first_batch), "")
    console.print(shown.memory_table(models, at_first_batch, context))
    if gains:
        console.print("", shown.gains_table(gains, placed))
    if output is not None:
        figures = shown.prediction_json(points, gains, placed, price_per_gpu_hour=price_per_gpu_hour)
        files = [("prediction.json", json_bytes(figures)), *prediction_charts(points)]
        details = {"model": str(model), "plan": plan_path and str(plan_path)}
        save_folder(output, files, kind="prediction", details=details, force=force)
        say_written(quiet, output)


def _model_name(path: Path) -> str:
    """What tables call a model: its folder, or its file without what all of them end in."""
    return path.name.removesuffix(".json").removesuffix(".structure").removesuffix(".config")
