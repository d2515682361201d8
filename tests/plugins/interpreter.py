"""Triton's interpreter: kernels run on a CPU, in a process of their own, because it is chosen when Triton is imported.

The interpreter of Triton 3.6 does not convert floats as a GPU does: float32 to bfloat16 is cut off, to float8 rounded
half up with a carry that can get lost, and NaN is not kept (`triton/runtime/interpreter.py`, `_convert_float`); its
products of bfloat16 multiply the bits as integers. Those are replaced here: by ml_dtypes' conversions, which round to
nearest even, and by products of float32. Its fused multiply-add rounds twice; here it does so once. It also takes
arrays of one element for numbers, which NumPy 2.4 refuses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import ml_dtypes
import numpy as np


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """Give a function that calls another one, and its arguments, in a process where kernels are interpreted."""
    with ProcessPoolExecutor(1, get_context("spawn"), _interpret) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # so that new tensors are filled: with NaN, or the largest integer
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.create_fma = _create_fma
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_with_index


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of a Triton type's values; the interpreter itself holds bfloat16 and float8 as unsigned integers."""
    names = {"bf16": ml_dtypes.bfloat16, "fp8e4nv": ml_dtypes.float8_e4m3fn, "fp32": np.float32, "fp16": np.float16}
    return np.dtype(names[dtype.scalar.name])


def _convert_float(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    wide = values.view(_numpy_dtype(source)).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return wide.astype(_numpy_dtype(target)).view(f"u{target.scalar.primitive_bitwidth // 8}")


def _create_dot(self: Any, a: Any, b: Any, total: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    def wide(operand: Any) -> np.ndarray:
        if operand.dtype.scalar.is_floating():
            return operand.data.view(_numpy_dtype(operand.dtype)).astype(np.float32)
        return operand.data.astype(total.data.dtype)

    with np.errstate(invalid="ignore", over="ignore"):
        return TensorHandle(np.matmul(wide(a), wide(b)) + total.data, total.dtype.scalar)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    # Products of float32 are exact in float64.
    with np.errstate(invalid="ignore", over="ignore"):
        total = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(total.astype(np.float32), z.dtype.scalar)
