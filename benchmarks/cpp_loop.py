"""The C++ benchmark program against the Python one on the same engine, and what the C++ loop itself costs.

    python benchmarks/cpp_loop.py [--rounds 20] [--loads 4] [-o benchmarks/results/cpp_loop.json]

The model is a Llama with random weights whose decode step takes some milliseconds on two cores. One engine is built
twice, under two labels: one is timed by the C++ program, the other by the Python one, in turns, as `bench` does it.
Where in memory an engine's weights happen to lie moves its decode by several percent for as long as it is loaded, so
both are loaded anew `--loads` times. Reported:

- C++ over Python, of the mean decode step and of the time to first token: ratio of the medians over all rounds, its
  bootstrap interval (rounds drawn in pairs), and the ratio of each load alone;
- what the C++ loop adds to ONNX Runtime: time of a decode step, which ends with the choice of the next token, minus
  the time inside RunWithBinding; median and 99th percentile over all steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from compare_decode import Sizes, make_checkpoint  # noqa: E402

from engines.base import EngineManifest  # noqa: E402
from engines.bench import bench_engines, python_worker  # noqa: E402
from engines.cpp_program import worker_for  # noqa: E402
from engines.intervals import ratio_interval  # noqa: E402
from engines.machine import cpus_for  # noqa: E402
from engines.onnxruntime import OnnxRuntime  # noqa: E402
from engines.results import Cell, RequestShape, Results  # noqa: E402
from exporter.read import open_model  # noqa: E402
from exporter.writers import onnx  # noqa: E402
from exporter.writers.files import save_folder  # noqa: E402

SIZES = Sizes(512, 1408, 8, 8, 2)
LABELS = ("cpp", "python")


def make_engines(folder: Path) -> list[Path]:
    """Build one network into an engine per label."""
    make_checkpoint(folder / "checkpoint", SIZES)
    graph = open_model(folder / "checkpoint", need_weights=True).graph
    files = onnx.emit(graph, onnx.PRESETS["onnxruntime"])
    save_folder(folder / "network", files, kind="network", details={"synthetic": True})
    return [OnnxRuntime().build(folder / "network", folder / label, label=label, force=False) for label in LABELS]


def worker(engine: Path, manifest: EngineManifest, threads: int | None, cpus: Sequence[int] | None) -> Sequence[str]:
    """The program that an engine's label names."""
    if manifest.label == "python":
        return python_worker(engine, manifest, threads, cpus)
    return worker_for("cpp", print)(engine, manifest, threads, cpus)


def agreement(cells: Sequence[tuple[Cell, Cell]], figure: str) -> dict[str, Any]:
    """C++ over Python of one figure, over all loads and of each."""
    pairs = [tuple(np.array(getattr(cell, figure)) for cell in pair) for pair in cells]
    cpp, python = (np.concatenate([pair[index] for pair in pairs]) for index in (0, 1))
    found = ratio_interval(cpp, python, paired=True)
    return {
        "cpp_ms": float(np.median(cpp)),
        "python_ms": float(np.median(python)),
        "ratio": found.ratio,
        "interval": [found.low, found.high],
        "by_load": [float(np.median(ours) / np.median(theirs)) for ours, theirs in pairs],
    }


def overhead_us(cell: Cell) -> np.ndarray:
    """What every decode step took beyond ONNX Runtime's own call."""
    assert cell.run_ms is not None
    return 1000 * (np.array(cell.step_ms) - np.array(cell.run_ms)[:, 1:]).ravel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20, help="of each load")
    parser.add_argument("--loads", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    shape = RequestShape(args.batch, args.input_len, args.output_len)
    loads: list[Results] = []
    with tempfile.TemporaryDirectory() as temporary:
        engines = make_engines(Path(temporary))
        for load in range(args.loads):
            order = engines if load % 2 == 0 else engines[::-1]  # who is loaded first
            results = bench_engines(
                order,
                [shape],
                rounds=args.rounds,
                warmup=2,
                threads=args.threads,
                cpus=cpus_for(args.threads),
                worker=worker,
            )
            if not results.is_complete:
                sys.exit("a worker failed: " + "; ".join(e.stopped.problem for e in results.engines if e.stopped))
            loads.append(results)
            print(f"load {load + 1} of {args.loads} done", flush=True)

    by_label = [{cell.engine: cell for cell in one.cells} for one in loads]
    pairs = [(found["cpp"], found["python"]) for found in by_label]
    beyond = np.concatenate([overhead_us(cpp) for cpp, _ in pairs])
    summary: dict[str, Any] = {
        "decode": agreement(pairs, "inter_token_ms"),
        "ttft": agreement(pairs, "ttft_ms"),
        "cpp_loop_us": {"median": float(np.median(beyond)), "p99": float(np.percentile(beyond, 99))},
    }
    for name, found in (("decode", summary["decode"]), ("ttft", summary["ttft"])):
        low, high = found["interval"]
        loads_said = ", ".join(f"{ratio:.3f}" for ratio in found["by_load"])
        print(
            f"{name:>6}: C++ {found['cpp_ms']:.3f} ms, Python {found['python_ms']:.3f} ms, "
            f"ratio {found['ratio']:.3f} ({low:.3f} to {high:.3f}), by load {loads_said}"
        )
    print(f"C++ loop beyond ONNX Runtime, per step: {np.median(beyond):.1f} us, p99 {np.percentile(beyond, 99):.1f} us")
    if args.output:
        document = {"shape": str(shape), "summary": summary, "loads": [one.model_dump(mode="json") for one in loads]}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(document) + "\n")
        print(f"written to {args.output}")


if __name__ == "__main__":
    main()
