"""A model's structure for a terminal: totals, and the blocks as a table and a strip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from exporter.dtypes import DType
from exporter.graph import FFN, Attention, Block, ModelGraph, ParallelBlocks, linear_names


def summary(graph: ModelGraph) -> RenderableType:
    """Render totals, the strip (one character per block) and one table row per stretch of equal blocks."""
    legend = Text.assemble(
        ("█ attention + FFN  ▄ FFN only  ▀ attention only  · empty  ", "dim"),
        ("▆ fused  ", "magenta"),
        ("▓ parallel", "cyan"),
    )
    return Group(_totals(graph), Text(), _strip(graph), legend, Text(), _blocks(graph))


def change_text(before: ModelGraph, after: ModelGraph) -> str:
    """Say in one line what a plan made of a model."""
    figures = (
        ("sequential sublayers", before.sequential_sublayers, after.sequential_sublayers),
        ("blocks", len(before.flat_blocks), len(after.flat_blocks)),
        ("parameters", before.num_parameters, after.num_parameters),
    )
    return ", ".join(f"{name} {was:,} -> {now:,}" for name, was, now in figures)


def _totals(graph: ModelGraph) -> Table:
    table = Table.grid(padding=(0, 2))
    attentions = len(graph.attentions)
    ffns = sum(block.ffn is not None for block in graph.flat_blocks)
    for name, value in (
        ("parameters", _count(graph.num_parameters)),
        ("weights", f"{_size(graph.weight_bytes)} in {_dtypes(graph)}"),
        ("KV cache", f"{graph.kv_bytes_per_token(_kv_dtype(graph)):,} bytes per token in {_kv_dtype(graph)}"),
        ("sequential sublayers", f"{graph.sequential_sublayers} ({attentions} attention, {ffns} FFN)"),
        ("hidden size", f"{graph.hidden_size:,}"),
        ("vocabulary", f"{graph.vocab_size:,}" + (", embedding tied to lm_head" if graph.lm_head is None else "")),
        ("positions", f"{graph.max_position_embeddings:,}"),
    ):  # fmt: skip
        table.add_row(Text(name, style="dim"), value)
    return table


def _dtypes(graph: ModelGraph) -> str:
    """The dtypes of a graph's matrices, the one that holds most first."""
    sizes = Counter({graph.embedding.dtype.name: graph.embedding.size})
    for linear in linear_names(graph).values():
        sizes[linear.weight.dtype.name] += linear.weight.size
    return " and ".join(name for name, _ in sizes.most_common())


def _kv_dtype(graph: ModelGraph) -> DType:
    quantizations = {attention.kv_quantization for _, attention in graph.attentions}
    found = {graph.dtype if one is None else one.dtype for one in quantizations}
    return found.pop() if len(found) == 1 else graph.dtype


# Filled above: attention; filled below: FFN. Fused and parallel blocks have marks of their own: files have no colours.
_MARKS = {(True, True): "█", (False, True): "▄", (True, False): "▀", (False, False): "·"}


def _strip(graph: ModelGraph) -> Text:
    text = Text(no_wrap=False, overflow="fold")
    for entry in graph.blocks:
        if isinstance(entry, ParallelBlocks):
            text.append("▓" * len(entry.blocks), "cyan")
        elif _is_fused(entry):
            text.append("▆", "magenta")
        else:
            text.append(_MARKS[entry.attention is not None, entry.ffn is not None])
    return text


def _blocks(graph: ModelGraph) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("blocks")
    table.add_column("source layers")
    table.add_column("attention")
    table.add_column("FFN")
    for first, last, entries in _stretches(graph.blocks):
        layers = [layer for entry in entries for layer in entry.source_layers]
        for number, (attention, ffn) in enumerate(_described(entries[0])):
            table.add_row(
                "" if number else _range(first, last),
                "" if number else _range(min(layers), max(layers)),
                attention,
                ffn,
            )
    return table


def _stretches(
    entries: Sequence[Block | ParallelBlocks],
) -> Iterator[tuple[int, int, list[Block | ParallelBlocks]]]:
    """Yield (first index, last index, entries) for every stretch of entries that are described alike."""
    for _, group in groupby(enumerate(entries), key=lambda pair: _described(pair[1])):
        pairs = list(group)
        yield pairs[0][0], pairs[-1][0], [entry for _, entry in pairs]


def _described(entry: Block | ParallelBlocks) -> list[tuple[str, str]]:
    if isinstance(entry, ParallelBlocks):
        rows = [(_attention(block), _ffn(block)) for block in entry.blocks]
        return [(f"parallel: {attention}", ffn) for attention, ffn in rows]
    return [(_attention(entry), _ffn(entry))]


def _attention(block: Block) -> str:
    if isinstance(block.attention, Attention):
        window = f", window {block.attention.sliding_window}" if block.attention.sliding_window else ""
        return f"{block.attention.num_attention_heads} heads, {block.attention.num_key_value_heads} KV{window}"
    return "–" if block.attention is None else "linear"


def _ffn(block: Block) -> str:
    if not isinstance(block.ffn, FFN):
        return "–" if block.ffn is None else "linear"
    if not _is_fused(block):
        return f"{block.ffn.intermediate_size:,}"
    padding = f" + {block.ffn.padding} padding" if block.ffn.padding else ""
    stretches = [(width, len(list(group))) for width, group in groupby(segment.width for segment in block.ffn.segments)]
    parts = " + ".join(f"{width:,}" if count == 1 else f"{count} x {width:,}" for width, count in stretches[:8])
    more = f" + ... {len(block.ffn.segments)} in all" if len(stretches) > 8 else ""
    return f"{block.ffn.intermediate_size:,} fused from {parts}{more}{padding}"


def _is_fused(entry: Block | ParallelBlocks) -> bool:
    return isinstance(entry, Block) and isinstance(entry.ffn, FFN) and len(entry.ffn.segments) > 1


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _count(number: int) -> str:
    return f"{number / 1e9:.4g} billion" if number >= 1e8 else f"{number:,}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"
