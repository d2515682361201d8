"""Quantized Hugging Face folders: names, shapes and config of both layouts, the way back, refusals, reader rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from exporter.architectures.quantization import COMPRESSED_TENSORS, MODELOPT, Scheme
from exporter.dtypes import FLOAT8_E4M3FN, INT8
from exporter.errors import TargetError
from exporter.graph import (
    InputQuantization,
    KVQuantization,
    Linear,
    ModelGraph,
    Quantization,
    linear_names,
    linears,
    map_blocks,
)
from exporter.lazy import array, computed
from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.passes.quantize_linears import quantize_linears
from exporter.pipeline import checkpoint_writing
from exporter.quantization import QuantizationRecipe
from exporter.read import open_model
from exporter.writers.files import sizes_of
from exporter.writers.hf import NEMOTRON_NAS, Options, as_written, check, config_of, emit, layout_of
from exporter.writers.hf_quantization import layout_to_keep, scheme_of
from exporter.writers.hf_readers import QUANTIZATION_RULES, READERS, Severity, check_for
from tests.exporter.writers.test_hf import differences, saved
from tests.tiny import quantized_graph, tiny_graph

STATIC_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}


def arguments(kind: str, strategy: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": strategy == "token"}


def with_linears(graph: ModelGraph, **changes: Any) -> ModelGraph:
    """The graph with `name=function(linear)` applied to the linears of that name in every block."""

    def changed(block: Any, index: int) -> Any:
        parts = {}
        for kind in ("attention", "ffn"):
            part = getattr(block, kind)
            if part is not None:
                named = {name: changes[name](linear) for name, linear in linears(part).items() if name in changes}
                parts[kind] = replace(part, **named)
        return replace(block, **parts)

    return map_blocks(graph, changed)


def with_kv_cache(graph: ModelGraph, dtype: Any = FLOAT8_E4M3FN, only: int | None = None) -> ModelGraph:
    scales = [array(np.array(value, np.float32)) for value in (0.011, 0.007)]

    def cached(block: Any, index: int) -> Any:
        if block.attention is None or (only is not None and index != only):
            return block
        cache = KVQuantization(dtype=dtype, k_scale=scales[0], v_scale=scales[1])
        return replace(block, attention=replace(block.attention, kv_quantization=cache))

    return map_blocks(graph, cached)


def with_recipe(graph: ModelGraph, **tables: Any) -> ModelGraph:
    return quantize_linears(graph, QuantizationRecipe.model_validate(tables))


INT8_TOKEN: dict[str, Any] = {
    "weights": {"dtype": "int8", "scale": "row"}, "inputs": {"dtype": "int8", "scale": "token"},
}  # fmt: skip
FP8_TOKEN: dict[str, Any] = {
    "weights": {"dtype": "float8_e4m3fn", "scale": "row"}, "inputs": {"dtype": "float8_e4m3fn", "scale": "token"},
}  # fmt: skip

PLAIN = tiny_graph("AF AF", dtype="bfloat16")
FUSED = fuse_ffn(tiny_graph("AF F F AF", dtype="bfloat16"), [(1, 2)])

# format -> (scheme, its layout by default, ModelOpt's name, compressed-tensors' format)
FORMATS: dict[str, tuple[Scheme, str, str, str | None]] = {
    "fp8": (Scheme(FLOAT8_E4M3FN, "tensor", "tensor"), "modelopt", "FP8", "float-quantized"),
    "fp8-rowwise": (
        Scheme(FLOAT8_E4M3FN, "channel", "token"), "compressed-tensors", "FP8_PER_CHANNEL_PER_TOKEN", "float-quantized",
    ),
    "int8-smoothquant": (
        Scheme(INT8, "channel", "tensor"), "compressed-tensors", "W8A8_SQ_PER_CHANNEL", "int-quantized",
    ),
    "int8-weight-only": (Scheme(INT8, "channel", None), "modelopt", "W8A16", None),
}  # fmt: skip
COMPRESSED = [name for name, row in FORMATS.items() if row[3] is not None]
QUANTIZED = {name: quantized_graph(PLAIN, name) for name in [*FORMATS, "int8-smoothquant-token"]}


def header(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape), by the safetensors library."""
    with safe_open(folder / "model.safetensors", "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


# --- what is written


def test_every_format_has_its_scheme_and_default_layout() -> None:
    for name, (scheme, layout, _, _) in FORMATS.items():
        schemes = {scheme_of(linear) for linear in linear_names(QUANTIZED[name]).values()}
        assert schemes == {scheme, None}
        assert config_of(QUANTIZED[name], Options())["quantization_config"]["quant_method"] == layout


LINEARS = {
    "self_attn.q_proj": [64, 64], "self_attn.k_proj": [32, 64], "self_attn.v_proj": [32, 64],
    "self_attn.o_proj": [64, 64], "mlp.gate_proj": [256, 64], "mlp.up_proj": [256, 64], "mlp.down_proj": [64, 256],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "modelopt") for name in FORMATS), *((name, "compressed-tensors") for name in COMPRESSED)],
)
def test_names_shapes_and_dtypes(name: str, layout: str, tmp_path: Path) -> None:
    scheme = FORMATS[name][0]
    unit = [] if layout == "modelopt" else [1]
    expected: dict[str, tuple[str, list[int]]] = {}
    for layer in range(2):
        for linear, shape in LINEARS.items():
            stem = f"model.layers.{layer}.{linear}"
            expected[f"{stem}.weight"] = ("F8_E4M3" if scheme.codes == FLOAT8_E4M3FN else "I8", shape)
            expected[f"{stem}.weight_scale"] = ("F32", unit if scheme.weight == "tensor" else [shape[0], *unit])
            if scheme.input == "tensor":
                expected[f"{stem}.input_scale"] = ("F32", unit)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"model.layers.{layer}.{norm}.weight"] = ("BF16", [64])
    for stem, shape in {"model.embed_tokens": [320, 64], "model.norm": [64], "lm_head": [320, 64]}.items():
        expected[f"{stem}.weight"] = ("BF16", shape)
    folder = saved(QUANTIZED[name], tmp_path / "model", quantization_layout=layout)
    assert header(folder) == expected
    assert (folder / "hf_quant_config.json").exists() == (layout == "modelopt")


