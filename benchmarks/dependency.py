"""The dependency matrix in one pass over the weights against one pass per removed block.

    python benchmarks/dependency.py [--tokens 64 256] [-o FILE.json]

A random bfloat16 model of 24 layers, hidden_size 1024, on disk. The plain way runs the model once as it is, and once
for every block without it, loading block after block from the files each time. Before a block is read its file is
dropped from the page cache (`posix_fadvise`), as it would be for a model that is larger than memory; `--warm` leaves it
there. Both ways are whole processes that take turns; wall time, and the largest resident set (`VmHWM`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HIDDEN, WIDTH, LAYERS, HEADS, KV_HEADS, VOCAB = 1024, 2816, 24, 16, 4, 4096


def make_checkpoint(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=VOCAB, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def cold_blocks(folder: Path) -> None:
    """Make `Reference.block` forget the files in the page cache before it reads them."""
    from exporter.reference import Reference

    load = Reference.block

    def block(self: Any, index: int) -> Any:
        for path in folder.glob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return load(self, index)

    Reference.block = block  # type: ignore[method-assign]


def one_pass(graph: Any, tokens: np.ndarray) -> np.ndarray:
    from exporter.analysis.dependency import measure_dependency

    return measure_dependency(graph, tokens, kinds=("block",), importance=False).matrices["block"]


def pass_per_block(graph: Any, tokens: np.ndarray) -> np.ndarray:
    """The definition, model by model: M[i, j] = mean cosine distance of h_j and h_j without block i."""
    import torch
    import torch.nn.functional as F

    from exporter.reference import Reference

    reference = Reference(graph)
    ids = torch.from_numpy(tokens)
    span = reference.span(ids.shape, None)
    count = len(graph.blocks)

    def contributions(removed: int | None) -> list[torch.Tensor]:
        x = reference.embed(ids)
        found = []
        for index in range(count):
            if index == removed:
                found.append(torch.zeros_like(x))
                continue
            y = reference.block(index)(x, span)
            found.append(y - x)
            x = y
        return found

    matrix = np.full((count, count), np.nan)
    with torch.inference_mode():
        plain = contributions(None)
        for removed in range(count):
            without = contributions(removed)
            for j in range(removed + 1, count):
                distance = 1 - F.cosine_similarity(plain[j].double(), without[j].double(), dim=-1)
                matrix[removed, j] = distance.mean().item()
    return matrix


WAYS = {"one_pass": one_pass, "pass_per_block": pass_per_block}


def run_one(way: str, folder: Path, tokens: int, warm: bool, output: Path) -> None:
    """Measure inside a process of its own; writes seconds, peak and matrix."""
    from engines.worker import peak_memory_bytes
    from exporter.read import open_model

    graph = open_model(folder, need_weights=True).graph
    ids = np.random.default_rng(0).integers(0, VOCAB, (1, tokens))
    if not warm:
        cold_blocks(folder)
    start = time.perf_counter()
    matrix = WAYS[way](graph, ids)
    seconds = time.perf_counter() - start
    peak_gib = peak_memory_bytes() / 2**30
    output.write_text(json.dumps({"seconds": seconds, "peak_gib": peak_gib, "matrix": matrix.tolist()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--run", nargs=3, metavar=("WAY", "FOLDER", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_one(args.run[0], Path(args.run[1]), int(args.run[2]), args.warm, args.output)
        return
    tables = []
    with tempfile.TemporaryDirectory(prefix="dependency-") as work:
        make_checkpoint(Path(work) / "model")
        for tokens in args.tokens:
            found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for _ in range(args.rounds):
                for way in WAYS:
                    result = Path(work) / "result.json"
                    command = [sys.executable, __file__, "--run", way, f"{work}/model", str(tokens), "-o", str(result)]
                    subprocess.run([*command, *["--warm"] * args.warm], check=True)
                    found[way].append(json.loads(result.read_text()))
            matrices = [np.array(found[way][0]["matrix"], dtype=float) for way in WAYS]
            difference = float(np.nanmax(np.abs(matrices[0] - matrices[1])))
            seconds = {way: [run["seconds"] for run in runs] for way, runs in found.items()}
            peaks = {way: max(run["peak_gib"] for run in runs) for way, runs in found.items()}
            medians = {way: statistics.median(values) for way, values in seconds.items()}
            ratio = medians["pass_per_block"] / medians["one_pass"]
            print(
                f"{tokens} tokens: one pass {medians['one_pass']:.1f} s, {peaks['one_pass']:.2f} GiB; a pass per block "
                f"{medians['pass_per_block']:.1f} s, {peaks['pass_per_block']:.2f} GiB; {ratio:.1f} times the time; "
                f"largest difference of the matrices {difference:.1e}",
                flush=True,
            )
            tables.append(
                {
                    "tokens": tokens,
                    "seconds": {way: [round(value, 3) for value in values] for way, values in seconds.items()},
                    "peak_gib": {way: round(value, 3) for way, value in peaks.items()},
                    "time_ratio": round(ratio, 2),
                    "largest_difference": difference,
                }
            )
    if args.output:
        model = {"layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "dtype": "bfloat16"}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        document = {"model": model, "page_cache": "warm" if args.warm else "dropped before every block", "runs": tables}
        args.output.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written to {args.output}")


if __name__ == "__main__":
    main()
