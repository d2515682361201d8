"""Hidden states on their way through a model block by block, in memory or in files that survive a kill."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.numpy import load, save

from exporter.errors import CheckpointError, OutputError
from exporter.graph import ModelGraph, weights
from exporter.lazy import is_finite, leaves
from exporter.manifests import validated
from exporter.structure import Count
from exporter.writers.files import size_text, try_lock

DEFAULT_BUDGET_BYTES = 4 << 30  # hidden states beyond this go to files
DEFAULT_BATCH = 8  # windows that go through a block at a time
PROGRESS_FILE = "progress.json"
PROGRESS_SCHEMA = 2  # the first had no number, and all that had been found so far in every new progress.json
OWN_FILES = re.compile(r"progress\.(json|new)|found\.\d+\.safetensors|.+\.[01]\.float32")
# Without its blocks, a mapped file kills the process where the disk is full. macOS cannot reserve them.
RESERVE = getattr(os, "posix_fallocate", lambda fd, offset, size: os.ftruncate(fd, offset + size))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an interrupted run came."""

    next_block: int
    found: dict[str, np.ndarray]  # what all its commits were given, by name


class _Described(BaseModel, strict=True):
    """What progress.json says beside its schema and its key."""

    next_block: Count
    commits: Count


class HiddenStates:
    """Hidden states [N, S, D] by name: in memory, or in two files each, of which one is complete at any time.

    With files, what `write` gives for block k is read only after `commit(k + 1)`; a run that is killed in between
    reads the file of the commit before. What a commit was given to keep lies in a file of its own, so that every
    number is written once. It counts when progress.json says so, and that changes in one rename.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None, key: str) -> None:
        self._shape, self._dtype, self._key = shape, dtype, key
        self._memory: dict[str, torch.Tensor] = {}
        self._folder = folder  # None: in memory
        self._commits = 0

    def progress(self) -> Progress | None:
        """What the commits of an interrupted run left, None if there was none.

        Raises:
            OutputError: it was another run, or one of another version of Fuselage; or a file is damaged or missing.
        """
        if self._folder is None or not (self._folder / PROGRESS_FILE).exists():
            return None
        path = self._folder / PROGRESS_FILE
        try:
            saved = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise OutputError("malformed", file=path, hint="give another folder") from error
        if not isinstance(saved, dict) or saved.get("key") != self._key:
            raise OutputError(
                "the folder holds hidden states of another measurement", file=self._folder, hint="give another folder"
            )
        if saved.get("schema") != PROGRESS_SCHEMA:
            raise OutputError(
                "the folder is of another version of Fuselage, which this one cannot go on from",
                file=self._folder,
                hint="remove the folder and measure again, or give another one",
            )
        described = validated(saved, _Described, "progress", file=path, error=OutputError)
        self._commits = described.commits
        found: dict[str, np.ndarray] = {}
        for commit in range(1, self._commits + 1):
            path = self._found_file(self._folder, commit)
            try:
                found |= load(path.read_bytes())
            except (OSError, SafetensorError) as error:
                hint = "remove the folder and measure again"
                raise OutputError(f"cannot be read ({error})", file=path, hint=hint) from error
        return Progress(described.next_block, found)

    def read(self, name: str, part: slice, device: torch.device) -> torch.Tensor:
        if self._folder is None:
            return self._memory[name][part].to(device)
        return torch.from_numpy(np.array(self._mapped(name, self._commits, "r")[part])).to(device, self._dtype)

    def write(self, name: str, part: slice, values: torch.Tensor) -> None:
        if self._folder is None:
            if name not in self._memory:
                self._memory[name] = torch.empty(self._shape, dtype=self._dtype)
            self._memory[name][part] = values.cpu()
            return
        self._mapped(name, self._commits + 1, "r+")[part] = values.float().cpu().numpy()

    def commit(self, next_block: int, found: Mapping[str, np.ndarray]) -> None:
        """Make all that was written since the last commit count, and keep `found`, arrays under names of their own.

        Raises:
            OutputError: the disk is full.
        """
        self._commits += 1
        if self._folder is None:
            return
        path = self._folder / PROGRESS_FILE
        temporary = path.with_suffix(".new")
        described = {
            "schema": PROGRESS_SCHEMA, "key": self._key, "next_block": next_block, "commits": self._commits
        }  # fmt: skip
        try:
            self._found_file(self._folder, self._commits).write_bytes(save(dict(found)))
            temporary.write_text(json.dumps(described))
            os.replace(temporary, path)
        except OSError as error:
            hint = "free some space, and run again to go on from the last block that was finished"
            raise OutputError(f"cannot hold progress: {error.strerror}", file=self._folder, hint=hint) from error

    @staticmethod
    def _found_file(folder: Path, commit: int) -> Path:
        return folder / f"found.{commit}.safetensors"

    def _mapped(self, name: str, commit: int, mode: Literal["r", "r+"]) -> np.memmap:
        if self._folder is None:
            raise AssertionError("Bug: hidden states in memory have no files")
        path = self._folder / f"{name}.{commit % 2}.float32"
        size = 4 * math.prod(self._shape)
        if mode == "r+" and not (path.exists() and path.stat().st_size == size):
            _make_file(path, size)
        try:
            return np.memmap(path, np.float32, mode, shape=self._shape)
        except (OSError, ValueError) as error:  # ValueError: it was cut short
            raise OutputError(
                f"cannot be read ({error})", file=path, hint="remove the folder and measure again"
            ) from error


def _make_file(path: Path, size: int) -> None:
    try:
        with path.open("wb") as file:
            RESERVE(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(
            f"cannot hold hidden states: {error.strerror}",
            file=path.parent,
            expected=f"{size_text(size)} for {path.name}",
            hint="take fewer windows, or --resume FOLDER on a larger disk",
        ) from error


@contextlib.contextmanager
def states_folder(work: Path | None, needed_bytes: int, budget_bytes: int) -> Iterator[Path | None]:
    """Where hidden states go: `work` if given, a temporary folder if they do not fit the budget, else None (memory).

    `work` keeps its files until `remove_states`: what is made of a measurement may be interrupted as well.

    Raises:
        OutputError: `work` holds something else, is in use by another run, or cannot be made.
    """
    if work is not None:
        with _locked(work):
            others = sorted(n for n in os.listdir(work) if not OWN_FILES.fullmatch(n) and not n.startswith("."))
            if others:
                found = ", ".join(others[:5])
                raise OutputError("the folder to resume from holds something else", file=work, found=found)
            yield work
    elif needed_bytes > budget_bytes:
        with tempfile.TemporaryDirectory(prefix="fuselage-states-") as folder:
            yield Path(folder)
    else:
        yield None


def remove_states(work: Path) -> None:
    """Remove what a measurement has left in its folder, and the folder if nothing else is in it.

    Raises:
        OutputError: another run is using it.
    """
    with _locked(work):
        (work / PROGRESS_FILE).unlink(missing_ok=True)  # first: it means nothing without the others
        for name in os.listdir(work):
            if OWN_FILES.fullmatch(name):
                (work / name).unlink()
        with contextlib.suppress(OSError):  # a link to a folder, or there is something else in it
            work.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder, and keep every other run out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OutputError(f"cannot be a folder for hidden states: {error.strerror}", file=folder) from error
    try:
        if not try_lock(lock):
            hint = "wait for it, or give another folder"
            raise OutputError("another run is using the folder to resume from", file=folder, hint=hint)
        yield
    finally:
        os.close(lock)


def check_finite(y: torch.Tensor, graph: ModelGraph, index: int) -> None:
    """Raise CheckpointError if a block's output is not finite; names the weight to blame if it is one."""
    if torch.isfinite(y).all():
        return
    if index == 0:
        _check_weights(graph.embedding, block=None)
    _check_weights(graph.blocks[index], block=index)
    raise CheckpointError("the output of this block is NaN or infinite, and its weights are not", block=index)


def check_logits(logits: torch.Tensor, graph: ModelGraph) -> None:
    """Raise CheckpointError if a model's logits are not finite, whose last block's output is."""
    if torch.isfinite(logits).all():
        return
    _check_weights((graph.norm, graph.lm_head or graph.embedding), block=None)
    raise CheckpointError("the logits are NaN or infinite, and the weights of the final norm and lm_head are not")


def _check_weights(part: Any, *, block: int | None) -> None:
    for tensor in weights(part):
        for leaf in leaves(tensor):
            if not is_finite(leaf):
                name, path = getattr(leaf, "name", None), getattr(leaf, "path", None)
                raise CheckpointError("weight is NaN or infinite", file=path, tensor=name, block=block)
