"""Saving a folder of streamed files so that it appears whole or not at all.

A folder is written under a hidden temporary name beside its destination, with a marker file inside; the manifest
(sizes and SHA-256 of every file) is written last, everything is flushed to the disk, the marker goes, and one
rename makes the folder appear (with --force, one exchange of names). Its writer holds a lock on it all the while.

A killed run leaves a folder that nobody has locked and that has the marker, or is empty, or is complete.
`check_folder` and `refuse_incomplete` turn down the first two, and the next run for the same destination removes any.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pydantic import ValidationError

from exporter.errors import CheckpointError, FuselageError, OutputError, raise_all
from exporter.safetensors_io import read_json
from exporter.structure import Sealed

MANIFEST = "fuselage.manifest.json"
MARKER = ".fuselage-incomplete"
MANIFEST_SCHEMA = 1
COMMANDS = {  # by kind: how people come by a folder that they are asked for
    "network": "run `export` first; only `engine --backend torch` takes a Hugging Face folder as it is",
    "trtllm-checkpoint": "run `export --to trtllm` first",
    "engine": "run `engine` first",
}
COPY_CHUNK = 4 << 20
HASH_AHEAD = 3  # pieces that wait to be hashed
FLUSH_BYTES = 256 << 20
SYNC_DATA = getattr(os, "fdatasync", os.fsync)  # macOS has only the latter
NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # NFS and others on a folder
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


class Content(Protocol):
    """The bytes of one file, produced in order and in pieces."""

    nbytes: int

    def chunks(self) -> Iterator[Any]:
        """Yield buffers that add up to `nbytes`."""


class FileCopy:
    """The bytes of an existing file.

    Raises:
        CheckpointError: it is not there, cannot be read or changes its size while it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading():
            self.nbytes = path.stat().st_size

    def chunks(self) -> Iterator[Any]:
        """Yield the file's bytes."""
        copied = 0
        with self._reading(), self.path.open("rb", buffering=0) as file:
            while piece := file.read(COPY_CHUNK):
                copied += len(piece)
                yield piece
        if copied != self.nbytes:
            raise CheckpointError(
                "file changed while it was read", file=self.path, expected=f"{self.nbytes} bytes", found=copied
            )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror or error})", file=self.path) from error


class FileLink(FileCopy):
    """The bytes of a file that nobody writes to any more, as those in folders of ours.

    Where the file system has hard links, `save_folder` gives it a second name instead of copying it, which takes no
    space: engines of 100 GB lie beside networks of 100 GB. Either name can go, the other stays.
    """

    def is_near(self, folder: Path) -> bool:
        """Whether the file itself is on the file system of a folder."""
        with self._reading():
            return not self.path.is_symlink() and self.path.lstat().st_dev == folder.stat().st_dev

    def link(self, name: Path) -> bool:
        """Give the file a second name. False where that cannot be: to copy it then works, or says what is wrong."""
        if self.path.is_symlink():  # to a file that somebody may well write to
            return False
        try:
            os.link(self.path, name)
        except OSError:
            return False
        return True


class FileEntry(Sealed):
    bytes: int
    sha256: str


class Manifest(Sealed):
    """What a folder we wrote says about itself."""

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
    with _partial_folder(output, files.values()) as partial:
        entries = _write_all(partial, files, progress, workers)
        manifest = Manifest(kind=kind, details=dict(details), files=entries)
        _write_file(partial / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode(), None, None)
        _publish(partial, output, force=force)
    return manifest


def save_file(output: Path, content: bytes, *, force: bool = False) -> None:
    """Write one file so that it appears whole or not at all.

    Raises:
        OutputError: it exists (and not `force`), or cannot be written.
    """
    refuse_existing_file(output, force=force)
    try:
        with parent_of(output) as parent:
            temporary = parent / f".{output.name}.partial-{os.getpid()}"
            try:
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(output)
                _fsync_folder(parent)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _output_error(error, output) from error


def refuse_existing_file(output: Path, *, force: bool) -> None:
    """Raise OutputError if the file is there already, or cannot come to be; cheap, for use before long work."""
    if os.path.isdir(output) or (os.path.lexists(output) and not force):
        raise OutputError("output exists", file=output, hint="give another path, or --force to replace the file")
    _refuse_unwritable_parent(output)


def refuse_existing(output: Path, *, force: bool) -> None:
    """Raise OutputError if `output` is there already, or cannot come to be; cheap, for use before long work."""
    if os.path.lexists(output) and not force:
        raise OutputError("output exists", file=output, hint="give another path, or --force to replace the folder")
    if os.path.islink(output):
        raise OutputError("refusing to replace a link", file=output, hint="give the folder that it leads to")
    if os.path.lexists(output) and not os.path.isfile(output / MANIFEST):
        raise OutputError("refusing to replace what Fuselage did not write", file=output, hint="give another path")
    _refuse_unwritable_parent(output)


