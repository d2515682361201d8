"""Whatever a command is given to read, it ends well or with one clear error, and leaves nothing else behind.

Each surface is a sound file and a command that reads it; an example spoils the file at random, then puts it back.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from exporter.calibration import calibrate, calibration_files
from exporter.quantization import RECIPES
from exporter.read import open_model
from exporter.writers import hf, onnx
from exporter.writers.files import MANIFEST, save_folder
from tests.command_line import call
from tests.engines.test_results import CELL, DOCUMENT
from tests.mutants import mutate, mutate_bytes
from tests.tiny import quantized_graph, tiny_graph

PLAN = {"drop_attention": [0, [3, 3]], "drop_ffn": [1], "fuse": [[2, 3]], "parallel": []}
RECIPE = {
    "model": "nowhere",  # what else is right with it, this is not: nothing long begins
    "network": {"dtype": "float32", "max_positions": 64},
    "variants": [{"name": "a"}, {"name": "b", "plan": {"drop_attention": [1]}, "quantize": "fp8"}],
    "calibration": {"text": "text.txt", "context": 16},
    "bench": {"batch": [1], "input_len": [8], "output_len": [4]},
}
GPUS = {
    "links": {"link": {"gpus": 2, "gb_per_s": 300, "all_reduce_us": {2: [4.5, 19.9]}, "source": "a datasheet"}},
    "gpus": {
        "mine": {
            "name": "Mine", "memory_gb": 80, "memory_gb_per_s": 3350, "tflops": {"float32": 60, "bfloat16": 990},
            "links": ["link"], "source": "a datasheet",
        }
    },
}  # fmt: skip
REPORT = {
    "engine": {"version": "1.2.0", "backend": "Pytorch", "dtype": "bfloat16"},
    "machine": {"name": "NVIDIA H100"},
    "world_info": {"tp_size": 1, "pp_size": 1},
    "request_info": {"num_requests": 1, "avg_num_concurrent_requests": 1.0},
}
REQUEST = {
    "num_input_tokens": 8,
    "output_tokens": 4,
    "start_timestamp": 1,
    "end_timestamp": 9,
    "time_to_first_token": 3,
}
ROUNDS = {key: 2 * value if isinstance(value, list) else value for key, value in CELL.items()}  # enough to compare


def json_mutant(raw: bytes, rng: random.Random) -> bytes:
    value = json.loads(raw)
    for _ in range(rng.choice([1, 1, 2, 5])):
        value = mutate(value, rng)
    return json.dumps(value).encode()


def yaml_mutant(raw: bytes, rng: random.Random) -> bytes:
    value = yaml.safe_load(raw)
    for _ in range(rng.choice([1, 1, 2])):
        value = mutate(value, rng)
    return yaml.safe_dump(value).encode()


def header_mutant(raw: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    header = json_mutant(raw[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


@dataclass(frozen=True)
class Surface:
    file: str
    command: str  # words, where {root} is the folder of everything
    change: Callable[[bytes, random.Random], bytes] = json_mutant  # or the file's bytes at random


SURFACES = {
    "config": Surface("model/config.json", "transform {root}/model -o {root}/out"),
    "config alone": Surface("model/config.json", "inspect {root}/model/config.json"),
    "quantized config": Surface("quantized/config.json", "transform {root}/quantized -o {root}/out"),
    "header": Surface("model/model.safetensors", "transform {root}/model -o {root}/out", header_mutant),
    "quantized header": Surface("quantized/model.safetensors", "inspect {root}/quantized", header_mutant),
    "manifest": Surface(f"written/{MANIFEST}", "inspect {root}/written"),
    "plan": Surface("plan.yaml", "transform {root}/model --plan {root}/plan.yaml --dry-run -o {root}/out", yaml_mutant),
    "recipe": Surface("recipe.yaml", "run {root}/recipe.yaml -o {root}/out", yaml_mutant),
    "quantization": Surface(
        "format.yaml", "quantize {root}/model --format {root}/format.yaml --dry-run -o {root}/out", yaml_mutant
    ),
    "gpus": Surface(
        "gpus.yaml", "predict {root}/model --gpus {root}/gpus.yaml --gpu mine --tp 2 --context 64", yaml_mutant
    ),
    "calibration": Surface(
        "calibration/calibration.json",
        "quantize {root}/model --format fp8 --calibration {root}/calibration --dry-run -o {root}/out",
    ),
    "network": Surface("network/network.json", "check {root}/network"),
    "onnx": Surface("network/tensorrt.onnx", "check {root}/network/tensorrt.onnx", mutate_bytes),
    "results": Surface("results.json", "report {root}/results.json {root}/after.json --compare -o {root}/changes.json"),
    "requests": Surface(
        "requests.json",
        "import-bench {root}/report.json --requests {root}/requests.json --model {root}/model -o {root}/imported.json",
    ),
    "report": Surface(
        "report.json",
        "import-bench {root}/report.json --requests {root}/requests.json --model {root}/model -o {root}/imported.json",
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    graph = tiny_graph("AF AF F AF", hidden_size=16, intermediate_size=32, vocab_size=24)
    networks = onnx.options_for({"tensorrt": None}, max_positions=64)
    for name, files, kind in (
        ("model", hf.emit(graph, hf.Options()), "checkpoint"),
        ("written", hf.emit(graph, hf.Options()), "checkpoint"),
        ("quantized", hf.emit(quantized_graph(graph, "fp8"), hf.Options()), "checkpoint"),
        ("network", onnx.emit(graph, networks), "network"),
    ):
        save_folder(folder / name, files, kind=kind, details={})
    for name in ("model", "quantized"):  # else every change is refused as one
        (folder / name / MANIFEST).unlink()
    written = open_model(folder / "model", need_weights=True).graph
    ranges = calibrate(written, np.arange(48).reshape(3, 16) % 24, text="numbers")
    save_folder(folder / "calibration", calibration_files(ranges).items(), kind="calibration", details={})
    for name, data in (("plan", PLAN), ("recipe", RECIPE), ("gpus", GPUS)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    shutil.copy(RECIPES / "int8-weight-only.yaml", folder / "format.yaml")
    for name in ("results", "after"):
        (folder / f"{name}.json").write_text(json.dumps({**DOCUMENT, "cells": [ROUNDS]}))
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "requests.json").write_text(json.dumps([REQUEST]))
    return folder


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("surface", SURFACES)
@settings(
    max_examples=20,
    deadline=20_000,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)
@given(seed=st.integers(0, 2**32 - 1))
def test_commands_refuse_what_they_cannot_take(surface: str, seed: int, root: Path) -> None:
    rng = random.Random(seed)
    file, change = root / SURFACES[surface].file, SURFACES[surface].change
    command = SURFACES[surface].command.format(root=root).split()
    sound, before = file.read_bytes(), listing(root)
    file.write_bytes((mutate_bytes if rng.random() < 0.2 else change)(sound, rng))
    try:
        result = call(*command)
        assert result.exit_code in (0, 2), result.exception
        if result.exit_code == 2:
            assert len(re.findall(r"^error: ", result.stderr, re.MULTILINE | re.IGNORECASE)) == 1
            assert not re.search(r"Error\(|Errno|Traceback|object at 0x|Warning", result.stderr), result.stderr
            assert len(result.stderr) < 5000
            assert listing(root) == before
        elif (root / "out").is_dir():
            assert call("inspect", root / "out").exit_code == 0
    finally:
        file.write_bytes(sound)
        for path in set(listing(root)) - set(before):
            if path.parent == root:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("surface", [surface for surface in SURFACES if surface != "recipe"])
def test_the_sound_file_is_taken(surface: str, root: Path) -> None:
    result = call(*SURFACES[surface].command.format(root=root).split())
    assert result.exit_code == 0, result.output
    for name in ("out", "changes.json", "changes.md", "imported.json"):
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
