"""The folder that a quantization's errors are in, as a report shows it: the worst linears, and schemes for wide FFNs.

`errors.json` is untrusted text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from engines.results import validation_problems
from exporter.errors import EngineError
from exporter.manifests import ERRORS_FILE
from exporter.safetensors_io import read_json
from exporter.structure import Count, Sealed

MAX_ERRORS_BYTES = 64 * 2**20
WORST = 6  # linears that a report lists

Number = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Text = Annotated[str, Field(max_length=1000)]


class LinearError(Sealed):
    """See `exporter.analysis.quantization.LinearError`."""

    name: Text
    relative_error: Number
    sqnr_db: float | None  # None: nothing is lost
    saturation: Number | None


class SmoothingCell(Sealed):
    """See `exporter.analysis.quantization.SmoothingCell`."""

    block: Count
    scheme: Text
    smoothing: Text
    alpha: Number | None
    relative_error: Number


class _Errors(Sealed):
    source: Text
    tokens: Count
    linears: tuple[LinearError, ...] = Field(max_length=100_000)
    smoothing: tuple[SmoothingCell, ...] = Field(max_length=100_000)
    alpha: dict[str, Number]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeTable:
    """Output errors of one wide FFN: rows are schemes, columns are ways of smoothing."""

    block: int
    smoothings: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float]]]  # scheme, relative errors


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationErrors:
    """What rounding does to one model."""

    label: str
    source: str
    linears: Sequence[LinearError]  # the worst first
    tables: Sequence[SchemeTable]

    @property
    def worst(self) -> Sequence[LinearError]:
        return self.linears[:WORST]


def read_quantization_errors(folders: Mapping[str, Path]) -> list[QuantizationErrors]:
    """Read the errors of several models, by label.

    Raises:
        CheckpointError: a file is missing or is not JSON.
        EngineError: it does not have the form that a quantization gives it.
    """
    return [_read(label, folder / ERRORS_FILE) for label, folder in folders.items()]


def _read(label: str, path: Path) -> QuantizationErrors:
    try:
        found = _Errors.model_validate(read_json(path, MAX_ERRORS_BYTES))
    except ValidationError as error:
        raise EngineError(f"the quantization errors are malformed: {validation_problems(error)}", file=path) from error
    tables = []
    for block in dict.fromkeys(cell.block for cell in found.smoothing):
        errors = {(cell.scheme, cell.smoothing): cell.relative_error for cell in found.smoothing if cell.block == block}
        schemes, smoothings = (list(dict.fromkeys(key[i] for key in errors)) for i in (0, 1))
        if len(errors) != len(schemes) * len(smoothings):
            raise EngineError("a table of the quantization errors has holes", file=path, found=f"block {block}")
        rows = [(scheme, [errors[scheme, smoothing] for smoothing in smoothings]) for scheme in schemes]
        tables.append(SchemeTable(block=block, smoothings=smoothings, rows=rows))
    linears = sorted(found.linears, key=lambda linear: -linear.relative_error)
    return QuantizationErrors(label=label, source=found.source, linears=linears, tables=tables)
