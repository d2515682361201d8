"""What `inspect` prints."""

from __future__ import annotations

from rich.console import Console

from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.summary import change_text, summary
from tests.tiny import tiny_graph


def test_every_kind_of_block_has_a_mark_without_colour() -> None:
    console = Console(width=100, no_color=True, force_terminal=False)
    with console.capture() as printed:
        console.print(summary(fuse_ffn(tiny_graph("AF F F F A - (AF AF) AF"), [range(1, 3)])))
    lines = printed.get().splitlines()
    assert "█▆▄▀·▓▓█" in lines
    assert "█ attention + FFN  ▄ FFN only  ▀ attention only  · empty  ▆ fused  ▓ parallel" in lines


def test_the_widths_of_a_fused_ffn_are_counted() -> None:
    console = Console(width=100, no_color=True, force_terminal=False)
    with console.capture() as printed:
        console.print(summary(fuse_ffn(tiny_graph("AF F F F F"), [(1, 3)])))
    width = tiny_graph("F").flat_blocks[0].ffn.intermediate_size  # type: ignore[union-attr]
    assert f"{3 * width:,} fused from 3 x {width:,}" in printed.get()


def test_what_a_plan_changes_is_told_in_a_line() -> None:
    graph = tiny_graph("AF AF F (AF AF)")
    shorter = fuse_ffn(drop_attention(graph, [1]), [(1, 2)])
    saved = graph.num_parameters - shorter.num_parameters
    assert saved > 0
    assert change_text(graph, shorter) == (
        f"sequential sublayers 7 -> 5, blocks 5 -> 4, "
        f"parameters {graph.num_parameters:,} -> {graph.num_parameters - saved:,}"
    )
