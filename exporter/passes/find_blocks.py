"""What passes share: where source layers are in a graph, and dropping one of a block's sublayers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from exporter.errors import PlanError
from exporter.graph import Block, ModelGraph, ParallelBlocks


def block_of_layer(graph: ModelGraph, layer: int) -> int:
    """Index in `graph.blocks` of the block that holds a source layer.

    Raises:
        PlanError: no block does.
    """
    for index, entry in enumerate(graph.blocks):
        if layer in entry.source_layers:
            return index
    layers = [layer for entry in graph.blocks for layer in entry.source_layers]
    is_gap = min(layers) < layer < max(layers)
    raise PlanError(
        f"layer {layer} is not in the model",
        expected=f"a layer from {min(layers)} to {max(layers)}",
        found=layer,
        hint="nothing was left of it when the model was written: leave it out of the plan" if is_gap else None,
    )


def blocks_of_range(graph: ModelGraph, layers: tuple[int, int]) -> range:
    """Indices of the blocks that hold the source layers `first` to `last`, both included.

    Raises:
        PlanError: the range is empty or leaves the model, or cuts through a block that holds several layers; or the
            model's blocks are not in the order of their layers, which a folder's config may say.
    """
    first, last = layers
    if first > last:
        raise PlanError("a range goes from its lower to its higher layer", found=[first, last])
    check_order(graph)
    indices = range(block_of_layer(graph, first), block_of_layer(graph, last) + 1)
    held = {layer for index in indices for layer in graph.blocks[index].source_layers}
    if min(held) < first or max(held) > last:
        raise PlanError(
            f"range [{first}, {last}] cuts through a block of several layers",
            expected=f"[{min(held)}, {max(held)}]",
            found=[first, last],
        )
    return indices


def check_order(graph: ModelGraph) -> None:
    """Raise PlanError unless the layers are in order: ranges of layers mean what they say only there."""
    layers = [layer for entry in graph.blocks for layer in entry.source_layers]
    for before, after in pairwise(layers):
        if after < before:
            raise PlanError("blocks are not in the order of their source layers", found=f"{after} after {before}")


def plain_block(graph: ModelGraph, index: int) -> Block:
    """Entry `index` of a graph, which must not be a parallel group (PlanError)."""
    entry = graph.blocks[index]
    if isinstance(entry, ParallelBlocks):
        raise PlanError("the block is a parallel group already", block=index, found=f"layers {entry.source_layers}")
    return entry


def drop_sublayers(graph: ModelGraph, layers: Collection[int], sublayer: Literal["attention", "ffn"]) -> ModelGraph:
    """Remove one sublayer of each of the given source layers, with its norm and weights.

    Raises:
        PlanError: a layer is not in the model, occurs twice, or has no such sublayer of its own to drop.
    """
    blocks = list(graph.blocks)
    if len(set(layers)) != len(layers):
        raise PlanError(f"a layer is listed twice in drop_{sublayer}", found=sorted(layers))
    name = {"attention": "attention", "ffn": "FFN"}[sublayer]
    for layer in layers:
        index = block_of_layer(graph, layer)
        block = plain_block(graph, index)
        if getattr(block, sublayer) is None:
            raise PlanError(f"layer {layer} has no {name} to drop", block=index)
        if len(block.source_layers) > 1:
            raise PlanError(f"layer {layer} is part of a fused block", block=index, found=block.source_layers)
        blocks[index] = replace(block, attention=None) if sublayer == "attention" else replace(block, ffn=None)
    return replace(graph, blocks=tuple(blocks))


def check_disjoint(ranges: Iterable[tuple[int, int]], what: str) -> None:
    """Raise PlanError if two of the ranges share a layer."""
    ordered = sorted(ranges)
    for (first, last), (next_first, next_last) in pairwise(ordered):
        if next_first <= last:
            raise PlanError(f"{what} overlap", found=f"[{first}, {last}] and [{next_first}, {next_last}]")
