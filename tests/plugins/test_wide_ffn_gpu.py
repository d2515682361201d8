"""The op on a GPU: against float64, bit for bit again, in a CUDA graph, at a size that needs 64-bit offsets.

Needs pytest, torch, triton and numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import plugins.wide_ffn.op  # noqa: F401  registers torch.ops.fuselage.wide_ffn
from plugins.wide_ffn.configs import config_for
from plugins.wide_ffn.reference import wide_ffn_reference
from tests.plugins.ffn_calls import FORMATS, Call, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="PyTorch sees no GPU of compute capability 9.0",
    ),
]

OP = torch.ops.fuselage.wide_ffn
# Tokens of every bucket and, above them, of the library; sizes that fit all tiles, that are multiples of 16, and odd.
SHAPES = [(1, 2048, 8192), (16, 1536, 4096), (17, 1040, 3344), (64, 2048, 8192), (3, 513, 2049), (65, 1024, 4096)]
CALLS = [Call(*shape, *format_, residual=i % 2 == 0) for i, shape in enumerate(SHAPES) for format_ in FORMATS]


@pytest.fixture(autouse=True)
def _new_tensors_are_filled() -> Iterator[None]:
    """New tensors hold NaN or the largest integer, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def limit(weights: str, activations: str) -> float:
    """How far the kernels may be from the reference: 1 / rms may differ by one float32 step.

    FP8 sums of 14 bits make some codes of inner fall on the other side. Emulated at such sizes, that gives up to 5e-3,
    and 1e-2 where a sum of 2048 products is never taken out of the tensor cores.
    """
    return 8e-3 if weights == "float8_e4m3fn" and activations != "none" else 3e-3


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_op_agrees_with_the_reference(call: Call) -> None:
    arguments = call.arguments("cuda")
    found = OP(*arguments)
    expected = wide_ffn_reference(*arguments, accumulate=torch.float64)
    # Beyond the kernels, one more rounding in front of the codes.
    assert relative_error(found, expected) < (2e-2 if call.tokens > 64 else limit(call.weights, call.activations))


@pytest.mark.parametrize("call", [call for call in CALLS if call.tokens <= 64], ids=str)
def test_two_launches_agree_with_the_reference(call: Call) -> None:
    """As TensorRT's plugins launch them: the norm inside `gate_up`."""
    from plugins.wide_ffn.launch import wide_ffn_by_kernels

    arguments = call.arguments("cuda")
    sizes = {"tokens": call.tokens, "hidden": call.hidden, "width": call.width}
    config = config_for(**sizes, weights=call.weights, activations=call.activations, norm="inside")
    expected = wide_ffn_reference(*arguments, accumulate=torch.float64)
    for _ in range(3):
        found = wide_ffn_by_kernels(*arguments, config=config)
        assert relative_error(found, expected) < limit(call.weights, call.activations)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_runs_are_equal_bit_for_bit(call: Call) -> None:
    arguments = call.arguments("cuda")
    first = OP(*arguments)
    for _ in range(50):
        assert torch.equal(OP(*arguments), first)


@pytest.mark.parametrize("format_", FORMATS, ids="-".join)
def test_a_bad_number_spoils_its_row_alone(format_: tuple[str, str, str]) -> None:
    arguments = Call(5, 1024, 4096, *format_).arguments("cuda")
    arguments[0][2, 1023] = float("inf")
    arguments[0][4, 0] = float("nan")
    found, expected = OP(*arguments), wide_ffn_reference(*arguments)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().all(-1).tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("format_", FORMATS, ids="-".join)
def test_in_a_cuda_graph(format_: tuple[str, str, str]) -> None:
    arguments = Call(8, 1024, 4096, *format_).arguments("cuda")
    OP(*arguments)  # compiled and loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OP(*arguments)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        arguments[0].copy_(torch.randn(arguments[0].shape, generator=generator, device="cuda"))
        graph.replay()
        assert torch.equal(captured, OP(*arguments))


@pytest.mark.parametrize("weights", ["float8_e4m3fn", "int8"])
def test_the_widest_ffn(weights: str) -> None:
    """2**33 elements per weight, so offsets beyond 32 bits, and sums of int8 products that must be split."""
    hidden, width = 16384, 524288
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)

    def codes(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.empty(rows, columns, dtype=torch.int8, device="cuda")
        for part in drawn.split(8192):
            part.copy_(torch.randint(-100, 101, part.shape, generator=generator, device="cuda", dtype=torch.int8))
        return drawn if weights == "int8" else drawn.bitwise_and_(-65).view(torch.float8_e4m3fn)  # no NaN

    x = torch.randn(2, hidden, generator=generator, device="cuda").bfloat16()
    scale = 1e-4 if weights == "int8" else 1e-2
    scales = [torch.full([rows], scale, device="cuda") for rows in (width, width, hidden)]
    gate, up, down = codes(width, hidden), codes(width, hidden), codes(hidden, width)
    arguments = [x, torch.ones_like(x[0]), gate, up, down, *scales, None, None, x, 1e-5, "token"]
    call = {"tokens": 2, "hidden": hidden, "width": width, "weights": weights, "activations": "token"}
    assert config_for(**call).splits > 1
    assert relative_error(OP(*arguments), wide_ffn_reference(*arguments)) < limit(weights, "token")
