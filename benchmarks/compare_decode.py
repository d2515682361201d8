"""Decode and prefill of our float32 engine against transformers and ONNX Runtime GenAI, on the same weights.

    python benchmarks/compare_decode.py [--batch 1 4] [--rounds 40] [-o benchmarks/results/compare_decode.json]

The model is a Llama with random weights: hidden_size 1024, intermediate_size 2816, 12 layers, 16 / 4 heads, vocabulary
8192 (142 M parameters in its matrices). Contestants, all in one process and with as many threads as there are cores:

    fuselage            our ONNX network through our runner
    transformers        LlamaForCausalLM, scaled_dot_product_attention, dynamic cache
    torch.compile       the same with a static cache, prefill and decode compiled for their shapes
    genai               what onnxruntime_genai.models.builder makes, in GenAI's own Generator loop
    genai-graph         the same graph (GroupQueryAttention) in plain ONNX Runtime, cache bound in place

They take short turns in random order: one decode step that does not count, then a few that do; or one prefill. A turn
counts if other processes left the machine alone while it lasted (`--foreign-load`), else it is taken again, until
`--patience` runs out. Steps include the choice of the most likely token. Decode reads all weights once per step, so
where in memory a contestant's weights happen to lie moves it by about 5 % for as long as it is loaded: everything is
loaded anew, in another order and a fresh process, `--loads` times. Reported: the median over all turns of each turn's
median, how many times as long as ours that is, and the same of each load alone (smallest to largest).

Two settings make such a comparison in one process possible at all. ONNX Runtime's threads spin for about 40 ms after a
run by default, in the next contestant's time: everybody gets `session.intra_op.spin_duration_us=200`. And GenAI
reserves a cache for `max_length` positions: it is set to what is needed here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.machine import cpu_name  # noqa: E402
from engines.onnxruntime import SPIN_US, OnnxRuntime  # noqa: E402
from exporter.dtypes import FLOAT32  # noqa: E402
from exporter.lazy import LazyTensor, array, full  # noqa: E402
from exporter.read import open_model  # noqa: E402
from exporter.safetensors_io import shard_tensors  # noqa: E402
from exporter.writers import onnx  # noqa: E402
from exporter.writers.files import Content, json_bytes, save_folder  # noqa: E402

HEAD_DIM, VOCAB, MAX_POSITIONS = 64, 8192, 4096
CAPACITY = 256  # positions; prompt and steps together stay below
SPIN_KEY = "session.intra_op.spin_duration_us"
TARGETS = {"transformers": 1.8, "genai": 0.95}  # decode: their time over ours, at least


@dataclass(frozen=True)
class Sizes:
    """The sizes of a synthetic Llama, by their names in its config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


MID = Sizes(1024, 2816, 12, 16, 4)


