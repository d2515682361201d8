"""Quantized folders of other tools, spelled in all the ways in use; and folders that were tampered with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.architectures.quantization import quantization_from_config
from exporter.errors import CheckpointError
from exporter.graph import ModelGraph, linear_names
from exporter.read import open_model
from exporter.writers.files import save_folder
from exporter.writers.hf import Options, emit
from tests.exporter.writers.test_hf import differences
from tests.exporter.writers.test_hf_quantization import with_kv_cache, with_recipe
from tests.tiny import quantized_graph, tiny_graph

PLAIN = tiny_graph("AF AF")
FP8 = with_kv_cache(quantized_graph(PLAIN, "fp8"))
INT8 = quantized_graph(PLAIN, "int8-smoothquant")
FP8_ROWS = quantized_graph(PLAIN, "fp8-rowwise")
SOME: ModelGraph = with_recipe(
    PLAIN,
    weights={"dtype": "float8_e4m3fn", "scale": "row"},
    inputs={"dtype": "float8_e4m3fn", "scale": "token"},
    exclude=["blocks.0.attention.*", "blocks.1.ffn.down_proj"],
)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
K_SCALE = "model.layers.1.self_attn.k_proj.k_scale"

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


class Folder:
    """A quantized folder, written without a manifest and then taken apart."""

    def __init__(self, path: Path, graph: ModelGraph, layout: str) -> None:
        path.mkdir()
        for name, content in emit(graph, Options(quantization_layout=layout)):
            (path / name).write_bytes(content if isinstance(content, bytes) else b"".join(content.chunks()))
        self.path = path

    def config(self, change: Callable[[Config], object]) -> None:
        """Change `quantization_config`."""
        config = json.loads((self.path / "config.json").read_text())
        change(config["quantization_config"])
        (self.path / "config.json").write_text(json.dumps(config))

    def without_config(self) -> Config:
        """Take `quantization_config` out of config.json, as older versions of ModelOpt have it."""
        config = json.loads((self.path / "config.json").read_text())
        taken: Config = config.pop("quantization_config")
        (self.path / "config.json").write_text(json.dumps(config))
        return taken

    def beside(self, change: Callable[[Config], object]) -> None:
        """Change hf_quant_config.json."""
        path = self.path / "hf_quant_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    def tensors(self, change: Callable[[Tensors], object]) -> None:
        found = load_file(self.path / "model.safetensors")
        change(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, self.path / "model.safetensors")

    def open(self) -> ModelGraph:
        return open_model(self.path, need_weights=True).graph


def reshaped(ending: str, *shape: int) -> Callable[[Folder], object]:
    """All tensors of that ending in another shape."""

    def change(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(ending):
                tensors[name] = tensors[name].reshape(shape)

    return lambda folder: folder.tensors(change)


def llm_compressor(folder: Folder) -> None:
    """All the keys that llm-compressor writes."""
    unused = {
        "actorder": None, "block_structure": None, "group_size": None, "observer": "minmax", "observer_kwargs": {},
        "scale_dtype": None, "zp_dtype": None,
    }  # fmt: skip

    def change(config: Config) -> None:
        group = config["config_groups"]["group_0"]
        group["weights"] |= unused
        group["input_activations"] |= unused | {"observer": None}
        group |= {"output_activations": None, "format": "int-quantized"}
        config |= {
            "global_compression_ratio": None, "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {},
            "version": "0.12.2",
        }  # fmt: skip

    folder.config(change)


def only_hf_quant_config(folder: Folder) -> None:
    folder.without_config()


def only_config(folder: Folder) -> None:
    (folder.path / "hf_quant_config.json").unlink()


def nested_config(folder: Folder) -> None:
    """config.json with what hf_quant_config.json has: ModelOpt before it flattened it."""
    only_config(folder)

    def change(config: Config) -> None:
        algorithm, excluded = config["quant_algo"], config["ignore"]
        config.clear()
        config["quantization"] = {
            "quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": excluded,
        }  # fmt: skip

    folder.config(change)


def flat_hf_quant_config(folder: Folder) -> None:
    (folder.path / "hf_quant_config.json").write_text(json.dumps(folder.without_config()))


def kv_cache_by_name(folder: Folder) -> None:
    """config.json of ModelOpt 0.31 and 0.33."""
    only_config(folder)
    folder.config(lambda config: (config.pop("quant_method"), config.update(kv_cache_scheme="FP8")))
    folder.config(lambda config: config["producer"].update(name="modelopt", version="0.33.0"))


def wildcards(folder: Folder) -> None:
    """How ModelOpt shortens the list where several linears of a module are left out."""
    excluded = ["lm_head", "model.embed_tokens", "model.layers.0.self_attn*", "model.layers.1.mlp.down_proj"]
    folder.config(lambda config: config.update(ignore=excluded))
    folder.beside(lambda config: config["quantization"].update(exclude_modules=excluded))


def expressions(folder: Folder) -> None:
    ignore = ["re:.*lm_head", r"re:.*layers\.0\.self_attn\.(q|k|v|o)_proj$", "model.layers.1.mlp.down_proj"]
    folder.config(lambda config: config.update(ignore=ignore))


def groups(folder: Folder) -> None:
    """A name comes before an expression, an expression before all linears."""

    def change(config: Config) -> None:
        group = config["config_groups"].pop("group_0")
        wrong = {**group, "weights": group["weights"] | {"strategy": "tensor"}}
        config["config_groups"] = {
            "any": {**wrong, "targets": ["Linear"]},
            "attention": {**group, "targets": [r"re:.*self_attn\..*_proj"]},
            "all ffn": {**wrong, "targets": ["re:.*mlp.*"]},
            "ffn": {
                **group,
                "targets": [f"model.layers.{n}.mlp.{x}_proj" for n in (0, 1) for x in ("gate", "up", "down")],
            },
        }

    folder.config(change)


def bfloat16_scales(folder: Folder) -> None:
    folder.tensors(
        lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items() if k.endswith("weight_scale")})
    )


SPELLINGS: dict[str, tuple[ModelGraph, str, Callable[[Folder], object]]] = {
    "modelopt, scales of [1]": (FP8, "modelopt", reshaped("scale", 1)),
    "modelopt, rows of [out, 1]": (INT8, "modelopt", reshaped("weight_scale", -1, 1)),
    "modelopt, hf_quant_config.json alone": (FP8, "modelopt", only_hf_quant_config),
    "modelopt, config.json alone": (FP8, "modelopt", only_config),
    "modelopt, nested": (FP8, "modelopt", nested_config),
    "modelopt, flat": (FP8, "modelopt", flat_hf_quant_config),
    "modelopt, KV cache by name": (FP8, "modelopt", kv_cache_by_name),
    "modelopt, wildcards": (SOME, "modelopt", wildcards),
    "compressed-tensors, scales of []": (FP8, "compressed-tensors", reshaped("scale")),
    "compressed-tensors, rows of [out]": (INT8, "compressed-tensors", reshaped("weight_scale", -1)),
    "compressed-tensors, all keys": (INT8, "compressed-tensors", llm_compressor),
    "compressed-tensors, expressions": (SOME, "compressed-tensors", expressions),
    "compressed-tensors, groups": (FP8_ROWS, "compressed-tensors", groups),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings(case: str, tmp_path: Path) -> None:
    graph, layout, change = SPELLINGS[case]
    folder = Folder(tmp_path / "model", graph, layout)
    change(folder)
    assert list(differences(folder.open(), graph)) == []


def test_bfloat16_scales_are_widened(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "model", INT8, "compressed-tensors")
    bfloat16_scales(folder)
    for name, linear in linear_names(folder.open()).items():
        before = linear_names(INT8)[name]
        if before.quantization is None or linear.quantization is None:
            continue
        expected = torch.from_numpy(before.quantization.weight_scale.numpy()).bfloat16().float()
        assert torch.equal(torch.from_numpy(linear.quantization.weight_scale.numpy()), expected)


def test_a_kv_cache_without_scales_has_scale_one(tmp_path: Path) -> None:
    """ModelOpt's "fp8_cast": the config names the format, and no tensor a scale."""
    folder = Folder(tmp_path / "model", FP8, "modelopt")
    folder.tensors(
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(("k_scale", "v_scale"))]
    )
    caches = [attention.kv_quantization for _, attention in folder.open().attentions]
    assert [(float(cache.k_scale.numpy()), float(cache.v_scale.numpy())) for cache in caches if cache] == [(1, 1)] * 2


