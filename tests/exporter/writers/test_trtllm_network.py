"""Our TensorRT-LLM model class, executed with the stand-in over simulated ranks, against the reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.dtypes import FLOAT8_E4M3FN, FLOAT32, INT8
from exporter.graph import KVQuantization, ModelGraph, map_blocks
from exporter.lazy import full
from exporter.reference import Reference
from exporter.writers.trtllm import NETWORK
from tests.exporter.writers import tensorrt_llm_stand_in as stand_in
from tests.exporter.writers.test_trtllm import HEADS, fused, saved
from tests.exporter.writers.trtllm_loader import load
from tests.tiny import quantized_graph, tiny_graph

TOKENS = torch.randint(0, 300, (12,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model_class(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """The class as `trtllm-build --model_cls_file` loads it: from a file, as a module named `models`."""
    stand_in.install(monkeypatch)
    spec = importlib.util.spec_from_file_location("models", NETWORK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FuselageForCausalLM


def run(model_class: Callable[[Any], Any], folder: Path) -> tuple[torch.Tensor, stand_in.Engine]:
    """Logits [S, V] of a prefill of 8 tokens and one step for each of the others."""
    loaded = load(folder)
    engine = stand_in.Engine(model_class, loaded.config, loaded.ranks)
    logits = [engine.step(TOKENS[:8]), *(engine.step(TOKENS[i : i + 1]) for i in range(8, len(TOKENS)))]
    return torch.cat(logits), engine


GRAPHS: dict[str, tuple[ModelGraph, dict[str, Any]]] = {
    "llama": (tiny_graph("AF AF", **HEADS), {"tp_size": 2}),
    "parallel": (tiny_graph("AF (AF AF) AF (AF F)", **HEADS, num_key_value_heads=[8, 4, 2, 1]), {}),
    "parallel, tp 4": (tiny_graph("AF (AF AF) AF (AF F)", **HEADS, num_key_value_heads=[8, 4, 2, 1]), {"tp_size": 4}),
    "parallel, tp 2, pp 2": (tiny_graph("(AF AF) (AF F) - (A AF) AF", **HEADS, num_key_value_heads=[8, 2, 1]),
                             {"tp_size": 2, "pp_size": 2}),
    "parallel with linears": (tiny_graph("(AF LF AL) (LL AF)", **HEADS), {"tp_size": 2}),
    "cut": (fused("AF AF AF AF", (1, 2), **HEADS, intermediate_size=512), {"tp_size": 2, "max_gemm_elements": 30000}),
    "cut, tp 8": (fused("AF AF AF AF", (1, 2), **HEADS, intermediate_size=1024),
                  {"tp_size": 8, "max_gemm_elements": 1}),
    "split embedding": (tiny_graph("AF", **HEADS, vocab_size=307), {"tp_size": 4, "split_embedding": True}),
    "cut in parallel": (tiny_graph("(AF AF) F AL A", **HEADS, intermediate_size=512),
                        {"tp_size": 2, "max_gemm_elements": 30000}),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
def test_agrees_with_the_reference(case: str, model_class: Callable[[Any], Any], tmp_path: Path) -> None:
    graph, options = GRAPHS[case]
    found, _ = run(model_class, saved(graph, tmp_path / "out", dtype=FLOAT32, **options))
    torch.testing.assert_close(found, Reference(graph).logits(TOKENS[None])[0], atol=2e-4, rtol=1e-4)


WIDE = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 64, "num_key_value_heads": 4}
QUANTIZED = tiny_graph("AF (AF AF) F", **WIDE, intermediate_size=512)


@cache
def quantized(name: str) -> ModelGraph:
    return quantized_graph(QUANTIZED, name)


@pytest.mark.parametrize("options", [{}, {"tp_size": 2, "max_gemm_elements": 100_000}], ids=["whole", "cut"])
@pytest.mark.parametrize(
    "name", ["fp8", "fp8-rowwise", "int8-smoothquant", "int8-smoothquant-token", "int8-weight-only"]
)
def test_quantized(name: str, options: dict[str, Any], model_class: Callable[[Any], Any], tmp_path: Path) -> None:
    graph = quantized(name)
    found, _ = run(model_class, saved(graph, tmp_path / "out", dtype=FLOAT32, **options))
    expected = Reference(graph).logits(TOKENS[None])[0]
    plain = Reference(QUANTIZED).logits(TOKENS[None])[0]
    error, of_format = (float((found - one).norm() / one.norm()) for one in (expected, plain))
    if name == "int8-weight-only":  # rounded once more when they are loaded, with 128 for 127
        assert error < 0.04
    elif options and name in ("fp8-rowwise", "int8-smoothquant-token"):
        # A token has a scale of its own on every rank and in every part, which is finer than the reference's.
        assert error < 1.2 * of_format < 0.2
    else:  # 1e-6, but for a code that lies between two and goes the other way
        assert error < 0.5 * of_format


@pytest.mark.parametrize(("dtype", "limit"), [(INT8, 0.02), (FLOAT8_E4M3FN, 0.05)])
def test_kv_cache(dtype: Any, limit: float, model_class: Callable[[Any], Any], tmp_path: Path) -> None:
    largest = {INT8: 127, FLOAT8_E4M3FN: 448}[dtype]
    kv = KVQuantization(dtype=dtype, k_scale=full((), 5 / largest, FLOAT32), v_scale=full((), 4 / largest, FLOAT32))
    plain = tiny_graph("AF (AF AF)", **HEADS)
    graph = map_blocks(plain, lambda block, _: replace(block, attention=replace(block.attention, kv_quantization=kv)))
    found, _ = run(model_class, saved(graph, tmp_path / "out", dtype=FLOAT32, tp_size=2))
    expected = Reference(plain).logits(TOKENS[None])[0]
    assert 1e-4 < (found - expected).norm() / expected.norm() < limit


def test_a_group_reduces_its_ffns_once(model_class: Callable[[Any], Any], tmp_path: Path) -> None:
    graph = tiny_graph("(AF AF AF)", **HEADS)
    _, engine = run(model_class, saved(graph, tmp_path / "out", tp_size=2))
    assert engine.world.all_reduces == 3 + 1  # each attention by itself


def test_the_stock_class_refuses_what_it_would_compute_wrongly(
    model_class: Callable[[Any], Any], tmp_path: Path
) -> None:
    loaded = load(saved(tiny_graph("AF (AF AF)", **HEADS), tmp_path / "out"))
    with pytest.raises(AssertionError):
        stand_in.Engine(stand_in.DeciLMForCausalLM, loaded.config, loaded.ranks)


@pytest.mark.parametrize(
    ("of", "name"), [(stand_in.GatedMLP, "lora"), (stand_in.SmoothQuantGatedMLP, "all_reduce_params")]
)
def test_an_argument_that_the_real_class_lacks_fails(of: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        of.forward(None, None, **{name: None})
