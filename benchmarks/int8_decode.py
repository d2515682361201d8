"""Decode and prefill of our INT8 engines on a CPU against our float32 engine and GenAI's INT8 model, one weight set.

    python benchmarks/int8_decode.py [--batch 1] [--rounds 40] [-o benchmarks/results/int8_decode.json]

Two Llamas with random weights: that of `compare_decode.py` (hidden_size 1024, intermediate_size 2816, 12 layers, 16 / 4
heads) and a wider one (2048, 8192, 8 layers, 32 / 8 heads), both with a vocabulary of 8192. The head is quantized, too,
as GenAI's builder does it; our recipes leave it alone unless told otherwise. Contestants, measured as
`compare_decode.py` says:

    fuselage               float32
    int8-static            weights per output channel, inputs under one calibrated scale (the head's: per token): W8A8
    int8-token             the same with a scale per token, found while it runs
    int8-weight-only       weights per output channel; ONNX Runtime's kernel rounds inputs in blocks of 256 channels
    int8-...-float-head    the recipes as they are shipped, head in float32
    genai-int8             what onnxruntime_genai.models.builder makes with `-p int8`, in GenAI's own Generator loop:
                           weights in blocks of 32, and the same kernel as our weight-only engine
    genai-graph-int8       the same graph in plain ONNX Runtime, cache bound in place

Reported: how many times as fast as our float32 engine each one is, the median over all turns and of each load alone.
Random weights say nothing about accuracy, so none is given.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare_decode import (
    MID,
    VOCAB,
    Field,
    Fuselage,
    Genai,
    GenaiGraph,
    Sizes,
    Tables,
    argument_parser,
    document,
    fuselage_engine,
    genai_model,
    installed,
    make_checkpoint,
    measure_all,
    ratios_by_load,
    write,
)

from engines.onnxruntime import OnnxRuntime
from exporter.calibration import calibrate, ranges_of
from exporter.passes.quantize_linears import quantize_linears
from exporter.quantization import InputFormat, Override, QuantizationRecipe, read_quantization
from exporter.read import open_model
from exporter.writers import onnx
from exporter.writers.files import save_folder

WIDE = Sizes(2048, 8192, 8, 32, 8)
SIZES = {"mid": MID, "wide": WIDE}
FORMATS = {
    "int8-static": "int8-smoothquant",
    "int8-token": "int8-smoothquant-token",
    "int8-weight-only": "int8-weight-only",
    "int8-static-float-head": "int8-smoothquant",
    "int8-weight-only-float-head": "int8-weight-only",
}
TARGETS = {"int8-static": 2.4, "int8-weight-only": 3.0}  # decode at batch 1: times as fast as float32, at least


class Quantized(Fuselage):
    """Our engine in one of `FORMATS`."""

    def __init__(self, checkpoint: Path, work: Path, threads: int, *, name: str) -> None:
        self.name = name
        self._runner = OnnxRuntime().open(quantized_engine(checkpoint, work, name), threads=threads)


class GenaiInt8(Genai):
    name = "genai-int8"
    precision = "int8"


class GenaiGraphInt8(GenaiGraph):
    name = "genai-graph-int8"
    precision = "int8"


CONTESTANTS: Field = {
    "fuselage": (Fuselage, None),
    **{name: (partial(Quantized, name=name), None) for name in FORMATS},
    "genai-int8": (GenaiInt8, "onnxruntime_genai"),
    "genai-graph-int8": (GenaiGraphInt8, "onnxruntime_genai"),
}


def recipe_with_head(name: str) -> QuantizationRecipe:
    """A recipe of ours that also quantizes the head, whose input no calibration sees: per token, not static."""
    recipe = read_quantization(name)
    update: dict[str, Any] = {"include": ["lm_head"]}
    if recipe.inputs is not None:
        update["overrides"] = [Override(match="lm_head", inputs=InputFormat(dtype="int8", scale="token"))]
    return recipe.model_copy(update=update)


def quantized_engine(checkpoint: Path, work: Path, name: str) -> Path:
    """Calibrate on random tokens, export and build once; returns the engine."""
    output = work / f"engine-{name}"
    if not output.exists():
        graph = open_model(checkpoint, need_weights=True).graph
        tokens = np.random.default_rng(0).integers(0, VOCAB, (4, 64))
        ranges = ranges_of(calibrate(graph, tokens, text="random tokens"), graph)
        recipe = read_quantization(FORMATS[name]) if name.endswith("-float-head") else recipe_with_head(FORMATS[name])
        quantized = quantize_linears(graph, recipe, ranges)
        network = work / f"network-{name}"
        save_folder(network, onnx.emit(quantized, onnx.PRESETS["onnxruntime"]), kind="network", details={})
        OnnxRuntime().build(network, output, label=name, force=False)
    return output


def prepare(work: Path, names: list[str], threads: int) -> None:
    """Make what takes long and is the same for every load."""
    fuselage_engine(work / "checkpoint", work)
    for name in FORMATS.keys() & set(names):
        quantized_engine(work / "checkpoint", work, name)
    if {"genai-int8", "genai-graph-int8"} & set(names):
        genai_model(work / "checkpoint", work, threads, "int8")


def print_table(size: str, tables: Tables) -> None:
    for (batch, what), turns in tables.items():
        float32 = turns["fuselage"]
        print(f"\n{f'{size}: {what}, batch {batch}':30} {'ms':>9} {'times float32':>15}   by load")
        for name, one in turns.items():
            speeds = [1 / ratio for ratio in ratios_by_load(one, float32)]
            target = f"  (target {TARGETS[name]})" if (what, batch) == ("decode", 1) and name in TARGETS else ""
            spread = f"{min(speeds):.2f} to {max(speeds):.2f}"
            print(
                f"  {name:28} {one.median_ms:9.2f} {float32.median_ms / one.median_ms:15.2f}   {spread}{target}",
                flush=True,
            )


def measure_size(sizes: Sizes, names: list[str], args: argparse.Namespace) -> tuple[dict[str, Any], Tables]:
    """Measure one model; its files are removed afterwards."""
    with tempfile.TemporaryDirectory(dir=args.work, prefix="int8-") as folder:
        work = Path(folder)
        make_checkpoint(work / "checkpoint", sizes)
        prepare(work, names, args.threads)
        agreement, tables = measure_all(CONTESTANTS, work, names, args)
        found = document(args, sizes, agreement, tables)
        found["weights_bytes"] = {
            path.parent.name: path.stat().st_size for path in sorted(work.glob("engine*/weights.safetensors"))
        }
    return found, tables


def main() -> None:
    parser = argument_parser(__doc__, CONTESTANTS)
    parser.set_defaults(batch=[1])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    args = parser.parse_args()
    names = installed(args.only, CONTESTANTS)
    measured = {size: measure_size(SIZES[size], names, args) for size in args.sizes}
    for size, (_, tables) in measured.items():
        print_table(size, tables)
    if args.output:
        write(args.output, {size: found for size, (found, _) in measured.items()})


if __name__ == "__main__":
    main()