@pytest.mark.parametrize(
    ("layout", "names", "shape"),
    [
        ("modelopt", ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"), []),
        ("compressed-tensors", ("self_attn.k_scale", "self_attn.v_scale"), [1]),
    ],
)
def test_kv_cache_scales(layout: str, names: tuple[str, str], shape: list[int], tmp_path: Path) -> None:
    graph = with_kv_cache(quantized_graph(tiny_graph("AF F AF"), "fp8"))
    folder = saved(graph, tmp_path / "model", quantization_layout=layout)
    found = header(folder)
    added = {f"model.layers.{layer}.{name}" for layer in (0, 2) for name in names}
    assert {name for name in found if name.endswith((".k_scale", ".v_scale"))} == added
    assert all(found[name] == ("F32", shape) for name in added)
    assert list(differences(open_model(folder, need_weights=True).graph, graph)) == []


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kv_cache", [False, True])
def test_modelopt_configs(name: str, kv_cache: bool, tmp_path: Path) -> None:
    """As nvidia-modelopt 0.47.0 writes them; tests/peers holds them against the real ones."""
    quant_algo = FORMATS[name][2]
    graph = with_kv_cache(QUANTIZED[name]) if kv_cache else QUANTIZED[name]
    folder = saved(graph, tmp_path / "model", quantization_layout="modelopt")
    beside = json.loads((folder / "hf_quant_config.json").read_text())
    producer = beside.pop("producer")
    assert producer["name"] == "fuselage"
    excluded = ["lm_head", "model.embed_tokens"]
    assert beside == {
        "quantization": {
            "quant_algo": quant_algo, "kv_cache_quant_algo": "FP8" if kv_cache else None, "exclude_modules": excluded,
        }
    }  # fmt: skip
    group = {"input_activations": STATIC_FP8, "weights": STATIC_FP8, "targets": ["Linear"]}
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == {
        **({"config_groups": {"group_0": group}} if name == "fp8" else {}),
        "ignore": excluded,
        "quant_algo": quant_algo,
        **({"kv_cache_scheme": STATIC_FP8} if kv_cache else {}),
        "producer": producer,
        "quant_method": "modelopt",
    }


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_config(name: str) -> None:
    scheme, _, _, ct_format = FORMATS[name]
    kind = "float" if scheme.codes == FLOAT8_E4M3FN else "int"
    options = Options(quantization_layout="compressed-tensors")
    expected = {
        "quant_method": "compressed-tensors",
        "format": ct_format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": arguments(kind, scheme.weight),
                "input_activations": arguments(kind, str(scheme.input)),
            }
        },
    }
    assert config_of(QUANTIZED[name], options)["quantization_config"] == expected
    expected["kv_cache_scheme"] = arguments("float", "tensor")
    assert config_of(with_kv_cache(QUANTIZED[name]), options)["quantization_config"] == expected