def make_checkpoint(folder: Path, sizes: Sizes = MID) -> None:
    """Write a Llama folder with a tokenizer that is just enough for GenAI's builder."""
    hidden, width = sizes.hidden_size, sizes.intermediate_size
    heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    rng = np.random.default_rng(0)

    def weight(rows: int, columns: int) -> LazyTensor:
        return array(rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5))

    def ones() -> LazyTensor:
        return full((hidden,), 1.0, FLOAT32)

    tensors = {"model.embed_tokens.weight": weight(VOCAB, hidden)}
    for layer in range(sizes.num_hidden_layers):
        stem = f"model.layers.{layer}"
        tensors[f"{stem}.input_layernorm.weight"] = ones()
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            tensors[f"{stem}.self_attn.{name}_proj.weight"] = weight(count * HEAD_DIM, hidden)
        tensors[f"{stem}.self_attn.o_proj.weight"] = weight(hidden, heads * HEAD_DIM)
        tensors[f"{stem}.post_attention_layernorm.weight"] = ones()
        tensors[f"{stem}.mlp.gate_proj.weight"] = weight(width, hidden)
        tensors[f"{stem}.mlp.up_proj.weight"] = weight(width, hidden)
        tensors[f"{stem}.mlp.down_proj.weight"] = weight(hidden, width)
    tensors["model.norm.weight"] = ones()
    tensors["lm_head.weight"] = weight(VOCAB, hidden)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(sizes),
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vocabulary = {f"<{token}>": token for token in range(260)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<0>"},
    }
    files: dict[str, Content | bytes] = {
        "config.json": json_bytes(config),
        "tokenizer.json": json_bytes(tokenizer),
        "tokenizer_config.json": json_bytes({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<0>"}),
        **shard_tensors(tensors, 10**10).files,
    }
    save_folder(folder, files.items(), kind="checkpoint", details={"synthetic": True})


class Contestant(ABC):
    """Something that continues a batch of prompts greedily, one step at a time."""

    name: str

    @abstractmethod
    def __init__(self, checkpoint: Path, work: Path, threads: int) -> None:
        """Make ready whatever it takes, in `work` where files are needed."""

    @abstractmethod
    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        """Begin anew with `input_ids` int64 [B, S]; returns the next tokens [B]."""

    @abstractmethod
    def decode(self) -> np.ndarray:
        """Append the tokens that the last call returned; returns the next ones [B]."""


class Fuselage(Contestant):
    name = "fuselage"

    def __init__(self, checkpoint: Path, work: Path, threads: int) -> None:
        self._runner = OnnxRuntime().open(fuselage_engine(checkpoint, work), threads=threads)

    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        batch, tokens = input_ids.shape
        self._runner.start(batch, CAPACITY)
        self._next = self._runner.prefill_greedy(input_ids, np.full(batch, tokens))
        return self._next

    def decode(self) -> np.ndarray:
        self._next = self._runner.decode_greedy(self._next)
        return self._next


class Transformers(Contestant):
    name = "transformers"

    def __init__(self, checkpoint: Path, work: Path, threads: int) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = LlamaForCausalLM.from_pretrained(checkpoint, dtype="float32", attn_implementation="sdpa").eval()
        self._forward: Callable[..., Any] = self._model

    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        self._cache = self._new_cache(len(input_ids))
        self._filled = 0
        return self._step(self._torch.from_numpy(input_ids))

    def decode(self) -> np.ndarray:
        return self._step(self._next[:, None])

    def _step(self, input_ids: Any) -> np.ndarray:
        torch = self._torch
        with torch.inference_mode():
            positions = torch.arange(self._filled, self._filled + input_ids.shape[1])
            output = self._forward(
                input_ids=input_ids,
                position_ids=positions[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._next = output.logits[:, -1].argmax(dim=-1)
        self._filled += input_ids.shape[1]
        return self._next.numpy()

    def _new_cache(self, batch: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache()


class TorchCompile(Transformers):
    name = "torch.compile"

    def __init__(self, checkpoint: Path, work: Path, threads: int) -> None:
        super().__init__(checkpoint, work, threads)
        self._torch._dynamo.config.cache_size_limit = 64
        self._forward = self._torch.compile(self._model, dynamic=False)
        self._caches: dict[int, Any] = {}

    def _new_cache(self, batch: int) -> Any:
        from transformers import StaticCache

        if batch not in self._caches:  # a new one would be compiled for again
            self._caches[batch] = StaticCache(config=self._model.config, max_cache_len=CAPACITY)
        with self._torch.inference_mode():
            self._caches[batch].reset()
        return self._caches[batch]


class GenaiGraph(Contestant):
    name = "genai-graph"
    precision = "fp32"

    def __init__(self, checkpoint: Path, work: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry(SPIN_KEY, str(SPIN_US))
        folder = genai_model(checkpoint, work, threads, self.precision)
        self._decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        model = str(folder / "model.onnx")
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy

    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        self._filled = 0
        decoder = self._decoder
        shape = (len(input_ids), decoder["num_key_value_heads"], CAPACITY, decoder["head_size"])
        self._caches = {
            f"{layer}.{kind}": self._value(np.zeros(shape, np.float32))
            for layer in range(decoder["num_hidden_layers"])
            for kind in ("key", "value")
        }
        return self._step(input_ids)

    def decode(self) -> np.ndarray:
        return self._step(self._next[:, None])

    def _step(self, input_ids: np.ndarray) -> np.ndarray:
        batch, tokens = input_ids.shape
        self._filled += tokens
        binding = self._session.io_binding()
        logits = np.empty((batch, tokens, VOCAB), np.float32)
        binding.bind_ortvalue_input("input_ids", self._value(np.ascontiguousarray(input_ids)))
        binding.bind_ortvalue_input("attention_mask", self._value(np.ones((batch, self._filled), np.int64)))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        binding.bind_ortvalue_output("logits", self._value(logits))
        self._session.run_with_iobinding(binding)
        self._next = logits[:, -1].argmax(axis=-1)
        return self._next


class Genai(Contestant):
    name = "genai"
    precision = "fp32"

    def __init__(self, checkpoint: Path, work: Path, threads: int) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(genai_model(checkpoint, work, threads, self.precision)))

    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=CAPACITY, batch_size=len(input_ids), do_sample=False)
        self._generator = self._genai.Generator(self._model, parameters)
        self._generator.append_tokens(input_ids.astype(np.int32))
        return self.decode()

    def decode(self) -> np.ndarray:
        self._generator.generate_next_token()
        return self._generator.get_next_tokens()


def fuselage_engine(checkpoint: Path, work: Path) -> Path:
    """Export and build our engine once; returns it."""
    output = work / "engine"
    if not output.exists():
        graph = open_model(checkpoint, need_weights=True).graph
        save_folder(work / "network", onnx.emit(graph, onnx.PRESETS["onnxruntime"]), kind="network", details={})
        OnnxRuntime().build(work / "network", output, label="fuselage", force=False)
    return output


def genai_model(checkpoint: Path, work: Path, threads: int, precision: str = "fp32") -> Path:
    """Build GenAI's folder once; returns it."""
    output = work / f"genai-{precision}"
    if not output.exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "mid", "-i", str(checkpoint)]
        command += ["-o", str(output), "-p", precision, "-e", "cpu", "-c", str(work / "genai-cache")]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
        path = output / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["eos_token_id"] = VOCAB - 1  # a token that random weights hardly choose: nobody stops early
        config["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": threads, SPIN_KEY: str(SPIN_US)}
        path.write_text(json.dumps(config))
    return output


def prepare(work: Path, names: list[str], threads: int) -> None:
    """Make what takes long and is the same for every load."""
    fuselage_engine(work / "checkpoint", work)
    if {"genai", "genai-graph"} & set(names):
        genai_model(work / "checkpoint", work, threads)


Field = dict[str, tuple[Callable[[Path, Path, int], Contestant], str | None]]  # name -> (class, package it needs)
CONTESTANTS: Field = {
    "fuselage": (Fuselage, None),
    "transformers": (Transformers, "transformers"),
    "torch.compile": (TorchCompile, "transformers"),
    "genai": (Genai, "onnxruntime_genai"),
    "genai-graph": (GenaiGraph, "onnxruntime_genai"),
}


class ForeignLoad:
    """How much of the machine other processes used while the `with` block ran, 0 to 1."""

    def __enter__(self) -> ForeignLoad:
        self._start = time.perf_counter(), self._busy(), self._ours()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, ours = self._start
        seconds = (time.perf_counter() - wall) * (os.cpu_count() or 1)
        self.share = max(0.0, (self._busy() - busy) - (self._ours() - ours)) / seconds

    @staticmethod
    def _busy() -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0.0)

    @staticmethod
    def _ours() -> float:
        return time.process_time()


@dataclass
class Turns:
    """One contestant's turns at one thing."""

    ms: list[list[float]] = field(default_factory=list)  # [turns][steps]
    foreign_load: list[float] = field(default_factory=list)  # [turns]
    load: list[int] = field(default_factory=list)  # [turns] which load of the weights it was

    @property
    def median_ms(self) -> float:
        return statistics.median(statistics.median(turn) for turn in self.ms)

    def of_load(self, number: int) -> Turns:
        ms = [turn for turn, load in zip(self.ms, self.load, strict=True) if load == number]
        return Turns(ms=ms)


Tables = dict[tuple[int, str], dict[str, Turns]]  # (batch, "decode" or "prefill") -> contestant -> turns


def take_turns(
    contestants: list[Contestant],
    turn: Callable[[Contestant], list[float]],
    rounds: int,
    load_number: int,
    args: argparse.Namespace,
) -> dict[str, Turns]:
    """Let everybody take `rounds` turns in random order; see the module's docstring."""
    turns = {contestant.name: Turns() for contestant in contestants}
    rng = random.Random(load_number)
    deadline = time.monotonic() + args.patience / args.loads
    for _ in range(rounds):
        waiting = rng.sample(contestants, len(contestants))
        while waiting:
            with ForeignLoad() as load:
                ms = turn(waiting[0])
            if load.share <= args.foreign_load or time.monotonic() > deadline:
                done = waiting.pop(0)
                turns[done.name].ms.append(ms)
                turns[done.name].foreign_load.append(load.share)
                turns[done.name].load.append(load_number)
    return turns


def measure(
    contestants: list[Contestant], batch: int, load_number: int, args: argparse.Namespace
) -> dict[str, dict[str, Turns]]:
    """Time decode and prefill of one batch size."""
    input_ids = np.random.default_rng(batch).integers(3, VOCAB, (batch, args.prompt))
    for contestant in contestants:
        contestant.prefill(input_ids)  # compiles what wants to be compiled
        contestant.decode()
    filled: dict[str, int] = {}

    def timed(step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3

    def decode_turn(contestant: Contestant) -> list[float]:
        if filled.get(contestant.name, CAPACITY) + args.steps + 1 > CAPACITY:
            contestant.prefill(input_ids)
            filled[contestant.name] = args.prompt
        contestant.decode()
        filled[contestant.name] += args.steps + 1
        return [timed(contestant.decode) for _ in range(args.steps)]

    def prefill_turn(contestant: Contestant) -> list[float]:
        return [timed(lambda: contestant.prefill(input_ids))]

    decodes = -(-args.rounds // args.loads)
    prefills = -(-args.rounds // (4 * args.loads))
    return {
        "decode": take_turns(contestants, decode_turn, decodes, load_number, args),
        "prefill": take_turns(contestants, prefill_turn, prefills, load_number, args),
    }


def measure_one_load(
    contestants_by_name: Field, work: Path, names: list[str], load_number: int, args: argparse.Namespace
) -> tuple[dict[str, float], Tables]:
    """Load everything, in an order of this load's own, and measure; runs in a fresh process."""
    order = random.Random(load_number).sample(names, len(names))
    loaded = {name: contestants_by_name[name][0](work / "checkpoint", work, args.threads) for name in order}
    contestants = [loaded[name] for name in names]
    agreement = check_agreement(contestants)
    tables: Tables = {}
    for batch in args.batch:
        for what, turns in measure(contestants, batch, load_number, args).items():
            tables[batch, what] = turns
    return agreement, tables


def merge(into: Tables, tables: Tables) -> None:
    for key, turns in tables.items():
        for name, one in turns.items():
            merged = into.setdefault(key, {}).setdefault(name, Turns())
            merged.ms += one.ms
            merged.foreign_load += one.foreign_load
            merged.load += one.load


def ratios_by_load(one: Turns, ours: Turns) -> list[float]:
    return [one.of_load(load).median_ms / ours.of_load(load).median_ms for load in sorted(set(ours.load))]


def check_agreement(contestants: list[Contestant]) -> dict[str, float]:
    """Return which share of 32 greedy tokens for each of 4 prompts equals the first contestant's."""
    input_ids = np.random.default_rng(99).integers(3, VOCAB, (4, 24))
    tokens = {}
    for contestant in contestants:
        chosen = [contestant.prefill(input_ids).copy()]
        chosen += [contestant.decode().copy() for _ in range(31)]
        tokens[contestant.name] = np.array(chosen)
    first = tokens[contestants[0].name]
    return {name: float((chosen == first).mean()) for name, chosen in tokens.items()}


def main() -> None:
    parser = argument_parser(__doc__, CONTESTANTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="compare-") as folder:
        work = Path(folder)
        make_checkpoint(work / "checkpoint")
        names = installed(args.only, CONTESTANTS)
        prepare(work, names, args.threads)
        agreement, tables = measure_all(CONTESTANTS, work, names, args)
    for (batch, what), turns in tables.items():
        print_table(batch, what, turns, TARGETS)
    if args.output:
        write(args.output, document(args, MID, agreement, tables))


def argument_parser(description: str | None, contestants: Field) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=96, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=5, help="decode steps per turn")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each contestant (a quarter of it for prefill)")
    parser.add_argument("--loads", type=int, default=4, help="how often everything is loaded anew")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--foreign-load", type=float, default=0.12, help="largest share of the machine others may use")
    parser.add_argument("--patience", type=float, default=600, help="seconds per table until busy turns count, too")
    parser.add_argument("--only", nargs="+", choices=contestants, default=list(contestants))
    parser.add_argument("--work", type=Path, help="folder for about 2 GB of files; default: $TMPDIR")
    parser.add_argument("-o", "--output", type=Path)
    return parser


def installed(names: list[str], contestants: Field) -> list[str]:
    """Those of `names` whose packages are there; says which are not."""
    found = []
    for name in names:
        package = contestants[name][1]
        if package is None or importlib.util.find_spec(package) is not None:
            found.append(name)
        else:
            print(f"{name} is left out: pip install {package.replace('_', '-')}")
    return found


def measure_all(
    contestants: Field, work: Path, names: list[str], args: argparse.Namespace
) -> tuple[dict[str, float], Tables]:
    """Measure over all loads; returns the last load's agreement, and the tables."""
    tables: Tables = {}
    agreement: dict[str, float] = {}
    for load_number in range(args.loads):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            load = process.submit(measure_one_load, contestants, work, names, load_number, args)
            agreement, loaded = load.result()
        print(f"load {load_number + 1} of {args.loads}: greedy tokens equal to {names[0]}'s: {agreement}", flush=True)
        merge(tables, loaded)
    return agreement, tables


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


def print_table(batch: int, what: str, turns: dict[str, Turns], targets: dict[str, float]) -> None:
    ours = next(iter(turns.values()))
    print(f"\n{f'{what}, batch {batch}':20} {'ms':>9} {'theirs / ours':>15}   by load")
    for name, one in turns.items():
        ratios = ratios_by_load(one, ours)
        target = f"  (target {targets[name]})" if what == "decode" and name in targets else ""
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"  {name:18} {one.median_ms:9.2f} {one.median_ms / ours.median_ms:15.2f}   {spread}{target}", flush=True)


def document(args: argparse.Namespace, sizes: Sizes, agreement: dict[str, float], tables: Tables) -> dict[str, Any]:
    packages = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "onnx", "numpy")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "model": {**asdict(sizes), "vocab_size": VOCAB, "dtype": "float32"},
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "os": platform.platform(),
            "python": platform.python_version(),
        },
        "versions": versions,
        "settings": {
            "prompt_tokens": args.prompt,
            "steps_per_turn": args.steps,
            "threads": args.threads,
            "loads": args.loads,
            "cache_capacity": CAPACITY,
            "foreign_load_limit": args.foreign_load,
            SPIN_KEY: SPIN_US,
        },
        "greedy_tokens_equal": agreement,
        "tables": [
            {
                "what": what,
                "batch": batch,
                "contestants": {
                    name: {
                        "median_ms": round(one.median_ms, 3),
                        "ratio_to_first": round(one.median_ms / next(iter(turns.values())).median_ms, 3),
                        "ratio_to_first_by_load": [
                            round(ratio, 3) for ratio in ratios_by_load(one, next(iter(turns.values())))
                        ],
                        "foreign_load_median": round(statistics.median(one.foreign_load), 3),
                        "load_of_turn": one.load,
                        "turns_ms": [[round(ms, 3) for ms in turn] for turn in one.ms],
                    }
                    for name, one in turns.items()
                },
            }
            for (batch, what), turns in tables.items()
        ],
    }


if __name__ == "__main__":
    main()
