"""The passes of a plan in their order, and the steps of a recipe, each in a folder of its own and resumable."""

from __future__ import annotations

import hashlib
import json
import os.path
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import CheckpointError, GraphError, OutputError, PlanError, raise_all
from exporter.graph import ModelGraph
from exporter.manifests import PLAN_FILE
from exporter.passes.drop_attention import drop_attention
from exporter.passes.drop_ffn import drop_ffn
from exporter.passes.fuse_ffn import NormRule, fuse_ffn
from exporter.passes.parallelize_blocks import parallelize_blocks
from exporter.plan import Plan
from exporter.read import Checkpoint
from exporter.targets import TARGETS
from exporter.writers import hf, hf_readers
from exporter.writers.files import (
    MANIFEST,
    Content,
    FileEntry,
    Manifest,
    Progress,
    check_folder,
    json_bytes,
    read_manifest,
    refuse_existing,
    save_folder,
    sha256_of,
    sizes_of,
)

if TYPE_CHECKING:
    from exporter.distill import Distilled

DEFAULT_SHARD_BYTES = 5 * 10**9
DISTILL_FILE = "distill.json"
HASHED_BYTES = 1 << 20

Pass = Callable[[ModelGraph], ModelGraph]


def apply_plan(graph: ModelGraph, plan: Plan, *, norm: NormRule = "fold") -> ModelGraph:
    """Drop, fuse and parallelize, in this order; no tensor byte is read.

    Raises:
        PlanError: the plan does not fit the graph; names the pass, the block and the rule.
    """
    passes: tuple[tuple[str, bool, Pass], ...] = (
        ("drop_attention", bool(plan.drop_attention), lambda g: drop_attention(g, plan.dropped_layers)),
        ("drop_ffn", bool(plan.drop_ffn), lambda g: drop_ffn(g, plan.dropped_ffn_layers)),
        ("fuse", bool(plan.fuse), lambda g: fuse_ffn(g, plan.fuse, norm=norm)),
        ("parallel", bool(plan.parallel), lambda g: parallelize_blocks(g, plan.parallel)),
    )
    for name, wanted, run in passes:
        if wanted:
            graph = _run_pass(name, run, graph)
    return graph


