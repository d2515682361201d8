"""The command line: `python build.py COMMAND`. Options, the order of calls, exit codes.

Exit codes: 0 done; 1 a bug (with its traceback); 2 bad input, a refused request, or something missing on this machine;
3 a regression (`report --compare --fail-on-regression`).
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from exporter.errors import FuselageError

WIDE = 120  # characters of a table that is piped somewhere
MOST = 1 << 20  # GPUs, or sequences, that are predicted
DEMO_RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"

model_argument = click.argument("model", type=click.Path(path_type=Path))
output_option = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the result goes; must not exist."
)
force_option = click.option("--force", is_flag=True, help="Replace an output that Fuselage wrote earlier.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress bar and no closing words.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Check everything, list the files, write nothing.")
plan_option = click.option(
    "--plan", "plan_path", type=click.Path(path_type=Path), help="YAML: drop_attention, drop_ffn, fuse, parallel."
)
norm_option = click.option(
    "--norm",
    type=click.Choice(["fold", "last"]),
    default="fold",
    show_default=True,
    help="Fused FFNs: fold each layer's own norm into its weights, or use the last layer's norm (the paper).",
)

text_option = click.option(
    "--text", required=True, type=click.Path(path_type=Path), help='Text file, or .jsonl with a "text" per line.'
)


def context_option(command: Callable[..., None]) -> Callable[..., None]:
    """How much of the text, in windows of which length."""
    command = click.option("--max-windows", type=click.IntRange(1), help="Use at most so many windows.")(command)
    return click.option(
        "--context", default=512, show_default=True, type=click.IntRange(2), help="Tokens per window of text."
    )(command)


class Commands(click.Group):
    """Turns our errors into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FuselageError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fuselage")
def main() -> None:
    """FFN Fusion for Llama-family models: from a Hugging Face folder to a measured engine.

    MODEL is a folder with config.json and safetensors files; where no weights are needed, a config.json or a
    *.structure.json will do.
    """


@main.command()
@model_argument
@click.option("--json", "as_json", is_flag=True, help="The structure as JSON.")
def inspect(model: Path, as_json: bool) -> None:
    """Show a model's structure: parameters, KV cache, sequential sublayers, every block."""
    from rich.console import Console

    from exporter.graph import structure
    from exporter.read import open_model
    from exporter.summary import summary

    graph = open_model(model, need_weights=False).graph
    if as_json:
        click.echo(json.dumps(structure(graph), indent=2))
    else:
        Console().print(summary(graph))


