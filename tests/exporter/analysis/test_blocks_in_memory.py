"""Whoever takes text through a model holds one block of it at a time: the next is loaded when the last is gone."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from exporter.analysis.dependency import measure_dependency
from exporter.analysis.evaluate import evaluate, hold
from exporter.analysis.quantization import compare_smoothing, linear_errors, search_strengths
from exporter.calibration import calibrate, ranges_of
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.passes.quantize_linears import quantize_linears
from exporter.quantization import read_quantization
from exporter.reference import LoadedBlock, Reference
from tests.tiny import tiny_graph

TOKENS = np.random.default_rng(0).integers(0, 320, (3, 8))
GRAPH = fuse_ffn(tiny_graph("AF F F AF F F AF"), [(1, 2), (4, 5)])
RECIPE = read_quantization("int8-smoothquant")


RANGES = ranges_of(calibrate(GRAPH, TOKENS, text="noise"), GRAPH)
QUANTIZED = quantize_linears(GRAPH, RECIPE, RANGES)

CASES: dict[str, Callable[[], object]] = {
    "logits": lambda: Reference(GRAPH).logits(torch.from_numpy(TOKENS)),
    "evaluate": lambda: evaluate(GRAPH, TOKENS, reference=GRAPH),
    "hold": lambda: hold(GRAPH, TOKENS),
    "calibrate": lambda: calibrate(GRAPH, TOKENS, text="noise"),
    "dependency": lambda: measure_dependency(GRAPH, TOKENS, kl=True),
    "search": lambda: search_strengths(GRAPH, RANGES, RECIPE, TOKENS, alphas=(0.5,)),
    "linear errors": lambda: linear_errors(GRAPH, QUANTIZED, TOKENS),
    "schemes": lambda: compare_smoothing(GRAPH, RANGES, TOKENS),
}


@pytest.mark.parametrize("case", CASES)
def test_one_block_at_a_time(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    last: list[weakref.ref[torch.Tensor]] = []
    loaded_blocks = []
    load = Reference.block

    def watched(self: Reference, index: int) -> LoadedBlock:
        alive = [tensor.shape for ref in last if (tensor := ref()) is not None]
        assert not alive, f"block {index} is loaded beside {alive}"
        loaded = load(self, index)
        ffns = [member.ffn for member in loaded.members]
        last[:] = [weakref.ref(linear.weight) for ffn in ffns for linear in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)]
        loaded_blocks.append(index)
        return loaded

    monkeypatch.setattr(Reference, "block", watched)
    CASES[case]()
    assert loaded_blocks[:4] == [0, 1, 2, 3]
