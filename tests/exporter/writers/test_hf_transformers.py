"""Exported folders, loaded by transformers, against the reference and against a plain forward pass written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from exporter.graph import FFN, Activation, Attention, Block, ModelGraph
from exporter.lazy import LazyTensor
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.reference import Reference
from exporter.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from exporter.writers.files import save_folder
from exporter.writers.hf import NEMOTRON_NAS, Options, emit, layout_of
from tests.tiny import tiny_graph, with_windows

TOLERANCE = 1e-4
LLAMA3 = Rope(
    theta=500000.0,
    scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
)
LINEAR = Rope(theta=10000.0, scaling=LinearScaling(factor=2.0))
YARN = Rope(theta=10000.0, scaling=YarnScaling(factor=4.0, original_max_position_embeddings=64))
YARN_EXTRAS = Rope(
    theta=10000.0,
    scaling=YarnScaling(
        factor=4.0, original_max_position_embeddings=64, beta_fast=24.0, attention_factor=1.3, truncate=False
    ),
)


# id -> (graph, source family, layout)
CASES: dict[str, tuple[ModelGraph, str, str]] = {
    "llama": (tiny_graph("AF AF AF"), "llama", "llama"),
    "llama, all biases": (tiny_graph("AF AF", qkv_bias=True, o_bias=True, ffn_bias=True), "llama", "llama"),
    "llama, tied": (tiny_graph("AF AF", tied=True), "llama", "llama"),
    "llama, yarn": (tiny_graph("AF AF", rope=YARN), "llama", "llama"),
    "llama, width no multiple of 256": (tiny_graph("AF AF", intermediate_size=100), "llama", "llama"),
    "mistral, window": (tiny_graph("AF AF", sliding_window=5), "mistral", "mistral"),
    "qwen2": (tiny_graph("AF AF", qkv_bias=True), "qwen2", "qwen2"),
    "qwen2, upper window": (with_windows(tiny_graph("AF AF AF", qkv_bias=True), None, None, 6), "qwen2", "qwen2"),
    "qwen3": (tiny_graph("AF AF", qk_norm=True, head_dim=32), "qwen3", "qwen3"),
    "seed-oss": (tiny_graph("AF AF", qkv_bias=True, head_dim=32), "seed-oss", "seed-oss"),
    "seed-oss, all biases": (
        tiny_graph("AF AF", qkv_bias=True, o_bias=True, ffn_bias=True), "seed-oss", "seed-oss"
    ),
    "attention dropped": (tiny_graph("AF F F AF"), "llama", NEMOTRON_NAS),
    "attention dropped, first block": (tiny_graph("F AF"), "llama", NEMOTRON_NAS),
    "fused": (fuse_ffn(tiny_graph("AF F F F AF"), [(2, 3)]), "llama", NEMOTRON_NAS),
    "empty blocks": (tiny_graph("- AF - F - AF -"), "llama", NEMOTRON_NAS),
    "FFN dropped": (tiny_graph("AF A AF A"), "llama", NEMOTRON_NAS),
    "no attention": (tiny_graph("F F"), "llama", NEMOTRON_NAS),
    "no attention, odd hidden_size": (tiny_graph("F F", hidden_size=33), "llama", NEMOTRON_NAS),
    "kv heads and widths": (
        tiny_graph("AF AF F AF", num_key_value_heads=[4, 1, 2], intermediate_size=[512, 300, 8, 256]),
        "llama",
        NEMOTRON_NAS,
    ),
    "head_dim": (tiny_graph("AF F AF", head_dim=32), "llama", NEMOTRON_NAS),
    "gelu": (tiny_graph("AF F", activation=Activation.GELU_TANH), "llama", NEMOTRON_NAS),
    "qwen2, dropped": (tiny_graph("AF F AF", qkv_bias=True), "qwen2", NEMOTRON_NAS),
    "qwen3, dropped": (tiny_graph("AF F AF", qk_norm=True, head_dim=32), "qwen3", NEMOTRON_NAS),
    "seed-oss, dropped": (tiny_graph("AF F AF", qkv_bias=True, head_dim=32), "seed-oss", NEMOTRON_NAS),
    "mistral, window, dropped": (tiny_graph("AF F AF", sliding_window=5), "mistral", NEMOTRON_NAS),
    "several windows": (with_windows(tiny_graph("AF AF AF"), 4, None, 7), "llama", NEMOTRON_NAS),
    "FFN bias, padded": (tiny_graph("AF F", ffn_bias=True, intermediate_size=300), "llama", NEMOTRON_NAS),
    "tied, dropped": (tiny_graph("AF F", tied=True), "llama", NEMOTRON_NAS),
    "linear rope, dropped": (tiny_graph("AF F AF", rope=LINEAR), "llama", NEMOTRON_NAS),
    "llama3 rope, dropped": (tiny_graph("AF F AF", rope=LLAMA3), "llama", NEMOTRON_NAS),
    "yarn rope, dropped": (tiny_graph("AF F AF", rope=YARN), "llama", NEMOTRON_NAS),
    "yarn rope with extras, dropped": (tiny_graph("AF F AF", rope=YARN_EXTRAS), "llama", NEMOTRON_NAS),
    "linear replacements": (tiny_graph("AF LF AL AF"), "llama", NEMOTRON_NAS),
}  # fmt: skip


def exported(graph: ModelGraph, family: str, folder: Path, **options: Any) -> Path:
    save_folder(folder, emit(graph, Options(family=family, **options)), kind="checkpoint", details={})
    return folder


def loaded(folder: Path, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, **options
    )
    return model.eval()


def tokens(batch: int = 2, length: int = 40, vocab_size: int = 320) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).integers(3, vocab_size, (batch, length)))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max())


# --- a forward pass that shares nothing with exporter.reference or the modeling code but the graph


def forward(graph: ModelGraph, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] in float64, without a cache."""

    def value(tensor: LazyTensor | None) -> torch.Tensor | float:
        return 0.0 if tensor is None else torch.from_numpy(tensor.numpy().astype(np.float64))

    def apply(linear: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ value(linear.weight).T + value(linear.bias)

    def norm(part: Any, x: torch.Tensor) -> torch.Tensor:
        return value(part.weight) * x / (x.pow(2).mean(-1, keepdim=True) + part.eps).sqrt()

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [B, H, S, d], as complex numbers
        half = x.shape[-1] // 2
        angles = torch.arange(length).double()[:, None] * torch.from_numpy(
            graph.rope.inverse_frequencies(2 * half).astype(np.float64)
        )
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return graph.rope.attention_factor * torch.cat([turned.real, turned.imag], -1)

    def attention(part: Attention, x: torch.Tensor) -> torch.Tensor:
        def heads(linear: Any, head_norm: Any) -> torch.Tensor:
            split = apply(linear, x).unflatten(-1, (-1, part.head_dim))
            return (split if head_norm is None else norm(head_norm, split)).transpose(1, 2)

        q, k = rotate(heads(part.q_proj, part.q_norm)), rotate(heads(part.k_proj, part.k_norm))
        groups = part.num_attention_heads // part.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), heads(part.v_proj, None).repeat_interleave(groups, 1)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        visible = (distance >= 0) & (distance < (part.sliding_window or length))
        scores = (q @ k.transpose(2, 3) / part.head_dim**0.5).masked_fill(~visible, -torch.inf)
        return apply(part.o_proj, (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def ffn(part: FFN, x: torch.Tensor) -> torch.Tensor:
        act = transformers.activations.ACT2FN[part.activation.value]
        return apply(part.down_proj, act(apply(part.gate_proj, x)) * apply(part.up_proj, x))

    length = input_ids.shape[1]
    x = value(graph.embedding)[input_ids]
    for block in graph.blocks:
        assert isinstance(block, Block)
        for part in (block.attention, block.ffn):
            if part is None:
                continue
            kind = {Attention: attention, FFN: ffn}.get(type(part), lambda part, z: apply(part.linear, z))
            x = x + kind(part, norm(part.norm, x))
    head = value(graph.embedding if graph.lm_head is None else graph.lm_head.weight)
    return norm(graph.norm, x) @ head.T


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    graph, family, layout = CASES[case]
    assert layout_of(graph, Options(family=family)) == layout
    model = loaded(exported(graph, family, tmp_path / "model"))
    input_ids = tokens()
    expected = forward(graph, input_ids)
    with torch.no_grad():
        found = model(input_ids, use_cache=False).logits
        cache = None
        steps = []
        for start, stop in [(0, 30), *((i, i + 1) for i in range(30, 40))]:
            output = model(input_ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert difference(found, expected) <= TOLERANCE
    assert difference(torch.cat(steps, 1), expected) <= TOLERANCE
    assert difference(Reference(graph).logits(input_ids), expected) <= TOLERANCE


def greedy(graph: ModelGraph, input_ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        input_ids = torch.cat([input_ids, forward(graph, input_ids)[:, -1:].argmax(-1)], 1)
    return input_ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", ["fused", "several windows", "qwen3, dropped", "attention dropped, first block"])
def test_generate_with_padding(case: str, cache: str, tmp_path: Path) -> None:
    """A left-padded row generates what it generates alone."""
    graph, family, _ = CASES[case]
    model = loaded(exported(graph, family, tmp_path / "model"))
    long, short = tokens(1, 12), tokens(1, 7)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], 1)
    found = model.generate(
        torch.cat([long, padded]),
        attention_mask=torch.cat([torch.ones_like(long), (padded > 0).long()]),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
    )
    assert found[:1].tolist() == greedy(graph, long, 5).tolist()
    assert found[1:, 5:].tolist() == greedy(graph, short, 5).tolist()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["fused", "several windows", "yarn rope with extras, dropped"])
def test_attention_implementations(case: str, implementation: str, tmp_path: Path) -> None:
    graph, family, _ = CASES[case]
    model = loaded(exported(graph, family, tmp_path / "model"), attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        assert difference(model(tokens()).logits, forward(graph, tokens())) <= TOLERANCE
    other = {"eager": "sdpa", "sdpa": "eager"}[implementation]
    model.set_attn_implementation(other)
    assert model.config._attn_implementation == other


def test_two_sequences_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By positions that start again: in the mask, and in what flash attention, which has none, goes by."""
    graph, family, _ = CASES["several windows"]
    model = loaded(exported(graph, family, tmp_path / "model"), attn_implementation="sdpa")
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    attend, given = functions["sdpa"], []

    def observed(*arguments: Any, **keywords: Any) -> Any:
        given.append(keywords)
        return attend(*arguments, **keywords)

    monkeypatch.setitem(functions, "sdpa", observed)
    lengths = (25, 15)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        found = model(tokens(1), position_ids=positions, use_cache=False, max_length_q=25).logits
    expected = [forward(graph, part) for part in tokens(1).split(lengths, 1)]
    assert difference(found, torch.cat(expected, 1)) <= TOLERANCE
    assert len(given) == len(graph.attentions)
    assert all(torch.equal(one["position_ids"], positions) and one["max_length_q"] == 25 for one in given)


@pytest.mark.parametrize("case", ["fused", "tied, dropped", "linear replacements", "llama3 rope, dropped"])
def test_saved_again(case: str, tmp_path: Path) -> None:
    """`save_pretrained`, then loading what it wrote."""
    graph, family, _ = CASES[case]
    model = loaded(exported(graph, family, tmp_path / "model"))
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert difference(loaded(tmp_path / "again")(tokens()).logits, forward(graph, tokens())) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_training_and_hidden_states(tmp_path: Path) -> None:
    graph, family, _ = CASES["fused"]
    model = loaded(exported(graph, family, tmp_path / "model"))
    model.gradient_checkpointing_enable()
    model.train()
    output = model(tokens(), labels=tokens(), output_hidden_states=True)
    output.loss.backward()
    logits = forward(graph, tokens())[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens()[:, 1:].flatten())
    assert difference(output.loss.detach(), expected) <= TOLERANCE
    part = model(tokens(), labels=tokens(), num_items_in_batch=1000).loss  # a step of several batches, in `Trainer`
    assert difference(part.detach(), expected * len(logits) / 1000) <= TOLERANCE
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(output.hidden_states) == len(graph.blocks) + 1
    assert model(tokens(), logits_to_keep=1, return_dict=False)[0].shape == (2, 1, 320)


def test_bfloat16_and_shards(tmp_path: Path) -> None:
    """The dtype of config.json counts, and an index leads to every shard."""
    graph = tiny_graph("AF F AF", dtype="bfloat16")
    folder = exported(graph, "llama", tmp_path / "model", shard_bytes=60_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert difference(loaded(folder)(tokens()).logits, forward(graph, tokens())) <= TOLERANCE
