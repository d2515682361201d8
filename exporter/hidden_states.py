"""Hidden states on their way through a model block by block, in memory or in files that survive a kill."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from exporter.errors import CheckpointError, OutputError
from exporter.graph import ModelGraph, weights
from exporter.lazy import LazyTensor

PROGRESS_FILE = "progress.json"


class HiddenStates:
    """Hidden states [N, S, D] by name: in memory, or in two files each, of which one is complete at any time.

    With files, what `write` gives for block k is read only after `commit(k + 1)`; a run that is killed in between
    reads the file of the commit before.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None, key: str) -> None:
        self._shape, self._dtype, self._key = shape, dtype, key
        self._memory: dict[str, torch.Tensor] = {}
        self._folder = folder  # None: in memory
        self._commits = 0

    def progress(self) -> dict[str, Any] | None:
        """What the last commit of an interrupted run said, None if there was none."""
        if self._folder is None or not (self._folder / PROGRESS_FILE).exists():
            return None
        saved = json.loads((self._folder / PROGRESS_FILE).read_text())
        if saved["key"] != self._key:
            raise OutputError(
                "the folder holds hidden states of another measurement", file=self._folder, hint="give another folder"
            )
        self._commits = saved["commits"]
        return saved

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

    def commit(self, next_block: int, sums: Mapping[str, Any]) -> None:
        self._commits += 1
        if self._folder is None:
            return
        path = self._folder / PROGRESS_FILE
        temporary = path.with_suffix(".new")
        temporary.write_text(
            json.dumps({"key": self._key, "next_block": next_block, "commits": self._commits, "sums": sums})
        )
        os.replace(temporary, path)

    def _mapped(self, name: str, commit: int, mode: Literal["r", "r+"]) -> np.memmap:
        if self._folder is None:
            raise AssertionError("Bug: hidden states in memory have no files")
        path = self._folder / f"{name}.{commit % 2}.float32"
        if mode == "r+" and not path.exists():
            with path.open("wb") as file:
                file.truncate(4 * math.prod(self._shape))
        return np.memmap(path, np.float32, mode, shape=self._shape)


@contextmanager
def states_folder(work: Path | None, needed_bytes: int, budget_bytes: int) -> Iterator[Path | None]:
    """Where hidden states go: `work` if given, a temporary folder if they do not fit the budget, else None (memory)."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
    elif needed_bytes > budget_bytes:
        with tempfile.TemporaryDirectory(prefix="fuselage-states-") as folder:
            yield Path(folder)
    else:
        yield None


def check_finite(y: torch.Tensor, graph: ModelGraph, index: int) -> None:
    """Raise CheckpointError if a block's output is not finite; names the weight to blame if it is one."""
    if torch.isfinite(y).all():
        return
    for tensor in weights(graph.blocks[index]):
        for source, name in _named_sources(tensor):
            if not all(np.isfinite(chunk.astype(np.float32)).all() for chunk in source.chunks()):
                raise CheckpointError("weight is NaN or infinite", tensor=name, block=index)
    raise CheckpointError("the output of this block is NaN or infinite, and its weights are not", block=index)


def _named_sources(tensor: LazyTensor) -> Iterator[tuple[LazyTensor, str | None]]:
    sources = getattr(tensor, "sources", None)
    if sources is None:
        yield tensor, getattr(tensor, "name", None)
        return
    for source in sources:
        yield from _named_sources(source)