@main.command()
@model_argument
@plan_option
@norm_option
@output_option
@click.option("--shard-size", default="5GB", show_default=True, help="Largest weight file, e.g. 500MB or 5GB.")
@click.option("--check-for", "readers", default="", help="Refuse what these readers cannot load: vllm,llama.cpp,...")
@dry_run_option
@force_option
@quiet_option
def transform(
    model: Path,
    plan_path: Path | None,
    norm: Any,
    output: Path,
    shard_size: str,
    readers: str,
    dry_run: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Apply a plan and write a Hugging Face folder."""
    from exporter.pipeline import checkpoint_writing

    writing = checkpoint_writing(
        *_planned(model, plan_path, norm, need_weights=not dry_run),
        output,
        readers=[reader for reader in readers.split(",") if reader],
        shard_bytes=_bytes(shard_size),
        details={"plan": str(plan_path) if plan_path else None, "norm": norm},
        force=force,
    )
    _carry_out(writing, dry_run, quiet)


@main.command()
@model_argument
@plan_option
@norm_option
@click.option("--format", "format_name", required=True, help="fp8, int8-smoothquant, ... or a recipe file; see below.")
@click.option("--text", type=click.Path(path_type=Path), help="Text to calibrate on: a file, or .jsonl.")
@context_option
@click.option("--calibration", type=click.Path(path_type=Path), help="Use this calibration of MODEL.")
@click.option("--save-calibration", type=click.Path(path_type=Path), help="Keep the calibration in this folder.")
@click.option("--percentile", type=click.FloatRange(50, 100), help="Clip activations there, e.g. 99.9.")
@click.option("--kv-cache", type=click.Choice(["fp8", "int8"]), help="Also quantize the KV cache.")
@click.option("--exclude", multiple=True, help="Leave linears alone, e.g. 'blocks.0.*'. Repeat it for more.")
@click.option("--layout", type=click.Choice(["modelopt", "compressed-tensors"]), help="Of the folder; by format else.")
@click.option("--report", "report_path", type=click.Path(path_type=Path), help="Folder for the error of every linear.")
@click.option("--shard-size", default="5GB", show_default=True, help="Largest weight file, e.g. 500MB or 5GB.")
@click.option("--check-for", "readers", default="", help="Refuse what these readers cannot load: vllm,llama.cpp,...")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda, for calibration.")
@click.option("--resume", type=click.Path(path_type=Path), help="Folder for a calibration to go on from when killed.")
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
    shard_size: str,
    readers: str,
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
    from exporter.calibration import calibrate, calibration_files, read_calibration
    from exporter.pipeline import checkpoint_writing
    from exporter.quantization import read_quantization, recipe_with
    from exporter.quantize import error_files, errors_summary, split_windows
    from exporter.quantize import quantize as quantize_graph
    from exporter.text import open_tokenizer, token_windows
    from exporter.writers.files import refuse_existing, save_folder

    for folder in (output, save_calibration, report_path):
        if folder is not None and not dry_run:
            refuse_existing(folder, force=force)
    recipe = recipe_with(read_quantization(format_name), kv_cache=kv_cache, exclude=exclude)
    checkpoint, graph = _planned(model, plan_path, norm)
    known = None if calibration is None else read_calibration(calibration)
    tokens = aside = None
    needs_text = (recipe.needs_ranges and known is None) or recipe.searches_alpha or report_path is not None
    if needs_text:
        if text is None:
            raise click.UsageError("this needs a --text: to calibrate on, to choose alpha, or for the --report")
        tokenizer = open_tokenizer(checkpoint.path, graph.vocab_size)
        windows = token_windows(text, tokenizer, context=context, max_windows=max_windows)
        tokens, aside = split_windows(windows)
    with _step_progress(quiet) as progress:
        if recipe.needs_ranges and known is None and tokens is not None and text is not None:
            known = calibrate(
                checkpoint.graph,
                tokens,
                text=text.name,
                percentile=percentile,
                device=device,
                work=resume,
                progress=progress and (lambda done, total: progress(done, total, "calibration")),
            )
        found = quantize_graph(
            graph,
            recipe,
            source=checkpoint.graph,
            calibration=known,
            tokens=aside,
            device=device,
            progress=progress,
        )
    details = {"plan": str(plan_path) if plan_path else None, "norm": norm, "format": format_name}
    writing = checkpoint_writing(
        checkpoint,
        found.graph,
        output,
        readers=[reader for reader in readers.split(",") if reader],
        shard_bytes=_bytes(shard_size),
        layout=layout,
        details=details,
        force=force,
    )
    _carry_out(writing, dry_run, quiet)
    if dry_run:
        return
    if save_calibration is not None and known is not None:
        save_folder(
            save_calibration, calibration_files(known).items(), kind="calibration", details=details, force=force
        )
        _done(quiet, save_calibration)
    if report_path is not None and aside is not None and text is not None:
        source = f"{format_name}, {model.name}, {aside.size:,} tokens of {text.name}"
        with _step_progress(quiet) as progress:
            files = error_files(found, graph, aside, source=source, device=device, progress=progress)
        save_folder(report_path, files.items(), kind="quantization", details=details, force=force)
        if not quiet:
            click.echo(errors_summary(files))
        _done(quiet, report_path)


@main.command()
@model_argument
@click.option("--to", "target_format", type=click.Choice(["onnx", "hf", "trtllm"]), required=True, help="Kind.")
@plan_option
@norm_option
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=["onnxruntime"],
    show_default=True,
    help="onnx: runtime whose form to use, with a dtype if not the default, e.g. tensorrt:bfloat16. Repeat it for "
    "several networks over one weight file.",
)
@click.option("--max-positions", type=click.IntRange(1), help="onnx: tokens a sequence may reach.")
@click.option("--batch", type=click.IntRange(1), help="onnx: a fixed number of sequences.")
@click.option("--plugins", help="onnx: custom ops in place of standard ones; wide_ffn is the only one.")
@click.option("--tp", default=1, show_default=True, type=click.IntRange(1), help="trtllm: tensor-parallel size.")
@click.option("--pp", default=1, show_default=True, type=click.IntRange(1), help="trtllm: pipeline-parallel size.")
@click.option("--split-embedding", is_flag=True, help="trtllm: every GPU holds a part of the embedding, not all.")
@click.option("--format", "format_name", help="trtllm: quantize on the way: fp8, fp8-rowwise, ... or a recipe file.")
@click.option("--calibration", type=click.Path(path_type=Path), help="trtllm: a calibration of MODEL, for --format.")
@click.option("--kv-cache", type=click.Choice(["fp8", "int8"]), help="trtllm: quantize the KV cache, with --format.")
@click.option("--list-tensors", is_flag=True, help="trtllm: with --dry-run, every tensor of every rank.")
@click.option("--check", "runtime", help="onnx: refuse what it would not import: tensorrt, or tensorrt:10.15.")
@output_option
@dry_run_option
@force_option
@quiet_option
def export(
    model: Path,
    target_format: str,
    plan_path: Path | None,
    norm: Any,
    targets: tuple[str, ...],
    max_positions: int | None,
    batch: int | None,
    plugins: str | None,
    tp: int,
    pp: int,
    split_embedding: bool,
    format_name: str | None,
    calibration: Path | None,
    kv_cache: str | None,
    list_tensors: bool,
    runtime: str | None,
    output: Path,
    dry_run: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Write a network definition.

    A dry run to trtllm needs no weights: a config.json or a *.structure.json will do.
    """
    from exporter.pipeline import checkpoint_writing, network_writing, trtllm_writing
    from exporter.writers import onnx_tensorrt_rules, trtllm
    from exporter.writers.onnx import options_for
    from exporter.writers.onnx_plugins import plugin_ops

    details: dict[str, Any] = {"plan": str(plan_path) if plan_path else None, "norm": norm}
    is_structure_enough = dry_run and target_format == "trtllm"
    if runtime is not None and target_format != "onnx":
        raise click.UsageError("--check belongs to --to onnx")
    version = None if runtime is None else onnx_tensorrt_rules.version_from_text(runtime)
    checkpoint, graph = _planned(model, plan_path, norm, need_weights=not is_structure_enough)
    if target_format == "trtllm":
        if format_name is not None:
            graph = _quantized(checkpoint, graph, format_name, calibration, kv_cache, structure_only=dry_run)
        elif calibration is not None or kv_cache is not None:
            raise click.UsageError("--calibration and --kv-cache belong to a --format")
        options = trtllm.Options(tp_size=tp, pp_size=pp, split_embedding=split_embedding)
        details |= {"tp": tp, "pp": pp, "format": format_name}
        writing = trtllm_writing(checkpoint, graph, output, options=options, details=details, force=force)
        if dry_run and list_tensors:
            for file, tensors in trtllm.tensors_of_ranks(graph, options).items():
                for name, tensor in tensors.items():
                    click.echo(f"{tensor.nbytes:>16,}  {file}  {name}  {tensor.dtype}{list(tensor.shape)}")
    elif target_format == "hf":
        writing = checkpoint_writing(checkpoint, graph, output, details=details, force=force)
    else:
        named = tuple(plugins.split(",")) if plugins else ()
        variants = options_for(_targets(targets), max_positions=max_positions, batch=batch, plugins=named)
        writing = network_writing(checkpoint, graph, output, options=variants, details=details, force=force)
        if version is not None:
            files = onnx_tensorrt_rules.files_for_tensorrt(variants.networks)
            _refuse_violations({file: writing.files[file] for file in files}, version, plugin_ops(named))
    _carry_out(writing, dry_run, quiet)


@main.command()
@click.argument("network", type=click.Path(path_type=Path))
@click.option("--against", "runtime", default="tensorrt", show_default=True, help="tensorrt, or tensorrt:10.15.")
@click.option("--plugin", "plugins", multiple=True, help="An op that a plugin implements there. Repeat it for more.")
def check(network: Path, runtime: str, plugins: tuple[str, ...]) -> None:
    """Check ONNX networks against the rules of a runtime's importer; no weight is read.

    NETWORK is a folder that `export` wrote, or any .onnx file. The runtime need not be installed.
    """
    from exporter.writers.onnx_tensorrt_rules import networks_to_check, version_from_text

    version = version_from_text(runtime)
    files = networks_to_check(network)
    _refuse_violations(files, version, plugins)
    click.echo(f"no rule of {runtime} is broken by {', '.join(files)}")


@main.command()
@click.argument("network", type=click.Path(path_type=Path))
@click.option("--backend", default="onnxruntime", show_default=True, help="The runtime that is to run it.")
@click.option("--label", help="What reports call it; the folder's name if not given.")
@click.option(
    "--max-batch", type=click.IntRange(1), help="tensorrt-llm, tensorrt: sequences side by side; 8 if not given."
)
@click.option("--max-seq-len", type=click.IntRange(1), help="tensorrt-llm: tokens of a sequence; 8192 if not given.")
@click.option("--max-num-tokens", type=click.IntRange(1), help="tensorrt-llm: tokens of a step; 8192 if not given.")
@click.option("--low-latency", is_flag=True, help="tensorrt-llm: FP8 GEMMs for few tokens at a time.")
@click.option(
    "--workers", type=click.IntRange(1), help="tensorrt-llm: GPUs that build at the same time; all if not given."
)
@click.option("--max-input-len", type=click.IntRange(1), help="tensorrt: tokens of a prefill call; 2048 if not given.")
@click.option("--opt-input-len", type=click.IntRange(1), help="tensorrt: the length that kernels are chosen for.")
@click.option("--builder-optimization-level", type=click.IntRange(0, 5), help="tensorrt: 3 if not given.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="tensorrt: file of measured tactics, extended.")
@click.option("--lean", is_flag=True, help="tensorrt: an engine for later versions and the lean runtime.")
@click.option("--weight-streaming", is_flag=True, help="tensorrt: weights may stay in host memory.")
@click.option("--weight-streaming-budget", help="tensorrt: of those on the GPU, e.g. 20GB; TensorRT's if not given.")
@click.option("--decomposable-attention", is_flag=True, help="tensorrt: attention need not be one fused kernel.")
@click.option("--detailed", is_flag=True, help="tensorrt: keep what an engine inspector shows of layers.")
@click.option("--ignore-memory", is_flag=True, help="tensorrt: build even if it is not expected to fit.")
@click.option("--dry-run", is_flag=True, help="tensorrt-llm, tensorrt: print what would be built, and its memory.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="torch: where it is to run; cuda if not given.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="torch: of activations and KV cache; the model's if not given.",
)
@click.option("--plugins", help="torch: custom ops in place of standard ones; wide_ffn is the only one.")
@click.option("--capacity", type=click.IntRange(1), help="torch: tokens of a fixed KV cache; by request if not given.")
@output_option
@force_option
@quiet_option
def engine(
    network: Path,
    backend: str,
    label: str | None,
    max_batch: int | None,
    max_seq_len: int | None,
    max_num_tokens: int | None,
    low_latency: bool,
    workers: int | None,
    max_input_len: int | None,
    opt_input_len: int | None,
    builder_optimization_level: int | None,
    timing_cache: Path | None,
    lean: bool,
    weight_streaming: bool,
    weight_streaming_budget: str | None,
    decomposable_attention: bool,
    detailed: bool,
    ignore_memory: bool,
    dry_run: bool,
    device: str | None,
    dtype: str | None,
    plugins: str | None,
    capacity: int | None,
    output: Path,
    force: bool,
    quiet: bool,
) -> None:
    """Build an engine from a network definition: a folder that `export` wrote.

    For --backend torch NETWORK is a Hugging Face folder instead, one that `transform` or `quantize` wrote or any other
    that can be read.
    """
    from engines.backends import backend_named, describe_build, tells_progress
    from exporter.dtypes import BY_NAME

    given = {
        "max_batch_size": max_batch,
        "max_seq_len": max_seq_len,
        "max_num_tokens": max_num_tokens,
        "low_latency": low_latency or None,
        "workers": workers,
        "max_input_len": max_input_len,
        "opt_input_len": opt_input_len,
        "builder_optimization_level": builder_optimization_level,
        "timing_cache": timing_cache,
        "lean": lean or None,
        "weight_streaming": weight_streaming or None,
        "weight_streaming_budget": weight_streaming_budget
        and _bytes(weight_streaming_budget, "--weight-streaming-budget"),
        "decomposable_attention": decomposable_attention or None,
        "detailed": detailed or None,
        "ignore_memory": ignore_memory or None,
        "device": device,
        "dtype": dtype and BY_NAME[dtype],
        "plugins": plugins and tuple(plugins.split(",")),
        "capacity": capacity,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if dry_run:
        click.echo(describe_build(backend, network, output, chosen))
        return
    with _step_progress(quiet or not tells_progress(backend)) as progress:
        backend_named(backend, chosen, progress).build(network, output, label=label, force=force)
    _done(quiet, output)


@main.command()
@click.argument("engines", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batch", default="1", show_default=True, help="Sequences side by side, e.g. 1,4.")
@click.option("--input-len", default="64", show_default=True, help="Prompt tokens, e.g. 64,512.")
@click.option("--output-len", default="32", show_default=True, help="Generated tokens.")
@click.option(
    "--runtime",
    type=click.Choice(["cpp", "python"]),
    default="cpp",
    show_default=True,
    help="Program that takes the samples; the C++ one is built on first use.",
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Kept requests per combination.")
@click.option("--warmup", default=1, show_default=True, type=click.IntRange(0), help="Requests before those.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each runtime.")
@click.option("--cpus", help="CPUs that each runtime is pinned to, e.g. 0,1; as many as threads if not given.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the input tokens.")
@click.option("--profile", is_flag=True, help="Then run each engine under its profiler: where did the time go?")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Results file (JSON).")
@force_option
@quiet_option
def bench(
    engines: tuple[Path, ...],
    batch: str,
    input_len: str,
    output_len: str,
    runtime: Any,
    rounds: int,
    warmup: int,
    threads: int | None,
    cpus: str | None,
    seed: int,
    profile: bool,
    output: Path,
    force: bool,
    quiet: bool,
) -> None:
    """Time engines against each other; the first is the baseline. Rounds are interleaved."""
    from engines.bench import bench_engines, request_grid
    from engines.cpp_program import worker_for
    from engines.machine import cpus_for
    from engines.results import json_from_results
    from exporter.writers.files import refuse_existing_file, save_file

    refuse_existing_file(output, force=force)
    grid = request_grid(
        _numbers(batch, "--batch"), _numbers(input_len, "--input-len"), _numbers(output_len, "--output-len")
    )
    with _step_progress(quiet) as progress:
        results = bench_engines(
            engines,
            grid,
            rounds=rounds,
            warmup=warmup,
            threads=threads,
            cpus=cpus_for(threads) if cpus is None else _numbers(cpus, "--cpus", least=0),
            seed=seed,
            progress=progress,
            profile=profile,
            worker=worker_for(runtime, _note(quiet)),
        )
    save_file(output, json_from_results(results), force=force)
    _done(quiet, output)


@main.command("import-bench")
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--requests", required=True, type=click.Path(path_type=Path), help="What its --request_json wrote.")
@click.option("--model", required=True, type=click.Path(path_type=Path), help="The engine or Hugging Face folder.")
@click.option("--label", help="What reports call it; the folder's name if not given.")
@click.option("--warmup", default=2, show_default=True, type=click.IntRange(0), help="As it was given to trtllm-bench.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Results file (JSON).")
@force_option
@quiet_option
def import_bench(
    report: Path, requests: Path, model: Path, label: str | None, warmup: int, output: Path, force: bool, quiet: bool
) -> None:
    """Convert what trtllm-bench measured (REPORT is its --report_json) into a results file."""
    from engines.results import json_from_results
    from engines.trtllm_bench import results_from_trtllm_bench
    from exporter.writers.files import refuse_existing_file, save_file

    refuse_existing_file(output, force=force)
    results = results_from_trtllm_bench(report, requests, model, label=label or model.resolve().name, warmup=warmup)
    save_file(output, json_from_results(results), force=force)
    _done(quiet, output)


@main.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--baseline", help="Label of the engine that ratios refer to; the first if not given.")
@click.option("--title", help="Headline of the report.")
@click.option("--analysis", type=click.Path(path_type=Path), help="Also show this folder that `analyze` wrote.")
@click.option(
    "--errors",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Also show this folder that `quantize --report` wrote. Repeat it for more.",
)
@click.option("--predict-gpu", "gpu_names", default="", help="Also predict the engines on these, e.g. h100-sxm,h200.")
@click.option("--predict-tp", "tp", help="Tensor-parallel sizes: 1,8, or 1..16 for 1,2,4,8,16; 1 if not given.")
@click.option("--predict-batch", "batch", help="Batches, written like --predict-tp; those of the results if not given.")
@click.option("--predict-dtype", "dtype", help="Of what is not quantized, e.g. bfloat16; the engine's if not given.")
@click.option("--gpus", "gpus_path", type=click.Path(path_type=Path), help="Hardware beside that of engines/gpus.yaml.")
@click.option("--calibrate", help="What of it the results are from: show what the latency model makes of them.")
@click.option("--compare", is_flag=True, help="Two results files, before and after: what became slower beyond noise?")
@click.option("--metric", "metrics", multiple=True, help="With --compare: ttft_ms, inter_token_ms or request_ms alone.")
@click.option("--fail-on-regression", "threshold", help="With --compare: exit code 3 if by more than this, e.g. 5%.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the report; with --compare, a file.")
@force_option
@quiet_option
def report(
    results: tuple[Path, ...],
    baseline: str | None,
    title: str | None,
    analysis: Path | None,
    errors: tuple[Path, ...],
    gpu_names: str,
    tp: str | None,
    batch: str | None,
    dtype: str | None,
    gpus_path: Path | None,
    calibrate: str | None,
    compare: bool,
    metrics: tuple[str, ...],
    threshold: str | None,
    output: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Compare results side by side: HTML, Markdown, CSV, charts."""
    if compare or threshold is not None:
        limit = None if threshold is None else _share(threshold)
        _compare(results, metrics, limit, output, force=force, quiet=quiet)
        return
    if metrics:
        raise click.UsageError("--metric belongs to --compare: a report has all of them.")
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    from engines.report import report_from_results
    from exporter.writers.files import refuse_existing, save_folder

    refuse_existing(output, force=force)
    wanted = None
    if gpus_path is not None and not gpu_names and calibrate is None:
        raise click.UsageError("--gpus belongs to --predict-gpu or --calibrate.")
    if not gpu_names and (tp, batch, dtype) != (None, None, None):
        raise click.UsageError("--predict-tp, --predict-batch and --predict-dtype belong to --predict-gpu.")
    if gpu_names or calibrate is not None:
        from engines.hardware import gpu_named, read_gpus
        from engines.prediction_report import Wanted

        known = read_gpus() | ({} if gpus_path is None else read_gpus(gpus_path))
        wanted = Wanted(
            gpus=[gpu_named(name, known) for name in gpu_names.split(",") if name],
            tp_sizes=_sizes(tp or "1", "--predict-tp"),
            batches=None if batch is None else _sizes(batch, "--predict-batch"),
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
            quantization={folder.name: folder for folder in errors},
            prediction=wanted,
        )
        save_folder(output, files, kind="report", details=details, force=force)
    _done(quiet, output / "report.html")


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
    markdown = None if output is None else output.with_suffix(".md")
    if output is not None and markdown is not None:
        if output == markdown:
            raise click.UsageError("-o is the JSON file of a comparison, its Markdown lies beside it: not *.md.")
        for file in (output, markdown):
            refuse_existing_file(file, force=force)
    before, after = (read_results(path) for path in results)
    changes = compare_results(before, after, metrics=metrics or None)
    _console().print(changes_table(changes))
    for note in changes.notes:
        click.echo(f"note: {note}")
    if output is not None and markdown is not None:
        save_file(output, json_bytes(changes.to_json()), force=force)
        save_file(markdown, changes_markdown(changes, threshold).encode(), force=force)
        _done(quiet, output)
    slower = [] if threshold is None else [change for change in changes.changes if change.is_regression(threshold)]
    if slower:
        click.echo(f"{len(slower)} of {len(changes.changes)} figures are more than {threshold:.1%} slower", err=True)
        sys.exit(3)


@main.command()
@model_argument
@text_option
@context_option
@click.option("--layers", help="Source layers to measure, e.g. 66-115; all if not given.")
@click.option("--kl", is_flag=True, help="Also rank parts by the KL divergence of the logits.")
@click.option("--drop", default=0, type=click.IntRange(0), help="Suggest so many attentions to drop.")
@click.option("--greedy", is_flag=True, help="Measure again after each suggested drop.")
@click.option("--parallel", default=0, type=click.IntRange(0), help="Suggest so many groups of parallel blocks.")
@click.option("--window", default=4, show_default=True, type=click.IntRange(2), help="Blocks of a parallel group.")
@click.option("--max-width", type=click.IntRange(1), help="Widest fused FFN.")
@click.option("--max-gib-per-gpu", type=click.FloatRange(min=0, min_open=True), help="Largest fused FFN per GPU.")
@click.option("--tp", default=1, show_default=True, type=click.IntRange(1), help="Tensor-parallel size.")
@click.option("--gpu", help="Say in the plan what each line is predicted to gain, decoding on --tp of these.")
@click.option("--max-dependency", type=click.FloatRange(min=0), help="Largest dependency in a fused group.")
@click.option("--keep-last/--fuse-last", default=True, show_default=True, help="The last FFN of a run stays alone.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--memory", default="4GB", show_default=True, help="Hidden states beyond this go to files.")
@click.option("--resume", type=click.Path(path_type=Path), help="Folder for those files, to go on from when killed.")
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
    memory: str,
    resume: Path | None,
    output: Path,
    force: bool,
    quiet: bool,
) -> None:
    """Measure which blocks depend on which, and suggest a plan: dependency.json, plan.yaml, pictures."""
    from engines.hardware import gpu_named, read_gpus
    from engines.latency_model import Deployment, Tokens, format_of_graph
    from engines.what_if import gain_text
    from exporter.analysis.dependency import measure_dependency
    from exporter.analysis.plan import Constraints
    from exporter.read import open_model
    from exporter.suggest import Wishes, analysis_files, suggest
    from exporter.text import open_tokenizer, token_windows
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
    gain = None
    if gpu is not None:
        number = format_of_graph(checkpoint.graph)
        placed = Deployment(gpu=gpu_named(gpu, read_gpus()), tp_size=tp, format=number)
        gain = gain_text(checkpoint.graph, placed, Tokens.decode(1, context))
    tokenizer = open_tokenizer(checkpoint.path, checkpoint.graph.vocab_size)
    tokens = token_windows(text, tokenizer, context=context, max_windows=max_windows)
    with _step_progress(quiet) as progress:
        dependency = measure_dependency(
            checkpoint.graph,
            tokens,
            blocks=None if layers is None else _block_range(checkpoint.graph, layers),
            kl=kl,
            device=device,
            budget_bytes=_bytes(memory, "--memory"),
            work=resume,
            progress=progress and (lambda done, total: progress(done, total, "blocks")),
        )
        suggestion = suggest(checkpoint.graph, dependency, wishes, tokens=tokens, progress=progress)
    source = f"measured on {dependency.tokens:,} tokens of {text.name}, model {model.name}"
    files = analysis_files(dependency, suggestion, constraints=constraints, source=source, gain=gain)
    details = {"model": str(model), "text": str(text), "context": context}
    save_folder(output, files, kind="analysis", details=details, force=force)
    _done(quiet, output)


@main.command()
@model_argument
@click.option("--reference", type=click.Path(path_type=Path), help="Model to compare with, e.g. the untransformed one.")
@plan_option
@norm_option
@click.option("--text", type=click.Path(path_type=Path), help='Text file, or .jsonl with a "text" per line.')
@context_option
@click.option("--tasks", default="", help="Tasks of lm-evaluation-harness, e.g. hellaswag,arc_easy; not with --plan.")
@click.option("--include-path", type=click.Path(path_type=Path), help="Folder of further tasks; their code is run.")
@click.option("--limit", type=click.IntRange(1), help="Samples per task; all if not given.")
@click.option("--trust-remote-code", is_flag=True, help="Tasks may run code that the model folder brings.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write all figures to this JSON file.")
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
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    trust_remote_code: bool,
    device: str,
    output: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Measure perplexity on a text, with a reference also KL divergence and top-1 agreement; or run tasks."""
    from exporter.analysis.tasks import check_tasks
    from exporter.writers.files import json_bytes, refuse_existing_file, save_file

    names = [name for name in tasks.split(",") if name]
    if text is None and not names:
        raise click.UsageError("Give --text, --tasks or both.")
    if text is None and reference is not None:
        raise click.UsageError("--reference is compared on a text: give --text.")
    if names and plan_path is not None:
        raise click.UsageError("Tasks are run on a model folder: apply the plan with `transform` first.")
    if output is not None:
        refuse_existing_file(output, force=force)
    options: dict[str, Any] = {"include_path": include_path, "trust_remote_code": trust_remote_code}
    if names:
        check_tasks(model, names, **options)
    figures: dict[str, Any] = {"model": str(model)}
    if text is not None:
        checkpoint, graph = _planned(model, plan_path, norm)
        figures |= {"reference": reference and str(reference), "text": str(text), "context": context}
        figures |= _evaluate_text(checkpoint, graph, reference, text, context, max_windows, device, quiet)
    if names:
        figures["tasks"] = _evaluate_tasks(model, names, limit=limit, device=device, quiet=quiet, **options)
    if output is not None:
        save_file(output, json_bytes(figures), force=force)
        _done(quiet, output)


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
    from exporter.text import open_tokenizer, token_windows

    other = None if reference is None else open_model(reference, need_weights=True).graph
    tokenizer = open_tokenizer(checkpoint.path, graph.vocab_size)
    tokens = token_windows(text, tokenizer, context=context, max_windows=max_windows)
    with _step_progress(quiet) as progress:
        found = evaluate_graph(
            graph,
            tokens,
            reference=other,
            device=device,
            progress=progress and (lambda done, total: progress(done, total, "blocks")),
        )
    click.echo(f"perplexity {found.perplexity:.4f} over {found.tokens:,} tokens in windows of {context}")
    if found.reference_perplexity is not None:
        click.echo(f"reference perplexity {found.reference_perplexity:.4f}")
        click.echo(f"KL(reference || model) {found.kl_divergence:.5f} nats per token")
        click.echo(f"top-1 agreement {100 * (found.top1_agreement or 0):.2f} %")
    return found.to_json()


def _evaluate_tasks(model: Path, names: list[str], *, quiet: bool, **options: Any) -> list[dict[str, Any]]:
    """Run tasks, print a table of their metrics and return them."""
    from rich.console import Console
    from rich.table import Table

    from exporter.analysis.tasks import run_tasks

    scores = run_tasks(model, names, progress=not quiet and sys.stderr.isatty(), **options)
    table = Table("task", "metric", "value", "± stderr", "samples", box=None)
    for score in scores:
        stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(score.task, score.metric, f"{score.value:.4f}", stderr, f"{score.samples:,}")
    Console().print(table)
    return [score.to_json() for score in scores]


@main.command()
@model_argument
@plan_option
@click.option("--reference", type=click.Path(path_type=Path), help="Model to compare with, e.g. the untransformed one.")
@click.option("--gpu", "gpu_names", default="h100-sxm", show_default=True, help="One or more of engines/gpus.yaml.")
@click.option("--gpus", "gpus_path", type=click.Path(path_type=Path), help="A hardware file to use instead of it.")
@click.option("--tp", default="8", show_default=True, help="Tensor-parallel sizes: 1,8, or 1..16 for 1,2,4,8,16.")
@click.option("--batch", default="1", show_default=True, help="Sequences side by side, written like --tp.")
@click.option("--context", default=1024, show_default=True, type=click.IntRange(1), help="Tokens per sequence.")
@click.option("--format", "format_name", help="fp8, int8-smoothquant, bfloat16, ...; the model's own if not given.")
@click.option("--kv-cache", type=click.Choice(["fp8", "int8"]), help="A quantized KV cache.")
@click.option("--price-per-gpu-hour", type=click.FloatRange(min=0, min_open=True), help="Also say what tokens cost.")
@click.option(
    "--calibrate", type=click.Path(path_type=Path), help="Fit the constants to this file of `bench`, or rates."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Also write the figures and charts to this folder."
)
@force_option
@quiet_option
def predict(
    model: Path,
    plan_path: Path | None,
    reference: Path | None,
    gpu_names: str,
    gpus_path: Path | None,
    tp: str,
    batch: str,
    context: int,
    format_name: str | None,
    kv_cache: str | None,
    price_per_gpu_hour: float | None,
    calibrate: Path | None,
    output: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Predict decode and prefill latency, memory and what a plan would gain, from structure and hardware alone."""
    from engines import prediction as shown
    from engines.hardware import GPUS, gpu_named, read_gpus
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
    from engines.what_if import plan_gains, sweep
    from exporter.pipeline import apply_plan
    from exporter.plan import read_plan
    from exporter.read import open_model
    from exporter.writers.files import json_bytes, refuse_existing, save_folder

    if output is not None:
        refuse_existing(output, force=force)
    tp_sizes, batches = _sizes(tp, "--tp"), _sizes(batch, "--batch")
    known = read_gpus(gpus_path or GPUS)
    gpus = [gpu_named(name, known) for name in gpu_names.split(",")]
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
    console, constants = _console(), PUBLISHED
    if calibrate is not None:
        observations = read_observations(calibrate, known, gpu=gpus[0] if len(gpus) == 1 else None)
        criterion = criterion_for(observations)
        fit, left_out = fit_constants(observations, criterion), leave_one_out(observations, criterion)
        console.print(shown.fit_table(observations, fit, left_out), shown.fit_text(fit, left_out), "")
        constants = fit.constants
    models = [(name, structure_from_graph(one)) for name, one in graphs.items()]
    placed = [
        Deployment(gpu=gpu, tp_size=size, format=number, constants=constants) for gpu in gpus for size in tp_sizes
    ]
    points = sweep(models, placed, batches=batches, context=context)
    gains = [] if plan is None else plan_gains(graph, plan, placed, Tokens.decode(batches[0], context))
    console.print(shown.assumptions(number, constants, context), "")
    console.print(shown.points_table(points, price_per_gpu_hour), "", shown.parts_table(points), "")
    console.print(shown.memory_table(models, [point for point in points if point.batch == batches[0]], context))
    if gains:
        console.print("", shown.gains_table(gains, placed))
    if output is not None:
        figures = shown.prediction_json(points, gains, placed, price_per_gpu_hour=price_per_gpu_hour)
        files = [("prediction.json", json_bytes(figures)), *prediction_charts(points)]
        details = {"model": str(model), "plan": plan_path and str(plan_path)}
        save_folder(output, files, kind="prediction", details=details, force=force)
        _done(quiet, output)


@main.command()
@model_argument
@click.option("--teacher", required=True, type=click.Path(path_type=Path), help="What to be like: the original model.")
@plan_option
@norm_option
@text_option
@context_option
@click.option("--epochs", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Text passes.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps, instead of --epochs.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Windows per step, in all.")
@click.option("--accumulate", default=1, show_default=True, type=click.IntRange(1), help="Pieces to take them in.")
@click.option(
    "--lr",
    "learning_rate",
    default=1e-4,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Learning rate after the warm-up; a cosine takes it from there to zero.",
)
@click.option("--warmup", type=click.IntRange(0), help="Steps until --lr is reached; one in twenty if not given.")
@click.option("--weight-decay", default=0.0, show_default=True, type=click.FloatRange(0), help="AdamW's, of matrices.")
@click.option(
    "--temperature", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Divides all logits."
)
@click.option(
    "--hidden-weight", default=0.0, show_default=True, type=click.FloatRange(0), help="Of hidden states' loss."
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
@click.option("--resume", type=click.Path(path_type=Path), help="Folder to save the run in, and to go on from.")
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
    """Train a transformed model on the original's logits, and write it as a Hugging Face folder.

    Several GPUs: torchrun --nproc-per-node 8 build.py distill ... --device cuda --resume DIR
    """
    from dataclasses import replace

    from exporter.distill import Settings, steps_of
    from exporter.distill import distill as distill_graph
    from exporter.distill_model import joined_processes
    from exporter.distill_state import remove_run
    from exporter.pipeline import checkpoint_writing, refuse_overlap, source_fingerprint
    from exporter.read import open_model
    from exporter.text import check_same_tokens, open_tokenizer, token_windows
    from exporter.writers.files import json_bytes

    checkpoint, graph = _planned(model, plan_path, norm)
    original = open_model(teacher, need_weights=True)
    for folder in [teacher, *([resume] if resume else [])]:
        refuse_overlap(folder, output)
    checkpoint_writing(checkpoint, graph, output, details={}, force=force)  # what cannot be written is not trained
    tokenizer = open_tokenizer(checkpoint.path, graph.vocab_size)
    check_same_tokens(tokenizer, original.path, original.graph.vocab_size)
    tokens = token_windows(text, tokenizer, context=context, max_windows=max_windows)
    settings = Settings(steps=steps or steps_of(epochs, len(tokens), how["batch"]), **how)
    with joined_processes(device) as processes, _step_progress(quiet or processes.rank > 0) as progress:
        distilled = distill_graph(
            graph,
            original.graph,
            tokens,
            settings,
            blocks=None if layers is None else _blocks(graph, layers),
            processes=processes,
            folder=resume,
            save_every=save_every,
            identity={"model": source_fingerprint(model), "teacher": source_fingerprint(teacher), "norm": norm},
            progress=progress,
        )
    if processes.rank > 0:
        return
    sources = {"model": str(model), "plan": plan_path and str(plan_path), "norm": norm, "teacher": str(teacher)}
    details = {**sources, "text": str(text), "context": context, "blocks": layers, **distilled.summary}
    writing = checkpoint_writing(checkpoint, distilled.graph, output, details=details, force=force)
    record = json_bytes({**details, **distilled.to_json()})
    _carry_out(replace(writing, files={**writing.files, "distill.json": record}), dry_run=False, quiet=quiet)
    if resume is not None:
        remove_run(resume)


@main.command()
@click.option("--arch", default="sm_90", show_default=True, help="The GPU to compile for.")
@click.option("--epsilon", default=1e-5, show_default=True, type=float, help="Of the norm: rms_norm_eps of the model.")
@click.option(
    "--fit",
    type=click.Choice(["even", "aligned", "any"]),
    default="even",
    show_default=True,
    help="What is known of hidden size and width: multiples of 128, of 16, or nothing.",
)
@output_option
@force_option
@quiet_option
def plugin(arch: str, epsilon: float, fit: Any, output: Path, force: bool, quiet: bool) -> None:
    """Compile the kernels of the wide-FFN plugin ahead of time: PTX, cubins and a listing. Needs no GPU."""
    from exporter.writers.files import refuse_existing, save_folder
    from plugins.wide_ffn.aot import compile_variants, variants
    from plugins.wide_ffn.aot_files import files_of, kernels_table

    refuse_existing(output, force=force)
    with _step_progress(quiet) as progress:
        kernels = compile_variants(variants(fit=fit, epsilon=epsilon), arch, progress=progress)
    details = {"op": "wide_ffn", "arch": arch, "epsilon": epsilon, "fit": fit}
    save_folder(output, files_of(kernels), kind="plugin", details=details, force=force)
    if not quiet:
        _console().print(kernels_table(kernels))
    _done(quiet, output)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of all steps; out/<recipe> if not given.")
@quiet_option
def run(recipe: Path, output: Path | None, quiet: bool) -> None:
    """Carry out a recipe; steps that are complete are not repeated."""
    _run(recipe, output or Path("out") / recipe.stem, quiet)


@main.command()
@click.option("-o", "--output", default=Path("out/demo"), show_default=True, type=click.Path(path_type=Path))
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

    with _step_progress(quiet) as progress:
        result = run_recipe(read_recipe(recipe_path), output, notify=notify, bench_progress=progress, note=_note(quiet))
    _done(quiet, result / "report.html" if (result / "report.html").exists() else result)


def _planned(model: Path, plan_path: Path | None, norm: Any, *, need_weights: bool = True) -> tuple[Any, Any]:
    """Open a model and apply the plan, if there is one, to its graph."""
    from exporter.pipeline import apply_plan
    from exporter.plan import read_plan
    from exporter.read import open_model

    checkpoint = open_model(model, need_weights=need_weights)
    graph = checkpoint.graph if plan_path is None else apply_plan(checkpoint.graph, read_plan(plan_path), norm=norm)
    return checkpoint, graph


def _quantized(
    checkpoint: Any,
    graph: Any,
    format_name: str,
    calibration: Path | None,
    kv_cache: str | None,
    *,
    structure_only: bool,
) -> Any:
    """Quantize a graph with a calibration that was kept, or only say what it would look like."""
    from exporter.calibration import read_calibration
    from exporter.passes.quantize_linears import quantize_linears
    from exporter.quantization import read_quantization, recipe_with
    from exporter.quantize import quantize as quantize_graph
    from exporter.ranges import unmeasured_ranges

    recipe = recipe_with(read_quantization(format_name), kv_cache=kv_cache)
    if structure_only:
        return quantize_linears(graph, recipe, unmeasured_ranges(graph))
    if recipe.searches_alpha:
        raise click.UsageError(f"{format_name} needs a text to choose alpha on: use `quantize`, then export its folder")
    known = None if calibration is None else read_calibration(calibration)
    return quantize_graph(graph, recipe, source=checkpoint.graph, calibration=known).graph


def _targets(names: tuple[str, ...]) -> dict[str, Any]:
    """Parse --target values like "tensorrt" or "tensorrt:bfloat16" into target -> dtype."""
    from exporter.dtypes import BY_NAME
    from exporter.writers.onnx import PRESETS

    targets = {}
    for name in names:
        target, _, dtype = name.partition(":")
        if target not in PRESETS or target in targets or dtype not in ("", *BY_NAME):
            raise click.BadParameter(
                f"{name!r} is not one of {', '.join(PRESETS)}, each at most once, with a dtype at most, like "
                "tensorrt:bfloat16",
                param_hint="--target",
            )
        targets[target] = BY_NAME.get(dtype)
    return targets


def _numbers(text: str, option: str, least: int = 1) -> list[int]:
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if min(numbers) < least:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers >= {least}, like 1,4", param_hint=option)
    return numbers


def _share(text: str) -> float:
    """Parse "5%" into 0.05."""
    number = text.removesuffix("%").strip()
    if not re.fullmatch(r"\d+(\.\d+)?", number) or not text.endswith("%"):
        raise click.BadParameter(f"{text!r} is not a share like 5%", param_hint="--fail-on-regression")
    return float(number) / 100


def _model_name(path: Path) -> str:
    """What tables call a model: its folder, or its file without what all of them end in."""
    return path.name.removesuffix(".json").removesuffix(".structure").removesuffix(".config")


def _sizes(text: str, option: str) -> list[int]:
    """Parse a list of numbers, or "1..16" for every doubling from 1 to 16."""
    first, dots, last = text.partition("..")
    if not dots:
        return _numbers(text, option)
    if not first.isdecimal() or not last.isdecimal() or not 1 <= int(first) <= int(last) <= MOST:
        raise click.BadParameter(f"{text!r} is not a range like 1..16", param_hint=option)
    low, high = int(first), int(last)
    return [low << step for step in range((high // low).bit_length())]


def _block_range(graph: Any, layers: str, option: str = "--layers") -> tuple[int, int]:
    """Parse "66-115", source layers, into the first and last index of the blocks that hold them."""
    from exporter.passes.find_blocks import blocks_of_range

    first, _, last = layers.partition("-")
    if not first.isdecimal() or not last.isdecimal():
        raise click.BadParameter(f"{layers!r} is not a range like 66-115", param_hint=option)
    blocks = blocks_of_range(graph, (int(first), int(last)))
    return blocks.start, blocks.stop - 1


def _blocks(graph: Any, layers: str) -> list[int]:
    """Parse "8-14,20-22", source layers, into the indices of the blocks that hold them."""
    ranges = [_block_range(graph, part, "--blocks") for part in layers.split(",")]
    return sorted({index for first, last in ranges for index in range(first, last + 1)})


def _bytes(text: str, option: str = "--shard-size") -> int:
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.rstrip("BKMGTbkmgt")
    unit = text[len(number) :].upper()
    if not number.isdecimal() or int(number) < 1 or unit not in units:
        raise click.BadParameter(f"{text!r} is not a size like 500MB or 5GB", param_hint=option)
    return int(number) * units[unit]


def _refuse_violations(networks: Any, version: Any, plugins: tuple[str, ...]) -> None:
    """Raise what breaks a rule of TensorRT's importer; print what is only a warning."""
    from exporter.writers.onnx_tensorrt_rules import refuse_violations, summary

    warnings = refuse_violations(networks, version, plugins=plugins)
    if warnings:
        click.echo(f"warning: {summary(warnings, version)}", err=True)


def _carry_out(writing: Any, dry_run: bool, quiet: bool) -> None:
    """Save what was prepared (an `exporter.pipeline.Writing`), or list its files."""
    from exporter.pipeline import save

    if dry_run:
        for name, size in writing.plan.items():
            click.echo(f"{size:>16,}  {name}")
        click.echo(f"{writing.total_bytes:>16,}  bytes in all; nothing was written")
        return
    with _byte_progress(quiet, f"writing {writing.output}", writing.total_bytes) as progress:
        save(writing, progress)
    _done(quiet, writing.output)


def _console() -> Any:
    """A terminal as wide as it is; where there is none, wide enough for our tables."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=WIDE)


def _note(quiet: bool) -> Callable[[str], None]:
    """What people should know and no other program reads."""
    return lambda text: None if quiet else click.echo(f"note: {text}", err=True)


def _done(quiet: bool, what: Path) -> None:
    if not quiet:
        click.echo(f"wrote {what}")


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


@contextmanager
def _byte_progress(quiet: bool, text: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A progress bar that is advanced by bytes; nothing where nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(text), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


@contextmanager
def _step_progress(quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar that is told (done, total, what comes next)."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


if __name__ == "__main__":
    main()
