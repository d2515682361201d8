"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import exporter.writers.files as files
from exporter.dtypes import FLOAT32
from exporter.errors import CheckpointError, FuselageError, OutputError
from exporter.lazy import array, shape_only
from exporter.safetensors_io import SafetensorsFile
from exporter.writers.files import (
    MANIFEST,
    MARKER,
    Content,
    FileCopy,
    FileEntry,
    FileLink,
    bytes_of,
    check_folder,
    read_manifest,
    refuse_existing,
    refuse_existing_file,
    refuse_full_disk,
    save_file,
    save_folder,
)


@dataclass
class Pieces:
    """A content of given pieces, with what happens before each."""

    pieces: list[Any]
    nbytes: int
    before: Callable[[int], None] = lambda index: None

    def chunks(self) -> Iterator[Any]:
        for index, piece in enumerate(self.pieces):
            self.before(index)
            yield piece


class ShortWrites:
    """A file that takes `most` bytes in one write, and `room` bytes that it is asked to take in all."""

    def __init__(self, file: Any, most: int, room: int) -> None:
        self.file, self.most, self.left = file, most, room

    def __enter__(self) -> ShortWrites:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, view: memoryview) -> int:
        self.left -= len(view)
        if self.left < 0:
            raise no_space()
        return int(self.file.write(view[: self.most]))

    def fileno(self) -> int:
        return int(self.file.fileno())


def write_shortly(monkeypatch: pytest.MonkeyPatch, *, most: int, room: int) -> None:
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: ShortWrites(real_open(self, *a, **k), most, room))


class Libc:
    """A libc whose renameat2 fails."""

    def __init__(self, code: int) -> None:
        self.code = code

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(self.code)
        return -1


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


CONTENTS: list[tuple[str, Content | bytes]] = [
    ("config.json", b"{}"),
    ("empty", b""),
    ("weights/a.bin", Pieces([b"abc", bytearray(b"de"), memoryview(b"f"), b""], 6)),
    ("weights/b.bin", Pieces([np.arange(3, dtype=np.float32), np.zeros((2, 2), np.int16), np.empty((0, 4))], 20)),
]
EXPECTED = {
    "config.json": b"{}",
    "empty": b"",
    "weights/a.bin": b"abcdef",
    "weights/b.bin": np.arange(3, dtype=np.float32).tobytes() + bytes(8),
}