def test_a_plain_model_stays_plain_and_a_fused_one_keeps_its_code() -> None:
    assert layout_of(QUANTIZED["fp8"], Options()) == "llama"
    fused = quantized_graph(FUSED, "fp8-rowwise")
    assert layout_of(fused, Options()) == NEMOTRON_NAS
    assert {"modeling_decilm.py", "configuration_decilm.py"} <= set(sizes_of(emit(fused, Options())))
    assert "quantization_config" not in config_of(PLAIN, Options(quantization_layout="modelopt"))


def test_linears_that_are_left_out_are_named() -> None:
    """By the numbers of the layers as written, which are not those of the graph's blocks."""
    graph = with_recipe(
        tiny_graph("AF - F AF"), **INT8_TOKEN, exclude=["blocks.2.ffn.down_proj", "blocks.3.attention.*"]
    )
    left_out = ["model.layers.1.mlp.down_proj", *(f"model.layers.2.self_attn.{x}_proj" for x in "qkvo")]
    assert config_of(graph, Options())["quantization_config"]["ignore"] == ["lm_head", *left_out]
    weight_only = with_recipe(
        tiny_graph("AF - F AF"),
        weights=INT8_TOKEN["weights"],
        exclude=["blocks.2.ffn.down_proj", "blocks.3.attention.*"],
    )
    excluded = config_of(weight_only, Options())["quantization_config"]["ignore"]
    assert excluded == sorted(["lm_head", "model.embed_tokens", *left_out])


MIXED = with_recipe(
    tiny_graph("AF F AF"),
    **INT8_TOKEN,
    exclude=["blocks.0.attention.*"],
    overrides=[{"match": "*.down_proj", **FP8_TOKEN}, {"match": "*.o_proj", **FP8_TOKEN}],
)


def test_several_schemes_are_groups_of_names() -> None:
    found = config_of(MIXED, Options())["quantization_config"]
    assert found["format"] == "mixed-precision"
    groups = found["config_groups"]
    assert [group["format"] for group in groups.values()] == ["int-quantized", "float-quantized"]
    assert groups["group_1"]["targets"] == [
        *(f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)),
        "model.layers.2.self_attn.o_proj",
        "model.layers.2.mlp.down_proj",
    ]
    names = [name for group in groups.values() for name in group["targets"]] + found["ignore"]
    assert sorted(names) == sorted(
        [
            "lm_head",
            *(f"model.layers.{layer}.{name}" for layer in (0, 1, 2) for name in LINEARS if layer != 1 or "mlp" in name),
        ]
    )


