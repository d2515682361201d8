"""Folders as transformers and ModelOpt write them, read into the right structure and the right bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import exporter.safetensors_io as io
from exporter.errors import CheckpointError
from exporter.graph import FFN, Attention, Block, Linear, LinearSublayer, ModelGraph
from exporter.lazy import LazyTensor
from exporter.read import Checkpoint, open_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500000.0,
}  # fmt: skip

# id -> (config class, changes to SIZES, dtype)
SAVED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "float32"),
    "llama bfloat16": ("Llama", {}, "bfloat16"),
    "llama float16": ("Llama", {}, "float16"),
    "llama tied": ("Llama", {"tie_word_embeddings": True}, "float32"),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, "float32"),
    "llama head_dim": ("Llama", {"head_dim": 8}, "float32"),
    "llama rope": ("Llama", {"rope_parameters": LLAMA3}, "float32"),
    "mistral": ("Mistral", {"sliding_window": 32, "head_dim": 32}, "float32"),
    "qwen2": ("Qwen2", {}, "float32"),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "float32"),
    "qwen3": ("Qwen3", {"head_dim": 32}, "bfloat16"),
    "seed-oss": ("SeedOss", {"head_dim": 32}, "bfloat16"),
    "seed-oss, bias on o": ("SeedOss", {"head_dim": 32, "attention_out_bias": True}, "float32"),
    "qwen3 tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, "float32"),
}


def save(folder: Path, family: str, changes: dict[str, Any], dtype: str, shard: str = "1GB") -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():  # no tensor like another, no bias zero
        torch.nn.init.normal_(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)


def to_legacy(folder: Path) -> None:
    """Respell a config as transformers 4 wrote it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in folder.rglob("*.safetensors"):
        state |= load_file(path)
    return state


def named_tensors(graph: ModelGraph) -> dict[str, LazyTensor]:
    """The graph's tensors under the names that transformers gives them; written down here once more, on purpose."""
    found: dict[str, LazyTensor] = {
        "model.embed_tokens.weight": graph.embedding,
        "model.norm.weight": graph.norm.weight,
    }

    def put(name: str, linear: Linear) -> None:
        found[f"{name}.weight"] = linear.weight
        if linear.bias is not None:
            found[f"{name}.bias"] = linear.bias

    if graph.lm_head is not None:
        put("lm_head", graph.lm_head)
    for index, block in enumerate(graph.blocks):
        assert isinstance(block, Block)
        layer = f"model.layers.{index}"
        attention, ffn = block.attention, block.ffn
        if attention is not None:
            found[f"{layer}.input_layernorm.weight"] = attention.norm.weight
        if isinstance(attention, LinearSublayer):
            put(f"{layer}.self_attn.linear_attn", attention.linear)
        if isinstance(attention, Attention):
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                put(f"{layer}.self_attn.{part}", getattr(attention, part))
            for norm in ("q_norm", "k_norm"):
                if getattr(attention, norm) is not None:
                    found[f"{layer}.self_attn.{norm}.weight"] = getattr(attention, norm).weight
        if ffn is not None:
            found[f"{layer}.post_attention_layernorm.weight"] = ffn.norm.weight
        if isinstance(ffn, LinearSublayer):
            put(f"{layer}.mlp.linear_mlp", ffn.linear)
        if isinstance(ffn, FFN):
            for part in ("gate_proj", "up_proj", "down_proj"):
                put(f"{layer}.mlp.{part}", getattr(ffn, part))
    return found


def assert_same_tensors(graph: ModelGraph, state: dict[str, torch.Tensor]) -> None:
    found = named_tensors(graph)
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert found[name].dtype.torch == str(tensor.dtype).removeprefix("torch."), name
        raw = np.ascontiguousarray(found[name].numpy()).reshape(-1).view(np.uint8).tobytes()
        assert raw == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize("style", ["transformers 5", "legacy"])
