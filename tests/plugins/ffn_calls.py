"""Arguments of the wide-FFN op for tests: random tensors of every format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LARGEST = {"bfloat16": 1.0, "float8_e4m3fn": 448.0, "int8": 127.0}
# (weights, activations, scale of the weights)
FORMATS = [
    ("bfloat16", "none", "none"),
    ("float8_e4m3fn", "none", "tensor"),
    ("float8_e4m3fn", "static", "tensor"),
    ("float8_e4m3fn", "static", "row"),
    ("float8_e4m3fn", "token", "row"),
    ("int8", "none", "row"),
    ("int8", "static", "row"),
    ("int8", "static", "tensor"),
    ("int8", "token", "row"),
]


@dataclass(frozen=True)
class Call:
    """A call of the op, by what its random tensors are like."""

    tokens: int
    hidden: int
    width: int
    weights: str = "bfloat16"
    activations: str = "none"
    scale: str = "none"
    residual: bool = True

    def __str__(self) -> str:
        shape = f"{self.tokens}x{self.hidden}x{self.width}"
        return f"{shape}-{self.weights}-{self.activations}-{self.scale}{'' if self.residual else '-alone'}"

    def arguments(self, device: str = "cpu") -> list[Any]:
        """x, weights, scales and the rest, in the op's order. Activations reach into saturation where it is static."""
        generator = torch.Generator().manual_seed(self.tokens * self.hidden + self.width)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def static(amax: float) -> torch.Tensor | None:
            return torch.tensor([amax / LARGEST[self.weights]]) if self.activations == "static" else None

        gate, gate_scale = self._weight(normal(self.width, self.hidden))
        up, up_scale = self._weight(normal(self.width, self.hidden))
        down, down_scale = self._weight(normal(self.hidden, self.width))
        tensors = [
            normal(self.tokens, self.hidden).bfloat16(),
            (1 + 0.2 * normal(self.hidden)).bfloat16(),
            gate,
            up,
            down,
            gate_scale,
            up_scale,
            down_scale,
            static(2.5),
            static(1.5),
            normal(self.tokens, self.hidden).bfloat16() if self.residual else None,
        ]
        moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
        return [*moved, 1e-5, self.activations]

    def _weight(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        values = values / values.shape[1] ** 0.5
        if self.weights == "bfloat16":
            return values.bfloat16(), None
        amax = values.abs().amax(1) if self.scale == "row" else values.abs().amax().reshape(1)
        scale = amax / LARGEST[self.weights]
        quotient = values / scale[:, None]
        return (quotient.round() if self.weights == "int8" else quotient).to(getattr(torch, self.weights)), scale


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; NaN if either holds NaN or infinity."""
    wide = expected.to(torch.float64)
    return float((found.to(torch.float64) - wide).norm() / wide.norm())
