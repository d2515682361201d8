"""The losses of a distillation against their formulas on whole logits, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from exporter import distill_loss
from exporter.distill_loss import head_divergence, hidden_distance
from exporter.dtypes import FLOAT8_E4M3FN
from exporter.reference import LoadedInput, LoadedLinear, apply_linear

VOCAB, SIZE, TOKENS = 37, 8, (3, 5)


def head(*, bias: bool, seed: int, dtype: torch.dtype, size: int = SIZE) -> LoadedLinear:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, size, generator=rng, dtype=torch.float64)
    offset = torch.randn(VOCAB, generator=rng, dtype=torch.float64) if bias else None
    return LoadedLinear(weight.to(dtype), None if offset is None else offset.to(dtype))


def states(*, seed: int, dtype: torch.dtype, size: int = SIZE) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*TOKENS, size, generator=rng, dtype=torch.float64).to(dtype)


def formula(teacher: Any, targets: torch.Tensor, student: Any, found: torch.Tensor, temperature: float) -> torch.Tensor:
    """What `head_divergence` is to be, on whole logits; as precise as what it is given."""
    p, q = (torch.softmax(apply_linear(h, x) / temperature, -1) for h, x in ((teacher, targets), (student, found)))
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


ROUNDED = LoadedInput(FLOAT8_E4M3FN, None)
CASES: dict[str, dict[str, Any]] = {
    "one_piece": {"together": 1 << 25},
    "pieces": {"together": 4 * VOCAB},  # 15 tokens: three pieces of four, and one of three
    "less_than_a_token": {"together": 1},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 4.0},
    "bias": {"bias": True},
    "frozen_head": {"bias": True, "trains_head": False},
    "frozen_body": {"bias": True, "trains_body": False},
    "another_size": {"teacher_size": 12},
    "rounded_teacher": {"rounded": True},
    "double": {"dtype": torch.float64, "tolerance": 1e-12},
    "products_in_bfloat16": {"products": torch.bfloat16, "tolerance": 2e-2},
    "sharded_in_bfloat16": {"dtype": torch.bfloat16, "products": torch.bfloat16, "tolerance": 2e-2},
}


@pytest.mark.parametrize("case", CASES)
def test_pieces_of_logits_give_the_loss_and_the_gradients_of_whole_ones(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dtype": torch.float32, "tolerance": 2e-6, "together": 4 * VOCAB, "temperature": 2.0, **CASES[case]}
    monkeypatch.setattr(distill_loss, "LOGITS_TOGETHER", options["together"])
    dtype, bias, size = options["dtype"], options.get("bias", False), options.get("teacher_size", SIZE)
    teacher = head(bias=bias, seed=0, dtype=dtype, size=size)
    if options.get("rounded"):
        teacher = LoadedLinear(teacher.weight, teacher.bias, ROUNDED)
    targets, student = states(seed=1, dtype=dtype, size=size), head(bias=bias, seed=2, dtype=dtype)
    found = states(seed=3, dtype=dtype).requires_grad_(options.get("trains_body", True))
    tensors = [found, student.weight, *([] if student.bias is None else [student.bias])]
    for tensor in tensors[1:]:
        tensor.requires_grad_(options.get("trains_head", True))

    doubles = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    if options.get("rounded"):  # the rounding itself is taken in float32, as the reference takes it
        whole = LoadedLinear(torch.eye(VOCAB, dtype=torch.float64)), apply_linear(teacher, targets).double()
    else:
        offset = None if teacher.bias is None else teacher.bias.double()
        whole = LoadedLinear(teacher.weight.double(), offset), targets.double()
    expected = formula(*whole, LoadedLinear(*doubles[1:]), doubles[0], options["temperature"])
    (3 * expected).backward()

    products = options.get("products", dtype)
    loss = head_divergence(teacher, targets, student, found, temperature=options["temperature"], dtype=products)
    (3 * loss).backward()
    assert loss.dtype == torch.promote_types(products, torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=options["tolerance"], atol=0)
    for tensor, double in zip(tensors, doubles, strict=True):
        assert (tensor.grad is None) == (double.grad is None)
        if tensor.grad is not None and double.grad is not None:
            assert tensor.grad.dtype == tensor.dtype
            difference = (tensor.grad.double() - double.grad).norm() / double.grad.norm()
            assert difference <= options["tolerance"]


def test_a_tied_head_adds_to_the_gradient_of_the_embedding() -> None:
    embedding = head(bias=False, seed=0, dtype=torch.float64).weight.requires_grad_()
    tied, teacher = LoadedLinear(embedding), head(bias=False, seed=2, dtype=torch.float64)
    found = F.embedding(torch.arange(15).reshape(TOKENS), embedding).tanh()
    targets = states(seed=1, dtype=torch.float64)
    loss = head_divergence(teacher, targets, tied, found, temperature=1.0, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(x, embedding, retain_graph=True)
        for x in (loss, formula(teacher, targets, tied, found, 1.0))
    ]
    torch.testing.assert_close(*gradients)


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that anything makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_no_tensor_is_larger_than_the_pieces_and_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_loss, "LOGITS_TOGETHER", 9 * VOCAB)
    student, found = head(bias=True, seed=2, dtype=torch.float32), states(seed=3, dtype=torch.float32)
    for tensor in (found, student.weight, student.bias):
        assert tensor is not None
        tensor.requires_grad_()
    with Largest() as largest:
        head_divergence(
            head(bias=True, seed=0, dtype=torch.float32),
            states(seed=1, dtype=torch.float32),
            student,
            found,
            temperature=1.0,
            dtype=torch.float32,
        ).backward()
    assert largest.elements == 9 * VOCAB  # of 15 tokens in all


def test_hidden_distance_is_relative_to_the_teacher() -> None:
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    student = torch.tensor([[[3.0, 5.0], [2.0, 1.0]]])
    assert hidden_distance(teacher, student).item() == pytest.approx((1 / 25 + 4) / 2)


@pytest.mark.parametrize("student", [[0.0, 0.0], [1.0, 2.0]])
def test_hidden_distance_leaves_out_what_is_zero_in_the_teacher(student: list[float]) -> None:
    """As a token is whose embedding is zero, where it is the first."""
    teacher = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    found = torch.tensor([[student, [3.0, 5.0]]], requires_grad=True)
    loss = hidden_distance(teacher, found)
    loss.backward()
    assert loss.item() == pytest.approx(1 / 25)
    assert found.grad is not None
    assert found.grad.tolist() == [[[0.0, 0.0], [0.0, pytest.approx(2 / 25)]]]
    assert hidden_distance(torch.zeros(1, 2), found.detach()[0, :1]).item() == 0
