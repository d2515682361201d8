"""Compiled kernels as files, and as a table to look at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from plugins.wide_ffn.aot import CompiledKernel, Variant

LISTING = "kernels.json"
GRIDS = {"norm": "(tokens, 1, 1)", "gate_up": "(programs, 1, 1)", "down": "(ceil(hidden / rows), splits, 1)"}
_SHAPE = re.compile(r"m\d+n\d+k\d+")


def files_of(kernels: Sequence[CompiledKernel]) -> Iterator[tuple[str, bytes]]:
    """The listing, and for every kernel its PTX and its cubin."""
    yield LISTING, (json.dumps([_row(kernel) for kernel in kernels], indent=2) + "\n").encode()
    for kernel in kernels:
        yield f"{kernel.name}.ptx", kernel.ptx.encode()
        yield f"{kernel.name}.cubin", kernel.cubin


def _row(kernel: CompiledKernel) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "entry": kernel.entry,
        **asdict(kernel.variant),
        "arguments": [list(argument) for argument in kernel.arguments],
        "grid": GRIDS[kernel.variant.kernel],
        "threads": 32 * kernel.warps,
        "shared_bytes": kernel.shared_bytes,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "tensor_core_instructions": list(kernel.tensor_core_instructions),
        "performance_losses": list(kernel.performance_losses),
        "step_instructions": kernel.step_instructions,
        "step_bytes": kernel.variant.step_bytes,
    }


def kernels_table(kernels: Sequence[CompiledKernel]) -> Table:
    """One row per kernel; "issue" is `CompiledKernel.issue_share`, "KiB" are of shared memory."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("kernel", "weights, activations, scale"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "warps", "KiB", "registers", "spills", "issue"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tensor cores", no_wrap=True)
    for kernel in kernels:
        variant, share = kernel.variant, kernel.issue_share
        table.add_row(
            _title(variant),
            f"{variant.weights} {variant.activations} {variant.scale}",
            "any" if variant.kernel == "norm" else str(variant.tokens),
            str(kernel.warps),
            f"{kernel.shared_bytes / 1024:.0f}",
            str(kernel.registers),
            str(kernel.spill_bytes),
            "" if share is None else f"{share:.0%}",
            " ".join(f"{name.partition('.')[0]} {_SHAPE.findall(name)[0]}" for name in kernel.tensor_core_instructions),
        )
    return table


def _title(variant: Variant) -> str:
    if variant.kernel == "norm":
        return f"norm of <= {variant.tiling.depth}"
    if variant.kernel == "gate_up":
        return "gate_up" if variant.norm == "before" else "gate_up with norm"
    return "down with residual" if variant.residual else "down"
