"""What is said of variants from their structures alone, and which pairs of them are compared."""

from __future__ import annotations

import pytest

from engines.accuracy import accuracy_table, changes_text, findings, parts_of
from engines.intervals import RatioInterval
from engines.results import Accuracy, EvaluatedModel, TaskScore
from exporter.structure import Structure
from tests.engines.test_report import block_of, structure_of

Pattern = str  # as in tests/tiny.py, and "F+F" for FFNs that became one


def structure(pattern: Pattern) -> Structure:
    """Blocks of consecutive source layers."""
    blocks: list[dict] = []
    layer = 0
    for word in pattern.replace("(", "( ").replace(")", " )").split():
        if word in "()":
            blocks.append({"open": word == "("})
            continue
        count = word.count("+") + 1
        layers = list(range(layer, layer + count))
        block = block_of(layers, attention="A" in word, widths=None if "F" in word else [])
        blocks.append({**block, "ffn": {"kind": "linear"} if "L" in word else block["ffn"]})
        layer += count
    grouped: list[dict] = []
    members: list[dict] | None = None
    for block in blocks:
        if "open" in block:
            if not block["open"]:
                grouped.append({"parallel": members})
            members = [] if block["open"] else None
        elif members is not None:
            members.append(block)
        else:
            grouped.append(block)
    return Structure(**structure_of(grouped))


SOURCE = "AF AF AF AF AF AF"


@pytest.mark.parametrize(
    ("source", "pattern", "text"),
    [
        (SOURCE, SOURCE, "unchanged"),
        (SOURCE, "AF F F AF F AF", "attention of 1–2, 4 dropped"),
        (SOURCE, "AF F+F F AF AF", "attention of 1–3 dropped; FFNs of 1–2 fused"),
        (SOURCE, "AF A - AF AF AF", "attention of 2 dropped; FFNs of 1–2 removed"),
        (SOURCE, "(AF AF) AF AF (AF AF)", "0–1 in parallel; 4–5 in parallel"),
        ("AF F+F AF", "AF F+F F", "attention of 3 dropped"),  # fused before
        ("AF AL AF", "AF A AF", "FFNs of 1 removed"),
    ],
)
def test_changes_are_read_off_the_structure(source: Pattern, pattern: Pattern, text: str) -> None:
    assert changes_text(parts_of(structure(source)), parts_of(structure(pattern))) == text


def test_a_number_format_is_a_change() -> None:
    source, dropped = parts_of(structure(SOURCE)), parts_of(structure("AF F F AF F AF"))
    assert changes_text(source, source, "int8 (W8A8 static)") == "int8 (W8A8 static)"
    assert changes_text(source, dropped, "int8") == "attention of 1–2, 4 dropped; int8"


FUSED, REMOVED, LONGER = "AF F+F F AF", "AF - - F AF", "AF F+F+F AF"
FUSED_OR_REMOVED = (
    "With the FFNs of layers 1–2 fused, perplexity is 2.00 (0); with the same FFNs removed instead, 3.00 (1)"
)
WITH_LAST = "With the FFN of layer 3, the last of its run, fused as well, perplexity is 3.00 (1) instead of 2.00 (0)."


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        pytest.param([FUSED, REMOVED], [f"{FUSED_OR_REMOVED}."], id="fused_or_removed"),
        pytest.param(
            [FUSED, REMOVED, "AF F F F AF"], [f"{FUSED_OR_REMOVED}; as they were, 4.00 (2)."], id="and_as_they_were"
        ),
        pytest.param([FUSED, LONGER], [WITH_LAST], id="with_the_last"),
        pytest.param(["AF F+F F", "AF F+F+F"], [WITH_LAST], id="with_the_last_of_the_model"),
        pytest.param([FUSED, LONGER, FUSED], [WITH_LAST.replace("(0)", "(0, 2)")], id="the_same_twice"),
        pytest.param([FUSED, "AF - - AF AF"], [], id="other_attentions"),
        pytest.param([FUSED, "AF - - - AF"], [], id="other_ffns_removed"),
        pytest.param(["AF F+F F F AF", "AF F+F+F F AF"], [], id="longer_but_not_by_the_last"),
        pytest.param(["AF F F+F AF", LONGER], [], id="longer_at_the_front"),
        pytest.param(
            ["F+F F AF F+F F AF", "F+F+F AF F+F+F AF"],
            [
                "With the FFNs of layers 2, 6, the last of their runs, fused as well, perplexity is 3.00 (1) "
                "instead of 2.00 (0)."
            ],
            id="two_runs",
        ),
        pytest.param([SOURCE], [], id="alone"),
    ],
)
def test_findings_compare_what_differs_in_one_thing(patterns: list[Pattern], said: list[str]) -> None:
    """Variants are called 0, 1, 2 ...; different ones have perplexities 2, 3, 4 ..."""
    models = [
        EvaluatedModel(
            label=str(index), structure=structure(pattern), accuracy={"perplexity": patterns.index(pattern) + 2.0}
        )
        for index, pattern in enumerate(patterns)
    ]
    assert findings(models) == said


def test_number_formats_are_not_mixed() -> None:
    def model(pattern: Pattern, number_format: str | None) -> EvaluatedModel:
        accuracy = {"perplexity": 2.0}
        return EvaluatedModel(
            label=pattern, structure=structure(pattern), accuracy=accuracy, number_format=number_format
        )

    assert findings([model(FUSED, "int8"), model(REMOVED, None)]) == []
    assert len(findings([model(FUSED, "int8"), model(REMOVED, "int8")])) == 1
    unjudged = EvaluatedModel(label="on tasks alone", structure=structure(FUSED), accuracy=Accuracy())
    assert findings([unjudged, model(REMOVED, None)]) == []


def test_only_what_has_no_noise_is_judged_without_an_interval() -> None:
    """Scores are of a sample of questions, and measured times are samples themselves."""
    models = [
        EvaluatedModel(
            label=label,
            structure=structure(pattern),
            accuracy=Accuracy(
                perplexity=perplexity,
                tasks=(
                    TaskScore(task="cloze", metric="acc", value=score, higher_is_better=True, samples=8),
                    TaskScore(task="cloze", metric="loss", value=1 - score, higher_is_better=False, samples=8),
                ),
            ),
        )
        for label, pattern, perplexity, score in (("a", SOURCE, 8.0, 0.5), ("b", "AF F F AF AF AF", 9.0, 0.25))
    ]
    models.append(EvaluatedModel(label="c", structure=structure(SOURCE), accuracy=Accuracy(perplexity=8.0)))
    interval = RatioInterval(ratio=0.5, low=0.4, high=0.6)
    for given, judged in ((None, "neutral"), (interval, "better")):
        columns, (_, row, without) = accuracy_table(models, ("Latency", [2.0, 1.0, None]), [None, given, None])
        assert {column.name: value.verdict for column, value in zip(columns, row.values, strict=True)} == {
            "Sequential sublayers": "better",
            "Perplexity": "worse",
            "cloze, acc": "neutral",
            "cloze, loss": "neutral",
            "Latency": judged,
        }
        assert [value.verdict for value in without.values] == ["same", "same", "neutral", "neutral", "neutral"]
        assert [column.better for column in columns] == [-1, -1, 1, -1, -1]