def save(output: Path, contents: Any = CONTENTS, **options: Any) -> files.Manifest:
    return save_folder(output, contents, kind="checkpoint", details={"made": "here"}, **options)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_folder_is_saved_with_its_manifest(workers: int, tmp_path: Path) -> None:
    output = tmp_path / "new" / "parents" / "out"
    written: list[int] = []
    manifest = save(output, workers=workers, progress=written.append)
    found = listing(output)
    text = json.loads(found.pop(MANIFEST))
    assert found == EXPECTED
    assert text == {
        "manifest_schema": 1,
        "kind": "checkpoint",
        "details": {"made": "here"},
        "files": {
            name: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for name, raw in EXPECTED.items()
        },
    }
    assert sum(written) == sum(map(len, EXPECTED.values()))
    assert check_folder(output, "checkpoint", hashes=True) == manifest == read_manifest(output)
    assert os.listdir(output.parent) == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_folders_have_the_permissions_that_mkdir_gives(umask: int, tmp_path: Path) -> None:
    """Also the bit that makes new files belong to the group of a shared folder."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2777)
    before = os.umask(umask)
    try:
        (shared / "by mkdir").mkdir()
        save(shared / "out")
    finally:
        os.umask(before)
    assert shared.joinpath("out").stat().st_mode == shared.joinpath("by mkdir").stat().st_mode
    assert shared.joinpath("out", "weights").stat().st_mode == shared.joinpath("by mkdir").stat().st_mode


def test_the_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b")
    other = save(tmp_path / "c", [("config.json", b"[]")])
    renamed = save(tmp_path / "d", [("konfig.json", b"[]")])
    assert a.fingerprint == b.fingerprint
    assert len({a.fingerprint, other.fingerprint, renamed.fingerprint}) == 3


def test_a_copy_and_a_model_file_stream(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"x" * (9 << 20))
    tensors = SafetensorsFile({"w": array(np.arange(6, dtype=np.float32))})
    save(tmp_path / "out", [("t", FileCopy(tmp_path / "tokenizer.json")), ("m", tensors)])
    assert (tmp_path / "out" / "t").read_bytes() == b"x" * (9 << 20)
    assert (tmp_path / "out" / "m").read_bytes() == b"".join(tensors.chunks())


# --- refusals before anything is written

NAMES_REFUSED = ["", ".", "..", "../x", "a/../b", "a/..", "/etc/passwd", "a//b", "./a", "a/", "a\0b", MANIFEST, MARKER]


@pytest.mark.parametrize("name", NAMES_REFUSED, ids=repr)
def test_names_that_leave_the_folder_or_are_ours(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not a file name inside the output"):
        save(tmp_path / "out", [("fine", b""), (name, b"")])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_in_json_is_not_written(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.json_bytes({"seconds": [number]})


def test_a_name_twice(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="out/a: a file would be written twice"):
        save(tmp_path / "out", [("a", b""), ("a", b"")])
    assert os.listdir(tmp_path) == []


def existing_folder(output: Path) -> None:
    output.mkdir()
    (output / "precious").write_text("mine")


EXISTING: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "folder": (existing_folder, False, "output exists.*--force"),
    "empty folder": (Path.mkdir, False, "output exists"),
    "file": (lambda output: output.write_text("mine"), False, "output exists"),
    "link to nothing": (lambda output: output.symlink_to("nowhere"), False, "output exists"),
    "our folder": (save, False, "output exists"),
    "folder of others, forced": (existing_folder, True, "did not write"),
    "file, forced": (lambda output: output.write_text("mine"), True, "did not write"),
    "link, forced": (lambda output: output.symlink_to("."), True, "refusing to replace a link"),
}


@pytest.mark.parametrize("case", EXISTING)
def test_an_existing_output_stays_as_it_is(case: str, tmp_path: Path) -> None:
    make, force, message = EXISTING[case]
    output = tmp_path / "out"
    make(output)
    before = sorted(tmp_path.rglob("*")), listing(tmp_path)
    for attempt in (lambda: save(output, force=force), lambda: refuse_existing(output, force=force)):
        with pytest.raises(OutputError, match=f"out: .*{message}"):
            attempt()
        assert (sorted(tmp_path.rglob("*")), listing(tmp_path)) == before


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: output cannot be created: not a folder"):
        save(tmp_path / "file" / "deeper" / "out")


def test_a_name_that_no_file_system_takes(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="its name is too long"):
        save(tmp_path / ("x" * 300))
    assert os.listdir(tmp_path) == []


# --- failures on the way


def fail(error: Exception) -> Callable[[int], None]:
    def before(index: int) -> None:
        if index == 2:
            raise error

    return before


def no_space(path: str = "") -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


GOOD = Pieces([b"x" * 1000] * 50, 50_000)
FAILURES: dict[str, tuple[Content, type[Exception], str]] = {
    "disk full": (
        Pieces([b"x"] * 5, 5, fail(no_space())),
        OutputError,
        "out: cannot be written.*No space left.*Free some space",
    ),
    "quota": (Pieces([b"x"] * 5, 5, fail(OSError(errno.EDQUOT, "Quota exceeded"))), OutputError, "Free some space"),
    "input error": (Pieces([b"x"] * 5, 5, fail(OSError(errno.EIO, "I/O error"))), OutputError, "I/O error"),
    "unreadable tensor": (
        Pieces([b"x"] * 5, 5, fail(CheckpointError("file ends before the tensor does"))),
        CheckpointError,
        "file ends",
    ),
    "a bug": (Pieces([b"x"] * 5, 5, fail(ZeroDivisionError("oops"))), ZeroDivisionError, "oops"),
    "too little announced": (Pieces([b"abc"], 2), AssertionError, "Bug: bad announced 2 bytes and produced 3"),
    "too much announced": (Pieces([b"abc"], 4), AssertionError, "Bug: bad announced 4 bytes and produced 3"),
    "no bytes at all": (SafetensorsFile({"w": shape_only((2,), FLOAT32)}), CheckpointError, "structure without"),
    "Ctrl-C": (Pieces([b"x"] * 5, 5, fail(KeyboardInterrupt())), KeyboardInterrupt, "^$"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("old", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_leaves_everything_as_it_was(case: str, old: bool, tmp_path: Path) -> None:
    content, error, message = FAILURES[case]
    output = tmp_path / "new" / "out"
    if old:
        save(output)
    before = listing(tmp_path)
    contents = [(f"good-{i}", GOOD) for i in range(3)] + [("deep/down/bad", content)]
    with pytest.raises(error, match=message):
        save(output, contents + [(f"more-{i}", GOOD) for i in range(3)], force=old, workers=3)
    assert listing(tmp_path) == before
    assert os.listdir(tmp_path) == (["new"] if old else [])
    assert not old or os.listdir(tmp_path / "new") == ["out"]


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    source.touch()
    copy = FileCopy(source)
    source.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read \(No such file"):
        save(tmp_path / "out", [("tokenizer.json", copy)])
    assert os.listdir(tmp_path) == []


def test_a_source_that_changes_is_named(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read \(No such file"):
        FileCopy(source)
    source.write_bytes(b"x" * 100)
    copy = FileCopy(source)
    source.write_bytes(b"x" * 99)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: file changed.*expected 100 bytes, found 99"):
        save(tmp_path / "out", [("tokenizer.json", copy)])
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_a_file_that_nobody_writes_to_gets_a_second_name(tmp_path: Path) -> None:
    source, content = tmp_path / "weights", os.urandom(9 << 20)
    source.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))  # takes no space
        told: list[int] = []
        manifest = save(tmp_path / "out", [("deep/weights", FileLink(source)), ("a", GOOD)], progress=told.append)
    assert os.path.samefile(tmp_path / "out/deep/weights", source)
    assert manifest.files["deep/weights"] == FileEntry(bytes=9 << 20, sha256=hashlib.sha256(content).hexdigest())
    assert sum(told) == (9 << 20) + bytes_of(GOOD)
    check_folder(tmp_path / "out", "checkpoint", hashes=True)
    save(tmp_path / "out", [("deep/weights", b"new")], force=True)
    assert source.read_bytes() == content


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EINVAL, errno.EDQUOT], ids=errno.errorcode.get)
def test_without_links_it_is_copied(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"x" * 100)

    def link(*names: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "link", link)
    save(tmp_path / "out", [("weights", FileLink(source))])
    assert (tmp_path / "out/weights").read_bytes() == b"x" * 100
    assert not os.path.samefile(tmp_path / "out/weights", source)


def test_what_a_symbolic_link_leads_to_is_copied(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"x")
    (tmp_path / "weights").symlink_to("theirs")
    link = FileLink(tmp_path / "weights")
    assert not link.is_near(tmp_path)  # a copy takes space
    save(tmp_path / "out", [("weights", link)])
    assert (tmp_path / "out/weights").read_bytes() == b"x"
    assert not (tmp_path / "out/weights").is_symlink()
    assert not os.path.samefile(tmp_path / "out/weights", tmp_path / "theirs")


def test_space_is_asked_for_where_links_do_not_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(b"x" * 100)
    elsewhere = FileLink(tmp_path / "weights")
    monkeypatch.setattr(elsewhere, "is_near", lambda folder: False)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=99))
    with pytest.raises(OutputError, match="not enough disk space: expected 100 bytes free, found 99 bytes"):
        save(tmp_path / "out", [("weights", elsewhere)])


@pytest.mark.parametrize("gone", ["before", "meanwhile"])
def test_a_file_that_is_gone_is_named(gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "weights"
    source.touch()
    link = FileLink(source)
    if gone == "before":
        source.unlink()
    else:
        monkeypatch.setattr(link, "is_near", lambda folder: bool(source.unlink() is None))
    with pytest.raises(CheckpointError, match=r"weights: cannot be read \(No such file"):
        save(tmp_path / "out", [("weights", link)])
    assert os.listdir(tmp_path) == []


def test_a_failure_in_one_thread_stops_the_others(tmp_path: Path) -> None:
    running, produced = threading.Event(), 0

    class Endless:
        nbytes = 500_000

        def chunks(self) -> Iterator[bytes]:
            nonlocal produced
            for _ in range(self.nbytes):
                running.set()
                produced += 1
                yield b"x"

    def before(index: int) -> None:
        running.wait(10)
        raise no_space()

    with pytest.raises(OutputError, match="No space left"):
        save(tmp_path / "out", [("endless", Endless()), ("bad", Pieces([b""], 0, before))], workers=2)
    assert 0 < produced < Endless.nbytes
    assert os.listdir(tmp_path) == []


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """A tmpfs of 1 MB, where we may mount one; the precheck is told that there is room."""
    mount = tmp_path / "small"
    mount.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(mount), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip("may not mount a tmpfs here")
    try:
        with pytest.MonkeyPatch.context() as patch:
            real = files.shutil.disk_usage(mount)
            patch.setattr(files.shutil, "disk_usage", lambda path: real._replace(free=1 << 40))
            with pytest.raises(OutputError, match=r"No space left on device.*Free some space"):
                save(mount / "out", [(f"part-{i}", Pieces([b"x" * 4096] * 100, 409_600)) for i in range(5)], workers=3)
            assert os.listdir(mount) == []
            save(mount / "out", [("part", Pieces([b"x" * 4096] * 100, 409_600))])
            check_folder(mount / "out", "checkpoint", hashes=True)
        with pytest.raises(OutputError, match=r"not enough disk space: expected 2\.00 MB free, found 6.* bytes"):
            save(mount / "other", [("part", Pieces([], 2_000_000))])
        assert os.listdir(mount) == ["out"]
    finally:
        libc.umount2(os.fsencode(mount), 2)


def refuse(*_: object) -> None:
    raise no_space()


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "fdatasync"])
def test_a_system_call_that_fails(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    if call == "fdatasync":  # of what a large file has so far
        monkeypatch.setattr(files, "FLUSH_BYTES", 1000)
        monkeypatch.setattr(files, "SYNC_DATA", refuse)
    elif call == "write":
        write_shortly(monkeypatch, most=300, room=20_000)
    else:
        target = files.Path if call == "rename" else files.os
        monkeypatch.setattr(target, call, refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        save(output, [("a", GOOD), ("b", GOOD)])
    assert os.listdir(tmp_path) == []


def test_a_large_file_is_flushed_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(files, "FLUSH_BYTES", 4000)
    monkeypatch.setattr(files, "SYNC_DATA", lambda fd: flushed.append(os.fstat(fd).st_size))
    save(tmp_path / "out", [("large", GOOD), ("small", b"x" * 3999)])
    assert 1 <= len(flushed) <= 50_000 // 4000
    assert min(flushed) >= 4000
    assert flushed == sorted(flushed)


def test_everything_is_on_the_disk_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    fsync, rename = os.fsync, Path.rename
    appeared: list[set[Path]] = []

    def spy(fd: int) -> None:
        flushed.add(os.fstat(fd).st_ino)
        fsync(fd)

    def check(self: Path, target: Path) -> Path:
        appeared.append({path for path in (self, *self.rglob("*")) if path.stat().st_ino not in flushed})
        assert not (self / MARKER).exists()
        flushed.discard(self.parent.stat().st_ino)
        return rename(self, target)

    monkeypatch.setattr(files.os, "fsync", spy)
    monkeypatch.setattr(Path, "rename", check)
    save(tmp_path / "out")
    assert appeared == [set()]
    assert tmp_path.stat().st_ino in flushed  # and the name itself after that


def test_short_writes_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        write_shortly(patch, most=7, room=10**6)
        save(tmp_path / "out")
    found = listing(tmp_path / "out")
    assert {name: found[name] for name in EXPECTED} == EXPECTED


def test_not_enough_space_is_known_before_writing(tmp_path: Path) -> None:
    started = []
    content = Pieces([b""], 1 << 60, started.append)
    with pytest.raises(OutputError, match=r"not enough disk space: expected 1,152,921\.50 TB free, found"):
        save(tmp_path / "new" / "out", [("a", content)])
    assert not started
    assert os.listdir(tmp_path) == []


# --- --force


@pytest.mark.parametrize("exchange", ["in one step", "not known here", "not on this file system"])
def test_force_replaces_the_whole_folder(exchange: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "out")
    if exchange != "in one step":
        libc = Libc(errno.EINVAL) if exchange == "not on this file system" else object()
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: libc)
    save(tmp_path / "out", [("only", b"this")], force=True)
    assert set(listing(tmp_path)) == {"out/only", f"out/{MANIFEST}"}
    check_folder(tmp_path / "out", "checkpoint", hashes=True)
    assert os.listdir(tmp_path) == ["out"]


def test_force_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "out")
    before = listing(tmp_path)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: Libc(errno.EPERM))
    with pytest.raises(OutputError, match=r"out: cannot be written .*not permitted"):
        save(tmp_path / "out", [("only", b"this")], force=True)
    assert listing(tmp_path) == before


def test_force_without_exchange_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "out")
    before = listing(tmp_path)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: object())
    rename = Path.rename

    def second_fails(self: Path, target: Path) -> Path:
        if target == tmp_path / "out" and not self.name.endswith("-replaced"):
            raise no_space()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OutputError, match="cannot be written"):
        save(tmp_path / "out", [("only", b"this")], force=True)
    assert listing(tmp_path) == before


def test_two_runs_for_one_output_the_second_loses(tmp_path: Path) -> None:
    """Both saw no output when they began; without --force the first to finish stays."""
    output = tmp_path / "out"

    def overtake(index: int) -> None:
        save(output, [("first", b"1")])

    with pytest.raises(OutputError, match="output exists"):
        save(output, [("second", Pieces([b"2"], 1, overtake))])
    assert set(listing(tmp_path)) == {"out/first", f"out/{MANIFEST}"}


def link_to_a_folder_of_ours(output: Path) -> None:
    save(output.parent / "elsewhere")
    output.symlink_to(output.parent / "elsewhere")


MEANWHILE: dict[str, Callable[[Path], None]] = {
    "somebody else's folder": existing_folder,
    "a link": link_to_a_folder_of_ours,
    "a file": lambda output: output.write_text("years") and None,
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("case", MEANWHILE)
def test_what_appears_at_the_output_meanwhile_stays(case: str, force: bool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    content = Pieces([b"2"], 1, lambda index: MEANWHILE[case](output))
    with pytest.raises(OutputError, match=r"output exists|refusing to replace"):
        save(output, [("a", content)], force=force)
    (tmp_path / "expected").mkdir()
    MEANWHILE[case](tmp_path / "expected" / "out")
    expected = listing(tmp_path / "expected")
    assert {name: raw for name, raw in listing(tmp_path).items() if not name.startswith("expected/")} == expected


# --- leftovers of dead runs


def leftover(parent: Path, name: str, *, marker: bool = True, manifest: bool = False) -> Path:
    folder = parent / name
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "a.bin").write_bytes(b"half")
    if marker:
        (folder / MARKER).touch()
    if manifest:
        (folder / MANIFEST).write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["out", "out[1]", "out*", "a**b", "öut"])
def test_leftovers_of_dead_runs_are_removed(name: str, tmp_path: Path) -> None:
    leftover(tmp_path, f".{name}.partial-1")
    leftover(tmp_path, f".{name}.partial-2", marker=False)
    leftover(tmp_path, f".{name}.partial-3", marker=False, manifest=True)
    (tmp_path / f".{name}.partial-4").mkdir()
    save(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_room_that_dead_runs_take_is_free_before_long_work(tmp_path: Path) -> None:
    leftover(tmp_path, ".out.partial-1")
    refuse_full_disk(tmp_path / "new" / "out", [b"x"])
    assert os.listdir(tmp_path) == [".out.partial-1"]
    refuse_full_disk(tmp_path / "out", [b"x"])
    assert not os.listdir(tmp_path)


def test_folders_that_only_look_alike_stay(tmp_path: Path) -> None:
    others = [
        leftover(tmp_path, ".other.partial-1"),
        leftover(tmp_path, "out.partial-1"),
        leftover(tmp_path, ".out"),
        leftover(tmp_path / "elsewhere", "x"),
    ]
    (tmp_path / ".out.partial-link").symlink_to("elsewhere/x")
    before = listing(tmp_path)
    save(tmp_path / "out")
    after = listing(tmp_path)
    assert all(folder.is_dir() for folder in others)
    assert {name: raw for name, raw in after.items() if not name.startswith("out/")} == before


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    """While a run is writing, others for the same output come and go."""
    seen: list[list[str]] = []

    def others_come(index: int) -> None:
        with contextlib.suppress(FuselageError):
            save(tmp_path / "out", [("bad", Pieces([b""], 1 << 60))])
        save(tmp_path / "elsewhere" / "out", [("x", b"")], force=True)
        seen.append(sorted(os.listdir(tmp_path)))

    stale = leftover(tmp_path, ".out.partial-stale")
    save(tmp_path / "out", [("a", Pieces([b"1", b"2"], 2, others_come)), ("b", b"")])
    assert not stale.exists()
    assert len(seen) == 2
    assert all(any(name.startswith(".out.partial-") for name in names) for names in seen)
    check_folder(tmp_path / "out", "checkpoint", hashes=True)


def test_where_folders_cannot_be_locked_saving_works_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.EBADF, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    stale = leftover(tmp_path, ".out.partial-1")
    save(tmp_path / "out")
    assert stale.exists()
    check_folder(tmp_path / "out", "checkpoint", hashes=True)


def test_a_removal_cut_short_leaves_the_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while cleaning up, a folder must not turn into one without marker and manifest."""
    folder = leftover(tmp_path, "folder", marker=False, manifest=True)
    states = []

    def spy(path: Any, *a: Any, **k: Any) -> None:
        states.append((folder / MARKER).exists())

    monkeypatch.setattr(files.os, "unlink", spy)
    monkeypatch.setattr(files.shutil, "rmtree", spy)
    files._remove_folder(folder)
    assert states == [True] * 3  # the subfolder, the manifest, and then all


