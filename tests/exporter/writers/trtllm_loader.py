"""Loading a checkpoint folder the way TensorRT-LLM 1.1 does, written from its documented contract and its sources.

Nothing of the writer is used here: `expected_tensors` says from config.json which names, shapes and dtypes every rank
must have, `assembled` puts the ranks' files together to whole matrices (and insists that what several ranks hold is the
same), `logits` runs those in float32.

D = hidden_size, hs = head_size, Hq, kv = heads of the model and key-value heads of a layer.
"""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

FP8, INT8, F32 = torch.float8_e4m3fn, torch.int8, torch.float32
CONFIG_KEYS = {
    "producer", "architecture", "dtype", "logits_dtype", "vocab_size", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_size", "intermediate_size", "hidden_act", "norm_epsilon",
    "max_position_embeddings", "position_embedding_type", "rotary_base", "rotary_scaling", "use_parallel_embedding",
    "embedding_sharding_dim", "mapping", "quantization", "layer_configs", "fuselage",
}  # fmt: skip
QUANT_CONFIG_KEYS = {  # any other is a TypeError
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe",
    "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
DEFAULT_EXCLUDED = ["*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding"]

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class Loaded:
    config: dict[str, Any]
    ranks: list[dict[str, torch.Tensor]]


def load(folder: Path) -> Loaded:
    """Read config.json and rank{r}.safetensors; every tensor that the model has must be there, and no other."""
    config = json.loads((folder / "config.json").read_text())
    check_config(config)
    world_size = config["mapping"]["world_size"]
    ranks = [load_file(folder / f"rank{rank}.safetensors") for rank in range(world_size)]
    assert not (folder / f"rank{world_size}.safetensors").exists()
    for rank, tensors in enumerate(ranks):
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        assert found == expected_tensors(config, rank), f"rank {rank}"
    return Loaded(config, ranks)


def check_config(config: dict[str, Any]) -> None:
    assert set(config) == CONFIG_KEYS
    assert config["architecture"] == "DeciLMForCausalLM"  # or the class of the config would not be found
    assert config["hidden_act"] == "silu"
    assert config["logits_dtype"] == "float32"
    mapping = config["mapping"]
    assert mapping["world_size"] == mapping["tp_size"] * mapping["pp_size"]
    assert set(config["quantization"]) <= QUANT_CONFIG_KEYS
    assert len(config["layer_configs"]) == config["num_hidden_layers"]
    for layer in config["layer_configs"]:
        assert set(layer) == {"attention", "ffn"}
        assert set(layer["attention"]) == {"impl", "num_key_value_heads"}
        assert set(layer["ffn"]) == {"impl", "intermediate_size"}


def stage_layers(config: dict[str, Any], rank: int) -> list[int]:
    """Global numbers of a rank's layers: `Mapping.pp_layers`."""
    pp_size = config["mapping"]["pp_size"]
    split = torch.tensor_split(torch.arange(config["num_hidden_layers"]), pp_size)
    return split[rank // config["mapping"]["tp_size"]].tolist()


def is_excluded(config: dict[str, Any], module: str) -> bool:
    excluded = config["quantization"].get("exclude_modules")
    if excluded is None:
        excluded = DEFAULT_EXCLUDED
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in excluded)


def expected_tensors(config: dict[str, Any], rank: int) -> Shapes:
    """Every parameter of a rank's modules, once TensorRT-LLM has replaced those that are quantized."""
    tp_size, pp_size = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    D, hs, Hq = config["hidden_size"], config["head_size"], config["num_attention_heads"]
    dtype = getattr(torch, config["dtype"])
    algo, kv_algo = (config["quantization"][key] for key in ("quant_algo", "kv_cache_quant_algo"))
    smooth_quant = algo is not None and algo.startswith("W8A8_SQ_")
    static = algo == "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN"
    shapes: Shapes = {}

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (D,), dtype
        if smooth_quant:
            shapes[f"{name}.scale_to_int"] = (1,), F32

    def linear(name: str, n: int, k: int, *, row: bool = False, module: str | None = None) -> None:
        """`module` is what the format replaces, if that is not the linear itself."""
        if algo is None or is_excluded(config, module or name):
            shapes[f"{name}.weight"] = (n, k), dtype
        elif algo == "FP8":
            shapes[f"{name}.weight"] = (n, k), FP8
            shapes[f"{name}.weights_scaling_factor"] = shapes[f"{name}.activation_scaling_factor"] = (1,), F32
        elif algo == "FP8_PER_CHANNEL_PER_TOKEN":
            shapes[f"{name}.weight"] = (n, k), FP8
            shapes[f"{name}.per_channel_scale"] = (n,), F32
        elif algo == "W8A16":  # `preprocess_weights` quantizes what has one of these names
            assert name.endswith(("qkv", "dense", "fc", "proj", "gate"))
            shapes[f"{name}.weight"] = (n, k), dtype
        else:
            assert smooth_quant
            shapes[f"{name}.weight"] = (n, k), INT8
            shapes[f"{name}.per_channel_scale"] = (1, n), F32
            if static:
                shapes[f"{name}.act_scale"] = (1, 1), F32
            if row:
                shapes[f"{name}.smoother"] = (1, k), F32

    if rank < tp_size:
        parts = tp_size if config["use_parallel_embedding"] else 1
        shapes["transformer.vocab_embedding.weight"] = (-(-config["vocab_size"] // parts), D), dtype
    for local, number in enumerate(stage_layers(config, rank)):
        layer = f"transformer.layers.{local}"
        attention, ffn = config["layer_configs"][number]["attention"], config["layer_configs"][number]["ffn"]
        whole_modules = smooth_quant or algo == "FP8_PER_CHANNEL_PER_TOKEN"
        if attention["impl"] != "no_op":
            norm(f"{layer}.input_layernorm")
        if attention["impl"] == "attention":
            module = f"{layer}.attention"
            kvl = -(-attention["num_key_value_heads"] // tp_size)
            whole = module if whole_modules else None
            linear(f"{module}.qkv", (Hq // tp_size + 2 * kvl) * hs, D, module=whole)
            linear(f"{module}.dense", D, Hq * hs // tp_size, row=True, module=whole)
            if static:
                shapes[f"{module}.quantization_scaling_factor"] = (1,), F32
            if kv_algo is not None:
                shapes[f"{module}.kv_cache_scaling_factor"] = (1,), F32
                shapes[f"{module}.kv_cache_rcp_scaling_factor"] = (1,), F32
        elif attention["impl"] == "linear":
            linear(f"{layer}.attention", D // tp_size, D)
        if ffn["impl"] != "no_op":
            norm(f"{layer}.post_layernorm")
        if ffn["impl"] == "mlp":
            parts = config["fuselage"]["ffn_parts"].get(str(number))
            assert parts is None or sum(parts) == ffn["intermediate_size"]
            for part, width in enumerate(parts or [ffn["intermediate_size"]]):
                module = f"{layer}.ffn" if parts is None else f"{layer}.ffn.part_{part}"
                whole = module if whole_modules else None
                linear(f"{module}.fc", width // tp_size, D, module=whole)
                linear(f"{module}.gate", width // tp_size, D, module=whole)
                linear(f"{module}.proj", D, width // tp_size, row=True, module=whole)
                if static:
                    shapes[f"{module}.quantization_scaling_factor"] = (1,), F32
        elif ffn["impl"] == "linear":
            linear(f"{layer}.ffn", D // tp_size, D)
    if rank >= tp_size * (pp_size - 1):
        shapes["transformer.ln_f.weight"] = (D,), dtype
        shapes["lm_head.weight"] = (-(-config["vocab_size"] // tp_size), D), dtype
    return shapes


@dataclass
class Assembled:
    """Whole matrices in float32, by the names that Hugging Face gives them: "3.q_proj", "3.input_layernorm", "norm"."""

    config: dict[str, Any]
    matrices: dict[str, torch.Tensor]
    input_scales: dict[str, float]  # of static formats, by the same names
    kv_scales: dict[int, float]


def assembled(loaded: Loaded) -> Assembled:
    config = loaded.config
    tp_size = config["mapping"]["tp_size"]
    hs, Hq = config["head_size"], config["num_attention_heads"]
    out = Assembled(config, {}, {}, {})
    stages = [loaded.ranks[first : first + tp_size] for first in range(0, len(loaded.ranks), tp_size)]

    def same(name: str, ranks: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        first = ranks[0][name]
        assert all(torch.equal(first, rank[name]) for rank in ranks), f"{name} differs between ranks"
        return first.float()

    def values(name: str, norm: str, rank: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weight of a linear on one rank; `norm` is what is in front of its module."""
        weight = rank[f"{name}.weight"].float()
        if f"{name}.weights_scaling_factor" in rank:
            weight = weight * rank[f"{name}.weights_scaling_factor"]
        if f"{name}.per_channel_scale" in rank:
            scale = rank[f"{name}.per_channel_scale"].reshape(-1, 1)
            if f"{name}.act_scale" in rank:  # their product turns accumulated codes into numbers
                scale = scale * rank[f"{name}.act_scale"] / static_scale(name, norm, rank)
            weight = weight * scale
        if f"{name}.smoother" in rank:  # inputs are divided by it
            weight = weight / rank[f"{name}.smoother"]
        return weight

    def static_scale(name: str, norm: str, rank: dict[str, torch.Tensor]) -> torch.Tensor:
        module, _, kind = name.rpartition(".")
        if kind in ("dense", "proj"):
            return 1 / rank[f"{module}.quantization_scaling_factor"]
        return 1 / rank[f"{norm}.scale_to_int"]

    def input_scale(name: str, norm: str, ranks: list[dict[str, torch.Tensor]]) -> float | None:
        if f"{name}.activation_scaling_factor" in ranks[0]:
            same(f"{name}.weights_scaling_factor", ranks)
            return same(f"{name}.activation_scaling_factor", ranks).item()
        if f"{name}.act_scale" in ranks[0]:
            scales = {static_scale(name, norm, rank).item() for rank in ranks}
            assert len(scales) == 1
            return scales.pop()
        return None

    if config["use_parallel_embedding"]:
        assert config["embedding_sharding_dim"] == 0
        rows = torch.cat([rank["transformer.vocab_embedding.weight"].float() for rank in stages[0]])
        assert not rows[config["vocab_size"] :].any()
        out.matrices["embed_tokens"] = rows[: config["vocab_size"]]
    else:
        out.matrices["embed_tokens"] = same("transformer.vocab_embedding.weight", stages[0])
    for stage, ranks in enumerate(stages):
        for local, number in enumerate(stage_layers(config, stage * tp_size)):
            layer = f"transformer.layers.{local}"
            entry = config["layer_configs"][number]
            for norm in ("input_layernorm", "post_layernorm"):
                if f"{layer}.{norm}.weight" in ranks[0]:
                    out.matrices[f"{number}.{norm}"] = same(f"{layer}.{norm}.weight", ranks)

            def put(name: str, ours: str, norm: str, dim: int, number: int = number, ranks: Any = ranks) -> None:
                out.matrices[f"{number}.{ours}"] = torch.cat([values(name, norm, rank) for rank in ranks], dim)
                scale = input_scale(name, norm, ranks)
                if scale is not None:
                    out.input_scales[f"{number}.{ours}"] = scale

            norm = f"{layer}.input_layernorm"
            if entry["attention"]["impl"] == "attention":
                kv = entry["attention"]["num_key_value_heads"]
                sizes = [Hq // tp_size * hs, -(-kv // tp_size) * hs, -(-kv // tp_size) * hs]
                pieces = [values(f"{layer}.attention.qkv", norm, rank).split(sizes) for rank in ranks]
                copies = max(1, tp_size // kv)  # neighbouring ranks that hold the same head
                for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
                    of_ranks = [piece[index] for piece in pieces]
                    if index and copies > 1:
                        for rank, piece in enumerate(of_ranks):
                            assert torch.equal(piece, of_ranks[rank // copies * copies])
                        of_ranks = of_ranks[::copies]
                    out.matrices[f"{number}.{name}"] = torch.cat(of_ranks)
                    scale = input_scale(f"{layer}.attention.qkv", norm, ranks)
                    if scale is not None:
                        out.input_scales[f"{number}.{name}"] = scale
                put(f"{layer}.attention.dense", "o_proj", norm, 1)
                if f"{layer}.attention.kv_cache_scaling_factor" in ranks[0]:
                    scale = same(f"{layer}.attention.kv_cache_scaling_factor", ranks)
                    reciprocal = same(f"{layer}.attention.kv_cache_rcp_scaling_factor", ranks)
                    torch.testing.assert_close(scale * reciprocal, torch.ones(1))
                    out.kv_scales[number] = scale.item()
            elif entry["attention"]["impl"] == "linear":
                put(f"{layer}.attention", "linear_attn", norm, 0)
            norm = f"{layer}.post_layernorm"
            if entry["ffn"]["impl"] == "mlp":
                parts = config["fuselage"]["ffn_parts"].get(str(number))
                stems = [f"{layer}.ffn"] if parts is None else [f"{layer}.ffn.part_{p}" for p in range(len(parts))]
                # The activation runs on fc: it is the gate of Hugging Face, and `gate` is its up.
                for theirs, ours, dim in (("fc", "gate_proj", 0), ("gate", "up_proj", 0), ("proj", "down_proj", 1)):
                    pieces = []
                    for stem in stems:
                        put(f"{stem}.{theirs}", ours, norm, dim)
                        pieces.append(out.matrices[f"{number}.{ours}"])
                    out.matrices[f"{number}.{ours}"] = torch.cat(pieces, dim)
            elif entry["ffn"]["impl"] == "linear":
                put(f"{layer}.ffn", "linear_mlp", norm, 0)
    out.matrices["norm"] = same("transformer.ln_f.weight", stages[-1])
    head = torch.cat([rank["lm_head.weight"].float() for rank in stages[-1]])
    assert not head[config["vocab_size"] :].any(), "padding rows of lm_head are zero"
    out.matrices["lm_head"] = head[: config["vocab_size"]]
    return out


def logits(model: Assembled, tokens: torch.Tensor) -> torch.Tensor:
    """Full causal forward in float32: int64 [B, S] -> [B, S, V]."""
    config, m = model.config, model.matrices
    groups = {numbers[0]: numbers for numbers in config["fuselage"]["parallel_groups"]}
    x = F.embedding(tokens, m["embed_tokens"])
    number = 0
    while number < config["num_hidden_layers"]:
        numbers = groups.get(number, [number])
        x = x + sum(_block(model, one, x) - x for one in numbers)
        number += len(numbers)
    return _norm(x, m["norm"], config) @ m["lm_head"].T


def _block(model: Assembled, number: int, x: torch.Tensor) -> torch.Tensor:
    config, m = model.config, model.matrices
    entry = config["layer_configs"][number]
    if entry["attention"]["impl"] == "attention":
        x = x + _attention(model, number, _norm(x, m[f"{number}.input_layernorm"], config))
    elif entry["attention"]["impl"] == "linear":
        x = x + _norm(x, m[f"{number}.input_layernorm"], config) @ m[f"{number}.linear_attn"].T
    if entry["ffn"]["impl"] == "no_op":
        return x
    normed = _norm(x, m[f"{number}.post_layernorm"], config)
    if entry["ffn"]["impl"] == "linear":
        return x + normed @ m[f"{number}.linear_mlp"].T
    inner = F.silu(normed @ m[f"{number}.gate_proj"].T) * (normed @ m[f"{number}.up_proj"].T)
    return x + inner @ m[f"{number}.down_proj"].T


def _attention(model: Assembled, number: int, x: torch.Tensor) -> torch.Tensor:
    config, m = model.config, model.matrices
    batch, tokens, _ = x.shape
    hs = config["head_size"]
    query, key, value = (
        (x @ m[f"{number}.{name}"].T).view(batch, tokens, -1, hs).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    query, key = rotated(query, config), rotated(key, config)
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.transpose(1, 2).reshape(batch, tokens, -1) @ m[f"{number}.o_proj"].T


def rotated(x: torch.Tensor, config: dict[str, Any], start: int = 0) -> torch.Tensor:
    """rope_gpt_neox on [B, heads, S, hs], S from position `start` on: channel i turns with channel i + hs / 2."""
    assert config["position_embedding_type"] == "rope_gpt_neox"
    hs = config["head_size"]
    frequencies = config["rotary_base"] ** (-torch.arange(0, hs, 2, dtype=torch.float64) / hs)
    scaling = config["rotary_scaling"]
    if scaling is not None:
        kind = scaling.get("type", scaling.get("rope_type"))
        if kind == "linear":
            frequencies = frequencies / scaling["factor"]
        else:
            assert kind == "llama3"
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies
    angles = torch.outer(torch.arange(start, start + x.shape[2], dtype=torch.float64), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _norm(x: torch.Tensor, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["norm_epsilon"]) * weight
