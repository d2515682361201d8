"""What one error says, and several problems in one."""

from __future__ import annotations

import pytest

from exporter.errors import FuselageError, GraphError, TargetError, raise_all


def wide(block: int | None, **where: object) -> FuselageError:
    return TargetError("too wide", block=block, expected="8", found=9, hint="pad it", **where)  # type: ignore[arg-type]


LINE = "too wide: expected 8, found 9. Pad it"
CASES: dict[str, tuple[list[FuselageError], list[str]]] = {
    "alike": ([wide(0), wide(3)], [f"blocks 0, 3: {LINE}"]),
    "many alike": ([wide(n) for n in range(30)], [f"blocks 0, 1, 2, 3 and 26 more: {LINE}"]),
    "alike but for one": ([wide(0), GraphError("odd", block=1), wide(2)], [f"blocks 0, 2: {LINE}", "block 1: odd"]),
    "alike without a block": ([wide(None), wide(None)], [LINE] * 2),
    "of tensors": ([wide(n, tensor=f"t{n}") for n in (0, 1)], [f"t0 (block 0): {LINE}", f"t1 (block 1): {LINE}"]),
    "of files": ([wide(n, file="f") for n in (0, 1)], [f"f (block {n}): {LINE}" for n in (0, 1)]),
    "more than are shown": (
        [GraphError(f"odd {n}") for n in range(15)],
        [*(f"odd {n}" for n in range(12)), "... and 3 more"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_several_blocks_have_alike_is_said_once(case: str) -> None:
    problems, lines = CASES[case]
    with pytest.raises(type(problems[0])) as raised:
        raise_all(problems)
    assert str(raised.value) == "\n  ".join([f"{len(problems)} problems:", *lines])


def test_one_problem_is_raised_as_it_is_and_none_is_none() -> None:
    raise_all([])
    problem = wide(7)
    with pytest.raises(TargetError) as raised:
        raise_all([problem])
    assert raised.value is problem
    assert problem.block == 7


def test_what_a_file_has_is_cut() -> None:
    error = GraphError("odd", expected=list(range(5000)), found="x" * 1001, hint="cut it")
    assert str(error) == f"odd: expected {str(list(range(5000)))[:1000]}..., found {'x' * 1000}.... Cut it"
