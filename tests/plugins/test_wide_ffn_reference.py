"""The reference against a formula in NumPy and against `exporter.reference`; the op on a CPU and while tracing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import plugins.wide_ffn.op  # noqa: F401  registers torch.ops.fuselage.wide_ffn
from exporter.dtypes import BY_NAME, DType
from exporter.errors import TargetError
from exporter.graph import FFN, linears
from exporter.numerics import amax, quantize, scale_from_amax
from exporter.reference import LoadedBlock, feed_forward, torch_from_lazy
from plugins.contract import WIDE_FFN
from plugins.wide_ffn.library import wide_ffn_by_library
from plugins.wide_ffn.reference import wide_ffn_reference
from tests.marks import needs_scales_of_rows
from tests.plugins.ffn_calls import FORMATS, Call, relative_error
from tests.tiny import quantized_graph, tiny_graph

OP = torch.ops.fuselage.wide_ffn
CALLS = [Call(*shape, *format_) for format_ in FORMATS for shape in ((3, 64, 96), (1, 50, 77))]


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float64 -> float32 -> bfloat16, as float32: where a float32 result was rounded."""
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def codes(values: np.ndarray, dtype: DType, static: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """What `exporter.numerics` makes of each token: (codes, scales [T])."""
    if static is None:
        scales = scale_from_amax(amax(values, axis=1), dtype)
    else:
        scales = np.full(len(values), static.item(), np.float32)
    return quantize(values, scales, dtype).astype(np.float64), scales.astype(np.float64)


def formula(
    x: Any, norm: Any, gate: Any, up: Any, down: Any, gate_scale: Any, up_scale: Any, down_scale: Any,
    input_scale: Any, inner_scale: Any, residual: Any, epsilon: float, activations: str,
) -> np.ndarray:  # fmt: skip
    """The module docstring of the reference, in float64 between its roundings."""

    def multiplied(values: np.ndarray, weight: Any, weight_scale: Any, static: Any) -> np.ndarray:
        scales = np.ones(len(values))
        if activations != "none":
            values, scales = codes(values, BY_NAME[str(weight.dtype).removeprefix("torch.")], static)
        of_weight = 1.0 if weight_scale is None else numpy_of(weight_scale)
        return (values @ numpy_of(weight).T) * scales[:, None] * of_weight

    wide = numpy_of(x)
    rms = np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)
    normed = bfloat16(numpy_of(norm) * bfloat16(wide / rms))
    gated = multiplied(normed, gate, gate_scale, input_scale)
    inner = bfloat16(gated / (1 + np.exp(-gated)) * multiplied(normed, up, up_scale, input_scale))
    y = multiplied(inner, down, down_scale, inner_scale)
    return y if residual is None else y + numpy_of(residual)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_reference_is_the_formula(call: Call) -> None:
    arguments = call.arguments()
    expected = bfloat16(formula(*arguments))
    for accumulate in (torch.float32, torch.float64):
        found = wide_ffn_reference(*arguments, accumulate=accumulate)
        assert relative_error(found, torch.from_numpy(expected)) < 1e-3


@pytest.mark.parametrize(
    "format_name", [None, "fp8", "fp8-rowwise", "int8-smoothquant", "int8-smoothquant-token", "int8-weight-only"]
)
def test_reference_is_that_of_a_block(format_name: str | None) -> None:
    """Up to the roundings that a fused kernel does not make: bfloat16 has 8 bits, an E4M3 code 4."""
    graph = tiny_graph("F", dtype="bfloat16", hidden_size=64, intermediate_size=208)
    graph = graph if format_name is None else quantized_graph(graph, format_name)
    (block,) = graph.blocks
    ffn = block.ffn
    assert isinstance(ffn, FFN)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    (loaded,) = LoadedBlock(block, 0, torch.device("cpu"), torch.bfloat16).members
    expected = x + feed_forward(loaded.ffn, x)

    activations = activations_of(ffn)
    found = OP(x, *arguments_of(ffn), x, ffn.norm.eps, activations)
    assert relative_error(found, expected) < (6e-3 if activations == "none" else 1.5e-2)
    # In float32 the block rounds nothing but what the format says, and other numbers lie on the edge between codes.
    (exact,) = LoadedBlock(block, 0, torch.device("cpu"), torch.float32).members
    wide = x.to(torch.float32)
    assert relative_error(found, wide + feed_forward(exact.ffn, wide)) < (4e-3 if activations == "none" else 3e-2)


def arguments_of(ffn: FFN) -> list[torch.Tensor | None]:
    """The tensors of an FFN between x and the residual."""
    cpu = torch.device("cpu")
    parts = list(linears(ffn).values())

    def scale(tensor: Any) -> torch.Tensor | None:
        return None if tensor is None else torch_from_lazy(tensor, cpu, torch.float32).reshape(-1)

    quantizations = [part.quantization for part in parts]
    inputs = [None if q is None or q.input is None else q.input.scale for q in quantizations]
    return [
        torch_from_lazy(ffn.norm.weight, cpu, torch.bfloat16),
        *(torch_from_lazy(part.weight, cpu, getattr(torch, part.weight.dtype.torch)) for part in parts),
        *(None if q is None else scale(q.weight_scale) for q in quantizations),
        scale(inputs[0]),
        scale(inputs[2]),
    ]