@pytest.mark.parametrize("case", SAVED)
def test_folders_that_transformers_saved(case: str, style: str, tmp_path: Path) -> None:
    family, changes, dtype = SAVED[case]
    save(tmp_path, family, changes, dtype)
    if style == "legacy":
        to_legacy(tmp_path)
    checkpoint = open_model(tmp_path, need_weights=True)
    graph, config = checkpoint.graph, getattr(transformers, f"{family}Config").from_pretrained(tmp_path)
    assert checkpoint.family.name.replace("-", "") == family.lower()
    assert_same_tensors(graph, state_of(tmp_path))
    assert graph.dtype.name == dtype
    assert graph.has_bytes
    assert (graph.lm_head is None) == bool(changes.get("tie_word_embeddings"))
    assert len(graph.blocks) == 3
    assert graph.norm.eps == config.rms_norm_eps
    assert graph.max_position_embeddings == 256
    assert graph.rope.theta == config.rope_parameters["rope_theta"]
    assert (graph.rope.scaling is not None) == (case == "llama rope")
    for index, block in enumerate(graph.flat_blocks):
        assert isinstance(block.attention, Attention)
        assert isinstance(block.ffn, FFN)
        assert block.attention.head_dim == changes.get("head_dim", 16)
        assert (block.attention.num_attention_heads, block.attention.num_key_value_heads) == (4, 2)
        assert block.attention.norm.eps == block.ffn.norm.eps == config.rms_norm_eps
        window = {"mistral": 32, "qwen2 window": 32 if index >= 1 else None}.get(case)
        assert block.attention.sliding_window == window
    parameters = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    assert graph.num_parameters == parameters


def test_shards_and_assets(tmp_path: Path) -> None:
    save(tmp_path, "Llama", {}, "float32", shard="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for name in ("tokenizer.json", "tekken.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "README.md").write_text("not an asset")
    checkpoint = open_model(tmp_path, need_weights=True)
    assert_same_tensors(checkpoint.graph, state_of(tmp_path))
    assert checkpoint.assets == {
        "tokenizer.json": tmp_path / "tokenizer.json",
        "tekken.json": tmp_path / "tekken.json",
        "generation_config.json": tmp_path / "generation_config.json",
    }


def test_buffers_of_old_transformers_are_known_and_unused(tmp_path: Path) -> None:
    save(tmp_path, "Llama", {}, "float32")
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.arange(8)  # int64: never read
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    graph = open_model(tmp_path, need_weights=True).graph
    assert len(named_tensors(graph)) == len(state) - 2


def test_a_tied_embedding_may_be_repeated(tmp_path: Path) -> None:
    save(tmp_path, "Llama", {"tie_word_embeddings": True}, "float32")
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    graph = open_model(tmp_path, need_weights=True).graph
    assert graph.lm_head is None
    assert np.array_equal(graph.embedding.numpy(), state["model.embed_tokens.weight"].numpy())