def test_scales_lie_behind_the_codes_they_are_found_with() -> None:
    """A scale per row is known once the codes were made: in this order a weight is read once."""
    reads = {"rows": 0}
    source = linear_names(PLAIN)["blocks.0.ffn.up_proj"].weight

    def counted(tensor: Any) -> np.ndarray:
        reads["rows"] += tensor.shape[0]
        return tensor.numpy()

    class Counting(type(source)):  # type: ignore[misc]
        def rows(self, start: int, stop: int) -> np.ndarray:
            reads["rows"] += stop - start
            return super().rows(start, stop)

    weight = Counting(source.numpy(), source.dtype)
    graph = with_linears(tiny_graph("F", dtype="bfloat16"), up_proj=lambda linear: replace(linear, weight=weight))
    content = next(c for n, c in emit(with_recipe(graph, **INT8_TOKEN), Options()) if n == "model.safetensors")
    for _ in content.chunks():  # type: ignore[union-attr]
        pass
    assert reads["rows"] == 256


# --- the way back

# id -> (graph, layout)
ROUND_TRIPS: dict[str, tuple[ModelGraph, str | None]] = {
    **{f"{name}, modelopt": (QUANTIZED[name], "modelopt") for name in FORMATS},
    **{f"{name}, compressed-tensors": (QUANTIZED[name], "compressed-tensors") for name in COMPRESSED},
    "int8 per token": (QUANTIZED["int8-smoothquant-token"], None),
    "fused": (quantized_graph(FUSED, "fp8"), None),
    "fused, int8": (quantized_graph(FUSED, "int8-smoothquant"), None),
    "padded to 256": (quantized_graph(tiny_graph("AF F", intermediate_size=[300, 256]), "int8-smoothquant"), None),
    "padded to 256, per tensor": (quantized_graph(tiny_graph("AF F", intermediate_size=[300, 256]), "fp8"), None),
    "biases": (quantized_graph(tiny_graph("AF F AF", qkv_bias=True, ffn_bias=True), "fp8-rowwise"), None),
    "qwen3": (quantized_graph(tiny_graph("AF AF", qk_norm=True, head_dim=32), "fp8"), None),
    "tied": (quantized_graph(tiny_graph("AF AF", tied=True), "fp8"), None),
    "linear replacements": (quantized_graph(tiny_graph("AF LF AL"), "fp8-rowwise"), None),
    "some linears": (with_recipe(tiny_graph("AF F"), **FP8_TOKEN, exclude=["blocks.0.*", "*.up_proj"]), None),
    "some linears, modelopt": (with_recipe(tiny_graph("AF F"), **FP8_TOKEN, exclude=["blocks.0.*"]), "modelopt"),
    "several schemes": (MIXED, None),
}  # fmt: skip


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_round_trip(case: str, tmp_path: Path) -> None:
    graph, layout = ROUND_TRIPS[case]
    family = "qwen3" if case == "qwen3" else "llama"
    options = Options(quantization_layout=layout, family=family)
    assert check(graph, options) == []
    folder = saved(graph, tmp_path / "model", quantization_layout=layout, family=family)
    checkpoint = open_model(folder, need_weights=True)
    expected = as_written(graph) if layout_of(graph, options) == NEMOTRON_NAS else graph
    assert list(differences(checkpoint.graph, expected)) == []
    # Writing what was read changes nothing any more.
    kept = layout_to_keep(checkpoint.graph, checkpoint.quantization_layout)
    again = saved(
        checkpoint.graph, tmp_path / "again", quantization_layout=kept, family=checkpoint.family.name,
        config=checkpoint.config,
    )  # fmt: skip
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("name", ["fp8", "fp8-rowwise"])
def test_what_is_made_of_a_folder_keeps_its_layout(name: str, layout: str, tmp_path: Path) -> None:
    checkpoint = open_model(saved(QUANTIZED[name], tmp_path / "model", quantization_layout=layout), need_weights=True)
    writing = checkpoint_writing(checkpoint, drop_attention(checkpoint.graph, [1]), tmp_path / "out", details={})
    assert json.loads(bytes(writing.files["config.json"]))["quantization_config"]["quant_method"] == layout


