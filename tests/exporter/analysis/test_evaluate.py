"""Evaluation against transformers' own loss and a direct computation from full logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

import exporter.analysis.evaluate as module
from exporter.analysis.evaluate import HeldModel, can_be_held, evaluate, hold
from exporter.errors import CheckpointError, FuselageError, GraphError
from exporter.graph import FFN, Linear, ModelGraph
from exporter.lazy import array
from exporter.passes.drop_attention import drop_attention
from exporter.read import open_model
from exporter.reference import Reference
from exporter.text import TextError, open_tokenizer, read_documents, token_windows
from exporter.writers import hf
from exporter.writers.files import save_folder
from tests.command_line import call, done
from tests.exporter.test_reference import saved_model
from tests.tiny import tiny_graph

TOKENS = np.random.default_rng(0).integers(0, 307, (5, 12))


def test_perplexity_is_the_exponential_of_transformers_loss(tmp_path: Path) -> None:
    model = saved_model(tmp_path, "Llama", {})
    tokens = torch.from_numpy(TOKENS)
    with torch.inference_mode():
        loss = model(tokens, labels=tokens).loss.item()
    found = evaluate(open_model(tmp_path, need_weights=True).graph, TOKENS, batch=2)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.tokens == 5 * 11
    assert found.kl_divergence is None


def test_comparison_equals_a_direct_computation() -> None:
    graph = tiny_graph("AF AF AF", vocab_size=307)
    variant = drop_attention(graph, [1])
    found = evaluate(variant, TOKENS, reference=graph, batch=2)
    p, q = (F.log_softmax(Reference(g).logits(torch.from_numpy(TOKENS)).double(), -1) for g in (graph, variant))
    kl = (p.exp() * (p - q)).sum(-1)
    agreement = (p.argmax(-1) == q.argmax(-1)).double()
    assert found.kl_divergence == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreement.mean().item())
    np.testing.assert_allclose(found.kl, kl.mean(0), rtol=1e-3)
    np.testing.assert_allclose(found.agreement, agreement.mean(0))
    assert found.reference_perplexity == pytest.approx(evaluate(graph, TOKENS).perplexity, rel=1e-6)
    assert 0 < found.top1_agreement < 1


@pytest.mark.parametrize("positions", [1, 5, 11, 12])
def test_logits_are_taken_a_few_positions_at_a_time(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph("AF AF AF", vocab_size=307)
    variant = drop_attention(graph, [1])
    expected = evaluate(variant, TOKENS, reference=graph, batch=2).to_json()
    sizes, head = [], Reference.head

    def spy(self: Reference, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden[..., 0].numel())
        return head(self, hidden)

    monkeypatch.setattr(Reference, "head", spy)
    monkeypatch.setattr(module, "LOGITS_TOGETHER", positions * 2 * 307)
    found = evaluate(variant, TOKENS, reference=graph, batch=2).to_json()
    assert max(sizes) == 2 * positions
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("is_held", [False, True])
def test_a_long_text_goes_through_in_parts(is_held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph("AF AF AF", vocab_size=307)
    variant = drop_attention(graph, [1])
    reference = hold(graph, TOKENS, batch=2) if is_held else graph
    expected = evaluate(variant, TOKENS, reference=graph, batch=2).to_json()
    windows_together = []

    def spy(one: ModelGraph, tokens: np.ndarray, **how: Any) -> HeldModel:
        windows_together.append(len(tokens))
        return hold(one, tokens, **how)

    monkeypatch.setattr(module, "hold", spy)
    room = 9 * 12 * 64 * 4 // (2 if is_held else 1)  # four windows and a half: four, in pairs
    monkeypatch.setattr(module, "HIDDEN_BYTES", room)
    steps: list[tuple[int, int]] = []
    found = evaluate(variant, TOKENS, reference=reference, batch=2, progress=lambda *step: steps.append(step))
    assert found.to_json() == expected
    assert can_be_held(graph, TOKENS) is not is_held  # five windows
    assert windows_together == ([4, 1] if is_held else [4, 4, 1, 1])
    assert steps == [(done, 6 if is_held else 12) for done in range(1, (6 if is_held else 12) + 1)]


def test_products_are_in_the_dtype_that_is_asked_for() -> None:
    graph = tiny_graph("AF AF", vocab_size=307)
    logits = Reference(graph, dtype=torch.bfloat16).logits(torch.from_numpy(TOKENS)).float()
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), torch.from_numpy(TOKENS[:, 1:]).flatten()).item()
    found, wide = (evaluate(graph, TOKENS, dtype=dtype).perplexity for dtype in (torch.bfloat16, torch.float32))
    assert found == pytest.approx(math.exp(nll), rel=1e-6)
    assert wide != pytest.approx(found, rel=1e-5)


def test_a_graph_agrees_with_itself() -> None:
    graph = tiny_graph("AF AF", vocab_size=307)
    found = evaluate(graph, TOKENS, reference=graph)
    assert found.kl_divergence == 0
    assert found.top1_agreement == 1
    head = np.asarray(graph.lm_head.weight.rows(0, 307))
    other = head * (1 + 1e-6 * np.random.default_rng(1).standard_normal(head.shape).astype(np.float32))
    almost = replace(graph, lm_head=replace(graph.lm_head, weight=array(other)))
    divergences = evaluate(almost, TOKENS, reference=graph).kl
    assert divergences is not None
    assert divergences.min() >= 0  # at every position
    assert divergences.max() < 1e-6


@pytest.mark.parametrize(
    ("tokens", "other", "message"),
    [
        pytest.param(TOKENS[:, :1], None, "at least two tokens", id="one_token"),
        pytest.param(TOKENS, tiny_graph("AF", vocab_size=308), "expected 308, found 307", id="vocabulary"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tokens: np.ndarray, other: object, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        evaluate(tiny_graph("AF", vocab_size=307), tokens, reference=other)


def head_of(graph: ModelGraph, factor: float) -> ModelGraph:
    assert graph.lm_head is not None
    return replace(graph, lm_head=Linear(weight=array(graph.lm_head.weight.numpy() * np.float32(factor))))


def broken_down_proj(graph: ModelGraph) -> ModelGraph:
    (block,) = graph.flat_blocks
    assert isinstance(block.ffn, FFN)
    weight = block.ffn.down_proj.weight.numpy()
    weight[3, 5] = np.nan
    return replace(graph, blocks=(replace(block, ffn=replace(block.ffn, down_proj=Linear(weight=array(weight)))),))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(broken_down_proj, "block 0: weight is NaN", id="weight"),
        pytest.param(lambda graph: head_of(graph, math.nan), "logits are NaN", id="nan_logits"),
        pytest.param(lambda graph: head_of(graph, 1e6), "logits .* absurd: found .* nats", id="huge_logits"),
    ],
)
def test_a_model_that_computes_no_numbers_is_refused(spoil: Callable[[ModelGraph], ModelGraph], message: str) -> None:
    graph = tiny_graph("AF", vocab_size=307)
    for one, reference in ((spoil(graph), None), (graph, spoil(graph))):
        with pytest.raises(FuselageError, match=message):
            evaluate(one, TOKENS, reference=reference)


def word_tokenizer(folder: Path, words: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def windows(path: Path, **how: Any) -> np.ndarray:
    """Windows of a text beside a tokenizer and a model of ten tokens."""
    return token_windows(path, open_tokenizer(path.parent, 10), vocab_size=10, max_positions=5, **how)


def test_windows_are_cut_from_all_documents_in_a_row(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2 w3"}\n\n{"text": "w4 w5"}\n{"text": "w6 w7"}\n')
    found = windows(tmp_path / "text.jsonl", context=3)
    assert found.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert windows(tmp_path / "text.jsonl", context=3, max_windows=1).tolist() == [[1, 2, 3]]
    assert windows(tmp_path / "text.jsonl", context=2, max_windows=2).tolist() == [[1, 2], [3, 4]]
    assert windows(tmp_path / "text.jsonl", context=2, max_windows=9).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert found.dtype == np.int64


def test_documents_behind_the_last_window_are_not_encoded(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    tokenizer = open_tokenizer(tmp_path, 10)
    seen: list[str] = []

    class Spy:
        def encode(self, document: str) -> Any:
            seen.append(document)
            return tokenizer.encode(document)

    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "w{n} w{n}"}}\n' for n in range(9)))
    token_windows(
        tmp_path / "text.jsonl", cast(Tokenizer, Spy()), vocab_size=10, max_positions=5, context=3, max_windows=1
    )
    assert seen == ["w0 w0", "w1 w1"]


def test_added_tokens_may_lie_beyond_the_vocabulary_until_a_text_has_one(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.add_special_tokens(["<pad>"])
    stored.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w1 w2 w3 <pad>")
    assert windows(tmp_path / "text.txt", context=3).tolist() == [[1, 2, 3]]
    with pytest.raises(TextError, match=r"no embedding for: expected ids below 10, .* found 10, '<pad>'"):
        windows(tmp_path / "text.txt", context=4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.jsonl", '{"text": "w1\u2028w2"}\r\n{"text": "w3\x85w4"}\r\n', id="separators_in_json"),
        pytest.param("a.jsonl", '\ufeff{"text": "w1 w2 w3 w4"}', id="byte_order_mark_json"),
        pytest.param("a.txt", "\ufeffw1 w2 w3 w4", id="byte_order_mark"),
    ],
)
def test_a_text_is_read_whatever_wrote_it(name: str, content: str, tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    (tmp_path / name).write_bytes(content.encode())
    assert windows(tmp_path / name, context=4).tolist() == [[1, 2, 3, 4]]


def test_truncation_and_padding_in_the_file_are_for_batches(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_truncation(2)
    stored.enable_padding(length=8)
    stored.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": "w4"}\n')
    assert windows(tmp_path / "text.jsonl", context=4).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", "  \n", "text is empty", id="empty"),
        pytest.param("a.txt", "w1 w2", r"shorter than the context: expected >= 3 tokens, found 2", id="short"),
        pytest.param("a.txt", b"\xff\xfe\x00", "not a text in UTF-8", id="not_utf8"),
        pytest.param("a.jsonl", "{", "line 1 is not JSON", id="not_json"),
        pytest.param("a.jsonl", '{"text": "\\ud83d"}', "line 1 has half of a surrogate pair", id="half_a_pair"),
        pytest.param("a.jsonl", '{"txt": "w"}', "line 1 has no text", id="no_text"),
        pytest.param("b.txt", None, "no such text", id="missing"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(name: str, content: object, message: str, tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(TextError, match=message):
        windows(tmp_path / name, context=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "no tokenizer.json", id="missing"),
        pytest.param("{}", "tokenizer cannot be read", id="malformed"),
        pytest.param(11, "at most 10 tokens, the model's vocab_size, found 11", id="vocabulary"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(content: object, message: str, tmp_path: Path) -> None:
    if isinstance(content, int):
        word_tokenizer(tmp_path, content)
    elif content is not None:
        (tmp_path / "tokenizer.json").write_text(str(content))
    with pytest.raises(CheckpointError, match=message):
        open_tokenizer(tmp_path, 10)


def test_models_of_other_tokens_are_not_compared(tmp_path: Path) -> None:
    for name in ("model", "padded", "other"):
        save_folder(tmp_path / name, hf.emit(tiny_graph("AF", vocab_size=10), hf.Options()), kind="test", details={})
        word_tokenizer(tmp_path / name, 10)
    stored = Tokenizer.from_file(str(tmp_path / "padded" / "tokenizer.json"))
    stored.add_special_tokens(["<pad>"])
    stored.save(str(tmp_path / "padded" / "tokenizer.json"))
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"w3"', '"x3"'))
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6")
    arguments = ["evaluate", tmp_path / "model", "--text", tmp_path / "text.txt", "--context", "3", "--reference"]
    assert "KL(reference || model) 0.00000 nats" in done(*arguments, tmp_path / "padded").output
    refused = call(*arguments, tmp_path / "other")
    assert refused.exit_code == 2
    assert "tokenizers have different tokens: found 2 that differ, 'w3' for one" in " ".join(refused.output.split())


def test_text_errors_are_our_errors() -> None:
    assert issubclass(TextError, FuselageError)
    with pytest.raises(TextError):
        read_documents(Path("nowhere.txt"))
