"""Predictions in a report: against the latency model itself, never beside measured figures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.hardware import read_gpus
from engines.latency_fit import observations_from_results
from engines.latency_model import PUBLISHED, Deployment, Tokens, memory_per_gpu, number_format, predict
from engines.prediction_of_engines import RECIPES, calibration_of, predicted_parts
from engines.prediction_report import Wanted, without_predicted
from engines.results import Comparison, RequestShape, comparison_from_results, results_from_json
from exporter.errors import EngineError
from exporter.quantization import format_names
from exporter.structure import Structure
from tests.engines.test_report import BASELINE, ENGINES, FUSED, REALISTIC, Page, report_files, with_changes

GPUS = read_gpus()
H100 = GPUS["h100-sxm"]
CPU = read_gpus(Path(__file__).parents[2] / "benchmarks" / "cpu.yaml")["epyc"]


def comparison_of(document: dict, baseline: str | None = None) -> Comparison:
    results = results_from_json(json.dumps(document).encode())
    return comparison_from_results([("results.json", results)], baseline=baseline)


def test_figures_are_the_latency_models() -> None:
    (part,) = predicted_parts(comparison_of(REALISTIC), Wanted(gpus=[H100], tp_sizes=[2], dtype="bfloat16"))
    assert (part.name, part.tp_size) == ("2x H100 SXM", 2)
    placed = Deployment(gpu=H100, tp_size=2, format=number_format("bfloat16", dtype="bfloat16"), constants=PUBLISHED)
    structure = Structure.model_validate(FUSED)
    cell = part.comparison.cells["fused", RequestShape(4, 128, 64)]
    prefill = predict(structure, placed, Tokens.prefill(4, 128)).latency_ms
    decode = predict(structure, placed, Tokens.decode(4, 128 + 32)).latency_ms
    assert cell.ttft_ms == pytest.approx((prefill,))
    assert cell.inter_token_ms == pytest.approx((decode,))
    engine = part.comparison.engines[2]
    memory = memory_per_gpu(structure, placed, 1, 1)
    assert (engine.kind, engine.device, engine.dtype) == ("predicted", "2x H100 SXM", "bfloat16")
    assert (engine.weight_bytes, engine.kv_bytes_per_token) == (memory.weight_bytes, memory.kv_bytes)


def test_every_gpu_at_every_size_and_batch() -> None:
    wanted = Wanted(gpus=[H100, GPUS["h200"]], tp_sizes=[1, 2], batches=[1, 8, 64])
    parts = predicted_parts(comparison_of(REALISTIC), wanted)
    assert [part.name for part in parts] == ["1x H100 SXM", "2x H100 SXM", "1x H200 SXM", "2x H200 SXM"]
    assert {shape.batch for shape in parts[0].comparison.shapes} == {1, 8, 64}
    assert {shape[1:] for shape in parts[0].comparison.shapes} == {(32, 64), (128, 64)}


def test_quantized_engines_keep_their_format() -> None:
    assert set(RECIPES.values()) == set(format_names())
    engines = [ENGINES[0], {**ENGINES[1], "number_format": "int8 (W8A8 static)"}, {**ENGINES[2], "number_format": "q4"}]
    (part,) = predicted_parts(comparison_of(with_changes(engines=engines)), Wanted(gpus=[H100]))
    assert [e.number_format for e in part.comparison.engines] == [None, "int8-smoothquant"]
    assert part.notes == ("fused is not predicted: the latency model does not know q4.",)
    half = part.comparison.engines[1].weight_bytes / part.comparison.engines[0].weight_bytes
    assert 0.2 < half < 0.8


def test_a_report_of_formats_that_nobody_can_predict(tmp_path: Path) -> None:
    engines = [{**engine, "number_format": "NVFP4"} for engine in ENGINES]  # as trtllm-bench calls it
    files = report_files(tmp_path, with_changes(engines=engines), prediction=Wanted(gpus=[H100]))
    said = "fused is not predicted: the latency model does not know NVFP4."
    assert said in Page(files["report.html"]).text
    assert said in files["report.md"].decode()
    assert files["report.csv"] == report_files(tmp_path, with_changes(engines=engines))["report.csv"]


def test_what_does_not_fit_is_said_and_left_out() -> None:
    small = H100.model_copy(update={"memory_gb": 0.1})
    (part,) = predicted_parts(comparison_of(REALISTIC), Wanted(gpus=[small], batches=[1, 4096]))
    assert {shape.batch for shape in part.comparison.shapes} == {1}
    assert part.notes[0] == (
        "baseline does not fit into the memory at batch 4096, input 32, output 64; batch 4096, input 128, output 64."
    )


REFUSED: dict[str, tuple[Wanted, dict, str]] = {
    "heads": (Wanted(gpus=[H100], tp_sizes=[3]), {}, "divides the attention heads"),
    "products": (
        Wanted(gpus=[GPUS["a100-80gb"]]),
        {"engines": [{**engine, "number_format": "fp8 (W8A8 static)"} for engine in ENGINES]},
        "no matrix products in",
    ),
    "dtype": (Wanted(gpus=[H100]), {"engines": [{**e, "dtype": "made up"} for e in ENGINES]}, "cannot be predicted"),
    "nothing to fit": (
        Wanted(calibrate=CPU),
        {"engines": [{**engine, "number_format": "int8"} for engine in ENGINES]},
        "nothing was measured that",
    ),
}


@pytest.mark.parametrize(("wanted", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_predicted_is_one_error_before_anything_is_rendered(
    tmp_path: Path, wanted: Wanted, changes: dict, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        report_files(tmp_path, with_changes(**changes), prediction=wanted)


def predicted(label: str, device: str, structure: dict, ms: float) -> tuple[dict, list[dict]]:
    """An engine that a results file calls predicted, with its cells at two batches."""
    engine = {**ENGINES[0], "label": label, "kind": "predicted", "device": device, "structure": structure}
    cells = [
        {
            "engine": label,
            "batch": batch,
            "input_len": 128,
            "output_len": 64,
            "ttft_ms": [ms],
            "step_ms": [],
            "request_ms": [64 * ms],
        }
        for batch in (1, 4)
    ]
    return engine, cells


def mixed() -> dict:
    """REALISTIC with two predicted engines on one GPU and one on another."""
    added = [predicted("p-baseline", "H100", BASELINE, 0.4), predicted("p-fused", "H100", FUSED, 0.2)]
    added.append(predicted("q-fused", "H200", FUSED, 0.1))
    return with_changes(
        engines=[*ENGINES, *(engine for engine, _ in added)],
        cells=[*REALISTIC["cells"], *(cell for _, cells in added for cell in cells)],
    )


def test_predicted_engines_of_a_file_stand_apart_by_device() -> None:
    ran, parts = without_predicted(comparison_of(mixed()), None)
    assert [engine.label for engine in ran.engines] == ["baseline", "attention-dropped", "fused"]
    assert {(label, kind) for label, _ in ran.cells for kind in ("measured",)} == {
        (engine.label, engine.kind) for engine in ran.engines
    }
    assert [(part.name, [e.label for e in part.comparison.engines]) for part in parts] == [
        ("H100", ["p-baseline", "p-fused"]),
        ("H200", ["q-fused"]),
    ]


def test_a_baseline_counts_where_it_stands() -> None:
    ran, parts = without_predicted(comparison_of(mixed(), "p-fused"), "p-fused")
    assert ran.baseline.label == "baseline"
    assert parts[0].comparison.baseline.label == "p-fused"
    ran, parts = without_predicted(comparison_of(mixed(), "fused"), "fused")
    assert ran.baseline.label == "fused"
    assert parts[0].comparison.baseline.label == "p-baseline"


def test_a_file_of_predictions_alone_is_a_report_of_predictions(tmp_path: Path) -> None:
    engines, cells = zip(*(predicted(n, "H100", BASELINE, ms) for n, ms in (("a", 0.4), ("b", 0.2))), strict=True)
    document = with_changes(engines=list(engines), cells=[cell for row in cells for cell in row])
    page = Page(report_files(tmp_path, document)["report.html"])
    assert "Predicted: computed by a latency model" in page.text
    assert "b (predicted) is 2.00× faster" in page.text


def test_a_file_of_predictions_beside_a_measured_one_is_no_second_run(tmp_path: Path) -> None:
    engine, cells = predicted("p", "H100", BASELINE, 0.4)
    other = with_changes(engines=[engine], cells=cells)
    other["environment"] = {**other["environment"], "cpu": "another"}
    page = Page(report_files(tmp_path, REALISTIC, other)["report.html"])
    assert "not timed in turns" not in page.text
    assert "differ in machine" not in page.text
    assert "nothing here was run" in page.text


def test_predicted_ratios_refer_to_predicted_figures_alone(tmp_path: Path) -> None:
    files = report_files(tmp_path, mixed(), count=None)
    content = files["report.html"].decode()
    before, section = content.split('<section id="predicted"')
    section = section.split('<section id="structure"')[0]
    assert "p-fused" not in before
    page = Page(section.encode())
    assert page.row("Inter-token latency")[1:] == ["0.400", "0.2000.50×"]
    assert "nothing here was run" in page.text
    headers = [row for row in page.rows if row and row[0] == "Metric"]
    assert [row.count("predicted") + sum("predicted" in cell for cell in row) for row in headers] == [2, 1]
    assert 'stroke-dasharray="5 3"' in section
    assert "stroke-dasharray" not in before[before.index('id="batch"') :]
    assert {"throughput_predicted_0.png", "throughput_predicted_0.svg", "throughput_predicted_1.png"} <= set(files)
    markdown = files["report.md"].decode()
    assert "## Predicted" in markdown
    assert "| p-fused |" not in markdown.split("## Predicted")[0]
    rows = [line.split(",") for line in files["report.csv"].decode().splitlines()]
    assert {row[9] for row in rows if row[0] == "p-fused" and row[10]} == {"p-baseline"}
    assert {row[9] for row in rows if row[0] == "fused" and row[10]} == {"baseline"}


def test_the_model_beside_what_was_measured(tmp_path: Path) -> None:
    engines = [*ENGINES[:2], {**ENGINES[2], "number_format": "int8 (W8A8 static)"}]
    document = with_changes(engines=engines)
    calibration = calibration_of(comparison_of(document), CPU)
    cells = [cell for cell in document["cells"] if cell["engine"] != "fused"]
    plain = results_from_json(json.dumps({**document, "engines": engines[:2], "cells": cells}).encode())
    assert calibration.observations == tuple(observations_from_results(plain, CPU))
    assert calibration.notes == ("fused is left out: its linears are quantized, or it was not measured.",)
    mixed = with_changes(engines=[ENGINES[0], {**ENGINES[1], "backend": "torch"}, engines[2]])
    (together,) = set(calibration_of(comparison_of(mixed), CPU).notes) - set(calibration.notes)
    assert together == "onnxruntime and torch are fitted together, though the constants are each runtime's own."
    files = report_files(tmp_path, document, prediction=Wanted(calibrate=CPU))
    page = Page(files["report.html"])
    for name, measured, predicted_ms, error, _ in calibration.rows:
        row = page.row(name)
        assert row[1:4] == [f"{measured:,.3f}", f"{predicted_ms:,.3f}", f"{round(100 * error, 1) + 0.0:+.1f} %"]
        assert f"| {name} | {measured:,.3f} | {predicted_ms:,.3f} |" in files["report.md"].decode()
    assert f"{calibration.fit.constants.sublayer_us:,.4g} us per sequential sublayer" in page.text
    assert "-0.0\xa0%" not in page.text
    assert "nothing here was run" not in page.text  # half of it was


def test_hostile_labels_stay_text_among_predictions(tmp_path: Path) -> None:
    label: Any = "</script><script>alert(1)</script>|`"
    document = json.loads(json.dumps(REALISTIC).replace('"fused"', json.dumps(label)))
    wanted = Wanted(gpus=[H100], calibrate=CPU)
    files = report_files(tmp_path, document, prediction=wanted)
    usual = report_files(tmp_path, REALISTIC, prediction=wanted)
    tags, expected = ([tag for tag, _ in Page(one["report.html"]).elements] for one in (files, usual))
    assert tags == expected
    assert "<script" not in files["report.md"].decode()
