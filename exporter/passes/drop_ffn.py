"""Remove FFN sublayers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from exporter.errors import PlanError
from exporter.graph import ModelGraph
from exporter.passes.find_blocks import block_of_layer, plain_block


def drop_ffn(graph: ModelGraph, layers: Collection[int]) -> ModelGraph:
    """Remove the FFN (or the linear in its place) of the given source layers: f(x) = x + Attention(n1(x)).

    Fusing is held against this, which saves one sublayer more per run and the FFNs' work with it.

    Args:
        layers: source layers, each with an FFN of its own.

    Returns:
        A new graph; a block that has lost its attention too is empty and stays in its place.

    Raises:
        PlanError: a layer is not in the model, occurs twice, or has no FFN to drop.
    """
    blocks = list(graph.blocks)
    if len(set(layers)) != len(layers):
        raise PlanError("a layer is listed twice in drop_ffn", found=sorted(layers))
    for layer in layers:
        index = block_of_layer(graph, layer)
        block = plain_block(graph, index)
        if block.ffn is None:
            raise PlanError(f"layer {layer} has no FFN to drop", block=index)
        if len(block.source_layers) > 1:
            raise PlanError(f"layer {layer} is part of a fused block", block=index, found=block.source_layers)
        blocks[index] = replace(block, ffn=None)
    return replace(graph, blocks=tuple(blocks))
