"""What the variants of a model lost: one table of all of them, and what pairs of them say about fusion.

What was done to a variant is read off its structure, against the variant that has the most sublayers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from engines.intervals import RatioInterval
from engines.report_words import Unit, Value, compared, formatted
from engines.results import EngineResult, EvaluatedModel, ratio
from engines.structure_strip import layers_text
from exporter.structure import FFNShape, ParallelShape, Structure

Model = EngineResult | EvaluatedModel


@dataclass(frozen=True, slots=True)
class Parts:
    """The source layers whose sublayers are left in a model."""

    attention: frozenset[int]
    ffn: frozenset[int]
    fused: tuple[tuple[int, ...], ...]  # layers whose FFNs are one, a group each
    parallel: tuple[tuple[int, ...], ...]  # layers whose blocks read the same input, a group each


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of the table; `better` is 1 where more is better, -1 where less is, 0 where neither is said."""

    name: str
    unit: str
    better: int


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """One variant; `values` stand under the table's columns."""

    model: Model
    changes: str
    values: tuple[Value, ...]


def parts_of(structure: Structure) -> Parts:
    """Read off a structure which source layers still have what."""
    attention: set[int] = set()
    ffn: set[int] = set()
    fused = []
    for block in structure.flat_blocks:
        if block.attention is not None:
            attention.update(block.source_layers)
        if isinstance(block.ffn, FFNShape):
            layers = tuple(segment.source_layer for segment in block.ffn.segments)
            ffn.update(layers)
            if len(layers) > 1:
                fused.append(layers)
        elif block.ffn is not None:
            ffn.update(block.source_layers)
    parallel = tuple(
        tuple(layer for block in entry.parallel for layer in block.source_layers)
        for entry in structure.blocks
        if isinstance(entry, ParallelShape)
    )
    return Parts(frozenset(attention), frozenset(ffn), tuple(fused), parallel)


def changes_text(source: Parts, parts: Parts, number_format: str | None = None) -> str:
    """Say what sets a variant apart from the model it was made from; "unchanged" if nothing does.

    Args:
        number_format: of the variant's quantized linears; None: there are none.
    """
    said = [
        (source.attention - parts.attention, "attention of {} dropped"),
        (source.ffn - parts.ffn, "FFNs of {} removed"),
        *((layers, "FFNs of {} fused") for layers in parts.fused if layers not in source.fused),
        *((layers, "{} in parallel") for layers in parts.parallel if layers not in source.parallel),
    ]
    texts = [words.format(layers_text(sorted(layers))) for layers, words in said if layers]
    if number_format is not None:
        texts.append(number_format)
    return "; ".join(texts) or "unchanged"


def accuracy_table(
    models: Sequence[Model],
    latency: tuple[str, Sequence[float | None]],
    intervals: Sequence[RatioInterval | None],
) -> tuple[tuple[Column, ...], tuple[AccuracyRow, ...]]:
    """Put every variant's accuracy beside what was done to it.

    Args:
        models: the baseline, to which ratios refer, first.
        latency: what the last column is called, and its value for every model in ms; None: not timed.
        intervals: of the latencies' ratios, where there are any.

    Returns:
        The columns that at least one model has a value in, and one row per model.
    """
    tasks = {
        (score.task, score.metric): score.higher_is_better
        for model in models
        for score in (model.accuracy.tasks if model.accuracy else ())
    }
    scores: list[tuple[str, Unit, int, Sequence[float | None]]] = [
        (f"{task}, {metric}", "number", {True: 1, False: -1, None: 0}[higher], _scores(models, task, metric))
        for (task, metric), higher in tasks.items()
    ]
    columns: list[tuple[str, Unit, int, Sequence[float | None]]] = [
        ("Sequential sublayers", "count", -1, [model.structure.sequential_sublayers for model in models]),
        ("Perplexity", "perplexity", -1, [getattr(model.accuracy, "perplexity", None) for model in models]),
        ("KL divergence, nats per token", "number", -1, [getattr(m.accuracy, "kl_divergence", None) for m in models]),
        ("Top-1 agreement", "number", 1, [getattr(model.accuracy, "top1_agreement", None) for model in models]),
        *scores,
        (latency[0], "ms", -1, latency[1]),
    ]
    # Scores are of a sample of questions, and measured times are samples; all else is the same every time.
    noisy = {latency[0], *(name for name, *_ in scores)}
    shown, values = [], []
    for name, unit, better, figures in columns:
        if all(figure is None for figure in figures):
            continue
        unit_text, texts = formatted(figures, unit)
        shown.append(Column(name, unit_text, better))
        column = []
        for model, figure, text, interval in zip(models, figures, texts, intervals, strict=True):
            quotient = None if model is models[0] else ratio(figure, figures[0])
            is_predicted = name == latency[0] and isinstance(model, EngineResult) and model.kind == "predicted"
            column.append(
                compared(
                    text,
                    quotient,
                    better,
                    interval if name == latency[0] else None,
                    is_beyond_noise=is_predicted or name not in noisy,
                )
            )
        values.append(column)
    source = parts_of(_deepest(models).structure)
    rows = (
        AccuracyRow(
            model,
            changes_text(source, parts_of(model.structure), model.number_format),
            tuple(column[index] for column in values),
        )
        for index, model in enumerate(models)
    )
    return tuple(shown), tuple(rows)


