"""Does the order of FFNs matter less than their being in sequence? The paper's table 6, on the bundled model.

    python benchmarks/reverse_order.py [-o FILE.json]

A run of FFNs without attention in between is (a) left in sequence, (b) put in reverse order, (c) fused into one that
reads a single input. If reversing costs little, the FFNs of the run depend on each other little (arXiv:2503.18908).
Perplexity on held-out text, for runs of every length from the first layer that lost its attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exporter.analysis.evaluate import evaluate  # noqa: E402
from exporter.graph import ModelGraph  # noqa: E402
from exporter.passes.drop_attention import drop_attention  # noqa: E402
from exporter.passes.find_blocks import blocks_of_range  # noqa: E402
from exporter.passes.fuse_ffn import fuse_ffn  # noqa: E402
from exporter.read import open_model  # noqa: E402
from exporter.text import model_windows  # noqa: E402


def reversed_run(graph: ModelGraph, run: tuple[int, int]) -> ModelGraph:
    """The graph with the blocks of a range of source layers in reverse order."""
    span = blocks_of_range(graph, run)
    blocks = list(graph.blocks)
    blocks[span.start : span.stop] = blocks[span.start : span.stop][::-1]
    return replace(graph, blocks=tuple(blocks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model")
    parser.add_argument("--text", type=Path, default=ROOT / "demo" / "model" / "heldout.txt")
    parser.add_argument("--drop", type=int, nargs=2, default=(8, 14), help="layers that lose their attention")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    checkpoint = open_model(args.model, need_weights=True)
    tokens = model_windows(args.text, checkpoint, context=args.context)
    first, last = args.drop
    dropped = drop_attention(checkpoint.graph, range(first, last + 1))

    def measured(graph: ModelGraph) -> dict[str, float | None]:
        found = evaluate(graph, tokens, reference=checkpoint.graph)
        return {"perplexity": found.perplexity, "kl_nats": found.kl_divergence, "top1_agreement": found.top1_agreement}

    rows: list[dict[str, Any]] = []
    in_sequence = measured(dropped)
    print(f"{'run':>10} {'in sequence':>12} {'reversed':>10} {'fused':>10}   perplexity")
    for end in range(first + 1, last + 1):
        run = (first, end)
        row = {
            "run": list(run),
            "in_sequence": in_sequence,
            "reversed": measured(reversed_run(dropped, run)),
            "fused": measured(fuse_ffn(dropped, [run])),
        }
        rows.append(row)
        figures = [row[name]["perplexity"] for name in ("in_sequence", "reversed", "fused")]
        print(f"{f'{first}-{end}':>10} {figures[0]:12.3f} {figures[1]:10.3f} {figures[2]:10.3f}", flush=True)
    if args.output:
        document = {
            "model": args.model.name,
            "text": args.text.name,
            "context_tokens": args.context,
            "tokens": int(tokens.size),
            "dropped_attention": [first, last],
            "runs": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written to {args.output}")


if __name__ == "__main__":
    main()
