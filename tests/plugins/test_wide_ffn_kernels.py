"""The kernels in Triton's interpreter against the reference; every buffer starts full of NaN or of large numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from plugins.wide_ffn.configs import BUCKETS, Config, Norm, bucket_of, config_by_rule
from plugins.wide_ffn.reference import quantized, scale_of_tokens, wide_ffn_reference
from tests.plugins.ffn_calls import FORMATS, Call, relative_error
from tests.plugins.interpreter import interpreter

pytest.importorskip("triton")
from tests.plugins.small_kernels import codes_of, scales_of

# Hidden and width: multiples of every tile; of 16 alone; of nothing.
SHAPES = [(1, 128, 256), (64, 192, 336), (3, 130, 301), (17, 77, 129), (33, 256, 144)]
CALLS = [
    Call(*SHAPES[(i + j) % len(SHAPES)], *format_, residual=(i + j) % 4 > 0)
    for i, format_ in enumerate(FORMATS)
    for j in range(3)
]
NORMS: tuple[Norm, ...] = get_args(Norm)
BAD = [float("nan"), float("inf"), float("-inf")]
EXTREMES = [0.0, 1e-30, 1e15]


@pytest.fixture(scope="module")
def interpret() -> Iterator[Callable[..., Any]]:
    with interpreter() as call:
        yield call


def run(arguments: list[Any], config: Config) -> torch.Tensor:
    """In the interpreter's process."""
    from plugins.wide_ffn.launch import wide_ffn_by_kernels

    return wide_ffn_by_kernels(*arguments, config=config)


def run_backwards(arguments: list[Any], config: Config) -> torch.Tensor:
    """The same with the programs of each launch from last to first."""
    from triton.runtime import interpreter

    interpreter.range = lambda *limits: reversed(range(*limits)) if len(limits) == 1 else range(*limits)
    try:
        return run(arguments, config)
    finally:
        del interpreter.range


def rule(call: Call, *, programs: int, splits: int, norm: Norm = "before") -> Config:
    """The rule's tiles, with so few programs that each has several."""
    config = config_by_rule(bucket_of(call.tokens), call.hidden, call.width, call.weights, call.activations, norm)
    return replace(config, programs=programs, splits=splits)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_kernels_agree_with_the_reference(interpret: Callable[..., Any], call: Call, norm: Norm) -> None:
    arguments = call.arguments()
    found = interpret(run, arguments, rule(call, programs=2, splits=2, norm=norm))
    for accumulate in (torch.float32, torch.float64):
        expected = wide_ffn_reference(*arguments, accumulate=accumulate)
        # Sums are taken in another order; where that turns one rounding, one value differs by one step.
        assert relative_error(found, expected) < 1e-3
        assert (found != expected).float().mean() < 0.02


@pytest.mark.parametrize("shifted", [None, "gate", "up"])
def test_alignment_is_promised_where_it_holds(monkeypatch: pytest.MonkeyPatch, shifted: str | None) -> None:
    from plugins.wide_ffn import launch

    call = Call(1, 128, 256)
    arguments = call.arguments()
    if shifted is not None:
        place = {"gate": 2, "up": 3}[shifted]
        weight = arguments[place]
        arguments[place] = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view_as(weight)
    promised: dict[str, Any] = {}
    monkeypatch.setattr(launch, "_entry", lambda *_: lambda *tensors, **constants: promised.update(constants))
    run(arguments, rule(call, programs=1, splits=1))
    assert promised["ALIGNED"] == (shifted is None)


@pytest.mark.parametrize("splits", [1, 3, 4])
@pytest.mark.parametrize("programs", [1, 3, 13])
def test_any_number_of_programs(interpret: Callable[..., Any], programs: int, splits: int) -> None:
    """More programs of `gate_up` than tiles: some have nothing to do. `down` shares 4 steps as evenly as can be."""
    call = Call(5, 144, 400, "float8_e4m3fn", "token", "row")
    arguments = call.arguments()
    found = interpret(run, arguments, rule(call, programs=programs, splits=splits))
    assert relative_error(found, wide_ffn_reference(*arguments)) < 1e-3


