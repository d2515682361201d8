"""Commands from a model to an engine: network definitions, their check, engines, kernels of plugins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.options import (
    BYTES,
    NAMES,
    PATH,
    Real,
    dry_run_option,
    force_option,
    model_argument,
    norm_option,
    open_planned,
    output_option,
    plan_option,
    quiet_option,
    refuse_given,
)
from commands.terminal import carry_out, say_written, step_progress, wide_console

if TYPE_CHECKING:
    from engines.settings import Setting


OPTIONS_OF_TARGET = {
    "onnx": ("targets", "max_positions", "batch", "plugins", "runtime"),
    "trtllm": ("tp", "pp", "split_embedding", "format_name", "calibration", "kv_cache", "list_tensors"),
}


@click.command(epilog="Example: python build.py export out/8b-fused --to onnx --max-positions 4096 -o out/8b-network")
@model_argument
@click.option(
    "--to",
    "target_format",
    type=click.Choice(["onnx", "hf", "trtllm"]),
    required=True,
    help="An ONNX network, a Hugging Face folder, or a TensorRT-LLM checkpoint.",
)
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
@click.option(
    "--max-positions",
    type=click.IntRange(1),
    help="onnx: tokens a sequence may reach; as many as the model knows if not given.",
)
@click.option(
    "--batch", type=click.IntRange(1), help="onnx: a fixed number of sequences; the target's, any or 1, if not given."
)
@click.option(
    "--plugins", default=(), type=NAMES, help="onnx: custom ops in place of standard ones; wide_ffn is the only one."
)
@click.option("--tp", default=1, show_default=True, type=click.IntRange(1), help="trtllm: tensor-parallel size.")
@click.option("--pp", default=1, show_default=True, type=click.IntRange(1), help="trtllm: pipeline-parallel size.")
@click.option("--split-embedding", is_flag=True, help="trtllm: every GPU holds a part of the embedding, not all.")
@click.option("--format", "format_name", help="trtllm: quantize on the way: fp8, fp8-rowwise, ... or a recipe file.")
@click.option("--calibration", type=PATH, help="trtllm: a calibration of MODEL, for --format.")
@click.option("--kv-cache", type=click.Choice(["fp8", "int8"]), help="trtllm: quantize the KV cache, with --format.")
@click.option("--list-tensors", is_flag=True, help="trtllm: with --dry-run, every tensor of every rank.")
@click.option(
    "--check", "runtime", help="onnx: refuse what this runtime would not import: tensorrt, or tensorrt:10.15."
)
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
    plugins: tuple[str, ...],
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
    """Write a network definition, from which `engine` builds.

    A dry run to trtllm needs no weights: a config.json or a *.structure.json will do.
    """
    from exporter.pipeline import checkpoint_writing, network_writing, trtllm_writing
    from exporter.writers import onnx_tensorrt_rules, trtllm
    from exporter.writers.onnx_options import options_for
    from exporter.writers.onnx_plugins import plugin_ops

    details: dict[str, Any] = {"plan": str(plan_path) if plan_path else None, "norm": norm}
    for target, options_of_target in OPTIONS_OF_TARGET.items():
        if target != target_format:
            refuse_given(options_of_target, f"--to {target}")
    if format_name is None:
        refuse_given(("calibration", "kv_cache"), "--format")
    if not dry_run:
        refuse_given(("list_tensors",), "--dry-run")
    version = None if runtime is None else onnx_tensorrt_rules.version_from_text(runtime)
    is_structure_enough = dry_run and target_format == "trtllm"
    checkpoint, graph = open_planned(model, plan_path, norm, need_weights=not is_structure_enough)
    if target_format == "trtllm":
        if format_name is not None:
            graph = _quantized(checkpoint, graph, format_name, calibration, kv_cache, structure_only=dry_run)
        options = trtllm.Options(tp_size=tp, pp_size=pp, split_embedding=split_embedding)
        details |= {"tp": tp, "pp": pp, "format": format_name}
        writing = trtllm_writing(checkpoint, graph, output, options=options, details=details, force=force)
        if list_tensors:
            for file, tensors in trtllm.tensors_of_ranks(graph, options).items():
                for name, tensor in tensors.items():
                    click.echo(f"{tensor.nbytes:>16,}  {file}  {name}  {tensor.dtype}{list(tensor.shape)}")
    elif target_format == "hf":
        writing = checkpoint_writing(checkpoint, graph, output, details=details, force=force)
    else:
        variants = options_for(_targets(targets), max_positions=max_positions, batch=batch, plugins=plugins)
        writing = network_writing(checkpoint, graph, output, options=variants, details=details, force=force)
        if version is not None:
            files = onnx_tensorrt_rules.files_for_tensorrt(variants.networks)
            _refuse_violations({file: writing.files[file] for file in files}, version, plugin_ops(plugins))
    carry_out(writing, dry_run, quiet)


@click.command(epilog="Example: python build.py check out/8b-network --against tensorrt:10.15")
@click.argument("network", type=PATH)
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


class BackendCommand(click.Command):
    """Has an option for whatever the backends let users choose; looked up when the command runs or prints its help."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        argument, *options = super().get_params(ctx)
        return [argument, *_backend_options(), *options]


