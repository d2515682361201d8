"""Did anything get slower? Two results files of the same engines, compared beyond noise.

A round is one sample: the steps within one are not independent. Samples of two runs are compared by the Mann-Whitney
U test, whose p values are adjusted for the number of comparisons (Benjamini and Hochberg), so that two runs of the
same engines differ anywhere in at most 5 % of cases. That holds for what varies from round to round; what varies from
one load of an engine to the next, or from day to day on a shared machine, no number of rounds shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
from rich.table import Table

from engines.intervals import LEAST_ROUNDS, RatioInterval, ratio_interval
from engines.markdown import markdown_escaped
from engines.results import Cell, EngineResult, RequestShape, Results, check_same_model
from exporter.errors import EngineError

COMPARISON_SCHEMA: Final = 1
SIGNIFICANCE = 0.05
METRICS = {"ttft_ms": "TTFT", "inter_token_ms": "inter-token", "request_ms": "request"}

Verdict = Literal["slower", "faster", "no difference"]
STYLES: dict[Verdict, str] = {"slower": "red", "faster": "green", "no difference": "dim"}  # on a terminal


def adjusted_p_values(runs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[float]:
    """Test every pair of runs for a difference: two-sided p values, adjusted so that all of them can be looked at.

    Where nothing differs, one of them is at most SIGNIFICANCE in at most that share of cases.
    """
    from scipy.stats import false_discovery_control, mannwhitneyu

    return [float(p) for p in false_discovery_control([mannwhitneyu(new, old).pvalue for new, old in runs])]


def least_adjusted_p_value(rounds: int, rounds_before: int, figures: int) -> float:
    """The adjusted p value of the only one of so many figures that changed, with no overlap between its two runs."""
    from scipy.stats import mannwhitneyu

    return min(1.0, figures * float(mannwhitneyu(range(rounds), range(rounds, rounds + rounds_before)).pvalue))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One metric of one engine at one request shape, in both runs."""

    engine: str
    shape: RequestShape
    metric: str  # a key of METRICS
    before_ms: float  # median
    after_ms: float
    interval: RatioInterval  # after / before
    p_value: float  # adjusted for the number of comparisons
    verdict: Verdict

    def is_regression(self, threshold: float) -> bool:
        """Whether it is slower beyond noise, and by more than this share."""
        return self.verdict == "slower" and self.interval.ratio > 1 + threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """All that two results files have in common, and what to know about what they have not."""

    changes: tuple[Change, ...]
    stopped: tuple[str, ...]  # engines that were timed to the end before, and not after
    notes: tuple[str, ...]  # one sentence each

    def to_json(self) -> dict[str, Any]:
        return {
            "comparison_schema": COMPARISON_SCHEMA,
            "changes": [{**asdict(change), "shape": change.shape._asdict()} for change in self.changes],
            "stopped": list(self.stopped),
            "notes": list(self.notes),
        }

    def regressions(self, threshold: float) -> list[str]:
        """Say what became slower beyond noise and by more than this share, and which engines no longer end."""
        slower = sum(change.is_regression(threshold) for change in self.changes)
        found = [f"{slower} of {len(self.changes)} figures are more than {threshold:.1%} slower"] if slower else []
        return found + [f"engine {label} ran to the end before, and stopped after" for label in self.stopped]


