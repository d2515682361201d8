"""The number formats a tensor can be stored in, one row each, with every spelling that other formats use for it."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One storage format.

    `onnx` is the value of `onnx.TensorProto.DataType`; `torch` the attribute name in the `torch` module;
    `safetensors` the spelling in a safetensors header.
    """

    name: str
    itemsize: int  # bytes
    safetensors: str
    torch: str
    onnx: int
    numpy: np.dtype
    is_float: bool

    def __str__(self) -> str:
        return self.name


FLOAT64 = DType("float64", 8, "F64", "float64", 11, np.dtype(np.float64), True)
FLOAT32 = DType("float32", 4, "F32", "float32", 1, np.dtype(np.float32), True)
FLOAT16 = DType("float16", 2, "F16", "float16", 10, np.dtype(np.float16), True)
BFLOAT16 = DType("bfloat16", 2, "BF16", "bfloat16", 16, np.dtype(ml_dtypes.bfloat16), True)
FLOAT8_E4M3FN = DType("float8_e4m3fn", 1, "F8_E4M3", "float8_e4m3fn", 17, np.dtype(ml_dtypes.float8_e4m3fn), True)
INT8 = DType("int8", 1, "I8", "int8", 3, np.dtype(np.int8), False)

DTYPES: tuple[DType, ...] = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16, FLOAT8_E4M3FN, INT8)
BY_NAME: dict[str, DType] = {dtype.name: dtype for dtype in DTYPES}
BY_SAFETENSORS: dict[str, DType] = {dtype.safetensors: dtype for dtype in DTYPES}

# Bits per element of every dtype that a safetensors header may name (safetensors 0.8, `Dtype`). Tensors of the
# formats that are not in DTYPES can be skipped (an unused buffer of a checkpoint) but never read.
SAFETENSORS_BITS: dict[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
