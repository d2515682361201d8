"""Safetensors both ways, against the `safetensors` library and against bytes written by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exporter.dtypes import BFLOAT16, BY_NAME, FLOAT8_E4M3FN, FLOAT32, INT8
from exporter.errors import CheckpointError
from exporter.lazy import LazyTensor, array, concat, full, slice_columns
from exporter.safetensors_io import (
    DATA_ALIGNMENT,
    LEAST_PIECE,
    FileTensor,
    SafetensorsFile,
    SkippedTensor,
    path_inside,
    read_checkpoint,
    read_json,
    read_safetensors,
    shard_tensors,
)

SHAPES = [(), (0,), (0, 3), (3, 0), (1,), (7,), (5, 3), (2, 3, 4)]


def torch_tensor(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    return torch.randn(shape, generator=generator).to(getattr(torch, BY_NAME[dtype].torch))


def torch_bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bits(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).tobytes()


def lazy(tensor: torch.Tensor, dtype: str) -> LazyTensor:
    raw = np.frombuffer(torch_bits(tensor), BY_NAME[dtype].numpy)
    return array(raw.reshape(tuple(tensor.shape)))


def write(path: Path, tensors: Mapping[str, LazyTensor]) -> SafetensorsFile:
    content = SafetensorsFile(tensors)
    raw = b"".join(content.chunks())
    assert len(raw) == content.nbytes
    path.write_bytes(raw)
    return content


def all_tensors() -> dict[str, torch.Tensor]:
    return {
        f"{dtype}.{index}": torch_tensor(shape, dtype, index) for dtype in BY_NAME for index, shape in enumerate(SHAPES)
    }


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = all_tensors()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = read_checkpoint(tmp_path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        read = found[name]
        assert isinstance(read, FileTensor)
        assert (read.shape, read.dtype.name) == (tuple(tensor.shape), name.split(".")[0])
        assert bits(read.numpy()) == torch_bits(tensor)
        if len(read.shape) == 2 and read.size:
            assert bits(read.rows(1, 3)) == torch_bits(tensor[1:3])


def test_the_library_reads_what_we_wrote(tmp_path: Path) -> None:
    tensors = all_tensors()
    write(tmp_path / "ours.safetensors", {name: lazy(tensor, name.split(".")[0]) for name, tensor in tensors.items()})
    found = load_file(tmp_path / "ours.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch_bits(found[name]) == torch_bits(tensor)
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


@settings(max_examples=30, deadline=None, derandomize=True)
@given(shard_bytes=st.integers(1, 3000), count=st.integers(1, 12))
def test_shards_hold_every_tensor_once(shard_bytes: int, count: int) -> None:
    tensors = {f"t{i}": full((i * 7 % 5 + 1, 32), float(i), FLOAT32) for i in range(count)}
    shards = shard_tensors(tensors, shard_bytes)
    assert [name for file in shards.files.values() for name in file.offsets] == list(tensors)
    for file in shards.files.values():
        assert len(file.offsets) == 1 or sum(tensors[name].nbytes for name in file.offsets) <= shard_bytes
    if shards.index is None:
        assert list(shards.files) == ["model.safetensors"]
    else:
        assert shards.index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert {name: shards.locate(name)[0] for name in tensors} == shards.index["weight_map"]


def test_shards_are_read_by_transformers_rules_and_by_us(tmp_path: Path) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in all_tensors().items()}
    shards = shard_tensors({name: lazy(tensor, name.split(".")[1]) for name, tensor in tensors.items()}, 200)
    assert shards.index is not None
    for name, content in shards.files.items():
        (tmp_path / name).write_bytes(b"".join(content.chunks()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards.index))
    found = read_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        by_library = load_file(tmp_path / shards.index["weight_map"][name])[name]
        read = found[name]
        assert isinstance(read, FileTensor)
        assert torch_bits(by_library) == torch_bits(tensor) == bits(read.numpy())
        file, offset = shards.locate(name)
        assert (tmp_path / file).read_bytes()[offset : offset + read.nbytes] == torch_bits(tensor)


def test_a_file_byte_by_byte(tmp_path: Path) -> None:
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"I8","shape":[3],"data_offsets":[8,11]}}'
    )
    header += b" " * (-(8 + len(header)) % 64)
    data = b"\0\0\x80\x3f\0\0\0\x40" + b"\x01\xff\x80"
    expected = len(header).to_bytes(8, "little") + header + data
    a, b = np.array([1, 2], np.float32), np.array([1, -1, -128], np.int8)
    content = write(tmp_path / "x.safetensors", {"a": array(a), "b": array(b)})
    assert (tmp_path / "x.safetensors").read_bytes() == expected
    assert content.offsets == {"a": 8 + len(header), "b": 8 + len(header) + 8}
    found = read_safetensors(tmp_path / "x.safetensors")
    assert {name: tensor.numpy().tolist() for name, tensor in found.items() if isinstance(tensor, FileTensor)} == {
        "a": [1.0, 2.0],
        "b": [1, -1, -128],
    }


@pytest.mark.parametrize("length", range(1, 70, 7))
def test_data_starts_aligned_whatever_the_names(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    content = write(path, {"n" * length: full((4,), 1.0, BFLOAT16)})
    assert content.offsets["n" * length] % DATA_ALIGNMENT == 0
    assert load_file(path)["n" * length].tolist() == [1.0] * 4


def test_names_beyond_ascii_survive(tmp_path: Path) -> None:
    name = 'größe "a"\n\\'
    write(tmp_path / "x.safetensors", {name: full((2,), 1.0, FLOAT32)})
    assert list(load_file(tmp_path / "x.safetensors")) == [name] == list(read_safetensors(tmp_path / "x.safetensors"))


def test_a_dtype_that_no_weight_has_is_known_by_name_only(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(3), "mask": torch.tensor([True])}, tmp_path / "model.safetensors")
    found = read_checkpoint(tmp_path)
    assert all(isinstance(tensor, SkippedTensor) for tensor in found.values())
    assert {(name, tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        ("ids", (3,), "I64"),
        ("mask", (1,), "BOOL"),
    }


def test_streaming_writes_lazily_and_in_order() -> None:
    asked: list[str] = []

    class Spy(LazyTensor):
        __slots__ = ("name",)

        def __init__(self, name: str) -> None:
            super().__init__((4, 1 << 18), INT8)
            self.name = name

        def rows(self, start: int, stop: int) -> np.ndarray:
            asked.append(self.name)
            return np.zeros((stop - start, 1 << 18), np.int8)

    content = SafetensorsFile({"a": Spy("a"), "b": Spy("b")})
    pieces = content.chunks()
    next(pieces)
    assert asked == []  # the header needs no bytes
    next(pieces)
    assert asked == ["a"]
    assert [len(piece) for piece in pieces][-1] <= 1 << 20
    assert asked == sorted(asked)


def test_what_is_read_is_written_back_the_same(tmp_path: Path) -> None:
    """A file of ours read, joined and sliced lazily, written and read by the library."""
    values = np.arange(24, dtype=np.float32).reshape(6, 4).astype(ml_dtypes.float8_e4m3fn)
    write(tmp_path / "a.safetensors", {"w": array(values)})
    read = read_safetensors(tmp_path / "a.safetensors")["w"]
    assert isinstance(read, FileTensor)
    write(tmp_path / "b.safetensors", {"w": concat([read, full((1, 4), 2.0, FLOAT8_E4M3FN)], 0)})
    found = load_file(tmp_path / "b.safetensors")["w"]
    expected = np.concatenate([values, np.full((1, 4), 2.0, values.dtype)])
    assert torch_bits(found) == bits(expected)


def test_hugging_face_cache_layout(tmp_path: Path) -> None:
    """models--x/snapshots/<revision>/<file> -> ../../blobs/<hash>"""
    repository = tmp_path / "models--x"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.ones(3)}, blobs / "feed")
    (snapshot / "model.safetensors").symlink_to("../../blobs/feed")
    assert list(read_checkpoint(snapshot)) == ["w"]
    # ... and only there: blobs of another repository are outside
    other = tmp_path / "models--y" / "blobs"
    other.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, other / "feed")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../models--y/blobs/feed")
    with pytest.raises(CheckpointError, match="link leaves the model folder"):
        read_checkpoint(snapshot)


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "real.safetensors")
    (tmp_path / "model.safetensors").symlink_to("real.safetensors")
    assert list(read_checkpoint(tmp_path)) == ["w"]
    assert path_inside(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"


def test_tensors_outlive_the_folder_listing(tmp_path: Path) -> None:
    """The descriptor stays open with the tensors and is closed with the last one, whatever happens to the name."""
    save_file({"v": torch.zeros(2), "w": torch.ones(3)}, tmp_path / "model.safetensors")
    found = read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    w = found.pop("w")
    del found
    assert isinstance(w, FileTensor)
    assert w.numpy().tolist() == [1, 1, 1]


def test_a_file_truncated_while_open_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    w = read_checkpoint(tmp_path)["w"]
    with path.open("r+b") as file:
        file.truncate(2000)
    assert isinstance(w, FileTensor)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w: file ends before the tensor does"):
        w.numpy()


def test_more_elements_than_32_bits_count(tmp_path: Path) -> None:
    """2^33 codes in a file of holes: what is read is where it should be, in whole rows, in columns, and behind it."""
    rows, columns = 1 << 20, 1 << 13
    entries = {
        "codes": {"dtype": "I8", "shape": [rows, columns], "data_offsets": [0, rows * columns]},
        "behind": {"dtype": "F32", "shape": [2], "data_offsets": [rows * columns, rows * columns + 8]},
    }
    header = json.dumps(entries).encode()
    marks = {(row, column): value for value, (row, column) in enumerate([(1 << 18, 3), (1 << 19, 4), (rows - 1, 5000)])}
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        data = file.tell()
        for (row, column), value in marks.items():
            file.seek(data + row * columns + column)
            file.write(bytes([value + 1]))
        file.seek(data + rows * columns)
        file.write(np.array([1.5, 2.5], "<f4").tobytes())
    tensors = read_checkpoint(tmp_path)
    codes, behind = tensors["codes"], tensors["behind"]
    assert isinstance(codes, FileTensor)
    assert isinstance(behind, FileTensor)
    assert codes.size == codes.nbytes == 1 << 33
    assert behind.numpy().tolist() == [1.5, 2.5]
    twice = concat([codes, codes], axis=0)
    for (row, column), value in marks.items():
        expected = np.zeros(columns, np.int8)
        expected[column] = value + 1
        np.testing.assert_array_equal(codes.rows(row, row + 1)[0], expected)
        np.testing.assert_array_equal(twice.rows(rows + row, rows + row + 1)[0], expected)
        half = slice_columns(codes, 4096, 8192)
        np.testing.assert_array_equal(half.rows(row, row + 1)[0], expected[4096:])
    written = SafetensorsFile({"twice": twice, "behind": behind})
    assert written.offsets["behind"] - written.offsets["twice"] == 1 << 34


JSON_REFUSED = {
    "NaN": '{"a": NaN}',
    "Infinity": '{"a": -Infinity}',
    "beyond a double": '{"a": 1e400}',
    "repeated key": '{"a": 1, "a": 2}',
    "repeated key inside": '{"a": {"b": 1, "b": 1}}',
    "deep list": "[" * 100 + "]" * 100,
    "very deep list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 40 + "1" + "}" * 40,
    "giant integer": '{"a": ' + "9" * 5000 + "}",
    "half a surrogate pair": r'{"a": "\ud800"}',
    "half a surrogate pair as key": r'{"\udc80": 1}',
    "not UTF-8": b'{"a": "\xff"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "trailing comma": '{"a": 1,}',
    "two values": "{} {}",
    "empty": "",
}


@pytest.mark.parametrize("case", JSON_REFUSED)
def test_json_is_parsed_strictly(case: str, tmp_path: Path) -> None:
    text = JSON_REFUSED[case]
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"x\.json: not valid JSON \("):
        read_json(path)


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, "\\u00e9\\ud83d\\ude00", null, true]}', "[" * 30 + "]" * 30, "1e308"])
def test_json_that_is_fine(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    assert read_json(tmp_path / "x.json") == json.loads(text)


def test_json_size_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[" + "0," * 100 + "0]")
    assert len(read_json(tmp_path / "x.json")) == 101
    with pytest.raises(CheckpointError, match="too large: expected at most 100 bytes, found 203"):
        read_json(tmp_path / "x.json", max_bytes=100)


def test_columns_are_read_without_the_rest_of_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 3 * LEAST_PIECE
    matrix = np.random.default_rng(0).integers(-100, 100, (5, width)).astype(np.int8)
    tensors = {"first": torch.zeros(3, dtype=torch.int8), "matrix": torch.from_numpy(matrix)}
    save_file(tensors, tmp_path / "model.safetensors")
    tensor = read_safetensors(tmp_path / "model.safetensors")["matrix"]
    assert isinstance(tensor, FileTensor)
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: read.append(preadv(*arguments)) or read[-1])
    columns = slice_columns(slice_columns(tensor, 10, width), LEAST_PIECE, 2 * LEAST_PIECE)
    np.testing.assert_array_equal(columns.rows(1, 4), matrix[1:4, LEAST_PIECE + 10 : 2 * LEAST_PIECE + 10])
    assert sum(read) == 3 * LEAST_PIECE
    np.testing.assert_array_equal(slice_columns(tensor, 7, 9).numpy(), matrix[:, 7:9])
