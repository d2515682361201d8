"""The report of made-up results: what it says, that hostile text stays text, and that it needs no network."""

from __future__ import annotations

import copy
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from engines import charts, throughput
from engines.charts import axis_ticks
from engines.markdown import markdown_escaped
from engines.report import report_from_results
from engines.report_words import formatted, ratio_text
from engines.results import EngineResult, Spread
from engines.structure_strip import FFN_HEIGHT, layers_text, strips_from_structures
from exporter.errors import EngineError
from exporter.structure import Structure

HIDDEN, HEADS, KV_HEADS, WIDTH, LAYERS, VOCAB = 256, 8, 4, 704, 16, 4096


def block_of(layers: list[int], *, attention: bool = True, widths: list[int] | None = None, padding: int = 0) -> dict:
    widths = [WIDTH] * len(layers) if widths is None else widths
    return {
        "source_layers": layers,
        "attention": {
            "kind": "attention",
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HIDDEN // HEADS,
            "sliding_window": None,
        }
        if attention
        else None,
        "ffn": {
            "kind": "gated",
            "intermediate_size": sum(widths) + padding,
            "segments": [{"source_layer": n, "width": w} for n, w in zip(layers, widths, strict=True)],
            "padding": padding,
        }
        if widths
        else None,
    }


def structure_of(blocks: list[dict]) -> dict:
    flat = [member for block in blocks for member in block.get("parallel", [block])]
    attentions = sum(block["attention"] is not None for block in flat)
    channels = sum(b["ffn"]["intermediate_size"] for b in flat if b["ffn"] and b["ffn"]["kind"] == "gated")
    parameters = VOCAB * HIDDEN + attentions * 3 * HIDDEN * HIDDEN + 3 * HIDDEN * channels
    return {
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "num_parameters": parameters,
        "weight_bytes": 4 * parameters,
        "kv_bytes_per_token": attentions * 2 * KV_HEADS * (HIDDEN // HEADS) * 4,
        "sequential_sublayers": attentions + sum(block["ffn"] is not None for block in flat),
        "blocks": blocks,
    }


DROPPED_LAYERS = range(5, 11)
BASELINE = structure_of([block_of([n]) for n in range(LAYERS)])
DROPPED = structure_of([block_of([n], attention=n not in DROPPED_LAYERS) for n in range(LAYERS)])
FUSED = structure_of(
    [block_of([n]) for n in range(5)]
    + [block_of([5, 6, 7, 8, 9], attention=False, padding=64), block_of([10], attention=False)]
    + [block_of([n]) for n in range(11, LAYERS)]
)


def engine_of(label: str, structure: dict, **fields: Any) -> dict:
    engine = {
        "label": label,
        "kind": "measured",
        "backend": "onnxruntime",
        "device": "cpu",
        "runtime": {"onnxruntime": "1.32.0"},
        "dtype": "float32",
        "network_sha256": "5f" * 32,
        "engine_bytes": structure["weight_bytes"] + 181_000,
        "weight_bytes": structure["weight_bytes"],
        "kv_bytes_per_token": structure["kv_bytes_per_token"],
        "load_time_s": 0.2 + structure["weight_bytes"] / 4e8,
        "peak_memory_gib": (9e7 + 2.1 * structure["weight_bytes"]) / 2**30,
        "structure": structure,
    }
    return {**engine, **fields}


def cell_of(label: str, batch: int, input_len: int, output_len: int, *, step_ms: float, seed: int = 0) -> dict:
    random = np.random.default_rng([seed, batch, input_len])
    ttft = step_ms * batch * input_len / 20 * (1 + 0.04 * random.random(5))
    steps = step_ms * (0.8 + 0.2 * batch) * (1 + 0.05 * random.random((5, output_len - 1)))
    return {
        "engine": label,
        "batch": batch,
        "input_len": input_len,
        "output_len": output_len,
        "ttft_ms": [round(float(t), 6) for t in ttft],
        "step_ms": [[round(float(t), 6) for t in row] for row in steps],
        "request_ms": [round(float(a + b), 5) for a, b in zip(ttft, steps.sum(axis=1), strict=True)],
    }


ENVIRONMENT = {
    "cpu": "AMD EPYC 9354 32-Core Processor",
    "cores": 2,
    "memory_gib": 23.47,
    "os": "Linux-6.8.0-x86_64-with-glibc2.36",
    "python": "3.11.7",
    "clock": "time.perf_counter_ns",
    "threads": 2,
    "pinned_cpus": [0, 1],
    "warmup_rounds": 1,
    "seed": 0,
    "utc": "2026-11-22T12:00:00Z",
    "command": ["python", "build.py", "bench", "engines/baseline", "engines/attention dropped", "-o", "results.json"],
}
ENGINES = [
    engine_of("baseline", BASELINE, accuracy={"perplexity": 8.41}),
    engine_of("attention-dropped", DROPPED, accuracy={"perplexity": 9.02, "kl_divergence": 0.071}),
    engine_of("fused", FUSED, accuracy={"perplexity": 9.27, "kl_divergence": 0.094}),
]
STEP_MS = {"baseline": 2.6, "attention-dropped": 2.16, "fused": 1.83}
REALISTIC = {
    "results_schema": 1,
    "environment": ENVIRONMENT,
    "engines": ENGINES,
    "cells": [
        cell_of(label, batch, input_len, 64, step_ms=step_ms, seed=index)
        for batch in (1, 4)
        for input_len in (32, 128)
        for index, (label, step_ms) in enumerate(STEP_MS.items())
    ],
}


def with_changes(**changes: Any) -> dict:
    return {**copy.deepcopy(REALISTIC), **changes}


def relabelled(label: str) -> dict:
    """REALISTIC with the third engine under another label."""
    return json.loads(json.dumps(REALISTIC).replace('"fused"', json.dumps(label)))


def report_files(folder: Path, *documents: dict, count: int | None = 3, **options: Any) -> dict[str, bytes]:
    """The report's first files: two pages and a table, which cost little, then the pictures; None for all of them."""
    paths = []
    for index, document in enumerate(documents):
        paths.append(folder / f"results-{index}.json")
        paths[-1].write_text(json.dumps(document))
    return dict(itertools.islice(report_from_results(paths, **{"baseline": None, **options}), count))


rendered = partial(report_files, count=2)


class Page(HTMLParser):
    """Text, elements and the embedded data of a page, as a browser's parser sees them."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.data: list[str] = []
        self._script: dict[str, str | None] | None = None
        self._cell = False
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs)
            if "type" in self._script:
                self.data.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            if "type" in self._script:
                self.data[-1] += data
            return
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data

    def row(self, start: str) -> list[str]:
        return next([" ".join(cell.split()) for cell in row] for row in self.rows if row and row[0].startswith(start))


def test_files_of_a_report(tmp_path):
    files = rendered(tmp_path, REALISTIC, count=None)
    assert list(files) == [
        "report.html",
        "report.md",
        "report.csv",
        *(
            f"{chart}.{form}"
            for chart in (
                "structure",
                "inter_token_latency",
                "time_to_first_token",
                "tokens_per_second",
                "accuracy_latency_batch_1",
                "accuracy_latency_batch_4",
                "throughput",
            )
            for form in ("png", "svg")
        ),
    ]
    assert all(content.startswith(b"\x89PNG") for name, content in files.items() if name.endswith(".png"))
    assert all(ElementTree.fromstring(files[name]).tag.endswith("svg") for name in files if name.endswith(".svg"))
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", files["report.md"].decode())
    assert sorted(shown) == sorted(name for name in files if name.endswith(".png"))


def test_the_same_results_give_the_same_bytes(tmp_path):
    assert rendered(tmp_path, REALISTIC, count=7) == rendered(tmp_path, REALISTIC, count=7)


def test_figures_in_the_table(tmp_path):
    cells = [
        {
            "engine": label,
            "batch": 1,
            "input_len": 8,
            "output_len": 3,
            "ttft_ms": [ttft],
            "step_ms": [[step, step]],
            "request_ms": [ttft + 2 * step],
        }
        for label, ttft, step in (("baseline", 20.0, 4.0), ("attention-dropped", 30.0, 4.0), ("fused", 16.0, 2.0))
    ]
    page = Page(rendered(tmp_path, with_changes(cells=cells))["report.html"])
    assert page.row("Time to first token") == ["Time to first token ms ↓", "20.0", "30.01.50×", "16.00.80×"]
    assert page.row("Inter-token latency") == ["Inter-token latency ms ↓", "4.00", "4.001.00×", "2.000.50×"]
    assert page.row("Output tokens/s per user") == ["Output tokens/s per user ↑", "250", "2501.00×", "5002.00×"]
    # 3 tokens in 28, 38 and 20 ms
    assert page.row("Output tokens/s in total") == ["Output tokens/s in total ↑", "107.1", "78.90.74×", "150.01.40×"]
    assert page.row("Sequential sublayers") == ["Sequential sublayers ↓", "32", "260.81×", "220.69×"]
    assert page.row("Attention sublayers") == ["Attention sublayers", "16", "100.62×", "100.62×"]
    assert page.row("Perplexity") == ["Perplexity ↓", "8.41", "9.021.07×", "9.271.10×"]
    assert page.row("KL divergence")[1] == "–"
    assert "fused is 2.00× faster per token" in page.text
    assert "attention-dropped is as fast per token" in page.text


SUMMARIES = {
    "faster and slower": (
        {"baseline": 2.0, "attention-dropped": 3.0, "fused": 1.0},
        64,
        None,
        "At batch 1, input 128, output 64, compared with baseline: attention-dropped is 1.50× slower per token and "
        "fused is 2.00× faster per token.",
    ),
    "other baseline": (
        {"baseline": 2.0, "attention-dropped": 3.0, "fused": 1.0},
        64,
        "fused",
        "compared with fused: baseline is 2.00× slower per token and attention-dropped is 3.00× slower per token.",
    ),
    "one token": ({"baseline": 2.0, "fused": 1.0}, 1, None, "fused is 2.00× faster to the first token."),
    "alone": ({"fused": 1.0}, 64, "fused", "fused takes 1.00 ms per token at batch 1, input 128, output 64."),
    "steps of no time": ({"baseline": 0.0, "fused": 0.0}, 64, None, "No engine has a time per token at batch 1"),
}


@pytest.mark.parametrize(("step_ms", "output_len", "baseline", "sentence"), SUMMARIES.values(), ids=SUMMARIES.keys())
def test_summary_sentence(tmp_path, step_ms, output_len, baseline, sentence):
    cells = [
        {
            "engine": label,
            "batch": batch,
            "input_len": 128,
            "output_len": output_len,
            "ttft_ms": [10 * ms or 1.0],
            "step_ms": [[ms] * (output_len - 1)],
            "request_ms": [(10 * ms or 1.0) + ms * (output_len - 1)],
        }
        for label, ms in step_ms.items()
        for batch in (4, 1)
    ]
    engines = [engine for engine in ENGINES if engine["label"] in step_ms]
    files = rendered(tmp_path, with_changes(cells=cells, engines=engines), baseline=baseline)
    assert sentence in Page(files["report.html"]).text
    assert sentence in files["report.md"].decode()


def test_an_engine_that_was_not_timed_everywhere(tmp_path):
    cells = [c for c in REALISTIC["cells"] if c["engine"] != "fused" or (c["batch"], c["input_len"]) == (4, 32)]
    files = rendered(tmp_path, with_changes(cells=cells))
    assert "At batch 4, input 32, output 64" in Page(files["report.html"]).text
    cells = [c for c in REALISTIC["cells"] if c["engine"] == "baseline"]
    page = Page(rendered(tmp_path, with_changes(cells=cells))["report.html"])
    assert "fused was not timed there" in page.text
    assert page.row("Inter-token latency")[2:] == ["–", "–"]


PROBLEM = (
    "the worker of 'fused' was ended by signal 9 (Killed, out of memory?); printed:\n<script>alert(1)</script> @team"
)
STOPPED = {"batch": 1, "input_len": 32, "output_len": 64, "rounds": 4, "rounds_asked": 5, "problem": PROBLEM}


def incomplete(label: str) -> dict:
    """REALISTIC, whose engine `label` stopped in the last round of the first request shape."""
    cells = [cell for cell in REALISTIC["cells"] if cell["engine"] != label or cell is of_shape(label, 1, 32)]
    short = {name: of_shape(label, 1, 32)[name][:4] for name in ("ttft_ms", "step_ms", "request_ms")}
    cells = [{**cell, **short} if cell["engine"] == label else cell for cell in cells]
    engines = [{**e, "stopped": STOPPED, "peak_memory_gib": None} if e["label"] == label else e for e in ENGINES]
    return with_changes(engines=engines, cells=cells, results_schema=2)


def of_shape(label: str, batch: int, input_len: int) -> dict:
    wanted = (label, batch, input_len)
    return next(c for c in REALISTIC["cells"] if (c["engine"], c["batch"], c["input_len"]) == wanted)


def test_an_engine_that_stopped_is_said_to_be_incomplete_wherever_it_is_compared(tmp_path):
    files = report_files(tmp_path, incomplete("fused"))
    page, markdown = Page(files["report.html"]), files["report.md"].decode()
    for text in (" ".join(page.text.split()), markdown):
        assert "fused is incomplete: it stopped after 4 of 5 rounds at batch 1, input 32, output 64, and its" in text
        assert "ended by signal 9 (Killed, out of memory?)" in text
    assert "| figures are | measured | measured | measured, incomplete |" in markdown
    assert "@team" not in markdown
    assert "fused (incomplete) is " in page.text
    assert page.row("fused measured, incomplete")[-1] == "4"  # rounds, among all measurements
    assert page.row("Peak memory")[-1] == "–"
    assert ("span", {"class": "chip incomplete"}) in page.elements
    lines = [line.split(",") for line in files["report.csv"].decode().splitlines() if line.startswith("fused,")]
    assert {tuple(line[3:6]) for line in lines} == {("1", "32", "64"), ("", "", "")}


def test_without_the_baselines_figures_nothing_is_a_ratio(tmp_path):
    files = report_files(tmp_path, incomplete("baseline"))
    assert "At batch 1, input 32, output 64, compared with baseline (incomplete): " in Page(files["report.html"]).text
    header, *lines = [line.split(",") for line in files["report.csv"].decode().splitlines()]
    ratios = {tuple(line[3:6]) for line in lines if line[header.index("ratio")]}
    assert ratios == {("1", "32", "64"), ("", "", "")}


NOTES = {
    "measured on a CPU": ({}, ["not a verdict"], ["Emulated:", "Predicted:", "of different devices"]),
    "measured on a GPU": ({"device": "NVIDIA H200"}, [], ["not a verdict", "Emulated:", "Predicted:"]),
    "emulated": ({"kind": "emulated"}, ["Emulated:", "fused is emulated and its time says nothing"], ["Predicted:"]),
    "predicted": (
        {"kind": "predicted", "device": "H100", "load_time_s": None, "peak_memory_gib": None, "engine_bytes": None},
        ["Predicted", "othing here was run"],
        ["Emulated:", "fused is", "of different devices"],
    ),
}


@pytest.mark.parametrize(("fields", "said", "not_said"), NOTES.values(), ids=NOTES.keys())
def test_figures_are_labelled_by_what_they_are(tmp_path, fields, said, not_said):
    device = "cpu" if fields.get("kind") == "predicted" else fields.get("device", "cpu")
    engines = [{**engine, "device": device} for engine in ENGINES[:2]] + [{**ENGINES[2], **fields}]
    files = rendered(tmp_path, with_changes(engines=engines))
    for text in (Page(files["report.html"]).text, files["report.md"].decode()):
        assert [phrase for phrase in said if phrase not in text] == []
        assert [phrase for phrase in not_said if phrase in text] == []


def test_nothing_is_faster_than_an_emulated_baseline(tmp_path):
    engines = [{**ENGINES[0], "kind": "emulated"}, *ENGINES[1:]]
    files = rendered(tmp_path, with_changes(engines=engines))
    page = Page(files["report.html"])
    assert "baseline (emulated) takes 2.67 ms per token, attention-dropped takes" in page.text
    assert "no measurement to compare" in page.text
    for text in (page.text, files["report.md"].decode()):
        assert re.findall(r"[0-9]\.[0-9]+× ?(?:faster|slower)", text) == []


@pytest.mark.parametrize(
    ("fields", "kind"), [({"device": "NVIDIA H200"}, "devices"), ({"backend": "torch"}, "runtimes")]
)
def test_engines_of_two_kinds_are_said_to_be(fields, kind, tmp_path):
    engines = [*ENGINES[:2], {**ENGINES[2], **fields}]
    files = rendered(tmp_path, with_changes(engines=engines))
    for text in (Page(files["report.html"]).text, files["report.md"].decode()):
        assert re.findall("The engines are of different (\\w+)", text) == [kind]
    untimed = [cell for cell in REALISTIC["cells"] if cell["engine"] != "fused"]
    files = rendered(tmp_path, with_changes(engines=engines, cells=untimed))
    assert "of different" not in files["report.md"].decode()


def test_engines_that_took_no_turns_are_said_to_have_taken_none(tmp_path):
    said = "Engines were timed one after the other, not in turns"
    for interleaved in (True, False):
        files = rendered(tmp_path, with_changes(environment={**ENVIRONMENT, "interleaved": interleaved}))
        for text in (Page(files["report.html"]).text, files["report.md"].decode()):
            assert (said in text) != interleaved
            assert bool(re.search("take turns|were timed in turns", text)) == interleaved


GPU = {
    "name": "NVIDIA H200",
    "driver": "580.95.05",
    "sm_clock_mhz": 1965,
    "max_sm_clock_mhz": 1980,
    "memory_clock_mhz": 3201,
    "power_limit_w": 700.0,
}
UNTOLD = dict.fromkeys(("sm_clock_mhz", "max_sm_clock_mhz", "memory_clock_mhz", "power_limit_w"))


def test_gpus_are_described_as_far_as_they_are_known(tmp_path):
    environment = {**ENVIRONMENT, "gpus": [GPU, {**GPU, **UNTOLD}]}
    text = rendered(tmp_path, with_changes(environment=environment))["report.md"].decode()
    assert (
        "- GPU 0: NVIDIA H200, driver 580.95.05, SM clock 1,965 MHz of 1,980, memory clock 3,201 MHz "
        "right after the last request, power limit 700 W\n- GPU 1: NVIDIA H200, driver 580.95.05\n"
    ) in text


@pytest.mark.parametrize(("key", "value", "differ"), [("driver", "590.1", True), ("sm_clock_mhz", 1700, False)])
def test_files_with_other_drivers_differ_in_machine_and_those_with_other_clocks_do_not(tmp_path, key, value, differ):
    engines = [engine_of(label, FUSED, device="NVIDIA H200") for label in ("baseline", "fused")]
    documents = [
        with_changes(
            engines=[engine],
            cells=[cell for cell in REALISTIC["cells"] if cell["engine"] == engine["label"]],
            environment={**ENVIRONMENT, "gpus": [gpu]},
        )
        for engine, gpu in zip(engines, [GPU, {**GPU, key: value}], strict=True)
    ]
    text = rendered(tmp_path, *documents)["report.md"].decode()
    assert ("differ in machine or settings" in text) == differ


def test_several_files_are_said_to_be_several(tmp_path):
    first = with_changes(engines=ENGINES[:2], cells=[cell for cell in REALISTIC["cells"] if cell["engine"] != "fused"])
    second = with_changes(
        engines=ENGINES[2:],
        cells=[cell for cell in REALISTIC["cells"] if cell["engine"] == "fused"],
        environment={**ENVIRONMENT, "utc": "2026-11-22T13:00:00Z"},
    )
    page = Page(rendered(tmp_path, first, second)["report.html"])
    assert "not timed in turns" in page.text
    assert "differ in machine or settings" not in page.text
    assert [json.loads(data) for data in page.data[:-1]] == [first, second]
    for key, value in (("cpu", "Another CPU"), ("clock", "std::chrono::steady_clock")):  # the latter: another program
        other = {**second, "environment": {**second["environment"], key: value}}
        assert "differ in machine or settings" in Page(rendered(tmp_path, first, other)["report.html"]).text


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</title></style></svg><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }}{% raw %}",
    "<!--",
    "$\\frac{$ _a_ `b` | [x](http://evil.example) @everyone",
    "_underscore first",
    "é 漢字 \u202e right to left",
    "&lt;already&amp;escaped",
]


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_labels_stay_text(tmp_path, label):
    files = rendered(tmp_path, relabelled(label))
    page = Page(files["report.html"])
    usual = Page(rendered(tmp_path, REALISTIC)["report.html"])
    assert label in page.text
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in usual.elements]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert json.loads(page.data[0]) == relabelled(label)
    markdown = files["report.md"].decode()
    assert "<script" not in markdown
    assert re.findall(r"(?<!\\)\]\(http", markdown) == []
    assert "@everyone" not in markdown
    # Every line of the comparison and of the accuracies has as many unescaped bars as in the report of tame labels.
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")} == {5, 7}


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b <c> & *d*", r"a\|b &lt;c&gt; &amp; \*d\*"),
        ("@team", "@&#8203;team"),
        ("a@b.example", "a@&#8203;b.example"),
        ("fused #2", r"fused \#&#8203;2"),
        ("https://a.example", "https:&#8203;//a.example"),
        ("WWW.a.example", "WWW&#8203;.a.example"),
        ("1:2, www", "1:2, www"),
    ],
)
def test_nobody_is_mentioned_and_nothing_is_linked_in_markdown(text, escaped):
    assert markdown_escaped(text) == escaped


def test_labels_that_matplotlib_would_interpret(tmp_path):
    labels = ("$\\frac{$", "_underscore first", "fused")
    files = [rendered(tmp_path, relabelled(label), count=6) for label in labels]
    for name in ("structure.png", "inter_token_latency.png"):
        assert len({one[name] for one in files}) == len(labels)


def test_hostile_text_elsewhere_stays_text(tmp_path):
    text = "</script><script>alert(1)</script> ``` <b>&"
    document = with_changes(environment={**ENVIRONMENT, "cpu": text, "command": ["python", text, "```"]})
    for engine in document["engines"]:
        engine |= {"backend": text, "device": text, "runtime": {text: text}, "dtype": text, "number_format": text}
    files = rendered(tmp_path, document)
    tame = with_changes(engines=[{**engine, "device": "GPU", "number_format": "int8"} for engine in ENGINES])
    usual = Page(rendered(tmp_path, tame)["report.html"])
    assert [tag for tag, _ in Page(files["report.html"]).elements] == [tag for tag, _ in usual.elements]
    fences = [line for line in files["report.md"].decode().splitlines() if line.startswith("```")]
    assert fences == ["````", "````"]


def test_number_formats_are_named(tmp_path):
    engines = [ENGINES[0], {**ENGINES[1], "number_format": "int8 (W8A8 static)"}, *ENGINES[2:]]
    files = rendered(tmp_path, with_changes(engines=engines))
    assert "| number format, plugins | float32 | int8 (W8A8 static) | float32 |" in files["report.md"].decode()
    assert "int8 (W8A8 static)" in Page(files["report.html"]).text


def test_the_page_reaches_for_nothing(tmp_path):
    content = rendered(tmp_path, REALISTIC)["report.html"]
    page = Page(content)
    assert {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "base", "form"} == set()
    addresses = [a[name] for _, a in page.elements for name in ("src", "href", "srcset") if name in a]
    assert addresses
    assert all(str(address).startswith("#") for address in addresses)
    assert re.findall(rb"url\((?!#)|@import|https?://", content) == []
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


REMOVED: dict[str, Any] = {
    "label": "removed",
    "structure": structure_of(
        [
            block_of([n], attention=n not in DROPPED_LAYERS, widths=[] if n in range(5, 10) else None)
            for n in range(LAYERS)
        ]
    ),
    "accuracy": {
        "perplexity": 12.5,
        "tasks": [{"task": "cloze", "metric": "acc", "value": 0.5, "higher_is_better": True, "samples": 8}],
    },
}


def test_accuracy_of_what_was_timed_and_what_was_not(tmp_path):
    files = rendered(tmp_path, with_changes(evaluated=[REMOVED]))
    page = Page(files["report.html"])
    assert page.row("Variant")[1:] == [
        "Sequential sublayers ↓",
        "Perplexity ↓",
        "KL divergence, nats per token ↓",
        "cloze, acc ↑",
        "Latency per token ↓ms",
    ]
    name, *figures = page.row("removed")
    assert name == "removedattention of 5–10 droppedFFNs of 5–9 removed"
    assert figures == ["210.66×", "12.501.49×", "–", "0.500", "–"]
    assert page.row("fused")[2:4] == ["9.271.10×", "0.0940"]
    said = (
        "With the FFNs of layers 5–9 fused, perplexity is 9.27 (fused); with the same FFNs removed instead, "
        "12.50 (removed); as they were, 9.02 (attention-dropped)."
    )
    assert said in page.text
    assert said in files["report.md"].decode()
    assert page.text.count("sequential sublayers") >= 4  # the strips of all four


def test_emulated_time_is_not_held_against_accuracy(tmp_path):
    engines = [*ENGINES[:2], {**ENGINES[2], "kind": "emulated", "number_format": "int8"}]
    content = rendered(tmp_path, with_changes(engines=engines))["report.html"]
    page = Page(content[: content.index(b'id="batch"')])
    assert page.row("fusedattention")[-1] == "–"
    timed = Page(content[content.index(b'id="measurements"') :])
    ratios = [timed.row(label)[3] for label in ("baseline", "attention-dropped", "fused emulated")]
    assert [bool(ratio) for ratio in ratios] == [False, True, False]
    assert page.row("attention-droppedattention")[-1] != "–"
    dots = [" ".join(str(a["class"]).split()[1:]) for tag, a in page.elements if tag == "circle"]
    assert dots == ["baseline series-0", "series-1"] * 2  # one chart per batch size


def test_the_first_screen_says_what_the_gain_costs(tmp_path):
    page = Page(rendered(tmp_path, REALISTIC)["report.html"])
    costs = re.findall(r"perplexity ([\d.]+), baseline\s([\d.]+)", page.text)
    assert costs == [("9.02", "8.41"), ("9.27", "8.41")]


def test_an_engine_alone_has_no_ratios_to_explain(tmp_path):
    alone = with_changes(engines=ENGINES[:1], cells=[c for c in REALISTIC["cells"] if c["engine"] == "baseline"])
    assert "A ratio is" not in Page(rendered(tmp_path, alone)["report.html"]).text
    assert "A ratio is" in Page(rendered(tmp_path, REALISTIC)["report.html"]).text


@pytest.mark.parametrize(("count", "scrolls"), [(2, False), (3, True)])
def test_a_table_that_fits_a_phone_does_not_ask_to_be_scrolled(tmp_path, count, scrolls):
    labels = [engine["label"] for engine in ENGINES[:count]]
    cells = [cell for cell in REALISTIC["cells"] if cell["engine"] in labels]
    page = Page(rendered(tmp_path, with_changes(engines=ENGINES[:count], cells=cells))["report.html"])
    assert ("scroll it sideways" in page.text) == scrolls


def test_without_accuracy_nothing_is_said_of_it(tmp_path):
    engines = [{**engine, "accuracy": None} for engine in ENGINES]
    files = rendered(tmp_path, with_changes(engines=engines))
    assert "Accuracy" not in Page(files["report.html"]).text
    assert "accuracy" not in files["report.md"].decode().lower()


REFUSED = {
    "no cells": (with_changes(cells=[]), None, "nothing to report"),
    "unknown baseline": (REALISTIC, "best", "no engine has the baseline's label"),
    "malformed": (with_changes(cells=[{}]), None, "malformed"),
}


@pytest.mark.parametrize(("document", "baseline", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_results_fail_before_anything_is_rendered(tmp_path, document, baseline, problem):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    with pytest.raises(EngineError, match=problem):
        report_from_results([path], baseline=baseline)


LINEAR = {"kind": "linear"}
ODD_STRUCTURES = {
    "no blocks": [],
    "empty blocks": [block_of([n], attention=False, widths=[]) | {"ffn": None} for n in range(3)],
    "parallel": [{"parallel": [block_of([0]), block_of([1])]}, block_of([2])],
    "many in parallel": [{"parallel": [block_of([n]) for n in range(126)]}],
    "linear": [{"source_layers": [0], "attention": LINEAR, "ffn": LINEAR}],
    "one huge": [block_of([0], widths=[2**60])],
    "many": [block_of([n]) for n in range(162)],
}


@pytest.mark.parametrize("blocks", ODD_STRUCTURES.values(), ids=ODD_STRUCTURES.keys())
def test_any_structure_can_be_drawn(tmp_path, blocks):
    document = with_changes()
    document["engines"][2]["structure"]["blocks"] = blocks
    files = rendered(tmp_path, document, count=4)
    assert files["structure.png"].startswith(b"\x89PNG")


def test_a_model_of_one_block_is_drawn_on_the_scale_of_large_ones():
    sizes = []
    for blocks in ([block_of([0])], BASELINE["blocks"]):
        (strip,) = strips_from_structures([Structure(**structure_of(blocks))])
        png, _ = charts.structure_images([("model", strip)])
        sizes.append([int.from_bytes(png[start : start + 4], "big") for start in (16, 20)])  # IHDR: width, height
    (width, small), (same, large) = sizes
    assert width == same
    assert small == pytest.approx(large, rel=0.05)


def test_strip_of_the_fused_model():
    baseline, fused = strips_from_structures([Structure(**BASELINE), Structure(**FUSED)])
    assert (baseline.width, len(baseline.texts)) == (fused.width, 16)
    assert [text for _, _, text in fused.texts[4:9]] == ["4", "5–9", "3,584", "10", "11"]
    assert fused.height > baseline.height
    ffn = FUSED["blocks"][5]["ffn"]
    wide = [mark for mark in fused.marks if "block 5 " in mark.tooltip]
    assert [mark.role for mark in wide] == [
        "segment-0",
        "segment-1",
        "segment-2",
        "segment-3",
        "segment-0",
        "padding",
        "dropped",
    ]
    # The widest FFN takes the whole height; its parts lie on each other, from the axis up.
    assert sum(mark.height for mark in wide[:-1]) == pytest.approx(FFN_HEIGHT)
    assert wide[0].y + wide[0].height == pytest.approx(0)
    assert [below.y for below in wide[:5]] == pytest.approx([above.y + above.height for above in wide[1:6]])
    single = next(mark for mark in baseline.marks if mark.role == "ffn")
    assert single.height == pytest.approx(FFN_HEIGHT * WIDTH / ffn["intermediate_size"])
    assert wide[1].tooltip == "block 5 (layers 5–9): FFN 3,584 wide, 704 of them from layer 6"


@pytest.mark.parametrize(
    ("layers", "text"), [([3], "3"), ([3, 4], "3–4"), ([3, 4, 5, 9], "3–5, 9"), ([1, 3, 5], "1, 3, 5"), ([], "")]
)
def test_layers_text(layers, text):
    assert layers_text(layers) == text


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([2.6, 1.83], "ms", ("ms", ["2.60", "1.83"])),
        ([152.04, 9.312], "ms", ("ms", ["152.0", "9.3"])),
        ([0.0123, None], "s", ("s", ["0.0123", "–"])),
        ([12345.6, 99.0], "tokens/s", ("tokens/s", ["12,346", "99"])),
        ([32, 22], "count", ("", ["32", "22"])),
        ([1000, 500], "bytes", ("bytes", ["1,000", "500"])),
        ([3 * 2**20, 2**20], "bytes", ("MiB", ["3.00", "1.00"])),
        ([2**50], "bytes", ("GiB", ["1,048,576"])),
        ([0.25, 0.5], "gib", ("MiB", ["256", "512"])),
        ([1.5], "gib", ("GiB", ["1.50"])),
        ([5.92e6, 5.11e6], "parameters", ("million", ["5.92", "5.11"])),
        ([253.4e9], "parameters", ("billion", ["253"])),
        ([0, 0], "bytes", ("bytes", ["0", "0"])),
        ([0.0, 0.0], "number", ("", ["0", "0"])),
        ([-0.0123, -1.5], "number", ("", ["-0.012", "-1.500"])),
        # Three powers of ten apart: the small ones are not rounded away.
        ([2.67, 1875450.0], "ms", ("ms", ["2.67", "1,875,450"])),
        ([0.0004, 2.31], "number", ("", ["0.000400", "2.310"])),
        ([3.75e-10, 5.33e-10], "tokens/s", ("tokens/s", ["3.75e-10", "5.33e-10"])),
    ],
)
def test_numbers_of_a_row_share_unit_and_decimals(values, unit, expected):
    assert formatted(values, unit) == expected


@pytest.mark.parametrize(
    ("quotient", "text"),
    [(0, "0.00"), (1.4e-6, "1.4e-06"), (0.0042, "0.0042"), (0.012, "0.01"), (1.0, "1.00"), (702725.6, "702,726")],
)
def test_ratios_are_never_rounded_to_nothing(quotient, text):
    assert ratio_text(quotient) == text


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [
        (1, [0, 0.25, 0.5, 0.75, 1]),
        (2.6, [0, 1, 2, 3]),
        (410, [0, 200, 400, 600]),
        (0.003, [0, 0.001, 0.002, 0.003]),
        (0, [0, 1]),
    ],
)
def test_axis_ticks(largest, ticks):
    assert axis_ticks(largest) == pytest.approx(ticks)


ERRORS = {
    "source": "fp8, 512 tokens of a <text>",
    "tokens": 512,
    "linears": [
        {"name": "blocks.0.ffn.up_proj", "relative_error": 0.01, "sqnr_db": 40.0, "saturation": None},
        {"name": "blocks.1.ffn.down_proj", "relative_error": 0.0325, "sqnr_db": 29.76, "saturation": 0.0001},
        {"name": "blocks.2.ffn.down_proj", "relative_error": 0.0, "sqnr_db": None, "saturation": 0.0},  # all zeros
    ],
    "smoothing": [
        {"block": 1, "scheme": scheme, "smoothing": smoothing, "alpha": None, "relative_error": error}
        for scheme, smoothing, error in (("FP8", "none", 0.05), ("FP8", "both", 0.04), ("INT8", "none", 0.276))
    ]
    + [{"block": 1, "scheme": "INT8", "smoothing": "both", "alpha": 0.65, "relative_error": 0.065}],
    "alpha": {"blocks.1.ffn.down_proj": 0.65},
}


def with_errors(tmp_path, errors):
    (tmp_path / "results.json").write_text(json.dumps(REALISTIC))
    (tmp_path / "fp8").mkdir(exist_ok=True)
    (tmp_path / "fp8" / "errors.json").write_text(json.dumps(errors))
    return report_from_results([tmp_path / "results.json"], baseline=None, quantization={"fp8": tmp_path / "fp8"})


def test_quantization_errors_are_shown_the_worst_first(tmp_path):
    files = dict(with_errors(tmp_path, ERRORS))
    page = Page(files["report.html"])
    assert page.row("blocks.1.ffn.down_proj") == ["blocks.1.ffn.down_proj", "3.25 %", "29.8", "0.0100 %"]
    assert page.row("blocks.2.ffn.down_proj") == ["blocks.2.ffn.down_proj", "0.00 %", "–", "0.0000 %"]
    assert page.row("INT8") == ["INT8", "27.60 %", "6.50 %"]
    text = files["report.md"].decode()
    assert text.index("blocks.1.ffn.down") < text.index("blocks.0.ffn.up")
    assert "<text>" not in files["report.html"].decode()


@pytest.mark.parametrize(
    "change",
    [
        {"linears": [{"name": "x"}]},
        {"smoothing": ERRORS["smoothing"][:3]},
        {"tokens": -1},
        {"more": 1},
        {
            "linears": [
                {**ERRORS["linears"][0], "relative_error": "1"},
                {**ERRORS["linears"][0], "relative_error": None},
            ]
        },
    ],
)
def test_malformed_quantization_errors(tmp_path, change):
    with pytest.raises(EngineError, match="quantization errors"):
        with_errors(tmp_path, {**ERRORS, **change})


# --- for everybody: keyboard, contrast, many engines


def test_everything_can_be_reached_by_keyboard(tmp_path):
    page = Page(rendered(tmp_path, with_changes(evaluated=[REMOVED]))["report.html"])
    ids = {a["id"] for _, a in page.elements if "id" in a}
    links = [str(a["href"]) for tag, a in page.elements if tag == "a" and "href" in a]
    assert links[0] == "#comparison"  # past the header, for those who tab
    assert {link[1:] for link in links} <= ids
    scrolling = [a for _, a in page.elements if "scroll" in str(a.get("class", "")).split()]
    assert scrolling
    for attributes in scrolling:
        assert (attributes.get("role"), attributes.get("tabindex")) == ("region", "0")
        assert attributes.get("aria-label")
    assert not [a for _, a in page.elements if a.get("tabindex") not in (None, "0")]


def test_every_picture_has_words(tmp_path):
    page = Page(rendered(tmp_path, REALISTIC)["report.html"])
    charts = [a for tag, a in page.elements if tag == "svg" and a.get("aria-hidden") != "true"]
    assert charts
    assert all(a.get("role") == "img" and a.get("aria-label") for a in charts)
    throughput = next(str(a["aria-label"]) for a in charts if "tokens/s per user" in str(a["aria-label"]))
    assert re.search(r"fused: batch 1, [0-9,.]+ and [0-9,.]+; batch 4, [0-9,.]+ and [0-9,.]+\.", throughput)


def luminance(color: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.2)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# What is written on what; `--series-1` is the colour of links and of the focus ring.
WRITTEN = [
    *((ink, ground) for ink in ("ink", "muted", "better", "worse") for ground in ("page", "card", "soft")),
    ("ink", "note"),
    ("series-1", "page"),
    ("series-1", "card"),
]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_of_text_is_enough(tmp_path, theme):
    content = rendered(tmp_path, REALISTIC)["report.html"].decode()
    palettes = [
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", part))
        for part in content.split("(prefers-color-scheme: dark)", 1)
    ]
    colors = palettes[theme]
    assert [(ink, ground) for ink, ground in WRITTEN if contrast(colors[ink], colors[ground]) < 4.5] == []


def test_contrast_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def many(count: int) -> dict:
    labels = [f"engine-{index:02d}" for index in range(count)]
    engines = [{**ENGINES[index % 3], "label": label} for index, label in enumerate(labels)]
    cells = [
        {**cell, "engine": label}
        for index, label in enumerate(labels)
        for cell in REALISTIC["cells"]
        if cell["engine"] == ENGINES[index % 3]["label"]
    ]
    return with_changes(engines=engines, cells=cells)


def test_very_many_engines_have_a_line_each_and_charts_of_the_first(tmp_path):
    few, lots = many(9), many(12)
    long = json.loads(json.dumps(lots).replace("engine-", "x" * 50))
    assert Page(rendered(tmp_path, long)["report.html"]).text.count(
        f"Latency of {'x' * 50}00, {'x' * 50}01 and 10 more"
    )
    by_metric = Page(rendered(tmp_path, few)["report.html"])
    assert len(by_metric.row("Metric")) == 1 + 9
    files = rendered(tmp_path, lots, count=None)
    page = Page(files["report.html"])
    by_engine = page.row("Engine")
    assert by_engine[1:3] == ["Time to first token ms ↓", "Inter-token latency ms ↓"]
    first, last = by_metric.row("Inter-token latency"), page.row("engine-08")
    assert first[9] == last[2]
    assert "Charts show the first 8 of 12 engines" in page.text
    assert re.search(r" and engine-07 is [^;]*; 4 more are in the table\.", page.text)
    assert files["inter_token_latency.svg"].count(b"engine-") == 8
    assert page.text.count("sequential sublayers") >= 3
    assert "engine-00, engine-03, engine-06 and engine-09: 16 blocks" in page.text
    rows = [line for line in files["report.md"].decode().splitlines() if line.startswith("| engine-11 | measured |")]
    assert len(rows) == 1


def test_a_label_that_no_font_here_can_write_is_no_noise(tmp_path, recwarn):
    files = rendered(tmp_path, relabelled("\U00013000"), count=7)  # a hieroglyph
    assert "\U00013000" in files["inter_token_latency.svg"].decode()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("count", "medians", "texts"),
    [
        (3, (927.0, 1049.0), ["927", "1.05k"]),
        (5, (927.0, 1049.0), ["927", "1.0k"]),  # "1.05k" would touch its neighbour's
        (5, (9963.0, 15.93), ["10k", "16"]),
        (5, (0.634, 15.93), ["0.63", "15.9"]),
        (8, (927.0, 1049.0), ["", ""]),
    ],
)
def test_values_on_bars_do_not_touch(count, medians, texts):
    row = tuple(Spread(median=median, low=median, high=median) for median in medians)
    chart = charts.Chart("f.png", "t", "s", "x", "y", (1, 4), (row,) * count, (("", ""),) * count)
    bars = charts.bar_layout(chart, [EngineResult(**ENGINES[0])] * count)["bars"]
    assert [bar.text for bar in bars[:2]] == texts


@pytest.mark.parametrize("length", [5, 17, 40, 100])
def test_legends_of_pictures_are_as_wide_as_the_picture_at_most(length, monkeypatch, recwarn):
    figures = []
    for module in (charts, throughput):
        monkeypatch.setattr(module, "images_of", lambda draw: figures.append(draw()))
    labels = [f"{index}{'_llama-3.1-8b_fused_int8' * 5}"[:length] for index in range(8)]
    engines = [EngineResult(**{**ENGINES[index % 3], "label": label}) for index, label in enumerate(labels)]
    bars = tuple((Spread(median=2.0, low=1.0, high=3.0),) for _ in engines)
    charts.chart_images(charts.Chart("f.png", "t", "s", "x", "y", (1,), bars, (("",),) * 8), engines)
    points = (throughput.CurvePoint(1, 2.0, 3.0), throughput.CurvePoint(4, 1.0, 6.0))
    curves = tuple(throughput.Curve(label, index, False, points) for index, label in enumerate(labels))
    chart = throughput.ThroughputChart("f.png", "t", "s", "x", "y", curves)
    throughput.throughput_images(throughput.throughput_layout(chart))
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        (legend,) = figure.legends
        extent = legend.get_window_extent()
        assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width
        assert len(legend.get_texts()) == 8
    assert not recwarn.list


def test_ratios_with_their_intervals_in_both_pages(tmp_path):
    files = rendered(tmp_path, REALISTIC)
    page, markdown = Page(files["report.html"]), files["report.md"].decode()
    (interval,) = re.findall(r"0\.70× (0\.\d\d–0\.\d\d)$", page.row("Inter-token latency")[3])
    assert re.search(rf"\| Inter-token latency, ms \|.*\(\*\*0\.70×\*\*, {interval}\) \|\n", markdown)
    assert "95\xa0% interval" in page.text
    assert "No ratio has a confidence interval" not in page.text


def test_what_may_be_chance_is_not_called_faster_without_a_word(tmp_path):
    """Steps of the fused engine vary by more than its median differs."""
    shuffled = (0.6, 1.7, 0.9, 1.4, 0.8)
    cells = [
        {
            **cell,
            "request_ms": [
                ttft + factor * (request - ttft)
                for request, ttft, factor in zip(cell["request_ms"], cell["ttft_ms"], shuffled, strict=True)
            ],
        }
        if cell["engine"] == "fused"
        else cell
        for cell in REALISTIC["cells"]
    ]
    files = rendered(tmp_path, with_changes(cells=cells))
    page = Page(files["report.html"])
    for text in (page.text, files["report.md"].decode()):
        assert re.search(r"fused is 1\.\d\d× faster per token \(within the noise\)\.", text)
        assert re.search(r"attention-dropped is 1\.\d\d× faster per token and", text)
    tiles = re.findall(r"95\xa0% interval ([0-9.]+)–([0-9.]+)(, within the noise)?", page.text)
    assert [bool(doubt) for _, _, doubt in tiles] == [False, True]
    assert [float(low) < 1 < float(high) for low, high, _ in tiles] == [False, True]


def test_bars_say_their_ratio_when_pointed_at(tmp_path):
    page = Page(rendered(tmp_path, REALISTIC)["report.html"])
    (interval,) = re.findall(r"1\.42× (1\.\d\d–1\.\d\d)$", page.row("Output tokens/s in total")[3])
    assert re.search(
        rf"fused, batch 1: [0-9.,]+ tokens/s \(.*\); 1\.42× of baseline, 95 % interval {interval}", page.text
    )
    assert re.search(r"baseline, batch 1: [0-9.,]+ tokens/s \([0-9., to]+ over the rounds\)(?!;)", page.text)


def test_too_few_rounds_for_intervals_are_said(tmp_path):
    cells = [{**c, **{key: c[key][:2] for key in ("ttft_ms", "step_ms", "request_ms")}} for c in REALISTIC["cells"]]
    content = rendered(tmp_path, with_changes(cells=cells))["report.html"]
    page = Page(content)
    assert "No ratio of times has a confidence interval: that takes 5 rounds" in page.text
    assert "Beside a ratio of times" not in page.text
    classes = [element.get("class") or "" for tag, element in page.elements if tag == "div"]
    assert [name for name in classes if name.startswith("number")] == ["number neutral"] * 2
    without_ratios = [cell for cell in cells if cell["engine"] != "baseline"]
    assert "confidence interval" not in rendered(tmp_path, with_changes(cells=without_ratios))["report.md"].decode()
    assert set(re.findall(rb'class="ratio (\w+)"', content[content.index(b'id="measurements"') :])) == {b"neutral"}


# Engines and their peak memory over the baseline's, device -> whether a wide FFN is what needs explaining.
PEAKS = {
    "wider and more": ({"fused": 1.5}, "cpu", True),
    "wider and the same": ({"fused": 1.01}, "cpu", False),
    "wider and less": ({"fused": 0.5}, "cpu", False),
    "more, and as wide": ({"attention-dropped": 1.5, "fused": 0.9}, "cpu", False),
    "on a GPU, whose memory is not measured": ({"fused": 1.5}, "NVIDIA H100", False),
}


@pytest.mark.parametrize(("ratios", "device", "said"), PEAKS.values(), ids=PEAKS.keys())
def test_why_a_wide_ffn_takes_memory_is_said(tmp_path, ratios, device, said):
    base = ENGINES[0]["peak_memory_gib"]
    engines = [
        {**engine, "device": device, "peak_memory_gib": base * ratios.get(engine["label"], 1.0)} for engine in ENGINES
    ]
    files = rendered(tmp_path, with_changes(engines=engines))
    for name in ("report.html", "report.md"):
        assert ("activations of all its FFNs at once" in files[name].decode()) == said


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder, engines in (("a", ENGINES[:2]), ("b", ENGINES[2:])):
        labels = {engine["label"] for engine in engines}
        cells = [cell for cell in REALISTIC["cells"] if cell["engine"] in labels]
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.json").write_text(json.dumps(with_changes(engines=engines, cells=cells)))
    paths = [tmp_path / folder / "results.json" for folder in ("a", "b")]
    page = Page(dict(itertools.islice(report_from_results(paths, baseline=None), 1))["report.html"])
    assert {a["download"] for tag, a in page.elements if tag == "a" and "download" in a} == {
        "report.csv",
        *map(str, paths),
    }
    with pytest.raises(EngineError, match="given twice"):
        report_from_results([paths[0], paths[0]], baseline=None)


def test_the_csv_is_in_the_page_and_beside_it(tmp_path):
    files = rendered(tmp_path, relabelled("</script>=1"), count=3)
    assert json.loads(Page(files["report.html"]).data[-1]) == files["report.csv"].decode()


def test_which_program_took_the_samples_is_said(tmp_path):
    engines = [{**ENGINES[0], "program": "cpp"}, {**ENGINES[1], "program": "python"}, ENGINES[2]]
    text = Page(rendered(tmp_path, with_changes(engines=engines))["report.html"]).text
    assert text.count("timed by the C++ program") == text.count("timed by the Python program") == 1
