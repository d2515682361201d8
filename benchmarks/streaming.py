"""Memory and speed of streaming: what reads and writes a synthetic checkpoint against `cp -r` of its files.

    python benchmarks/streaming.py [--runs 5] [--rounds 3] [--only transform export] [-o FILE.json]

The checkpoint is bfloat16 with hidden_size 4096 and intermediate_size 14336: one full layer, then `runs` times four
layers without attention, each four of which the plan fuses into one FFN of 57,344; 5 runs are 8.5 GB, 1 run is 2.9 GB.
Measured as whole processes from outside, in turn, with the source in the page cache: wall time, and the largest
resident set (`VmHWM`, read every 10 ms). What we write is flushed to the disk (fsync) and hashed, what `cp`
writes is neither; `cp -r` followed by `sync` is given too. `export_trtllm` writes for eight GPUs, the embedding split
over them and written a second time as lm_head. `quantize` reads ranges from a made-up calibration, so that only
writing is measured; `torch_cast` divides every matrix by its largest value and casts it to FP8 in memory, shard by
shard, and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.machine import cpu_name  # noqa: E402
from exporter.calibration import Calibration, calibration_files, fingerprint  # noqa: E402
from exporter.dtypes import BFLOAT16  # noqa: E402
from exporter.lazy import LazyTensor  # noqa: E402
from exporter.pipeline import apply_plan  # noqa: E402
from exporter.plan import read_plan  # noqa: E402
from exporter.read import open_model  # noqa: E402
from exporter.safetensors_io import shard_tensors  # noqa: E402
from exporter.writers.files import json_bytes, save_folder  # noqa: E402

HIDDEN, WIDTH, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 128256
SHARD_BYTES = 2 * 10**9


class Noise(LazyTensor):
    """Gaussian bfloat16 rows cut from one block of noise: cheap to make, and no two layers alike."""

    __slots__ = ("_shift",)
    block = (0.02 * np.random.default_rng(0).standard_normal(1 << 24)).astype(BFLOAT16.numpy)

    def __init__(self, shift: int, *shape: int) -> None:
        super().__init__(shape, BFLOAT16)
        self._shift = shift

    def rows(self, start: int, stop: int) -> np.ndarray:
        count = (stop - start) * (self.row_nbytes // 2)
        begin = (self._shift * 7919 + start * 31) % (len(self.block) - 1)
        repeated = (
            np.resize(self.block[begin:], count)
            if count > len(self.block) - begin
            else self.block[begin : begin + count]
        )
        return repeated.reshape(stop - start, *self.shape[1:])


def make_checkpoint(folder: Path, runs: int) -> None:
    """Write a Nemotron-NAS folder of 1 + 4 * runs layers."""
    layers = 1 + 4 * runs
    tensors: dict[str, LazyTensor] = {"model.embed_tokens.weight": Noise(0, VOCAB, HIDDEN)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        if layer == 0:
            tensors[f"{stem}.input_layernorm.weight"] = Noise(1, HIDDEN)
            for name, rows in (("q", HIDDEN), ("k", KV_HEADS * 128), ("v", KV_HEADS * 128), ("o", HIDDEN)):
                tensors[f"{stem}.self_attn.{name}_proj.weight"] = Noise(2, rows, HIDDEN)
        tensors[f"{stem}.post_attention_layernorm.weight"] = Noise(10 * layer + 3, HIDDEN)
        tensors[f"{stem}.mlp.gate_proj.weight"] = Noise(10 * layer + 4, WIDTH, HIDDEN)
        tensors[f"{stem}.mlp.up_proj.weight"] = Noise(10 * layer + 5, WIDTH, HIDDEN)
        tensors[f"{stem}.mlp.down_proj.weight"] = Noise(10 * layer + 6, HIDDEN, WIDTH)
    tensors["model.norm.weight"] = Noise(9, HIDDEN)
    ffn = {"ffn_mult": 1.5 * WIDTH / HIDDEN}
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "block_configs": [
            {"attention": {"n_heads_in_group": HEADS // KV_HEADS} if layer == 0 else {"no_op": True}, "ffn": ffn}
            for layer in range(layers)
        ],
    }
    shards = shard_tensors(tensors, SHARD_BYTES)
    files = {"config.json": json_bytes(config), **shards.files}
    if shards.index is not None:
        files["model.safetensors.index.json"] = json_bytes(shards.index)
    save_folder(folder, files.items(), kind="checkpoint", details={"synthetic": True})


def make_calibration(source: Path, plan: Path, folder: Path) -> None:
    """Ranges that no text gave, for the graph that the plan makes."""
    graph = apply_plan(open_model(source, need_weights=True).graph, read_plan(plan))
    ones = {"norm": HIDDEN, "o_proj": HIDDEN, "key": KV_HEADS * 128, "value": KV_HEADS * 128}
    ranges = {}
    for block in graph.flat_blocks:
        layers = "+".join(map(str, block.source_layers))
        if block.attention is not None:
            ranges |= {f"{layers}.attention.{site}": np.ones(size, np.float32) for site, size in ones.items()}
        width = block.ffn.intermediate_size
        ranges |= {
            f"{layers}.ffn.{site}": np.ones(n, np.float32) for site, n in (("norm", HIDDEN), ("down_proj", width))
        }
    made_up = Calibration(fingerprint=fingerprint(graph), text="none", tokens=0, percentile=None, ranges=ranges)
    save_folder(folder, calibration_files(made_up).items(), kind="calibration", details={"synthetic": True})


TORCH_CAST = """
import sys, pathlib, torch
from safetensors.torch import load_file
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    for tensor in load_file(path).values():
        if tensor.dim() == 2:
            (tensor / (tensor.abs().max().float() / 448)).to(torch.float8_e4m3fn)