def test_a_layout_without_a_word_for_a_graph_is_not_kept() -> None:
    assert layout_to_keep(QUANTIZED["int8-weight-only"], "compressed-tensors") is None
    assert layout_to_keep(MIXED, "modelopt") is None
    assert layout_to_keep(QUANTIZED["fp8"], None) is None


def test_rows_of_padding_are_codes_zero_under_scale_one() -> None:
    graph = quantized_graph(tiny_graph("AF F", intermediate_size=[300, 256]), "int8-smoothquant")
    ffn = as_written(graph).flat_blocks[0].ffn
    for linear in (ffn.gate_proj, ffn.up_proj):
        assert not linear.weight.numpy()[300:].any()
        assert (linear.quantization.weight_scale.numpy()[300:] == 1).all()
    assert not ffn.down_proj.weight.numpy()[:, 300:].any()


def test_structure_alone(tmp_path: Path) -> None:
    """config.json says which linears are quantized; sizes then count codes and scales."""
    for layout in ("modelopt", "compressed-tensors"):
        folder = saved(QUANTIZED["fp8"], tmp_path / layout, quantization_layout=layout)
        full = open_model(folder, need_weights=True).graph
        structure = open_model(folder / "config.json", need_weights=False).graph
        assert not structure.has_bytes
        assert structure.weight_bytes == full.weight_bytes == QUANTIZED["fp8"].weight_bytes
        options = Options(quantization_layout=layout)
        assert sizes_of(emit(structure, options)) == sizes_of(emit(full, options))


# --- what is refused

SMALL = quantized_graph(tiny_graph("AF F"), "fp8")


def other_input_scale(linear: Linear) -> Linear:
    assert linear.quantization is not None
    inputs = InputQuantization(dtype=linear.weight.dtype, scale=array(np.array(0.5, np.float32)))
    return replace(linear, quantization=replace(linear.quantization, input=inputs))


def int8_input(linear: Linear) -> Linear:
    assert linear.quantization is not None
    return replace(linear, quantization=replace(linear.quantization, input=InputQuantization(dtype=INT8, scale=None)))


