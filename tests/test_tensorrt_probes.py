"""The probes of TensorRT, as far as they go without it: their networks, and what they make of an answer.

ONNX Runtime stands in for TensorRT where a probe runs a network: the answer is then known from ONNX's definition.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporter.writers.onnx_tensorrt_rules import RULES, Evidence, check_network

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "tensorrt_probes.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("tensorrt_probes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


probes = load_script()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    probes.write_networks(list(probes.PROBES), folder)
    return folder


def session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", probes.PROBES)
def test_networks(name: str, written: Path) -> None:
    """They are valid ONNX, and those that ONNX Runtime has kernels for load there."""
    files = sorted((written / name).rglob("*.onnx"))
    assert files
    for file in files:
        onnx.checker.check_model(str(file), full_check=True)
    runnable = probes.PROBES[name].onnxruntime
    for file in (written / name).glob(runnable) if runnable else ():
        assert session(file).get_outputs()


TENSORRT_DTYPES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT64": "INT64"}  # by ONNX's names


def test_every_output_has_a_buffer(written: Path) -> None:
    found = {
        onnx.TensorProto.DataType.Name(output.type.tensor_type.elem_type)
        for file in written.rglob("*.onnx")
        for output in onnx.load(file, load_external_data=False).graph.output
    }
    assert {TENSORRT_DTYPES[name] for name in found} == set(probes.TORCH_DTYPES)


BROKEN = {  # the probes that spoil a network -> the import rule that they ask about
    "attention-one-kernel-float-mask": {"attention-float-mask"},
    "dynamic-batch": {"cache-batch"},
    "growing-cache": {"cache-capacity"},
    "cache-once": {"cache-once"},
    "fp8-per-channel": {"fp8-channel"},
    "fp8-float32-scales": {"fp8-scale-dtype"},
    "zero-point-output-dtype": {"zero-point-output-dtype"},
    "ir-version": {"ir-version"},
    "swish": {"op-version"},
    "empty-positions": {"rotary-empty-positions"},
    "empty-initializer": {"empty-initializer"},
    "foreign-domain": {"op-domain"},
    "function-names": {"function-name"},
    "attention-nonpad": {"attention-nonpad"},
    "attention-large-heads": {"attention-head-size"},
}


@pytest.mark.parametrize("name", probes.PROBES)
def test_probes_ask_about_rules(name: str, written: Path) -> None:
    file = max((written / name).rglob("*.onnx"), key=lambda path: path.name == "tensorrt.onnx")
    found = {violation.rule.id for violation in check_network(probes.load(file), (10, 16))}
    assert found == BROKEN.get(name, set())


def test_every_unverified_rule_has_a_probe() -> None:
    unverified = {rule.id for rule in RULES if rule.evidence is Evidence.UNVERIFIED}
    assert unverified <= set.union(*BROKEN.values())


class OnnxRuntimeLaboratory:
    """Runs networks by ONNX's definition."""

    def build(self, file: Path, **options: object) -> Path:
        return file

    def run(self, file: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        opened = session(file)
        names = [output.name for output in opened.get_outputs()]
        return dict(zip(names, opened.run(names, inputs), strict=True))


@pytest.mark.parametrize(
    ("name", "outcome", "evidence"),
    [
        ("attention-causal", "confirmed", "upper left"),
        ("argmax-ties", "confirmed", "the first"),
        ("attention-nonpad", "refuted", "the first keys"),
        ("function-names", "refuted", "adds 2.000"),
        ("dynamic-batch", "confirmed", "True"),
    ],
)
def test_questions_put_to_onnx_runtime(name: str, outcome: str, evidence: str, written: Path) -> None:
    found = probes.PROBES[name].ask(OnnxRuntimeLaboratory(), written / name)
    assert found.outcome == outcome
    assert evidence in found.evidence


class Described:
    """An engine that the inspector describes in these layers."""

    def __init__(self, layers: list[dict[str, Any]]) -> None:
        self._layers = layers

    def build(self, file: Path, **options: object) -> bytes:
        return b""

    def layers(self, plan: bytes) -> list[dict[str, Any]]:
        return self._layers


def layer(name: str, tactic: str = "", **more: object) -> dict[str, Any]:
    return {"Name": name, "LayerType": "kgen", "TacticName": tactic, "Metadata": f"[ONNX Layer: {name}]", **more}


ATTENTION, CODES = "blocks.0.attention.attention", "blocks.0.ffn.gate_up_proj.input.codes"
CACHE = [{"Name": "x", "Dimensions": [1, 2, 64, 32]}]


@pytest.mark.parametrize(
    ("name", "layers", "outcome"),
    [
        ("attention-one-kernel", [layer(ATTENTION, "_gemm_mha_v2"), layer(ATTENTION, "_gemv_mha_v1")], "confirmed"),
        ("attention-one-kernel", [layer(ATTENTION, "sm90_gemm"), layer(ATTENTION, "softmax")], "refuted"),
        ("scale-folded", [layer("node_of_KVCacheUpdate", Outputs=CACHE)], "confirmed"),
        ("scale-folded", [layer("scaled_keys", Outputs=CACHE)], "refuted"),
        ("norm-fp8", [layer(f"blocks.0.ffn.norm + {CODES}")], "confirmed"),
        ("norm-fp8", [layer("blocks.0.ffn.norm"), layer(CODES)], "refuted"),
        ("fp8-products", [layer("blocks.0.ffn.up_proj", Inputs=[{"Format": "Row major FP8"}])], "confirmed"),
        ("fp8-products", [layer("blocks.0.ffn.up_proj", Inputs=[{"Format": "Row major BF16"}])], "refuted"),
    ],
)
def test_what_layers_say(name: str, layers: list[dict[str, Any]], outcome: str, written: Path) -> None:
    assert probes.PROBES[name].ask(Described(layers), written / name).outcome == outcome


class Refusing:
    def __init__(self, version: tuple[int, int]) -> None:
        self.version = version

    def build(self, file: Path, **options: object) -> bytes:
        raise probes.Refused("parser: no")


@pytest.mark.parametrize(("version", "outcome"), [((10, 16), "confirmed"), ((11, 0), "refuted")])
def test_refusals_by_version(version: tuple[int, int], outcome: str, written: Path) -> None:
    found = probes.PROBES["swish"].ask(Refusing(version), written / "swish")
    assert (found.outcome, found.evidence) == (outcome, "parser: no")
    assert probes.PROBES["foreign-domain"].ask(Refusing(version), written / "foreign-domain").outcome == "refuted"


def test_without_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probes.library, "missing", lambda: ["TensorRT cannot be imported"])
    monkeypatch.setattr(sys, "argv", ["tensorrt_probes.py", "-o", str(tmp_path / "x.json")])
    assert probes.main() == 2
    assert "TensorRT cannot be imported" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["tensorrt_probes.py", "--list"])
    assert probes.main() == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(probes.PROBES)


def test_a_probe_that_dies_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"outcome": "refuted", "evidence": "e"})
    answers = {"print": f"print('noise'); print({said!r})", "die": "import os; os.abort()"}
    run = probes.subprocess.run

    def substituted(command: list[str], **options: Any) -> Any:
        return run([sys.executable, "-c", answers[command[-1]]], **options)

    monkeypatch.setattr(probes.subprocess, "run", substituted)
    assert probes.ask_apart("print") == probes.Answer("refuted", "e")
    assert probes.ask_apart("die").outcome == "error"
