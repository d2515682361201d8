"""Where each sublayer of a model is drawn: one column per block, as plain rectangles that SVG and PNG both render.

From top to bottom of a column: the FFN as a bar that grows up from an axis, its height proportional to
intermediate_size; below the axis a band for the attention, query heads with the key-value heads as its darker part;
the source layers' numbers. Coordinates are pixels, y downwards, one scale for all models drawn together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.architectures.base import WIDTH_MULTIPLE
from exporter.structure import AttentionShape, BlockShape, FFNShape, ParallelShape, Structure

TARGET_WIDTH = 960.0  # what the widest model should take
COLUMN_WIDTHS = (6.0, 60.0)  # least, most
FULL_TICKS_FROM = 26.0  # columns at least this wide all get a number
WIDTH_TEXT_FROM = 40.0  # and these the width of a fused FFN, written above it
SPACE = 0.12  # of a column, on either side of its marks
MARGIN = 8.0
FFN_HEIGHT = 110.0
BAND_HEIGHT = 22.0
GAP = 4.0
TICK_HEIGHT = 16.0
TEXT_HEIGHT = 14.0
SEGMENT_SHADES = 4  # neighbours differ, and a shade comes back only after three others

# Heights below are measured from the axis on which the FFNs stand.
BAND_Y = GAP
BOTTOM = BAND_Y + BAND_HEIGHT + GAP + TICK_HEIGHT

# role -> how the legend calls it, in the legend's order; segments share one entry
ROLES = {
    "ffn": "FFN, height = intermediate size",
    "segment-0": "fused FFN, one shade per source layer",
    "padding": f"zero padding, to a width that is a multiple of {WIDTH_MULTIPLE}",
    "attention": "attention, query heads",
    "key-value": "key-value heads",
    "dropped": "attention dropped",
    "no-ffn": "FFN dropped",
    "linear": "linear layer instead",
    "empty": "empty block",
    "parallel": "blocks in parallel",
}


@dataclass(frozen=True, slots=True)
class Mark:
    """One rectangle; `role` is a key of ROLES or `segment-<shade>`."""

    role: str
    x: float
    y: float
    width: float
    height: float
    tooltip: str


@dataclass(frozen=True, slots=True)
class Strip:
    """One model's drawing: from y = `top` (negative) to `bottom`, FFNs standing on y = 0."""

    marks: tuple[Mark, ...]
    texts: tuple[tuple[float, float, str], ...]  # (x of the middle, y of the foot, text)
    width: float  # what the widest of the models drawn together takes
    top: float
    bottom: float

    @property
    def height(self) -> float:
        return self.bottom - self.top


@dataclass(frozen=True, slots=True)
class _Scale:
    column: float
    width: float
    intermediate_size: int
    num_attention_heads: int


def strips_from_structures(structures: Sequence[Structure]) -> tuple[Strip, ...]:
    """Lay out models below each other, on one scale."""
    blocks = [block for structure in structures for block in structure.flat_blocks]
    columns = max((len(structure.flat_blocks) for structure in structures), default=0)
    column = min(max(TARGET_WIDTH / max(columns, 1), COLUMN_WIDTHS[0]), COLUMN_WIDTHS[1])
    scale = _Scale(
        column=column,
        width=column * columns + 2 * MARGIN,
        intermediate_size=max((b.ffn.intermediate_size for b in blocks if isinstance(b.ffn, FFNShape)), default=1),
        num_attention_heads=max(
            (b.attention.num_attention_heads for b in blocks if isinstance(b.attention, AttentionShape)), default=1
        ),
    )
    return tuple(_strip(structure, scale) for structure in structures)


def roles_of(strips: Sequence[Strip]) -> dict[str, str]:
    """Return the part of ROLES that occurs in the strips."""
    found = {mark.role for strip in strips for mark in strip.marks}
    return {role: text for role, text in ROLES.items() if role in found}


