"""The reference against transformers: same weights, prefill, cached decode, unequal lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from exporter.errors import GraphError
from exporter.graph import Linear
from exporter.lazy import array
from exporter.passes.quantize_linears import quantize_linears
from exporter.quantization import QuantizationRecipe
from exporter.read import open_model
from exporter.reference import Reference
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
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
}


def saved_model(folder: Path, family: str, changes: dict) -> transformers.PreTrainedModel:
    """A tiny random transformers model, saved into `folder`."""
    config = getattr(transformers, f"{family}Config")(
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        **{
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "vocab_size": 307,
            **changes,
        },
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # the usual start is so small that most mistakes would drown in the tolerance
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm" in name else 0.0
            parameter.copy_(shift + torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.12))
    model.save_pretrained(folder)
    return model


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


def test_parallel_blocks_are_the_sum_of_their_contributions() -> None:
    graph = tiny_graph("AF (AF F A) AF")
    tokens = torch.arange(10)[None]
    reference = Reference(graph, dtype=torch.float64)
    _, x, y, _ = reference.residuals(tokens, None)
    alone = tiny_graph("AF AF F A AF")  # the same weights: the pattern draws them in the same order
    span = Reference(alone, dtype=torch.float64).span(tokens.shape, None)
    members = [Reference(alone, dtype=torch.float64).block(index) for index in (1, 2, 3)]
    torch.testing.assert_close(y, x + sum(block(x, span) - x for block in members), atol=1e-12, rtol=0)


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
