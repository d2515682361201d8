"""Safetensors files, both ways, without holding tensors: headers in, lazy tensors out; lazy tensors in, bytes out.

Format (safetensors 0.8): u64 little-endian header length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`
(offsets from the end of the header, begin inclusive, end exclusive), then the data without holes or overlaps. A
sharded checkpoint has `model.safetensors.index.json` with `weight_map: {tensor name: file name}`.

A checkpoint is untrusted: nothing is allocated or read because a header says so before it is held against the
file's real size, and no path leaves the folder.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from exporter.dtypes import BY_SAFETENSORS, SAFETENSORS_BITS, DType
from exporter.errors import CheckpointError
from exporter.lazy import LazyTensor, slice_columns

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_JSON_BYTES = 64 << 20  # an index of 100,000 tensors is about 10 MB
MAX_NAME = 1000  # characters of a tensor or file name
MAX_JSON_DEPTH = 32  # a config has 5 levels
MAX_RANK = 8
LFS_POINTER = b"version "  # how the text begins that a clone without Git LFS has in a large file's place
# Data starts at a multiple of this in files we write, so that a mapped file gives aligned tensors.
DATA_ALIGNMENT = 64
LEAST_PIECE = 2048  # bytes of a row that are worth a system call of their own


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file strictly: bounded size and depth, finite numbers, no repeated keys, whole characters.

    Raises:
        CheckpointError: the file is missing, too large or not such JSON.
    """
    with _OpenFile(path) as file:
        size = os.fstat(file.fd).st_size
        if size > max_bytes:
            raise CheckpointError("file is too large", file=path, expected=f"at most {max_bytes} bytes", found=size)
        return _parse_json(file.read(0, size), path)


def read_checkpoint(folder: Path) -> dict[str, FileTensor | SkippedTensor]:
    """Open all tensors of a folder: `model.safetensors`, else the shards its index names. No tensor data is read.

    Raises:
        CheckpointError: a file is missing, truncated, malformed or outside the folder; names file and tensor.
    """
    if os.path.lexists(folder / SINGLE_FILE):
        return read_safetensors(path_inside(folder, SINGLE_FILE))
    index_path = path_inside(folder, INDEX_FILE)
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("index has no weight_map", file=index_path)
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError("weight_map maps tensor names to file names", file=index_path)
    shards = {
        name: read_safetensors(path_inside(folder, name, named_by=index_path))
        for name in sorted(set(weight_map.values()))
    }
    for shard, tensors in shards.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    "tensor is not where the index says",
                    file=folder / shard,
                    tensor=name,
                    expected=weight_map.get(name, "an entry in weight_map"),
                    found=shard,
                )
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError("the index names a tensor that the shard lacks", file=folder / shard, tensor=name)
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder has safetensors weights at all (their contents are not looked at)."""
    return any(os.path.lexists(folder / name) for name in (SINGLE_FILE, INDEX_FILE))


def checkpoint_files(folder: Path) -> list[str]:
    """Name the files that `read_checkpoint` reads; it has found nothing wrong with them."""
    if os.path.lexists(folder / SINGLE_FILE):
        return [SINGLE_FILE]
    return [INDEX_FILE, *sorted(set(read_json(path_inside(folder, INDEX_FILE))["weight_map"].values()))]


def read_safetensors(path: Path) -> dict[str, FileTensor | SkippedTensor]:
    """Read one file's header and check it against the file's size. Tensors share one open file descriptor."""
    file = _OpenFile(path)
    file_size = os.fstat(file.fd).st_size
    if file_size < 8:
        raise CheckpointError("file is too short for a header", file=path, expected=">= 8 bytes", found=file_size)
    start = file.read(0, 8)
    header_size = int.from_bytes(start, "little")
    limit = min(MAX_HEADER_BYTES, file_size - 8)
    if start == LFS_POINTER:
        raise CheckpointError(
            "a Git LFS pointer is in the place of the file", file=path, hint="fetch the file itself (git lfs pull)"
        )
    if header_size > limit:
        raise CheckpointError(
            "header length is beyond the file or the format's limit",
            file=path,
            expected=f"at most {limit}",
            found=header_size,
            hint="is the file truncated, or not a safetensors file?",
        )
    header = _parse_json(file.read(8, header_size), path)
    if not isinstance(header, dict):
        raise CheckpointError("header is not a JSON object", file=path)
    header.pop("__metadata__", None)
    data_start = 8 + header_size
    entries = [_entry(path, name, fields) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = 0
    for entry in entries:
        if entry.begin != position:
            problem = "tensor data overlaps the tensor before it" if entry.begin < position else "hole in the data"
            raise CheckpointError(problem, file=path, tensor=entry.name, expected=position, found=entry.begin)
        position = entry.end
    if position != file_size - data_start:
        raise CheckpointError(
            "data does not end where the header says",
            file=path,
            expected=f"{position} bytes of data",
            found=file_size - data_start,
            hint="the file is truncated or was overwritten; download or export it again",
        )
    tensors: dict[str, FileTensor | SkippedTensor] = {}
    for entry in entries:
        dtype = BY_SAFETENSORS.get(entry.dtype)
        if dtype is None:
            tensors[entry.name] = SkippedTensor(path, entry.name, entry.shape, entry.dtype)
        else:
            tensors[entry.name] = FileTensor(file, entry.name, data_start + entry.begin, entry.shape, dtype)
    return tensors


@dataclass(frozen=True, slots=True)
class SkippedTensor:
    """A tensor of a dtype that no weight of ours has (an integer buffer, say): known by name, never read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as spelled in the header