def test_a_tied_head_of_its_own_is_refused(tmp_path: Path) -> None:
    """Transformers from 5 on would not tie it, others would."""
    save(tmp_path, "Llama", {"tie_word_embeddings": True}, "float32")
    state = load_file(tmp_path / "model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1e-3
    save_file(state | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    embedding = open_model(tmp_path, need_weights=True).graph.embedding
    embedding.rows(0, 79)
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight: lm_head differs from the embedding.*Set tie_word_embed"
    ):
        embedding.rows(79, 80)
    for other in (head[:-1], head.to(torch.float16)):
        save_file(state | {"lm_head.weight": other.contiguous()}, tmp_path / "model.safetensors")
        with pytest.raises(
            CheckpointError, match=r"lm_head\.weight: a tied lm_head is .*: expected float32 \[80, 64\]"
        ):
            open_model(tmp_path, need_weights=True)


def cut(state: dict[str, torch.Tensor], blocks: list[tuple[int | str, int | str]]) -> dict[str, torch.Tensor]:
    """Make a Llama state heterogeneous: per layer (key-value heads | no_op | linear, width | no_op | linear)."""
    out = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    for layer, (attention, ffn) in enumerate(blocks):
        stem = f"model.layers.{layer}"
        if attention != "no_op":
            out[f"{stem}.input_layernorm.weight"] = state[f"{stem}.input_layernorm.weight"]
        if ffn != "no_op":
            out[f"{stem}.post_attention_layernorm.weight"] = state[f"{stem}.post_attention_layernorm.weight"]
        if attention == "linear":
            out[f"{stem}.self_attn.linear_attn.weight"] = torch.randn(64, 64)
        elif isinstance(attention, int):
            for part in "qkvo":
                tensor = state[f"{stem}.self_attn.{part}_proj.weight"]
                out[f"{stem}.self_attn.{part}_proj.weight"] = (
                    tensor[: attention * 16].clone() if part in "kv" else tensor
                )
        if ffn == "linear":
            out[f"{stem}.mlp.linear_mlp.weight"] = torch.randn(64, 64)
        elif isinstance(ffn, int):
            out[f"{stem}.mlp.gate_proj.weight"] = torch.randn(ffn, 64)
            out[f"{stem}.mlp.up_proj.weight"] = torch.randn(ffn, 64)
            out[f"{stem}.mlp.down_proj.weight"] = torch.randn(64, ffn)
    return out


def assert_blocks(checkpoint: Checkpoint, blocks: list[tuple[int | str, int | str]]) -> None:
    assert len(checkpoint.graph.flat_blocks) == len(blocks)
    for block, (attention, ffn) in zip(checkpoint.graph.flat_blocks, blocks, strict=True):
        found: list[int | str] = []
        for sublayer in (block.attention, block.ffn):
            match sublayer:
                case None:
                    found.append("no_op")
                case LinearSublayer():
                    found.append("linear")
                case Attention():
                    found.append(sublayer.num_key_value_heads)
                case FFN():
                    found.append(sublayer.intermediate_size)
        assert found == [attention, ffn]


def save_decilm(folder: Path, blocks: list[tuple[int | str, int | str]]) -> dict[str, torch.Tensor]:
    """A Nemotron-NAS folder in the layout of the published 49B and 253B models."""
    save(folder, "Llama", {"num_hidden_layers": len(blocks)}, "float32")
    state = cut(load_file(folder / "model.safetensors"), blocks)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    to_legacy(folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "intermediate_size": None,
        "num_key_value_heads": None,
        "block_configs": [
            {
                "attention": {
                    "n_heads_in_group": 4 // attention if isinstance(attention, int) else None,
                    "no_op": attention == "no_op",
                    "num_sink_tokens": None,
                    "replace_with_linear": attention == "linear",
                    "sparsify": None,
                    "unshifted_sink": False,
                    "use_prefill_window_in_sink_attention": False,
                    "window_length": None,
                },
                "ffn": {
                    "ffn_mult": 1.5 * ffn / 64 if isinstance(ffn, int) else None,
                    "no_op": ffn == "no_op",
                    "replace_with_linear": ffn == "linear",
                    "sparsify": None,
                },
            }
            for attention, ffn in blocks
        ],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return state


NAS_BLOCKS: list[tuple[int | str, int | str]] = [
    (2, 256), ("no_op", 512), (1, "no_op"), ("no_op", "no_op"), ("linear", 768), (2, "linear"),
]  # fmt: skip


def test_a_nemotron_nas_folder(tmp_path: Path) -> None:
    state = save_decilm(tmp_path, NAS_BLOCKS)
    checkpoint = open_model(tmp_path, need_weights=True)
    assert checkpoint.family.name == "nemotron-nas"
    assert_blocks(checkpoint, NAS_BLOCKS)
    assert_same_tensors(checkpoint.graph, state)


def save_puzzletron(folder: Path, family: str, blocks: list[tuple[int | str, int | str]]) -> dict[str, torch.Tensor]:
    """A ModelOpt puzzletron ("AnyModel") folder.

    The base family's config with `block_configs` (every field of the dataclasses in block_config.py), one shard per
    sublayer in `subblocks_safetensors/`, named by an index without total_size. Source: NVIDIA/Model-Optimizer,
    modelopt/torch/puzzletron/block_config.py and tools/checkpoint_utils_hf.py.
    """
    save(folder, family, {"num_hidden_layers": len(blocks)}, "float32")
    state = cut(load_file(folder / "model.safetensors"), blocks)
    (folder / "model.safetensors").unlink()
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if layer is None:
            file = "embeddings" if "embed" in name else "lm_head"
        else:
            kind = "attention" if layer[2].startswith(("input_layernorm", "self_attn")) else "ffn"
            file = f"block_{layer[1]}_{kind}"
        files.setdefault(f"subblocks_safetensors/{file}.safetensors", {})[name] = tensor
    (folder / "subblocks_safetensors").mkdir()
    for file, tensors in files.items():
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {"format": "pt"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = json.loads((folder / "config.json").read_text())
    config["block_configs"] = [
        {
            "attention": {
                "no_op": attention == "no_op",
                "replace_with_linear": attention == "linear",
                "sparsify": None,
                "weights_precision": "bf16",
                "num_key_value_heads": attention if isinstance(attention, int) else None,
                "llama4": None,
                "mamba": None,
            },
            "ffn": {
                "no_op": ffn == "no_op",
                "replace_with_linear": ffn == "linear",
                "sparsify": None,
                "weights_precision": "bf16",
                "moe": None,
                "intermediate_size": ffn if isinstance(ffn, int) else None,
            },
            "parallel_blocks": None,
        }
        for attention, ffn in blocks
    ]
    (folder / "config.json").write_text(json.dumps(config))
    return state


# Widths that are no multiple of 256 are normal there.
PUZZLE_BLOCKS: list[tuple[int | str, int | str]] = [(2, 96), (1, 40), ("no_op", 120), (2, "no_op"), ("no_op", "no_op")]


@pytest.mark.parametrize("architectures", [None, ["AnyModel"]], ids=["base family", "AnyModel"])
def test_a_puzzletron_folder(architectures: list[str] | None, tmp_path: Path) -> None:
    state = save_puzzletron(tmp_path, "Llama", PUZZLE_BLOCKS)
    if architectures is not None:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    checkpoint = open_model(tmp_path, need_weights=True)
    assert checkpoint.family.name == "llama"
    assert_blocks(checkpoint, PUZZLE_BLOCKS)
    assert_same_tensors(checkpoint.graph, state)


def test_a_puzzletron_folder_of_another_family(tmp_path: Path) -> None:
    """Qwen3 with its q and k norms on the layers that kept attention."""
    blocks: list[tuple[int | str, int | str]] = [("no_op", 64), (2, 96)]
    save(tmp_path, "Qwen3", {"num_hidden_layers": 2, "head_dim": 16}, "float32")
    full = load_file(tmp_path / "model.safetensors")
    state = cut(full, blocks) | {
        name: full[name] for name in full if ".layers.1." in name and name.endswith("_norm.weight")
    }
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["block_configs"] = [
        {"attention": {"no_op": True}, "ffn": {"intermediate_size": 64}},
        {"attention": {"num_key_value_heads": 2}, "ffn": {"intermediate_size": 96}},
    ]
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_model(tmp_path, need_weights=True)
    assert_blocks(checkpoint, blocks)
    assert_same_tensors(checkpoint.graph, state)


def test_a_config_alone_is_a_structure(tmp_path: Path) -> None:
    save(tmp_path / "whole", "Llama", {}, "bfloat16")
    whole = open_model(tmp_path / "whole", need_weights=True).graph
    (tmp_path / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    for path in (tmp_path, tmp_path / "config.json"):
        structure = open_model(path, need_weights=False).graph
        assert not structure.has_bytes
        assert structure.num_parameters == whole.num_parameters
        assert structure.weight_bytes == whole.weight_bytes
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in named_tensors(structure).items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in named_tensors(whole).items()
        }
        with pytest.raises(CheckpointError, match="no safetensors weights"):
            open_model(path, need_weights=True)


def test_opening_reads_no_tensor_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "Llama", {}, "float32")
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    ends: list[int] = []
    original = io._OpenFile.read_into

    def spy(self: Any, out: memoryview, offset: int, tensor: str | None) -> None:
        if self.path.name == "model.safetensors":
            ends.append(offset + len(out))
        original(self, out, offset, tensor)

    monkeypatch.setattr(io._OpenFile, "read_into", spy)
    graph = open_model(tmp_path, need_weights=True).graph
    assert ends
    assert max(ends) <= header
    graph.norm.weight.numpy()
    assert max(ends) > header