def refuse_full_disk(output: Path, contents: Iterable[Content | bytes]) -> None:
    """Raise OutputError if the disk of `output` has no room for contents; cheap, for use before long work.

    What dead runs left of the same output is removed: its room can be used.
    """
    parents = output.absolute().parents
    parent = next(path for path in parents if path.is_dir())
    try:
        if parent == parents[0]:
            _remove_stale(parent, _partial_prefix(output))
        copied = (entry for entry in contents if not (isinstance(entry, FileLink) and entry.is_near(parent)))
        problems = list(space_problems(parent, sum(map(bytes_of, copied))))
    except OSError as error:
        raise _output_error(error, output) from error
    raise_all(problems)


def space_problems(folder: Path, needed_bytes: int, *, of: str = "") -> Iterator[OutputError]:
    """Say that the disk of `folder`, which exists, has no room for something, if so."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        yield OutputError(
            "not enough disk space" + (f" for {of}" if of else ""),
            file=folder,
            expected=f"{size_text(needed_bytes)} free",
            found=size_text(free),
        )


def refuse_foreign(output: Path, *, deeper: str) -> None:
    """Raise OutputError if folders of ours cannot be put into `output`, or would lie there among other people's files.

    It need not exist; if it holds any file, then one of the folders in it, in these, or where the pattern `deeper`
    leads is ours or was to become it.
    """
    _refuse_long_name(output)
    _refuse_unwritable_parent(output / MANIFEST)
    ours = (f"{folders}/{name}" for folders in ("*", "*/*", deeper) for name in (MANIFEST, MARKER))
    if any(path.is_file() for path in output.rglob("*")) and not any(any(output.glob(pattern)) for pattern in ours):
        raise OutputError(
            "refusing to write into a folder of something else",
            file=output,
            expected="no folder, an empty one, or the output of an earlier run",
            hint="give another path",
        )


def _refuse_unwritable_parent(output: Path) -> None:
    parent = next(path for path in output.absolute().parents if os.path.lexists(path))
    if not os.path.isdir(parent):
        raise OutputError("output cannot be created: not a folder", file=parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError("output cannot be created: no write permission", file=parent)
    _refuse_long_name(output)


def _refuse_long_name(output: Path) -> None:
    """Refuse a name that leaves no room for what partial folders are called."""
    there = next(path for path in output.absolute().parents if os.path.isdir(path))
    if len(os.fsencode(output.name)) > os.pathconf(there, "PC_NAME_MAX") - len("..partial-12345678"):
        raise OutputError("output cannot be created: its name is too long", file=output)


def refuse_incomplete(folder: Path) -> None:
    """Raise CheckpointError for a folder that a killed run left behind."""
    if os.path.lexists(folder / MARKER):
        raise CheckpointError(
            "folder is incomplete: the run that wrote it was interrupted", file=folder, hint="remove it and run again"
        )


def bytes_of(content: Content | bytes) -> int:
    """How large a file of this content is; reads nothing."""
    return len(content) if isinstance(content, bytes) else content.nbytes


def sizes_of(contents: Iterable[tuple[str, Content | bytes]]) -> dict[str, int]:
    """How large the files of a folder are, by name; reads nothing."""
    return {name: bytes_of(content) for name, content in contents}


def size_text(nbytes: int) -> str:
    """A size as people read it, in GB of 10**9 bytes and the like."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if nbytes >= size:
            return f"{nbytes / size:,.2f} {unit}"
    return f"{nbytes:,} bytes"


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder we wrote, None for any other folder.

    Raises:
        CheckpointError: the manifest is malformed, or the folder is incomplete.
    """
    refuse_incomplete(folder)
    path = folder / MANIFEST
    if not os.path.lexists(path):
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
        CheckpointError: no manifest, another kind, or a file that is missing, differs or was added; names the file.
    """
    if not os.path.isdir(folder):
        raise CheckpointError("no such folder", file=folder)
    manifest = read_manifest(folder)
    if manifest is None:
        problem = f"not a folder of kind {kind!r} written by Fuselage: no {MANIFEST}"
        raise CheckpointError(problem, file=folder, hint=COMMANDS.get(kind))
    if manifest.kind != kind:
        raise CheckpointError(
            "folder of another kind", file=folder, expected=kind, found=manifest.kind, hint=COMMANDS.get(kind)
        )
    check_files(folder, manifest, hashes=hashes)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # Hidden files are what file systems and desktops leave (.nfs0001, .DS_Store); nobody reads them.
        if name not in manifest.files and name != MANIFEST and not path.is_dir() and not path.name.startswith("."):
            raise CheckpointError("file is not in the manifest", file=path, hint="remove it or build the folder again")
    return manifest


