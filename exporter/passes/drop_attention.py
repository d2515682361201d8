"""Remove attention sublayers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from exporter.errors import PlanError
from exporter.graph import ModelGraph
from exporter.passes.find_blocks import block_of_layer, plain_block


def drop_attention(graph: ModelGraph, layers: Collection[int]) -> ModelGraph:
    """Remove the attention (or the linear in its place) of the given source layers: f(x) = x + FFN(n2(x)).

    Args:
        layers: source layers, each with an attention of its own.

    Returns:
        A new graph; norm and weights of a dropped attention are gone with it.

    Raises:
        PlanError: a layer is not in the model, occurs twice, or has no attention to drop.
    """
    blocks = list(graph.blocks)
    if len(set(layers)) != len(layers):
        raise PlanError("a layer is listed twice in drop_attention", found=sorted(layers))
    for layer in layers:
        index = block_of_layer(graph, layer)
        block = plain_block(graph, index)
        if block.attention is None:
            raise PlanError(f"layer {layer} has no attention to drop", block=index)
        if len(block.source_layers) > 1:
            raise PlanError(f"layer {layer} is part of a fused block", block=index, found=block.source_layers)
        blocks[index] = replace(block, attention=None)
    return replace(graph, blocks=tuple(blocks))
