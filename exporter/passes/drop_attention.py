"""Remove attention sublayers."""

from __future__ import annotations

from collections.abc import Collection

from exporter.graph import ModelGraph
from exporter.passes.find_blocks import drop_sublayers


def drop_attention(graph: ModelGraph, layers: Collection[int]) -> ModelGraph:
    """Remove the attention (or the linear in its place) of the given source layers: f(x) = x + FFN(n2(x)).

    Args:
        layers: source layers, each with an attention of its own.

    Returns:
        A new graph; norm and weights of a dropped attention are gone with it.

    Raises:
        PlanError: a layer is not in the model, occurs twice, or has no attention to drop.
    """
    return drop_sublayers(graph, layers, "attention")
