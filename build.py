"""The command line: `python build.py COMMAND`. Options, the order of calls, exit codes.

Exit codes: 0 done; 1 a bug (with its traceback); 2 bad input, a refused request, or something missing on this machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from exporter.errors import FuselageError

DEMO_RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"

model_argument = click.argument("model", type=click.Path(path_type=Path))
output_option = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the result goes; must not exist."
)
force_option = click.option("--force", is_flag=True, help="Replace an output that Fuselage wrote earlier.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress bar and no closing words.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Check everything, list the files, write nothing.")
plan_option = click.option(
    "--plan", "plan_path", type=click.Path(path_type=Path), help="YAML: drop_attention, fuse, parallel."
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
@click.option("--to", "target_format", type=click.Choice(["onnx", "hf"]), required=True, help="Kind of network.")
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
    output: Path,
    dry_run: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Write a network definition."""
    from exporter.pipeline import checkpoint_writing, network_writing
    from exporter.writers.onnx import options_for

    checkpoint, graph = _planned(model, plan_path, norm)
    details = {"plan": str(plan_path) if plan_path else None, "norm": norm}
    if target_format == "hf":
        writing = checkpoint_writing(checkpoint, graph, output, details=details, force=force)
    else:
        options = options_for(_targets(targets), max_positions=max_positions, batch=batch)
        writing = network_writing(checkpoint, graph, output, options=options, details=details, force=force)
    _carry_out(writing, dry_run, quiet)


@main.command()
@click.argument("network", type=click.Path(path_type=Path))
@click.option("--backend", default="onnxruntime", show_default=True, help="The runtime that is to run it.")
@click.option("--label", help="What reports call it; the folder's name if not given.")
@output_option
@force_option
@quiet_option
def engine(network: Path, backend: str, label: str | None, output: Path, force: bool, quiet: bool) -> None:
    """Build an engine from a network definition."""
    from engines.backends import backend_named

    backend_named(backend).build(network, output, label=label, force=force)
    _done(quiet, output)


@main.command()
@click.argument("engines", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batch", default="1", show_default=True, help="Sequences side by side, e.g. 1,4.")
@click.option("--input-len", default="64", show_default=True, help="Prompt tokens, e.g. 64,512.")
@click.option("--output-len", default="32", show_default=True, help="Generated tokens.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Kept requests per combination.")
@click.option("--warmup", default=1, show_default=True, type=click.IntRange(0), help="Requests before those.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each runtime.")
@click.option("--cpus", help="CPUs that each runtime is pinned to, e.g. 0,1; as many as threads if not given.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the input tokens.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Results file (JSON).")
@force_option
@quiet_option
def bench(
    engines: tuple[Path, ...],
    batch: str,
    input_len: str,
    output_len: str,
    rounds: int,
    warmup: int,
    threads: int | None,
    cpus: str | None,
    seed: int,
    output: Path,
    force: bool,
    quiet: bool,
) -> None:
    """Time engines against each other; the first is the baseline. Rounds are interleaved."""
    from engines.bench import bench_engines, request_grid
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
        )
    save_file(output, json_from_results(results), force=force)
    _done(quiet, output)


@main.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--baseline", help="Label of the engine that ratios refer to; the first if not given.")
@click.option("--title", help="Headline of the report.")
@output_option
@force_option
@quiet_option
def report(
    results: tuple[Path, ...], baseline: str | None, title: str | None, output: Path, force: bool, quiet: bool
) -> None:
    """Compare results side by side: HTML, Markdown, pictures."""
    from engines.report import report_from_results
    from exporter.writers.files import save_folder

    files = report_from_results(results, baseline=baseline, title=title)
    save_folder(output, files, kind="report", details={"results": [str(path) for path in results]}, force=force)
    _done(quiet, output / "report.html")


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
    files = analysis_files(checkpoint.graph, dependency, suggestion, constraints=constraints, source=source)
    details = {"model": str(model), "text": str(text), "context": context}
    save_folder(output, files, kind="analysis", details=details, force=force)
    _done(quiet, output)


