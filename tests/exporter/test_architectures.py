"""Configs of every family, spelled as they occur, against transformers' own reading of the same config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporter.architectures import FAMILIES, family_of
from exporter.architectures.base import ffn_mult_from_width, width_from_ffn_mult
from exporter.dtypes import BFLOAT16, FLOAT16
from exporter.errors import CheckpointError
from exporter.graph import FFN, Activation, Attention, Block, LinearSublayer, ModelGraph
from exporter.read import graph_from_config, open_model

DATA = Path(__file__).parent.parent / "data"

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 32}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "original_max_position_embeddings": 4096}
SEED_OSS = LLAMA | {"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
ACTIVE = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 6.0}}
DECI = {key: value for key, value in LLAMA.items() if key not in ("intermediate_size", "num_key_value_heads")} | {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "intermediate_size": None,
    "num_key_value_heads": None,
    "block_configs": [ACTIVE, ACTIVE, ACTIVE],
}


def attention_of(graph: ModelGraph, index: int = 0) -> Attention:
    attention = graph.flat_blocks[index].attention
    assert isinstance(attention, Attention)
    return attention


def ffn_of(graph: ModelGraph, index: int = 0) -> FFN:
    ffn = graph.flat_blocks[index].ffn
    assert isinstance(ffn, FFN)
    return ffn


# --- RoPE

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3 factor 32": LLAMA3 | {"factor": 32, "original_max_position_embeddings": 256},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn, original length from the config": {"rope_type": "yarn", "factor": 2.0},
    "yarn, no factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512},
    "yarn, attention_factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 0.7
    },
    "yarn, mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 1024, "mscale": 0.707,
        "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 2,
    },
    "yarn, not truncated": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "truncate": False
    },
}  # fmt: skip


def transformers_rope(config: dict[str, Any]) -> tuple[np.ndarray, float]:
    """What `LlamaRotaryEmbedding` computes for a config, its default included."""
    hf = transformers.LlamaConfig(**json.loads(json.dumps(config)))
    rope_type = hf.rope_parameters["rope_type"]
    if rope_type == "default":
        embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf)
        return embedding.inv_freq.numpy(), embedding.attention_scaling
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](hf, "cpu")
    return frequencies.numpy(), factor


@pytest.mark.parametrize(("theta", "head_dim"), [(10000.0, 16), (500000, 128)])
@pytest.mark.parametrize("style", ["legacy", "legacy type", "parameters", "both"])
@pytest.mark.parametrize("name", ROPES)
def test_rope_is_that_of_transformers(name: str, style: str, theta: float, head_dim: int) -> None:
    scaling = ROPES[name]
    config = LLAMA | {"head_dim": head_dim, "rope_theta": theta}
    if style == "legacy":
        config |= {"rope_scaling": None if name == "default" else scaling}
    elif style == "legacy type":
        config |= {"rope_scaling": {("type" if key == "rope_type" else key): value for key, value in scaling.items()}}
    elif style == "parameters":
        del config["rope_theta"]
        config |= {"rope_parameters": scaling | {"rope_theta": theta}}
    else:
        config |= {"rope_scaling": scaling, "rope_parameters": scaling | {"rope_theta": theta}}
    rope = graph_from_config(config).rope
    frequencies, factor = transformers_rope(config)
    np.testing.assert_allclose(
        rope.inverse_frequencies(head_dim), frequencies, rtol=2e-6, atol=0
    )  # float32, other order
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    assert rope.theta == theta


ROPES_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "not supported.*llama3.*found dynamic"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "found longrope"),
    "linear without factor": ({"rope_scaling": {"type": "linear"}}, "'linear' needs 'factor'"),
    "llama3 without a key": ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "'llama3' needs 'low_freq_factor'"),
    "llama3 with equal bounds": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor is greater"),
    "factor zero": ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
    "factor that underflows": ({"rope_scaling": {"type": "linear", "factor": 1e-300}}, "rope_scaling.factor"),
    "beta that overflows": ({"rope_scaling": ROPES["yarn"] | {"beta_fast": 5e-324}}, "rope_scaling.beta_fast"),
    "theta one": ({"rope_theta": 1.0}, "rope_theta is greater than 1"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial rotary"),
    "partial inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
    "one per kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
        "each kind of layer",
    ),
    "spellings that differ": (
        {"rope_scaling": ROPES["linear"], "rope_parameters": {"rope_type": "default"}},
        "rope_scaling and rope_parameters differ",
    ),
    "thetas that differ": ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is given twice"),
    "original lengths that differ": (
        {"rope_scaling": ROPES["yarn"], "original_max_position_embeddings": 77},
        "original_max_position_embeddings is given twice",
    ),
}


@pytest.mark.parametrize("case", ROPES_REFUSED)
def test_rope_that_would_be_read_wrongly_is_refused(case: str) -> None:
    change, message = ROPES_REFUSED[case]
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        graph_from_config(LLAMA | change)


# --- what a config means

MEANINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, {"kv": 2, "d": 16, "qkv_bias": False, "o_bias": False, "ffn_bias": False, "window": None}),
    "llama, no key-value heads": (LLAMA | {"num_key_value_heads": None}, {"kv": 4}),
    "llama, head_dim": (LLAMA | {"head_dim": 8}, {"d": 8}),
    "llama, head_dim null": (LLAMA | {"head_dim": None}, {"d": 16}),
    "llama, biases": (
        LLAMA | {"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "o_bias": True, "ffn_bias": True}
    ),
    "llama, model_type alone": (LLAMA | {"architectures": None}, {"kv": 2}),
    "llama, AnyModel": (LLAMA | {"architectures": ["AnyModel"]}, {"kv": 2}),
    "llama, null dtype": (LLAMA | {"torch_dtype": None}, {"dtype": BFLOAT16}),
    "llama, dtype": ({k: v for k, v in LLAMA.items() if k != "torch_dtype"} | {"dtype": "float16"}, {"dtype": FLOAT16}),
    "llama, gelu": (LLAMA | {"hidden_act": "gelu_pytorch_tanh"}, {"activation": Activation.GELU_TANH}),
    "llama ignores a window": (LLAMA | {"sliding_window": 16}, {"window": None}),
    "llama, keys that change nothing": (
        LLAMA
        | {
            "is_causal": True, "layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 1, 1], "logit_scale": 1.0,
            "embedding_multiplier": 1, "attention_multiplier": 0.25, "attn_logit_softcapping": None,
        },
        {"d": 16},
    ),
    "mistral": (MISTRAL, {"window": None}),
    "mistral, window": (MISTRAL | {"sliding_window": 16}, {"window": 16}),
    "mistral, keys missing": (
        {k: v for k, v in MISTRAL.items() if k not in ("sliding_window", "num_key_value_heads")}
        | {"num_attention_heads": 16},
        {"window": 4096, "kv": 8},
    ),
    "mistral, null key-value heads": (MISTRAL | {"num_key_value_heads": None}, {"kv": 4}),
    "ministral": (
        MISTRAL
        | {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "sliding_window": 16},
        {"window": 16},
    ),
    "qwen2": (QWEN2, {"qkv_bias": True, "o_bias": False, "window": None}),
    "qwen2, window": (QWEN2 | {"use_sliding_window": True, "max_window_layers": 0}, {"window": 32}),
    "qwen2, window switched off": (QWEN2 | {"max_window_layers": 0}, {"window": None}),
    "qwen2, window above": (QWEN2 | {"use_sliding_window": True, "max_window_layers": 1}, {"window": None}),
    "qwen2, window of layer_types": (
        QWEN2 | {"use_sliding_window": True, "layer_types": ["sliding_attention"] + ["full_attention"] * 2},
        {"window": 32},
    ),
    "qwen2, key-value heads missing": (
        {k: v for k, v in QWEN2.items() if k != "num_key_value_heads"}
        | {"num_attention_heads": 64, "hidden_size": 128},
        {"kv": 32},
    ),
    "qwen3": (QWEN3, {"d": 32, "qkv_bias": False, "qk_norm": True}),
    "qwen3, bias": (QWEN3 | {"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
    "phi3": (PHI3, {"kv": 2, "d": 16, "qkv_bias": False, "ffn_bias": False, "width": 160, "window": None}),
    "phi3, window": (PHI3 | {"sliding_window": 16, "num_key_value_heads": None}, {"kv": 4, "window": 16}),
    "seed-oss": (SEED_OSS, {"d": 128, "qkv_bias": True, "o_bias": False, "ffn_bias": False}),
    "seed-oss, bias on o alone": (
        SEED_OSS | {"attention_bias": False, "attention_out_bias": True, "head_dim": None},
        {"d": 16, "qkv_bias": False, "o_bias": True},
    ),
    "seed-oss, key-value heads missing": (
        {k: v for k, v in SEED_OSS.items() if k != "num_key_value_heads"} | {"num_attention_heads": 16}, {"kv": 8}
    ),
    "deci": (DECI, {"kv": 2, "width": 256}),
    "deci, schema with widths": (
        DECI | {"block_configs": [{"attention": {"n_heads_in_group": 1}, "ffn": {"intermediate_size": 100}}] * 3},
        {"kv": 4, "width": 100},
    ),
    "block_configs, activation of its own": (
        DECI | {"block_configs": [ACTIVE | {"ffn": {"ffn_mult": 6.0, "hidden_act": "gelu", "gated": True}}] * 3},
        {"activation": Activation.GELU},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MEANINGS)
def test_meaning_of_a_config(case: str) -> None:
    config, expected = MEANINGS[case]
    graph = graph_from_config(config)
    attention, ffn = attention_of(graph), ffn_of(graph)
    found = {
        "kv": attention.num_key_value_heads,
        "d": attention.head_dim,
        "qkv_bias": all(linear.bias is not None for linear in (attention.q_proj, attention.k_proj, attention.v_proj)),
        "o_bias": attention.o_proj.bias is not None,
        "qk_norm": attention.q_norm is not None and attention.k_norm is not None,
        "window": attention.sliding_window,
        "ffn_bias": all(linear.bias is not None for linear in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)),
        "width": ffn.intermediate_size,
        "activation": ffn.activation,
        "dtype": graph.dtype,
    }
    assert {key: found[key] for key in expected} == expected
    assert not graph.has_bytes


@pytest.mark.parametrize("max_window_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_per_layer_are_those_of_transformers(family: str, max_window_layers: int) -> None:
    config = {"qwen2": QWEN2, "qwen3": QWEN3}[family] | {
        "use_sliding_window": True, "sliding_window": 32, "max_window_layers": max_window_layers
    }  # fmt: skip
    cls = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[family]
    kinds = cls(**config).layer_types
    graph = graph_from_config(config)
    assert [attention.sliding_window for _, attention in graph.attentions] == [
        32 if kind == "sliding_attention" else None for kind in kinds
    ]


@pytest.mark.parametrize("kinds", ["SFS", "FFF", "SSS"])
def test_mistral_with_layer_types_is_what_transformers_makes_of_it(kinds: str, tmp_path: Path) -> None:
    """It takes such a config for one of Ministral, whatever it says it is."""
    layer_types = [{"S": "sliding_attention", "F": "full_attention"}[kind] for kind in kinds]
    config = MISTRAL | {"sliding_window": 32, "layer_types": layer_types}
    (tmp_path / "config.json").write_text(json.dumps(config))
    hf = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(hf, transformers.MinistralConfig)
    assert [attention.sliding_window for _, attention in graph_from_config(config).attentions] == [
        hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types
    ]


def test_the_wide_variety_of_blocks() -> None:
    blocks = [
        ACTIVE,
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 12.0}},
        {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        {"attention": {"no_op": True}, "ffn": {"no_op": True}},
        {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
    ]
    graph = graph_from_config(DECI | {"block_configs": blocks, "num_hidden_layers": 5})
    assert [block.source_layers for block in graph.blocks] == [(0,), (1,), (2,), (3,), (4,)]
    assert [type(block.attention).__name__ for block in graph.flat_blocks] == [
        "Attention", "NoneType", "Attention", "NoneType", "LinearSublayer"
    ]  # fmt: skip
    assert ffn_of(graph, 1).intermediate_size == 512
    assert attention_of(graph, 2).num_key_value_heads == 1
    assert graph.blocks[3].is_empty
    assert isinstance(graph.flat_blocks[4].ffn, LinearSublayer)
    assert graph.sequential_sublayers == 6
    assert graph.kv_slots == {0: 0, 2: 1}


def test_what_we_wrote_remembers_where_it_came_from() -> None:
    blocks = [ACTIVE, {"attention": {"no_op": True}, "ffn": {"ffn_mult": 12.0}}]
    written = {
        "qk_norm": True,
        "blocks": [
            {"source_layers": [0], "segments": [[0, 256]], "sliding_window": 9},
            {"source_layers": [1, 2, 3], "segments": [[1, 256], [3, 200]]},
        ],
    }
    graph = graph_from_config(DECI | {"block_configs": blocks, "num_hidden_layers": 2, "fuselage": written})
    assert attention_of(graph).sliding_window == 9
    assert attention_of(graph).q_norm is not None
    fused = graph.blocks[1]
    assert isinstance(fused, Block)
    assert fused.source_layers == (1, 2, 3)
    assert [(segment.source_layer, segment.width) for segment in ffn_of(graph, 1).segments] == [(1, 256), (3, 200)]
    assert ffn_of(graph, 1).padding == 56


CONFIGS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": (
        LLAMA | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        r"unknown architecture: expected LlamaForCausalLM.*DeciLMForCausalLM.*found .*GPT2LMHeadModel",
    ),
    "known type under an unknown architecture": (LLAMA | {"architectures": ["LlamaForX"]}, "unknown architecture"),
    "known architecture under an unknown type": (
        LLAMA | {"model_type": "granite"},
        "model_type is not that of LlamaForCausalLM: expected llama, found granite",
    ),
    "another family's type": (
        MISTRAL | {"model_type": "qwen2"}, "model_type is not .* expected mistral or ministral, found qwen2"
    ),
    **{
        f"arithmetic of others: {key}": (LLAMA | {key: value}, f"{key}' would change the arithmetic.*found {found}")
        for key, value, found in [
            ("is_causal", False, "false"), ("layer_types", ["full_attention", "sliding_attention"], ".*sliding_att"),
            ("attention_chunk_size", 8192, 8192), ("no_rope_layers", [1, 1, 0], ".*1, 1, 0"),
            ("rope_interleaved", True, "true"), ("rotary_pct", 0.25, 0.25), ("rope_pct", 0.25, 0.25),
            ("alibi", True, "true"), ("clip_qkv", 8.0, 8.0), ("attn_logit_softcapping", 50.0, 50.0),
            ("final_logit_softcapping", 30.0, 30.0), ("attn_temperature_tuning", True, "true"),
            ("use_parallel_residual", True, "true"), ("parallel_attn", True, "true"), ("scale_emb", 12, 12),
            ("embedding_multiplier", 12.0, 12.0), ("residual_multiplier", 0.22, 0.22), ("logits_scaling", 16, 16),
            ("logit_scale", 0.0625, 0.0625), ("llama_4_scaling", {"beta": 0.1}, ".*beta"),
        ]
    },
    "queries scaled by position": (
        MISTRAL | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1}},
        "queries scaled by position are not supported: found 0.1",
    ),
    "phi3, its word for longrope": (
        PHI3 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "not supported in Phi-3: expected default, found Yarn"
    ),
    "phi3, longrope": (
        PHI3 | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}},
        "RoPE scaling is not supported.*found longrope",
    ),
    "phi3, partial rotary": (PHI3 | {"partial_rotary_factor": 0.75}, "partial rotary embedding is not supported"),
    "attention_multiplier": (
        LLAMA | {"attention_multiplier": 0.0625}, r"1 / sqrt\(head_dim\): expected 0.25, found 0.0625"
    ),
    "neither": (LLAMA | {"architectures": None, "model_type": None}, "unknown architecture"),
    "quantized otherwise": (
        LLAMA | {"quantization_config": {"quant_method": "fp8"}}, "unknown quantization method.*found fp8",
    ),
    "per_layer_config": (LLAMA | {"per_layer_config": {"0": {}}}, "per_layer_config"),
    "no width": ({k: v for k, v in LLAMA.items() if k != "intermediate_size"}, "no intermediate_size"),
    "heads do not divide": (LLAMA | {"num_attention_heads": 5}, "num_attention_heads divides hidden_size"),
    "odd head_dim": (LLAMA | {"head_dim": 15}, "head_dim is even: found 15"),
    "kv heads do not divide": (LLAMA | {"num_key_value_heads": 3}, "layer 0: key-value heads divide.*found 3"),
    "activation": (LLAMA | {"hidden_act": "swish7"}, "hidden_act: .*silu.*found swish7"),
    "dtype": (LLAMA | {"torch_dtype": "int4"}, "unknown dtype: expected float32.*found int4"),
    "layer_types too short": (
        QWEN2 | {"use_sliding_window": True, "layer_types": ["full_attention"]},
        "layer_types has one entry per layer: expected 3, found 1",
    ),
    "layer_types of another kind": (
        QWEN2 | {"layer_types": ["chunked_attention"] * 3},
        r"layer_types\[0\].*found chunked_attention",
    ),
    "deci without block_configs": ({k: v for k, v in DECI.items() if k != "block_configs"}, "block_configs: Field req"),
    "too few blocks": (DECI | {"num_hidden_layers": 4}, "one entry per layer: expected 4, found 3"),
    "group does not divide": (
        DECI | {"block_configs": [ACTIVE, ACTIVE, {"attention": {"n_heads_in_group": 3}, "ffn": {"no_op": True}}]},
        r"block_configs\[2\].attention: n_heads_in_group divides.*expected a divisor of 4, found 3",
    ),
    "active attention without heads": (
        DECI | {"block_configs": [ACTIVE, ACTIVE, {"attention": {}, "ffn": {"no_op": True}}]},
        r"block_configs\[2\].attention has neither",
    ),
    "active FFN without width": (
        DECI | {"block_configs": [ACTIVE, ACTIVE, {"attention": {"no_op": True}, "ffn": {}}]},
        r"block_configs\[2\].ffn has neither",
    ),
    "absurd ffn_mult": (
        DECI | {"block_configs": [ACTIVE, ACTIVE, {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1e9}}]},
        r"block_configs\[2\].ffn: ffn_mult gives an absurd width",
    ),
    "both spellings of a width": (
        DECI | {"block_configs": [ACTIVE | {"ffn": {"ffn_mult": 6.0, "intermediate_size": 512}}] * 3},
        r"block_configs\[0\].ffn: ffn_mult and intermediate_size differ: expected 256, found 512",
    ),
    "both spellings of heads": (
        DECI | {"block_configs": [ACTIVE | {"attention": {"n_heads_in_group": 2, "num_key_value_heads": 4}}] * 3},
        r"block_configs\[0\].attention: n_heads_in_group and num_key_value_heads differ: expected 2, found 4",
    ),
    "no_op and linear": (
        DECI | {"block_configs": [ACTIVE | {"ffn": {"no_op": True, "replace_with_linear": True}}] * 3},
        r"block_configs\[0\].ffn is both",
    ),
    "FFN without gate": (
        DECI | {"block_configs": [ACTIVE | {"ffn": {"ffn_mult": 6.0, "gated": False}}] * 3}, "without a gate"
    ),
    "fuselage for other blocks": (DECI | {"fuselage": {"blocks": []}}, "fuselage.blocks has one entry per layer"),
    "fuselage with a layer twice": (
        DECI | {"fuselage": {"blocks": [{"source_layers": [0], "segments": [[0, 256]]}] * 3}},
        "contradictory config .*a source layer belongs to one block",
    ),
    "fuselage with segments too wide": (
        DECI | {"fuselage": {"blocks": [{"source_layers": [i], "segments": [[i, 257]]} for i in range(3)]}},
        "contradictory config .*segments fit the FFN",
    ),
    **{
        f"block_configs with {key}": (
            DECI | {"block_configs": [{**ACTIVE, part: {**ACTIVE[part], key: {"x": 1}}}] * 3}, f"'{key}' is not supp"
        )
        for part, key in [
            ("attention", "window_length"), ("attention", "num_sink_tokens"), ("attention", "sparsify"),
            ("attention", "mamba"), ("attention", "llama4"), ("ffn", "sparsify"), ("ffn", "moe"),
        ]
    },
    "block_configs with parallel_blocks": (
        DECI | {"block_configs": [ACTIVE | {"parallel_blocks": [ACTIVE]}] * 3}, "'parallel_blocks' is not supported"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS_REFUSED)
def test_configs_that_are_refused(case: str) -> None:
    config, message = CONFIGS_REFUSED[case]
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        graph_from_config(config)


# --- tables


def test_every_architecture_and_model_type_has_one_family() -> None:
    architectures = [name for family in FAMILIES.values() for name in family.architectures]
    model_types = [name for family in FAMILIES.values() for name in family.model_types]
    assert len(set(architectures)) == len(architectures)
    assert len(set(model_types)) == len(model_types)
    for family in FAMILIES.values():
        assert all(family_of([name], None) is family for name in family.architectures)
        assert all(family_of([name], family.model_types[-1]) is family for name in family.architectures)
        assert all(family_of(None, name) is family for name in family.model_types)


@pytest.mark.parametrize("hidden_size", [2048, 3072, 4096, 5120, 5568, 6144, 7104, 8192, 12288, 14528, 16384])
def test_ffn_mult_survives_json_and_rounding_to_six_decimals(hidden_size: int) -> None:
    for width in range(256, 524_288 + 1, 256):
        ffn_mult = ffn_mult_from_width(width, hidden_size)
        for value in (json.loads(json.dumps(ffn_mult)), round(ffn_mult, 6)):
            assert width_from_ffn_mult(value, hidden_size) == width


# --- public models, structure only

LLAMA_31_405B = LLAMA | {
    "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip
LLAMA_33_70B = LLAMA_31_405B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
}  # fmt: skip


def opened(model: str | dict[str, Any], folder: Path) -> ModelGraph:
    if isinstance(model, str):
        return open_model(DATA / f"{model}.structure.json", need_weights=False).graph
    (folder / "config.json").write_text(json.dumps(model))
    return open_model(folder, need_weights=False).graph


# Parameters as the paper and the model cards count them, sequential sublayers from the paper's table.
PUBLIC = {
    "Llama-3.1-405B": (LLAMA_31_405B, 405.9, 252, 126),
    "Llama-3.3-70B": (LLAMA_33_70B, 70.55, 160, 80),
    "Ultra-253B": ("nemotron-ultra-253b", 253.4, 145, 162),
    "Super-49B": ("nemotron-super-49b", 49.87, 129, 80),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_structures(name: str, tmp_path: Path) -> None:
    model, billions, sublayers, blocks = PUBLIC[name]
    graph = opened(model, tmp_path)
    assert graph.num_parameters / 1e9 == pytest.approx(billions, rel=1e-4 * 5)
    assert float(f"{graph.num_parameters / 1e9:.4g}") == billions
    assert graph.sequential_sublayers == sublayers
    assert len(graph.blocks) == blocks
    assert not graph.has_bytes
    assert graph.dtype == BFLOAT16


def test_ultra_253b_in_detail() -> None:
    """81 empty blocks and the four fused FFNs, as the paper has them."""
    graph = open_model(DATA / "nemotron-ultra-253b.structure.json", need_weights=False).graph
    assert sum(block.is_empty for block in graph.blocks) == 81
    widths = [block.ffn.intermediate_size for block in graph.flat_blocks if isinstance(block.ffn, FFN)]
    assert sorted(widths)[-4:] == [301_056, 343_040, 399_360, 425_984]
    assert len(graph.attentions) == 64
    assert {attention.num_key_value_heads for _, attention in graph.attentions} == {8}
    assert graph.kv_bytes_per_token(BFLOAT16) == 64 * 2 * 8 * 128 * 2


STRUCTURES_REFUSED = {
    "not an object": "[]",
    "no blocks": '{"constants": {}}',
    "constants not an object": '{"constants": [], "blocks": []}',
    "blocks not a list": '{"constants": {}, "blocks": {}}',
    "entry too long": '{"constants": {}, "blocks": [[8, 1.0, 2]]}',
    "entry absurd": '{"constants": {}, "blocks": [[8, 1.0], "no_op"]}',
    "unknown word": json.dumps({"constants": DECI, "blocks": [["noop", 1.0]] * 3}),
    "too few": json.dumps({"constants": DECI, "blocks": [["no_op", 1.0]] * 2}),
}


@pytest.mark.parametrize("case", STRUCTURES_REFUSED)
def test_structure_files_that_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.structure.json"
    path.write_text(STRUCTURES_REFUSED[case])
    with pytest.raises(CheckpointError, match=r"x\.structure\.json: "):
        open_model(path, need_weights=False)


def test_weights_are_asked_of_a_structure() -> None:
    with pytest.raises(CheckpointError, match=r"no safetensors weights: expected model\.safetensors"):
        open_model(DATA / "nemotron-super-49b.structure.json", need_weights=True)
