"""TensorRT-LLM checkpoints: read back by an independent loader, at full size without weights, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.calibration import calibrate, ranges_of
from exporter.dtypes import FLOAT8_E4M3FN, FLOAT16, FLOAT32, INT8, DType
from exporter.errors import TargetError
from exporter.graph import (
    FFN,
    Activation,
    Attention,
    Block,
    KVQuantization,
    Linear,
    ModelGraph,
    Segment,
    linear_names,
    map_blocks,
)
from exporter.lazy import array, full
from exporter.lazy_quantized import dequantized
from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.passes.quantize_linears import quantize_linears, structure_quantized
from exporter.quantization import QuantizationRecipe, read_quantization, recipe_with
from exporter.read import open_model
from exporter.reference import Reference
from exporter.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from exporter.writers import hf
from exporter.writers.files import save_folder, sizes_of
from exporter.writers.trtllm import Options, check, emit, tensors_of_ranks
from exporter.writers.trtllm_config import read_checkpoint_manifest
from tests.exporter.writers.trtllm_loader import Assembled, assembled, expected_tensors, load, logits
from tests.tiny import quantized_graph, tiny_graph, with_dtypes

DATA = Path(__file__).parents[2] / "data"
TOKENS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
HEADS = {"num_attention_heads": 8, "hidden_size": 64, "head_dim": 16}


def fused(pattern: str, run: tuple[int, int], **sizes: Any) -> ModelGraph:
    graph = tiny_graph(pattern, **sizes)
    return fuse_ffn(drop_attention(graph, range(run[0], run[1] + 1)), [run])


# id -> (graph, tp and pp sizes)
GRAPHS: dict[str, tuple[ModelGraph, list[tuple[int, int]]]] = {
    "llama": (tiny_graph("AF AF", **HEADS, num_key_value_heads=8), [(1, 1), (2, 1), (4, 2), (8, 1)]),
    "kv heads < tp": (tiny_graph("AF AF", **HEADS, num_key_value_heads=[2, 1]), [(1, 2), (4, 1), (8, 2)]),
    "odd vocabulary": (tiny_graph("AF", **HEADS, vocab_size=307), [(2, 1), (4, 1), (8, 1)]),
    "tied": (tiny_graph("AF", **HEADS, vocab_size=307, tied=True), [(4, 1)]),
    "dropped attention": (tiny_graph("AF F AF F", **HEADS, intermediate_size=[128, 256]), [(2, 1), (2, 2)]),
    "fused": (fused("AF AF AF AF", (1, 2), **HEADS), [(1, 1), (4, 1), (8, 1)]),
    "no FFN": (tiny_graph("A AF A", **HEADS), [(2, 1), (2, 3)]),
    "linear replacements": (tiny_graph("AF LF AL LL", **HEADS), [(2, 1), (8, 1)]),
    "empty blocks": (tiny_graph("- AF - F AF -", **HEADS), [(2, 1), (2, 2)]),
    "parallel blocks": (tiny_graph("AF (AF F) (AF - AF) (- AF) -", **HEADS), [(1, 1), (2, 1), (8, 1), (2, 2)]),
    "stages of 3 and 2": (tiny_graph("AF F F AF AF", **HEADS), [(1, 2), (2, 2)]),
    "float16": (tiny_graph("AF F", **HEADS, dtype="float16"), [(2, 1)]),
    "several dtypes": (with_dtypes(tiny_graph("AF F", **HEADS), "float32", "bfloat16", "float16"), [(1, 1), (2, 1)]),
    "linear rope": (tiny_graph("AF", **HEADS, rope=Rope(theta=1e6, scaling=LinearScaling(factor=2.0))), [(2, 1)]),
    "llama3 rope, other eps": (tiny_graph("AF", **HEADS, rope=Rope(theta=5e5, scaling=LLAMA3), eps=1e-6), [(2, 1)]),
}  # fmt: skip


def saved(graph: ModelGraph, folder: Path, **options: Any) -> Path:
    """Written without the care of `save_folder`, which waits for the disk."""
    folder.mkdir()
    for name, content in emit(graph, Options(**options)):
        pieces = [content] if isinstance(content, bytes) else content.chunks()
        (folder / name).write_bytes(b"".join(bytes(piece) for piece in pieces))
    return folder


def reference(graph: ModelGraph) -> torch.Tensor:
    return Reference(graph).logits(TOKENS)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("case", "tp_size", "pp_size"), [(c, *m) for c, (_, sizes) in GRAPHS.items() for m in sizes])
def test_the_loader_computes_what_the_reference_does(case: str, tp_size: int, pp_size: int, tmp_path: Path) -> None:
    graph, _ = GRAPHS[case]
    dtype = FLOAT16 if case == "float16" else FLOAT32
    loaded = assembled(load(saved(graph, tmp_path / "out", tp_size=tp_size, pp_size=pp_size, dtype=dtype)))
    torch.testing.assert_close(logits(loaded, TOKENS), reference(graph), atol=2e-4, rtol=1e-4)
    assert_same_weights(loaded, graph, exact=True)


@pytest.mark.parametrize("vocab_size", [320, 307])
def test_the_embedding_can_be_split(vocab_size: int, tmp_path: Path) -> None:
    graph = tiny_graph("AF", **HEADS, vocab_size=vocab_size, tied=True)
    loaded = load(saved(graph, tmp_path / "out", tp_size=4, dtype=FLOAT32, split_embedding=True))
    torch.testing.assert_close(logits(assembled(loaded), TOKENS), reference(graph), atol=2e-4, rtol=1e-4)


def logical(graph: ModelGraph) -> dict[int, int]:
    """Index in flat_blocks -> number of the logical layer."""
    kept = [index for index, block in enumerate(graph.flat_blocks) if not block.is_empty]
    return {index: number for number, index in enumerate(kept)}


def values_of(graph: ModelGraph) -> dict[str, np.ndarray]:
    """Every linear's values in float32, by the loader's names."""
    numbers = logical(graph)
    found = {}
    for name, linear in linear_names(graph).items():
        if name == "lm_head":
            continue
        _, index, sublayer, role = name.split(".")
        ours = {"attention.linear": "linear_attn", "ffn.linear": "linear_mlp"}.get(f"{sublayer}.{role}", role)
        quantization = linear.quantization
        weight = linear.weight if quantization is None else dequantized(linear.weight, quantization.weight_scale)
        found[f"{numbers[int(index)]}.{ours}"] = weight.numpy().astype(np.float32)
    return found


def assert_same_weights(loaded: Assembled, graph: ModelGraph, *, exact: bool) -> None:
    expected = values_of(graph)
    assert set(expected) == {name for name in loaded.matrices if re.search("proj|linear", name)}
    for name, values in expected.items():
        found = loaded.matrices[name].numpy()
        if exact:
            np.testing.assert_array_equal(found, values, err_msg=name)
        else:
            np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-8, err_msg=name)


def test_bfloat16_travels_bit_by_bit(tmp_path: Path) -> None:
    graph = tiny_graph("AF F AF", **HEADS, dtype="bfloat16", vocab_size=307)
    loaded = load(saved(graph, tmp_path / "out", tp_size=4))
    assert loaded.config["dtype"] == "bfloat16"
    assert_same_weights(assembled(loaded), graph, exact=True)
    torch.testing.assert_close(logits(assembled(loaded), TOKENS), reference(graph), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("float64", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16")],
)
def test_the_network_has_a_dtype_that_engines_are_made_for(source: str, expected: str, tmp_path: Path) -> None:
    loaded = load(saved(tiny_graph("AF", **HEADS, dtype=source), tmp_path / "out"))
    assert loaded.config["dtype"] == expected


CUT = [256, 256]


@pytest.mark.parametrize(
    ("max_gemm_elements", "parts"),  # gate and up of width 1024 on one of two ranks: 1024 * 64 elements
    [
        (65536, {}),
        (65535, {"1": [512, 512]}),
        (32768, {"1": [512, 512]}),
        (30000, {"0": CUT, "1": [384, 384, 256], "2": CUT}),
        (1, {"0": [128] * 4, "1": [128] * 8, "2": [128] * 4}),  # no less than 64 channels on a rank
    ],
)
def test_a_matrix_beyond_the_limit_is_cut(max_gemm_elements: int, parts: Any, tmp_path: Path) -> None:
    graph = fused("AF AF AF AF", (1, 2), **HEADS, intermediate_size=512)  # one FFN of 1024, between two of 512
    folder = saved(graph, tmp_path / "out", tp_size=2, max_gemm_elements=max_gemm_elements, dtype=FLOAT32)
    loaded = load(folder)
    assert loaded.config["fuselage"]["ffn_parts"] == parts
    assert loaded.config["fuselage"]["model_class"] == ("FuselageForCausalLM" if parts else None)
    assert (folder / "models.py").exists() == bool(parts)
    torch.testing.assert_close(logits(assembled(loaded), TOKENS), reference(graph), atol=2e-4, rtol=1e-4)


# --- quantized

# format -> (largest relative error of the logits that rounding the weights alone makes, whether inputs are static)
FORMATS: dict[str, tuple[float, bool]] = {
    "fp8": (0.15, True),
    "fp8-rowwise": (0.15, False),
    "int8-smoothquant": (0.03, True),
    "int8-smoothquant-token": (0.03, False),
    "int8-weight-only": (0.03, False),
}
QUANTIZED = tiny_graph("AF AF (AF F)", **HEADS, num_key_value_heads=[8, 2, 1], intermediate_size=[128, 256, 512])
WEIGHT_ONLY = tiny_graph("AF F AF", hidden_size=256, num_attention_heads=8, head_dim=64, num_key_value_heads=4,
                         intermediate_size=512)  # fmt: skip


@cache
def quantized(weight_only: bool, name: str) -> ModelGraph:
    return quantized_graph(WEIGHT_ONLY if weight_only else QUANTIZED, name)


@pytest.mark.parametrize(("name", "tp_size", "pp_size"), [
    (name, tp_size, pp_size) for name in FORMATS for tp_size, pp_size in ((1, 1), (2, 2), (4, 1))
])  # fmt: skip
def test_quantized_weights_and_scales(name: str, tp_size: int, pp_size: int, tmp_path: Path) -> None:
    plain = WEIGHT_ONLY if name == "int8-weight-only" else QUANTIZED
    graph = quantized(plain is WEIGHT_ONLY, name)
    loaded = load(saved(graph, tmp_path / "out", tp_size=tp_size, pp_size=pp_size, dtype=FLOAT32))
    model = assembled(loaded)
    assert_same_weights(model, graph, exact=False)
    error, static = FORMATS[name]
    assert 1e-4 < relative(logits(model, TOKENS), reference(plain)) < error
    numbers = logical(graph)
    expected = {}
    for full_name, linear in linear_names(graph).items():
        if linear.quantization and linear.quantization.input and linear.quantization.input.scale is not None:
            _, index, _, role = full_name.split(".")
            expected[f"{numbers[int(index)]}.{role}"] = float(linear.quantization.input.scale.numpy())
    assert bool(expected) == static
    assert model.input_scales == pytest.approx(expected, rel=1e-6)


def test_scales_that_differ_within_a_gemm_become_the_largest(tmp_path: Path) -> None:
    """As in folders that others quantized: q, k and v have a scale each."""
    graph = quantized_graph(tiny_graph("AF", **HEADS), "fp8")

    def with_own_scales(block: Any, index: int) -> Any:
        attention = block.attention
        changed = {}
        for factor, name in ((1.0, "q_proj"), (0.25, "k_proj"), (0.5, "v_proj")):
            linear = getattr(attention, name)
            scale = linear.quantization.weight_scale.numpy()
            scales = {"weight_scale": array(np.asarray(factor * scale, np.float32))}
            inputs = replace(linear.quantization.input, scale=array(np.asarray(2 * factor, np.float32)))
            changed[name] = replace(linear, quantization=replace(linear.quantization, **scales, input=inputs))
        return replace(block, attention=replace(attention, **changed))

    graph = map_blocks(graph, with_own_scales)
    model = assembled(load(saved(graph, tmp_path / "out", tp_size=2, dtype=FLOAT32)))
    assert model.input_scales["0.q_proj"] == 2.0
    for name, values in values_of(graph).items():
        found = model.matrices[name].numpy()
        # A power of two coarser: exact but for what falls below the smallest number of E4M3.
        np.testing.assert_allclose(found, values, atol=float(np.abs(values).max()) * 2**-9 / 8, err_msg=name)


@pytest.mark.parametrize("name", ["fp8", "int8-smoothquant"])
def test_gate_and_up_read_codes_of_one_scale(name: str, tmp_path: Path) -> None:
    """As in folders that others quantized: each has a scale of its own."""

    def with_own_scale(block: Any, index: int) -> Any:
        up = block.ffn.up_proj
        inputs = replace(up.quantization.input, scale=array(np.asarray(9.0, np.float32)))
        return replace(
            block, ffn=replace(block.ffn, up_proj=replace(up, quantization=replace(up.quantization, input=inputs)))
        )

    graph = map_blocks(quantized_graph(tiny_graph("AF", **HEADS), name), with_own_scale)
    model = assembled(load(saved(graph, tmp_path / "out", tp_size=2, dtype=FLOAT32)))
    assert model.input_scales["0.gate_proj"] == model.input_scales["0.up_proj"] == pytest.approx(9.0)
    assert_same_weights(model, graph, exact=False)


@pytest.mark.parametrize(("dtype", "k_amax", "expected"), [
    (INT8, 63.5, 0.5), (INT8, 12.7, 0.2), (FLOAT8_E4M3FN, 44.8, 1.0), (FLOAT8_E4M3FN, 896.0, 2.0),
])  # fmt: skip
def test_kv_cache_scales(dtype: DType, k_amax: float, expected: float, tmp_path: Path) -> None:
    largest = 127.0 if dtype == INT8 else 448.0
    kv = KVQuantization(
        dtype=dtype, k_scale=full((), k_amax / largest, FLOAT32), v_scale=full((), 25.4 / largest, FLOAT32)
    )
    graph = map_blocks(
        tiny_graph("AF F AF", **HEADS),
        lambda block, _: replace(block, attention=block.attention and replace(block.attention, kv_quantization=kv)),
    )
    loaded = load(saved(graph, tmp_path / "out", tp_size=2))
    assert loaded.config["quantization"]["kv_cache_quant_algo"] == {INT8: "INT8", FLOAT8_E4M3FN: "FP8"}[dtype]
    assert assembled(loaded).kv_scales == pytest.approx({0: expected, 2: expected})
    manifest = read_checkpoint_manifest(tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sizes == sizes_of(emit(graph, Options(tp_size=2)))
    assert manifest.ranks[0].kv_bytes_per_token == 2 * 2 * 1 * 16  # two layers, k and v, one head, one byte
    assert manifest.ranks[0].widest_gemm == 2 * 128  # half of the rows of gate and of up


@pytest.mark.parametrize(
    ("name", "exclude", "tp_size"),
    [
        ("fp8", ["blocks.1.ffn.*", "blocks.0.attention.o_proj"], 2),
        ("fp8", ["blocks.2.attention.*"], 2),
        ("fp8-rowwise", ["blocks.1.*", "blocks.2.attention.*"], 2),
        ("int8-weight-only", ["blocks.1.*", "blocks.2.attention.*"], 2),
    ],
)
def test_what_is_left_out_stays_as_it_is(name: str, exclude: list[str], tp_size: int, tmp_path: Path) -> None:
    plain = tiny_graph("AF LF AL", hidden_size=256, num_attention_heads=8, head_dim=32, intermediate_size=512)
    if name != "fp8":
        exclude = [*exclude, "*.linear"]
    recipe = recipe_with(read_quantization(name), exclude=exclude)
    ranges = ranges_of(calibrate(plain, TOKENS.numpy(), text="random"), plain)
    graph = quantize_linears(plain, recipe, ranges)
    model = assembled(load(saved(graph, tmp_path / "out", tp_size=tp_size, dtype=FLOAT32)))
    assert_same_weights(model, graph, exact=False)
    assert 1e-5 < relative(logits(model, TOKENS), reference(plain)) < 0.1


# --- full size


def full_size(name: str) -> ModelGraph:
    (path,) = DATA.glob(f"{name}.*.json")
    return open_model(path, need_weights=False).graph


def nominal(graph: ModelGraph, format_name: str, kv_cache: str | None = None) -> ModelGraph:
    return structure_quantized(graph, recipe_with(read_quantization(format_name), kv_cache=kv_cache))


@pytest.mark.parametrize(
    ("name", "format_name", "tp_size", "pp_size"),
    [
        ("llama-3.1-405b", "fp8", 8, 1),
        ("nemotron-ultra-253b", "int8-smoothquant-token", 8, 1),
        ("nemotron-super-49b", "fp8-rowwise", 2, 1),
        ("llama-3.3-70b", "int8-weight-only", 4, 2),
    ],
)
def test_full_size(name: str, format_name: str, tp_size: int, pp_size: int) -> None:
    graph = nominal(full_size(name), format_name, "fp8" if format_name == "fp8" else None)
    options = Options(tp_size=tp_size, pp_size=pp_size)
    if pp_size == 1:
        ((_, config), *_) = emit(graph, options)
        ranks = tensors_of_ranks(graph, options)
    else:
        tracemalloc.start()
        ((_, config), *_) = emit(graph, options)
        ranks = tensors_of_ranks(graph, options)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
        tracemalloc.stop()
    for rank, tensors in enumerate(ranks.values()):
        found = {name: (tensor.shape, getattr(torch, tensor.dtype.torch)) for name, tensor in tensors.items()}
        assert found == expected_tensors(json.loads(bytes(config)), rank)  # type: ignore[arg-type]
    matrices = expected_bytes(graph, tp_size)
    stored = sum(tensor.nbytes for tensors in ranks.values() for tensor in tensors.values())
    assert 0 < stored - matrices < 1e-3 * matrices  # norms and scales


def expected_bytes(graph: ModelGraph, tp_size: int) -> int:
    """Bytes of all matrices of all ranks, by hand: duplicated heads, the whole embedding on each rank of a stage."""
    D, V = graph.hidden_size, graph.vocab_size
    total = 2 * (tp_size * V * D + math.ceil(V / tp_size) * tp_size * D)
    for block in graph.flat_blocks:
        for part, widths in ((block.attention, 0), (block.ffn, 3)):
            if isinstance(part, Attention):
                heads, kv = part.num_attention_heads, max(part.num_key_value_heads, tp_size)
                elements, linear = D * part.head_dim * (2 * heads + 2 * kv), part.o_proj
            elif isinstance(part, FFN):
                elements, linear = widths * D * part.intermediate_size, part.down_proj
            else:
                continue
            is_codes = linear.quantization is not None and linear.quantization.input is not None
            total += elements * (1 if is_codes else 2)
    return total


def test_ultra_253b_fits_its_gpus_and_is_cut_where_it_would_not() -> None:
    graph = nominal(full_size("nemotron-ultra-253b"), "fp8")
    files = dict(emit(graph, Options(tp_size=8)))
    config = json.loads(bytes(files["config.json"]))  # type: ignore[arg-type]
    assert config["fuselage"] == {"model_class": None, "parallel_groups": [], "ffn_parts": {}}
    assert "models.py" not in files
    assert config["num_hidden_layers"] == 81  # the other half of 162 is empty
    assert max(layer["ffn"]["intermediate_size"] or 0 for layer in config["layer_configs"]) == 425_984
    # On four GPUs gate and up of the widest are 2 * 106,496 * 16,384 = 3.5e9 elements, beyond 32 bits.
    config = json.loads(bytes(dict(emit(graph, Options(tp_size=4)))["config.json"]))  # type: ignore[arg-type]
    assert config["fuselage"]["model_class"] == "FuselageForCausalLM"
    parts = config["fuselage"]["ffn_parts"]
    assert sorted(map(sum, parts.values())) == [301_056, 343_040, 399_360, 425_984]
    assert all(2 * width // 4 * 16_384 < 2**31 for widths in parts.values() for width in widths)


# --- streams


def test_ranks_read_their_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks together read every byte of a linear once; what all of them hold is read by each."""
    graph = tiny_graph("AF F F", hidden_size=256, num_attention_heads=8, num_key_value_heads=8, head_dim=512,
                       intermediate_size=4096)  # fmt: skip
    folder = tmp_path / "source"
    save_folder(folder, hf.emit(graph, hf.Options()), kind="checkpoint", details={})
    source = open_model(folder, need_weights=True).graph
    fused = fuse_ffn(source, [(1, 2)])
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: read.append(preadv(*arguments)) or read[-1])
    tp_size = 4
    for content in (file for name, file in emit(fused, Options(tp_size=tp_size)) if name.startswith("rank")):
        for _ in content.chunks():  # type: ignore[union-attr]
            pass
    in_every_rank = source.embedding.nbytes
    once = sum(linear.weight.nbytes for linear in linear_names(source).values())
    assert once + tp_size * in_every_rank <= sum(read) < 1.01 * (once + tp_size * in_every_rank)