@main.command()
@model_argument
@click.option("--reference", type=click.Path(path_type=Path), help="Model to compare with, e.g. the untransformed one.")
@plan_option
@norm_option
@text_option
@context_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write all figures to this JSON file.")
@force_option
@quiet_option
def evaluate(
    model: Path,
    reference: Path | None,
    plan_path: Path | None,
    norm: Any,
    text: Path,
    context: int,
    max_windows: int | None,
    output: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Measure perplexity on a text; with a reference also KL divergence and top-1 agreement."""
    from exporter.analysis.evaluate import evaluate as evaluate_graph
    from exporter.read import open_model
    from exporter.text import open_tokenizer, token_windows
    from exporter.writers.files import json_bytes, refuse_existing_file, save_file

    if output is not None:
        refuse_existing_file(output, force=force)
    checkpoint, graph = _planned(model, plan_path, norm)
    other = None if reference is None else open_model(reference, need_weights=True).graph
    tokenizer = open_tokenizer(checkpoint.path, graph.vocab_size)
    tokens = token_windows(text, tokenizer, context=context, max_windows=max_windows)
    with _step_progress(quiet) as progress:
        found = evaluate_graph(
            graph,
            tokens,
            reference=other,
            progress=progress and (lambda done, total: progress(done, total, "blocks")),
        )
    click.echo(f"perplexity {found.perplexity:.4f} over {found.tokens:,} tokens in windows of {context}")
    if found.reference_perplexity is not None:
        click.echo(f"reference perplexity {found.reference_perplexity:.4f}")
        click.echo(f"KL(reference || model) {found.kl_divergence:.5f} nats per token")
        click.echo(f"top-1 agreement {100 * (found.top1_agreement or 0):.2f} %")
    if output is not None:
        figures = {
            "model": str(model),
            "reference": reference and str(reference),
            "text": str(text),
            "context": context,
        }
        save_file(output, json_bytes({**figures, **found.to_json()}), force=force)
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
    """Run the recipe of the bundled model: baseline, attention dropped, FFNs fused."""
    _run(DEMO_RECIPE, output, quiet)


def _run(recipe_path: Path, output: Path, quiet: bool) -> None:
    from engines.run import run_recipe
    from exporter.recipe import read_recipe

    def notify(step: str, made: bool) -> None:
        if not quiet:
            click.echo(f"{'made' if made else 'kept'}  {step}")

    with _step_progress(quiet) as progress:
        result = run_recipe(read_recipe(recipe_path), output, notify=notify, bench_progress=progress)
    _done(quiet, result / "report.html" if (result / "report.html").exists() else result)


def _planned(model: Path, plan_path: Path | None, norm: Any, *, need_weights: bool = True) -> tuple[Any, Any]:
    """Open a model and apply the plan, if there is one, to its graph."""
    from exporter.pipeline import apply_plan
    from exporter.plan import read_plan
    from exporter.read import open_model

    checkpoint = open_model(model, need_weights=need_weights)
    graph = checkpoint.graph if plan_path is None else apply_plan(checkpoint.graph, read_plan(plan_path), norm=norm)
    return checkpoint, graph


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


def _block_range(graph: Any, layers: str) -> tuple[int, int]:
    """Parse "66-115", source layers, into the first and last index of the blocks that hold them."""
    from exporter.passes.find_blocks import blocks_of_range

    first, _, last = layers.partition("-")
    if not first.isdecimal() or not last.isdecimal():
        raise click.BadParameter(f"{layers!r} is not a range like 66-115", param_hint="--layers")
    blocks = blocks_of_range(graph, (int(first), int(last)))
    return blocks.start, blocks.stop - 1


def _bytes(text: str, option: str = "--shard-size") -> int:
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.rstrip("BKMGTbkmgt")
    unit = text[len(number) :].upper()
    if not number.isdecimal() or int(number) < 1 or unit not in units:
        raise click.BadParameter(f"{text!r} is not a size like 500MB or 5GB", param_hint=option)
    return int(number) * units[unit]


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


def _done(quiet: bool, what: Path) -> None:
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