def check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Hold a folder's files against its manifest; see `check_folder`."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not os.path.isfile(path):
            raise CheckpointError("file is missing", file=path)
        size = os.path.getsize(path)
        if size != entry.bytes:
            raise CheckpointError(
                "file was altered",
                file=path,
                expected=f"{entry.bytes} bytes",
                found=size,
                hint=f"build the folder again, or, if it is a model and the change is yours, remove its {MANIFEST}",
            )
    if not hashes:
        return

    def check_hash(name: str, entry: FileEntry) -> None:
        found = sha256_of(folder / name)
        if found != entry.sha256:
            raise CheckpointError(
                "file was altered",
                file=folder / name,
                expected=f"SHA-256 {entry.sha256}",
                found=found,
                hint="build the folder again",
            )

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(check_hash, manifest.files.keys(), manifest.files.values()))


def sha256_of(path: Path) -> str:
    return _sha256(FileCopy(path), None, None)


def _sha256(content: FileCopy, progress: Progress | None, stop: threading.Event | None) -> str:
    """Of a file; a `stop` that is set ends it early (the hash is then never used)."""
    digest = hashlib.sha256()
    for piece in content.chunks():
        if stop is not None and stop.is_set():
            break
        digest.update(piece)
        if progress is not None:
            progress(len(piece))
    return digest.hexdigest()


def json_bytes(value: Any) -> bytes:
    """Encode as the JSON text we put into files: indented, in the given key order, no NaN."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def parent_of(output: Path) -> Iterator[Path]:
    """Make the folders above `output`, and remove those again if what is done in them fails."""
    parent = output.absolute().parent
    made = [path for path in (parent, *parent.parents) if not os.path.lexists(path)]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        yield parent
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else may use it by now
                folder.rmdir()
        raise


@contextlib.contextmanager
def _partial_folder(output: Path, contents: Iterable[Content | bytes]) -> Iterator[Path]:
    """Give a marked and locked temporary folder for `contents` beside `output`; remove it unless it was published."""
    try:
        with parent_of(output) as parent:
            refuse_full_disk(output, contents)
            partial, lock = _make_locked(parent, _partial_prefix(output))
            try:
                (partial / MARKER).touch()
                yield partial
            finally:
                if os.path.isdir(partial):  # a failed write, or the folder that --force replaced
                    _remove_folder(partial)
                os.close(lock)
    except OSError as error:
        raise _output_error(error, output) from error


def _partial_prefix(output: Path) -> str:
    return f".{output.name}.partial-"


def _make_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder and lock it for as long as the returned descriptor is open, which is at most as long as we live."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError):  # another run took the folder for a stale one before we locked it
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if try_lock(lock) and os.path.isdir(folder):
                return folder, lock
            os.close(lock)


def try_lock(fd: int) -> bool:
    """Lock an open folder until it is closed. False if another process has; without locks there, nobody is kept out."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove the partial folders of runs that are dead."""
    for entry in list(os.scandir(parent)):
        if not entry.name.startswith(prefix) or not entry.is_dir(follow_symlinks=False):
            continue
        # Left alone: a folder in use, another user's, and any where the file system has no locks to tell by.
        with contextlib.suppress(OSError):
            lock = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_folder(Path(entry.path))
            finally:
                os.close(lock)


def _remove_folder(folder: Path) -> None:
    """Remove a folder so that it is refused as incomplete until it is gone, even if we are killed halfway."""
    with contextlib.suppress(OSError):
        (folder / MARKER).touch()
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name != MARKER:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
    shutil.rmtree(folder, ignore_errors=True)


def _write_all(
    folder: Path, files: Mapping[str, Content | bytes], progress: Progress | None, workers: int
) -> dict[str, FileEntry]:
    stop = threading.Event()
    pool = ThreadPoolExecutor(max_workers=max(1, workers))
    try:
        tasks = {
            name: pool.submit(_write_file, folder / name, content, progress, stop) for name, content in files.items()
        }
        wait(tasks.values(), return_when=FIRST_EXCEPTION)
    finally:
        stop.set()  # after an error, or Ctrl-C at any place above: the threads see it at their next chunk
        pool.shutdown(cancel_futures=True)
    # Some are cancelled only where another failed, whose error is raised here.
    return {name: task.result() for name, task in tasks.items() if not task.cancelled()}