def _backend_options() -> list[click.Option]:
    from engines.backends import BACKENDS, backends_by_setting, describing_backends

    names = click.Choice(list(BACKENDS))
    backend = click.Option(
        ["--backend"], type=names, default="onnxruntime", show_default=True, help="The runtime that is to run it."
    )
    chosen = [_option_of(setting, owners) for setting, owners in backends_by_setting().items()]
    planning = ", ".join(describing_backends())
    dry_run = click.Option(["--dry-run"], is_flag=True, help=f"{planning}: print what would be built, and its memory.")
    return [backend, *chosen, dry_run]


def _option_of(setting: Setting, backends: list[str]) -> click.Option:
    """The option of a setting; its value is None if it is not given."""
    how: dict[str, Any] = {"type": setting.type}
    if setting.choices:
        values = {str(value): value for value in setting.choices}
        how = {"type": click.Choice(list(values)), "callback": lambda ctx, option, text: text and values[text]}
    elif setting.type is bool:
        how = {"is_flag": True}
    elif setting.in_bytes:
        how = {"type": BYTES}
    elif setting.type is int:
        how = {"type": click.IntRange(setting.least, setting.most)}
    elif setting.type is Path:
        how = {"type": PATH}
    elif setting.type is tuple:
        how = {"type": NAMES}
    return click.Option(
        [f"--{setting.option}", setting.name], default=None, help=f"{', '.join(backends)}: {setting.help}", **how
    )


@click.command(
    cls=BackendCommand, epilog="Example: python build.py engine out/8b-network --label baseline -o out/8b-engine"
)
@click.argument("network", type=PATH)
@click.option("--label", help="What reports call it; the folder's name if not given.")
@output_option
@force_option
@quiet_option
def engine(
    network: Path,
    backend: str,
    dry_run: bool,
    label: str | None,
    output: Path,
    force: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Build an engine from a network definition: a folder that `export` wrote.

    For --backend torch NETWORK is a Hugging Face folder instead, one that `transform` or `quantize` wrote or any other
    that can be read.
    """
    from engines.backends import backend_named, describe_build, tells_progress
    from engines.results import engine_label
    from exporter.pipeline import refuse_overlap

    chosen = {name: value for name, value in settings.items() if value is not None}
    if dry_run:
        click.echo(describe_build(backend, network, output, chosen))
        return
    label = engine_label(label, output)
    refuse_overlap(network, output)
    with step_progress(quiet or not tells_progress(backend)) as progress:
        backend_named(backend, chosen, progress).build(network, output, label=label, force=force)
    say_written(quiet, output)


@click.command(epilog="Example: python build.py plugin --arch sm_90 -o out/plugin")
@click.option("--arch", default="sm_90", show_default=True, help="The GPU to compile for.")
@click.option(
    "--epsilon",
    default=1e-5,
    show_default=True,
    type=Real(0, min_open=True),
    help="Of the norm: rms_norm_eps of the model.",
)
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
    with step_progress(quiet) as progress:
        kernels = compile_variants(variants(fit=fit, epsilon=epsilon), arch, progress=progress)
    details = {"op": "wide_ffn", "arch": arch, "epsilon": epsilon, "fit": fit}
    save_folder(output, files_of(kernels), kind="plugin", details=details, force=force)
    if not quiet:
        wide_console().print(kernels_table(kernels))
    say_written(quiet, output)


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
    from exporter.passes.quantize_linears import structure_quantized
    from exporter.quantization import read_quantization, recipe_with
    from exporter.quantize import quantize as quantize_graph

    recipe = recipe_with(read_quantization(format_name), kv_cache=kv_cache)
    if structure_only:
        return structure_quantized(graph, recipe)
    if recipe.searches_alpha:
        raise click.UsageError(f"{format_name} needs a text to choose alpha on: use `quantize`, then export its folder")
    known = None if calibration is None else read_calibration(calibration)
    return quantize_graph(graph, recipe, source=checkpoint.graph, calibration=known).graph


def _targets(names: tuple[str, ...]) -> dict[str, Any]:
    """Parse --target values like "tensorrt" or "tensorrt:bfloat16" into target -> dtype."""
    from exporter.dtypes import BY_NAME
    from exporter.writers.onnx_options import PRESETS

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


def _refuse_violations(networks: Any, version: Any, plugins: tuple[str, ...]) -> None:
    """Raise what breaks a rule of TensorRT's importer; print what is only a warning."""
    from exporter.writers.onnx_tensorrt_rules import refuse_violations, summary

    warnings = refuse_violations(networks, version, plugins=plugins)
    if warnings:
        click.echo(f"warning: {summary(warnings, version)}", err=True)
