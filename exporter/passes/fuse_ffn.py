"""Fuse FFNs that follow each other without attention in between into one wide FFN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from exporter.errors import PlanError
from exporter.graph import FFN, Block, Linear, ModelGraph, RMSNorm, linears
from exporter.lazy import LazyTensor, add, concat, full, pad, scale_columns, slice_columns, slice_rows
from exporter.passes.find_blocks import blocks_of_range, check_disjoint, plain_block

# Fused widths are padded to this: the Nemotron-NAS width formula knows only multiples of it, and FP8 tiles like it.
WIDTH_MULTIPLE = 256

NormRule = Literal["fold", "last"]


def fuse_ffn(
    graph: ModelGraph, runs: Sequence[tuple[int, int]], *, norm: NormRule = "fold", multiple: int = WIDTH_MULTIPLE
) -> ModelGraph:
    """Replace each run of attention-free blocks by one block with a wider FFN.

    D = hidden_size, F_i = intermediate_size of block i, F = sum of F_i, rounded up to `multiple`.

    Equation 5 (every FFN of a run reads the same x, so this approximates the sequential model):
        y    = x + sum_i down_i @ (act(gate_i @ n_i) * (up_i @ n_i)),  n_i = norm_i * x / rms(x)
        gate = concat_i(gate_i * norm_i[None, :], axis=0)    # [F, D], likewise up
        down = concat_i(down_i, axis=1)                      # [D, F];  norm = ones, [D]
    The padding is zero rows in gate and up and zero columns in down: act(0) * 0 = 0, so it changes nothing.
    Source: Bercovich et al., "FFN Fusion", arXiv:2503.18908, equation 5 and theorem 3.1. Folding norm_i into gate
    and up is ours; norm="last" is the paper's rule, which uses the last layer's norm for all of the run.

    Args:
        runs: source layers (first, last), both included, disjoint; every block in a run has no attention, and at
            least two have a gated FFN (empty blocks in a run disappear in it).
        norm: "fold" (exact for equation 5) or "last", which is for FFNs that no earlier fusion has made.

    Returns:
        A new graph, a run shorter by its length less one. No tensor byte is read; products with norm_i are taken in
        float32 (float64 for float64 weights) and rounded once to the weights' dtype.

    Raises:
        PlanError: a rule above is broken, or activations, rms_norm_eps or dtypes in a run differ; names the block.
    """
    check_disjoint(runs, "fused runs")
    spans = sorted((blocks_of_range(graph, run) for run in runs), key=lambda span: span.start)
    blocks = list(graph.blocks)
    for span in reversed(spans):  # from the back, so that the indices before stay what they are
        blocks[span.start : span.stop] = [_fused([plain_block(graph, i) for i in span], span, norm, multiple)]
    return replace(graph, blocks=tuple(blocks))


def _fused(blocks: Sequence[Block], span: range, norm: NormRule, multiple: int) -> Block:
    ffns: list[FFN] = []
    for index, block in zip(span, blocks, strict=True):
        if block.attention is not None:
            raise PlanError(
                f"the run contains an attention, in layer {block.source_layers[0]}",
                block=index,
                expected="blocks without attention",
                hint="drop that attention too, or end the run before it",
            )
        if isinstance(block.ffn, FFN):
            ffns.append(block.ffn)
        elif block.ffn is not None:
            raise PlanError("the run contains a linear layer in place of an FFN", block=index)
    if len(ffns) < 2:
        raise PlanError("a run needs at least two FFNs", block=span.start, expected=">= 2", found=len(ffns))
    alike: dict[str, list[object]] = {
        "activations": [ffn.activation.value for ffn in ffns],
        "values of rms_norm_eps": [ffn.norm.eps for ffn in ffns],
    }
    for name in ("gate_proj", "up_proj", "down_proj"):
        alike[f"dtypes of {name}"] = [getattr(ffn, name).weight.dtype.name for ffn in ffns]
    for what, values in alike.items():
        if len(set(values)) > 1:
            raise PlanError(f"the FFNs of a run have different {what}", block=span.start, found=values)
    if any(linear.quantization is not None for ffn in ffns for linear in linears(ffn).values()):
        raise PlanError("a quantized FFN cannot be fused", block=span.start, hint="fuse first, then quantize")
    if norm == "last" and any(len(ffn.segments) > 1 for ffn in ffns):
        # It may have norms folded in, which no byte read so far tells: another norm would come on top of them.
        raise PlanError(
            "an FFN that is fused already cannot take the norm of the run's last layer",
            block=span.start,
            found=f"layers {[list(ffn.source_layers) for ffn in ffns if len(ffn.segments) > 1]}",
            hint="fold the norms, or fuse the whole run at once, from the model before its first fusion",
        )
    ffns = [_without_padding(ffn) for ffn in ffns]
    width = sum(ffn.intermediate_size for ffn in ffns)
    padded = -(-width // multiple) * multiple
    folded = norm == "fold"
    return Block(
        attention=None,
        ffn=FFN(
            norm=_ones(ffns[-1].norm) if folded else ffns[-1].norm,
            gate_proj=_stacked([_folded(ffn.gate_proj, ffn.norm, folded) for ffn in ffns], padded),
            up_proj=_stacked([_folded(ffn.up_proj, ffn.norm, folded) for ffn in ffns], padded),
            down_proj=_side_by_side([ffn.down_proj for ffn in ffns], padded),
            activation=ffns[0].activation,
            segments=tuple(segment for ffn in ffns for segment in ffn.segments),
        ),
        source_layers=tuple(layer for block in blocks for layer in block.source_layers),
    )


def _ones(norm: RMSNorm) -> RMSNorm:
    return RMSNorm(weight=full(norm.weight.shape, 1.0, norm.weight.dtype), eps=norm.eps)


def _folded(linear: Linear, norm: RMSNorm, fold: bool) -> Linear:
    return Linear(weight=scale_columns(linear.weight, norm.weight), bias=linear.bias) if fold else linear


def _stacked(linears: Sequence[Linear], width: int) -> Linear:
    """One linear whose outputs are those of all `linears`, then zeros up to `width`."""
    bias = None
    if any(linear.bias is not None for linear in linears):
        bias = pad(concat([_bias(linear) for linear in linears], axis=0), 0, width)
    return Linear(weight=pad(concat([linear.weight for linear in linears], axis=0), 0, width), bias=bias)


def _side_by_side(linears: Sequence[Linear], width: int) -> Linear:
    """One linear that sums all `linears`, each on its own part of the input, of `width` with the padding."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return Linear(
        weight=pad(concat([linear.weight for linear in linears], axis=1), 1, width),
        bias=add(biases) if biases else None,
    )


def _without_padding(ffn: FFN) -> FFN:
    """The FFN without the zero channels of an earlier fusion, so that segments stay in a row."""
    if not ffn.padding:
        return ffn
    width = ffn.intermediate_size - ffn.padding

    def rows(linear: Linear) -> Linear:
        bias = None if linear.bias is None else slice_rows(linear.bias, 0, width)
        return Linear(weight=slice_rows(linear.weight, 0, width), bias=bias)

    down = Linear(weight=slice_columns(ffn.down_proj.weight, 0, width), bias=ffn.down_proj.bias)
    return replace(ffn, gate_proj=rows(ffn.gate_proj), up_proj=rows(ffn.up_proj), down_proj=down)


def _bias(linear: Linear) -> LazyTensor:
    if linear.bias is not None:
        return linear.bias
    return full((linear.out_features,), 0.0, linear.weight.dtype)
