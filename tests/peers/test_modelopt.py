"""Our quantized folders against those of nvidia-modelopt: the same bytes, the same names, the same config.

ModelOpt calibrates; its ranges are then ours, so that what is compared is scales, codes and how they are stored. Where
one scale serves a tensor, ModelOpt gives q, k, v and gate, up a scale each and readers round again; we share one. So
the model here has weights whose largest value is the same in all of a GEMM.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from exporter.dtypes import FLOAT8_E4M3FN
from exporter.errors import CheckpointError
from exporter.graph import (
    FUSED_GEMMS,
    Attention,
    Block,
    InputQuantization,
    KVQuantization,
    Linear,
    ModelGraph,
    linears,
    map_blocks,
)
from exporter.lazy import LazyTensor, array
from exporter.numerics import scale_from_amax
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.passes.quantize_linears import quantize_linears
from exporter.quantization import QuantizationRecipe
from exporter.read import open_model
from exporter.reference import LoadedBlock
from exporter.writers.files import save_folder
from exporter.writers.hf import Options, emit
from tests.tiny import tiny_graph

pytestmark = pytest.mark.peers

E4M3_TENSOR = {"dtype": "float8_e4m3fn", "scale": "tensor"}
E4M3_ROW = {"dtype": "float8_e4m3fn", "scale": "row"}
INT8_ROW = {"dtype": "int8", "scale": "row"}

# id -> (ModelOpt's config, with a quantized KV cache, our weights)
CASES: dict[str, tuple[str, bool, dict[str, str]]] = {
    "FP8": ("FP8_DEFAULT_CFG", False, E4M3_TENSOR),
    "FP8, KV cache": ("FP8_DEFAULT_CFG", True, E4M3_TENSOR),
    "FP8 per channel and token": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", False, E4M3_ROW),
    "INT8": ("INT8_DEFAULT_CFG", False, INT8_ROW),
    "INT8, KV cache": ("INT8_DEFAULT_CFG", True, INT8_ROW),
    "INT8 smoothed": ("INT8_SMOOTHQUANT_CFG", False, INT8_ROW),
    "INT8 weights": ("INT8_WEIGHT_ONLY_CFG", False, INT8_ROW),
}
STRUCTURES: dict[str, Callable[[], ModelGraph]] = {
    "llama": lambda: tiny_graph("AF AF", dtype="bfloat16"),
    "fused, padded": lambda: fuse_ffn(tiny_graph("AF F F AF", intermediate_size=200, dtype="bfloat16"), [(1, 2)]),
}


def levelled(graph: ModelGraph) -> ModelGraph:
    """The graph with the same largest |weight| in all linears of a GEMM."""

    def level(block: Block, index: int) -> Block:
        parts = {}
        for kind in ("attention", "ffn"):
            part = getattr(block, kind)
            if part is None:
                continue
            named = linears(part)
            for group in FUSED_GEMMS:
                weights = {name: named[name].weight.numpy() for name in group if name in named}
                largest = max((float(np.abs(one.astype(np.float32)).max()) for one in weights.values()), default=0)
                for name, weight in weights.items():
                    weight[3, 5] = 1.25 * largest
                    named[name] = replace(named[name], weight=array(weight))
            parts[kind] = replace(part, **named)
        return replace(block, **parts)

    return map_blocks(graph, level)


def saved(graph: ModelGraph, folder: Path) -> Path:
    save_folder(folder, emit(graph, Options(quantization_layout="modelopt")), kind="checkpoint", details={})
    return folder


@dataclass
class Exported:
    """What ModelOpt made of a graph."""

    folder: Path
    graph: ModelGraph  # with the weights that ModelOpt rounded: smoothed ones, where it smooths
    ranges: dict[str, float]  # module -> largest |input|; attention + ".k" or ".v" -> of the cache

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")


def exported(graph: ModelGraph, config_name: str, kv_cache: bool, folder: Path) -> Exported:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    config = copy.deepcopy(getattr(mtq, config_name))
    if kv_cache:
        config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved(graph, folder / "plain"), trust_remote_code=True, dtype=torch.bfloat16
    )
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, graph.vocab_size, (4, 64)))
    mtq.quantize(model.eval(), config, lambda quantized: quantized(tokens))
    ranges: dict[str, float] = {}
    weights: dict[str, LazyTensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weights[name] = array(module.weight.detach().float().numpy().astype(graph.dtype.numpy))
            if getattr(module.input_quantizer, "_amax", None) is not None:
                ranges[name] = float(module.input_quantizer.amax)
        for kind in "kv":
            quantizer = getattr(module, f"{kind}_bmm_quantizer", None)
            if quantizer is not None and quantizer.is_enabled:
                ranges[f"{name}.{kind}"] = float(quantizer.amax)
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=str(folder / "modelopt"))

    def with_weight(linear: Linear, module: str) -> Linear:
        return replace(linear, weight=weights[module])

    return Exported(folder / "modelopt", map_linears(graph, with_weight), ranges)


def map_linears(graph: ModelGraph, function: Callable[[Linear, str], Linear]) -> ModelGraph:
    """The graph with `function(linear, name of its module)` for every linear of a block."""
    modules = {"attention": "self_attn", "ffn": "mlp"}

    def mapped(block: Block, index: int) -> Block:
        parts = {}
        for kind, module in modules.items():
            part = getattr(block, kind)
            if part is not None:
                stem = f"model.layers.{index}.{module}"
                named = {name: function(linear, f"{stem}.{name}") for name, linear in linears(part).items()}
                parts[kind] = replace(part, **named)
        return replace(block, **parts)

    return map_blocks(graph, mapped)


def quantized_by_us(theirs: Exported, weights: dict[str, str]) -> ModelGraph:
    """Our weights under our scales; inputs and cache under scales from ModelOpt's ranges."""

    def scale(amax: float, dtype: Any) -> LazyTensor:
        return array(scale_from_amax(np.float32(amax), dtype))

    def with_input(linear: Linear, module: str) -> Linear:
        quantization, amax = linear.quantization, theirs.ranges.get(module)
        assert quantization is not None
        if weights == E4M3_ROW:
            inputs = InputQuantization(dtype=linear.weight.dtype, scale=None)
        elif amax is None:
            return linear
        else:
            inputs = InputQuantization(dtype=linear.weight.dtype, scale=scale(amax, linear.weight.dtype))
        return replace(linear, quantization=replace(quantization, input=inputs))

    def with_cache(block: Block, index: int) -> Block:
        stem = f"model.layers.{index}.self_attn"
        if not isinstance(block.attention, Attention) or f"{stem}.k" not in theirs.ranges:
            return block
        k_scale, v_scale = (scale(theirs.ranges[f"{stem}.{kind}"], FLOAT8_E4M3FN) for kind in "kv")
        cache = KVQuantization(dtype=FLOAT8_E4M3FN, k_scale=k_scale, v_scale=v_scale)
        return replace(block, attention=replace(block.attention, kv_quantization=cache))

    recipe = QuantizationRecipe.model_validate({"weights": weights})
    return map_blocks(map_linears(quantize_linears(theirs.graph, recipe), with_input), with_cache)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one has, and those whose dtype, shape or bytes differ."""

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(bits(one), bits(other))

    names = sorted({*found, *expected})
    return [n for n in names if n not in found or n not in expected or not same(found[n], expected[n])]


def configs(folder: Path) -> tuple[Any, Any]:
    """hf_quant_config.json and `quantization_config`, without their producers."""
    beside = json.loads((folder / "hf_quant_config.json").read_text())
    inside = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert beside.pop("producer") == inside.pop("producer")
    return beside, inside


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", CASES)
def test_same_bytes_and_config(case: str, structure: str, tmp_path: Path) -> None:
    config_name, kv_cache, weights = CASES[case]
    theirs = exported(levelled(STRUCTURES[structure]()), config_name, kv_cache, tmp_path)
    ours = saved(quantized_by_us(theirs, weights), tmp_path / "ours")
    expected = theirs.tensors
    unfolded = [name for name in expected if name.endswith("pre_quant_scale")]
    assert bool(unfolded) == (case == "INT8 smoothed")
    # The rest of what ModelOpt smoothed is the same too: we fold these factors into the layers in front.
    expected = {name: tensor for name, tensor in expected.items() if name not in unfolded}
    assert differing(load_file(ours / "model.safetensors"), expected) == []
    assert configs(ours) == configs(theirs.folder)


def test_scales_of_their_own_are_the_only_difference(tmp_path: Path) -> None:
    """Without levelled weights: what lies in a GEMM differs, and everything else is the same bytes."""
    theirs = exported(STRUCTURES["llama"](), "FP8_DEFAULT_CFG", False, tmp_path)
    ours = saved(quantized_by_us(theirs, E4M3_TENSOR), tmp_path / "ours")
    names = differing(load_file(ours / "model.safetensors"), theirs.tensors)
    in_gemms = tuple(f"{name}.{kind}" for group in FUSED_GEMMS for name in group for kind in ("weight", "weight_scale"))
    assert names
    assert all(name.endswith(in_gemms) for name in names)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "INT8 smoothed"])
def test_their_folders_are_read(case: str, structure: str, tmp_path: Path) -> None:
    """Codes times scales are the reference's weights, bit for bit; and what was read is written as it was."""
    config_name, kv_cache, _ = CASES[case]
    theirs = exported(STRUCTURES[structure](), config_name, kv_cache, tmp_path)
    graph = open_model(theirs.folder, need_weights=True).graph
    tensors = theirs.tensors
    for layer, block in enumerate(graph.flat_blocks):
        (loaded,) = LoadedBlock(block, 0, torch.device("cpu"), torch.float32).members
        for kind, module in (("attention", "self_attn"), ("ffn", "mlp")):
            part = getattr(block, kind)
            for name in linears(part) if part is not None else ():
                stem = f"model.layers.{layer}.{module}.{name}"
                scale = tensors[f"{stem}.weight_scale"]
                expected = tensors[f"{stem}.weight"].float() * (scale[:, None] if scale.dim() else scale)
                assert torch.equal(bits(getattr(getattr(loaded, kind), name).weight), bits(expected)), stem
    again = saved(graph, tmp_path / "again")
    assert differing(load_file(again / "model.safetensors"), tensors) == []
    assert configs(again) == configs(theirs.folder)


