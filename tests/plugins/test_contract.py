"""The contract of the wide-FFN op: what it accepts, and what it says otherwise."""

from __future__ import annotations

import pytest

from plugins.contract import WIDE_FFN

BFLOAT16 = {
    "x": ("bfloat16", (3, 64)),
    "norm_weight": ("bfloat16", (64,)),
    "gate": ("bfloat16", (256, 64)),
    "up": ("bfloat16", (256, 64)),
    "down": ("bfloat16", (64, 256)),
}
INT8 = BFLOAT16 | {
    "gate": ("int8", (256, 64)),
    "up": ("int8", (256, 64)),
    "down": ("int8", (64, 256)),
    "gate_scale": ("float32", (256,)),
    "up_scale": ("float32", (1,)),
    "down_scale": ("float32", (64,)),
}
STATIC = INT8 | {"input_scale": ("float32", (1,)), "inner_scale": ("float32", (1,))}
RESIDUAL = {"residual": ("bfloat16", (3, 64))}

ACCEPTED = [
    ("none", BFLOAT16),
    ("none", BFLOAT16 | RESIDUAL | {"gate_scale": None}),
    ("none", INT8),
    ("token", INT8 | RESIDUAL),
    ("static", STATIC),
]
REFUSED = [
    ("dynamic", BFLOAT16, ["activations is one of none, static, token: found dynamic"]),
    ("none", {name: BFLOAT16[name] for name in BFLOAT16 if name != "norm_weight"}, ["norm_weight is missing"]),
    ("none", BFLOAT16 | {"x": ("float16", (3, 64))}, ["x is bfloat16: found float16"]),
    ("none", BFLOAT16 | {"up": ("int8", (256, 64)), "up_scale": ("float32", (1,))}, ["up is bfloat16: found int8"]),
    ("none", INT8 | {"up_scale": None}, ["up_scale is needed where up is int8"]),
    ("none", BFLOAT16 | {"down": ("bfloat16", (256, 64))}, ["down has the shape [64, 256]: found [256, 64]"]),
    ("none", BFLOAT16 | {"x": ("bfloat16", (3, 4, 64))}, ["x has the shape [tokens, hidden]: found [3, 4, 64]"]),
    ("none", BFLOAT16 | {"residual": ("bfloat16", (1, 64))}, ["residual has the shape [3, 64]: found [1, 64]"]),
    ("none", BFLOAT16 | {"up_scale": ("float32", (1,))}, ["up_scale is not taken where up is bfloat16"]),
    ("token", INT8 | {"down_scale": ("float32", (256,))}, ["down_scale has the shape [64] or [1]: found [256]"]),
    ("token", INT8 | {"gate_scale": ("bfloat16", (1,))}, ["gate_scale is float32: found bfloat16"]),
    ("token", STATIC, [f"{name}_scale is not taken where activations is token" for name in ("input", "inner")]),
    ("static", INT8, [f"{name}_scale is needed where activations is static" for name in ("input", "inner")]),
]


@pytest.mark.parametrize(("activations", "tensors"), ACCEPTED)
def test_accepted(activations: str, tensors: dict) -> None:
    assert not WIDE_FFN.problems(tensors, {"epsilon": 1e-5, "activations": activations})


@pytest.mark.parametrize(("activations", "tensors", "problems"), REFUSED)
def test_refused(activations: str, tensors: dict, problems: list[str]) -> None:
    assert WIDE_FFN.problems(tensors, {"epsilon": 1e-5, "activations": activations}) == problems
