"""Judging a graph against another on text: perplexity, KL divergence, top-1 agreement.

Both models go through the text block by block, so memory holds one block and the hidden states, never a model. A text
whose hidden states are beyond `HIDDEN_BYTES` goes through in several parts, with a pass over the weights for each.

Shape letters: N = windows, S = tokens per window, D = hidden_size, V = vocab_size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from exporter.errors import GraphError
from exporter.graph import ModelGraph
from exporter.hidden_states import DEFAULT_BATCH, check_finite
from exporter.reference import LOGITS_TOGETHER, Reference

HIDDEN_BYTES = 4 << 30
MOST_NLL = 700.0  # nats per token: the perplexity of more is beyond the range of a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Means over all tokens, and over the windows at every position.

    The token at position p is predicted from the tokens before it, so perplexity and `nll` know S - 1 predictions
    per window; KL and agreement compare the distributions at all S positions.
    """

    tokens: int  # predicted ones
    perplexity: float
    nll: np.ndarray  # [S - 1] nats: of the token at position p + 1
    reference_perplexity: float | None = None
    kl_divergence: float | None = None  # KL(reference || model), nats per token
    top1_agreement: float | None = None  # how often both find the same token most likely
    kl: np.ndarray | None = None  # [S]
    agreement: np.ndarray | None = None  # [S]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {name: _plain(getattr(self, name)) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model and what it makes of some tokens: several evaluations can be held against it."""

    model: Reference
    states: torch.Tensor  # [N, S, D], after the last block


def can_be_held(graph: ModelGraph, tokens: np.ndarray) -> bool:
    """Whether what `hold` keeps in float32 of tokens [N, S] is within `HIDDEN_BYTES`."""
    return tokens.size * graph.hidden_size * torch.float32.itemsize <= HIDDEN_BYTES


def hold(
    graph: ModelGraph,
    tokens: np.ndarray,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = DEFAULT_BATCH,
    block_done: Callable[[], None] = lambda: None,
) -> HeldModel:
    """Take tokens int64 [N, S] through a graph, in one pass over its weights."""
    model = Reference(graph, device=device, dtype=dtype)
    return HeldModel(model, _last_hidden(model, tokens, batch, block_done))


