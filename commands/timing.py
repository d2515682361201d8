"""Commands on latencies that were measured: take them, read another program's, report and compare them."""

from __future__ import annotations

import gc
import os.path
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from commands.help import SectionedCommand
from commands.options import (
    INDICES,
    NAMES,
    NUMBERS,
    PATH,
    SIZES,
    Written,
    force_option,
    quiet_option,
    refuse_given,
    results_option,
)
from commands.terminal import note_printer, say_written, step_progress, wide_console


@click.command(
    epilog="Example: python build.py bench out/8b-engine out/8b-fused-engine --batch 1,4 --input-len 128 "
    "--output-len 64 -o out/8b.json"
)
@click.argument("engines", nargs=-1, required=True, type=PATH)
@click.option("--batch", default="1", show_default=True, type=NUMBERS, help="Sequences side by side, e.g. 1,4.")
@click.option("--input-len", default="64", show_default=True, type=NUMBERS, help="Prompt tokens, e.g. 64,512.")
@click.option("--output-len", default="32", show_default=True, type=NUMBERS, help="Generated tokens.")
@click.option(
    "--runtime",
    type=click.Choice(["cpp", "python"]),
    default="cpp",
    show_default=True,
    help="Program that takes the samples; the C++ one is built on first use.",
)
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(1), help="Kept requests per combination.")
@click.option("--warmup", default=1, show_default=True, type=click.IntRange(0, 1000), help="Requests before those.")
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads of each runtime; if not given, one for each of --cpus, or its own choice.",
)
@click.option(
    "--cpus", type=INDICES, help="CPUs that each runtime is pinned to, e.g. 0,1; as many as threads if not given."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the input tokens.")
@click.option("--one-at-a-time", is_flag=True, help="Close an engine before the next is loaded: for little memory.")
@click.option("--profile", is_flag=True, help="First run each engine under its profiler: where does the time go?")
@results_option
@force_option
@quiet_option
def bench(
    engines: tuple[Path, ...],
    batch: list[int],
    input_len: list[int],
    output_len: list[int],
    runtime: Any,
    rounds: int,
    warmup: int,
    threads: int | None,
    cpus: list[int] | None,
    seed: int,
    one_at_a_time: bool,
    profile: bool,
    output: Path,
    force: bool,
    quiet: bool,
) -> None:
    """Time engines against each other; the first is the baseline.

    All are loaded, and rounds are interleaved, so that whatever slows the machine down slows down all of them.

    If an engine fails or Ctrl-C is pressed after the first kept request, what was measured is written all the same, the
    engine marked as incomplete, and the exit code is 4.
    """
    from engines.bench import bench_engines, request_grid
    from engines.cpp_program import worker_for
    from engines.machine import cpus_for
    from engines.results import json_from_results, refuse_incomplete
    from engines.results_table import results_table
    from exporter.writers.files import refuse_existing_file, save_file

    refuse_existing_file(output, force=force)
    grid = request_grid(batch, input_len, output_len)
    with step_progress(quiet, ticks=False) as progress:  # drawing takes time from the CPUs that are timed
        results = bench_engines(
            engines,
            grid,
            rounds=rounds,
            warmup=warmup,
            threads=threads,
            cpus=cpus_for(threads) if cpus is None else cpus,
            seed=seed,
            one_at_a_time=one_at_a_time,
            progress=progress,
            profile=profile,
            worker=worker_for(runtime, note_printer(quiet)),
        )
    save_file(output, json_from_results(results), force=force)
    if not quiet:
        wide_console().print(results_table(results))
    say_written(quiet, output)
    refuse_incomplete(results, output)


@click.command(
    "import-bench",
    epilog="Example: python build.py import-bench report.json --requests requests.json --model out/8b-engine "
    "-o out/8b.json",
)
@click.argument("report", type=PATH)
@click.option("--requests", required=True, type=PATH, help="What its --request_json wrote.")
@click.option("--model", required=True, type=PATH, help="The engine or Hugging Face folder.")
@click.option("--label", help="What reports call it; the folder's name if not given.")
@click.option(
    "--warmup", default=2, show_default=True, type=click.IntRange(0, 1000), help="As it was given to trtllm-bench."
)
@results_option
@force_option
@quiet_option
def import_bench(
    report: Path, requests: Path, model: Path, label: str | None, warmup: int, output: Path, force: bool, quiet: bool
) -> None:
    """Convert what trtllm-bench measured into a results file.

    REPORT is its --report_json.
    """
    from engines.results import engine_label, json_from_results
    from engines.trtllm_bench import results_from_trtllm_bench
    from exporter.writers.files import refuse_existing_file, save_file

    refuse_existing_file(output, force=force)
    label = engine_label(label, Path(os.path.realpath(model)))
    results = results_from_trtllm_bench(report, requests, model, label=label, warmup=warmup)
    save_file(output, json_from_results(results), force=force)
    say_written(quiet, output)


def _share(text: str) -> float:
    number = text.removesuffix("%").strip()
    if not re.fullmatch(r"\d+(\.\d+)?", number) or not text.endswith("%"):
        raise ValueError(f"{text!r} is not a share like 5%")
    return float(number) / 100


SHARE = Written("share", _share)  # 5% is 0.05
OPTIONS_OF_REPORT = (
    "baseline", "title", "analysis", "errors", "gpu_names", "tp", "batch", "dtype", "gpus_path", "calibrate",
)  # fmt: skip


@click.command(
    cls=SectionedCommand,
    sections={
        "Report": ("baseline", "title", "analysis", "errors"),
        "Prediction": ("gpu_names", "tp", "batch", "dtype", "gpus_path", "calibrate"),
        "Comparison of two results files": ("compare", "metrics", "threshold"),
    },
    epilog="Example: python build.py report out/8b.json -o out/8b-report",
)
@click.argument("results", nargs=-1, required=True, type=PATH)
@click.option("--baseline", help="Label of the engine that ratios refer to; the first engine's if not given.")
@click.option("--title", help="Headline of the report.")
@click.option("--analysis", type=PATH, help="Also show this folder that `analyze` wrote.")
@click.option(
    "--errors",
    multiple=True,
    type=PATH,
    help="Also show this folder that `quantize --report` wrote. Repeat it for more.",
)
@click.option(
    "--predict-gpu", "gpu_names", default=(), type=NAMES, help="Also predict the engines on these, e.g. h100-sxm,h200."
)
@click.option(
    "--predict-tp", "tp", type=SIZES, help="Tensor-parallel sizes: 1,8, or 1..16 for 1,2,4,8,16; 1 if not given."
)
@click.option(
    "--predict-batch",
    "batch",
    type=SIZES,
    help="Batches, written like --predict-tp; those of the results if not given.",
)
@click.option("--predict-dtype", "dtype", help="Of what is not quantized, e.g. bfloat16; the engine's if not given.")
@click.option("--gpus", "gpus_path", type=PATH, help="Hardware beside that of engines/gpus.yaml.")
@click.option("--calibrate", help="The GPU that the results are from: also show what the latency model makes of them.")
@click.option(
    "--compare",
    is_flag=True,
    help="No report: of two results files, before and after, what became slower beyond noise?",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="With --compare: ttft_ms, inter_token_ms or request_ms alone. Repeat it for more.",
)
@click.option(
    "--fail-on-regression",
    "threshold",
    type=SHARE,
    help="--compare, and exit with code 3 if anything is slower by more than this, e.g. 5%, or an engine now stops.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="Folder of the report, required; with --compare, a JSON file to keep the figures in.",
)
@force_option
@quiet_option
def report(
    results: tuple[Path, ...],
    baseline: str | None,
    title: str | None,
    analysis: Path | None,
    errors: tuple[Path, ...],
    gpu_names: tuple[str, ...],
    tp: list[int] | None,
    batch: list[int] | None,
    dtype: str | None,
    gpus_path: Path | None,
    calibrate: str | None,
    compare: bool,
    metrics: tuple[str, ...],
    threshold: float | None,
    output: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Compare results side by side: HTML, Markdown, CSV, charts."""
    if compare or threshold is not None:
        refuse_given(OPTIONS_OF_REPORT, "a report, not to --compare")
        _compare(results, metrics, threshold, output, force=force, quiet=quiet)
        return
    refuse_given(("metrics",), "--compare: a report has all of them")
    if not gpu_names and (tp, batch, dtype) != (None, None, None):
        raise click.UsageError("--predict-tp, --predict-batch and --predict-dtype belong to --predict-gpu.")
    if not gpu_names and calibrate is None:
        refuse_given(("gpus_path",), "--predict-gpu or --calibrate")
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    from engines.report import names_of, report_from_results
    from exporter.pipeline import refuse_overlap
    from exporter.writers.files import refuse_existing, save_folder

    for folder in [*errors, *([] if analysis is None else [analysis])]:
        if os.path.lexists(output):  # it would be replaced
            refuse_overlap(folder, output)
    refuse_existing(output, force=force)
    wanted = None
    if gpu_names or calibrate is not None:
        from engines.hardware import gpu_named, read_gpus
        from engines.prediction_report import Wanted

        known = read_gpus() | ({} if gpus_path is None else read_gpus(gpus_path))
        wanted = Wanted(
            gpus=[gpu_named(name, known) for name in gpu_names],
            tp_sizes=tp or [1],
            batches=batch,
            dtype=dtype,
            calibrate=None if calibrate is None else gpu_named(calibrate, known),
        )

    details = {"results": [str(path) for path in results], "analysis": analysis and str(analysis)}
    with _no_garbage_collection():
        files = report_from_results(
            results,
            baseline=baseline,
            title=title,
            analysis=analysis,
            quantization=dict(zip(names_of(errors), errors, strict=True)),
            prediction=wanted,
        )
        save_folder(output, files, kind="report", details=details, force=force)
    say_written(quiet, output / "report.html")


def _compare(
    results: tuple[Path, ...],
    metrics: tuple[str, ...],
    threshold: float | None,
    output: Path | None,
    *,
    force: bool,
    quiet: bool,
) -> None:
    """Print what changed from the first results file to the second; exit with 3 where it became too slow."""
    from engines.regression import changes_markdown, changes_table, compare_results
    from engines.results import read_results
    from exporter.writers.files import json_bytes, refuse_existing_file, save_file

    if len(results) != 2:
        raise click.UsageError("--compare takes two results files, before and after.")
    if output is not None and not output.name:
        raise click.UsageError("-o is the JSON file of a comparison, not a folder.")
    markdown = None if output is None else output.with_suffix(".md")
    if output is not None and markdown is not None:
        if output == markdown:
            raise click.UsageError("-o is the JSON file of a comparison, its Markdown lies beside it: not *.md.")
        for file in (output, markdown):
            refuse_existing_file(file, force=force)
    before, after = (read_results(path) for path in results)
    changes = compare_results(before, after, metrics=metrics or None)
    wide_console().print(changes_table(changes))
    for note in changes.notes:
        click.echo(f"note: {note}")
    if output is not None and markdown is not None:
        save_file(output, json_bytes(changes.to_json()), force=force)
        save_file(markdown, changes_markdown(changes, threshold).encode(), force=force)
        say_written(quiet, output)
    regressions = [] if threshold is None else changes.regressions(threshold)
    for regression in regressions:
        click.echo(regression, err=True)
    if regressions:
        sys.exit(3)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For work that makes a million small objects and keeps them: to search these for cycles takes a quarter of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # else the interpreter searches all of them once more when it exits
        if was_enabled:
            gc.enable()
