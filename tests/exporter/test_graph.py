"""Invariants of the graph types, and what they derive."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exporter.dtypes import BFLOAT16, FLOAT32, INT8, DType
from exporter.errors import GraphError
from exporter.graph import (
    FFN,
    Attention,
    Block,
    Linear,
    LinearSublayer,
    ModelGraph,
    ParallelBlocks,
    Quantization,
    RMSNorm,
    Segment,
    structure,
)
from exporter.lazy import LazyTensor, shape_only
from tests.tiny import quantized_graph, tiny_graph


def matrix(*shape: int) -> LazyTensor:
    return shape_only(shape, FLOAT32)


def codes(*scale: int, dtype: DType = INT8) -> Linear:
    return Linear(weight=shape_only((3, 2), dtype), quantization=Quantization(weight_scale=matrix(*scale)))


def norm(size: int) -> RMSNorm:
    return RMSNorm(weight=matrix(size), eps=1e-5)


def attention(**changes: object) -> Attention:
    block = tiny_graph("AF").flat_blocks[0]
    assert isinstance(block.attention, Attention)
    return replace(block.attention, **changes)


def ffn(**changes: object) -> FFN:
    block = tiny_graph("AF").flat_blocks[0]
    assert isinstance(block.ffn, FFN)
    return replace(block.ffn, **changes)


def graph(**changes: object) -> ModelGraph:
    return replace(tiny_graph("AF AF"), **changes)


BROKEN = {
    "linear_rank": (lambda: Linear(weight=matrix(3)), "a linear weight is a matrix"),
    "bias": (lambda: Linear(weight=matrix(3, 2), bias=matrix(2)), r"bias fits its weight: expected \[3\], found \[2\]"),
    "codes": (lambda: codes(dtype=BFLOAT16), "quantized weight is codes"),
    "weight_scale": (lambda: codes(2), r"weight scale fits its weight: expected \[\] or \[3\], found \[2\]"),
    "kv_heads": (lambda: attention(num_key_value_heads=3), "divide the attention heads"),
    "no_heads": (lambda: attention(num_attention_heads=0), "divide the attention heads"),
    "no_kv_heads": (lambda: attention(num_key_value_heads=0), "divide the attention heads"),
    "head_dim": (lambda: attention(num_attention_heads=5, num_key_value_heads=5), "head_dim"),
    "odd_head_dim": (lambda: attention(num_attention_heads=64, num_key_value_heads=64), "head_dim"),
    "k_proj": (
        lambda: attention(k_proj=Linear(weight=matrix(16, 64))),
        r"k_proj .*expected \[32, 64\], found \[16, 64\]",
    ),
    "v_proj": (lambda: attention(v_proj=Linear(weight=matrix(16, 64))), r"v_proj .*expected \[32, 64\]"),
    "o_proj": (lambda: attention(o_proj=Linear(weight=matrix(64, 32))), r"o_proj .*expected \[64, 64\]"),
    "attention_norm": (lambda: attention(norm=norm(16)), r"attention norm .*expected \[64\], found \[16\]"),
    "q_norm": (lambda: attention(q_norm=norm(64)), r"q_norm .*expected \[16\], found \[64\]"),
    "k_norm": (lambda: attention(k_norm=norm(64)), r"k_norm .*expected \[16\], found \[64\]"),
    "window": (lambda: attention(sliding_window=0), "sliding window"),
    "down": (lambda: ffn(down_proj=Linear(weight=matrix(64, 255))), r"down_proj .*expected \[64, 256\]"),
    "up": (lambda: ffn(up_proj=Linear(weight=matrix(255, 64))), r"up_proj .*expected \[256, 64\]"),
    "ffn_norm": (lambda: ffn(norm=norm(256)), r"FFN norm .*expected \[64\], found \[256\]"),
    "linear_is_square": (lambda: LinearSublayer(norm=norm(3), linear=Linear(weight=matrix(3, 2))), "linear has the"),
    "linear_norm": (lambda: LinearSublayer(norm=norm(2), linear=Linear(weight=matrix(3, 3))), "norm has the wrong"),
    "segments": (lambda: ffn(segments=(Segment(0, 257),)), "segments fit the FFN"),
    "no_segment": (lambda: ffn(segments=()), "segments fit the FFN"),
    "empty_segment": (lambda: ffn(segments=(Segment(0, 256), Segment(1, 0))), "segments fit the FFN"),
    "descending": (lambda: Block(attention=None, ffn=None, source_layers=(2, 1)), "ascending and not empty"),
    "source_layers": (lambda: Block(attention=None, ffn=ffn(), source_layers=(1,)), "segments come from"),
    "no_source": (lambda: Block(attention=None, ffn=None, source_layers=()), "ascending and not empty"),
    "group_of_one": (lambda: ParallelBlocks(blocks=tiny_graph("AF").flat_blocks), "at least two blocks"),
    "repeated_layer": (lambda: graph(blocks=tiny_graph("AF").blocks * 2), "belongs to one block"),
    "hidden_size": (lambda: graph(blocks=tiny_graph("AF", hidden_size=32).blocks), r"block 0: .*expected 64, found 32"),
    "embedding": (lambda: graph(embedding=matrix(320)), "embedding is a matrix"),
    "final_norm": (lambda: graph(norm=norm(32)), r"final norm .*expected \[64\], found \[32\]"),
    "no_positions": (lambda: graph(max_position_embeddings=0), "max_position_embeddings is positive"),
    "lm_head": (lambda: graph(lm_head=Linear(weight=matrix(319, 64))), "lm_head has the wrong shape"),
    "head_dims": (
        lambda: graph(blocks=(tiny_graph("AF").blocks[0], tiny_graph("- AF", head_dim=32).blocks[1])),
        "one head_dim",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_invariant_is_refused_at_construction(case: str) -> None:
    make, message = BROKEN[case]
    with pytest.raises(GraphError, match=message):
        make()


def test_numbers_of_a_mixed_graph() -> None:
    mixed = tiny_graph("AF F - (AF A) LF", num_key_value_heads=[2, 4, 1], intermediate_size=[256, 128], tied=True)
    assert mixed.sequential_sublayers == 2 + 1 + 0 + 2 + 2
    assert mixed.kv_slots == {0: 0, 3: 1, 4: 2}
    assert mixed.kv_bytes_per_token(BFLOAT16) == 2 * (2 + 4 + 1) * 16 * 2
    attention_parameters = sum(64 + 2 * 64 * 64 + 2 * 64 * kv * 16 for kv in (2, 4, 1))
    ffn_parameters = sum(64 + 3 * 64 * width for width in (256, 128, 256, 128))
    assert mixed.num_parameters == 320 * 64 + 64 + attention_parameters + ffn_parameters + (64 + 64 * 64)
    coded = quantized_graph(mixed, "fp8")
    assert coded.num_parameters == mixed.num_parameters
    assert coded.weight_bytes < mixed.weight_bytes
    described = structure(mixed)
    assert described["blocks"][2] == {"source_layers": [2], "attention": None, "ffn": None}
    assert described["blocks"][3]["parallel"][1]["attention"]["num_key_value_heads"] == 1
    assert described["blocks"][4]["attention"] == {"kind": "linear"}