def test_memory_does_not_grow_with_the_model() -> None:
    """A wide FFN, 384 MiB in float32, that nobody ever holds."""
    graph = tiny_graph("AF", hidden_size=64)
    wide = 1 << 19
    ffn = graph.flat_blocks[0].ffn
    assert isinstance(ffn, FFN)
    matrix = Linear(weight=full((wide, 64), 0.01, FLOAT32))
    ffn = replace(ffn, gate_proj=matrix, up_proj=matrix, down_proj=Linear(weight=full((64, wide), 0.01, FLOAT32)),
                  segments=(Segment(0, wide),))  # fmt: skip
    graph = map_blocks(graph, lambda block, _: replace(block, ffn=ffn))
    graph = quantize_linears(graph, read_quantization("fp8-rowwise"))
    files = dict(emit(graph, Options(tp_size=2, dtype=FLOAT32)))
    tracemalloc.start()
    written = sum(len(memoryview(piece).cast("B")) for piece in files["rank1.safetensors"].chunks())  # type: ignore
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert written > 47 << 20
    assert peak < 16 << 20


# --- what is refused

YARN = YarnScaling(factor=2.0, original_max_position_embeddings=64)
ROWS_BELOW = {
    "match": "*.down_proj",
    "weights": {"dtype": "float8_e4m3fn", "scale": "row"},
    "inputs": {"dtype": "float8_e4m3fn", "scale": "token"},
}


