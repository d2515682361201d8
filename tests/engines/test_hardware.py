"""The hardware file: what it holds, what an all-reduce takes by it, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.hardware import LARGE_BYTES, SMALL_BYTES, gpu_named, read_gpus
from exporter.dtypes import BFLOAT16, FLOAT8_E4M3FN, INT8
from exporter.errors import EngineError, PlanError

GPUS = read_gpus()
FILE = """
links:
  wire: {gpus: 4, gb_per_s: 100, all_reduce_us: {2: [5, 20], 4: [8, 40]}, source: none}
gpus:
  mine: {name: Mine, memory_gb: 10, memory_gb_per_s: 1000, tflops: {bfloat16: 1}, links: [wire], source: none}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "gpus.yaml"
    path.write_text(FILE)
    return path


def test_every_gpu_has_rates_in_the_order_of_its_formats() -> None:
    assert set(GPUS) == {"h100-sxm", "h100-pcie", "h100-nvl", "h200", "b200", "a100-80gb", "l40s"}
    for gpu in GPUS.values():
        assert gpu.source
        assert gpu.flops_per_us(INT8) == pytest.approx(2 * gpu.flops_per_us(BFLOAT16), rel=0.02)
        assert all(link.source for link in gpu.links)
        # Arithmetic intensity at which products in bfloat16 become the slower side: 100 to 600 operations per byte.
        assert 100 < gpu.flops_per_us(BFLOAT16) / (gpu.memory_gb_per_s * 1e3) < 600


@pytest.mark.parametrize(
    ("group", "nbytes", "expected_us"),
    [
        (1, 10**9, 0),
        (2, 0, 5),
        (2, SMALL_BYTES, 5),
        (3, SMALL_BYTES, 8),  # as four
        (4, LARGE_BYTES, 40),
        (4, (SMALL_BYTES + LARGE_BYTES) // 2, 24),
        (4, LARGE_BYTES + 10**6, 40 + 1.5 * 10**6 / 100e3),
        (2, LARGE_BYTES + 10**6, 20 + 1.0 * 10**6 / 100e3),
    ],
)
def test_all_reduce_time(mine: Path, group: int, nbytes: int, expected_us: float) -> None:
    assert read_gpus(mine)["mine"].all_reduce_us(group, nbytes) == pytest.approx(expected_us)


def test_a_group_takes_the_smallest_link_that_spans_it() -> None:
    pcie = GPUS["h100-pcie"]
    assert pcie.all_reduce_us(2, 0) == GPUS["h100-sxm"].all_reduce_us(2, 0)  # the bridge
    assert pcie.all_reduce_us(4, 0) > 2 * GPUS["h100-sxm"].all_reduce_us(4, 0)
    assert GPUS["h100-sxm"].all_reduce_us(16, 0) > GPUS["h100-sxm"].all_reduce_us(8, 0)


def test_links_may_be_named_in_any_order(mine: Path) -> None:
    text = FILE.replace(
        "links:\n", "links:\n  net: {gpus: 8, gb_per_s: 1, all_reduce_us: {8: [90, 99]}, source: none}\n", 1
    )
    mine.write_text(text.replace("links: [wire]", "links: [net, wire]"))
    assert [read_gpus(mine)["mine"].all_reduce_us(group, 0) for group in (2, 4, 8)] == [5, 8, 90]


def test_what_a_gpu_cannot_do() -> None:
    with pytest.raises(EngineError, match="A100 SXM 80 GB has no matrix products in float8_e4m3fn"):
        GPUS["a100-80gb"].flops_per_us(FLOAT8_E4M3FN)
    with pytest.raises(EngineError, match="at most 8, found 16"):
        GPUS["l40s"].all_reduce_us(16, 0)
    with pytest.raises(EngineError, match=r"unknown GPU: expected h100-sxm, .* found h100"):
        gpu_named("h100", GPUS)


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("links: [wire]", "links: [tube]", "gpus.mine names an unknown link: expected wire"),
        ("4: [8, 40]", "3: [8, 40]", "all_reduce_us must have an entry for the largest group: expected 4"),
        ("[8, 40]", "8", "all_reduce_us.4"),
        ("memory_gb: 10", "memory_gb: -1", "gpus.mine.memory_gb: Input should be greater than 0"),
        ("memory_gb: 10", "memory_gb: .inf", "gpus.mine.memory_gb: Input should be a finite number"),
        ("memory_gb: 10", "memory_gib: 10", "gpus.mine.memory_gib: unknown key"),
        ("gpus:\n  mine", "gpus:\n  other: 3\n  mine", "gpus.other"),
    ],
)
def test_a_file_that_is_refused(mine: Path, was: str, becomes: str, message: str) -> None:
    assert was in FILE
    mine.write_text(FILE.replace(was, becomes))
    with pytest.raises(PlanError, match=message):
        read_gpus(mine)
