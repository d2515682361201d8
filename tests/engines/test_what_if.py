"""Predicted gains of plans: every line alone against the passes themselves, and how they grow with more GPUs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from engines.hardware import read_gpus
from engines.latency_model import Deployment, Tokens, number_format, predict, structure_from_graph
from engines.prediction import memory_table, points_table
from engines.what_if import gain_text, plan_gains, sweep
from exporter.errors import EngineError, PlanError
from exporter.graph import ModelGraph
from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.pipeline import apply_plan
from exporter.plan import Plan
from exporter.read import open_model
from exporter.structure import Structure

DATA = Path(__file__).parents[1] / "data"
GPUS = read_gpus()
FP8 = number_format("fp8", dtype="bfloat16")
STEP = Tokens.decode(1, 1024)
PLAN = Plan(drop_attention=[64, (66, 75)], drop_ffn=[120], fuse=[(66, 70), (71, 74)], parallel=[(2, 5)])


def on(gpu: str, tp_size: int) -> Deployment:
    return Deployment(gpu=GPUS[gpu], tp_size=tp_size, format=FP8)


@pytest.fixture(scope="module")
def model() -> ModelGraph:
    return open_model(DATA / "llama-3.1-405b.config.json", need_weights=False).graph


def structure(name: str) -> Structure:
    return structure_from_graph(open_model(DATA / name, need_weights=False).graph)


def test_every_line_of_a_plan(model: ModelGraph) -> None:
    places = [on("h100-sxm", 8), on("b200", 4)]
    gains = plan_gains(model, PLAN, places, STEP)
    assert [(gain.what, gain.sublayers_saved) for gain in gains] == [
        ("drop_attention 64", 1),
        ("drop_attention [66, 75]", 10),
        ("drop_ffn 120", 1),
        ("fuse [66, 70]", 4),
        ("fuse [71, 74]", 3),
        ("parallel [2, 5]", 6),
        ("the whole plan", 25),
    ]
    dropped = drop_attention(model, PLAN.dropped_layers)
    cases = {
        0: (model, drop_attention(model, [64])),
        4: (dropped, fuse_ffn(dropped, [(71, 74)])),
        6: (model, apply_plan(model, PLAN)),
    }
    for index, graphs in cases.items():
        for place, saved, share in zip(places, gains[index].saved_us, gains[index].saved_share, strict=True):
            before, after = (predict(structure_from_graph(graph), place, STEP).latency_us for graph in graphs)
            assert saved == pytest.approx(before - after)
            assert share == pytest.approx((before - after) / before, rel=0.02)  # of the graph after drop_ffn, for 4
    # Decoding one sequence is bound by memory in every stage, so that the lines add up.
    for place in range(2):
        assert sum(gain.saved_us[place] for gain in gains[:-1]) == pytest.approx(gains[-1].saved_us[place])


def test_a_plan_that_does_not_fit(model: ModelGraph) -> None:
    with pytest.raises(PlanError, match="fuse"):
        plan_gains(model, Plan(fuse=[(3, 5)]), [on("h200", 8)], STEP)


@pytest.mark.parametrize("gpu", ["h100-sxm", "h200", "b200", "a100-80gb"])
def test_fusion_gains_more_on_more_gpus(gpu: str) -> None:
    """The paper's claim, for its own model: what fusion saves does not shrink with the weights of each GPU."""
    models = [structure(f"nemotron-ultra-253b{suffix}.structure.json") for suffix in ("-before-fusion", "")]
    number = number_format("bfloat16", dtype="bfloat16")
    places = [Deployment(gpu=GPUS[gpu], tp_size=size, format=number) for size in (1, 2, 4, 8, 16)]
    before, after = ([predict(one, place, STEP).latency_us for place in places] for one in models)
    speedups = [slow / fast for slow, fast in zip(before, after, strict=True)]
    assert speedups == sorted(speedups)
    assert speedups[0] > 1
    assert speedups[3] - 1 > 4 * (speedups[0] - 1)


def test_the_published_speedups() -> None:
    names = ("llama-3.1-405b.config", "nemotron-ultra-253b-before-fusion.structure", "nemotron-ultra-253b.structure")
    rates = [predict(structure(f"{name}.json"), on("h100-sxm", 8), STEP).tokens_per_s_per_user for name in names]
    assert rates[1] / rates[0] == pytest.approx(1.53, abs=0.04)
    assert rates[2] / rates[0] == pytest.approx(1.71, abs=0.08)


def test_the_reason_in_words(model: ModelGraph) -> None:
    text = gain_text(model, on("h100-sxm", 8), STEP)
    gain = plan_gains(model, PLAN, [on("h100-sxm", 8)], STEP)[-1]
    before = predict(structure_from_graph(model), on("h100-sxm", 8), STEP).latency_us
    assert text(Plan(), PLAN) == (
        f"predicted {gain.saved_us[0]:,.0f} us ({100 * gain.saved_us[0] / before:.1f} %) less per decode step"
        " on 8x H100 SXM, fp8"
    )


def test_a_sweep() -> None:
    models = [("49B", structure("nemotron-super-49b.structure.json")), ("70B", structure("llama-3.3-70b.config.json"))]
    points = sweep(models, [on("h200", 1), on("h200", 2)], batches=[1, 1024], context=4096)
    assert [(p.model, p.deployment.tp_size, p.batch) for p in points] == [
        (name, size, batch) for name in ("49B", "70B") for size in (1, 2) for batch in (1, 1024)
    ]
    assert [point.memory.fits for point in points] == [True, False] * 4
    first = points[0]
    assert first.prediction == predict(models[0][1], on("h200", 1), Tokens.decode(1, 4096))
    assert first.prefill == predict(models[0][1], on("h200", 1), Tokens.prefill(1, 4096))
    with pytest.raises(EngineError, match="49B was not made for so long a context: expected at most 131,072 tokens"):
        sweep(models, [on("h200", 1)], batches=[1], context=1 << 20)


def test_figures_are_whole_on_a_narrow_terminal() -> None:
    models = [("nemotron-ultra-253b", structure("nemotron-ultra-253b.structure.json"))]
    points = sweep(models, [on("h100-sxm", 8)], batches=[16], context=1024)
    console = Console(file=io.StringIO(), width=80)
    console.print(points_table(points, 2.0), memory_table(models, points, 1024))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for figure in ("1,053.8", "71,037"):  # ms of prefill, the longest context
        assert figure in shown
    assert {"activations", "sequences"} <= set(shown.split())