pathlib.Path(sys.argv[2]).mkdir()
"""
COMMANDS = ("transform", "export", "export_trtllm", "quantize_fp8", "quantize_int8", "torch_cast")


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command to its end: (wall seconds, peak resident GiB)."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak_kib = 0
    while process.poll() is None:
        # Not wait4's ru_maxrss: that starts from what this process held when it forked.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak_kib = max([peak_kib, *(int(kib) for kib in re.findall(r"VmHWM:\s+(\d+) kB", status))])
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, peak_kib / 2**20


def warm(folder: Path) -> int:
    """Read all files once; returns their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while piece := file.read(1 << 24):
                    total += len(piece)
    return total


def measure(work: Path, runs: int, rounds: int, names: list[str]) -> dict:
    source, plan, target = work / f"source-{runs}", work / "plan.yaml", work / "target"
    make_checkpoint(source, runs)
    plan.write_text(f"fuse: {[[1 + 4 * run, 4 + 4 * run] for run in range(runs)]}\n")
    build = [sys.executable, str(ROOT / "build.py")]
    commands = {
        "cp": ["cp", "-r", str(source), str(target)],
        "cp_and_sync": ["sh", "-c", f"cp -r {source} {target} && sync -f {target}"],
        "transform": [*build, "transform", str(source), "--plan", str(plan), "-q", "-o", str(target)],
        "export": [*build, "export", str(source), "--plan", str(plan), "--to", "onnx", "--target", "tensorrt"],
    }
    commands["export"] += ["--max-positions", "4096", "-q", "-o", str(target)]
    commands["export_trtllm"] = [*build, "export", str(source), "--plan", str(plan), "--to", "trtllm", "--tp", "8"]
    commands["export_trtllm"] += ["--split-embedding", "-q", "-o", str(target)]
    calibration, int8 = work / f"calibration-{runs}", work / "int8.yaml"
    if any(name.startswith("quantize") for name in names):
        make_calibration(source, plan, calibration)
        int8.write_text(
            "weights: {dtype: int8, scale: row}\ninputs: {dtype: int8, scale: tensor}\nsmoothing: {alpha: 0.65}\n"
        )
    for name, recipe in (("quantize_fp8", "fp8"), ("quantize_int8", str(int8))):
        commands[name] = [*build, "quantize", str(source), "--plan", str(plan), "--format", recipe]
        commands[name] += ["--calibration", str(calibration), "-q", "-o", str(target)]
    commands["torch_cast"] = [sys.executable, "-c", TORCH_CAST, str(source), str(target)]
    commands = {name: command for name, command in commands.items() if name in ("cp", "cp_and_sync", *names)}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peak_gib: dict[str, list[float]] = {name: [] for name in commands}
    nbytes = 0
    for round_index in range(rounds):
        for name, command in commands.items():
            subprocess.run(["sync"], check=True)
            nbytes = warm(source)
            took, peak = timed(command)
            shutil.rmtree(target)
            seconds[name].append(took)
            peak_gib[name].append(peak)
            print(f"  round {round_index + 1}: {name:14} {took:7.2f} s  {peak:6.3f} GiB", flush=True)
    shutil.rmtree(source)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "runs": runs,
        "source_bytes": nbytes,
        "seconds": seconds,
        "peak_gib": peak_gib,
        "gb_per_s": {name: nbytes / value / 1e9 for name, value in median.items()},
        "throughput_of_cp": {name: median["cp"] / median[name] for name in names},
        "throughput_of_cp_and_sync": {name: median["cp_and_sync"] / median[name] for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 5], help="sizes, in runs of four layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=["transform", "export"])
    parser.add_argument("--work", type=Path, help="folder for the files (about twice the checkpoint); default: $TMPDIR")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="streaming-") as work:
        sizes = []
        for runs in args.runs:
            sizes.append(measure(Path(work), runs, args.rounds, args.only))
            size = sizes[-1]
            print(f"{size['source_bytes'] / 1e9:.2f} GB, {runs} runs of four layers fused:")
            for name in args.only:
                print(
                    f"  {name}: {size['gb_per_s'][name]:.2f} GB/s, {size['throughput_of_cp'][name]:.2f} of cp, "
                    f"{size['throughput_of_cp_and_sync'][name]:.2f} of cp and sync, "
                    f"peak {max(size['peak_gib'][name]):.3f} GiB"
                )
    if args.output:
        machine = {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": sys.version.split()[0],
        }
        args.output.write_text(json.dumps({"machine": machine, "sizes": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
