"""Manifests carry structures that whoever reads them can rely on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from exporter.errors import CheckpointError
from exporter.network import network_manifest_from_json
from exporter.writers import onnx
from tests.tiny import tiny_graph

Json = dict[str, Any]

SPOILED: dict[str, tuple[Callable[[Json], object], str]] = {
    "empty": (lambda structure: structure.clear(), "Field required"),
    "a number of parameters that is none": (
        lambda structure: structure.update(num_parameters={}),
        "num_parameters: Input should be a valid integer",
    ),
    "a block that is none": (lambda structure: structure["blocks"].append(3), "blocks.2"),
    "a block without an FFN": (lambda structure: structure["blocks"][0].pop("ffn"), "blocks.0.*ffn: Field required"),
    "heads that are no number": (
        lambda structure: structure["blocks"][0]["attention"].update(num_attention_heads={}),
        "blocks.0.*num_attention_heads: Input should be a valid integer",
    ),
}


@pytest.mark.parametrize(("spoil", "problem"), SPOILED.values(), ids=SPOILED.keys())
def test_a_network_has_a_structure(spoil: Callable[[Json], object], problem: str) -> None:
    files = dict(onnx.emit(tiny_graph("AF (F AF)"), onnx.PRESETS["onnxruntime"]))
    document = json.loads(bytes(files["network.json"]))
    assert network_manifest_from_json(document, "network.json").structure == document["structure"]
    spoil(document["structure"])
    with pytest.raises(CheckpointError, match=rf"network.json: malformed network manifest \(structure: .*{problem}"):
        network_manifest_from_json(document, "network.json")