def findings(models: Sequence[Model]) -> list[str]:
    """Say what comparable variants show: FFNs fused or removed, and runs fused without or with their last FFN.

    Two variants are comparable if they have the same attentions and number format and differ in nothing but that.
    """
    judged: dict[tuple[str | None, Parts, float], _Judged] = {}
    for model in models:
        if model.accuracy is not None and model.accuracy.perplexity is not None:
            key = model.number_format, parts_of(model.structure), model.accuracy.perplexity
            same = judged.get(key)
            judged[key] = _Judged((*same.labels, model.label) if same else (model.label,), *key[1:])
    groups = [
        [found for (number_format, _, _), found in judged.items() if number_format == shared]
        for shared in dict.fromkeys(number_format for number_format, _, _ in judged)
    ]
    return [sentence for group in groups for sentence in (*_fused_or_removed(group), *_without_or_with_last(group))]


@dataclass(frozen=True, slots=True)
class _Judged:
    labels: tuple[str, ...]  # of all variants of which the rest is the same
    parts: Parts
    perplexity: float

    def __str__(self) -> str:
        return f"{self.perplexity:,.2f} ({', '.join(self.labels)})"


def _fused_or_removed(judged: Sequence[_Judged]) -> Iterator[str]:
    for fused in judged:
        layers = frozenset(layer for group in fused.parts.fused for layer in group)
        untouched = replace(fused.parts, fused=())
        without = replace(untouched, ffn=untouched.ffn - layers)
        for removed in judged:
            if layers and removed.parts == without:
                before = "".join(f"; as they were, {other}" for other in judged if other.parts == untouched)
                yield (
                    f"With the FFNs of layers {layers_text(sorted(layers))} fused, perplexity is {fused}; "
                    f"with the same FFNs removed instead, {removed}{before}."
                )


def _without_or_with_last(judged: Sequence[_Judged]) -> Iterator[str]:
    for shorter, longer in itertools.permutations(judged, 2):
        pairs = list(zip(shorter.parts.fused, longer.parts.fused, strict=False))
        if (
            replace(longer.parts, fused=()) != replace(shorter.parts, fused=())
            or len(shorter.parts.fused) != len(longer.parts.fused)
            or any(long not in (short, (*short, long[-1])) for short, long in pairs)
        ):
            continue
        added = [long[-1] for short, long in pairs if long != short]
        if added and all(_is_last_of_run(shorter.parts, layer) for layer in added):
            one = len(added) == 1
            yield (
                f"With the FFN{'' if one else 's'} of layer{'' if one else 's'} {layers_text(added)}, the last of "
                f"{'its run' if one else 'their runs'}, fused as well, perplexity is {longer} instead of {shorter}."
            )


def _is_last_of_run(parts: Parts, layer: int) -> bool:
    """Whether the next layer that has anything has an attention, or there is none."""
    following = min((other for other in parts.attention | parts.ffn if other > layer), default=None)
    return following is None or following in parts.attention


def _deepest(models: Sequence[Model]) -> Model:
    return max(models, key=lambda model: model.structure.sequential_sublayers)


def _scores(models: Sequence[Model], task: str, metric: str) -> list[float | None]:
    found = [
        {(score.task, score.metric): score.value for score in model.accuracy.tasks} if model.accuracy else {}
        for model in models
    ]
    return [scores.get((task, metric)) for scores in found]