# --- what is refused when it is opened


def drop(*names: str) -> Callable[[Folder], object]:
    return lambda folder: folder.tensors(lambda tensors: [tensors.pop(name) for name in names])


def put(name: str, value: torch.Tensor) -> Callable[[Folder], object]:
    return lambda folder: folder.tensors(lambda tensors: tensors.update({name: value}))


def say(**keys: Any) -> Callable[[Folder], object]:
    """Change keys of config.json's `quantization_config`, where there is nothing beside it."""

    def change(folder: Folder) -> None:
        (folder.path / "hf_quant_config.json").unlink(missing_ok=True)
        folder.config(lambda config: config.update(keys))

    return change


def say_of(part: str, **keys: Any) -> Callable[[Folder], object]:
    return lambda folder: folder.config(lambda config: config["config_groups"]["group_0"][part].update(keys))


def group(**keys: Any) -> Callable[[Folder], object]:
    return lambda folder: folder.config(lambda config: config["config_groups"]["group_0"].update(keys))


# id -> (graph, layout, what is done to the folder, parts of the error)
TAMPERED: dict[str, tuple[ModelGraph, str, Callable[[Folder], object], tuple[str, ...]]] = {
    "no weight scale": (FP8, "modelopt", drop(f"{Q}.weight_scale"), (f"{Q}.weight_scale (block 0)", "is missing")),
    "no input scale": (FP8, "modelopt", drop(f"{DOWN}.input_scale"), (f"{DOWN}.input_scale (block 1)", "is missing")),
    "no k scale in one block": (FP8, "modelopt", drop(K_SCALE), (f"{K_SCALE} (block 1)", "is missing")),
    "k scale under the other layout's name": (
        FP8, "modelopt",
        lambda folder: (drop(K_SCALE)(folder), put("model.layers.1.self_attn.k_scale", torch.ones(()))(folder)),
        ("2 problems", K_SCALE, "is missing", "self_attn.k_scale", "says nothing of it"),
    ),
    "an input scale nobody asked for": (
        FP8_ROWS, "compressed-tensors", put(f"{Q}.input_scale", torch.ones(1)),
        (f"{Q}.input_scale", "not part of a llama model", "The quantization config says nothing of it"),
    ),
    "scales of a kv cache nobody asked for": (
        FP8_ROWS, "modelopt", put(K_SCALE, torch.ones(())), (K_SCALE, "not part of", "says nothing of it"),
    ),
    "smoothing that is not folded": (
        INT8, "modelopt", put(f"{Q}.pre_quant_scale", torch.ones(64)),
        (f"{Q}.pre_quant_scale", "not part of", "multiplied by it before it is rounded"),
    ),
    "zero points": (
        INT8, "compressed-tensors", put(f"{Q}.weight_zero_point", torch.zeros(64, 1, dtype=torch.int8)),
        (f"{Q}.weight_zero_point", "Only symmetric codes are read"),
    ),
    "scale of another length": (
        INT8, "modelopt", put(f"{Q}.weight_scale", torch.ones(63)),
        (f"{Q}.weight_scale (block 0)", "wrong shape", "[64]", "found [63]"),
    ),
    "scale per column": (
        FP8_ROWS, "modelopt", put(f"{Q}.weight_scale", torch.ones(1, 64)), ("wrong shape", "found [1, 64]"),
    ),
    "one scale for all rows": (
        FP8_ROWS, "compressed-tensors", put(f"{Q}.weight_scale", torch.ones(1)), ("wrong shape", "found [1]"),
    ),
    "scale of integers": (
        FP8, "modelopt", put(f"{Q}.weight_scale", torch.ones((), dtype=torch.int32)),
        (f"{Q}.weight_scale", "wrong dtype", "float32 or bfloat16 or float16", "found I32"),
    ),
    "codes of another dtype": (
        FP8, "modelopt", put(f"{Q}.weight", torch.ones(64, 64, dtype=torch.int8)),
        (f"{Q}.weight (block 0)", "wrong dtype", "expected float8_e4m3fn, found int8"),
    ),
    "a weight in place of codes": (
        FP8, "modelopt", put(f"{Q}.weight", torch.ones(64, 64)),
        (f"{Q}.weight", "expected float8_e4m3fn, found float32", "says that this module is quantized"),
    ),
    "codes in a module that is left out": (
        INT8, "compressed-tensors", say(ignore=["lm_head", Q]),
        ("3 problems", f"{Q}.weight", "found int8", "Codes need", f"{Q}.input_scale", f"{Q}.weight_scale"),
    ),
    "codes and no config": (
        INT8, "compressed-tensors", lambda folder: folder.without_config(),
        ("problems", "wrong dtype", "found int8", "Codes need a quantization config"),
    ),
    "codes of another shape": (
        INT8, "modelopt", put(f"{Q}.weight", torch.ones(64, 32, dtype=torch.int8)), ("wrong shape", "found [64, 32]"),
    ),
    "a quantized lm_head": (
        INT8, "compressed-tensors", say(ignore=[]), ("config.json", "a quantized lm_head is not supported", "lm_head"),
    ),
    "method unknown": (INT8, "modelopt", say(quant_method="awq"), ("unknown quantization method", "found awq")),
    "method a number": (INT8, "modelopt", say(quant_method=7), ("unknown quantization method", "found 7")),
    "config a list": (
        INT8, "modelopt",
        lambda folder: (folder.path / "hf_quant_config.json").write_text("[]"),
        ("hf_quant_config.json", "not a JSON object", "found []"),
    ),
    "algorithm unknown": (
        INT8, "modelopt", say(quant_algo="NVFP4"),
        ("config.json", "quant_algo is not supported", "FP8_PER_CHANNEL_PER_TOKEN", "found NVFP4"),
    ),
    "algorithm missing": (
        INT8, "modelopt",
        lambda folder: folder.beside(lambda config: config["quantization"].pop("quant_algo")),
        ("hf_quant_config.json", "quantization_config.quant_algo: Field required"),
    ),
    "algorithms of their own": (INT8, "modelopt", say(quant_algo="MIXED_PRECISION"), ("found MIXED_PRECISION",)),
    "list of numbers": (INT8, "modelopt", say(ignore=[1]), ("quantization_config.ignore.0: ", "valid string")),
    "two descriptions": (
        INT8, "modelopt",
        lambda folder: folder.beside(lambda config: config["quantization"].update(exclude_modules=[])),
        ("hf_quant_config.json", "described twice, and differently"),
    ),
    "kv cache of NVFP4": (
        FP8, "modelopt", say(kv_cache_scheme=None, kv_cache_quant_algo="NVFP4"),
        ("kv_cache_quant_algo is not supported", "expected FP8", "found NVFP4"),
    ),
    "KV cache of another name": (
        FP8, "modelopt", say(kv_cache_scheme="NVFP4"),
        ("quantization_config.kv_cache_scheme: ", "found NVFP4"),
    ),
    "kv cache of int8": (
        FP8, "compressed-tensors", say(kv_cache_scheme={"num_bits": 8, "type": "int"}),
        ("kv_cache_scheme.type", "found int"),
    ),
    "kv cache per head": (
        FP8, "compressed-tensors", say(kv_cache_scheme={"type": "float", "strategy": "attn_head"}),
        ("kv_cache_scheme.strategy", "found attn_head"),
    ),
    "no groups": (INT8, "compressed-tensors", say(config_groups={}), ("config_groups is empty",)),
    "groups a list": (INT8, "compressed-tensors", say(config_groups=[]), ("config_groups: ", "valid dictionary")),
    "preset in place of a group": (
        INT8, "compressed-tensors", say(config_groups={"W8A8": ["Linear"]}), ("config_groups.W8A8: ",),
    ),
    "a target twice": (
        INT8, "compressed-tensors", say(config_groups={key: {"targets": ["Linear"], "weights": {}} for key in "ab"}),
        ("two groups have the same target",),
    ),
    "packed": (INT8, "compressed-tensors", say(format="pack-quantized"), ("group_0.format", "found pack-quantized")),
    "sparse": (INT8, "compressed-tensors", say(sparsity_config={"format": "sparse-24-bitmask"}), ("sparsity_config",)),
    "rotated": (INT8, "compressed-tensors", say(transform_config={"config_groups": {"R1": {}}}), ("transform_config",)),
    "a type of its own": (INT8, "compressed-tensors", say_of("weights", type="fp"), ("weights.type", "found fp")),
    "4 bits": (INT8, "compressed-tensors", say_of("weights", num_bits=4), ("group_0.weights.num_bits", "found 4")),
    "bits a string": (INT8, "compressed-tensors", say_of("weights", num_bits="8"), ("weights.num_bits: ", "valid int")),
    "bits a truth": (INT8, "compressed-tensors", say_of("weights", num_bits=True), ("weights.num_bits: ", "valid int")),
    "asymmetric": (INT8, "compressed-tensors", say_of("weights", symmetric=False), ("symmetric", "found false")),
    "per group": (INT8, "compressed-tensors", say_of("weights", group_size=128), ("weights.group_size", "found 128")),
    "per block": (INT8, "compressed-tensors", say_of("weights", strategy="block"), ("weights.strategy", "found block")),
    "reordered": (INT8, "compressed-tensors", say_of("weights", actorder="weight"), ("weights.actorder",)),
    "dynamic weights": (INT8, "compressed-tensors", say_of("weights", dynamic=True), ("weights.dynamic", "found true")),
    "dynamic and per tensor": (
        INT8, "compressed-tensors", say_of("input_activations", dynamic=True),
        ("input_activations.dynamic", "expected false, found true"),
    ),
    "static and per token": (
        INT8, "compressed-tensors", say_of("input_activations", strategy="token"),
        ("input_activations.dynamic", "expected true, found false"),
    ),
    "local": (INT8, "compressed-tensors", say_of("input_activations", dynamic="local"), ("found local",)),
    "inputs of another type": (
        INT8, "compressed-tensors", say_of("input_activations", type="float"),
        ("input_activations.type", "found float"),
    ),
    "outputs": (INT8, "compressed-tensors", group(output_activations={}), ("output_activations", "found {}")),
    "weights left out": (INT8, "compressed-tensors", group(weights=None), ("does not quantize weights",)),
    "an expression that looks ahead": (
        INT8, "compressed-tensors", say(ignore=["re:(?!lm_head).*"]),
        ("an expression in the quantization config is not supported", "found (?!lm_head).*"),
    ),
    "an expression that is none": (INT8, "compressed-tensors", say(ignore=["re:("]), ("not supported", "found (")),
    "an expression of megabytes": (
        INT8, "compressed-tensors", say(ignore=["re:" + "a" * 1_000_000]), ("too long", "1000000 characters"),
    ),
    "many expressions": (
        INT8, "compressed-tensors", say(ignore=[f"re:{n}" for n in range(65)]), ("too many patterns", "found 65"),
    ),
    "many wildcards": (
        INT8, "modelopt", say(ignore=[f"{n}*" for n in range(2000)]), ("too many patterns", "found 2000"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_folders(case: str, tmp_path: Path) -> None:
    graph, layout, change, parts = TAMPERED[case]
    folder = Folder(tmp_path / "model", graph, layout)
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        folder.open()
    text = str(caught.value)
    assert re.search(".*".join(map(re.escape, parts)), text, re.DOTALL), text
    assert len(text) < 4000
    assert str(folder.path) in text


@pytest.mark.parametrize("expression", ["(.|.)" * 150 + "X", "(((.*)*)*)*X", ".*" * 200 + "X"])
def test_expressions_do_not_hang(expression: str) -> None:
    """With the backtracking engine of Python they take years."""
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": [f"re:{expression}"], "weights": {}}},
    }
    assert quantization_from_config(config).scheme_of("model.layers.0.self_attn.q_proj") is None


# --- values of scales, which are seen when they are read


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("graph", "name", "shape"),
    [
        (FP8, f"{Q}.weight_scale", ()),
        (FP8, f"{DOWN}.input_scale", ()),
        (FP8, K_SCALE, ()),
        (INT8, f"{Q}.weight_scale", (64,)),
    ],
    ids=["weight", "input", "cache", "row"],
)
def test_scales_are_positive_numbers(
    graph: ModelGraph, name: str, shape: tuple[int, ...], value: float, tmp_path: Path
) -> None:
    """Nothing comes of them: the folder opens, for no data is read, and what reads them stops and leaves nothing."""
    folder = Folder(tmp_path / "model", graph, "modelopt")
    scale = torch.ones(shape)
    scale.view(-1)[-1] = value
    put(name, scale)(folder)
    opened = folder.open()
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {re.escape(name)}: a scale is a positive number"):
        save_folder(
            tmp_path / "out", emit(opened, Options(quantization_layout="modelopt")), kind="checkpoint", details={}
        )
    assert not (tmp_path / "out").exists()


STACKS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def stack(tensors: Tensors) -> None:
    """Store q, k, v and gate, up as Phi-3 does."""
    for layer in ("model.layers.0", "model.layers.1"):
        for stacked, parts in STACKS.items():
            for ending in ("weight", "weight_scale", "input_scale"):
                found = [tensors.pop(f"{layer}.{part}.{ending}", None) for part in parts]
                if found[0] is not None:
                    is_of_rows = found[0].numel() > 1
                    tensors[f"{layer}.{stacked}.{ending}"] = torch.cat(found) if is_of_rows else found[0]


@pytest.mark.parametrize(
    ("graph", "layout"),
    [(FP8, "modelopt"), (FP8_ROWS, "modelopt"), (INT8, "compressed-tensors")],
    ids=["FP8, KV cache", "FP8 per row", "INT8"],
)
def test_stacked_linears_are_those_that_lie_apart(graph: ModelGraph, layout: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "model", graph, layout)
    apart = folder.open()
    folder.tensors(stack)
    path = folder.path / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"})
    )
    assert list(differences(folder.open(), apart)) == []


def test_a_stack_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "model", INT8, "compressed-tensors")
    folder.tensors(stack)
    path = folder.path / "config.json"
    changes = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_key_value_heads": 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(
        CheckpointError, match=r"self_attn\.qkv_proj\.weight .*expected \[192, 64\] from num_att.*\[128, 64"
    ):
        folder.open()
