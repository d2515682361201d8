"""The passes of a plan in their order, and the steps of a recipe, each in a folder of its own and resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError, GraphError, PlanError
from exporter.graph import ModelGraph
from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import NormRule, fuse_ffn
from exporter.passes.parallelize_blocks import parallelize_blocks
from exporter.plan import Plan
from exporter.writers.files import Manifest, check_folder, read_manifest

Pass = Callable[[ModelGraph], ModelGraph]


def apply_plan(graph: ModelGraph, plan: Plan, *, norm: NormRule = "fold") -> ModelGraph:
    """Drop, fuse and parallelize, in this order; no tensor byte is read.

    Raises:
        PlanError: the plan does not fit the graph; names the pass, the block and the rule.
    """
    passes: tuple[tuple[str, bool, Pass], ...] = (
        ("drop_attention", bool(plan.drop_attention), lambda g: drop_attention(g, plan.dropped_layers)),
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
class Step:
    """One folder of a recipe's output.

    `inputs` says everything that the result depends on; a complete folder made from equal inputs is kept.
    """

    name: str
    folder: Path
    kind: str  # of the manifest
    inputs: Mapping[str, Any]  # plain JSON data
    make: Callable[[Mapping[str, Any]], object]  # writes `folder`, with these details in its manifest

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()


def run_step(step: Step) -> tuple[Manifest, bool]:
    """Make a step's folder unless it is there; returns its manifest and whether it was made now."""
    done = finished(step)
    if done is not None:
        return done, False
    step.make({"step": step.name, "step_key": step.key})
    return check_folder(step.folder, step.kind, hashes=False), True


def finished(step: Step) -> Manifest | None:
    """The manifest of a step's folder if it is complete and was made from the same inputs, else None."""
    if not step.folder.exists():
        return None
    try:
        manifest = check_folder(step.folder, step.kind, hashes=False)
    except CheckpointError:
        # An altered or interrupted folder is made again; save_folder refuses to replace one that is not ours.
        return None
    return manifest if manifest.details.get("step_key") == step.key else None


def source_fingerprint(model: Path) -> dict[str, Any]:
    """What a model folder is recognized by without reading its weights: its manifest, or names, sizes and times."""
    manifest = read_manifest(model) if model.is_dir() else None
    if manifest is not None:
        return {"manifest": manifest.fingerprint}
    files = [model] if model.is_file() else sorted(path for path in model.rglob("*") if path.is_file())
    return {
        str(path.relative_to(model)) if path != model else path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
    }