# --- checking a folder


def alter(output: Path, name: str, raw: bytes) -> None:
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_bytes(raw)


def swap_for_fifo(output: Path) -> None:
    (output / "config.json").unlink()
    os.mkfifo(output / "config.json")


def edit_manifest(**change: Any) -> Callable[[Path], None]:
    def edit(output: Path) -> None:
        text = json.loads((output / MANIFEST).read_text())
        (output / MANIFEST).write_text(json.dumps(text | change))

    return edit


HASH = hashlib.sha256(b"{}").hexdigest()
TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte changed": (lambda output: alter(output, "weights/a.bin", b"abcdeX"), "weights/a.bin: file was altered.*SHA"),
    "longer": (lambda output: alter(output, "weights/a.bin", b"abcdefg"), "a.bin: .*expected 6 bytes, found 7"),
    "shorter": (lambda output: alter(output, "config.json", b""), "config.json: file was altered"),
    "missing": (lambda output: (output / "weights/a.bin").unlink(), "weights/a.bin: file is missing"),
    "FIFO instead": (swap_for_fifo, "config.json: file is missing"),
    "extra": (lambda output: alter(output, "extra.bin", b""), "extra.bin: file is not in the manifest"),
    "extra below": (lambda output: alter(output, "weights/c.bin", b""), "weights/c.bin: file is not in the manifest"),
    "marker": (lambda output: alter(output, MARKER, b""), "folder is incomplete.*Remove it"),
    "no manifest": (lambda output: (output / MANIFEST).unlink(), "not a folder of kind 'checkpoint'"),
    "another kind": (edit_manifest(kind="engine"), "another kind: expected checkpoint, found engine"),
    "another version": (edit_manifest(manifest_schema=2), "another version: expected 1, found 2"),
    "unknown key": (edit_manifest(surprise=1), "malformed manifest.*surprise"),
    "files not a table": (edit_manifest(files=[1]), "malformed manifest.*files"),
    "path out of it": (edit_manifest(files={"../x": {"bytes": 0, "sha256": ""}}), r"path leaves the folder.*\.\./x"),
    "absolute path": (edit_manifest(files={"/etc/passwd": {"bytes": 1, "sha256": ""}}), "path leaves the folder"),
    "name too long": (edit_manifest(files={"x" * 5000: {"bytes": 1, "sha256": ""}}), "file is missing"),
    "manifest not JSON": (lambda output: alter(output, MANIFEST, b"{"), "not valid JSON"),
    "manifest is a list": (lambda output: alter(output, MANIFEST, b"[]"), "malformed manifest"),
    "manifest is a folder": (
        lambda output: ((output / MANIFEST).unlink(), (output / MANIFEST).mkdir()),
        "not a regular file",
    ),
    "hash of another file": (
        edit_manifest(files={"config.json": {"bytes": 2, "sha256": "0" * 64}}),
        f"config.json: file was altered: expected SHA-256 {'0' * 64}, found {HASH}",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_found(case: str, tmp_path: Path) -> None:
    tamper, message = TAMPERED[case]
    save(tmp_path / "out")
    check_folder(tmp_path / "out", "checkpoint", hashes=True)
    tamper(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        check_folder(tmp_path / "out", "checkpoint", hashes=True)


def test_what_file_systems_leave_is_ignored(tmp_path: Path) -> None:
    save(tmp_path / "out")
    (tmp_path / "out" / ".DS_Store").write_bytes(b"")
    check_folder(tmp_path / "out", "checkpoint", hashes=True)


def test_no_folder_at_all(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match="no such folder"):
            check_folder(path, "checkpoint", hashes=False)
    assert read_manifest(tmp_path) is None


# --- single files


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "results.json"
    save_file(path, b"one")
    with pytest.raises(OutputError, match="output exists"):
        save_file(path, b"two")
    save_file(path, b"three", force=True)
    assert path.read_bytes() == b"three"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="output exists"):
        save_file(tmp_path / "folder", b"", force=True)
    for attempt in (
        lambda: save_file(path / "below", b""),
        lambda: refuse_existing_file(path / "below" / "deeper", force=False),
    ):
        with pytest.raises(OutputError, match=r"results\.json: output cannot be created: not a folder"):
            attempt()

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OutputError, match="No space left"):
        save_file(path, b"four", force=True)
    assert path.read_bytes() == b"three"
    assert os.listdir(path.parent) == ["results.json"]
    with pytest.raises(OutputError, match="No space left"):
        save_file(tmp_path / "newer" / "still" / "results.json", b"five")
    with pytest.raises(OutputError, match="its name is too long"):
        save_file(tmp_path / "newer" / ("x" * 250), b"six")
    assert sorted(os.listdir(tmp_path)) == ["folder", "new"]
