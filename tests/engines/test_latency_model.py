"""The latency model against bytes and operations counted in the graph itself, and against brute force."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines.hardware import Gpu, read_gpus
from engines.latency_model import (
    PUBLISHED,
    Constants,
    Deployment,
    Tokens,
    cost_per_million_tokens,
    format_of_graph,
    largest_batch,
    largest_context,
    memory_per_gpu,
    number_format,
    predict,
    stages_of,
    structure_from_graph,
)
from exporter.dtypes import FLOAT16
from exporter.errors import EngineError
from exporter.graph import Attention, ModelGraph, linear_names
from exporter.quantization import format_names, read_quantization
from exporter.read import open_model
from tests.tiny import quantized_graph, tiny_graph

DATA = Path(__file__).parents[1] / "data"
GPUS = read_gpus()
CONSTANTS = Constants(memory_efficiency=0.5, sublayer_us=7, compute_efficiency=0.25)
FLOAT32 = number_format("float32", dtype="float32")


def gpu(**changes: object) -> Gpu:
    return GPUS["h100-sxm"].model_copy(update=changes)


def placed(tp_size: int = 1, **changes: object) -> Deployment:
    return Deployment(gpu=gpu(**changes), tp_size=tp_size, format=FLOAT32, constants=CONSTANTS)


MEMORY_BOUND = {"tflops": {"float32": 1e9}}
COMPUTE_BOUND = {"memory_gb_per_s": 1e9}
PATTERNS = ["AF AF", "AF F F AF", "A F - AF", "LF AL LL", "AF (AF AF) F", "(A F AF) -"]


def kv_elements(graph: ModelGraph) -> int:
    return sum(2 * part.num_key_value_heads * part.head_dim for _, part in graph.attentions)


def matrix_elements(graph: ModelGraph) -> int:
    """Of every linear and of the embedding that stands for a tied lm_head."""
    elements = sum(linear.weight.size for linear in linear_names(graph).values())
    return elements + (graph.embedding.size if graph.lm_head is None else 0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tied", [False, True])
def test_decode_that_memory_bounds(pattern: str, tied: bool) -> None:
    graph = tiny_graph(pattern, tied=tied)
    found = predict(structure_from_graph(graph), placed(**MEMORY_BOUND), Tokens.decode(3, 100))
    nbytes = 4 * (matrix_elements(graph) + 3 * kv_elements(graph) * (100 + 1))
    expected = nbytes / (0.5 * 3350e3) + 7 * graph.sequential_sublayers
    assert found.latency_us == pytest.approx(expected)
    assert found.tokens_per_s == pytest.approx(3e6 / expected)
    assert sum(found.parts_ms().values()) == pytest.approx(expected / 1000)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_that_compute_bounds(pattern: str) -> None:
    graph = tiny_graph(pattern)
    found = predict(structure_from_graph(graph), placed(**COMPUTE_BOUND), Tokens.prefill(2, 50))
    head = graph.embedding.size
    operations = 2 * 2 * (50 * (matrix_elements(graph) - head) + head)  # logits of the last token alone
    pairs = sum(position for position in range(1, 51))
    operations += sum(4 * part.num_attention_heads * part.head_dim * 2 * pairs for _, part in graph.attentions)
    expected = operations / (0.25 * 67e6) + 7 * graph.sequential_sublayers
    assert found.latency_us == pytest.approx(expected)
    assert not any(stage.is_memory_bound for stage in found.stages)


def test_the_larger_term_counts_stage_by_stage() -> None:
    structure = structure_from_graph(tiny_graph("AF AF"))
    # Operations per byte: of attention over a long cache about 1, of linears 32, in balance 8.
    deployment = placed(tflops={"float32": 8 * 3.35 * 0.5 / 0.25})
    found = predict(structure, deployment, Tokens.decode(64, 2000))
    assert {stage.stage.kind: stage.is_memory_bound for stage in found.stages} == {
        "attention": True,
        "ffn": False,
        "lm_head": False,
    }
    assert found.stages[1].total_us == pytest.approx(found.stages[1].compute_us + 7)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 7, 8, 20])
@pytest.mark.parametrize(("new", "context"), [(1, 1), (1, 7), (4, 4), (8, 8), (3, 10), (10, 10)])
def test_visible_positions(new: int, context: int, window: int | None) -> None:
    seen = [
        range(max(0, position - (window or context) + 1), position + 1) for position in range(context - new, context)
    ]
    tokens = Tokens(1, new, context)
    assert tokens.visible(window) == sum(len(positions) for positions in seen)
    assert tokens.held(window) == len(set().union(*seen))


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_shards_of_a_group(tp_size: int) -> None:
    """A GPU holds 1 / n of everything; of two key-value heads a whole one, where there are more GPUs than heads."""
    graph = tiny_graph("AF F", num_attention_heads=8, num_key_value_heads=2)
    stages = stages_of(structure_from_graph(graph), tp_size)
    copies = max(1, tp_size // 2)
    whole = {name: linear.weight.size for name, linear in linear_names(graph).items()}
    for linear in (linear for stage in stages for linear in stage.linears):
        factor = copies if linear.name.endswith(("k_proj", "v_proj")) else 1
        assert linear.size * tp_size == whole.pop(linear.name) * factor
    assert not whole
    assert stages[0].attentions[0].kv_heads == max(1, 2 // tp_size)


def test_heads_that_cannot_be_shared_out() -> None:
    with pytest.raises(EngineError, match="block 1: the tensor-parallel size divides the attention heads: expected a"):
        stages_of(structure_from_graph(tiny_graph("F AF")), 8)


def test_fusion_saves_fixed_time_alone() -> None:
    """Two FFNs in one: their bytes are the same, one sublayer's time and one all-reduce are gone."""
    structures = [
        structure_from_graph(tiny_graph(pattern, num_attention_heads=8, intermediate_size=width))
        for pattern, width in (("AF F", [256, 512]), ("AF", [768]))
    ]
    deployment = placed(8, **MEMORY_BOUND)
    # The second graph has lost an FFN of 256 in its first block, and gained 768 - 512 in the other: equal bytes.
    for batch in (1, 3000):  # with few bytes an all-reduce is all latency, with more it is not
        before, after = (predict(structure, deployment, Tokens.decode(batch, 10)) for structure in structures)
        all_reduce = deployment.gpu.all_reduce_us(8, 64 * 4 * batch)
        assert before.latency_us - after.latency_us == pytest.approx(7 + all_reduce)