def compare_results(before: Results, after: Results, *, metrics: Sequence[str] | None = None) -> Changes:
    """Compare the cells that two results files share, metric by metric.

    Args:
        metrics: keys of METRICS; None takes all of them.

    Raises:
        EngineError: nothing in common; an engine of another model or kind of figures under the same label; or too few
            rounds to tell a change from noise, though the engine was timed to the end; an unknown metric, or none that
            the shared cells have.
    """
    chosen = list(METRICS) if metrics is None else list(dict.fromkeys(metrics))
    unknown = [metric for metric in chosen if metric not in METRICS]
    if unknown:
        raise EngineError("unknown metric", expected=", ".join(METRICS), found=", ".join(unknown))
    pairs = _common_cells(before, after)
    if not pairs:
        raise EngineError(
            "the two results files share no cell",
            expected="the same engine labels and request shapes",
            found=f"{_labels(before)} and {_labels(after)}",
        )
    engines = _common_engines(before, after, {new.engine for _, new in pairs})
    enough = [pair for pair in pairs if _rounds(*pair) >= LEAST_ROUNDS]
    for old, new in pairs:
        # What is left of an engine that stopped does not keep the others from being compared.
        is_left_over = enough and any(engine.stopped is not None for engine in engines[old.engine])
        if _rounds(old, new) < LEAST_ROUNDS and not is_left_over:
            raise EngineError(
                f"too few rounds to tell a change from noise: {old.engine}, {old.shape}",
                expected=f"at least {LEAST_ROUNDS} in both runs",
                found=_rounds(old, new),
                hint="repeat bench with more --rounds",
            )
    measured = [
        (old, new, metric)
        for old, new in enough
        for metric in chosen
        if min((*getattr(old, metric), *getattr(new, metric)), default=0) > 0  # of no time there is no ratio
    ]
    if not measured:
        raise EngineError(
            "the shared cells have nothing of that metric", expected="output_len above 1", found=", ".join(chosen)
        )
    p_values = adjusted_p_values([(getattr(new, metric), getattr(old, metric)) for old, new, metric in measured])
    changes = tuple(
        _change(old, new, metric, p_value) for (old, new, metric), p_value in zip(measured, p_values, strict=True)
    )
    notes = (*_notes(before, after, engines, pairs), *_doubts(measured))
    ended = {engine.label for engine in before.engines if engine.stopped is None}
    stopped = tuple(engine.label for engine in after.engines if engine.stopped is not None and engine.label in ended)
    return Changes(changes=changes, stopped=stopped, notes=notes)


def _common_engines(
    before: Results, after: Results, labels: Collection[str]
) -> dict[str, tuple[EngineResult, EngineResult]]:
    old = {engine.label: engine for engine in before.engines}
    common = {engine.label: (old[engine.label], engine) for engine in after.engines if engine.label in labels}
    for label, (first, second) in common.items():
        check_same_model([(f"{label} (before)", first.structure.model_dump()), (label, second.structure.model_dump())])
        for what in ("kind", "device", "dtype", "number_format"):
            if getattr(first, what) != getattr(second, what):
                raise EngineError(
                    f"engine {label!r} differs in {what}, a comparison would mean nothing",
                    expected=getattr(first, what),
                    found=getattr(second, what),
                )
    return common


def _common_cells(before: Results, after: Results) -> list[tuple[Cell, Cell]]:
    old = {(cell.engine, cell.shape): cell for cell in before.cells}
    shared = [(old.get((cell.engine, cell.shape)), cell) for cell in after.cells]
    return [(first, second) for first, second in shared if first is not None]


def _rounds(old: Cell, new: Cell) -> int:
    return min(len(old.ttft_ms), len(new.ttft_ms))


def _change(old: Cell, new: Cell, metric: str, p_value: float) -> Change:
    before, after = getattr(old, metric), getattr(new, metric)
    interval = ratio_interval(after, before)
    verdict: Verdict = "no difference"
    if p_value <= SIGNIFICANCE and interval.ratio != 1:
        verdict = "slower" if interval.ratio > 1 else "faster"
    return Change(
        engine=new.engine,
        shape=new.shape,
        metric=metric,
        before_ms=float(np.median(before)),
        after_ms=float(np.median(after)),
        interval=interval,
        p_value=p_value,
        verdict=verdict,
    )


def _notes(
    before: Results,
    after: Results,
    engines: dict[str, tuple[EngineResult, EngineResult]],
    pairs: Sequence[tuple[Cell, Cell]],
) -> Iterator[str]:
    for what in ("cpu", "cores", "os", "threads", "pinned_cpus", "clock", "warmup_rounds", "interleaved"):
        old, new = getattr(before.environment, what), getattr(after.environment, what)
        if old != new:
            yield f"The runs differ in {what}: {old} before, {new} after."
    gpus_before, gpus_after = (
        "; ".join(sorted({f"{gpu.name}, driver {gpu.driver}" for gpu in results.environment.gpus}))
        for results in (before, after)
    )
    if gpus_before and gpus_after and gpus_before != gpus_after:  # older files do not know theirs
        yield f"The runs differ in gpus: {gpus_before} before, {gpus_after} after."
    for label, (first, second) in engines.items():
        if first.structure.blocks != second.structure.blocks:
            yield f"Engine {label} has another structure than before."
        old, new = (f"{engine.backend} {engine.runtime}" for engine in (first, second))
        if old != new:
            yield f"Engine {label} ran in {old} before, in {new} after."
    for name, results in (("before", before), ("after", after)):
        for engine in results.engines:
            if engine.stopped is not None:
                yield f"Engine {engine.label} is incomplete in the run {name}: it stopped {engine.stopped.where}."
    for old_cell, new_cell in pairs:
        if _rounds(old_cell, new_cell) < LEAST_ROUNDS:
            yield f"Too few rounds to compare: {new_cell.engine}, {new_cell.shape}."
    shared = {(new.engine, new.shape) for _, new in pairs}
    for name, results in (("before", before), ("after", after)):
        for cell in results.cells:
            if (cell.engine, cell.shape) not in shared:
                yield f"Only {name}: {cell.engine}, {cell.shape}."


