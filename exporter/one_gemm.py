"""Which linears of one input can be stored, and run, as one GEMM."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.graph import InputQuantization, Linear, Quantization


def can_be_one(linears: Sequence[Linear]) -> bool:
    """Whether linears of one input can be stored, and run, as one: they round alike, and their scales go together.

    Of tensors, at most static input scales are read, four bytes each.
    """
    quantizations = [linear.quantization for linear in linears if linear.quantization is not None]
    if not quantizations:
        return True
    if len(quantizations) < len(linears):
        return False
    first, *others = quantizations
    weights_fit = len({linear.weight.dtype for linear in linears}) == 1 and all(
        _scales_go_together(first, other) for other in others
    )
    return weights_fit and all(round_alike(first.input, other.input) for other in others)


def _scales_go_together(one: Quantization, other: Quantization) -> bool:
    return other.weight_scale is one.weight_scale or len(one.weight_scale.shape) == len(other.weight_scale.shape) == 1


def round_alike(one: InputQuantization | None, other: InputQuantization | None) -> bool:
    """Whether one input is rounded to the same codes for both; of static scales the value is read."""
    if one is None or other is None:
        return one is other
    if one.dtype != other.dtype:
        return False
    if one.scale is None or other.scale is None or one.scale is other.scale:
        return one.scale is other.scale
    return bool(one.scale.numpy() == other.scale.numpy())
