"""Fitted constants: the published decode rates, constants that are known, and what cannot be fitted to."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from engines import latency_fit
from engines.hardware import read_gpus
from engines.latency_fit import (
    Fit,
    Observation,
    criterion_for,
    fit_constants,
    leave_one_out,
    observations_from_results,
    read_observations,
)
from engines.latency_model import PUBLISHED, Constants, Deployment, Tokens, number_format, structure_from_graph
from engines.results import read_results
from exporter.errors import EngineError, FuselageError
from tests.tiny import tiny_graph

ROOT = Path(__file__).parents[2]
GPUS = read_gpus()
RATES = ROOT / "benchmarks" / "published_rates.yaml"
DEMO = ROOT / "benchmarks" / "results" / "demo_cpu.json"


@pytest.fixture(scope="module")
def published() -> list[Observation]:
    return read_observations(RATES, GPUS)


def test_published_structures(published: list[Observation]) -> None:
    """The depths and parameters that the models are known by."""
    assert [one.structure.sequential_sublayers for one in published] == [252, 190, 145, 145, 160]
    billions = [one.structure.num_parameters / 1e9 for one in published]
    assert billions == pytest.approx([405.853, 253.402, 253.401, 253.401, 70.554], abs=1e-3)


def test_published_rates_follow_from_two_constants(published: list[Observation]) -> None:
    fit = fit_constants(published)
    assert fit.fitted == ("memory_efficiency", "sublayer_us")
    assert fit.constants.compute_efficiency == PUBLISHED.compute_efficiency
    assert fit.loss("largest") < 0.025
    assert 0.9 < fit.constants.memory_efficiency < 1
    assert 10 < fit.constants.sublayer_us < 31
    # The constants that come with Fuselage are these, rounded.
    assert pytest.approx(fit.constants.memory_efficiency, abs=5e-4) == PUBLISHED.memory_efficiency
    assert pytest.approx(fit.constants.sublayer_us, abs=5e-2) == PUBLISHED.sublayer_us
    assert all(abs(one.error(PUBLISHED)) < 0.025 for one in published)


def test_published_rates_predict_each_other(published: list[Observation]) -> None:
    errors = leave_one_out(published)
    assert len(errors) == 5
    assert max(map(abs, errors)) < 0.04
    worst = max(range(5), key=lambda index: abs(errors[index]))
    others = [one for one in published if one is not published[worst]]
    assert errors[worst] == pytest.approx(published[worst].error(fit_constants(others).constants))


def test_the_assumed_context_hardly_matters(published: list[Observation]) -> None:
    for one in published:
        longer = replace(one, tokens=Tokens.decode(1, 2048))
        assert longer.error(PUBLISHED) - one.error(PUBLISHED) < 0.002


def synthetic(constants: Constants, *, noise: float = 0.0) -> list[Observation]:
    """Latencies that the model itself gives, of decode and prefill, bound by memory and by compute."""
    rng = random.Random(0)
    deployment = Deployment(gpu=GPUS["l40s"], tp_size=1, format=number_format("float32", dtype="float32"))
    found = []
    for pattern in ("AF AF AF AF", "AF F F AF", "F"):
        graph = tiny_graph(pattern, hidden_size=128, intermediate_size=4096)
        for tokens in (Tokens.decode(1, 64), Tokens.decode(4, 256), Tokens.prefill(1, 512), Tokens.prefill(8, 64)):
            structure = structure_from_graph(graph)
            one = Observation(name=pattern, structure=structure, deployment=deployment, tokens=tokens, latency_us=1)
            exact = one.predicted(constants).latency_us
            found.append(replace(one, latency_us=exact * (1 + noise * rng.uniform(-1, 1))))
    return found


KNOWN = Constants(memory_efficiency=0.62, sublayer_us=11.5, compute_efficiency=0.41)


@pytest.mark.parametrize("criterion", ["largest", "sum"])
@pytest.mark.parametrize(("memory", "compute"), [(0.97, 0.7), (0.05, 1.0), (1.0, 0.01)])
def test_known_constants_are_found(criterion: str, memory: float, compute: float) -> None:
    start = Constants(memory_efficiency=memory, sublayer_us=2, compute_efficiency=compute)
    fit = fit_constants(synthetic(KNOWN), criterion, start=start)  # type: ignore[arg-type]
    assert fit.fitted == ("memory_efficiency", "sublayer_us", "compute_efficiency")
    assert fit.loss("largest") < 1e-6
    assert fit.constants.memory_efficiency == pytest.approx(0.62, rel=1e-4)
    assert fit.constants.sublayer_us == pytest.approx(11.5, rel=1e-4)
    assert fit.constants.compute_efficiency == pytest.approx(0.41, rel=1e-4)


def test_a_search_that_goes_round_in_circles_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three constants leads to the next: four programs have seen all there is."""
    circle = [replace(KNOWN, sublayer_us=us) for us in (1.0, 2.0, 3.0)]
    errors = {1.0: 0.3, 2.0: -0.1, 3.0: 0.2}
    solved: list[float] = []

    def fit_once(observations: object, criterion: object, constants: Constants) -> Fit:
        found = next((b for a, b in zip(circle, circle[1:] + circle[:1], strict=True) if a == constants), circle[0])
        solved.append(found.sublayer_us)
        return Fit(constants=found, errors=(errors[found.sublayer_us],), fitted=())

    monkeypatch.setattr(latency_fit, "_fit_once", fit_once)
    assert fit_constants(synthetic(KNOWN)[:1], start=KNOWN).constants == circle[1]
    assert solved == [1.0, 2.0, 3.0, 1.0]