REFUSED: dict[str, tuple[ModelGraph, str | None, list[tuple[int | None, str]]]] = {
    "unknown layout": (SMALL, "awq", [(None, "expected modelopt or compressed-tensors, found awq")]),
    "weight only in compressed-tensors": (
        QUANTIZED["int8-weight-only"],
        "compressed-tensors",
        [(0, "compressed-tensors folders do not have this quantization")],
    ),
    "per token in modelopt": (
        QUANTIZED["int8-smoothquant-token"],
        "modelopt",
        [(0, "found int8 weights per channel, inputs per token")],
    ),
    "several in modelopt": (
        with_recipe(
            tiny_graph("AF F"), weights=INT8_TOKEN["weights"], overrides=[{"match": "blocks.1.*", **FP8_TOKEN}]
        ),
        "modelopt",
        [(1, "a modelopt folder has one quantization for all linears")],
    ),
    "a mix that no layout has": (
        with_recipe(tiny_graph("AF F"), **INT8_TOKEN, overrides=[{"match": "blocks.1.*", "inputs": "none"}]),
        None,
        [(1, "found int8 weights per channel, inputs as they are")],
    ),
    "lm_head": (
        with_recipe(tiny_graph("AF"), **INT8_TOKEN, include=["lm_head"]),
        None,
        [(None, "a quantized lm_head cannot be expressed")],
    ),
    "input scales that differ": (
        with_linears(SMALL, k_proj=other_input_scale, up_proj=other_input_scale),
        None,
        [(0, "q_proj, k_proj, v_proj read one input"), (0, "gate_proj, up_proj read"), (1, "gate_proj, up_proj read")],
    ),
    "inputs of another dtype": (
        with_linears(quantized_graph(tiny_graph("AF F"), "fp8-rowwise"), down_proj=int8_input),
        None,
        [(0, "down_proj: a linear's weight and input"), (1, "expected float8_e4m3fn, found int8")],
    ),
    "a KV cache in some blocks": (
        with_kv_cache(quantized_graph(tiny_graph("AF F AF AF"), "fp8"), only=2),
        None,
        [(0, "the KV cache is quantized in all blocks or in none"), (3, "the KV cache")],
    ),
    "a KV cache of INT8": (with_kv_cache(SMALL, INT8), None, [(0, "expected float8_e4m3fn, found int8")]),
    "only a KV cache": (with_kv_cache(tiny_graph("AF F")), None, [(None, "needs quantized linears")]),
    "codes without scales": (
        with_linears(SMALL, down_proj=lambda linear: replace(linear, quantization=None)),
        None,
        [(0, "need a quantized format"), (1, "need a quantized format")],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    graph, layout, expected = REFUSED[case]
    options = Options(quantization_layout=layout)
    problems = check(graph, options)
    assert [problem.block for problem in problems] == [block for block, _ in expected]
    for problem, (_, text) in zip(problems, expected, strict=True):
        assert isinstance(problem, TargetError)
        assert text in str(problem)
    with pytest.raises(TargetError):
        emit(graph, options)


def test_checking_computes_no_scale_that_is_shared() -> None:
    """One object needs no look: looking at a scale of a weight would read the weight."""

    def never(*_: Any) -> np.ndarray:
        raise AssertionError("a scale was computed")

    scale = computed((), SMALL.lm_head.weight.dtype, never)  # type: ignore[union-attr]

    def with_scale(linear: Linear) -> Linear:
        inputs = InputQuantization(dtype=FLOAT8_E4M3FN, scale=scale)
        return replace(linear, quantization=Quantization(weight_scale=scale, input=inputs))

    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    graph = with_linears(SMALL, **dict.fromkeys(names, with_scale))
    assert check(graph, Options()) == []
    assert {p.reader.name for p in check_for(graph, Options(), READERS)} == {"transformers", "mlx-lm", "sglang"}
    sizes_of(emit(graph, Options()))


# --- who reads what

R, W = Severity.REJECTS, Severity.WRONG_RESULTS
CT, MO = COMPRESSED_TENSORS.name, MODELOPT.name

# (format, layout, plain) -> what the readers in `READERS` do with the folder; those that are not named take it.
MATRIX: dict[tuple[str, str, bool], dict[str, Severity]] = {
    ("fp8", MO, True): {"transformers": W, "mlx-lm": R},
    ("fp8", MO, False): {"transformers": W, "mlx-lm": R, "sglang": R},
    ("fp8", CT, True): {"tensorrt-llm": R, "llama.cpp": R, "mlx-lm": R},
    ("fp8", CT, False): {"tensorrt-llm": R, "llama.cpp": R, "mlx-lm": R},
    ("fp8-rowwise", MO, True): {"transformers": W, "mlx-lm": R, "sglang": R},
    ("fp8-rowwise", MO, False): {"transformers": W, "mlx-lm": R, "sglang": R},
    ("fp8-rowwise", CT, True): {"tensorrt-llm": R, "mlx-lm": R},
    ("fp8-rowwise", CT, False): {"tensorrt-llm": R, "mlx-lm": R},
    ("int8-smoothquant", MO, True): {"transformers": W, "mlx-lm": R, "vllm": R, "sglang": R, "tensorrt-llm": R},
    ("int8-smoothquant", CT, True): {"mlx-lm": R, "sglang": W, "tensorrt-llm": R, "llama.cpp": R},
    ("int8-smoothquant", CT, False): {"mlx-lm": R, "sglang": W, "tensorrt-llm": R, "llama.cpp": R},
    ("int8-smoothquant-token", CT, True): {"mlx-lm": R, "tensorrt-llm": W},
    ("int8-smoothquant-token", CT, False): {"mlx-lm": R, "tensorrt-llm": W},
    ("int8-weight-only", MO, True): {"transformers": W, "mlx-lm": R, "vllm": R, "sglang": R},
    ("int8-weight-only", MO, False): {"transformers": W, "mlx-lm": R, "vllm": R, "sglang": R},
}


def severities(graph: ModelGraph, layout: str | None) -> dict[str, Severity]:
    found = {}
    for problem in check_for(graph, Options(quantization_layout=layout), READERS):
        assert problem.hint
        found[problem.reader.name] = problem.severity
    return found


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_matrix_of_readers(case: tuple[str, str, bool]) -> None:
    name, layout, plain = case
    graph = QUANTIZED[name] if plain else quantized_graph(tiny_graph("AF F AF"), name)
    assert severities(graph, layout) == MATRIX[case]


def test_kv_caches_are_for_those_who_know_the_names() -> None:
    graph = quantized_graph(tiny_graph("AF AF"), "fp8-rowwise")
    added = {
        name: severities(with_kv_cache(graph), name).items() - severities(graph, name).items() for name in (MO, CT)
    }
    assert added == {MO: set(), CT: {("llama.cpp", R)}}


def test_several_schemes_and_gemms() -> None:
    assert severities(MIXED, None) == {"mlx-lm": R, "llama.cpp": R, "tensorrt-llm": W}
    torn = with_recipe(
        tiny_graph("AF F AF"), **INT8_TOKEN, exclude=["blocks.2.attention.k_proj", "blocks.1.ffn.up_proj"]
    )
    problems = [p for p in check_for(torn, Options(), READERS) if "quantized differently" in p.problem]
    assert {p.reader.name: (p.severity, p.found) for p in problems} == {
        "vllm": (R, "blocks 1-2"), "sglang": (R, "blocks 1-2"), "tensorrt-llm": (W, "blocks 1-2"),
    }  # fmt: skip


def test_scales_that_readers_would_make_one(tmp_path: Path) -> None:
    """ModelOpt leaves q, k and v scales of their own per tensor; so does a folder that it wrote, once it was read."""

    def other_scale(linear: Linear) -> Linear:
        assert linear.quantization is not None
        return replace(linear, quantization=replace(linear.quantization, weight_scale=array(np.array(1.5, np.float32))))

    equal = open_model(saved(SMALL, tmp_path / "equal"), need_weights=True).graph
    apart = open_model(saved(with_linears(SMALL, v_proj=other_scale), tmp_path / "apart"), need_weights=True).graph
    rule = "weight scales of their own"
    assert not [p for p in check_for(equal, Options(), READERS) if rule in p.problem]
    problems = [p for p in check_for(apart, Options(), READERS) if rule in p.problem]
    assert {p.reader.name: p.severity for p in problems} == {"vllm": W, "sglang": W, "tensorrt-llm": W}
    assert {p.found for p in problems} == {"block 0"}


def test_every_rule_fires_somewhere() -> None:
    graphs = [
        (QUANTIZED[name] if plain else quantized_graph(tiny_graph("AF F AF"), name), layout)
        for name, layout, plain in MATRIX
    ]
    graphs += [(with_kv_cache(QUANTIZED["fp8"]), CT), (MIXED, None)]
    texts = [
        p.problem for graph, layout in graphs for p in check_for(graph, Options(quantization_layout=layout), READERS)
    ]
    silent = {rule.problem for rule in QUANTIZATION_RULES if not any(f": {rule.problem}: " in text for text in texts)}
    assert silent == {  # these have tests of their own
        "q, k, v or gate, up quantized differently",
        "q, k, v or gate, up with weight scales of their own, per tensor",
    }