class FileTensor(LazyTensor):
    """A tensor in a safetensors file, read with positioned reads (no mapping, so memory is what is asked for)."""

    __slots__ = ("_file", "name", "offset")

    def __init__(self, file: _OpenFile, name: str, offset: int, shape: tuple[int, ...], dtype: DType) -> None:
        super().__init__(shape, dtype)
        self._file = file
        self.name = name
        self.offset = offset  # bytes from the start of the file

    @property
    def path(self) -> Path:
        return self._file.path

    def rows(self, start: int, stop: int) -> np.ndarray:
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        out = np.empty(shape, self.dtype.numpy)
        first = self.offset + start * self.row_nbytes if self.shape else self.offset
        self._file.read_into(out.reshape(-1).view(np.uint8).data, first, self.name)
        return out

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        if (stop - start) * self.dtype.itemsize < LEAST_PIECE:
            return super().cut_columns(start, stop)
        return _FileColumns(self._file, self, start, stop)


class _FileColumns(LazyTensor):
    """Columns of a matrix in a file: of every row the piece that is asked for is read, and nothing else."""

    __slots__ = ("_file", "_matrix", "_start")

    def __init__(self, file: _OpenFile, matrix: FileTensor, start: int, stop: int) -> None:
        super().__init__((matrix.shape[0], stop - start), matrix.dtype)
        self._file = file
        self._matrix = matrix
        self._start = start

    def rows(self, start: int, stop: int) -> np.ndarray:
        matrix = self._matrix
        out = np.empty((stop - start, self.shape[1]), self.dtype.numpy)
        pieces = out.view(np.uint8)
        first = matrix.offset + start * matrix.row_nbytes + self._start * self.dtype.itemsize
        for row, piece in enumerate(pieces):
            self._file.read_into(piece.data, first + row * matrix.row_nbytes, matrix.name)
        return out

    def cut_columns(self, start: int, stop: int) -> LazyTensor:
        return slice_columns(self._matrix, self._start + start, self._start + stop)