def test_two_latencies_are_enough_for_two_constants() -> None:
    fit = fit_constants(synthetic(KNOWN)[:2])
    assert fit.fitted == ("memory_efficiency", "sublayer_us")
    assert fit.loss("largest") < 1e-6


def test_noise_bounds_the_largest_error() -> None:
    observations = synthetic(KNOWN, noise=0.03)
    fit = fit_constants(observations, "largest")
    assert fit.loss("largest") <= max(abs(one.error(KNOWN)) for one in observations)


def test_one_outlier_does_not_move_the_sum() -> None:
    observations = synthetic(KNOWN)
    observations[5] = replace(observations[5], latency_us=5 * observations[5].latency_us)
    assert (criterion_for(observations), criterion_for(observations[:7])) == ("sum", "largest")
    assert fit_constants(observations, "sum").constants.sublayer_us == pytest.approx(11.5, rel=1e-3)
    assert fit_constants(observations, "largest").constants.sublayer_us != pytest.approx(11.5, rel=0.1)


def test_nothing_is_faster_than_its_rate() -> None:
    quick = [replace(one, latency_us=one.latency_us / 100) for one in synthetic(KNOWN)]
    constants = fit_constants(quick).constants
    assert constants.memory_efficiency <= 1
    assert constants.compute_efficiency <= 1
    assert constants.sublayer_us > 0


def test_the_demo_on_a_cpu() -> None:
    """Measured engines of three structures. On a CPU, and a shared one, the model is a rough guide, and says so."""
    results = read_results(DEMO)
    hardware = read_gpus(ROOT / "benchmarks" / "cpu.yaml")["epyc"]
    observations = observations_from_results(results, hardware)
    assert len(observations) == 2 * len(results.cells)
    decode = observations[1]
    assert decode.name == "baseline, decode, batch 1, input 32"
    assert decode.tokens == Tokens.decode(1, 32 + 24)
    assert decode.latency_us == pytest.approx(1000 * sorted(results.cells[0].inter_token_ms)[3])  # of seven rounds
    fit = fit_constants(observations, criterion_for(observations))
    assert fit.fitted == ("sublayer_us", "compute_efficiency")  # 17 MB of weights stay in the caches
    assert fit.loss("sum") / len(observations) < 0.2


def test_without_time_between_tokens_there_is_no_decode_step() -> None:
    results = read_results(DEMO)
    first = results.cells[0]
    for change in (
        {"request_ms": first.ttft_ms, "step_ms": ()},  # all tokens came at once
        {"output_len": 1, "step_ms": ((),) * len(first.ttft_ms)},
    ):
        cell = first.model_copy(update=change)
        (found,) = observations_from_results(results.model_copy(update={"cells": (cell,)}), GPUS["h200"])
        assert "time to first token" in found.name


def test_what_cannot_be_fitted_to(published: list[Observation]) -> None:
    with pytest.raises(
        EngineError, match=r"too few measured latencies .* at least 2, for memory_efficiency, sublayer_us"
    ):
        fit_constants(published[:1])
    with pytest.raises(EngineError, match="does not say which hardware"):
        read_observations(DEMO, GPUS)
    results = read_results(DEMO)
    for change, found in (({"kind": "emulated"}, "emulated"), ({"number_format": "int8"}, "int8")):
        engines = tuple(engine.model_copy(update=change) for engine in results.engines)
        with pytest.raises(EngineError, match=f"fitted to measured engines .* found baseline: .*{found}"):
            observations_from_results(results.model_copy(update={"engines": engines}), GPUS["h200"])


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("gpu: h200", "gpu: h300", "unknown GPU: expected h100-sxm, .* found h300"),
        ("format: bfloat16", "format: fp3", "unknown number format"),
        ("batch: 1\n", "batch: 0\n", "rates.0.batch"),
        ("decode_tokens_per_s: 41.44", "decode_ms: 24", "decode_ms: unknown key"),
        ("llama-3.1-405b.config", "llama-4", "no such model folder|cannot be read"),
    ],
)
def test_a_rates_file_that_is_refused(tmp_path: Path, was: str, becomes: str, message: str) -> None:
    text = RATES.read_text()
    assert was in text
    path = tmp_path / "rates.yaml"
    path.write_text(text.replace(was, becomes).replace("../tests/data", str(ROOT / "tests" / "data")))
    with pytest.raises(FuselageError, match=message):
        read_observations(path, GPUS)


def test_the_documented_figures(published: list[Observation]) -> None:
    page = (ROOT / "docs" / "latency_model.md").read_text()
    fit, left_out = fit_constants(published), leave_one_out(published)
    for one, error, other in zip(published, fit.errors, left_out, strict=True):
        ms = one.latency_us / 1000
        row = [one.name, one.deployment.gpu.name, str(one.structure.sequential_sublayers), f"{ms:.3f}"]
        row += [f"{ms * (1 + error):.3f}", f"{100 * error:+.2f} %", f"{100 * other:+.2f} %"]
        assert f"| {' | '.join(row)} |" in page
    constants = fit.constants
    assert f"**{100 * constants.memory_efficiency:.1f} %** of the memory rate" in page
    assert f"**{constants.sublayer_us:.1f} us** per sequential sublayer" in page


def test_constants_need_observations():
    with pytest.raises(EngineError, match="nothing to fit"):
        fit_constants([])
    with pytest.raises(EngineError, match=r"at least 3 measured latencies, for memory_efficiency, .* found 2"):
        leave_one_out(synthetic(KNOWN)[:2])
    assert max(map(abs, leave_one_out(synthetic(KNOWN)[:2] + synthetic(KNOWN)[4:6]))) < 1e-6