def test_parallel_blocks_are_two_stages() -> None:
    together, apart = (structure_from_graph(tiny_graph(pattern)) for pattern in ("(AF AF AF)", "AF AF AF"))
    assert [stage.kind for stage in stages_of(together, 1)] == ["attention", "ffn", "lm_head"]
    assert [stage.reduced for stage in stages_of(together, 1)] == [3 * 64, 64, 0]
    tokens = Tokens.decode(1, 10)
    one, other = (predict(structure, placed(**MEMORY_BOUND), tokens).latency_us for structure in (apart, together))
    assert one - other == pytest.approx(4 * 7)


# --- Formats


@pytest.mark.parametrize("name", format_names())
def test_bytes_of_a_quantized_model(name: str) -> None:
    graph = tiny_graph("AF F AF", dtype="bfloat16")
    structure = structure_from_graph(graph)
    plain = Deployment(gpu=gpu(), tp_size=1, format=number_format("bfloat16", dtype="bfloat16"), constants=CONSTANTS)
    quantized = replace(plain, format=number_format(name, dtype="bfloat16"))
    saved = (
        memory_per_gpu(structure, plain, 1, 1).weight_bytes - memory_per_gpu(structure, quantized, 1, 1).weight_bytes
    )
    assert saved == matrix_elements(graph) - graph.embedding.size  # a byte per weight, lm_head left alone
    product = quantized.format.of_linear("blocks.0.ffn.up_proj")[1]
    inputs = read_quantization(name).inputs
    assert product.name == ("bfloat16" if inputs is None else inputs.dtype)
    cache = replace(quantized, format=quantized.format.with_kv_cache("fp8"))
    assert 2 * memory_per_gpu(structure, cache, 1, 64).kv_bytes == memory_per_gpu(structure, plain, 1, 64).kv_bytes


@pytest.mark.parametrize("name", ["fp8", "int8-smoothquant", "int8-weight-only"])
def test_the_format_that_a_graph_is_in(name: str) -> None:
    found = format_of_graph(quantized_graph(tiny_graph("AF F"), name))
    for linear in ("blocks.0.attention.q_proj", "lm_head"):
        assert found.of_linear(linear) == number_format(name, dtype="float32").of_linear(linear)
    assert format_of_graph(tiny_graph("AF", dtype="float16")).name == "float16"
    assert number_format("float16", dtype="float32").of_linear("lm_head") == (FLOAT16, FLOAT16)