def _run_pass(name: str, run: Pass, graph: ModelGraph) -> ModelGraph:
    """Run one pass. The graph it makes checks its own invariants; the error says which pass broke one."""
    try:
        return run(graph)
    except (PlanError, GraphError) as error:
        raise PlanError(
            f"{name}: {error.problem}",
            file=error.file,
            tensor=error.tensor,
            block=error.block,
            expected=error.expected,
            found=error.found,
            hint=error.hint,
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """A folder about to be written: everything cheap was checked, no byte was produced."""

    output: Path
    kind: str
    files: Mapping[str, Content | bytes]
    details: Mapping[str, Any]
    force: bool

    @property
    def plan(self) -> dict[str, int]:
        """File name -> bytes."""
        return sizes_of(self.files.items())

    @property
    def total_bytes(self) -> int:
        return sum(self.plan.values())


def save(writing: Writing, progress: Progress | None = None) -> Manifest:
    """Carry out a writing; see `exporter.writers.files.save_folder`."""
    return save_folder(
        writing.output,
        writing.files.items(),
        kind=writing.kind,
        details=writing.details,
        force=writing.force,
        progress=progress,
    )


def target_writing(
    target: str,
    checkpoint: Checkpoint,
    graph: ModelGraph,
    output: Path,
    *,
    settings: Any,
    details: Mapping[str, Any],
    force: bool = False,
) -> Writing:
    """Prepare to write `graph`, made from `checkpoint`, in the format of a target.

    Args:
        target: of `exporter.targets.TARGETS`.
        settings: of that target; what `checkpoint` brings is added.

    Raises:
        OutputError, TargetError: the output is in the way, or the format cannot express the graph.
    """
    refuse_overlap(checkpoint.path, output)
    refuse_existing(output, force=force)
    chosen = TARGETS[target]
    files = dict(chosen.emit(graph, chosen.with_source(settings, checkpoint, graph)))
    return Writing(output=output, kind=chosen.kind, files=files, details=details, force=force)


def checkpoint_writing(
    checkpoint: Checkpoint,
    graph: ModelGraph,
    output: Path,
    *,
    readers: Sequence[str] = (),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    layout: str | None = None,
    details: Mapping[str, Any],
    force: bool = False,
) -> Writing:
    """Prepare to write `graph`, made from `checkpoint`, as a Hugging Face folder.

    Args:
        layout: of a quantized graph, "modelopt" or "compressed-tensors"; None: that of `checkpoint`, else the one that
            suits its format.

    Raises:
        OutputError, TargetError: as for `target_writing`; with `readers`, also what each of them would reject or get
            wrong.
    """
    options = hf.Options(shard_bytes=shard_bytes, quantization_layout=layout)
    writing = target_writing("hf", checkpoint, graph, output, settings=options, details=details, force=force)
    raise_all(hf_readers.check_for(graph, hf.with_source(options, checkpoint, graph), readers))
    return writing


def distilled_writing(
    checkpoint: Checkpoint, distilled: Distilled, output: Path, *, details: Mapping[str, Any], force: bool = False
) -> Writing:
    """Prepare to write a trained graph, made from `checkpoint`, as a Hugging Face folder with its losses beside it.

    Raises:
        OutputError, TargetError: as for `target_writing`.
    """
    summary = {**details, **distilled.summary}
    writing = checkpoint_writing(checkpoint, distilled.graph, output, details=summary, force=force)
    record = json_bytes({**summary, **distilled.to_json()})
    return replace(writing, files={**writing.files, DISTILL_FILE: record})


def refuse_overlap(source: Path, output: Path) -> None:
    """Raise OutputError if writing `output` would replace or mix with another folder that is read or written."""
    read, written = (Path(os.path.realpath(path)) for path in (source, output))  # also of a loop of links
    if read == written or read.is_relative_to(written) or written.is_relative_to(read):
        raise OutputError("two folders of this command are the same or inside each other", file=output, found=source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One folder of a recipe's output.

    `inputs` says everything that the result depends on; a complete folder made from equal inputs is kept.
    """

    name: str
    folder: Path
    kind: str  # of the manifest
    inputs: Mapping[str, Any]  # plain JSON data
    make: Callable[[Mapping[str, Any]], object]  # writes `folder`, with these details in its manifest
    tidy: Callable[[], None] | None = None  # once `folder` is complete, made now or before
    total_bytes: Callable[[], int] | None = None  # of a model or network, before it is made; None: neither

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()


def run_step(step: Step) -> tuple[Manifest, bool]:
    """Make a step's folder unless it is there; returns its manifest and whether it was made now."""
    manifest, is_new = finished(step), False
    if manifest is None:
        step.make({"step": step.name, "step_key": step.key})
        manifest, is_new = check_folder(step.folder, step.kind, hashes=False), True
    if step.tidy is not None:
        step.tidy()
    return manifest, is_new


def finished(step: Step) -> Manifest | None:
    """The manifest of a step's folder if it is complete and was made from the same inputs, else None.

    Raises:
        OutputError: it is not, and something is in its place that is not ours to replace.
    """
    with suppress(CheckpointError):  # none yet, or it was altered or interrupted, and is made again
        manifest = check_folder(step.folder, step.kind, hashes=False)
        if manifest.details.get("step_key") == step.key:
            return manifest
    refuse_existing(step.folder, force=True)  # `save_folder` would, when the work is done
    return None


def refuse_edited(folder: Path) -> None:
    """Raise OutputError if a file of a step's folder was changed or added since: it would be lost, or be believed.

    Files of more than a MiB are taken to be unchanged if their size is: nobody edits weights.
    """
    try:
        manifest = read_manifest(folder) if folder.is_dir() else None
    except CheckpointError:  # as in `finished`: it is made again
        return
    if manifest is None:
        return
    for path in _visible(folder):
        name = path.relative_to(folder).as_posix()
        written = manifest.files.get(name)
        if name == MANIFEST or (written is not None and _is_as_written(path, written)):
            continue
        if written is None:
            way_out = "move it elsewhere"
        elif name == PLAN_FILE:
            way_out = f"copy it beside the recipe, name it there (`plan: {name}`), and remove the folder"
        else:
            way_out = "keep a copy elsewhere, and remove the folder"
        raise OutputError(
            f"the file was {'added' if written is None else 'changed'} by hand, and `run` replaces whole folders",
            file=path,
            hint=way_out,
        )


def _is_as_written(path: Path, written: FileEntry) -> bool:
    size = path.stat().st_size
    return size == written.bytes and (size > HASHED_BYTES or sha256_of(path) == written.sha256)


def source_fingerprint(model: Path) -> dict[str, Any]:
    """What a folder (or a file) is recognized by without reading it: its manifest, or names, sizes and times.

    Hidden files do not count: `git status` alone changes those of a cloned model. Nor do Python's caches.
    """
    manifest = read_manifest(model) if model.is_dir() else None
    if manifest is not None:
        return {"manifest": manifest.fingerprint}
    files = {model.name: model} if model.is_file() else {str(path.relative_to(model)): path for path in _visible(model)}
    return {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()}


def _visible(folder: Path) -> Iterator[Path]:
    """Files but hidden ones, and those that Python leaves beside code: `trtllm-build` and tasks run what lies there."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            yield path