def test_a_program_of_down_without_a_step_is_refused() -> None:
    call = Call(5, 144, 400, "float8_e4m3fn", "token", "row")
    with pytest.raises(AssertionError, match="5 programs of `down` share 4 steps"):
        run(call.arguments(), rule(call, programs=1, splits=5))


@pytest.mark.parametrize("format_", FORMATS, ids="-".join)
def test_the_order_of_programs_does_not_matter(interpret: Callable[..., Any], format_: tuple[str, str, str]) -> None:
    """Bit for bit: whoever is last at a tile adds up the same parts in the same order."""
    call = Call(3, 130, 400, *format_)
    arguments, config = call.arguments(), rule(call, programs=3, splits=3)
    assert torch.equal(interpret(run_backwards, arguments, config), interpret(run, arguments, config))


@pytest.mark.parametrize("bucket", BUCKETS)
def test_tokens_of_a_bucket_do_not_matter(interpret: Callable[..., Any], bucket: int) -> None:
    """A token's result is the same alone as among others: bit for bit, so padding is padding."""
    call = Call(16, 128, 256, "int8", "token", "row")
    arguments = call.arguments()
    one = [arguments[0][3:4], *arguments[1:10], arguments[10][3:4], *arguments[11:]]
    config = replace(rule(call, programs=2, splits=2), tokens=bucket)
    torch.testing.assert_close(interpret(run, arguments, config)[3:4], interpret(run, one, config), rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", range(len(FORMATS)), ids=lambda case: f"{'-'.join(FORMATS[case])}-{BAD[case % 3]}")
def test_a_bad_number_spoils_its_row_alone(interpret: Callable[..., Any], case: int, norm: Norm) -> None:
    call = Call(4, 130, 260, *FORMATS[case])
    arguments = call.arguments()
    arguments[0][2, 129] = BAD[case % 3]
    found = interpret(run, arguments, rule(call, programs=2, splits=2, norm=norm))
    assert found[2].isnan().all()
    expected = wide_ffn_reference(*arguments)
    assert expected[2].isnan().all()
    others = [0, 1, 3]
    assert relative_error(found[others], expected[others]) < 1e-3


@pytest.mark.parametrize(
    "case", range(len(FORMATS)), ids=lambda case: f"{'-'.join(FORMATS[case])}-{EXTREMES[case % 3]}"
)
@pytest.mark.parametrize("norm", NORMS)
def test_zeros_and_extreme_ranges(interpret: Callable[..., Any], case: int, norm: Norm) -> None:
    call = Call(2, 64, 128, *FORMATS[case])
    arguments = call.arguments()
    arguments[0] *= EXTREMES[case % 3]
    found = interpret(run, arguments, rule(call, programs=1, splits=1, norm=norm))
    assert relative_error(found, wide_ffn_reference(*arguments)) < 1e-3


@pytest.mark.parametrize("divisor", [1.0, 0.3, 1 / 127, 0.7 / 448, 2.0**-20, 3e10])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_codes_of_every_bfloat16(interpret: Callable[..., Any], dtype: torch.dtype, divisor: float) -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    values = values[~values.isnan()] if dtype == torch.int8 else values
    scale = torch.tensor([divisor])
    expected, _ = quantized(values, dtype, "static", scale)
    found = interpret(codes_of, values, scale, dtype).to(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_scales_of_tokens(interpret: Callable[..., Any], dtype: torch.dtype) -> None:
    """Bit for bit, with NaN and infinity kept, and where the largest value is zero or next to nothing."""
    amax = torch.tensor([0.0, 1e-45, 1e-38, 1e-35, 0.3, 1.0, 3e38, float("inf"), float("nan"), 5.0, 7.0, 11.0])
    amax = torch.cat([amax, torch.rand(20, generator=torch.Generator().manual_seed(0))])
    values = torch.stack([amax, -amax / 2, -amax], dim=1)
    expected = scale_of_tokens(values, dtype)[:, 0]
    torch.testing.assert_close(interpret(scales_of, values, dtype), expected, rtol=0, atol=0, equal_nan=True)
