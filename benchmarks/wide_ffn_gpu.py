"""The wide-FFN op against library GEMMs on one NVIDIA GPU: single FFNs, runs of them against one, and whole models.

    python benchmarks/wide_ffn_gpu.py -o benchmarks/results/wide_ffn_gpu.jsonl [--minutes 9] [--parts ffn fusion decode]
    python benchmarks/wide_ffn_gpu.py --dry-run         the cases, their bytes and the memory they need; no GPU
    python benchmarks/wide_ffn_gpu.py --smoke -o X      tiny sizes, on a CPU too: does the script work?

Needs PyTorch, Triton, NumPy and ml_dtypes; matplotlib for the plot. Parts:

    ffn       norm, gate, up, SwiGLU, down and residual of one FFN at the sizes of published models, whole and as a
              tensor-parallel shard, 1 to 64 tokens
    fusion    k FFNs one after the other against one FFN of k times the width: the same bytes
    decode    tokens of whole models with random weights at real sizes: as published, and with attentions dropped and
              FFNs fused

Contestants: `library` (cuBLASLt through PyTorch: torch.matmul, _scaled_mm, _int_mm, and eager kernels around them),
`compiled` (the same through torch.compile, for few cases because it compiles for long), `op`
(torch.ops.fuselage.wide_ffn). Times are those of CUDA-graph replays, over sets of weights that do not fit the L2 cache
together; achieved bytes per second count every weight byte once, and are compared with a copy measured in the same
session. Every contestant's result is held against the library's first.

The output is a log: a killed or timed-out run is continued by the same command, and cases that it holds are skipped,
failed ones too (remove their lines to try again). Random weights say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_models import FORMATS, LAYERS, decoder, ffn_of, nbytes, random_tensor  # noqa: E402
from gpu_timing import Budget, Log, call_times_us, environment, sets_for, times_us  # noqa: E402

from engines.torch_model import DecodeStep, TorchModel, ffn_on_device  # noqa: E402

TOKENS = (1, 16, 4, 32, 64)
SHARDS = (8, 1, 4, 2)
FUSED = (2, 4, 8)
COMPILED = ("bf16", "fp8", "int8", "fp8-weight-only", "int8-weight-only")  # one case each
CONTEXT = 512  # tokens in the cache when a model's decode is timed
DECODE_STEPS = 64
SHARES = {"ffn": 5.0, "fusion": 1.5, "decode": 3.5}  # of the time limit
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
    return [*_ffn_cases(smoke), *_fusion_cases(smoke), *_decode_cases(smoke)]


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
        return [[torch.compile(call, dynamic=False) for call in ffns] for ffns in sets]

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


def measure(wanted: Sequence[Case], log: Log, budget: Budget, device: torch.device) -> int:
    """Measure what the log lacks, as far as time goes; returns how many cases are left."""
    known = {key_of(record) for record in log.records() if "case" in record}
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    parts = list(dict.fromkeys(case.part for case in wanted))
    left = 0
    setup, ffns = None, None
    for case in wanted:
        if key_of({"case": asdict(case)}) in known:
            continue
        if budget.is_spent(parts.index(case.part)):
            left += 1
            continue
        record: dict[str, Any] = {"case": asdict(case), "weight_bytes": case.weight_bytes}
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
    the op reaches, and how many times as fast as the library it is.
    """
    copy: float | None = None
    ffns: dict[tuple[str, str], dict[tuple[str, int], tuple[float, float]]] = {}
    others = []
    for record in log.records():
        if "session" in record:
            copy = record["session"].get("copy_bytes_per_s", copy)
            continue
        case = Case(**record["case"])
        if case.part != "ffn" or "error" in record:
            others.append(line_of(record, copy))
            continue
        median = statistics.median(record["samples_us"])
        share = math.nan if copy is None else record["weight_bytes"] / (median / 1e6) / copy
        ffns.setdefault((name_of(case), case.format), {})[case.contestant, case.tokens] = median, share
    for (name, format), found in ffns.items():
        columns = [
            f"{count:2}: {found['op', count][1]:4.0%} x{found['library', count][0] / found['op', count][0]:.2f}"
            for count in sorted(TOKENS)
            if ("op", count) in found and ("library", count) in found
        ]
        print(f"{name:36} {format:16} {' | '.join(columns)}")
    for line in others:
        print(line)
    if plot is not None and ffns and copy is not None:
        draw(ffns, plot)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a contestant failed or cases are left, so that a script knows to come back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="log of results (JSON lines); an existing one is continued")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit; the parts share it (default: 9)")
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
        if not torch.cuda.is_available() and not options.smoke:
            parser.error("PyTorch sees no GPU; --dry-run and --smoke need none")
        import plugins.wide_ffn.op  # noqa: F401  registers torch.ops.fuselage.wide_ffn

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        log.add({"session": environment(device)})
        shares = [SHARES[part] for part in dict.fromkeys(case.part for case in wanted)]
        left = measure(wanted, log, Budget(options.minutes, shares), device)
    report(log, options.plot or options.output.with_suffix(".png"))
    failed = sum("error" in record for record in log.records())
    print(f"{left} cases left for another run, {failed} failed")
    return 1 if left or failed else 0


if __name__ == "__main__":
    sys.exit(main())