def layers_text(layers: Sequence[int]) -> str:
    """Write ascending layer numbers short: [3, 4, 5, 9] as "3–5, 9"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _strip(structure: Structure, scale: _Scale) -> Strip:
    marks: list[Mark] = []
    frames: list[tuple[int, int, str]] = []
    texts: list[tuple[float, float, str]] = []
    step = 1 if scale.column >= FULL_TICKS_FROM else 5 if scale.column >= FULL_TICKS_FROM / 3 else 10
    index = 0
    for entry in structure.blocks:
        members = entry.parallel if isinstance(entry, ParallelShape) else (entry,)
        if isinstance(entry, ParallelShape):
            together = sorted(layer for block in members for layer in block.source_layers)
            frames.append((index, len(members), f"layers {layers_text(together)} in parallel: all read the same input"))
        for block in members:
            drawn = _block_marks(block, index, scale)
            marks += drawn
            middle = MARGIN + (index + 0.5) * scale.column
            if index % step == 0:
                texts.append((middle, BOTTOM - 3, _tick_text(block, whole=step == 1)))
            if isinstance(block.ffn, FFNShape) and len(block.ffn.segments) > 1 and scale.column >= WIDTH_TEXT_FROM:
                texts.append((middle, min(mark.y for mark in drawn) - 4, f"{block.ffn.intermediate_size:,}"))
            index += 1
    highest = min((mark.y for mark in marks), default=0.0)
    if any(y < 0 for _, y, _ in texts):
        highest = min(highest, *(y - TEXT_HEIGHT + 4 for _, y, _ in texts))
    top = highest - MARGIN
    for first, count, tooltip in frames:
        x, width = MARGIN + first * scale.column + 1, scale.column * count - 2
        marks.insert(0, Mark("parallel", x, top + 1, width, BAND_Y + BAND_HEIGHT + GAP - 1 - top, tooltip))
    return Strip(tuple(marks), tuple(texts), scale.width, top, BOTTOM)


def _tick_text(block: BlockShape, *, whole: bool) -> str:
    text = layers_text(block.source_layers)
    return text if whole and "," not in text else str(block.source_layers[0])


def _block_marks(block: BlockShape, index: int, scale: _Scale) -> list[Mark]:
    x, width = MARGIN + (index + SPACE) * scale.column, scale.column * (1 - 2 * SPACE)
    plural = "s" if len(block.source_layers) > 1 else ""
    name = f"block {index} (layer{plural} {layers_text(block.source_layers)})"
    if block.attention is None and block.ffn is None:
        return [Mark("empty", x, BAND_Y, width, BAND_HEIGHT, f"{name}: empty")]
    return [*_ffn_marks(block, name, x, width, scale), *_attention_marks(block, name, x, width, scale)]


def _ffn_marks(block: BlockShape, name: str, x: float, width: float, scale: _Scale) -> list[Mark]:
    ffn = block.ffn
    if ffn is None:
        return [Mark("no-ffn", x, -8, width, 8, f"{name}: FFN dropped")]
    if not isinstance(ffn, FFNShape):
        return [Mark("linear", x, -8, width, 8, f"{name}: a linear layer instead of the FFN")]
    marks = []
    bottom = 0.0
    fused = len(ffn.segments) > 1
    parts = [
        (
            f"segment-{number % SEGMENT_SHADES}" if fused else "ffn",
            segment.width,
            f"{name}: FFN {ffn.intermediate_size:,} wide"
            + (f", {segment.width:,} of them from layer {segment.source_layer}" if fused else ""),
        )
        for number, segment in enumerate(ffn.segments)
    ]
    if ffn.padding:
        parts.append(("padding", ffn.padding, f"{name}: {ffn.padding:,} channels of zero padding"))
    for role, channels, tooltip in parts:
        height = FFN_HEIGHT * channels / scale.intermediate_size
        bottom -= height
        marks.append(Mark(role, x, bottom, width, height, tooltip))
    return marks


def _attention_marks(block: BlockShape, name: str, x: float, width: float, scale: _Scale) -> list[Mark]:
    attention = block.attention
    if attention is None:
        return [Mark("dropped", x, BAND_Y, width, BAND_HEIGHT, f"{name}: attention dropped")]
    if not isinstance(attention, AttentionShape):
        return [Mark("linear", x, BAND_Y, width, BAND_HEIGHT, f"{name}: a linear layer instead of attention")]
    per_head = BAND_HEIGHT / scale.num_attention_heads
    tooltip = (
        f"{name}: attention, {attention.num_attention_heads} heads of {attention.head_dim}, "
        f"{attention.num_key_value_heads} key-value heads"
    )
    if attention.sliding_window is not None:
        tooltip += f", window of {attention.sliding_window:,} tokens"
    # Hostile files may claim more key-value heads than heads; the band is as high as the larger number allows.
    heads, kv_heads = (
        min(count * per_head, BAND_HEIGHT) for count in (attention.num_attention_heads, attention.num_key_value_heads)
    )
    return [
        Mark("attention", x, BAND_Y, width, heads, tooltip),
        Mark("key-value", x, BAND_Y, width, kv_heads, tooltip),
    ]
