"""What an interrupted distillation goes on from: weights and optimizer state in float32, a part from every process.

    DIR/run.json           which run this is, how far it came, its losses; names the last whole step
    DIR/step-400/part-0/   the rows that process 0 held of every tensor, a folder like any that we write
    DIR/step-400/part-1/   ...

A step counts once run.json names it, and run.json changes in one rename, so a killed run goes on from the step
before. Parts are put together when they are read: a run may go on with another number of processes. All of them
must see the folder. No pickles here either, which is why this is not `torch.distributed.checkpoint`'s format.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from exporter.distill_model import Processes
from exporter.errors import CheckpointError, OutputError
from exporter.lazy import LazyTensor, concat
from exporter.safetensors_io import SafetensorsFile, read_json, read_safetensors
from exporter.structure import Sealed
from exporter.writers.files import check_folder, json_bytes, refuse_existing, save_file, save_folder

RUN_FILE = "run.json"
STEP_PREFIX = "step-"
TENSORS = "state.safetensors"
KIND = "distill-state"


class SavedRun(Sealed):
    """run.json."""

    key: str  # of what is trained on what, and how
    parts: Annotated[int, Field(ge=1, le=1 << 16)]
    losses: list[tuple[float, float]]  # of every step done; see `exporter.distill.Distilled`

    @property
    def step(self) -> int:
        return len(self.losses)


def find_run(folder: Path, key: str) -> SavedRun | None:
    """The run saved in a folder, None if there is none yet.

    Raises:
        CheckpointError: it is the run of other models, text or settings, or run.json is malformed.
        OutputError: the folder holds something else, or cannot be written.
    """
    refuse_existing(_step_folder(folder, 0), force=False)  # a place where nothing can be saved
    if not os.path.lexists(folder):
        return None
    others = sorted(
        p.name for p in folder.iterdir() if p.name != RUN_FILE and not p.name.startswith((STEP_PREFIX, "."))
    )
    if others:
        raise OutputError("the folder to resume from holds something else", file=folder, found=", ".join(others[:5]))
    path = folder / RUN_FILE
    if not os.path.lexists(path):
        return None
    try:
        run = SavedRun.model_validate(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"malformed ({problem['loc']}: {problem['msg']})", file=path) from error
    if run.key != key:
        raise CheckpointError(
            "the folder to resume from belongs to another run: models, plan, text and settings must be the same",
            file=folder,
            hint="repeat that run's options, give another folder, or remove this one",
        )
    return run


def save_step(folder: Path, run: SavedRun, tensors: Mapping[str, LazyTensor], processes: Processes) -> None:
    """Save a step, each process its part, and let the one before it go.

    Raises:
        OutputError: the disk is full or not writable; what was saved before is still there.
    """
    part = _step_folder(folder, run.step) / f"part-{processes.rank}"
    save_folder(part, [(TENSORS, SafetensorsFile(tensors))], kind=KIND, details={"key": run.key}, force=True)
    processes.wait()
    if processes.rank == 0:
        save_file(folder / RUN_FILE, json_bytes(run.model_dump()), force=True)
        for step in folder.glob(f"{STEP_PREFIX}*"):
            if step != _step_folder(folder, run.step):
                shutil.rmtree(step)
    processes.wait()


def open_step(folder: Path, run: SavedRun, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """The tensors of a run's last step, whole and lazy; `shapes` are the ones there must be.

    Raises:
        CheckpointError: a part or a tensor is missing or was altered.
    """
    parts = [_step_folder(folder, run.step) / f"part-{number}" for number in range(run.parts)]
    for part in parts:
        check_folder(part, KIND, hashes=False)
    files = [read_safetensors(part / TENSORS) for part in parts]
    tensors = {}
    for name, shape in shapes.items():
        held = [tensor for file in files if isinstance(tensor := file.get(name), LazyTensor)]
        if len(held) != len(files) or (sum(t.shape[0] for t in held), *held[0].shape[1:]) != shape:
            raise CheckpointError("rows are missing or too many", file=parts[0].parent, tensor=name, expected=shape)
        tensors[name] = concat(held, axis=0)
    return tensors


def remove_run(folder: Path) -> None:
    """Remove what `save_step` left, once its result is safe elsewhere."""
    for path in (*folder.glob(RUN_FILE), *folder.glob(f".{RUN_FILE}.*")):  # also what was to become it, of a killed run
        path.unlink()
    for step in folder.glob(f"{STEP_PREFIX}*"):
        shutil.rmtree(step)
    if not any(folder.iterdir()):
        folder.rmdir()


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"{STEP_PREFIX}{step}"
