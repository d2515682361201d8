"""Which kernels ONNX Runtime on CPU runs a network's quantized linears with: what to ask for, and what it did.

A network says QuantizeLinear, DequantizeLinear and a product; whether that becomes an integer product is ONNX Runtime's
choice when it loads the network, and where it does not, it dequantizes the weights at every step and is 4 to 11 times
slower than float32, without a word. So the session options that the fusions need are set here, and every build runs the
network under ONNX Runtime's profiler and refuses anything but this:

    int8, rounded inputs    QGemm, QLinearMatMul or MatMulIntegerToFloat; on x86 with inputs of uint8, for with int8
                            they are slower than float32 (AVX-512 VNNI multiplies unsigned by signed)
    int8, weight only       MatMulNBits, which rounds its inputs, too: to int8, in blocks of up to 256 channels
    FP8                     a float32 product of values that were rounded to FP8, the weights once: an emulation
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engines.onnxruntime_profile import events_of
from exporter.errors import EngineError

INTEGER_KERNELS = frozenset({"QGemm", "QLinearMatMul", "MatMulIntegerToFloat"})
WEIGHT_ONLY_KERNELS = frozenset({"MatMulNBits"})
SHOWN_LINEARS = 4


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A product of a network whose weight comes out of a DequantizeLinear."""

    name: str  # of its node
    dequantize: str  # name of its weight's DequantizeLinear
    is_int8: bool  # else FP8
    weight_only: bool

    @property
    def kernels(self) -> frozenset[str]:
        """The ops that may run it if it is int8."""
        return WEIGHT_ONLY_KERNELS if self.weight_only else INTEGER_KERNELS


class Kernel(NamedTuple):
    """What one node of a loaded network turned out to be."""

    op: str
    input_dtype: str | None  # of its first input, as ONNX Runtime calls it: "uint8"


def quantized_linears(network: Path) -> tuple[QuantizedLinear, ...]:
    """Find the quantized linears of an .onnx file; its weights are not read.

    Raises:
        EngineError: the file is not an ONNX network.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(network, load_external_data=False).graph
    except DecodeError as error:
        raise EngineError("not an ONNX network", file=network) from error
    producers = {output: node for node in graph.node for output in node.output if output}
    dtypes = {initializer.name: initializer.data_type for initializer in graph.initializer}

    def producer(node: Any, index: int, op_type: str) -> Any:
        """The node of that type that makes an input of another, None if there is none."""
        found = producers.get(node.input[index]) if index < len(node.input) else None
        return found if found is not None and found.op_type == op_type else None

    found = []
    for node in graph.node:
        dequantize = producer(node, 1, "DequantizeLinear") if node.op_type in ("Gemm", "MatMul") else None
        if dequantize is None:
            continue
        reader = producer(dequantize, 0, "Transpose") or dequantize
        found.append(
            QuantizedLinear(
                name=node.name,
                dequantize=dequantize.name,
                is_int8=[dtypes.get(name) for name in reader.input[:1]] == [onnx.TensorProto.INT8],
                weight_only=producer(node, 0, "DequantizeLinear") is None,
            )
        )
    return tuple(found)


def session_config(linears: Sequence[QuantizedLinear]) -> dict[str, str]:
    """The session options that the kernels of these linears need."""
    if not linears:
        return {}
    if not all(linear.is_int8 for linear in linears):
        # Else FP8 weights would be dequantized at every step. Takes the integer kernels away, too.
        return {"session.disable_quant_qdq": "1"}
    return {
        # Equal roundings of one input must stay apart: a product is fused with a rounding that nobody else reads.
        "optimization.disable_specified_optimizers": "CommonSubexpressionElimination",
        # Blocks as long as divide the input, up to 256: with the default of 32 decode takes 1.25 times as long.
        "session.qdq_matmulnbits_block_size": "-1",
        # Weights that are not packed are packed at every step.
        "session.disable_prepacking": "0",
    }


def is_emulated(number_format: str | None, linears: Sequence[QuantizedLinear], plugins: Sequence[str]) -> bool:
    """Whether floats imitate a number format: FP8, and FFNs whose plugin is replaced by local functions."""
    return number_format is not None and (bool(plugins) or not all(linear.is_int8 for linear in linears))


def executed_format(number_format: str | None, *, emulated: bool) -> str | None:
    """A network's number format, and in which way ONNX Runtime on CPU departs from it."""
    if number_format is None:
        return None
    if emulated:
        return f"{number_format}, emulated"
    return number_format.replace("(weight only)", "(weight only, kernel rounds inputs)")


def kernels_from_profile(profile: Path) -> dict[str, Kernel]:
    """Read which kernel ran each node, by node name, from a file of ONNX Runtime's profiler.

    Raises:
        EngineError: as `events_of`.
    """
    kernels = {}
    for event in events_of(profile):
        name, _, kind = event["name"].rpartition("_kernel_")
        if event["cat"] == "Node" and kind == "time":
            arguments: Mapping[str, Any] = event["args"]
            dtypes = [dtype for tensor in arguments["input_type_shape"] for dtype in tensor]
            # Fusions append to the name: "lm_head/MatMulAddFusion".
            kernels[name.partition("/")[0]] = Kernel(arguments["op_name"], dtypes[0] if dtypes else None)
    return kernels


def check_kernels(linears: Sequence[QuantizedLinear], kernels: Mapping[str, Kernel], network: Path) -> None:
    """Raise EngineError, naming the nodes, if a quantized linear did not run with a kernel of its format."""
    wrong = []
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    for linear in linears:
        kernel = kernels.get(linear.name)
        if linear.dequantize in kernels:
            wrong.append(f"{linear.name}, its weight dequantized at every step")
        elif linear.is_int8 and (kernel is None or kernel.op not in linear.kernels):
            wrong.append(f"{linear.name} by {'nothing of that name' if kernel is None else kernel.op}")
        elif kernel is not None and kernel.input_dtype == "int8" and on_x86:
            wrong.append(f"{linear.name} by {kernel.op} on int8, which is slow on this CPU")
    if wrong:
        more = f"; and {len(wrong) - SHOWN_LINEARS} more" if len(wrong) > SHOWN_LINEARS else ""
        raise EngineError(
            f"ONNX Runtime runs {len(wrong)} of {len(linears)} quantized linears without a kernel for their format",
            file=network,
            expected=", ".join(sorted({kernel for linear in linears for kernel in linear.kernels if linear.is_int8}))
            or None,
            found="; ".join(wrong[:SHOWN_LINEARS]) + more,
            hint="export the network for the target onnxruntime; if it is, this version of ONNX Runtime fuses less",
        )
