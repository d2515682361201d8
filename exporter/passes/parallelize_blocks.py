"""Let consecutive full blocks run side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from exporter.errors import PlanError
from exporter.graph import ModelGraph, ParallelBlocks
from exporter.passes.find_blocks import blocks_of_range, check_disjoint, plain_block


def parallelize_blocks(graph: ModelGraph, groups: Sequence[tuple[int, int]]) -> ModelGraph:
    """Replace each group of consecutive blocks by y = x + sum_j (f_j(x) - x).

    Source: Bercovich et al., "FFN Fusion", arXiv:2503.18908, appendix B.

    Args:
        groups: source layers (first, last), both included, disjoint; at least two non-empty blocks each.

    Raises:
        PlanError: a rule above is broken; names the block.
    """
    check_disjoint(groups, "parallel groups")
    spans = sorted((blocks_of_range(graph, group) for group in groups), key=lambda span: span.start)
    blocks = list(graph.blocks)
    for span in reversed(spans):
        members = tuple(plain_block(graph, index) for index in span)
        busy = [block for block in members if not block.is_empty]
        if len(busy) < 2:
            raise PlanError(
                "a parallel group needs at least two blocks that do something",
                block=span.start,
                expected=">= 2",
                found=len(busy),
            )
        blocks[span.start : span.stop] = [ParallelBlocks(blocks=members)]
    return replace(graph, blocks=tuple(blocks))
