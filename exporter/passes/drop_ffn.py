"""Remove FFN sublayers."""

from __future__ import annotations

from collections.abc import Collection

from exporter.graph import ModelGraph
from exporter.passes.find_blocks import drop_sublayers


def drop_ffn(graph: ModelGraph, layers: Collection[int]) -> ModelGraph:
    """Remove the FFN (or the linear in its place) of the given source layers: f(x) = x + Attention(n1(x)).

    What fusing is compared with: removing a run saves one sublayer more, and the FFNs' work.

    Args:
        layers: source layers, each with an FFN of its own.

    Returns:
        A new graph; a block that has lost its attention too is empty and stays in its place.

    Raises:
        PlanError: a layer is not in the model, occurs twice, or has no FFN to drop.
    """
    return drop_sublayers(graph, layers, "ffn")
