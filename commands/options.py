"""Options that several commands share, and what is written in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from commands.help import OwnedOption

if TYPE_CHECKING:
    from exporter.settings import Setting

MOST = 1 << 20  # GPUs, or sequences, that are predicted
LEAST_SHARD = 10**6  # bytes: with less, every tensor of a real model would lie in a file of its own


class Written(click.ParamType):
    """A value with a way of its own to be written; `parse` raises ValueError, which says what is wrong."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name  # in capitals, what help shows for the value
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Real(click.FloatRange):
    """A finite number within bounds; NaN is beyond none of them, as it compares."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def _numbers(text: str, least: int = 1) -> list[int]:
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if min(numbers) < least:
        raise ValueError(f"{text!r} is not a list of whole numbers >= {least}, like 1,4")
    return numbers


class SizeRange(list[int]):
    """Sizes that were not named one by one: one that a model cannot have may be left out."""


def _sizes(text: str) -> list[int]:
    first, dots, last = text.partition("..")
    if not dots:
        return _numbers(text)
    if not first.isdecimal() or not last.isdecimal() or not 1 <= int(first) <= int(last) <= MOST:
        raise ValueError(f"{text!r} is not a range like 1..16")
    low, high = int(first), int(last)
    return SizeRange(low << step for step in range((high // low).bit_length()))


def _bytes(text: str) -> int:
    from exporter.settings import bytes_from_text

    return bytes_from_text(text)


def _shard_bytes(text: str) -> int:
    nbytes = _bytes(text)
    if nbytes < LEAST_SHARD:
        raise ValueError(f"{text!r} is {nbytes:,} bytes; give at least 1MB, e.g. 500MB or 5GB")
    return nbytes


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError(f"{text!r} is not a list of names with commas in between")
    return names


PATH = click.Path(path_type=Path)
NUMBERS = Written("numbers", _numbers)  # 1,4
INDICES = Written("numbers", lambda text: _numbers(text, least=0))  # 0,1
SIZES = Written("numbers", _sizes)  # 1,8, or 1..16 for every doubling from 1 to 16
BYTES = Written("size", _bytes)  # 500MB
NAMES = Written("names", _names)  # vllm,llama.cpp

model_argument = click.argument("model", type=PATH)
output_option = click.option("-o", "--output", required=True, type=PATH, help="Where the result goes; must not exist.")
force_option = click.option("--force", is_flag=True, help="Replace an output that Fuselage wrote earlier.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress bar and no closing words.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Check everything, list the files, write nothing.")
plan_option = click.option("--plan", "plan_path", type=PATH, help="YAML: drop_attention, drop_ffn, fuse, parallel.")
norm_option = click.option(
    "--norm",
    type=click.Choice(["fold", "last"]),
    default="fold",
    show_default=True,
    help="Fused FFNs: fold each layer's own norm into its weights, or use the last layer's norm (the paper).",
)
text_option = click.option("--text", required=True, type=PATH, help='Text file, or .jsonl with a "text" per line.')
shard_size_option = click.option(
    "--shard-size",
    "shard_bytes",
    default="5GB",
    show_default=True,
    type=Written("size", _shard_bytes),
    help="Largest weight file, e.g. 500MB or 5GB; at least 1MB.",
)
readers_option = click.option(
    "--check-for", "readers", default=(), type=NAMES, help="Refuse what these would reject or get wrong: vllm,..."
)


def context_option(command: Callable[..., None]) -> Callable[..., None]:
    """How much of the text, in windows of which length."""
    command = click.option(
        "--max-windows", type=click.IntRange(1), help="Use at most so many windows; all if not given."
    )(command)
    return click.option(
        "--context", default=512, show_default=True, type=click.IntRange(2), help="Tokens per window of text."
    )(command)


results_option = click.option("-o", "--output", required=True, type=PATH, help="Results file (JSON); must not exist.")
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Where to run the model: cpu, cuda, or cuda:1 of several GPUs."
)


def refuse_given(names: Collection[str], owner: str) -> None:
    """Refuse options of the command at work that were given and mean nothing without their owner.

    Args:
        names: of the options' parameters.
    """
    ctx = click.get_current_context()
    given = [
        option.opts[-1]
        for option in ctx.command.get_params(ctx)
        if option.name in names and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"{', '.join(given)} {'belongs' if len(given) == 1 else 'belong'} to {owner}.")


def options_of(owners_by_setting: Mapping[Setting, Collection[str]]) -> list[click.Option]:
    """The options of settings; the value of one that is not given is None."""
    return [_option_of(setting, owners) for setting, owners in owners_by_setting.items()]


def _option_of(setting: Setting, owners: Collection[str]) -> click.Option:
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
    elif setting.is_repeated:
        how = {"multiple": True, "callback": lambda ctx, option, texts: texts or None}
    elif setting.type is tuple:
        how = {"type": NAMES}
    text = setting.help[0].upper() + setting.help[1:]
    return OwnedOption([f"--{setting.option}", setting.name], owners=owners, default=None, help=text, **how)


def open_planned(model: Path, plan_path: Path | None, norm: Any, *, need_weights: bool = True) -> tuple[Any, Any]:
    """Open a model and apply the plan, if there is one, to its graph."""
    from exporter.errors import PlanError
    from exporter.pipeline import apply_plan
    from exporter.plan import read_plan
    from exporter.read import open_model

    checkpoint = open_model(model, need_weights=need_weights)
    if plan_path is None:
        return checkpoint, checkpoint.graph
    try:
        return checkpoint, apply_plan(checkpoint.graph, read_plan(plan_path), norm=norm)
    except PlanError as error:
        error.file = error.file or plan_path
        raise


def block_range_from_text(graph: Any, layers: str, option: str = "--layers") -> tuple[int, int]:
    """Parse "66-115", source layers, into the first and last index of the blocks that hold them."""
    from exporter.passes.find_blocks import blocks_of_range

    first, _, last = layers.partition("-")
    if not first.isdecimal() or not last.isdecimal():
        raise click.BadParameter(f"{layers!r} is not a range like 66-115", param_hint=option)
    blocks = blocks_of_range(graph, (int(first), int(last)))
    return blocks.start, blocks.stop - 1


def blocks_from_text(graph: Any, layers: str) -> list[int]:
    """Parse "8-14,20-22", source layers, into the indices of the blocks that hold them."""
    ranges = [block_range_from_text(graph, part, "--blocks") for part in layers.split(",")]
    return sorted({index for first, last in ranges for index in range(first, last + 1)})
