"""Linears as PyTorch runs them on a device: dense, or over 8-bit codes with the products that GPUs have for them.

    dense         y = x @ W.T + b
    rounded       y = (round(x / s) @ W.T) * s * w + b    torch._scaled_mm for FP8, torch._int_mm for int8
    weight only   y = (x @ W.T) * w + b                   codes become T at every call: PyTorch has no kernel for it

x and y are T [N, in] and T [N, out]; W are codes [out, in], w is their scale, [] or [out], and s the input's, [] if it
is static, [N, 1] if it is per token. On a CPU, PyTorch has both products as well, the FP8 one as an emulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from exporter.dtypes import BFLOAT16, FLOAT8_E4M3FN, INT8, DType
from exporter.errors import EngineError
from exporter.graph import Linear
from exporter.lazy import LazyTensor
from exporter.numerics import LARGEST, SMALLEST_SCALE

Load = Callable[[LazyTensor, torch.device, torch.dtype], torch.Tensor]  # see `exporter.reference.torch_from_lazy`

# Rules of cuBLASLt that `torch._scaled_mm` and `torch._int_mm` enforce on a GPU.
MULTIPLE = {FLOAT8_E4M3FN: 16, INT8: 8}  # both sizes of the weight
MIN_INT_ROWS = 32  # `_int_mm` wants more than 16 rows
LONGEST_INT32_SUM = 1 << 16  # of products of codes: 128 * 128 * 2**16 = 2**30
# By PyTorch's own types: torch.compile leaves its graph where ours are looked up.
LARGEST_CODE = {torch.float8_e4m3fn: LARGEST[FLOAT8_E4M3FN], torch.int8: LARGEST[INT8]}


@dataclass(frozen=True, slots=True)
class Rounding:
    """What an input is rounded to."""

    dtype: torch.dtype  # float8_e4m3fn or int8
    scale: torch.Tensor | None  # float32 []; None: one per token

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """T [N, in] -> codes [N, in] and their scale, float32 [] or [N, 1]."""
        wide, largest = x.to(torch.float32), LARGEST_CODE[self.dtype]
        scale = self.scale
        if scale is None:
            range_of_token = wide.abs().amax(-1, keepdim=True)
            scale = torch.where(range_of_token == 0, 1.0, (range_of_token / largest).clamp_min(SMALLEST_SCALE))
        if self.dtype == torch.int8:
            return (wide / scale).round().clamp(-128, 127).to(self.dtype), scale
        return (wide / scale).clamp(-largest, largest).to(self.dtype), scale


@dataclass(frozen=True, slots=True)
class Dense:
    """x @ weight.T + bias."""

    weight: torch.Tensor  # T [out, in]
    bias: torch.Tensor | None  # T [out]
    scale: None = None
    rounding: None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class WeightOnly:
    """Codes that become T at every call, at the price of writing and reading the matrix in T."""

    weight: torch.Tensor  # float8_e4m3fn or int8 [out, in]
    scale: torch.Tensor  # float32 [] or [out]
    bias: torch.Tensor | None
    rounding: None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight.to(x.dtype))  # every code is exact in every T
        return _with_bias((y * self.scale).to(x.dtype), self.bias)


@dataclass(frozen=True, slots=True)
class RoundedFP8:
    """FP8 times FP8."""

    weight: torch.Tensor  # float8_e4m3fn [out, in]
    scale: torch.Tensor  # float32 [] or [out]
    bias: torch.Tensor | None
    rounding: Rounding

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = self.rounding(x)
        weight_scale = self.scale
        if scale.ndim or weight_scale.ndim:  # the product takes one scale each, or one per row and one per column
            scale = scale.expand(len(x), 1).contiguous()
            weight_scale = weight_scale.expand(len(self.weight)).reshape(1, -1).contiguous()
        y = torch._scaled_mm(codes, self.weight.t(), scale_a=scale, scale_b=weight_scale, out_dtype=x.dtype)
        return _with_bias(y, self.bias)


@dataclass(frozen=True, slots=True)
class RoundedInt8:
    """int8 times int8, summed in int32; of a long input in parts, which are then summed in float32."""

    weight: torch.Tensor  # int8 [out, in]
    scale: torch.Tensor  # float32 [] or [out]
    bias: torch.Tensor | None
    rounding: Rounding

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = self.rounding(x)
        rows = F.pad(codes, (0, 0, 0, max(0, MIN_INT_ROWS - len(x))))
        parts = zip(rows.split(LONGEST_INT32_SUM, dim=1), self.weight.split(LONGEST_INT32_SUM, dim=1), strict=True)
        products = [torch._int_mm(codes.contiguous(), weight.t())[: len(x)] for codes, weight in parts]
        y = products[0] if len(products) == 1 else torch.stack(products).to(torch.float32).sum(0)
        return _with_bias((y * scale * self.scale).to(x.dtype), self.bias)


DeviceLinear = Dense | WeightOnly | RoundedFP8 | RoundedInt8


def _with_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y + bias


def linear_on_device(linear: Linear, device: torch.device, dtype: torch.dtype, load: Load) -> DeviceLinear:
    """Load a linear; codes stay codes. It must have none of the problems of `linear_problems`."""
    bias = None if linear.bias is None else load(linear.bias, device, dtype)
    quantization = linear.quantization
    if quantization is None:
        return Dense(load(linear.weight, device, dtype), bias)
    weight = load(linear.weight, device, getattr(torch, linear.weight.dtype.torch))
    scale = load(quantization.weight_scale, device, torch.float32)
    if quantization.input is None:
        return WeightOnly(weight, scale, bias)
    static = quantization.input.scale
    scale_of_input = None if static is None else load(static, device, torch.float32)
    rounding = Rounding(getattr(torch, quantization.input.dtype.torch), scale_of_input)
    kind = RoundedInt8 if linear.weight.dtype == INT8 else RoundedFP8
    return kind(weight, scale, bias, rounding)


def halves(linear: DeviceLinear) -> tuple[DeviceLinear, DeviceLinear]:
    """The two linears without bias that are stored as one, over the same memory."""
    first, second = linear.weight.chunk(2)
    if isinstance(linear, Dense) or not linear.scale.ndim:
        return replace(linear, weight=first), replace(linear, weight=second)
    scale_of_first, scale_of_second = linear.scale.chunk(2)
    return (
        replace(linear, weight=first, scale=scale_of_first),
        replace(linear, weight=second, scale=scale_of_second),
    )


def activations_of(rounding: Rounding | None) -> str:
    """What `plugins.contract.WIDE_FFN` calls the rounding of an input."""
    if rounding is None:
        return "none"
    return "token" if rounding.scale is None else "static"


def has_scales_of_rows(linear: Linear) -> bool:
    """Whether its product is one of FP8 codes with a scale per token or per output channel."""
    quantization = linear.quantization
    if quantization is None or quantization.input is None or linear.weight.dtype != FLOAT8_E4M3FN:
        return False
    return quantization.input.scale is None or bool(quantization.weight_scale.shape)


def can_scale_rows(device: torch.device) -> bool:
    """Whether this PyTorch has such products there; on a CPU 2.13 has, 2.10 has not."""
    codes, scales = torch.zeros(16, 16, device=device).to(torch.float8_e4m3fn), torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(codes, codes.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def linear_problems(name: str, linear: Linear, dtype: DType) -> Iterator[EngineError]:
    """Why a linear cannot run on a GPU with activations of `dtype`; no tensor is read."""
    quantization = linear.quantization
    if quantization is None or quantization.input is None:
        return
    codes = linear.weight.dtype
    if quantization.input.dtype != codes:
        yield EngineError(
            "weights and inputs of one product have one format",
            tensor=name,
            expected=codes,
            found=f"inputs in {quantization.input.dtype}",
        )
        return
    if any(size % MULTIPLE[codes] for size in linear.weight.shape):
        yield EngineError(
            f"cuBLASLt multiplies {codes} matrices of certain sizes only",
            tensor=name,
            expected=f"multiples of {MULTIPLE[codes]}",
            found=list(linear.weight.shape),
        )
    if has_scales_of_rows(linear) and dtype != BFLOAT16:
        yield EngineError(
            "FP8 products with a scale per row give bfloat16 in every PyTorch, and no other dtype",
            tensor=name,
            expected=BFLOAT16,
            found=dtype,
            hint="build the engine with --dtype bfloat16",
        )