class _OpenFile:
    """A file descriptor that closes with its last tensor."""

    __slots__ = ("__weakref__", "fd", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError("not a regular file", file=path)
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO put there since blocks nobody
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            raise CheckpointError(f"cannot be opened ({_reason(error)})", file=path) from error

    def read(self, offset: int, size: int) -> bytes:
        out = bytearray(size)
        self.read_into(memoryview(out), offset, None)
        return bytes(out)

    def read_into(self, out: memoryview, offset: int, tensor: str | None) -> None:
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self.fd, [out[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot be read ({_reason(error)})", file=self.path, tensor=tensor) from error
            if count == 0:
                raise CheckpointError("file ends before the tensor does", file=self.path, tensor=tensor)
            done += count

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(path: Path, name: str, fields: Any) -> _Entry:
    def wrong(problem: str, expected: object = None, found: object = None) -> CheckpointError:
        return CheckpointError(problem, file=path, tensor=name[:200], expected=expected, found=found)

    if len(name) > MAX_NAME:
        raise wrong("tensor name is too long", f"at most {MAX_NAME} characters", len(name))

    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise wrong("malformed header entry", "dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
        raise wrong("unknown dtype", ", ".join(SAFETENSORS_BITS), str(dtype)[:40])
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(size) for size in shape):
        raise wrong("malformed shape", f"a list of at most {MAX_RANK} sizes", str(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise wrong("malformed data_offsets", "[begin, end]", str(offsets)[:80])
    begin, end = offsets
    nbits = math.prod(shape) * SAFETENSORS_BITS[dtype]
    if begin > end or nbits != (end - begin) * 8:
        raise wrong("data_offsets do not fit shape and dtype", f"{nbits / 8:g} bytes", f"[{begin}, {end}]")
    return _Entry(name, dtype, tuple(shape), begin, end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _parse_json(raw: bytes, path: Path) -> Any:
    def refuse_constant(name: str) -> Any:
        raise ValueError(f"{name} is not a number")

    def finite(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise ValueError(f"{digits[:40]} is beyond the range of a number")
        return number

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    try:
        text = raw.decode("utf-8")
        parsed = json.loads(text, parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=unique)
        if _depth(parsed) > MAX_JSON_DEPTH:
            raise ValueError(f"nested more than {MAX_JSON_DEPTH} levels deep")
        if "\\u" in text:  # the only way to write half of a surrogate pair, which no file name or terminal takes
            json.dumps(parsed, ensure_ascii=False).encode()
        return parsed
    except (ValueError, RecursionError) as error:  # ValueError covers JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"not valid JSON ({str(error)[:120]})", file=path) from error


def _depth(parsed: Any) -> int:
    """Levels of lists and objects, counted level by level, since recursion is what deep nesting breaks."""
    depth, level = 0, [parsed]
    while level and depth <= MAX_JSON_DEPTH:
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        depth += 1
    return depth


def path_inside(folder: Path, name: str, named_by: Path | None = None) -> Path:
    """Join and insist that the result, links followed, stays in the folder (or in its Hugging Face cache's blobs).

    Raises:
        CheckpointError: it does not; names the file that holds the name (`named_by`) or the link and its target.
    """
    pure = PurePosixPath(name)
    outside = CheckpointError(
        "path leaves the model folder", file=named_by or folder, expected="a file in the folder", found=repr(name)[:200]
    )
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise outside
    if len(name) > MAX_NAME:
        raise CheckpointError("file name is too long", file=named_by or folder, expected=MAX_NAME, found=len(name))
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, up to Python 3.12
        raise CheckpointError(f"link cannot be followed ({error})", file=path) from error
    # ~/.cache/huggingface/hub/models--x/{snapshots/<revision>/file -> ../../blobs/<hash>}
    is_cache_blob = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not is_cache_blob:
        raise CheckpointError(
            "link leaves the model folder",
            file=path,
            expected=f"a file below {root}",
            found=real,
            hint="copy the file into the folder",
        )
    return path


class SafetensorsFile:
    """The bytes of one safetensors file over lazy tensors, produced in order, a chunk at a time.

    `offsets` maps each tensor's name to its first byte in the file.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = dict(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, tensor in self._tensors.items():
            header[name] = {
                "dtype": tensor.dtype.safetensors,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % DATA_ALIGNMENT)
        self._header = len(raw).to_bytes(8, "little") + raw
        self.nbytes = len(self._header) + position
        self.offsets = {name: len(self._header) + header[name]["data_offsets"][0] for name in self._tensors}

    def chunks(self) -> Iterator[memoryview]:
        """Yield the file's bytes in order."""
        yield memoryview(self._header)
        for tensor in self._tensors.values():
            for piece in tensor.chunks():
                yield piece.reshape(-1).view(np.uint8).data


@dataclass(frozen=True, slots=True)
class Shards:
    """Safetensors files by name, and the index that belongs to them (None for a single file)."""

    files: dict[str, SafetensorsFile]
    index: dict[str, Any] | None

    def locate(self, tensor: str) -> tuple[str, int]:
        """Return the file name and byte offset of a tensor."""
        for name, file in self.files.items():
            if tensor in file.offsets:
                return name, file.offsets[tensor]
        raise KeyError(tensor)


def shard_tensors(tensors: Mapping[str, LazyTensor], shard_bytes: int, stem: str = "model") -> Shards:
    """Distribute tensors over files of at most `shard_bytes` each (a larger tensor gets a file of its own)."""
    groups: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    if len(groups) == 1:
        return Shards({f"{stem}.safetensors": SafetensorsFile(groups[0])}, None)
    names = [f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group},
    }
    return Shards({name: SafetensorsFile(group) for name, group in zip(names, groups, strict=True)}, index)
