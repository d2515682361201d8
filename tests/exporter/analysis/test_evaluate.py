"""Evaluation against transformers' own loss and a direct computation from full logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from exporter.analysis.evaluate import evaluate
from exporter.errors import CheckpointError, FuselageError, GraphError
from exporter.passes.drop_attention import drop_attention
from exporter.read import open_model
from exporter.reference import Reference
from exporter.text import TextError, open_tokenizer, read_documents, token_windows
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


def test_a_graph_agrees_with_itself() -> None:
    graph = tiny_graph("AF AF", vocab_size=307)
    found = evaluate(graph, TOKENS, reference=graph)
    assert found.kl_divergence == 0
    assert found.top1_agreement == 1


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


def word_tokenizer(folder: Path, words: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_windows_are_cut_from_all_documents_in_a_row(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2 w3"}\n\n{"text": "w4 w5"}\n{"text": "w6 w7"}\n')
    tokenizer = open_tokenizer(tmp_path, 10)
    windows = token_windows(tmp_path / "text.jsonl", tokenizer, context=3)
    assert windows.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert token_windows(tmp_path / "text.jsonl", tokenizer, context=3, max_windows=1).tolist() == [[1, 2, 3]]
    assert windows.dtype == np.int64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", "  \n", "text is empty", id="empty"),
        pytest.param("a.txt", "w1 w2", r"shorter than the context: expected >= 3 tokens, found 2", id="short"),
        pytest.param("a.txt", b"\xff\xfe\x00", "cannot be read", id="not_utf8"),
        pytest.param("a.jsonl", "{", "line 1 is not JSON", id="not_json"),
        pytest.param("a.jsonl", '{"txt": "w"}', "line 1 has no text", id="no_text"),
        pytest.param("b.txt", None, "cannot be read", id="missing"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(name: str, content: object, message: str, tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(TextError, match=message):
        token_windows(tmp_path / name, open_tokenizer(tmp_path, 10), context=3)


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


def test_text_errors_are_our_errors() -> None:
    assert issubclass(TextError, FuselageError)
    with pytest.raises(TextError):
        read_documents(Path("nowhere.txt"))