def _write_file(
    path: Path, content: Content | bytes, progress: Progress | None, stop: threading.Event | None
) -> FileEntry:
    """Write, hash and flush one file; a `stop` that is set ends it early (its entry is then never used).

    Hashing and flushing go on in threads of their own while the next pieces are produced: each alone would take
    about as long as the rest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, FileLink) and content.link(path):
        return _linked_entry(content, progress, stop)
    written = 0
    with path.open("xb", buffering=0) as file, _Hashing() as hashing, _Flushing(file.fileno()) as flushing:
        for piece in [content] if isinstance(content, bytes) else content.chunks():
            if stop is not None and stop.is_set():
                break
            view = memoryview(piece)
            if not view.nbytes:
                continue
            view = view.cast("B")  # whatever its items are, lengths below are bytes
            size = len(view)
            hashing.update(view)
            while len(view):
                view = view[file.write(view) :]
            written += size
            flushing.wrote(size)
            if progress is not None:
                progress(size)
        else:
            expected = bytes_of(content)
            if written != expected:
                raise AssertionError(f"Bug: {path.name} announced {expected} bytes and produced {written}")
        flushing.finish()
        os.fsync(file.fileno())
        return FileEntry(bytes=written, sha256=hashing.hexdigest())


def _linked_entry(content: FileLink, progress: Progress | None, stop: threading.Event | None) -> FileEntry:
    """Hash a file that has a second name now, and flush it: it may be younger than the disk's last word."""
    sha256 = _sha256(content, progress, stop)
    with content.path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(bytes=content.nbytes, sha256=sha256)


class _Hashing:
    """SHA-256 in a thread of its own, at most HASH_AHEAD pieces behind."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pending: collections.deque[Future[None]] = collections.deque()

    def __enter__(self) -> _Hashing:
        self._thread = ThreadPoolExecutor(max_workers=1)  # one, so that pieces are hashed in their order
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def update(self, piece: memoryview) -> None:
        self._pending.append(self._thread.submit(self._digest.update, piece))
        while len(self._pending) > HASH_AHEAD:
            self._pending.popleft().result()

    def hexdigest(self) -> str:
        while self._pending:
            self._pending.popleft().result()
        return self._digest.hexdigest()


class _Flushing:
    """Has the system write to the disk while the file still grows, so that the fsync at its end finds little left."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._unflushed = 0
        self._running: Future[None] | None = None

    def __enter__(self) -> _Flushing:
        self._thread = ThreadPoolExecutor(max_workers=1)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def wrote(self, nbytes: int) -> None:
        self._unflushed += nbytes
        if self._unflushed >= FLUSH_BYTES and (self._running is None or self._running.done()):
            self.finish()
            self._running = self._thread.submit(SYNC_DATA, self._fd)
            self._unflushed = 0

    def finish(self) -> None:
        """Wait for what is running; an error of the disk comes out here."""
        if self._running is not None:
            self._running.result()
            self._running = None


def _publish(partial: Path, output: Path, *, force: bool) -> None:
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        _fsync_folder(folder)
    partial.chmod(_mode_of_folders(partial))
    (partial / MARKER).unlink()
    _fsync_folder(partial)
    refuse_existing(output, force=force)  # again: hours may have gone by since
    if force and os.path.lexists(output):
        _exchange(partial, output)  # now `partial` is the old folder, which the caller removes
    else:
        partial.rename(output)
    _fsync_folder(output.absolute().parent)


def _mode_of_folders(partial: Path) -> int:
    """The mode that mkdir would have given to `partial`, which `tempfile` made for its owner alone."""
    of_files = stat.S_IMODE((partial / MARKER).stat().st_mode)  # 0o666 without the umask
    return of_files | (of_files & 0o444) >> 2 | (partial.stat().st_mode & stat.S_ISGID)


def _exchange(new: Path, old: Path) -> None:
    """Swap the names of two folders: in one step on Linux, so that no moment is without one of them at `old`."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        paths = [os.fsencode(path.absolute()) for path in (new, old)]
        if renameat2(AT_FDCWD, ctypes.c_char_p(paths[0]), AT_FDCWD, ctypes.c_char_p(paths[1]), RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # a file system or kernel that cannot
            raise OSError(code, os.strerror(code), str(old))
    aside = new.with_name(f"{new.name}-replaced")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_name(name: str) -> None:
    pure = PurePosixPath(name)
    is_plain = pure.as_posix() == name and not pure.is_absolute() and ".." not in pure.parts and "\0" not in name
    if not name or name == "." or not is_plain or name in (MANIFEST, MARKER):
        raise OutputError("not a file name inside the output", file=name)


def _output_error(error: OSError, output: Path) -> FuselageError:
    hint = "free some space or give another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return OutputError(f"cannot be written ({error.strerror or error})", file=output, hint=hint)