def biased(graph: ModelGraph) -> ModelGraph:
    return replace(graph, lm_head=Linear(weight=graph.embedding, bias=full((graph.vocab_size,), 0.0, FLOAT32)))


def with_kv(graph: ModelGraph, *dtypes: DType | None) -> ModelGraph:
    blocks = list(graph.flat_blocks)
    for (index, attention), dtype in zip(graph.attentions, dtypes, strict=True):
        one = full((), 1.0, FLOAT32)
        kv = None if dtype is None else KVQuantization(dtype=dtype, k_scale=one, v_scale=one)
        blocks[index] = replace(blocks[index], attention=replace(attention, kv_quantization=kv))
    return replace(graph, blocks=tuple(blocks))


def with_codes(block: Block) -> Block:
    """The block with an up_proj of codes that nothing says the scale of."""
    assert isinstance(block.ffn, FFN)
    return replace(block, ffn=replace(block.ffn, up_proj=Linear(weight=full(block.ffn.up_proj.weight.shape, 1, INT8))))


def in_format(graph: ModelGraph, name: str, *exclude: str, **tables: Any) -> ModelGraph:
    recipe = recipe_with(read_quantization(name), exclude=exclude)
    recipe = QuantizationRecipe.model_validate({**recipe.model_dump(exclude_none=True), **tables})
    return structure_quantized(graph, recipe)


