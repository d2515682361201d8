"""Commands from a model to an engine: network definitions, their check, engines, kernels of plugins."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from commands.help import OwnedOption, SettingsCommand
from commands.options import (
    PATH,
    Real,
    dry_run_option,
    force_option,
    model_argument,
    norm_option,
    open_planned,
    options_of,
    output_option,
    plan_option,
    quiet_option,
    refuse_given,
)
from commands.terminal import carry_out, note_printer, say_written, step_progress, wide_console


def _target_options() -> list[click.Option]:
    from exporter.targets import TARGETS, targets_by_setting

    described = "; ".join(f"{name}: {target.description}" for name, target in TARGETS.items())
    names = click.Choice(list(TARGETS))
    target = click.Option(["--to", "target"], type=names, required=True, help=f"What to write. {described}.")
    return [target, *options_of(targets_by_setting())]


_trtllm_option = partial(click.option, cls=OwnedOption, owners=["trtllm"])


@click.command(
    cls=SettingsCommand,
    look_up=_target_options,
    chooser="--to",
    epilog="Example: python build.py export out/8b-fused --to onnx --max-positions 4096 -o out/8b-network",
)
@model_argument
@plan_option
@norm_option
@_trtllm_option("--format", "format_name", help="Quantize on the way: fp8, fp8-rowwise, ... or a recipe file.")
@_trtllm_option("--calibration", type=PATH, help="A calibration of MODEL, for --format.")
@_trtllm_option("--kv-cache", type=click.Choice(["fp8", "int8"]), help="Quantize the KV cache, with --format.")
@_trtllm_option("--list-tensors", is_flag=True, help="With --dry-run, every tensor of every rank.")
@click.option(
    "--check",
    "runtime",
    cls=OwnedOption,
    owners=["onnx"],
    help="Refuse what this runtime would not import: tensorrt, or tensorrt:10.15.",
)
@output_option
@dry_run_option
@force_option
@quiet_option
def export(
    model: Path,
    target: str,
    plan_path: Path | None,
    norm: Any,
    format_name: str | None,
    calibration: Path | None,
    kv_cache: str | None,
    list_tensors: bool,
    runtime: str | None,
    output: Path,
    dry_run: bool,
    force: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Write a network definition, from which `engine` builds.

    A dry run needs no weights: a config.json or a *.structure.json will do.
    """
    from exporter.pipeline import target_writing
    from exporter.settings import record_of
    from exporter.targets import TARGETS
    from exporter.writers.onnx_tensorrt_rules import version_from_text

    _refuse_options_of_others(target)
    if format_name is None:
        refuse_given(("calibration", "kv_cache"), "--format")
    if not dry_run:
        refuse_given(("list_tensors",), "--dry-run")
    version = None if runtime is None else version_from_text(runtime)
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = TARGETS[target].settings(**given)
    details = {"plan": str(plan_path) if plan_path else None, "norm": norm, **record_of(chosen)}
    checkpoint, graph = open_planned(model, plan_path, norm, need_weights=not dry_run)
    if format_name is not None:
        details["format"] = format_name
        graph = _quantized(checkpoint, graph, format_name, calibration, kv_cache, structure_only=dry_run)
    writing = target_writing(target, checkpoint, graph, output, settings=chosen, details=details, force=force)
    if list_tensors:
        _list_tensors(graph, chosen)
    if version is not None:
        _check_networks(writing.files, chosen, version)
    carry_out(writing, dry_run, quiet)


@click.command(epilog="Example: python build.py check out/8b-network --against tensorrt:10.15")
@click.argument("network", type=PATH)
@click.option("--against", "runtime", default="tensorrt", show_default=True, help="tensorrt, or tensorrt:10.15.")
@click.option("--plugin", "plugins", multiple=True, help="An op that a plugin implements there. Repeat it for more.")
def check(network: Path, runtime: str, plugins: tuple[str, ...]) -> None:
    """Check networks against the rules of a runtime's importer.

    NETWORK is a folder that `export` wrote, whose plugins are known, or any .onnx file. No weight is read. The runtime
    need not be installed.
    """
    from exporter.writers.onnx_plugins import plugin_ops
    from exporter.writers.onnx_tensorrt_rules import networks_to_check, version_from_text

    version = version_from_text(runtime)
    files, own_plugins = networks_to_check(network)
    _refuse_violations(files, version, (*plugins, *plugin_ops(own_plugins)))
    click.echo(f"no rule of {runtime} is broken by {', '.join(files)}")


def _backend_options() -> list[click.Option]:
    from engines.backends import BACKENDS, backends_by_setting, describing_backends

    names = click.Choice(list(BACKENDS))
    backend = click.Option(
        ["--backend"], type=names, default="onnxruntime", show_default=True, help="The runtime that is to run it."
    )
    planning = "Print what would be built, and its memory."
    dry_run = OwnedOption(["--dry-run"], owners=describing_backends(), is_flag=True, help=planning)
    return [backend, *options_of(backends_by_setting()), dry_run]


@click.command(
    cls=SettingsCommand,
    look_up=_backend_options,
    chooser="--backend",
    epilog="Example: python build.py engine out/8b-network --label baseline -o out/8b-engine",
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
    """Build an engine from a network definition.

    NETWORK is a folder that `export` wrote; for --backend torch a Hugging Face folder, one that `transform` or
    `quantize` wrote or any other that can be read.
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
        builder = backend_named(backend, chosen, progress)
        builder.build(network, output, label=label, force=force)
    for problem in builder.missing():
        note_printer(quiet)(f"it is built, but this machine cannot run it: {problem}")
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
    """Compile the kernels of the wide-FFN plugin.

    Ahead of time and without a GPU: PTX, cubins and a listing.
    """
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


def _refuse_options_of_others(target: str) -> None:
    """Refuse options that were given and belong to other targets than the one to write."""
    ctx = click.get_current_context()
    foreign: dict[str, list[str]] = {}
    for option in ctx.command.get_params(ctx):
        if isinstance(option, OwnedOption) and target not in option.owners:
            foreign.setdefault(" or ".join(option.owners), []).append(option.name or "")
    for others, names in foreign.items():
        refuse_given(names, f"--to {others}")


def _list_tensors(graph: Any, options: Any) -> None:
    """Print every tensor of every rank of a TensorRT-LLM checkpoint."""
    from exporter.writers.trtllm import tensors_of_ranks

    for file, tensors in tensors_of_ranks(graph, options).items():
        for name, tensor in tensors.items():
            click.echo(f"{tensor.nbytes:>16,}  {file}  {name}  {tensor.dtype}{list(tensor.shape)}")


def _check_networks(files: Mapping[str, Any], settings: Any, version: Any) -> None:
    """Refuse networks that are about to be written, with these settings, if TensorRT would not import them."""
    from exporter.writers.onnx_options import options_from
    from exporter.writers.onnx_plugins import plugin_ops
    from exporter.writers.onnx_tensorrt_rules import files_for_tensorrt

    names = files_for_tensorrt(options_from(settings).networks)
    _refuse_violations({name: files[name] for name in names}, version, plugin_ops(settings.plugins))


def _refuse_violations(networks: Any, version: Any, plugins: tuple[str, ...]) -> None:
    """Raise what breaks a rule of TensorRT's importer; print what is only a warning."""
    from exporter.writers.onnx_tensorrt_rules import refuse_violations, summary

    warnings = refuse_violations(networks, version, plugins=plugins)
    if warnings:
        click.echo(f"warning: {summary(warnings, version)}", err=True)
