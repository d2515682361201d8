"""Evaluation against transformers' own loss and a direct computation from full logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import exporter.analysis.evaluate as module
from exporter.analysis.evaluate import HeldModel, can_be_held, evaluate, hold
from exporter.errors import FuselageError, GraphError
from exporter.graph import FFN, Linear, ModelGraph
from exporter.lazy import array
from exporter.passes.drop_attention import drop_attention
from exporter.read import open_model
from exporter.reference import Reference
from exporter.writers import hf
from exporter.writers.files import save_folder
from tests.checkpoints import saved_model, word_tokenizer
from tests.command_line import call, done
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
