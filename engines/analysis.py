"""The folder that `analyze` writes, as a report shows it: its numbers as pictures, and the plan with its reasons.

Both files are untrusted text; the plan may have been edited since it was suggested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from engines.results import EngineResult, EvaluatedModel, validation_problems
from engines.structure_strip import layers_text
from exporter.analysis.pictures import Picture, pictures_of
from exporter.errors import EngineError
from exporter.manifests import DEPENDENCY_FILE, PLAN_FILE
from exporter.plan import Plan, read_plan
from exporter.safetensors_io import read_json
from exporter.structure import Count, Sealed

MAX_DEPENDENCY_BYTES = 256 * 2**20  # three matrices of a thousand blocks take about 70 MB

Kind = Literal["block", "attention", "ffn"]
Figures = tuple[Annotated[float, Field(allow_inf_nan=False)] | None, ...]  # null where there is nothing to compare


class _Measurements(Sealed):
    """`exporter.analysis.dependency.Dependency` as JSON; n blocks from `first` to `last`, both included."""

    source_layers: tuple[Annotated[tuple[Count, ...], Field(min_length=1)], ...] = Field(min_length=1, max_length=4096)
    first: Count
    last: Count
    tokens: Count
    matrices: dict[Kind, tuple[Figures, ...]]  # [n, n]
    distance_of_output: Figures  # [n]
    distance_of_contribution: Figures
    relative_contribution: Figures
    importance: dict[Kind, Figures] = Field(default_factory=dict)
    kl: dict[Kind, Figures] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sizes_fit(self) -> _Measurements:
        if not self.first <= self.last < len(self.source_layers):
            raise ValueError(f"blocks {self.first} to {self.last} of {len(self.source_layers)} were measured")
        count = self.last - self.first + 1
        rows = [row for matrix in self.matrices.values() for row in matrix]
        if any(len(matrix) != count for matrix in self.matrices.values()) or any(len(row) != count for row in rows):
            raise ValueError(f"a matrix is not {count} x {count}, of the blocks that were measured")
        if any(len(values) != count for values in (*self.importance.values(), *self.kl.values())):
            raise ValueError(f"an importance is not of the {count} blocks that were measured")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What was measured of a model, as arrays, and the plan beside it."""

    source_layers: Sequence[Sequence[int]]
    first: int
    last: int
    tokens: int
    matrices: dict[Kind, np.ndarray]
    importance: dict[Kind, np.ndarray]
    kl: dict[Kind, np.ndarray]
    plan: Plan
    plan_text: str

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(pictures_of(self, self.plan))


def read_analysis(folder: Path) -> Analysis:
    """Read the numbers and the plan of an analysis.

    Raises:
        CheckpointError, PlanError: a file is missing or malformed.
        EngineError: the numbers do not have the form that `analyze` gives them.
    """
    path = folder / DEPENDENCY_FILE
    try:
        found = _Measurements.model_validate(read_json(path, MAX_DEPENDENCY_BYTES))
    except ValidationError as error:
        raise EngineError(f"the measurements are malformed: {validation_problems(error)}", file=path) from error
    plan = read_plan(folder / PLAN_FILE)

    def arrays(values: dict) -> dict[Kind, np.ndarray]:
        return {kind: np.array(value, dtype=np.float64) for kind, value in values.items()}  # null becomes NaN

    return Analysis(
        source_layers=found.source_layers,
        first=found.first,
        last=found.last,
        tokens=found.tokens,
        matrices=arrays(found.matrices),
        importance=arrays(found.importance),
        kl=arrays(found.kl),
        plan=plan,
        plan_text=(folder / PLAN_FILE).read_text("utf-8"),
    )


def check_same_layers(analysis: Analysis, models: Sequence[EngineResult | EvaluatedModel], folder: Path) -> None:
    """Refuse to show an analysis beside models that have layers it does not know (EngineError)."""
    known = {layer for layers in analysis.source_layers for layer in layers}
    for model in models:
        layers = {layer for block in model.structure.flat_blocks for layer in block.source_layers}
        if not layers <= known:
            raise EngineError(
                f"the analysis is of another model than {model.label!r}",
                file=folder,
                expected=f"layers {layers_text(sorted(layers))}",
                found=f"layers {layers_text(sorted(known))}",
            )