def evaluate(
    graph: ModelGraph,
    tokens: np.ndarray,
    *,
    reference: ModelGraph | HeldModel | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = DEFAULT_BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a graph, alone or against a reference, on tokens int64 [N, S].

    Args:
        reference: a graph, or one that `hold` took through the same tokens.

    Raises:
        GraphError: the two have different vocabularies, a window has a single token, or logits are not finite.
        CheckpointError: a weight is NaN or infinite; names the tensor.
    """
    if tokens.shape[1] < 2:
        raise GraphError("a window needs at least two tokens, one to predict the other", found=tokens.shape[1])
    other = reference.model.graph if isinstance(reference, HeldModel) else reference
    if other is not None and other.vocab_size != graph.vocab_size:
        raise GraphError(
            "models with different vocabularies cannot be compared", expected=other.vocab_size, found=graph.vocab_size
        )
    waiting = [graph, *([reference] if isinstance(reference, ModelGraph) else [])]
    window_bytes = tokens.shape[1] * sum(one.hidden_size for one in waiting) * dtype.itemsize
    together = max(1, HIDDEN_BYTES // (batch * window_bytes)) * batch
    parts = [slice(start, start + together) for start in range(0, len(tokens), together)]
    total = len(parts) * sum(len(one.blocks) for one in waiting)
    steps = itertools.count(1)

    def block_done() -> None:
        done = next(steps)
        if progress is not None:
            progress(done, total)

    sums = _Sums(tokens.shape[1], compared=reference is not None)
    for part in parts:
        held = [
            hold(one, tokens[part], device=device, dtype=dtype, batch=batch, block_done=block_done) for one in waiting
        ]
        if isinstance(reference, HeldModel):
            held.append(HeldModel(reference.model, reference.states[part]))
        _compare(sums, tokens[part], held, batch)
    return sums.evaluation(len(tokens))


@torch.inference_mode()
def _compare(sums: _Sums, tokens: np.ndarray, held: Sequence[HeldModel], batch: int) -> None:
    """Add what the heads make of hidden states, a few positions of `batch` windows at a time."""
    model = held[0].model
    together = max(1, LOGITS_TOGETHER // (min(batch, len(tokens)) * model.graph.vocab_size))
    for start, first in itertools.product(range(0, len(tokens), batch), range(0, tokens.shape[1], together)):
        part, positions = slice(start, start + batch), slice(first, first + together)
        targets = torch.from_numpy(tokens[part, 1:][:, positions]).to(model.device)
        sums.add(first, targets, *(one.model.head(one.states[part, positions].to(model.device)) for one in held))


@torch.inference_mode()
def _last_hidden(model: Reference, tokens: np.ndarray, batch: int, block_done: Callable[[], None]) -> torch.Tensor:
    """Hidden states after the last block, [N, S, D], with one pass over the weights."""
    ids = torch.from_numpy(tokens)
    parts = [slice(start, start + batch) for start in range(0, len(tokens), batch)]
    states = torch.empty((*tokens.shape, model.graph.hidden_size), dtype=model.dtype)
    for part in parts:
        states[part] = model.embed(ids[part]).cpu()
    span = model.span((1, tokens.shape[1]), None)
    for index in range(len(model.graph.blocks)):
        block = model.block(index)
        for part in parts:
            y = block(states[part].to(model.device), span)
            check_finite(y, model.graph, index)
            states[part] = y.cpu()
        del block  # before the next one is loaded
        block_done()
    return states


class _Sums:
    """Sums over windows at every position, in float64."""

    def __init__(self, length: int, *, compared: bool) -> None:
        self._nll = np.zeros(length - 1)
        self._reference_nll = np.zeros(length - 1)
        self._kl = np.zeros(length)
        self._agreement = np.zeros(length)
        self._compared = compared

    def add(
        self, first: int, targets: torch.Tensor, logits: torch.Tensor, reference: torch.Tensor | None = None
    ) -> None:
        """Logits [n, s, V] of the model and of the reference at s positions from `first` on.

        Args:
            targets: int64 [n, s], what comes next; [n, s - 1] at a window's end.
        """
        predicted, positions = (slice(first, first + part.shape[1]) for part in (targets, logits))
        log_q = F.log_softmax(logits.float(), dim=-1)
        self._nll[predicted] += _nll(log_q, targets)
        if reference is None:
            return
        log_p = F.log_softmax(reference.float(), dim=-1)
        self._reference_nll[predicted] += _nll(log_p, targets)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # of models nearly alike it rounds below zero
        self._kl[positions] += kl.double().sum(0).cpu().numpy()
        self._agreement[positions] += (log_p.argmax(-1) == log_q.argmax(-1)).double().sum(0).cpu().numpy()

    def evaluation(self, windows: int) -> Evaluation:
        nll = self._nll / windows
        for mean in (nll.mean(), self._reference_nll.mean() / windows):
            if not mean <= MOST_NLL:  # not: NaN is not above it either
                raise GraphError("logits are NaN, infinite or absurd", found=f"{mean} nats per token")
        alone = Evaluation(tokens=windows * len(nll), perplexity=math.exp(nll.mean()), nll=nll)
        if not self._compared:
            return alone
        kl, agreement = self._kl / windows, self._agreement / windows
        return Evaluation(
            tokens=alone.tokens,
            perplexity=alone.perplexity,
            nll=nll,
            reference_perplexity=math.exp(self._reference_nll.mean() / windows),
            kl_divergence=float(kl.mean()),
            top1_agreement=float(agreement.mean()),
            kl=kl,
            agreement=agreement,
        )


def _nll(log_probabilities: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Sum over windows of -log p(target) at every position that has one: [n, s, V], [n, t] -> [t]."""
    picked = log_probabilities[:, : targets.shape[1]].gather(-1, targets[..., None])[..., 0]
    return -picked.double().sum(0).cpu().numpy()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
