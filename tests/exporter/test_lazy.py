"""Every lazy node against the same operation on whole numpy arrays, and memory that does not grow with the tensor."""

from __future__ import annotations

import re
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from exporter.dtypes import BFLOAT16, BY_NAME, FLOAT8_E4M3FN, FLOAT16, FLOAT32, FLOAT64, INT8, DType
from exporter.errors import CheckpointError, GraphError
from exporter.lazy import (
    CHUNK_BYTES,
    LazyTensor,
    add,
    array,
    cast,
    computed,
    concat,
    full,
    pad,
    reshape,
    scale_columns,
    scale_rows,
    shape_only,
    slice_columns,
    slice_rows,
)
from exporter.safetensors_io import read_safetensors

DTYPE_NAMES = sorted(BY_NAME)


def random(shape: tuple[int, ...], dtype: DType, seed: int) -> np.ndarray:
    values = 4 * np.random.default_rng(seed).standard_normal(shape)
    return (values if dtype.is_float else np.clip(20 * values, -100, 100)).astype(dtype.numpy)


def bits(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).tobytes()


def wide(*dtypes: DType) -> np.dtype:
    return np.dtype(np.float64 if FLOAT64 in dtypes else np.float32)


# One case per node: from matrices a [6, 5], b [3, 5], c [6, 4] and vectors r [6], k [5] to (lazy result, numpy result).
Case = Callable[..., tuple[LazyTensor, np.ndarray]]


