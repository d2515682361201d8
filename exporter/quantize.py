"""From a graph and a text to a quantized graph: calibrate, smooth, put codes in; and the report of what that cost."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.analysis.pictures import error_bars
from exporter.analysis.quantization import (
    LinearError,
    SmoothingCell,
    compare_smoothing,
    linear_errors,
    search_strengths,
    to_json,
)
from exporter.calibration import Calibration, CalibrationError, check_belongs, ranges_of
from exporter.graph import ModelGraph, linears
from exporter.manifests import ERRORS_FILE
from exporter.passes.quantize_linears import quantize_linears
from exporter.passes.smooth_channels import Strengths, smooth_channels, smoothable_sites
from exporter.quantization import QuantizationRecipe
from exporter.ranges import SITE_OF, Ranges
from exporter.writers.files import json_bytes

if TYPE_CHECKING:
    from rich.table import Table

HEADERS = ("linear", "output error", "SQNR", "inputs clipped")
SEARCH_WINDOWS = 4  # how many windows the search for alpha looks at

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, what comes next)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A quantized graph and what it was made from."""

    graph: ModelGraph
    smoothed: ModelGraph  # before rounding; the graph itself where nothing was smoothed
    strengths: Strengths
    ranges: Ranges | None  # of the graph that was given


def split_windows(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows to calibrate on, and others to choose alpha on: on their own text, ranges look better than they are."""
    aside = min(SEARCH_WINDOWS, len(tokens) // 4)
    if aside == 0:
        return tokens, tokens
    return tokens[:-aside], tokens[-aside:]


def quantize(
    graph: ModelGraph,
    recipe: QuantizationRecipe,
    *,
    source: ModelGraph | None = None,
    calibration: Calibration | None = None,
    tokens: np.ndarray | None = None,
    strengths: Strengths | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a graph as a recipe says.

    Args:
        source: what the graph was made from, if the calibration is of that.
        calibration: needed for static scales, smoothing and the KV cache.
        tokens: int64 [N, S], needed to search for alpha: windows that the calibration did not see.
        strengths: what a search found before; None: search, if the recipe says so.

    Raises:
        CalibrationError: the calibration is of another model, or lacks a site.
        PlanError: something is needed and missing, or a pattern matches nothing.
    """
    ranges = None
    if calibration is not None:
        check_belongs(calibration, graph, *([] if source is None else [source]))
        ranges = ranges_of(calibration, graph)
        _check_inputs(ranges, graph, recipe)
    smoothed, of_smoothed = graph, ranges
    found: Strengths = {} if strengths is None else strengths
    if recipe.smoothing is not None and ranges is not None:
        if recipe.smoothing.alpha != "search":
            read = {site for site, _ in _sites_read(graph, recipe)}
            found = dict.fromkeys((site for site in smoothable_sites(graph) if site in read), recipe.smoothing.alpha)
        elif strengths is None:
            if tokens is None:
                raise AssertionError("Bug: a search for alpha without text")
            found = search_strengths(graph, ranges, recipe, tokens, device=device, progress=_telling(progress, "alpha"))
        smoothed, of_smoothed = smooth_channels(graph, ranges, found)
    return Quantized(
        graph=quantize_linears(smoothed, recipe, of_smoothed), smoothed=smoothed, strengths=found, ranges=ranges
    )


def _sites_read(graph: ModelGraph, recipe: QuantizationRecipe) -> Iterator[tuple[tuple[int, str, str], bool]]:
    """Yield the site of every linear that a recipe quantizes, and whether its scale is static."""
    for index, block in enumerate(graph.flat_blocks):
        for name, sublayer in (("attention", block.attention), ("ffn", block.ffn)):
            for reader in linears(sublayer) if sublayer is not None else ():
                wanted = recipe.format_of(f"blocks.{index}.{name}.{reader}")
                if wanted is not None:
                    yield (index, name, SITE_OF[reader]), wanted.inputs is not None and wanted.inputs.scale == "tensor"


def _check_inputs(ranges: Ranges, graph: ModelGraph, recipe: QuantizationRecipe) -> None:
    """Raise CalibrationError if a static scale would be that of an input that was zero throughout."""
    for (index, name, site), is_static in _sites_read(graph, recipe):
        if is_static and not getattr(ranges[index], name)[site].numpy().any():
            raise CalibrationError(
                f"the range of blocks.{index}.{name}.{site} is zero in all channels",
                block=index,
                found=0.0,
                hint="a dead input has no scale: calibrate on more text, or exclude the linears that read it",
            )


def error_files(
    quantized: Quantized,
    plain: ModelGraph,
    tokens: np.ndarray,
    *,
    source: str,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, bytes]:
    """Measure what quantization did to every linear, and to wide FFNs under every scheme; returns the report's files.

    Args:
        plain: the graph before smoothing.
        tokens: int64 [N, S], best of windows that the calibration did not see.
        source: where the text comes from, one line.
    """
    errors = linear_errors(
        quantized.smoothed, quantized.graph, tokens, device=device, progress=_telling(progress, "errors")
    )
    cells = []
    if quantized.ranges is not None:
        cells = compare_smoothing(
            plain, quantized.ranges, tokens, device=device, progress=_telling(progress, "schemes of wide FFNs")
        )
    described = {
        "source": source,
        "tokens": tokens.size,
        "linears": to_json(errors),
        "smoothing": to_json(cells),
        "alpha": {
            f"blocks.{index}.{sublayer}.{site}": alpha for (index, sublayer, site), alpha in quantized.strengths.items()
        },
    }
    return {
        ERRORS_FILE: json_bytes(described),
        "errors.csv": _csv(errors),
        "errors.md": _markdown(errors, cells, source).encode(),
        "errors.png": error_bars([(error.name, error.relative_error) for error in errors], title=source),
    }


def _telling(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(done, total, what)


def strengths_from_errors(described: Mapping[str, Any]) -> Strengths:
    """The strengths that `errors.json` holds."""
    found = {}
    for name, alpha in described["alpha"].items():
        _, index, sublayer, site = name.split(".")
        found[int(index), sublayer, site] = float(alpha)
    return found


def _csv(errors: Sequence[LinearError]) -> bytes:
    out = io.StringIO()
    rows: list[dict[str, Any]] = to_json(errors)
    writer = csv.DictWriter(out, LinearError.__slots__, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def errors_table(errors: Sequence[LinearError], count: int | None = None) -> list[tuple[str, str, str, str]]:
    """The worst linears as text, under `HEADERS`."""
    return [
        (
            error.name,
            f"{100 * error.relative_error:.2f} %",
            "" if error.sqnr_db is None else f"{error.sqnr_db:.1f} dB",
            "" if error.saturation is None else f"{100 * error.saturation:.4f} %",
        )
        for error in errors[:count]
    ]


def errors_summary(files: Mapping[str, bytes], count: int = 8) -> Table:
    """The linears that lose most, of the files of `error_files`, for a terminal."""
    from rich.table import Table

    errors = [LinearError(**error) for error in json.loads(files[ERRORS_FILE])["linears"]]
    table = Table(HEADERS[0], box=None, pad_edge=False, header_style="dim")
    for header in HEADERS[1:]:
        table.add_column(header, justify="right")
    for row in errors_table(errors, count):
        table.add_row(*row)
    return table


def _markdown(errors: Sequence[LinearError], cells: Sequence[SmoothingCell], source: str) -> str:
    lines = [f"# Quantization error, {source}", ""]
    lines += [f"| {' | '.join(HEADERS)} |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in errors_table(errors)]
    for block in dict.fromkeys(cell.block for cell in cells):
        own = [cell for cell in cells if cell.block == block]
        smoothings = list(dict.fromkeys(cell.smoothing for cell in own))
        lines += ["", f"## Wide FFN of block {block}: output error by scheme and smoothing", ""]
        lines += [f"| | {' | '.join(smoothings)} |", f"|---|{'---:|' * len(smoothings)}"]
        for scheme in dict.fromkeys(cell.scheme for cell in own):
            found = {cell.smoothing: cell.relative_error for cell in own if cell.scheme == scheme}
            lines.append(f"| {scheme} | {' | '.join(f'{100 * found[name]:.2f} %' for name in smoothings)} |")
    return "\n".join(lines) + "\n"
