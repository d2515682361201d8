"""Which FFNs the op `plugins.contract.WIDE_FFN` computes, and in which number format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from exporter.dtypes import BFLOAT16, DType
from exporter.errors import TargetError
from exporter.graph import FFN, Activation, InputQuantization, Linear, ModelGraph, linears
from exporter.one_gemm import round_alike


@dataclass(frozen=True, slots=True)
class WideFormat:
    """What the op multiplies."""

    weights: DType  # bfloat16, float8_e4m3fn or int8
    activations: str  # "none" (as they come), "static" or "token" (rounded to the dtype of the weights)


def wide_format(ffn: FFN) -> WideFormat:
    """The format of an FFN that has none of the problems of `wide_ffn_problems`."""
    gate = ffn.gate_proj
    return WideFormat(BFLOAT16 if gate.quantization is None else gate.weight.dtype, _activations(_rounding(gate)))


def wide_ffn_problems(graph: ModelGraph) -> Iterator[TargetError]:
    """Why gated FFNs of a graph cannot run as the op; of tensors, at most static input scales are read."""
    for index, block in enumerate(graph.flat_blocks):
        if isinstance(block.ffn, FFN):
            for problem, found in _problems(block.ffn):
                yield TargetError(f"the wide-FFN op {problem}", block=index, found=found)


def _problems(ffn: FFN) -> Iterator[tuple[str, str | None]]:
    parts = linears(ffn).values()
    roundings = [_rounding(part) for part in parts]
    if ffn.activation is not Activation.SILU:
        yield "gates with silu", ffn.activation.value
    if any(part.bias is not None for part in parts):
        yield "has no biases", None
    formats = {None if part.quantization is None else part.weight.dtype for part in parts}
    if len(formats) > 1:
        yield "takes gate, up and down in one number format", ", ".join(sorted(str(dtype) for dtype in formats))
        return
    if any(rounding is not None and rounding.dtype not in formats for rounding in roundings):
        yield "rounds activations to the format of the weights", None
    gate, up, down = roundings
    if not round_alike(gate, up):
        yield "rounds one input for gate and up", None
    if _activations(gate) != _activations(down):
        found = f"{_activations(gate)} and {_activations(down)}"
        yield "rounds the inputs of gate, up and down in the same way", found


def _rounding(linear: Linear) -> InputQuantization | None:
    return None if linear.quantization is None else linear.quantization.input


def _activations(rounding: InputQuantization | None) -> str:
    if rounding is None:
        return "none"
    return "token" if rounding.scale is None else "static"