def test_what_is_no_format() -> None:
    for name in ("fp7", "int8", "float8_e4m3fn"):
        with pytest.raises(EngineError, match=f"unknown number format: expected .*bfloat16, .*fp8.* found {name}"):
            number_format(name, dtype="bfloat16")
    structure = structure_from_graph(tiny_graph("AF"))
    old = Deployment(gpu=GPUS["a100-80gb"], tp_size=1, format=number_format("fp8", dtype="bfloat16"))
    with pytest.raises(EngineError, match="no matrix products in float8_e4m3fn"):
        predict(structure, old, Tokens.decode(1, 1))


# --- Memory


@pytest.mark.parametrize(
    "graph",
    [
        tiny_graph("AF F (AF AF) - AL"),
        tiny_graph("AF F", tied=True, dtype="bfloat16"),
        open_model(DATA / "nemotron-ultra-253b.structure.json", need_weights=False).graph,
        open_model(DATA / "nemotron-super-49b.structure.json", need_weights=False).graph,
        open_model(DATA / "llama-3.1-405b.config.json", need_weights=False).graph,
    ],
    ids=["tiny", "tied", "ultra", "super", "405b"],
)
def test_memory_is_what_the_graph_says(graph: ModelGraph) -> None:
    deployment = replace(placed(), format=number_format(graph.dtype.name, dtype=graph.dtype.name))
    found = memory_per_gpu(structure_from_graph(graph), deployment, batch=3, context=50)
    assert found.weight_bytes == graph.weight_bytes
    assert found.kv_bytes == 150 * graph.kv_bytes_per_token(graph.dtype)


def test_a_sliding_window_bounds_the_cache() -> None:
    graph = tiny_graph("AF", sliding_window=16)
    short, long = (memory_per_gpu(structure_from_graph(graph), placed(), 1, context) for context in (16, 400))
    assert short.kv_bytes == long.kv_bytes == 16 * graph.kv_bytes_per_token(graph.dtype)


@pytest.mark.parametrize("memory_mb", [0.1, 1.5, 2, 5, 20])
def test_the_largest_that_fits(memory_mb: float) -> None:
    structure = structure_from_graph(tiny_graph("AF F", max_position_embeddings=3000))
    deployment = placed(memory_gb=memory_mb / 1000)

    def fits(batch: int, context: int) -> bool:
        return memory_per_gpu(structure, deployment, batch, context).fits

    batch, context = largest_batch(structure, deployment, 100), largest_context(structure, deployment, 2)
    assert batch == max((n for n in range(1, 300) if fits(n, 100)), default=0)
    assert context == max((n for n in range(1, 3001) if fits(2, n)), default=0)


def test_cost() -> None:
    structure = structure_from_graph(tiny_graph("AF", num_attention_heads=8))
    deployment = placed(8)
    found = predict(structure, deployment, Tokens.decode(4, 10))
    hours = 1e6 / found.tokens_per_s / 3600
    assert cost_per_million_tokens(found, deployment, 2.5) == pytest.approx(2.5 * 8 * hours)


def test_sharding_shortens_and_batches_share() -> None:
    """What nobody would doubt, on a real structure: more GPUs are faster, a larger batch serves more."""
    graph = open_model(DATA / "nemotron-super-49b.structure.json", need_weights=False).graph
    assert isinstance(graph.attentions[0][1], Attention)
    structure = structure_from_graph(graph)
    fp8 = number_format("fp8", dtype="bfloat16")
    by_tp = [
        predict(structure, Deployment(gpu=GPUS["h100-sxm"], tp_size=n, format=fp8), Tokens.decode(1, 100)).latency_us
        for n in (1, 2, 4, 8)
    ]
    assert by_tp == sorted(by_tp, reverse=True)
    deployment = Deployment(gpu=GPUS["h100-sxm"], tp_size=8, format=fp8, constants=PUBLISHED)
    rates = [predict(structure, deployment, Tokens.decode(batch, 100)).tokens_per_s for batch in (1, 8, 64, 512)]
    assert rates == sorted(rates)
