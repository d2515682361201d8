"""What distillation recovers: the demo model, its attention dropped and FFNs fused, then trained on its own logits.

    python benchmarks/recover.py [--steps 1000] [--threads 1] [-o FILE.json]

The plan is that of recipes/demo.yaml. Training text is what the demo model was trained on (demo/corpus.py), in the
same proportions; demo/model/heldout.txt is only evaluated on. Everything goes through the command line, as a user
would do it: `evaluate` in windows of 256 tokens before and after, `distill` in between. Of the whole `distill` command
both the wall time and the processor time are taken, the latter because other work on the machine does not change it
much.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from corpus import docstrings, split_documents  # noqa: E402

from engines.machine import cpu_name  # noqa: E402

MODEL, HELD_OUT = ROOT / "demo" / "model", ROOT / "demo" / "model" / "heldout.txt"
PLAN = {"drop_attention": [[8, 14]], "fuse": [[8, 13]]}
CONTEXT = 256
TOPIC_WEIGHT = 3  # as in demo/train.py


def write_training_text(path: Path) -> None:
    """Write the documents that the demo model was trained on, one per line."""
    _, topics, others = split_documents(docstrings())
    documents = [text for text in topics * TOPIC_WEIGHT + others if text.strip()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def build(threads: int, *arguments: object) -> dict[str, float]:
    """Run build.py; returns the seconds it took."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, str(ROOT / "build.py"), *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall": time.perf_counter() - start, "cpu": cpu}


def evaluated(work: Path, threads: int, model: Path, *options: object) -> dict:
    """Perplexity, KL divergence and top-1 agreement of a model on the held-out text."""
    output = work / "evaluation.json"
    text = ["--text", HELD_OUT, "--context", CONTEXT]
    build(threads, "evaluate", model, "--reference", MODEL, *options, *text, "-q", "--force", "-o", output)
    figures = json.loads(output.read_text())
    return {name: figures[name] for name in ("perplexity", "kl_divergence", "top1_agreement")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=2, help="windows of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    options = ("steps", "batch", "lr", "temperature", "dtype")
    training = [part for name in options for part in (f"--{name}", getattr(args, name))]
    with tempfile.TemporaryDirectory(prefix="recover-") as folder:
        work = Path(folder)
        write_training_text(work / "training.jsonl")
        (work / "plan.yaml").write_text(yaml.safe_dump(PLAN))
        plan = ["--plan", work / "plan.yaml"]
        models = {
            "original": evaluated(work, args.threads, MODEL),
            "transformed": evaluated(work, args.threads, MODEL, *plan),
        }
        text = ["--text", work / "training.jsonl", "--context", CONTEXT]
        output = ["-q", "-o", work / "recovered"]
        seconds = build(args.threads, "distill", MODEL, "--teacher", MODEL, *plan, *text, *training, *output)
        models["recovered"] = evaluated(work, args.threads, work / "recovered")
        curve = json.loads((work / "recovered" / "distill.json").read_text())
    original, transformed, recovered = (models[name]["perplexity"] for name in models)
    share = (transformed - recovered) / (transformed - original)
    print(f"perplexity {original:.2f} as it was, {transformed:.2f} transformed, {recovered:.2f} trained")
    print(f"{100 * share:.0f} % of what the plan cost, in {seconds['wall']:.0f} s ({seconds['cpu']:.0f} s of CPU)")
    if args.output:
        machine = {
            "cpu": cpu_name(),
            "threads": args.threads,
            "python": sys.version.split()[0],
            "torch": version("torch"),
        }
        result = {
            "machine": machine,
            "plan": PLAN,
            "settings": curve["settings"],
            "training_tokens": args.steps * args.batch * CONTEXT,
            "distill_seconds": seconds,
            "models": models,
            "recovered_share": share,
            "training_kl_times_temperature_squared": curve["kl"],
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