def _doubts(measured: Sequence[tuple[Cell, Cell, str]]) -> Iterator[str]:
    """Say so where the rounds are too few for a figure to be flagged that alone has changed."""
    figures = len(measured)
    if all(
        least_adjusted_p_value(*rounds, figures) <= SIGNIFICANCE
        for rounds in {(len(new.ttft_ms), len(old.ttft_ms)) for old, new, _ in measured}
    ):
        return
    enough = next(n for n in itertools.count(LEAST_ROUNDS) if least_adjusted_p_value(n, n, figures) <= SIGNIFICANCE)
    yield (
        f"Of {figures} figures, one that changed alone passes for noise with so few rounds, however much it changed:"
        f" that takes {enough} rounds in both runs, or fewer figures."
    )


def _labels(results: Results) -> str:
    return ", ".join(sorted({f"{cell.engine} ({cell.shape})" for cell in results.cells})[:4])


def changes_table(changes: Changes) -> Table:
    """One row per change."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("engine", "request"):
        table.add_column(name, overflow="fold")  # what a narrow terminal has no room for; figures are never cut short
    table.add_column("metric", no_wrap=True)
    for name in ("before", "after ms", "ratio", "95 % interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for change in changes.changes:
        table.add_row(*_cells(change), change.verdict, style=STYLES[change.verdict])
    return table


def _cells(change: Change) -> list[str]:
    interval = change.interval
    return [
        change.engine,
        str(change.shape),
        METRICS[change.metric],
        f"{change.before_ms:,.3f}",
        f"{change.after_ms:,.3f}",
        f"{interval.ratio:.3f}",
        f"{interval.low:.3f} to {interval.high:.3f}",
        f"{change.p_value:.3f}",
    ]


def changes_markdown(changes: Changes, threshold: float | None) -> str:
    """The changes as a comment for a pull request: a sentence, a table, notes.

    Args:
        threshold: share beyond which being slower counts as a regression; None: it was not asked for.
    """
    found = {verdict: sum(change.verdict == verdict for change in changes.changes) for verdict in STYLES}
    told = ", ".join(f"{count} {verdict}" for verdict, count in found.items() if count)
    lines = ["# Latency before and after", "", f"**Of {len(changes.changes)} figures: {told}.**"]
    if threshold is not None:
        slower = sum(change.is_regression(threshold) for change in changes.changes)
        lines[-1] += f" {slower or 'None'} slower by more than {threshold:.1%}."
    if changes.stopped:
        lines[-1] += f" **Ran to the end before, and stopped after: {markdown_escaped(', '.join(changes.stopped))}.**"
    lines += [
        "",
        "| engine | request | metric | before, ms | after, ms | ratio | 95 % interval | p | |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for change in changes.changes:
        mark = "**" if change.verdict == "slower" else ""
        cells = [markdown_escaped(cell) for cell in _cells(change)]
        lines.append(f"| {' | '.join(cells)} | {mark}{change.verdict}{mark} |")
    lines += [
        "",
        "Medians over the rounds. The intervals are the bootstrap's, p values those of the Mann-Whitney U test,",
        f"adjusted for the number of comparisons; {SIGNIFICANCE} or less counts as a difference.",
        "",
        *(f"- {markdown_escaped(note)}" for note in changes.notes),
    ]
    return "\n".join(lines).rstrip() + "\n"
