"""Small random graphs for tests: `tiny_graph("AF F F AF")`.

Words of the pattern are blocks: `A` attention, `F` gated FFN, `L` in either place a linear sublayer, `-` empty;
so "AF" is a full block, "F" one without attention, "A" one without FFN, "LF" and "AL" linear replacements.
`(AF AF)` is a group of parallel blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from exporter.dtypes import BY_NAME
from exporter.graph import (
    FFN,
    Activation,
    Attention,
    Block,
    Linear,
    LinearSublayer,
    ModelGraph,
    ParallelBlocks,
    RMSNorm,
    Segment,
    linears,
    map_blocks,
)
from exporter.lazy import LazyTensor, array, cast, concat, slice_rows
from exporter.rope import Rope


def tiny_graph(
    pattern: str,
    *,
    hidden_size: int = 64,
    num_attention_heads: int = 4,
    num_key_value_heads: int | Sequence[int] = 2,
    head_dim: int | None = None,
    intermediate_size: int | Sequence[int] = 256,
    vocab_size: int = 320,
    activation: Activation = Activation.SILU,
    eps: float = 1e-5,
    rope: Rope | None = None,
    tied: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    ffn_bias: bool = False,
    qk_norm: bool = False,
    sliding_window: int | None = None,
    max_position_embeddings: int = 512,
    dtype: str = "float32",
    seed: int = 0,
) -> ModelGraph:
    """Build a graph; sequences of sizes are taken in turn by the blocks that have the sublayer."""
    rng = np.random.default_rng(seed)
    numpy_dtype = BY_NAME[dtype].numpy
    d = head_dim or hidden_size // num_attention_heads

    def weight(*shape: int) -> LazyTensor:
        values = (
            rng.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) == 2 else 0.1 * rng.standard_normal(shape)
        )
        return array(values.astype(numpy_dtype))

    def norm(size: int = hidden_size) -> RMSNorm:
        return RMSNorm(weight=array((1 + 0.2 * rng.standard_normal(size)).astype(numpy_dtype)), eps=eps)

    def linear(out: int, into: int, bias: bool = False) -> Linear:
        return Linear(weight=weight(out, into), bias=weight(out) if bias else None)

    counters = {"A": 0, "F": 0}

    def pick(sizes: int | Sequence[int], kind: str) -> int:
        counters[kind] += 1
        return sizes if isinstance(sizes, int) else sizes[(counters[kind] - 1) % len(sizes)]

    def attention() -> Attention:
        kv_heads = pick(num_key_value_heads, "A")
        return Attention(
            norm=norm(),
            q_proj=linear(num_attention_heads * d, hidden_size, qkv_bias),
            k_proj=linear(kv_heads * d, hidden_size, qkv_bias),
            v_proj=linear(kv_heads * d, hidden_size, qkv_bias),
            o_proj=linear(hidden_size, num_attention_heads * d, o_bias),
            num_attention_heads=num_attention_heads,
            num_key_value_heads=kv_heads,
            q_norm=norm(d) if qk_norm else None,
            k_norm=norm(d) if qk_norm else None,
            sliding_window=sliding_window,
        )

    def ffn(layer: int) -> FFN:
        width = pick(intermediate_size, "F")
        return FFN(
            norm=norm(),
            gate_proj=linear(width, hidden_size, ffn_bias),
            up_proj=linear(width, hidden_size, ffn_bias),
            down_proj=linear(hidden_size, width, ffn_bias),
            activation=activation,
            segments=(Segment(layer, width),),
        )

    def replacement() -> LinearSublayer:
        return LinearSublayer(norm=norm(), linear=linear(hidden_size, hidden_size))

    def block(word: str, layer: int) -> Block:
        first = {"A": attention, "L": replacement}.get(word[0])
        has_ffn = word in ("F", "AF", "LF")
        return Block(
            attention=first() if first else None,
            ffn=ffn(layer) if has_ffn else replacement() if word in ("AL", "LL") else None,
            source_layers=(layer,),
        )

    blocks: list[Block | ParallelBlocks] = []
    group: list[Block] | None = None
    for layer, word in enumerate(pattern.split()):
        if word.startswith("("):
            group = []
        made = block(word.strip("()"), layer)
        if group is None:
            blocks.append(made)
        else:
            group.append(made)
        if word.endswith(")") and group is not None:
            blocks.append(ParallelBlocks(blocks=tuple(group)))
            group = None
    return ModelGraph(
        embedding=weight(vocab_size, hidden_size),
        blocks=tuple(blocks),
        norm=norm(),
        lm_head=None if tied else linear(vocab_size, hidden_size),
        rope=rope or Rope(theta=10000.0),
        max_position_embeddings=max_position_embeddings,
    )


def with_dtypes(graph: ModelGraph, *names: str) -> ModelGraph:
    """The graph with these dtypes, in turn, of its linears' weights."""
    dtypes = itertools.cycle(BY_NAME[name] for name in names)

    def changed(sublayer: Any) -> Any:
        parts = linears(sublayer) if sublayer is not None else {}
        weights = {name: replace(linear, weight=cast(linear.weight, next(dtypes))) for name, linear in parts.items()}
        return replace(sublayer, **weights) if weights else sublayer

    return map_blocks(
        graph, lambda block, _: replace(block, attention=changed(block.attention), ffn=changed(block.ffn))
    )


def with_windows(graph: ModelGraph, *windows: int | None) -> ModelGraph:
    """The graph with these sliding windows, in the order of its attentions."""
    blocks = list(graph.flat_blocks)
    for (index, attention), window in zip(graph.attentions, windows, strict=True):
        blocks[index] = replace(blocks[index], attention=replace(attention, sliding_window=window))
    return replace(graph, blocks=tuple(blocks))


def quantized_graph(graph: ModelGraph, format_name: str, *, seed: int = 0) -> ModelGraph:
    """The graph in one of the formats of recipes/quantization, calibrated on random tokens and not smoothed."""
    from exporter.calibration import calibrate, ranges_of
    from exporter.passes.quantize_linears import quantize_linears
    from exporter.quantization import read_quantization

    tokens = np.random.default_rng(seed).integers(0, graph.vocab_size, (4, 64))
    ranges = ranges_of(calibrate(graph, tokens, text="random tokens"), graph)
    return quantize_linears(graph, read_quantization(format_name), ranges)


def with_twins(graph: ModelGraph) -> ModelGraph:
    """Give every token of the lower half of an even vocabulary a twin in the upper half, with the same logit."""
    assert graph.lm_head is not None
    lower = slice_rows(graph.lm_head.weight, 0, graph.vocab_size // 2)
    return replace(graph, lm_head=replace(graph.lm_head, weight=concat([lower, lower], axis=0)))
