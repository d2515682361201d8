"""Our compressed-tensors folders in transformers, and folders of that library in our reader: the same logits.

transformers replaces the linears of any model, our own modeling code included, and rounds weights, inputs and keys and
values where the config says so, in the dtype that the model is loaded in: float32 here, as in the reference. (In
bfloat16 it rounds the scales to that too.) Equal numbers go through equal operations: a plain Llama's logits were the
same to the last bit where this was written, a fused model's to 2e-6. The tolerance leaves room for another order of
summation, and hardly any for a code that differs.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from exporter import reference
from exporter.dtypes import FLOAT8_E4M3FN, INT8
from exporter.graph import ModelGraph, linear_names
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.read import open_model
from exporter.reference import Reference
from exporter.writers.files import save_folder
from exporter.writers.hf import NEMOTRON_NAS, Options, emit, layout_of
from tests.exporter.writers.test_hf_quantization import MIXED, with_kv_cache
from tests.tiny import quantized_graph, tiny_graph

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
PLAIN = tiny_graph("AF AF")
FUSED = fuse_ffn(tiny_graph("AF F F AF", intermediate_size=200), [(1, 2)])
FORMATS = ("fp8", "fp8-rowwise", "int8-smoothquant", "int8-smoothquant-token")

# id -> (graph, quantized)
CASES: dict[str, tuple[ModelGraph, ModelGraph]] = {
    **{name: (PLAIN, quantized_graph(PLAIN, name)) for name in FORMATS},
    **{f"{name}, fused": (FUSED, quantized_graph(FUSED, name)) for name in FORMATS},
    "KV cache": (PLAIN, with_kv_cache(quantized_graph(PLAIN, "fp8-rowwise"))),
    "KV cache, fused": (FUSED, with_kv_cache(quantized_graph(FUSED, "int8-smoothquant"))),
    "several schemes": (tiny_graph("AF F AF"), MIXED),
    "biases": (
        biased := tiny_graph("AF F AF", qkv_bias=True, ffn_bias=True), quantized_graph(biased, "int8-smoothquant"),
    ),
    "linear replacements": (replaced := tiny_graph("AF LF AL AF"), quantized_graph(replaced, "fp8-rowwise")),
    "tied": (tied := tiny_graph("AF AF", tied=True), quantized_graph(tied, "int8-smoothquant")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _scales_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a token of INT8 inputs the scale amax / 127.5, as compressed-tensors does while a model runs.

    Ours is amax / 127, as in vLLM's kernels. It is no property of the folder, which has no scale for tokens.
    """
    monkeypatch.setattr(reference, "LARGEST", {INT8: 127.5, FLOAT8_E4M3FN: 448.0})


def saved(graph: ModelGraph, folder: Path, layout: str = "compressed-tensors") -> Path:
    save_folder(folder, emit(graph, Options(quantization_layout=layout)), kind="checkpoint", details={})
    return folder


def loaded(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval()


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).integers(3, 320, (batch, length)))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    plain, quantized = CASES[case]
    model = loaded(saved(quantized, tmp_path / "model"))
    expected = Reference(quantized).logits(tokens())
    with torch.no_grad():
        found = model(tokens(), use_cache=False).logits
        prompt = model(tokens()[:, :20], use_cache=True)
        rest = model(tokens()[:, 20:], past_key_values=prompt.past_key_values, use_cache=True)
    assert difference(found, expected) <= TOLERANCE
    assert difference(torch.cat([prompt.logits, rest.logits], 1), expected) <= TOLERANCE
    # Rounding is what makes the difference, so that a model that was loaded without it would be seen.
    assert difference(Reference(plain).logits(tokens()), expected) > 100 * TOLERANCE


def test_both_kinds_of_folders_are_among_the_cases() -> None:
    layouts = {case: layout_of(graph, Options()) for case, (_, graph) in CASES.items()}
    assert {layouts[name] for name in FORMATS} == {"llama"}
    assert {layouts[f"{name}, fused"] for name in FORMATS} == {NEMOTRON_NAS}


def test_a_modelopt_folder_is_taken_for_weights(tmp_path: Path) -> None:
    """What `hf_readers` says of transformers: no error, and nothing of the model left."""
    plain, quantized = CASES["fp8"]
    with torch.no_grad():
        found = loaded(saved(quantized, tmp_path / "model", "modelopt"))(tokens()).logits
    expected = Reference(quantized).logits(tokens())
    assert difference(found, expected) > 3 * difference(Reference(plain).logits(tokens()), expected)


# --- folders that the library itself makes


def arguments(kind: str, strategy: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "strategy": strategy, "dynamic": strategy == "token"}


THEIRS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "FP8 per channel and token": (arguments("float", "channel"), arguments("float", "token"), ["lm_head"]),
    "FP8 static": (arguments("float", "tensor"), arguments("float", "tensor"), ["lm_head"]),
    "INT8 per token": (arguments("int", "channel"), arguments("int", "token"), ["lm_head"]),
    "INT8 static": (arguments("int", "channel"), arguments("int", "tensor"), ["lm_head"]),
    "some left out": (
        arguments("int", "channel"), arguments("int", "token"), ["lm_head", r"re:.*self_attn\.(q|k|v)_proj$"],
    ),
}  # fmt: skip


def made_by_compressed_tensors(
    weights: dict[str, Any], inputs: dict[str, Any], ignore: list[str], folder: Path
) -> Path:
    """A folder as llm-compressor makes one: with this library's config, scales, compressor and names."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    plain = saved(PLAIN, folder / "plain")
    model = loaded(plain)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    config = QuantizationConfig(config_groups=groups, ignore=ignore, quantization_status="frozen")
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        axis = 1 if weights["strategy"] == "channel" else None
        least = module.weight.amin(axis, keepdim=True) if axis else module.weight.amin().reshape(1)
        most = module.weight.amax(axis, keepdim=True) if axis else module.weight.amax().reshape(1)
        module.weight_scale.data.copy_(calculate_qparams(least, most, scheme.weights)[0])
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.02)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "theirs")
    compressor.update_config(folder / "theirs")
    return folder / "theirs"


@pytest.mark.parametrize("case", THEIRS)
def test_their_folders_are_read(case: str, tmp_path: Path) -> None:
    weights, inputs, ignore = copy.deepcopy(THEIRS[case])
    folder = made_by_compressed_tensors(weights, inputs, ignore, tmp_path)
    graph = open_model(folder, need_weights=True).graph
    quantized = [linear for linear in linear_names(graph).values() if linear.quantization is not None]
    assert len(quantized) == (8 if case == "some left out" else 14)
    with torch.no_grad():
        expected = loaded(folder)(tokens()).logits
    assert difference(Reference(graph).logits(tokens()), expected) <= TOLERANCE
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    assert method == "compressed-tensors"
