"""Saving a folder of streamed files so that it appears whole or not at all.

A folder is written under a hidden temporary name beside its destination, with a marker file inside; the manifest
(sizes and SHA-256 of every file) is written last, everything is flushed to the disk, the marker goes, and one
rename makes the folder appear. A killed run leaves a folder that has the marker or no manifest; `check_folder` and
`refuse_incomplete` turn it down, and the next run for the same destination removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from exporter.errors import CheckpointError, FuselageError, OutputError
from exporter.safetensors_io import read_json

MANIFEST = "fuselage.manifest.json"
MARKER = ".fuselage-incomplete"
MANIFEST_SCHEMA = 1
COPY_CHUNK = 4 << 20


class Content(Protocol):
    """The bytes of one file, produced in order and in pieces."""

    nbytes: int

    def chunks(self) -> Iterator[Any]:
        """Yield buffers that add up to `nbytes`."""


class FileCopy:
    """The bytes of an existing file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.nbytes = path.stat().st_size

    def chunks(self) -> Iterator[Any]:
        with self._path.open("rb", buffering=0) as file:
            while piece := file.read(COPY_CHUNK):
                yield piece


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a folder we wrote says about itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest_schema: int = MANIFEST_SCHEMA
    kind: str  # "checkpoint", "network", "engine", "report", ...
    details: dict[str, Any]  # what made it; free-form, for people and for `run` to compare
    files: dict[str, FileEntry]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all files' names and hashes."""
        lines = "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


Progress = Callable[[int], None]  # called with the number of bytes just written, from any thread


def save_folder(
    output: Path,
    contents: Iterable[tuple[str, Content | bytes]],
    *,
    kind: str,
    details: Mapping[str, Any],
    force: bool = False,
    progress: Progress | None = None,
    workers: int = 2,
) -> Manifest:
    """Write `contents`, pairs of relative path and content, into a new folder at `output`.

    Up to `workers` files are produced at a time, each in its own thread and order, so memory is bounded by a few
    chunks per worker.

    Raises:
        OutputError: `output` exists (and not `force`), a path leaves the folder, the disk is full or not writable.
            Nothing is left behind, and with `force` the old folder is still there.
    """
    refuse_existing(output, force=force)
    files: dict[str, Content | bytes] = {}
    for name, content in contents:
        _check_name(name)
        if name in files:
            raise OutputError("a file would be written twice", file=output / name)
        files[name] = content
    needed = sum(len(content) if isinstance(content, bytes) else content.nbytes for content in files.values())
    with _partial_folder(output, needed) as partial:
        entries = _write_all(partial, files, progress, workers)
        manifest = Manifest(kind=kind, details=dict(details), files=entries)
        _write_file(partial / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode(), None, None)
        _publish(partial, output)
    return manifest


