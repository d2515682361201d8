"""Figures in the documentation are those of benchmarks/results, of the rules and of the kernels, digit for digit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest

from exporter.writers.onnx_tensorrt_rules import RULES
from plugins.wide_ffn.aot import variants

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS, LATENCY_MODEL = "benchmarks/README.md", "docs/latency_model.md"


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text("utf-8"))


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def percent(share: float, digits: int = 2, sign: str = "+") -> str:
    return f"{100 * share:{sign}.{digits}f} %"


def medians(tables: list[dict[str, Any]], *order: tuple[str, int]) -> dict[str, list[tuple[str, float]]]:
    """Contestant -> (median, its ratio to the first contestant) of every table: ms with a decimal in decode."""
    by_name = {(table["what"], table["batch"]): table["contestants"] for table in tables}
    found: dict[str, list[tuple[str, float]]] = {}
    for what, batch in order:
        contestants = {name: one["median_ms"] for name, one in by_name[what, batch].items()}
        first = next(iter(contestants.values()))
        for name, value in contestants.items():
            found.setdefault(name, []).append((f"{value:.{1 if what == 'decode' else 0}f}", value / first))
    return found


def decode_against_others() -> Iterator[str]:
    order = [(what, batch) for what in ("decode", "prefill") for batch in (1, 4)]
    (_, ours), *others = medians(results("compare_decode")["tables"], *order).items()
    yield row("Fuselage (ONNX Runtime 1.32)", *(ms for ms, _ in ours))
    for _, figures in others:
        yield row(*(f"{ms} ({ratio:.2f})" for ms, ratio in figures))


def int8_decode() -> Iterator[str]:
    sizes = [medians(one["tables"], ("decode", 1), ("prefill", 1)) for one in results("int8_decode").values()]
    (_, ours), *others = [(name, [size[name][i] for i in (0, 1) for size in sizes]) for name in sizes[0]]
    yield row("float32", *(ms for ms, _ in ours))
    for _, figures in others:
        yield row(*(f"{ms} ({1 / ratio:.2f})" for ms, ratio in figures))
    sizes = [medians(one["tables"], ("decode", 1)) for one in results("int8_decode_float_head").values()]
    static, weight_only = (
        " and ".join(f"{1 / size[name][0][1]:.2f}" for size in sizes)
        for name in ("int8-static-float-head", "int8-weight-only-float-head")
    )
    yield f"decode is {static} times as fast as float32 in W8A8 static, {weight_only} times weight-only"


def cpp_loop() -> Iterator[str]:
    summary = results("cpp_loop")["summary"]
    for name, figure, digits in (("decode step, ms", "decode", 2), ("time to first token, ms", "ttft", 1)):
        one = summary[figure]
        low, high = one["interval"]
        yield row(
            name,
            f"{one['cpp_ms']:.{digits}f}",
            f"{one['python_ms']:.{digits}f}",
            f"{one['ratio']:.3f}, {low:.3f} to {high:.3f}",
            f"{min(one['by_load']):.2f} to {max(one['by_load']):.2f}",
        )
    yield f"adds {summary['cpp_loop_us']['median']:.1f} µs to"
    yield f"(99th percentile {summary['cpp_loop_us']['p99']:.0f} µs)"


def streaming() -> Iterator[str]:
    sizes = results("streaming")["sizes"]
    for name, text in (("transform", "`transform`: throughput / of `cp -r` / of `cp -r` and `sync`"),
                       ("export", "`export --to onnx`: the same")):  # fmt: skip
        yield row(
            text,
            *(
                f"{size['gb_per_s'][name]:.2f} GB/s / {size['throughput_of_cp'][name]:.2f} / "
                f"{size['throughput_of_cp_and_sync'][name]:.2f}"
                for size in sizes
            ),
        )
        yield row(f"`{name}`: peak resident memory", *(f"{max(size['peak_gib'][name]):.3f} GiB" for size in sizes))
    (size,) = results("streaming_quantized")["sizes"]
    for name, seconds in size["seconds"].items():
        rate = size["source_bytes"] / min(seconds) / 1e9
        yield row(f"{seconds[0]:.1f}, {seconds[1]:.1f} s", f"{rate:.2f} GB/s", f"{max(size['peak_gib'][name]):.2f} GiB")


def dependency() -> Iterator[str]:
    for run in results("dependency")["runs"]:
        one, many = (run["seconds"][way] for way in ("one_pass", "pass_per_block"))
        peaks = " / ".join(f"{run['peak_gib'][way]:.2f}" for way in ("one_pass", "pass_per_block"))
        yield row(
            run["tokens"],
            f"{fmean(one):.1f} s",
            f"{fmean(many):.1f} s",
            f"{median(many) / median(one):.1f}",
            f"{peaks} GiB",
        )


def reverse_order() -> Iterator[str]:
    for run in results("reverse_order")["runs"]:
        figures = (f"{run[way]['perplexity']:.2f}" for way in ("reversed", "fused"))
        yield row("{} to {}".format(*run["run"]), *figures)


def recovery() -> Iterator[str]:
    models = results("recover")["models"]
    yield row("original", f"{models['original']['perplexity']:.2f}") + " | |"
    for name, text in (("transformed", "fused"), ("recovered", "fused, then trained")):
        one = models[name]
        yield row(text, f"{one['perplexity']:.2f}", f"{one['kl_divergence']:.3f}", f"{one['top1_agreement']:.3f}")


def report_cost() -> Iterator[str]:
    cost = results("report_cost")
    yield f"{cost['results_bytes'] / 1e6:.1f} MB) become a report of {cost['page_bytes'] / 1e6:.0f} MB"
    yield f"{cost['median_s']:.1f} s (median; {min(cost['seconds']):.1f} to {max(cost['seconds']):.1f})"


def published_rates() -> Iterator[str]:
    fit = results("latency_model")["published"]
    for one in fit["observations"]:
        errors = percent(one["error"]), percent(one["error_left_out"])
        yield row(f"{one['measured_ms']:.3f}", f"{one['predicted_ms']:.3f}", *errors)
    constants = fit["constants"]
    yield f"**{percent(constants['memory_efficiency'], 1, '')}** of the memory rate"
    yield f"**{constants['sublayer_us']:.1f} us** per sequential sublayer"


def demo_on_a_cpu() -> Iterator[str]:
    cells = results("latency_model")["demo_cpu"]["observations"]
    for name, text in (("decode", "decode, 12 cells"), ("time to first token", "time to first token, 12 cells")):
        errors, left_out = (
            [abs(cell[key]) for cell in cells if f", {name}," in cell["name"]] for key in ("error", "error_left_out")
        )
        yield row(text, *(percent(share, 0, "") for share in (fmean(errors), max(errors), fmean(left_out))))


def speedup_over_tp() -> Iterator[str]:
    figures = results("latency_model")["speedup_over_tp"]
    for gpu in dict.fromkeys(one["gpu"] for one in figures):
        yield row(gpu, *(f"{one['speedup']:.3f}" for one in figures if one["gpu"] == gpu))


def rules() -> Iterator[str]:
    yield f"and {len(RULES)} rules"


def kernels() -> Iterator[str]:
    yield f"compiles all {len(variants())} kernels"


FIGURES = {
    decode_against_others: MEASUREMENTS,
    int8_decode: MEASUREMENTS,
    cpp_loop: MEASUREMENTS,
    streaming: MEASUREMENTS,
    dependency: MEASUREMENTS,
    reverse_order: MEASUREMENTS,
    recovery: MEASUREMENTS,
    report_cost: MEASUREMENTS,
    published_rates: LATENCY_MODEL,
    demo_on_a_cpu: LATENCY_MODEL,
    speedup_over_tp: LATENCY_MODEL,
    rules: "docs/tensorrt_import.md",
    kernels: "docs/wide_ffn.md",
}


@pytest.mark.parametrize(("figures", "page"), FIGURES.items(), ids=[one.__name__ for one in FIGURES])
def test_figures_are_those_of_their_source(figures: Any, page: str) -> None:
    text = " ".join((ROOT / page).read_text("utf-8").split())
    expected = [" ".join(one.strip("| ").split()) for one in figures()]
    assert expected
    assert [one for one in expected if one not in text] == []
