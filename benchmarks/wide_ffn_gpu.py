"""The wide-FFN op against library GEMMs on one NVIDIA GPU: single FFNs, runs of them against one, and whole models.

    python benchmarks/wide_ffn_gpu.py -o benchmarks/results/wide_ffn_gpu.jsonl [--minutes 9] [--parts ffn fusion decode]
                                      [--tune-below 0.88]
    python benchmarks/wide_ffn_gpu.py --dry-run         the cases, their bytes and the memory they need; no GPU
    python benchmarks/wide_ffn_gpu.py --smoke -o X      tiny sizes, on a CPU too: does the script work?

Needs PyTorch, Triton, NumPy and ml_dtypes; matplotlib for the plot. Parts:

    ffn       norm, gate, up, SwiGLU, down and residual of one FFN at the sizes of published models, whole and as a
              tensor-parallel shard, 1 to 64 tokens
    fusion    k FFNs one after the other against one FFN of k times the width: the same bytes
    decode    tokens of whole models with random weights at real sizes: as published, and with attentions dropped and
              FFNs fused

The cases of the target come first: single FFNs at least 28,672 wide in bf16 and fp8, of at most 32 tokens. With
`--tune-below`, what reaches less of the copy's bandwidth there is tuned (`plugins.wide_ffn.tune`) and measured again.

Contestants: `library` (cuBLASLt through PyTorch: torch.matmul, _scaled_mm, _int_mm, and eager kernels around them),
`compiled` (the same through torch.compile, for few cases because it compiles for long), `op`
(torch.ops.fuselage.wide_ffn). Times are those of CUDA-graph replays, over sets of weights that do not fit the L2 cache
together; achieved bytes per second count every weight byte once, and are compared with a copy measured in the same
session, read and written bytes counted; weights are only read, so what a reading kernel reaches is given beside it.
Every contestant's result is held against the library's first.

The output is a log: a killed or timed-out run is continued by the same command, and cases that it holds are skipped,
failed ones too (remove their lines to try again). It also holds what was tuned: on a fresh machine the log is all that
has to be there. Random weights say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_models import DECODERS, FORMATS, LAYERS, decoder, ffn_of, nbytes, random_tensor  # noqa: E402
from gpu_timing import Budget, Log, bandwidths, call_times_us, clocks, environment, sets_for, times_us  # noqa: E402

from engines.torch_model import DecodeStep, TorchModel, ffn_on_device  # noqa: E402
from exporter.graph import FFN  # noqa: E402
from plugins.wide_ffn.configs import FOLDER, MULTIPROCESSORS, bucket_of, config_for, row_of  # noqa: E402
from plugins.wide_ffn.tune import Problem, compile_config, compilers, save_rows, tune  # noqa: E402
from plugins.wide_ffn.tune import line_of as line_of_tuned  # noqa: E402

TOKENS = (1, 16, 4, 32, 64)
SHARDS = (8, 1, 4, 2)
FUSED = (2, 4, 8)
COMPILED = ("bf16", "fp8", "int8", "fp8-weight-only", "int8-weight-only")  # one case each
CONTEXT = 512  # tokens in the cache when a model's decode is timed
DECODE_STEPS = 64
PARTS = ("ffn", "fusion", "decode")
SHARES = {  # of the time limit; what one does not need is the next one's
    "target": 6.0,
    "tuning": 8.0,
    "tuned": 2.0,  # the target's cases again
    "ffn": 4.0,
    "fusion": 1.0,
    "decode": 3.0,
    "compiled": 2.0,
}
TARGET_WIDTH, TARGET_TOKENS, TARGET_FORMATS = 28672, 32, ("bf16", "fp8")  # at least so wide, at most so many tokens
TARGET_SHARE = 0.88  # of the copy's bandwidth
CONFIGS = FOLDER / "sm_90.json"
LARGEST_DIFFERENCE = 0.05  # from the library's result, relative: some 8-bit codes are off by a step
FREE_SHARE = 0.9  # of the device's memory may be used

Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the results; `layer`, `shards` and `fused` are of FFNs, `model` and `is_fused` of decode."""

    part: str
    contestant: str
    format: str
    tokens: int
    layer: str | None = None
    shards: int = 1
    fused: int = 1  # FFNs that became one, or stand in a row
    model: str | None = None
    is_fused: bool = False

    @property
    def setup(self) -> tuple[Any, ...]:
        """Cases of one setup have the same weights."""
        return (self.part, self.format, self.layer, self.shards, self.fused, self.model, self.is_fused)

    @property
    def stage(self) -> str:
        """What it shares time with; a key of SHARES."""
        if self.contestant == "compiled":
            return self.contestant
        is_of_target = self.part == "ffn" and self.format in TARGET_FORMATS and self.tokens <= TARGET_TOKENS
        return "target" if is_of_target and self.widths[0] >= TARGET_WIDTH else self.part

    @property
    def hidden(self) -> int:
        return LAYERS[str(self.layer)].hidden if self.model is None else DECODERS[self.model].hidden

    @property
    def widths(self) -> list[int]:
        """Of the FFNs that a call runs, each once."""
        if self.model is not None:
            graph = decoder(self.model, FORMATS[self.format], fused=self.is_fused)
            return sorted({block.ffn.intermediate_size for block in graph.flat_blocks if isinstance(block.ffn, FFN)})
        width = LAYERS[str(self.layer)].width // self.shards
        return [width * self.fused if self.contestant.endswith(", fused") else width]

    @property
    def problems(self) -> list[Problem]:
        """What the op has block sizes for; none of another contestant."""
        if not self.contestant.startswith("op"):
            return []
        format, bucket = FORMATS[self.format], bucket_of(self.tokens)
        return [Problem(bucket, self.hidden, width, format.weights.name, format.activations) for width in self.widths]

    @property
    def weight_bytes(self) -> int:
        """Bytes that one call reads; of a model without its embedding table."""
        format = FORMATS[self.format]
        if self.model is not None:
            graph = decoder(self.model, format, fused=self.is_fused)
            return nbytes(graph) - graph.embedding.nbytes
        layer = LAYERS[str(self.layer)]
        return self.fused * nbytes(ffn_of(layer.hidden, layer.width // self.shards, format))


def cases(smoke: bool) -> list[Case]:
    """All cases, the most telling first."""
    stages = list(SHARES)
    found = [*_ffn_cases(smoke), *_fusion_cases(smoke), *_decode_cases(smoke)]
    return sorted(found, key=lambda case: stages.index(case.stage))


def _ffn_cases(smoke: bool) -> Iterator[Case]:
    layers = ["tiny"] if smoke else [name for name in LAYERS if name != "tiny"]
    for format, shards, layer in itertools.product(FORMATS, SHARDS[:2] if smoke else SHARDS, layers):
        for tokens in TOKENS[:2] if smoke else TOKENS:
            contestants = ["library", "op"]
            if (layer, shards, tokens) == ("llama-70b", 8, 1) and format in COMPILED:
                contestants.append("compiled")
            for contestant in contestants:
                yield Case(part="ffn", contestant=contestant, format=format, tokens=tokens, layer=layer, shards=shards)


def _fusion_cases(smoke: bool) -> Iterator[Case]:
    layers = ["tiny"] if smoke else ["llama-70b", "llama-405b"]
    for format, layer, fused in itertools.product(("fp8", "bf16", "int8"), layers, FUSED[:1] if smoke else FUSED):
        for tokens, contestant in itertools.product(TOKENS[:2], ("library", "op")):
            for name in (f"{contestant}, {fused} in a row", f"{contestant}, fused"):
                yield Case(
                    part="fusion", contestant=name, format=format, tokens=tokens, layer=layer, shards=8, fused=fused
                )  # fmt: skip


def _decode_cases(smoke: bool) -> Iterator[Case]:
    wanted = [("tiny", ("bf16", "fp8"))] if smoke else [
        ("llama-70b", ("fp8", "int8")), ("llama-8b", ("bf16", "fp8", "int8")), ("super-49b", ("fp8", "bf16")),
    ]  # fmt: skip
    for model, formats in wanted:
        for format, is_fused, tokens in itertools.product(formats, (False, True), (1, 8)):
            for contestant in ("library", "op"):
                yield Case(
                    part="decode", contestant=contestant, format=format, tokens=tokens, model=model, is_fused=is_fused
                )


class Ffns:
    """The weights of one setup of FFNs on the device, in as many sets as do not fit the L2 cache together."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case = case
        self._device = device
        self.sets = sets_for(case.weight_bytes, device)
        self._loaded: dict[str, list[list[tuple[Call, Call]]]] = {}

    def calls(self, contestant: str) -> list[list[Call]]:
        """For every set the FFNs that a call runs one after the other; all contestants have the same weights."""
        how, _, arrangement = contestant.partition(", ")
        if arrangement not in self._loaded:
            self._loaded.clear()  # there may be no room for both
            self._loaded[arrangement] = self._load(arrangement)
        sets = [[both[how == "op"] for both in ffns] for ffns in self._loaded[arrangement]]
        if how != "compiled":
            return sets
        torch._dynamo.reset()  # it stops compiling a function, without a word, after it has seen a few kinds of calls
        return [[torch.compile(call, dynamic=False, fullgraph=True) for call in ffns] for ffns in sets]

    def _load(self, arrangement: str) -> list[list[tuple[Call, Call]]]:
        layer = LAYERS[str(self._case.layer)]
        width, count = layer.width // self._case.shards, 1
        if arrangement == "fused":
            width *= self._case.fused
        elif arrangement:
            count = self._case.fused
        ffn = ffn_of(layer.hidden, width, FORMATS[self._case.format])
        torch.manual_seed(0)

        def load() -> tuple[Call, Call]:
            return ffn_on_device(ffn, device=self._device, dtype=torch.bfloat16, load=random_tensor)

        return [[load() for _ in range(count)] for _ in range(self.sets)]


def measure_ffns(case: Case, ffns: Ffns, device: torch.device) -> dict[str, Any]:
    """Samples of one case on FFNs, and how far its result is from the library's."""
    torch.manual_seed(0)
    x = torch.randn(case.tokens, LAYERS[str(case.layer)].hidden, dtype=torch.bfloat16, device=device)

    def run(calls: Sequence[Call]) -> torch.Tensor:
        y = x
        for call in calls:
            y = call(y)
        return y

    sets = ffns.calls(case.contestant)
    of_library = ffns.calls(", ".join(["library", *case.contestant.split(", ")[1:]]))
    wanted, found = (run(one[0]) - x for one in (of_library, sets))
    # What one FFN gets wrong the next one passes on.
    difference = relative_difference(found, wanted, LARGEST_DIFFERENCE * math.sqrt(len(sets[0])))
    samples = call_times_us(lambda index: run(sets[index]), len(sets), device)
    return {"samples_us": samples, "relative_difference": difference, "weight_sets": len(sets)}


def relative_difference(found: torch.Tensor, wanted: torch.Tensor, largest: float) -> float:
    """|found - wanted| / |wanted|.

    Raises:
        ArithmeticError: that is not less than `largest`.
    """
    found, wanted = found.double(), wanted.double()
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference < largest:
        raise ArithmeticError(f"the result is wrong: it differs from the library's by {difference:.3g}")
    return difference


def measure_decode(case: Case, device: torch.device) -> dict[str, Any]:
    """Samples of the decode steps of a whole model."""
    torch.manual_seed(0)
    graph = decoder(str(case.model), FORMATS[case.format], fused=case.is_fused)
    dtype, is_op = torch.bfloat16, case.contestant == "op"
    model = TorchModel(graph, device=device, dtype=dtype, wide_ffn=is_op, load=random_tensor)
    with torch.inference_mode():
        cache = model.new_cache(case.tokens, CONTEXT + 3 * DECODE_STEPS)
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_()
        step = DecodeStep(model, cache, case.tokens)
        step.tokens.random_(0, graph.vocab_size)
        step.positions.fill_(CONTEXT)

        def decode() -> None:
            step.tokens.copy_(step().argmax(-1))
            step.positions.add_(1)

        steps = DECODE_STEPS if device.type == "cuda" else 2
        times_us(decode, steps, device)
        samples = times_us(decode, steps, device)
    return {"samples_us": samples, "context": CONTEXT, "sequential_sublayers": graph.sequential_sublayers}


def config_row(problem: Problem, device: torch.device) -> dict[str, Any]:
    """The block sizes that the op takes, and where they come from, with the sizes of the FFN."""
    config = config_for(**asdict(problem), multiprocessors=multiprocessors(device))
    row = row_of(config, problem.hidden, problem.width, problem.weights, problem.activations)
    return row | {"origin": config.origin}


def multiprocessors(device: torch.device) -> int:
    """Those of the GPU; on a CPU those that the rule is for."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


def measure(wanted: Sequence[Case], log: Log, budget: Budget, device: torch.device, *, stage: str | None = None) -> int:
    """Measure what the log lacks, as far as time goes; returns how many cases are left.

    A case of the op that is in the log with other block sizes is measured again.

    Args:
        stage: whose time is spent; the cases' own if not given.
    """
    known = {_measured_key(record) for record in log.records() if "case" in record}
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    left = 0
    setup, ffns = None, None
    for case in wanted:
        record: dict[str, Any] = {
            "case": asdict(case),
            "hidden": case.hidden,
            "widths": case.widths,
            "weight_bytes": case.weight_bytes,
            "block_sizes": [config_row(problem, device) for problem in case.problems],
        }
        if _measured_key(record) in known:
            continue
        if budget.is_spent(stage or case.stage):
            left += 1
            continue
        if case.setup != setup:
            setup, ffns = case.setup, None  # the old weights go before the new ones come
            _give_back(device)
        try:
            if case.weight_bytes > FREE_SHARE * free:
                raise MemoryError(f"{case.weight_bytes} bytes of weights do not fit")
            if case.part == "decode":
                record |= measure_decode(case, device)
            else:
                ffns = ffns or Ffns(case, device)
                record |= measure_ffns(case, ffns, device)
        except Exception as error:  # one contestant that cannot run must not cost the others their turn
            record["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        log.add(record)
        print(line_of(record, None), flush=True)
        if "error" in record or case.part == "decode":  # else not: to look for garbage takes longer than many a case
            _give_back(device)  # raises if that error has left the device unusable
    return left


def _measured_key(record: dict[str, Any]) -> tuple[Any, ...]:
    return (*key_of(record), json.dumps(record.get("block_sizes", [])))


def compile_ahead(wanted: Sequence[Case], pool: Executor, device: torch.device) -> None:
    """Have the kernels of all cases compiled at once; what fails will fail again, as its case's error."""
    problems = list(dict.fromkeys(problem for case in wanted for problem in case.problems))
    counts = multiprocessors(device)
    configs = [config_for(**asdict(problem), multiprocessors=counts) for problem in problems]
    for problem, error in zip(problems, pool.map(compile_config, problems, configs), strict=True):
        if error is not None:
            print(f"{problem}: {error}", flush=True)


def tune_missed(wanted: Sequence[Case], share: float, log: Log, budget: Budget, pool: Executor) -> int:
    """Tune what is below a share of the copy's bandwidth, the farthest first; returns how many problems are left."""
    found = shares_of(log)
    missed = [case for case in wanted if found.get(case, math.inf) < share and case.problems]
    tried = {Problem(**record["tuning"]) for record in log.records() if "tuning" in record}
    left = 0
    for problem in dict.fromkeys(case.problems[0] for case in sorted(missed, key=lambda case: found[case])):
        if problem in tried:
            continue
        if budget.is_spent("tuning"):
            left += 1
            continue
        record: dict[str, Any] = {"tuning": asdict(problem)}
        try:
            record["tuned"] = tune(problem, pool=pool)
            save_rows(CONFIGS, [record["tuned"]])
            print(f"{problem}: {line_of_tuned(problem, record['tuned'])}", flush=True)
        except Exception as error:  # as in `measure`
            record["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"{problem}: {record['error']}", flush=True)
        log.add(record)
        _give_back(torch.device("cuda"))
    return left


def shares_of(log: Log) -> dict[Case, float]:
    """The share of the copy's bandwidth of every case, as measured last; the copy is that of the same session."""
    copy, found = math.nan, {}
    for record in log.records():
        copy = record.get("session", {}).get("copy_bytes_per_s", copy)
        if "samples_us" in record:
            achieved = record["weight_bytes"] / (statistics.median(record["samples_us"]) / 1e6)
            found[Case(**record["case"])] = achieved / copy
    return found


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """What tells cases apart."""
    return tuple(sorted((name, str(value)) for name, value in record["case"].items()))


def line_of(record: dict[str, Any], copy_bytes_per_s: float | None) -> str:
    """One case in words: time, achieved bandwidth and its share of the copy's."""
    case = Case(**record["case"])
    head = f"{case.part:6} {name_of(case):42} {case.format:16} {case.tokens:3} tokens  {case.contestant:22}"
    if "error" in record:
        return f"{head} {record['error']}"
    median = statistics.median(record["samples_us"])
    achieved = record["weight_bytes"] / (median / 1e6)
    share = "" if copy_bytes_per_s is None else f"  {achieved / copy_bytes_per_s:6.1%} of the copy"
    return f"{head} {median:10.1f} us  {achieved / 1e12:6.3f} TB/s{share}"


def name_of(case: Case) -> str:
    """What a case is about."""
    if case.model is not None:
        return f"{case.model} {'fused' if case.is_fused else 'as published'}"
    return f"{case.layer}, 1/{case.shards}" + (f" x {case.fused}" if case.fused > 1 else "")


def report(log: Log, plot: Path | None) -> None:
    """Print what a log holds, and draw it where matplotlib is there. Nothing is measured.

    Of single FFNs there is a line per layer and format: for every number of tokens the share of the copy bandwidth that
    the op reaches, and how many times as fast as the library it is. Of a case measured more than once, the last counts.
    """
    session: dict[str, Any] = {}
    ffns: dict[tuple[str, str], dict[tuple[str, int], tuple[float, float]]] = {}
    others: dict[Case, str] = {}
    shares = shares_of(log)
    for record in log.records():
        session = record.get("session", session)
        if "case" not in record:
            continue
        case = Case(**record["case"])
        if case.part != "ffn" or "error" in record:
            others[case] = line_of(record, session.get("copy_bytes_per_s"))
            continue
        others.pop(case, None)
        median = statistics.median(record["samples_us"])
        ffns.setdefault((name_of(case), case.format), {})[case.contestant, case.tokens] = median, shares[case]
    for line in others.values():
        print(line)
    for (name, format), found in ffns.items():
        columns = [
            f"{count:2}: {found['op', count][1]:4.0%} x{found['library', count][0] / found['op', count][0]:.2f}"
            for count in sorted(TOKENS)
            if ("op", count) in found and ("library", count) in found
        ]
        print(f"{name:36} {format:16} {' | '.join(columns)}")
    if "copy_bytes_per_s" in session:
        names = ("memcpy", "kernel_copy", "copy", "read")
        found_rates = [(name, session.get(f"{name}_bytes_per_s")) for name in names]
        print("last session: " + ", ".join(f"{name} {rate / 1e12:.3f} TB/s" for name, rate in found_rates if rate))
        if plot is not None and ffns:
            draw(ffns, plot)
    of_target = {case: share for case, share in shares.items() if case.stage == "target" and case.contestant == "op"}
    if of_target:
        lowest = min(of_target, key=lambda case: of_target[case])
        reached = sum(share >= TARGET_SHARE for share in of_target.values())
        print(
            f"target: {reached} of {len(of_target)} measured cases reach {TARGET_SHARE:.0%} of the copy; the lowest, "
            f"{name_of(lowest)} {lowest.format} {lowest.tokens} tokens, {of_target[lowest]:.1%}"
        )


def draw(ffns: dict[tuple[str, str], dict[tuple[str, int], tuple[float, float]]], plot: Path) -> None:
    """Achieved share of the copy bandwidth over tokens, one panel per layer, a line per format and contestant."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    panels = sorted({name for name, _ in ffns})
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * rows), layout="constrained")
    axes = dict(zip(panels, figure.subplots(rows, columns, squeeze=False).flat, strict=False))
    for (name, format), found in ffns.items():
        for contestant, style in {"library": "--", "compiled": ":", "op": "-"}.items():
            points = sorted((count, share) for (how, count), (_, share) in found.items() if how == contestant)
            axes[name].plot(
                [count for count, _ in points],
                [share for _, share in points],
                style,
                marker=".",
                color=f"C{list(FORMATS).index(format)}",
                label=f"{format}, {contestant}",
            )
    for name, one in axes.items():
        one.set(title=name, xscale="log", xlabel="tokens", ylabel="of the copy bandwidth", ylim=(0, 1.05))
        one.set_xticks(sorted(TOKENS), [str(count) for count in sorted(TOKENS)])
    axes[panels[0]].legend(fontsize=5)
    figure.savefig(plot)


def list_cases(wanted: Sequence[Case]) -> None:
    """Print what would be measured."""
    largest = 0
    for setup, group in itertools.groupby(wanted, lambda case: case.setup):
        found = list(group)
        largest = max(largest, found[0].weight_bytes)
        tokens = ",".join(map(str, sorted({case.tokens for case in found})))
        contestants = "; ".join(dict.fromkeys(case.contestant for case in found))
        head = f"{setup[0]:6} {name_of(found[0]):42} {found[0].format:16} {found[0].weight_bytes / 1e9:8.3f} GB"
        print(f"{head}  {tokens:12} tokens  {contestants}")
    print(f"{len(wanted)} cases, at most {largest / 1e9:.1f} GB of weights at a time")


def run(wanted: Sequence[Case], log: Log, minutes: float, tune_below: float | None) -> int:
    """Measure, tune, and measure again; returns how much is left for another run."""
    import plugins.wide_ffn.op  # noqa: F401  registers torch.ops.fuselage.wide_ffn

    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuned = [record["tuned"] for record in log.records() if "tuned" in record]
    if tuned:
        save_rows(CONFIGS, tuned)
    log.add({"session": environment(device)})
    stages = {case.stage for case in wanted} | ({"tuning", "tuned"} if tune_below is not None else set())
    shares = {stage: share for stage, share in SHARES.items() if stage in stages}
    left = 0
    with compilers() if device.type == "cuda" else nullcontext() as pool:
        if pool is not None:
            compile_ahead(wanted, pool, device)
        budget = Budget(minutes - (time.monotonic() - began) / 60, shares)
        if pool is not None and tune_below is not None:
            of_target = [case for case in wanted if case.stage == "target"]
            measure(of_target, log, budget, device)
            left += tune_missed(of_target, tune_below, log, budget, pool)
            measure(of_target, log, budget, device, stage="tuned")
    left += measure(wanted, log, budget, device)
    log.add({"end": {**bandwidths(device), "nvidia_smi": clocks()} if device.type == "cuda" else {}})
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a contestant failed or cases are left, so that a script knows to come back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="log of results (JSON lines); an existing one is continued")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit; the parts share it (default: 9)")
    parser.add_argument(
        "--tune-below", type=float, metavar="SHARE", help="of the copy's bandwidth, for the target's cases"
    )
    parser.add_argument("--plot", type=Path, help="where to draw; the output's name with .png if not given")
    parser.add_argument("--dry-run", action="store_true", help="list the cases, their bytes, and stop")
    parser.add_argument("--report-only", action="store_true", help="print and draw what the output holds")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also on a CPU")
    options = parser.parse_args(arguments)
    wanted = [case for case in cases(options.smoke) if case.part in options.parts]
    if options.dry_run:
        list_cases(wanted)
        return 0
    if options.output is None:
        parser.error("-o is missing")
    log = Log(options.output)
    left = 0
    if not options.report_only:
        if not torch.cuda.is_available() and (not options.smoke or options.tune_below is not None):
            parser.error("PyTorch sees no GPU; --dry-run and --smoke need none")
        left = run(wanted, log, options.minutes, options.tune_below)
    report(log, options.plot or options.output.with_suffix(".png"))
    failed = sum("error" in record for record in log.records())
    print(f"{left} cases left for another run, {failed} failed")
    return 1 if left or failed else 0


if __name__ == "__main__":
    sys.exit(main())
