"""8-bit arithmetic against torch and ml_dtypes: every bfloat16 value, and scales of every size."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import numerics
from exporter.dtypes import FLOAT8_E4M3FN, INT8, DType
from exporter.errors import CheckpointError, GraphError
from exporter.numerics import LARGEST, SMALLEST_SCALE, amax, dequantize, quantize, scale_from_amax

EVERY_BFLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
FINITE = EVERY_BFLOAT16[np.isfinite(EVERY_BFLOAT16.astype(np.float32))]
SCALES = [1.0, 0.0123, 3.0, 2.0**-40, 1e30]


def codes_of_torch(values: np.ndarray, scale: np.ndarray, dtype: DType) -> np.ndarray:
    """What ModelOpt computes (modelopt/torch/export/quant_utils.py), and torch for numbers beyond the range."""
    tensor = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    quotient = tensor / torch.from_numpy(np.asarray(scale, np.float32))
    if dtype == INT8:
        return quotient.round().clamp(-128, 127).to(torch.int8).numpy()
    return quotient.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [FLOAT8_E4M3FN, INT8], ids=str)
def test_every_bfloat16_under_one_scale(dtype: DType, scale: float) -> None:
    found = quantize(FINITE, np.float32(scale), dtype)
    np.testing.assert_array_equal(found.view(np.uint8), codes_of_torch(FINITE, np.float32(scale), dtype).view(np.uint8))


@pytest.mark.parametrize("dtype", [FLOAT8_E4M3FN, INT8], ids=str)
def test_every_bfloat16_under_a_scale_per_row(dtype: DType) -> None:
    rows = FINITE[: len(FINITE) // 256 * 256].reshape(256, -1)
    scales = np.geomspace(1e-3, 1e3, 256).astype(np.float32)
    expected = codes_of_torch(rows, scales[:, None], dtype)
    np.testing.assert_array_equal(quantize(rows, scales, dtype).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", [FLOAT8_E4M3FN, INT8], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_refused(dtype: DType, bad: float) -> None:
    values = np.ones((4, 8), np.float32)
    values[2, 3] = bad
    for work in (lambda: amax(values), lambda: amax(values, axis=1), lambda: quantize(values, np.float32(1), dtype)):
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            work()


@given(st.floats(0, float(np.finfo(np.float32).max), width=32), st.sampled_from([FLOAT8_E4M3FN, INT8]))
@settings(max_examples=300, deadline=None)
def test_a_range_of_any_size_comes_back(largest: float, dtype: DType) -> None:
    """The largest value is off by at most half a step of the format; nothing overflows; zero stays zero."""
    values = np.array([-largest, largest, largest / 3, 0], np.float32)
    scale = scale_from_amax(amax(values), dtype)
    assert SMALLEST_SCALE <= scale < np.inf
    back = dequantize(quantize(values, scale, dtype), scale).astype(np.float64)
    assert np.isfinite(back).all()
    assert back[3] == 0
    step = 1 / 16 if dtype == FLOAT8_E4M3FN else 1 / 254
    if largest > 1e3 * SMALLEST_SCALE:
        assert np.abs(back[:2] - values[:2]).max() <= 1e-5 * largest
        assert abs(back[2] - values[2]) <= step * largest / (3 if dtype == FLOAT8_E4M3FN else 1) * 1.001


@pytest.mark.parametrize(
    ("amaxes", "expected"),
    [
        ([0.0], [1.0]),
        ([448.0, 0.0, 44.8], [1.0, 1.0, np.float32(44.8) / np.float32(448)]),
        ([1e-44], [SMALLEST_SCALE]),
    ],
)
def test_scales(amaxes: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(scale_from_amax(np.array(amaxes, np.float32), FLOAT8_E4M3FN), np.float32(expected))


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_ranges_that_are_none(bad: float) -> None:
    with pytest.raises(GraphError, match="finite number"):
        scale_from_amax(np.array([1.0, bad]), INT8)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_an_empty_tensor_has_no_range(shape: tuple[int, ...]) -> None:
    with pytest.raises(GraphError, match="empty tensor"):
        amax(np.empty(shape, np.float32))


@pytest.mark.parametrize("dtype", [FLOAT8_E4M3FN, INT8], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3), (3, 0)], ids=str)
def test_one_scale_for_any_shape(shape: tuple[int, ...], dtype: DType) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes = quantize(values, np.float32(0.01), dtype)
    assert (codes.shape, codes.dtype) == (shape, dtype.numpy)
    np.testing.assert_array_equal(codes.ravel(), quantize(values.reshape(1, -1), np.float32(0.01), dtype)[0])


@pytest.mark.parametrize("slab_bytes", [64, 1 << 30])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_slabs_change_nothing(slab_bytes: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "SLAB_BYTES", slab_bytes)
    values = (
        np.random.default_rng(0).standard_normal((37, 19)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    )
    wide = np.abs(values.astype(np.float64))
    np.testing.assert_array_equal(amax(values), np.float32(wide.max()))
    np.testing.assert_array_equal(amax(values, axis=1), wide.max(axis=1).astype(np.float32))
    np.testing.assert_array_equal(amax(values, axis=0), wide.max(axis=0).astype(np.float32))
    scales = scale_from_amax(amax(values, axis=1), INT8)
    codes = quantize(values, scales, INT8)
    expected = np.rint(values.astype(np.float32) / scales[:, None])
    np.testing.assert_array_equal(codes, expected)
    assert np.abs(codes).max() == LARGEST[INT8]
