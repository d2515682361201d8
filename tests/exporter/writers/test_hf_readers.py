"""Every reader rule fires on a graph made for it, and on a clean one none does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.dtypes import FLOAT64
from exporter.errors import TargetError
from exporter.graph import Activation, ModelGraph
from exporter.lazy import cast
from exporter.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from exporter.writers.hf import NEMOTRON_NAS, Options, layout_of
from exporter.writers.hf_readers import PLAIN_RULES, READERS, RULES, SHARED_RULES, Severity, check_for
from tests.tiny import tiny_graph

LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
NORM = tiny_graph("F").norm
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64)


def with_yarn(**keys: Any) -> ModelGraph:
    return tiny_graph("AF F", rope=Rope(theta=1e4, scaling=replace(YARN, **keys)))


CLEAN = {
    "attention dropped": tiny_graph("AF F AF F"),
    "widths": tiny_graph("AF F AF", intermediate_size=[256, 100, 512]),
    "empty blocks": tiny_graph("- AF - F -"),
    "llama3 rope, tied": tiny_graph("AF F", rope=Rope(theta=5e5, scaling=LLAMA3), tied=True),
    "window as wide as the context": tiny_graph("AF F", sliding_window=512),
}
PLAIN = {
    "llama": tiny_graph("AF AF", rope=Rope(theta=1e4, scaling=YARN), qkv_bias=True, o_bias=True, head_dim=32),
    "mistral": tiny_graph("AF AF", sliding_window=512),
    "qwen2": tiny_graph("AF AF", qkv_bias=True),
    "qwen3": tiny_graph("AF AF", qk_norm=True, head_dim=32),
}

R, W = Severity.REJECTS, Severity.WRONG_RESULTS
ALL_SERVERS = ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "mlx-lm")

# rule's problem -> (graph, what is found, reader -> severity)
FIRES: dict[str, tuple[ModelGraph, str, dict[str, Severity]]] = {
    "the first layer has no attention": (tiny_graph("- F AF"), "block 1", {"vllm": R, "llama.cpp": R}),
    "no layer has attention": (
        tiny_graph("F F"), "no block with attention", {"vllm": R, "sglang": R, "llama.cpp": R, "mlx-lm": R},
    ),
    "a layer before the last has attention and no FFN": (
        tiny_graph("AF A - A A F A AF"), "blocks 1, 3-4, 6", {"llama.cpp": W},
    ),
    "the last layer has no FFN": (tiny_graph("AF A -"), "block 1", {"llama.cpp": R}),
    "a linear layer in place of an attention": (tiny_graph("AF LF"), "block 1", {"vllm": R, "sglang": R, "mlx-lm": R}),
    "a linear layer in place of an FFN": (
        tiny_graph("AF AL"), "block 1", {"vllm": R, "sglang": R, "mlx-lm": R, "llama.cpp": R},
    ),
    "RoPE is scaled otherwise than in Llama 3": (
        tiny_graph("AF F", rope=Rope(theta=1e4, scaling=LinearScaling(factor=2.0))), "LinearScaling", {"llama.cpp": W},
    ),
    "YaRN without truncation": (with_yarn(truncate=False), "truncate False", {"mlx-lm": W}),
    "YaRN with an attention factor of its own": (
        with_yarn(attention_factor=1.5),
        "attention_factor 1.5, 1.13863 without it",
        {"vllm": W, "sglang": W, "mlx-lm": W},
    ),
    "YaRN with mscale and mscale_all_dim": (
        with_yarn(mscale=1.0, mscale_all_dim=0.5), "mscale 1, mscale_all_dim 0.5", {"vllm": W},
    ),
    "YaRN with mscale or mscale_all_dim alone": (
        with_yarn(mscale_all_dim=0.5), "mscale_all_dim 0.5 alone", {"mlx-lm": W},
    ),
    "head_dim is not hidden_size / num_attention_heads": (
        tiny_graph("AF F", head_dim=32), "head_dim 32, hidden_size 64, 4 heads", {"mlx-lm": R, "llama.cpp": R},
    ),
    "norms on queries and keys": (
        tiny_graph("AF F AF", qk_norm=True),
        "blocks 0, 2",
        {"vllm": R, "llama.cpp": R, "mlx-lm": R, "sglang": W, "tensorrt-llm": W},
    ),
    "layers differ in their number of key-value heads": (
        tiny_graph("AF F AF", num_key_value_heads=[2, 4]), "num_key_value_heads [2, 4]", {"sglang": R},
    ),
    "attentions have biases": (tiny_graph("AF F", qkv_bias=True), "block 0", {"tensorrt-llm": W}),
    "FFNs have biases": (tiny_graph("AF F", ffn_bias=True), "blocks 0-1", {"tensorrt-llm": W, "sglang": W}),
    "sliding windows": (tiny_graph("AF F", sliding_window=511), "block 0", dict.fromkeys(ALL_SERVERS, W)),
    "the activation is not silu": (
        tiny_graph("AF F", activation=Activation.GELU),
        "hidden_act gelu",
        {"vllm": R, "sglang": R, "tensorrt-llm": W, "llama.cpp": W},
    ),
    "the activation is the tanh form of gelu": (
        tiny_graph("AF F", activation=Activation.GELU_TANH), "hidden_act gelu_pytorch_tanh", {"mlx-lm": R},
    ),
    "weights of several dtypes": (
        replace(tiny_graph("AF F"), norm=replace(NORM, weight=cast(NORM.weight, FLOAT64))),
        "float64 beside float32",
        {"transformers": W},
    ),
    "weights in float64": (tiny_graph("AF F", dtype="float64"), "float64", {"mlx-lm": R}),
}  # fmt: skip
# The same of plain families; with the family.
PLAIN_FIRES: dict[str, tuple[ModelGraph, str, str, dict[str, Severity]]] = {
    "sliding windows": (
        tiny_graph("AF AF", sliding_window=4), "mistral", "blocks 0-1", {"llama.cpp": W, "mlx-lm": W},
    ),
    "the activation is not silu": (
        tiny_graph("AF", activation=Activation.RELU),
        "llama",
        "hidden_act relu",
        {"vllm": R, "sglang": R, "llama.cpp": W, "mlx-lm": W},
    ),
    "attention biases beside norms on queries and keys": (
        tiny_graph("AF", qk_norm=True, qkv_bias=True, o_bias=True), "qwen3", "block 0", {"mlx-lm": R},
    ),
    "head_dim of a Qwen2 is not hidden_size / num_attention_heads": (
        tiny_graph("AF", qkv_bias=True, head_dim=48),
        "qwen2",
        "head_dim 48, hidden_size 64, 4 heads",
        {"mlx-lm": R},
    ),
    "YaRN without truncation": (
        tiny_graph("AF", rope=Rope(theta=1e4, scaling=replace(YARN, truncate=False))),
        "llama",
        "truncate False",
        {"mlx-lm": W},
    ),
}  # fmt: skip
WITH_FILES = "a byte-level tokenizer with another vocabulary than Llama 3's"


def test_every_rule_has_a_case() -> None:
    assert {rule.problem for rule in (*RULES, *SHARED_RULES)} == {*FIRES, WITH_FILES}
    assert {rule.problem for rule in PLAIN_RULES} <= {*PLAIN_FIRES}


@pytest.mark.parametrize("case", FIRES)
def test_rule_fires(case: str) -> None:
    graph, found, severities = FIRES[case]
    problems = [problem for problem in check_for(graph, Options(), READERS) if f": {case}: " in problem.problem]
    assert {problem.reader.name: problem.severity for problem in problems} == severities
    for problem in problems:
        assert problem.found == found
        assert problem.reader.version in str(problem)
        assert problem.hint


@pytest.mark.parametrize("case", PLAIN_FIRES)
def test_rule_fires_in_a_plain_family(case: str) -> None:
    graph, family, found, severities = PLAIN_FIRES[case]
    options = Options(family=family)
    assert layout_of(graph, options) == family
    problems = check_for(graph, options, READERS)
    assert {problem.reader.name: problem.severity for problem in problems} == severities
    assert all(f": {case}: " in problem.problem and problem.found == found for problem in problems)


@pytest.mark.parametrize("case", CLEAN)
def test_clean_graph(case: str) -> None:
    assert layout_of(CLEAN[case], Options()) == NEMOTRON_NAS
    assert check_for(CLEAN[case], Options(), READERS) == []


@pytest.mark.parametrize("family", PLAIN)
def test_plain_families_are_for_everybody(family: str) -> None:
    options = Options(family=family)
    assert layout_of(PLAIN[family], options) == family
    assert check_for(PLAIN[family], options, READERS) == []


@pytest.mark.parametrize(
    ("tokenizer", "files", "vocab_size", "fires"),
    [
        ({"decoder": {"type": "ByteLevel"}}, ["tokenizer.json"], 320, True),
        ({"decoder": None}, ["tokenizer.json"], 320, True),
        ({"decoder": {"type": "Sequence"}}, ["tokenizer.json"], 320, False),
        ({"decoder": {"type": "ByteLevel"}}, ["tokenizer.json", "tokenizer.model"], 320, False),
        ({"decoder": {"type": "ByteLevel"}}, [], 320, False),
        ({"decoder": {"type": "ByteLevel"}}, ["tokenizer.json"], 128256, False),
    ],
)
def test_tokenizer_rule(tokenizer: dict, files: list[str], vocab_size: int, fires: bool, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = Options(assets={name: tmp_path / name for name in files})
    problems = check_for(tiny_graph("AF F", vocab_size=vocab_size), options, READERS)
    assert [problem.reader.name for problem in problems] == (["llama.cpp"] if fires else [])
    assert all(f": {WITH_FILES}: " in problem.problem for problem in problems)


@pytest.mark.parametrize("keys", [{}, {"attention_factor": 0.1 * math.log(4) + 1}, {"mscale": 1.0}])
def test_yarn_that_everybody_computes_alike(keys: dict) -> None:
    assert {problem.reader.name for problem in check_for(with_yarn(**keys), Options(), READERS)} == {"llama.cpp"}


def test_only_the_readers_asked_for() -> None:
    graph = tiny_graph("F AF", sliding_window=4)
    names = [problem.reader.name for problem in check_for(graph, Options(), ["llama.cpp", "vllm", "vllm"])]
    assert names == ["llama.cpp", "llama.cpp", "vllm", "vllm"]
    assert check_for(graph, Options(), []) == []


def test_unknown_reader() -> None:
    with pytest.raises(TargetError, match=r"unknown reader: expected transformers, vllm, .*, found ollama"):
        check_for(tiny_graph("AF"), Options(), ["vllm", "ollama"])
