"""The losses of a distillation.

The largest tensors of a training step are logits [n, V] of teacher and student, and a softmax makes copies of them: at
a vocabulary of 128,256 and 8,192 tokens each takes 4 GB. So the head belongs to the loss here. It is applied to a few
tokens at a time, and their share of the gradient is taken while their logits are there: none are kept for the backward
pass, and none are computed twice.

Shape letters: V = vocab_size, D = hidden_size, n = tokens of a step's piece.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from exporter.reference import LOGITS_TOGETHER, apply_linear


def head_divergence(
    teacher: Any,
    targets: torch.Tensor,
    student: Any,
    states: torch.Tensor,
    *,
    temperature: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """T^2 KL(p_T || q_T) in nats, mean over tokens, of what the heads of two models make of their final states.

    p_T, q_T = softmax(logits / T), taken in float32 (float64 if the products are). The gradient of the student's logits
    is T (q_T - p_T) / n; from there it goes to the student's states, weight and bias.

    Args:
        teacher, student: heads: anything that `apply_linear` takes; the student's has no rounding of its input.
        targets, states: final states, normed, [..., D] each (the two D may differ), of the same n tokens.
        dtype: of the student's products; the gradient of its weight is summed in float32 all the same.
    """
    flat = states.flatten(0, -2)
    loss: torch.Tensor = _HeadDivergence.apply(
        flat, student.weight, student.bias, teacher, targets.flatten(0, -2), temperature, dtype
    )
    return loss


class _HeadDivergence(torch.autograd.Function):
    """See `head_divergence`; the backward pass only scales what the forward pass found."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,  # [n, D]
        weight: torch.Tensor,  # [V, D]
        bias: torch.Tensor | None,  # [V]
        teacher: Any,
        targets: torch.Tensor,
        temperature: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        together = max(1, LOGITS_TOGETHER // len(weight))
        inputs = (states, weight, bias)
        wanted = ctx.needs_input_grad[:3]
        by_states, by_weight, by_bias = gradients = [
            torch.zeros_like(x, dtype=wide) if x is not None and needed else None
            for x, needed in zip(inputs, wanted, strict=True)
        ]
        head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        loss = torch.zeros((), dtype=wide, device=states.device)
        for start in range(0, len(states), together):
            rows = slice(start, start + together)
            x = states[rows].to(dtype)
            log_p = F.log_softmax(apply_linear(teacher, targets[rows]).to(wide) / temperature, dim=-1)
            log_q = F.log_softmax(F.linear(x, head, offset).to(wide) / temperature, dim=-1)
            loss += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            if not any(wanted):
                continue
            by_logits = (log_q.exp_().sub_(log_p.exp_()).mul_(temperature / len(states))).to(dtype)
            if by_states is not None:
                by_states[rows] = by_logits @ head
            if by_weight is not None:
                by_weight += by_logits.T @ x
            if by_bias is not None:
                by_bias += by_logits.sum(0, dtype=wide)
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return temperature**2 * loss / len(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # one reference less: what receives them need not copy them
        scaled = (
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)


def hidden_distance(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """|s - t|^2 / |t|^2 of residual streams [..., D], mean over the tokens whose t is not zero; taken in float32.

    It is zero where an embedding is, as padding has it, and nothing came from other tokens.
    """
    t, s = teacher.float(), student.float()
    sizes = t.pow(2).sum(-1)
    has_size = sizes > 0
    distances = (s - t).pow(2).sum(-1) / sizes.where(has_size, 1.0)
    return (distances * has_size).sum() / has_size.sum().clamp(min=1)
