"""The reference against transformers: same weights, prefill, cached decode, unequal lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.dtypes import FLOAT8_E4M3FN, INT8, DType
from exporter.errors import GraphError, TargetError
from exporter.graph import Linear
from exporter.lazy import CHUNK_BYTES, LazyTensor, array
from exporter.numerics import amax, dequantize, quantize, scale_from_amax
from exporter.passes.quantize_linears import quantize_linears
from exporter.quantization import QuantizationRecipe
from exporter.read import open_model
from exporter.reference import Reference, fake_quantized, torch_from_lazy
from tests.checkpoints import saved_model
from tests.tiny import tiny_graph

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

CASES = {
    "llama": ("Llama", {}),
    "llama_gqa1": ("Llama", {"num_key_value_heads": 1}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_llama3_rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_yarn_rope": ("Llama", {"rope_parameters": YARN}),
    "llama_linear_rope": ("Llama", {"rope_parameters": LINEAR}),
    "llama_head_dim": ("Llama", {"head_dim": 24}),
    "llama_gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": 5}),
    "ministral": (
        "Ministral",
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "head_dim": 16,  # MinistralConfig does not work it out
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "phi3_window": ("Phi3", {"pad_token_id": 0, "sliding_window": 5, "num_key_value_heads": 4}),
    "seed_oss": ("SeedOss", {"head_dim": 24}),
    "seed_oss_biases": ("SeedOss", {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True}),
    "qwen3_yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_prefill_and_decode_agree_with_transformers(case: str, tmp_path: Path) -> None:
    model = saved_model(tmp_path, *CASES[case])
    reference = Reference(open_model(tmp_path, need_weights=True).graph)
    tokens = torch.randint(0, 307, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = model(tokens).logits

    assert expected.std() > 0.5  # else the tolerance means nothing
    torch.testing.assert_close(reference.logits(tokens), expected, atol=1e-4, rtol=0)

    lengths = [9, 17]  # right-padded rows, then one token at a time
    cache = reference.new_cache(2, 48)
    prompt = torch.full((2, 17), 3)
    for row, length in enumerate(lengths):
        prompt[row, :length] = tokens[row, :length]
    logits = reference.step(prompt, cache, lengths)
    for step in range(20):
        for row, length in enumerate(lengths):
            torch.testing.assert_close(logits[row], expected[row, length + step - 1], atol=1e-4, rtol=0)
        following = torch.stack([tokens[row, length + step] for row, length in enumerate(lengths)])
        logits = reference.step(following[:, None], cache)


def test_resident_and_streamed_weights_give_the_same_logits() -> None:
    graph = tiny_graph("AF F - (AF A) LF AL AF", num_key_value_heads=[1, 2, 4], intermediate_size=[64, 192])
    tokens = torch.arange(12)[None]
    once, again = Reference(graph, resident=True), Reference(graph)
    assert torch.equal(once.logits(tokens), again.logits(tokens))
    assert torch.equal(once.logits(tokens), again.logits(tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_not_kept_is_read_by_the_token(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph("AF", tied=tied)
    read: list[tuple[int, int]] = []
    rows = type(graph.embedding).rows

    def spy(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
        if tensor is graph.embedding:
            read.append((start, stop))
        return rows(tensor, start, stop)

    monkeypatch.setattr(type(graph.embedding), "rows", spy)
    embedded = Reference(graph).embed(torch.tensor([[7, 300, 7], [9, 9, 7]]))
    assert read == [(7, 8), (9, 10), (300, 301)]
    expected = graph.embedding.numpy()[[[7, 300, 7], [9, 9, 7]]]
    np.testing.assert_array_equal(embedded.numpy(), expected)


def test_parallel_blocks_are_the_sum_of_their_contributions() -> None:
    graph = tiny_graph("AF (AF F A) AF")
    tokens = torch.arange(10)[None]
    reference = Reference(graph, dtype=torch.float64)
    _, x, y, _ = reference.residuals(tokens, None)
    alone = tiny_graph("AF AF F A AF")  # the same weights: the pattern draws them in the same order
    span = Reference(alone, dtype=torch.float64).span(tokens.shape, None)
    members = [Reference(alone, dtype=torch.float64).block(index) for index in (1, 2, 3)]
    torch.testing.assert_close(y, x + sum(block(x, span) - x for block in members), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [FLOAT8_E4M3FN, INT8], ids=str)
def test_tokens_are_rounded_as_rows_of_a_weight_are(dtype: DType) -> None:
    tokens = np.array([[1, 2, -3], [0, 0, 0], [1e-44, 0, -3e-45], [3e-38, -1e-38, 0], [3e38, -1, 0]], np.float32)
    scale = scale_from_amax(amax(tokens, axis=1), dtype)
    found = fake_quantized(torch.from_numpy(tokens), dtype, None)
    np.testing.assert_array_equal(found.numpy(), dequantize(quantize(tokens, scale, dtype), scale))


def test_a_tensor_of_several_chunks_is_read_whole() -> None:
    values = np.arange(3 * CHUNK_BYTES // 8, dtype=np.float32).reshape(-1, 6)
    loaded = torch_from_lazy(array(values), torch.device("cpu"), torch.float64)
    np.testing.assert_array_equal(loaded.numpy(), values)


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_a_device_that_torch_cannot_use_is_refused(device: str) -> None:
    with pytest.raises(TargetError, match=rf"torch cannot use this device .*found {device}"):
        Reference(tiny_graph("AF"), device=device)


def test_decoding_keeps_the_caches_of_parallel_blocks_apart() -> None:
    graph = tiny_graph("AF (AF F A) - LF AF", num_key_value_heads=[1, 2, 2, 4], sliding_window=4)
    reference = Reference(graph, dtype=torch.float64)
    tokens = torch.arange(9)[None]
    cache = reference.new_cache(1, 9)
    found = torch.stack([reference.step(tokens[:, i : i + 1], cache) for i in range(9)], dim=1)
    torch.testing.assert_close(found, reference.logits(tokens), atol=1e-12, rtol=0)


def test_a_full_cache_is_refused() -> None:
    reference = Reference(tiny_graph("AF"))
    cache = reference.new_cache(1, 4)
    reference.step(torch.tensor([[1, 2, 3]]), cache)
    with pytest.raises(GraphError, match="cache is full"):
        reference.step(torch.tensor([[1, 2]]), cache)


def test_a_quantized_lm_head_counts_for_the_values_of_its_codes() -> None:
    graph = tiny_graph("AF")
    recipe = {"weights": {"dtype": "int8", "scale": "row"}, "include": ["lm_head"], "exclude": ["blocks.*"]}
    coded = quantize_linears(graph, QuantizationRecipe.model_validate(recipe))
    assert coded.lm_head is not None
    assert coded.lm_head.quantization is not None
    scale = coded.lm_head.quantization.weight_scale.numpy()
    values = coded.lm_head.weight.numpy().astype(np.float32) * scale[:, None]
    expected = Reference(replace(graph, lm_head=Linear(weight=array(values))))
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(Reference(coded).logits(tokens), expected.logits(tokens))