def scaled(a: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The product in float32 (float64 if either is), then one cast: numpy's, on whole arrays."""
    kind = wide(BY_NAME[a.dtype.name], BY_NAME[factors.dtype.name])
    product = a.astype(kind) * factors.astype(kind)
    return product.astype(a.dtype)


def summed(*parts: np.ndarray) -> np.ndarray:
    total = np.zeros(parts[0].shape, wide(BY_NAME[parts[0].dtype.name]))
    for part in parts:
        total += part.astype(total.dtype)
    return total.astype(parts[0].dtype)


NODES: dict[str, Case] = {
    "array": lambda a, b, c, r, k: (array(a), a),
    "concat rows": lambda a, b, c, r, k: (concat([array(a), array(b), array(a)], 0), np.concatenate([a, b, a])),
    "concat columns": lambda a, b, c, r, k: (concat([array(a), array(c)], 1), np.concatenate([a, c], axis=1)),
    "concat vectors": lambda a, b, c, r, k: (concat([array(r), array(k)], 0), np.concatenate([r, k])),
    "slice rows": lambda a, b, c, r, k: (slice_rows(array(a), 1, 4), a[1:4]),
    "slice columns": lambda a, b, c, r, k: (slice_columns(array(a), 2, 5), a[:, 2:5]),
    "slice of nothing": lambda a, b, c, r, k: (slice_rows(array(a), 3, 3), a[3:3]),
    "scale columns": lambda a, b, c, r, k: (scale_columns(array(a), array(k)), scaled(a, k[None, :])),
    "scale rows": lambda a, b, c, r, k: (scale_rows(array(a), array(r)), scaled(a, r[:, None])),
    "cast": lambda a, b, c, r, k: (cast(cast(array(a), FLOAT64), BY_NAME[a.dtype.name]), a),
    "sum of one": lambda a, b, c, r, k: (add([array(a)]), a),
    "sum": lambda a, b, c, r, k: (add([array(a), array(-a[::-1]), array(a)]), summed(a, -a[::-1], a)),
    "pad rows": lambda a, b, c, r, k: (pad(array(a), 0, 9), np.pad(a, ((0, 3), (0, 0)))),
    "pad columns": lambda a, b, c, r, k: (pad(array(a), 1, 8), np.pad(a, ((0, 0), (0, 3)))),
    "pad vector": lambda a, b, c, r, k: (pad(array(r), 0, 8), np.pad(r, (0, 2))),
    "full": lambda a, b, c, r, k: (full((4, 3), 1.5 if BY_NAME[a.dtype.name].is_float else 7, BY_NAME[a.dtype.name]),
                                   np.array([[1.5 if BY_NAME[a.dtype.name].is_float else 7] * 3] * 4, a.dtype)),
    "vector as matrix": lambda a, b, c, r, k: (reshape(array(r), (6, 1)), r[:, None]),
    "matrix as vector": lambda a, b, c, r, k: (reshape(array(c[:, :1]), (6,)), c[:, 0]),
    "number as vector": lambda a, b, c, r, k: (reshape(array(r[0].reshape(())), (1,)), r[:1]),
    "fused": lambda a, b, c, r, k: (
        pad(concat([scale_columns(array(a), array(k)), slice_rows(array(b), 0, 2)], 0), 0, 10),
        np.concatenate([scaled(a, k[None, :]), b[:2], np.zeros((2, 5), a.dtype)]),
    ),
    "side by side": lambda a, b, c, r, k: (
        slice_columns(pad(concat([array(a), slice_columns(array(c), 1, 4)], 1), 1, 10), 3, 9),
        np.concatenate([a, c[:, 1:4], np.zeros((6, 2), a.dtype)], axis=1)[:, 3:9],
    ),
}  # fmt: skip


ARITHMETIC = ("scale columns", "scale rows", "sum", "fused")
# Arithmetic on integers is left out: nobody does it, and no library says what it should give.
NODE_CASES = [
    (node, dtype) for node in NODES for dtype in DTYPE_NAMES if BY_NAME[dtype].is_float or node not in ARITHMETIC
]


@pytest.mark.parametrize(("node", "dtype"), NODE_CASES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_node_equals_numpy_in_any_pieces(node: str, dtype: str, data: st.DataObject) -> None:
    kind = BY_NAME[dtype]
    shapes = [(6, 5), (3, 5), (6, 4), (6,), (5,)]
    a, b, c, r, k = (random(shape, kind, seed) for seed, shape in enumerate(shapes))
    lazy, expected = NODES[node](a, b, c, r, k)
    assert (lazy.shape, lazy.dtype, lazy.nbytes) == (expected.shape, kind, expected.nbytes)
    start = data.draw(st.integers(0, lazy.num_rows))
    stop = data.draw(st.integers(start, lazy.num_rows))
    assert bits(lazy.rows(start, stop)) == bits(expected[start:stop])
    max_bytes = data.draw(st.integers(1, 200))
    pieces = list(lazy.chunks(max_bytes))
    assert b"".join(map(bits, pieces)) == bits(expected)
    assert all(piece.nbytes <= max_bytes or len(piece) == 1 for piece in pieces)
    assert all(piece.flags.c_contiguous for piece in pieces)
    assert bits(lazy.numpy()) == bits(expected)
    if lazy.num_rows and len(lazy.shape) == 2:
        left = data.draw(st.integers(0, lazy.shape[1]))
        right = data.draw(st.integers(left, lazy.shape[1]))
        columns = slice_columns(lazy, left, right)
        assert (columns.shape, columns.dtype) == (expected[:, left:right].shape, kind)
        assert bits(columns.numpy()) == bits(expected[:, left:right])
        half = slice_columns(columns, 0, columns.shape[1] // 2)
        assert bits(half.rows(start, stop)) == bits(expected[start:stop, left:right][:, : half.shape[1]])


@pytest.mark.parametrize("source", DTYPE_NAMES)
@pytest.mark.parametrize("target", DTYPE_NAMES)
def test_cast_rounds_every_value_to_the_nearest(source: str, target: str) -> None:
    values = random((40, 7), BY_NAME[source], 3)
    lazy = cast(array(values), BY_NAME[target])
    assert (lazy.shape, lazy.dtype) == (values.shape, BY_NAME[target])
    got = np.concatenate(list(lazy.chunks(50)))
    for value, rounded in zip(values.ravel(), got.ravel(), strict=True):
        assert_nearest(float(value), rounded, BY_NAME[target])


def assert_nearest(value: float, rounded: np.generic, dtype: DType) -> None:
    """By exact arithmetic over the neighbours that the format has."""
    exact = Fraction(value)
    if dtype.is_float:
        info = ml_dtypes.finfo(dtype.numpy)
        spacing = (
            max(float(info.eps) * 2.0 ** np.floor(np.log2(abs(value))), float(info.smallest_subnormal))
            if value
            else 0.0
        )
        error = abs(exact - Fraction(float(rounded)))
        assert error <= Fraction(spacing) / 2, (value, rounded)
    else:
        assert int(rounded) == min(127, max(-128, round(exact)))  # Python rounds a Fraction half to even


# Just above and at the middle of two neighbours, where two roundings differ from one: 1 + half a step (+ a bit).
HALFWAY = [(BFLOAT16, 2.0**-8, 2.0**-7), (FLOAT8_E4M3FN, 2.0**-4, 2.0**-3), (FLOAT16, 2.0**-11, 2.0**-10)]


@pytest.mark.parametrize(("dtype", "half", "step"), HALFWAY, ids=lambda value: str(value))
def test_rounding_happens_once(dtype: DType, half: float, step: float) -> None:
    tiny = 2.0**-45  # lost in float32
    values = np.array([1 + half, 1 + half + tiny, 1 + half - tiny, 1 + step + half, 1 + step + half - tiny, 0, np.inf])
    values = np.concatenate([values, -values])[:, None]
    expected = np.array([1, 1 + step, 1, 1 + 2 * step, 1 + step, 0])
    got = cast(array(values), dtype).numpy().astype(np.float64)[:, 0]
    np.testing.assert_array_equal(got[:6], expected)
    np.testing.assert_array_equal(got[7:13], -expected)
    # a product in float64, of narrow values by float64 factors
    ones = np.ones((1, 5), dtype.numpy)
    product = scale_columns(array(ones), array(values[:5, 0].copy())).numpy().astype(np.float64)[0]
    np.testing.assert_array_equal(product, expected[:5])


# The largest number of a format that rounds to one of float16: 65520 is halfway to what would be the next.
WIDE = {"float64": 65519.999, "float32": 65519.996, "bfloat16": 65280.0}


@pytest.mark.parametrize(("source", "largest"), WIDE.items(), ids=WIDE)
def test_float16_gets_no_new_infinities(source: str, largest: float) -> None:
    kept = np.array([[-largest, largest, np.inf, -np.inf, np.nan, 1e-30]]).astype(BY_NAME[source].numpy)
    np.testing.assert_array_equal(cast(array(kept), FLOAT16).numpy(), kept.astype(np.float64).astype(np.float16))
    for beyond in (65520 if source != "bfloat16" else 65536, -1e6, 3e38):
        values = np.array([[1, beyond]]).astype(BY_NAME[source].numpy)
        found = re.escape(f"{np.abs(values).max().astype(np.float64):g}")
        with pytest.raises(CheckpointError, match=f"beyond float16.*at most 65504, found {found}. Ask for bfloat16"):
            cast(array(values), FLOAT16).numpy()


def doubled(tensor: LazyTensor) -> np.ndarray:
    return 2 * tensor.numpy().astype(np.float32)


@pytest.mark.parametrize(
    "of",
    [
        lambda tensor: scale_columns(tensor, array(np.array([1, 2, 1], np.float32))),
        lambda tensor: computed(tensor.shape, FLOAT16, doubled, tensor),
    ],
    ids=["scaled", "computed"],
)
def test_a_product_beyond_float16_names_its_tensor(of: Callable[[LazyTensor], LazyTensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"gate": np.full((2, 3), 60000, np.float16)}, path)
    gate = read_safetensors(path)["gate"]
    assert isinstance(gate, LazyTensor)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: gate: a value is beyond float16"):
        of(gate).numpy()


def test_cast_to_int8_rounds_to_even_and_saturates() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.7, 127.6, 1000, -1000, np.inf, -np.inf, np.nan], np.float32)
    expected = [0, 2, 2, 0, -2, 127, 127, 127, -128, 127, -128, 0]
    assert cast(array(values), INT8).numpy().tolist() == expected


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1,), (1, 1), (2, 3, 4)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    values = random(shape, FLOAT32, 5) if shape else np.array(2.5, np.float32)
    lazy = array(values)
    assert (lazy.shape, lazy.size, lazy.nbytes) == (shape, values.size, values.nbytes)
    assert lazy.numpy().shape == shape
    assert b"".join(map(bits, lazy.chunks(4))) == bits(values)
    made = full(shape, 3.0, BFLOAT16)
    assert made.numpy().shape == shape
    assert bits(made.numpy()) == bits(np.full(shape, 3.0, ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_an_array_of_the_other_byte_order_is_swapped(dtype: str) -> None:
    """A chunk's bytes go into files as they are."""
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    [piece] = array(values.astype(values.dtype.newbyteorder())).chunks()
    assert piece.tobytes() == values.tobytes()


def test_chunks_of_an_empty_tensor_with_many_rows_end_at_once() -> None:
    assert list(full((1 << 62, 0), 0.0, FLOAT32).chunks()) == []


def test_a_tensor_of_several_chunks_is_read_whole() -> None:
    values = np.arange(3 * CHUNK_BYTES // 8, dtype=np.float32).reshape(-1, 6)
    assert len(list(array(values).chunks())) == 2
    np.testing.assert_array_equal(array(values).numpy(), values)


REFUSED: dict[str, Callable[[], object]] = {
    "dtypes differ": lambda: concat([full((2, 3), 0, FLOAT32), full((2, 3), 0, FLOAT16)], 0),
    "columns differ": lambda: concat([full((2, 3), 0, FLOAT32), full((2, 4), 0, FLOAT32)], 0),
    "rows differ": lambda: concat([full((2, 3), 0, FLOAT32), full((3, 3), 0, FLOAT32)], 1),
    "ranks differ": lambda: concat([full((2,), 0, FLOAT32), full((2, 3), 0, FLOAT32)], 0),
    "rows beyond": lambda: slice_rows(full((2, 3), 0, FLOAT32), 1, 3),
    "rows reversed": lambda: slice_rows(full((2, 3), 0, FLOAT32), 2, 1),
    "columns negative": lambda: slice_columns(full((2, 3), 0, FLOAT32), -1, 2),
    "too many factors": lambda: scale_columns(full((2, 3), 0, FLOAT32), full((4,), 0, FLOAT32)),
    "factors of the other axis": lambda: scale_rows(full((2, 3), 0, FLOAT32), full((3,), 0, FLOAT32)),
    "padding that shrinks": lambda: pad(full((2, 3), 0, FLOAT32), 1, 2),
    "sum of two shapes": lambda: add([full((2,), 0, FLOAT32), full((3,), 0, FLOAT32)]),
    "integers as weights": lambda: array(np.zeros(3, np.int64)),
    "reshape that moves rows": lambda: reshape(full((6,), 1.0, FLOAT32), (3, 2)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_misuse_is_refused(case: str) -> None:
    with pytest.raises(GraphError):
        REFUSED[case]()


def test_a_shape_alone_has_no_bytes() -> None:
    known = full((2, 3), 1.0, FLOAT32)
    whole = concat([known, shape_only((4, 3), FLOAT32)], 0)
    assert known.has_bytes
    assert not whole.has_bytes
    assert not scale_columns(whole, full((3,), 1.0, FLOAT32)).has_bytes
    assert whole.shape == (6, 3)
    with pytest.raises(CheckpointError, match="structure without weights"):
        whole.numpy()


class Counted(LazyTensor):
    """A matrix made when read, which remembers the largest request."""

    __slots__ = ("largest",)

    def __init__(self, shape: tuple[int, int], dtype: DType) -> None:
        super().__init__(shape, dtype)
        self.largest = 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        out = np.ones((stop - start, self.shape[1]), self.dtype.numpy)
        self.largest = max(self.largest, out.nbytes)
        return out


CHUNK = 64 << 10
BOUNDED: dict[str, Callable[[LazyTensor, LazyTensor], LazyTensor]] = {
    "fused gate": lambda a, b: pad(concat([scale_columns(a, full((512,), 2.0, BFLOAT16)), b], 0), 0, 1 << 15),
    "fused down": lambda a, b: pad(concat([a, b], 1), 1, 2048),
    "narrow slice of a wide matrix": lambda a, b: slice_columns(concat([a] * 8, 1), 100, 102),
    "cast of a slice": lambda a, b: cast(slice_columns(a, 7, 9), FLOAT32),
    "sum": lambda a, b: add([a, b]),
}


@pytest.mark.parametrize("case", BOUNDED)
def test_reading_in_chunks_takes_memory_for_a_chunk(case: str) -> None:
    """8 MB sources, 64 KB chunks; a whole source in memory would be far beyond the bound."""
    a, b = Counted((1 << 13, 512), BFLOAT16), Counted((1 << 13, 512), BFLOAT16)
    lazy = BOUNDED[case](a, b)
    tracemalloc.start()
    try:
        total = sum(piece.nbytes for piece in lazy.chunks(CHUNK))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == lazy.nbytes
    assert 0 < max(a.largest, b.largest) <= CHUNK
    assert peak < 16 * CHUNK


def test_columns_of_one_part_leave_the_others_unread() -> None:
    a, b = Counted((4, 512), BFLOAT16), Counted((4, 256), BFLOAT16)
    assert slice_columns(concat([a, b], 1), 512, 600).numpy().shape == (4, 88)
    assert (a.largest, b.largest > 0) == (0, True)


def test_what_several_threads_want_is_computed_once() -> None:
    calls: list[int] = []
    barrier = threading.Barrier(4, timeout=30)

    def find() -> np.ndarray:
        calls.append(1)
        time.sleep(0.05)  # long enough for the others to find it not there yet
        return np.float32(7)

    scale = computed((), FLOAT32, find)

    def read(_: int) -> float:
        barrier.wait()
        return float(scale.rows(0, 1))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [7, 7, 7, 7]
    assert len(calls) == 1