def activations_of(ffn: FFN) -> str:
    quantization = ffn.down_proj.quantization
    if quantization is None or quantization.input is None:
        return "none"
    return "token" if quantization.input.scale is None else "static"


def by_library(*calls: Call) -> list[Any]:
    """Cases of tests that call PyTorch's own product with scales of rows."""
    return [pytest.param(call, marks=needs_scales_of_rows if has_scales_of_rows(call) else ()) for call in calls]


def has_scales_of_rows(call: Call) -> bool:
    is_product_of_codes = call.weights == "float8_e4m3fn" and call.activations != "none"
    return is_product_of_codes and call.hidden % 16 == call.width % 16 == 0


@pytest.mark.parametrize(
    "call", by_library(*(Call(70, 64, 96, *format_) for format_ in FORMATS), Call(70, 50, 77, *FORMATS[4])), ids=str
)
def test_library_agrees_with_the_reference(call: Call) -> None:
    """Above the kernels' tokens; PyTorch has these GEMMs for CPUs, too."""
    arguments = call.arguments()
    arguments[0][3, 5] = float("inf")
    found, expected = wide_ffn_by_library(*arguments), wide_ffn_reference(*arguments)
    assert found[3].isnan().all()
    others = [*range(3), *range(4, 70)]
    # One more rounding to bfloat16 in front of the codes.
    assert relative_error(found[others], expected[others]) < 2e-2


@pytest.mark.parametrize("call", by_library(*(Call(3, 64, 96, *one) for one in FORMATS if one[1] != "none")), ids=str)
def test_library_multiplies_codes_of_few_tokens(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what the tuner's times of 16 tokens stand beside; a GPU's `_int_mm` takes no fewer than 17 rows."""
    rows: list[int] = []

    def counted(multiply: Any) -> Any:
        def product(a: torch.Tensor, *others: Any, **chosen: Any) -> torch.Tensor:
            rows.append(len(a))
            return multiply(a, *others, **chosen)

        return product

    for name in ("_int_mm", "_scaled_mm"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    arguments = call.arguments()
    assert relative_error(wide_ffn_by_library(*arguments), wide_ffn_reference(*arguments)) < 2e-2
    assert len(rows) == 3
    assert min(rows) > 16 or call.weights != "int8"


@pytest.mark.parametrize("call", by_library(*(Call(40, 32, 48, *format_) for format_ in FORMATS)), ids=str)
def test_library_takes_tokens_in_parts(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = call.arguments()
    expected = wide_ffn_by_library(*arguments)
    monkeypatch.setattr("plugins.wide_ffn.library.ELEMENTS", 20 * call.width)
    monkeypatch.setattr("plugins.wide_ffn.library.INT8_DEPTH", 16)
    monkeypatch.setattr("plugins.wide_ffn.library.WEIGHT_ELEMENTS", 5 * call.hidden)
    assert relative_error(wide_ffn_by_library(*arguments), expected) < 2e-3


@pytest.mark.parametrize("call", CALLS[::4], ids=str)
def test_op(call: Call) -> None:
    """On a CPU it is the reference; tracing sees the same shapes; PyTorch's own checks of a custom op hold."""
    arguments = tuple(call.arguments())
    assert torch.equal(OP(*arguments), wide_ffn_reference(*arguments))
    on_meta = [one.to("meta") if isinstance(one, torch.Tensor) else one for one in arguments]
    found = OP(*on_meta)
    assert (found.shape, found.dtype, found.device.type) == (arguments[0].shape, torch.bfloat16, "meta")
    # PyTorch's check of the schema has no arithmetic of float8.
    checks = ("test_faketensor",) if call.weights == "float8_e4m3fn" else ("test_faketensor", "test_schema")
    torch.library.opcheck(OP.default, arguments, test_utils=checks)


def test_the_op_is_its_contract() -> None:
    schema = OP.default._schema
    named = {argument.name: str(argument.type) for argument in schema.arguments}
    expected = {
        one.name: "Optional[Tensor]" if one.optional or one.present_if is not None else "Tensor"
        for one in WIDE_FFN.inputs
    }
    expected |= {one.name: {float: "float", str: "str"}[one.type] for one in WIDE_FFN.attributes}
    assert named == expected
    assert list(named) == list(expected)
    assert [str(one.type) for one in schema.returns] == ["Tensor"]
    assert schema.name == f"{WIDE_FFN.namespace}::{WIDE_FFN.name}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: torch.zeros(48, 64).bfloat16()}, "up has the shape [48, 64]: found [96, 64]"),
        ({4: torch.zeros(96, 64).bfloat16().T}, "down is contiguous: found strides [1, 64]"),
        ({5: torch.ones(1)}, "gate_scale is not taken where gate is bfloat16"),
        ({12: "token"}, "bfloat16 weights take activations as they come: found token"),
    ],
)
def test_bad_arguments(change: dict[int, Any], message: str) -> None:
    arguments = Call(3, 64, 96).arguments()
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(TargetError, match=r"^fuselage::wide_ffn: ") as caught:
        OP(*arguments)
    assert message in str(caught.value)


def test_no_tokens() -> None:
    call = replace(Call(3, 64, 96), tokens=0)
    assert OP(*call.arguments()).shape == (0, 64)