def refuse_existing(output: Path, *, force: bool) -> None:
    """Raise OutputError if `output` is there already, or cannot come to be; cheap, for use before long work."""
    if output.is_symlink() or (output.exists() and not force):
        raise OutputError("output exists", file=output, hint="give another path, or --force to replace the folder")
    if output.exists() and not (output / MANIFEST).is_file():
        raise OutputError("refusing to replace a folder that Fuselage did not write", file=output)
    parent = next(path for path in output.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError("output cannot be created: no write permission", file=parent)


def refuse_incomplete(folder: Path) -> None:
    """Raise CheckpointError for a folder that a killed run left behind."""
    if (folder / MARKER).exists():
        raise CheckpointError(
            "folder is incomplete: the run that wrote it was interrupted", file=folder, hint="remove it and run again"
        )


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder we wrote, None for any other folder.

    Raises:
        CheckpointError: the manifest is malformed, or the folder is incomplete.
    """
    refuse_incomplete(folder)
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = Manifest.model_validate(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"malformed manifest ({problem['loc']}: {problem['msg']})", file=path) from error
    if manifest.manifest_schema != MANIFEST_SCHEMA:
        raise CheckpointError(
            "manifest of another version", file=path, expected=MANIFEST_SCHEMA, found=manifest.manifest_schema
        )
    for name in manifest.files:
        try:
            _check_name(name)
        except OutputError as error:
            raise CheckpointError("path leaves the folder", file=path, found=name) from error
    return manifest


def check_folder(folder: Path, kind: str, *, hashes: bool) -> Manifest:
    """Return the manifest of a complete folder of the given kind; sizes are always checked, contents if `hashes`.

    Raises:
        CheckpointError: no manifest, another kind, or a file that is missing or differs; names the file.
    """
    if not folder.is_dir():
        raise CheckpointError("no such folder", file=folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"not a folder of kind {kind!r} written by Fuselage: no {MANIFEST}", file=folder)
    if manifest.kind != kind:
        raise CheckpointError("folder of another kind", file=folder, expected=kind, found=manifest.kind)
    check_files(folder, manifest, hashes=hashes)
    return manifest


def check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Hold a folder's files against its manifest; see `check_folder`."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError("file is missing", file=path)
        if path.stat().st_size != entry.bytes:
            raise CheckpointError(
                "file was altered", file=path, expected=f"{entry.bytes} bytes", found=path.stat().st_size
            )
    if hashes:
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for (name, entry), found in zip(
                manifest.files.items(), pool.map(lambda name: sha256_of(folder / name), manifest.files), strict=True
            ):
                if found != entry.sha256:
                    raise CheckpointError(
                        "file was altered",
                        file=folder / name,
                        expected=f"SHA-256 {entry.sha256}",
                        found=found,
                        hint="build the folder again",
                    )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    for piece in FileCopy(path).chunks():
        digest.update(piece)
    return digest.hexdigest()


def json_bytes(value: Any) -> bytes:
    """Encode as the JSON text we put into files: indented, in the given key order, no NaN."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def _partial_folder(output: Path, needed: int) -> Iterator[Path]:
    """Give a marked temporary folder beside `output`; remove it unless it was published."""
    parent = output.absolute().parent
    prefix = f".{output.name}.partial-"
    partial: Path | None = None
    marker = -1
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent, prefix)
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise OutputError("not enough disk space", file=parent, expected=f"{needed} bytes free", found=free)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        marker = os.open(partial / MARKER, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        fcntl.flock(marker, fcntl.LOCK_EX)  # held while this process lives: tells a stale folder from one in use
        yield partial
    except OSError as error:
        raise _output_error(error, output) from error
    finally:
        if marker >= 0:
            os.close(marker)
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(parent: Path, prefix: str) -> None:
    for stale in parent.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            marker = os.open(stale / MARKER, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale, ignore_errors=True)
            finally:
                os.close(marker)


def _write_all(
    folder: Path, files: Mapping[str, Content | bytes], progress: Progress | None, workers: int
) -> dict[str, FileEntry]:
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        tasks = {
            name: pool.submit(_write_file, folder / name, content, progress, stop) for name, content in files.items()
        }
        try:
            wait(tasks.values(), return_when=FIRST_EXCEPTION)
        finally:  # also on KeyboardInterrupt: the threads see it at their next chunk
            failed = [task for task in tasks.values() if task.done() and task.exception()]
            if failed or not all(task.done() for task in tasks.values()):
                stop.set()
                for task in tasks.values():
                    task.cancel()
    for task in failed:
        task.result()
    return {name: task.result() for name, task in tasks.items()}


def _write_file(
    path: Path, content: Content | bytes, progress: Progress | None, stop: threading.Event | None
) -> FileEntry:
    """Write, hash and flush one file; a `stop` that is set ends it early (its entry is then never used)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    written = 0
    with path.open("xb", buffering=0) as file:
        for piece in [content] if isinstance(content, bytes) else content.chunks():
            if stop is not None and stop.is_set():
                break
            view = memoryview(piece)
            digest.update(view)
            while len(view):
                view = view[file.write(view) :]
            written += memoryview(piece).nbytes
            if progress is not None:
                progress(memoryview(piece).nbytes)
        else:
            expected = len(content) if isinstance(content, bytes) else content.nbytes
            if written != expected:
                raise AssertionError(f"Bug: {path.name} announced {expected} bytes and produced {written}")
        os.fsync(file.fileno())
    return FileEntry(bytes=written, sha256=digest.hexdigest())


def _publish(partial: Path, output: Path) -> None:
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
        _fsync_folder(folder)
    (partial / MARKER).unlink()
    _fsync_folder(partial)
    if output.exists():  # --force: the old folder stays whole until the new one is
        old = output.absolute().parent / f".{output.name}.replaced-{os.getpid()}"
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)
    _fsync_folder(output.absolute().parent)


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_name(name: str) -> None:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name or name in (MANIFEST, MARKER):
        raise OutputError("not a file name inside the output", file=name)


def _output_error(error: OSError, output: Path) -> FuselageError:
    hint = "free some space or give another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return OutputError(f"cannot be written ({error.strerror or error})", file=output, hint=hint)
