"""What `inspect` prints."""

from __future__ import annotations

from rich.console import Console

from exporter.passes.fuse_ffn import fuse_ffn
from exporter.summary import summary
from tests.tiny import tiny_graph


def test_every_kind_of_block_has_a_mark_without_colour() -> None:
    console = Console(width=100, no_color=True, force_terminal=False)
    with console.capture() as printed:
        console.print(summary(fuse_ffn(tiny_graph("AF F F F A - (AF AF) AF"), [range(1, 3)])))
    lines = printed.get().splitlines()
    assert "█▆▄▀·▓▓█" in lines
    assert "█ attention + FFN  ▄ FFN only  ▀ attention only  · empty  ▆ fused  ▓ parallel" in lines