AF2 = tiny_graph("AF AF", **HEADS)
# id -> (graph, options, words of the message)
REFUSED: dict[str, tuple[ModelGraph, dict[str, Any], list[str]]] = {
    "tp 0": (AF2, {"tp_size": 0}, ["tp_size", "at least 1"]),
    "heads": (AF2, {"tp_size": 3}, ["divide each other", "multiple of 2", "3"]),
    "query heads": (tiny_graph("AF", num_attention_heads=6, hidden_size=96), {"tp_size": 4}, ["attention heads", "6"]),
    "kv heads": (tiny_graph("AF", **{**HEADS, "num_attention_heads": 12}, num_key_value_heads=6), {"tp_size": 4},
                 ["divide each other", "6", "4"]),
    "width": (tiny_graph("AF", **HEADS, intermediate_size=100), {"tp_size": 8},
              ["block 0", "intermediate_size", "of 100"]),
    "linear": (tiny_graph("AF LF", **{**HEADS, "hidden_size": 36}), {"tp_size": 8}, ["hidden_size", "divisor of 36"]),
    "stages": (AF2, {"pp_size": 3}, ["more pipeline stages than blocks", "at most 2"]),
    "stage without attention": (tiny_graph("AF AF F F", **HEADS), {"pp_size": 2}, ["stage 1 of 2"]),
    "stage cuts a group": (tiny_graph("AF (AF AF) AF", **HEADS), {"pp_size": 2}, ["group", "[1, 2]"]),
    "no attention": (tiny_graph("F F"), {}, ["without attention"]),
    "dtype": (AF2, {"dtype": INT8}, ["dtype", "bfloat16", "int8"]),
    "biases": (tiny_graph("AF", qkv_bias=True), {}, ["q_proj has a bias"]),
    "lm_head bias": (biased(AF2), {}, ["lm_head"]),
    "codes without scales": (replace(AF2, embedding=full((320, 64), 1, INT8)), {},
                             ["need scales", "a float of 16+ bits", "int8"]),
    "linear without scales": (replace(AF2, blocks=(*AF2.blocks[:1], with_codes(AF2.flat_blocks[1]))), {},
                              ["block 1", "need scales", "int8"]),
    "q/k norms": (tiny_graph("AF", qk_norm=True), {}, ["query and key heads"]),
    "window": (tiny_graph("AF", sliding_window=8), {}, ["sliding window", "8"]),
    "gelu": (tiny_graph("AF", activation=Activation.GELU), {}, ["silu", "gelu"]),
    "yarn": (tiny_graph("AF", rope=Rope(theta=1e4, scaling=YARN)), {}, ["RoPE", "YarnScaling"]),
    "eps": (replace(AF2, norm=replace(AF2.norm, eps=1e-6)), {}, ["rms_norm_eps", "1e-05 as elsewhere"]),
    "format": (in_format(AF2, "fp8", inputs={"dtype": "float8_e4m3fn", "scale": "token"}), {},
               ["no engine with this quantization", "inputs per token"]),
    "two dtypes": (in_format(AF2, "int8-smoothquant", inputs={"dtype": "float8_e4m3fn", "scale": "tensor"}), {},
                   ["codes of one dtype", "int8"]),
    "an exclusion and a norm": (in_format(tiny_graph("AF AF", **HEADS, intermediate_size=[512, 256]), "fp8-rowwise",
                                "blocks.0.ffn.*"), {"pp_size": 2, "max_gemm_elements": 50000},
                                ["pipeline stage", "post_layernorm"]),
    "two formats": (in_format(AF2, "fp8", overrides=[ROWS_BELOW]), {}, ["block 0", "one quantization"]),
    "half a KV cache": (with_kv(AF2, INT8, None), {}, ["KV cache", "int8, found none", "Calibrate"]),
    "two KV caches": (with_kv(AF2, INT8, FLOAT8_E4M3FN), {}, ["KV cache", "int8, found float8_e4m3fn"]),
    "smoothquant leaves out": (in_format(AF2, "int8-smoothquant", "blocks.0.ffn.*"), {}, ["every linear", "block 0"]),
    "smoothquant of a linear": (in_format(tiny_graph("AF LF", **HEADS), "int8-smoothquant"), {}, ["linear in place"]),
    "half an FFN": (in_format(AF2, "fp8", "blocks.1.ffn.down_proj"), {}, ["as a whole", "block 1"]),
    "half a qkv": (in_format(AF2, "fp8", "blocks.1.attention.k_proj"), {}, ["as a whole", "block 1"]),
    "half an attention": (in_format(AF2, "fp8-rowwise", "*.o_proj"), {}, ["attention is quantized as a whole"]),
    "weight only of a linear": (in_format(tiny_graph("AF LF"), "int8-weight-only"), {}, ["linear in place"]),
    "fp8 alignment": (in_format(tiny_graph("AF", **HEADS, intermediate_size=200), "fp8"), {}, ["multiples of 16"]),
    "weight only alignment": (in_format(tiny_graph("AF", hidden_size=64, intermediate_size=192), "int8-weight-only"),
                              {"tp_size": 2}, ["multiples of 128", "64 * tp_size"]),
    "exclusion in one stage": (in_format(AF2, "fp8", "blocks.1.ffn.*"), {"pp_size": 2}, ["pipeline stage", "ffn.fc"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    graph, options, words = REFUSED[case]
    problems = check(graph, Options(**options))
    assert problems
    for word in words:
        assert word in str(problems[0]), str(problems[0])
    with pytest.raises(TargetError):
        emit(graph, Options(**options))


def test_different_heads_are_all_reported() -> None:
    graph = tiny_graph("AF AF AF", **HEADS)
    attention = tiny_graph("AF", hidden_size=64, num_attention_heads=4, head_dim=16).flat_blocks[0].attention
    graph = map_blocks(graph, lambda block, index: replace(block, attention=attention) if index == 1 else block)
    (problem,) = check(graph, Options())
    assert (problem.block, problem.found) == (1, "4")
