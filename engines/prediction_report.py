"""The predicted part of a report: what is wanted, and what is shown of it.

Predicted figures are never set against measured ones: a predicted engine's ratio refers to the predicted baseline, on
the same hardware. Only where the model is held against what was measured do both stand side by side.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engines.comparison_table import TIMED, Metric
from engines.results import Comparison, EngineResult

if TYPE_CHECKING:  # most reports predict nothing, and need not wait for the latency model
    from engines.hardware import Gpu
    from engines.latency_fit import Fit, Observation

METRICS = (
    *TIMED,
    Metric("Memory of one GPU", "Weights", "bytes", -1, lambda e, _: e.weight_bytes),
    Metric("Memory of one GPU", "KV cache per token", "bytes", -1, lambda e, _: e.kv_bytes_per_token),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a report is to predict.

    Every GPU at every tensor-parallel size; at the results' request shapes, or at other batches of the same lengths.
    """

    gpus: Sequence[Gpu] = ()
    tp_sizes: Sequence[int] = (1,)
    batches: Sequence[int] | None = None
    dtype: str | None = None  # of what is not quantized; None: as in the results
    calibrate: Gpu | None = None  # the hardware of the results, to hold the model against what was measured on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """The engines on one kind of hardware."""

    name: str
    tp_size: int
    comparison: Comparison
    source: str  # where the figures come from, a sentence
    notes: tuple[str, ...] = ()  # one sentence each


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The latency model beside what was measured: constants fitted to these figures, and every error."""

    gpu: Gpu
    observations: tuple[Observation, ...]
    fit: Fit
    left_out: tuple[float, ...]  # the error for each of what the others alone would give
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> Iterator[tuple[str, float, float, float, float]]:
        """(name, measured ms, predicted ms, error, error when left out of the fit)."""
        for one, error, left_out in zip(self.observations, self.fit.errors, self.left_out, strict=True):
            measured = one.latency_us / 1000
            yield one.name, measured, measured * (1 + error), error, left_out

    @property
    def mean_error(self) -> float:
        return statistics.fmean(abs(error) for error in self.fit.errors)

    @property
    def mean_left_out(self) -> float:
        return statistics.fmean(abs(error) for error in self.left_out)


def without_predicted(comparison: Comparison, baseline: str | None) -> tuple[Comparison, list[Predicted]]:
    """Set the engines apart that results files call predicted, by device; a report of nothing else keeps them.

    Args:
        baseline: the label that was asked for; a part without it takes its first engine.
    """
    groups: dict[str, list[EngineResult]] = {}
    for engine in comparison.engines:
        groups.setdefault(engine.device if engine.kind == "predicted" else "", []).append(engine)
    if len(groups) == 1:
        return comparison, []
    ran = _part(comparison, groups.pop("" if "" in groups else next(iter(groups))), baseline)
    return ran, [
        Predicted(
            name=device,
            tp_size=1,
            comparison=_part(comparison, engines, baseline),
            source="The results file calls these figures predicted.",
        )
        for device, engines in groups.items()
    ]


def _part(comparison: Comparison, engines: Sequence[EngineResult], baseline: str | None) -> Comparison:
    """Some engines of a comparison, in the order of its files but for the baseline."""
    labels = [engine.label for _, results in comparison.sources for engine in results.engines]
    ordered = sorted(engines, key=lambda engine: (engine.label != baseline, labels.index(engine.label)))
    kept = {engine.label for engine in engines}
    cells = {key: cell for key, cell in comparison.cells.items() if key[0] in kept}
    return replace(comparison, engines=tuple(ordered), cells=cells)
