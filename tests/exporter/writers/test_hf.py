"""What the Hugging Face writer puts into a folder, that our reader gets it back, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.dtypes import INT8
from exporter.errors import CheckpointError, TargetError
from exporter.graph import Activation, Block, Linear, LinearSublayer, ModelGraph, structure
from exporter.lazy import LazyTensor, full, shape_only
from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.read import open_model
from exporter.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from exporter.writers.files import save_folder, sizes_of
from exporter.writers.hf import NEMOTRON_NAS, Options, as_written, check, config_of, emit, layout_of
from tests.tiny import tiny_graph, with_windows

YARN = YarnScaling(
    factor=4.0, original_max_position_embeddings=64, attention_factor=1.3, beta_fast=24.0, truncate=False
)
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def with_part(graph: ModelGraph, index: int, kind: str, **changes: Any) -> ModelGraph:
    """The graph with fields of one sublayer changed."""
    blocks = list(graph.flat_blocks)
    blocks[index] = replace(blocks[index], **{kind: replace(getattr(blocks[index], kind), **changes)})
    return replace(graph, blocks=tuple(blocks))


def renumbered(graph: ModelGraph) -> ModelGraph:
    """The graph as if its source layers were 10, 11, ..."""
    blocks = []
    for block in graph.flat_blocks:
        ffn = block.ffn
        if ffn is not None and not isinstance(ffn, LinearSublayer):
            ffn = replace(ffn, segments=tuple(replace(s, source_layer=s.source_layer + 10) for s in ffn.segments))
        blocks.append(replace(block, ffn=ffn, source_layers=tuple(layer + 10 for layer in block.source_layers)))
    return replace(graph, blocks=tuple(blocks))


# id -> (graph, source family, layout)
ROUND_TRIPS: dict[str, tuple[ModelGraph, str, str]] = {
    "llama": (tiny_graph("AF AF"), "llama", "llama"),
    "llama from a uniform Nemotron-NAS folder": (tiny_graph("AF AF"), "nemotron-nas", "llama"),
    "llama with biases": (tiny_graph("AF", qkv_bias=True, o_bias=True, ffn_bias=True), "llama", "llama"),
    "llama, any width": (tiny_graph("AF", intermediate_size=100, head_dim=8), "llama", "llama"),
    "mistral": (tiny_graph("AF AF", sliding_window=9), "mistral", "mistral"),
    "mistral without window": (tiny_graph("AF AF"), "mistral", "mistral"),
    "qwen2": (tiny_graph("AF AF", qkv_bias=True, tied=True), "qwen2", "qwen2"),
    "qwen2, upper window": (with_windows(tiny_graph("AF AF AF", qkv_bias=True), None, 9, 9), "qwen2", "qwen2"),
    "qwen2, lower window": (with_windows(tiny_graph("AF AF AF", qkv_bias=True), 9, None, 9), "qwen2", "qwen2"),
    "qwen3": (tiny_graph("AF AF", qk_norm=True, head_dim=32), "qwen3", "qwen3"),
    "qwen3 with biases": (tiny_graph("AF AF", qk_norm=True, qkv_bias=True, o_bias=True), "qwen3", "qwen3"),
    "seed-oss": (tiny_graph("AF AF", qkv_bias=True, ffn_bias=True, head_dim=32), "seed-oss", "seed-oss"),
    "seed-oss with windows": (tiny_graph("AF AF", qkv_bias=True, sliding_window=9), "seed-oss", "qwen2"),
    "phi-3 with windows": (tiny_graph("AF AF", sliding_window=9), "phi3", "mistral"),
    "windows no plain family has": (with_windows(tiny_graph("AF AF AF"), 9, None, 4), "mistral", NEMOTRON_NAS),
    "windows in llama": (tiny_graph("AF AF", sliding_window=9), "llama", "mistral"),
    "norms of heads in llama": (tiny_graph("AF AF", qk_norm=True), "llama", "qwen3"),
    "biases of the FFN and windows": (tiny_graph("AF", ffn_bias=True, sliding_window=9), "phi3", NEMOTRON_NAS),
    "other source layers": (renumbered(tiny_graph("AF AF")), "llama", NEMOTRON_NAS),
    "different widths": (tiny_graph("AF AF", intermediate_size=[256, 512]), "llama", NEMOTRON_NAS),
    "different kv heads": (tiny_graph("AF AF", num_key_value_heads=[4, 1]), "llama", NEMOTRON_NAS),
    "padded to 256": (tiny_graph("AF F", intermediate_size=[300, 100], ffn_bias=True), "llama", NEMOTRON_NAS),
    "fused": (fuse_ffn(drop_attention(tiny_graph("AF AF AF AF AF"), [1, 2, 3]), [(1, 2)]), "llama", NEMOTRON_NAS),
    "fused, padded": (fuse_ffn(tiny_graph("AF F F", intermediate_size=100), [(1, 2)]), "llama", NEMOTRON_NAS),
    "empty blocks": (tiny_graph("- AF - F -"), "llama", NEMOTRON_NAS),
    "no attention": (tiny_graph("F F"), "llama", NEMOTRON_NAS),
    "no FFN": (tiny_graph("A A"), "llama", NEMOTRON_NAS),
    "linear replacements": (tiny_graph("AF LF AL LL"), "llama", NEMOTRON_NAS),
    "qwen2, dropped": (tiny_graph("AF F AF", qkv_bias=True, tied=True), "qwen2", NEMOTRON_NAS),
    "qwen3, dropped": (tiny_graph("AF F AF", qk_norm=True, head_dim=32), "qwen3", NEMOTRON_NAS),
    "gelu": (tiny_graph("AF F", activation=Activation.GELU), "llama", NEMOTRON_NAS),
    "bfloat16": (tiny_graph("AF F", dtype="bfloat16", eps=1e-6), "llama", NEMOTRON_NAS),
    "float16": (tiny_graph("AF", dtype="float16"), "llama", "llama"),
    "float64": (tiny_graph("AF F", dtype="float64"), "llama", NEMOTRON_NAS),
    "linear rope": (tiny_graph("AF", rope=Rope(theta=1e6, scaling=LinearScaling(factor=2.0))), "llama", "llama"),
    "llama3 rope": (tiny_graph("AF F", rope=Rope(theta=5e5, scaling=LLAMA3)), "llama", NEMOTRON_NAS),
    "yarn rope": (tiny_graph("AF F", rope=Rope(theta=1e4, scaling=YARN)), "llama", NEMOTRON_NAS),
}  # fmt: skip


def differences(found: Any, expected: Any, path: str = "graph") -> Iterator[str]:
    """Every place where two graphs are not the same, values of tensors included."""
    if isinstance(expected, LazyTensor):
        same = found.dtype == expected.dtype and found.shape == expected.shape
        if not same or not np.array_equal(found.numpy(), expected.numpy()):
            yield path
    elif isinstance(expected, tuple) and isinstance(found, tuple) and len(found) == len(expected):
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif is_dataclass(expected) and type(found) is type(expected):
        for entry in fields(expected):
            yield from differences(getattr(found, entry.name), getattr(expected, entry.name), f"{path}.{entry.name}")
    elif found != expected:
        yield f"{path}: {found} != {expected}"


def saved(graph: ModelGraph, folder: Path, **options: Any) -> Path:
    save_folder(folder, emit(graph, Options(**options)), kind="checkpoint", details={})
    return folder


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_round_trip(case: str, tmp_path: Path) -> None:
    graph, family, layout = ROUND_TRIPS[case]
    options = Options(family=family)
    assert check(graph, options) == []
    assert layout_of(graph, options) == layout
    checkpoint = open_model(saved(graph, tmp_path / "model", family=family), need_weights=True)
    expected = graph if layout != NEMOTRON_NAS else as_written(graph)
    assert checkpoint.family.name == layout
    assert list(differences(checkpoint.graph, expected)) == []
    assert structure(checkpoint.graph) == structure(expected)
    # Writing what was read changes nothing any more.
    again = saved(checkpoint.graph, tmp_path / "again", family=checkpoint.family.name, config=checkpoint.config)
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


@pytest.mark.parametrize("case", ["fused", "qwen3, dropped", "linear replacements", "different kv heads", "yarn rope"])
def test_rewriting_changes_only_what_it_must(case: str) -> None:
    graph, _, _ = ROUND_TRIPS[case]
    assert list(differences(as_written(graph), graph)) == []


def test_padding_and_segments() -> None:
    graph = as_written(tiny_graph("AF F", intermediate_size=[300, 256], ffn_bias=True))
    ffn = graph.flat_blocks[0].ffn
    assert [s.width for s in ffn.segments] == [300]
    assert (ffn.intermediate_size, ffn.padding) == (512, 212)
    assert not ffn.gate_proj.weight.numpy()[300:].any()
    assert not ffn.up_proj.bias.numpy()[300:].any()
    assert not ffn.down_proj.weight.numpy()[:, 300:].any()


ATTENTION_KEYS = {
    "n_heads_in_group", "no_op", "replace_with_linear", "sparsify", "window_length", "num_sink_tokens",
    "unshifted_sink", "use_prefill_window_in_sink_attention",
}  # fmt: skip
FFN_KEYS = {"ffn_mult", "no_op", "replace_with_linear", "sparsify"}


@pytest.mark.parametrize("case", [case for case, (_, _, layout) in ROUND_TRIPS.items() if layout == NEMOTRON_NAS])
def test_config_keys(case: str) -> None:
    """The key sets of the published configs; readers look up every one of them, and mlx-lm takes no other."""
    graph, family, _ = ROUND_TRIPS[case]
    config = json.loads(json.dumps(config_of(graph, Options(family=family))))
    assert set(config) == {
        "architectures", "model_type", "auto_map", "torch_dtype", "vocab_size", "hidden_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps",
        "max_position_embeddings", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias", "tie_word_embeddings",
        "block_configs", "fuselage",
    }  # fmt: skip
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (None, None)
    assert isinstance(config["head_dim"], int)
    assert isinstance(config["rope_theta"], float)
    assert len(config["block_configs"]) == config["num_hidden_layers"] == len(config["fuselage"]["blocks"])
    for entry in config["block_configs"]:
        assert set(entry) == {"attention", "ffn"}
        attention, ffn = entry["attention"], entry["ffn"]
        assert (set(attention), set(ffn)) == (ATTENTION_KEYS, FFN_KEYS)
        assert not (attention["no_op"] and ffn["no_op"])  # a dead layer is left out
        attends = not attention["no_op"] and not attention["replace_with_linear"]
        assert isinstance(attention["n_heads_in_group"], int if attends else type(None))
        computes = not ffn["no_op"] and not ffn["replace_with_linear"]
        assert isinstance(ffn["ffn_mult"], float if computes else type(None))


def test_first_ffn_mult_stays_a_float_in_json(tmp_path: Path) -> None:
    """llama.cpp asserts that it is one: `6.0`, not `6`."""
    folder = saved(tiny_graph("AF F", intermediate_size=256), tmp_path / "model")
    assert '"ffn_mult": 6.0' in (folder / "config.json").read_text()


def test_taken_over_from_the_source(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    source = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None, "hidden_size": 7, "quirk": True}
    options = Options(config=source, assets={"tokenizer.json": tokenizer})
    config = config_of(tiny_graph("AF F"), options)
    assert {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None,
    }  # fmt: skip
    assert config["hidden_size"] == 64
    assert "quirk" not in config
    files = sizes_of(emit(tiny_graph("AF F"), options))
    assert set(files) == {
        "config.json", "configuration_decilm.py", "modeling_decilm.py", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert set(sizes_of(emit(tiny_graph("AF"), options))) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_plan_and_files_agree(tmp_path: Path) -> None:
    graph, options = tiny_graph("AF F AF"), {"shard_bytes": 100_000}
    folder = saved(graph, tmp_path / "model", **options)
    planned = sizes_of(emit(graph, Options(**options)))
    assert len([name for name in planned if name.startswith("model-")]) > 2
    assert planned == {name: (folder / name).stat().st_size for name in planned}
    assert {path.name for path in folder.iterdir()} == {*planned, "fuselage.manifest.json"}
    assert list(differences(open_model(folder, need_weights=True).graph, graph)) == []


def test_structure_without_weights_can_be_planned() -> None:
    graph = tiny_graph("AF F")
    blocks = tuple(_without_bytes(block) for block in graph.flat_blocks)
    assert sizes_of(emit(replace(graph, blocks=blocks), Options())) == sizes_of(emit(graph, Options()))


def _without_bytes(part: Any) -> Any:
    if isinstance(part, LazyTensor):
        return shape_only(part.shape, part.dtype)
    if not is_dataclass(part):
        return part
    return replace(part, **{entry.name: _without_bytes(getattr(part, entry.name)) for entry in fields(part)})


def test_tensor_order_is_that_of_the_forward_pass() -> None:
    names = list(next(c for n, c in emit(tiny_graph("AF LF"), Options()) if n == "model.safetensors").offsets)
    assert names == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        *(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"),
        "model.layers.0.post_attention_layernorm.weight",
        *(f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.linear_attn.weight",
        "model.layers.1.post_attention_layernorm.weight",
        *(f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
        "model.norm.weight",
        "lm_head.weight",
    ]


BIASED = Linear(weight=full((64, 64), 0.0, tiny_graph("F").dtype), bias=full((64,), 0.0, tiny_graph("F").dtype))
OTHER_EPS = replace(tiny_graph("AF").norm, eps=1e-6)
HALF_NORMED = tiny_graph("AF AF AF", qk_norm=True)


# id -> (graph, [(block, part of the message)])
REFUSED: dict[str, tuple[ModelGraph, list[tuple[int | None, str]]]] = {
    "parallel blocks": (
        tiny_graph("AF (AF AF) AF (AF AF)"),
        [(1, "parallel blocks cannot be expressed"), (3, "source layers [4, 5] side by side")],
    ),
    "only empty blocks": (tiny_graph("- -"), [(None, "no layer to write")]),
    "activations": (
        with_part(tiny_graph("AF F AF"), 1, "ffn", activation=Activation.RELU),
        [(1, "one hidden_act: expected silu as elsewhere, found relu")],
    ),
    "eps": (
        with_part(tiny_graph("AF F AF"), 2, "ffn", norm=OTHER_EPS),
        [(2, "one rms_norm_eps: expected 1e-05 as elsewhere, found 1e-06")],
    ),
    "eps of the final norm": (
        replace(tiny_graph("AF F"), norm=OTHER_EPS),
        [(None, "one rms_norm_eps: expected 1e-05 as elsewhere, found 1e-06 (of the final norm)")],
    ),
    "head counts": (
        replace(
            tiny_graph("AF AF AF"),
            blocks=(
                *tiny_graph("AF AF").blocks,
                replace(tiny_graph("AF AF AF", num_attention_heads=8, head_dim=16).flat_blocks[2]),
            ),
        ),
        [(2, "one num_attention_heads: expected 4 as elsewhere, found 8")],
    ),
    "some q/k norms": (
        with_part(HALF_NORMED, 1, "attention", q_norm=None, k_norm=None),
        [(1, "one kind of q/k norm: expected q_norm and k_norm as elsewhere, found none")],
    ),
    "half a q/k norm": (
        with_part(HALF_NORMED, 1, "attention", k_norm=None),
        [(1, "one kind of q/k norm"), (1, "a q norm and a k norm come together")],
    ),
    "bias of a linear replacement": (
        with_part(tiny_graph("AF AL"), 1, "ffn", linear=BIASED),
        [(1, "has no bias in this format")],
    ),
    "bias of lm_head": (
        replace(
            tiny_graph("AF", vocab_size=64),
            lm_head=BIASED,
        ),
        [(None, "lm_head has no bias")],
    ),
    "codes without scales": (
        with_part(tiny_graph("AF F"), 1, "ffn", up_proj=Linear(weight=full((256, 64), 1, INT8))),
        [(1, "need a quantized format: expected a float of 16+ bits, found int8")],
    ),
    "several at once": (
        with_part(with_part(tiny_graph("F F F F"), 1, "ffn", norm=OTHER_EPS), 3, "ffn", activation=Activation.GELU),
        [(3, "one hidden_act"), (1, "one rms_norm_eps")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_block(case: str) -> None:
    graph, expected = REFUSED[case]
    problems = check(graph, Options())
    assert [problem.block for problem in problems] == [block for block, _ in expected]
    for problem, (_, text) in zip(problems, expected, strict=True):
        assert isinstance(problem, TargetError)
        assert text in str(problem)
    with pytest.raises(TargetError):
        emit(graph, Options())


def test_source_layers_of_empty_blocks_are_in_no_block() -> None:
    written = as_written(tiny_graph("- AF - F -"))
    assert [block.source_layers for block in written.blocks] == [(1,), (3,)]
    assert all(isinstance(block, Block) for block in written.blocks)


def test_altered_fuselage_key_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny_graph("AF F"), tmp_path / "model")
    (folder / "fuselage.manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["fuselage"]["blocks"].pop()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"fuselage\.blocks has one entry per layer"):
        open_model(folder, need_weights=True)