def test_smoothing_that_is_not_folded_is_refused(tmp_path: Path) -> None:
    theirs = exported(STRUCTURES["llama"](), "INT8_SMOOTHQUANT_CFG", False, tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)pre_quant_scale: .*multiplied by it before it is rounded"):
        open_model(theirs.folder, need_weights=True)


@pytest.mark.parametrize("exclude", ["*layers.0.self_attn*", "*down_proj*", "*layers.1.mlp*"])
def test_modules_that_they_leave_out(exclude: str, tmp_path: Path) -> None:
    """ModelOpt shortens the list with wildcards; we read them, and write every module."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"].append({"quantizer_name": exclude, "enable": False})
    name = "FUSELAGE_PARTIAL_CFG"
    setattr(mtq, name, config)
    try:
        theirs = exported(STRUCTURES["llama"](), name, False, tmp_path)
    finally:
        delattr(mtq, name)
    graph = open_model(theirs.folder, need_weights=True).graph
    again = saved(graph, tmp_path / "again")
    assert differing(load_file(again / "model.safetensors"), theirs.tensors) == []
    listed = configs(again)[0]["quantization"]["exclude_modules"]
    assert {*listed} >= {"lm_head", "model.embed_tokens"}
    left_out = {
        name.removesuffix(".weight")
        for name, tensor in theirs.tensors.items()
        if "proj" in name and tensor.dtype == torch.bfloat16
    }
    assert {*listed} - {"lm_head", "model.embed_tokens"} == left_out
    assert left_out
