"""The one error type that bad input raises, and its fields.

Anything else that escapes is a bug. Printing and exit codes belong to the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

SHOWN_CHARACTERS = 1000  # of what was expected, and of what was found
SHOWN_PROBLEMS = 12
SHOWN_BLOCKS = 4


class FuselageError(Exception):
    """Bad input, a refused request, or an environment that lacks something: never a bug in Fuselage itself.

    Args:
        problem: what is wrong, one sentence without a full stop.
        file: the file or folder it was found in.
        tensor: the tensor's name in that file.
        block: block index in the graph the tensor belongs to.
        expected, found: what the rule asks for and what is there.
        hint: a way out.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        tensor: str | None = None,
        block: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = file
        self.tensor = tensor
        self.block = block
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(problem)

    def __str__(self) -> str:
        head = ": ".join(_one_line(name) for name in (self.file, self.tensor) if name is not None)
        if self.block is not None:
            head = f"{head} (block {self.block})" if head else f"block {self.block}"
        text = f"{head}: {self.problem}" if head else self.problem
        if self.expected is not None:
            text += f": expected {_short(str(self.expected))}"
        if self.found is not None:
            text += (": " if self.expected is None else ", ") + f"found {_short(_one_line(self.found))}"
        if self.hint:
            text += "" if text.endswith("\n") else ". "
            text += self.hint[0].upper() + self.hint[1:]
        return _printable(text)


def _one_line(value: object) -> str:
    """What comes from untrusted files cannot pass for another line of ours."""
    return str(value).replace("\n", "\\n")


def _short(text: str) -> str:
    """A file may hold a list of thousands where there should be one number."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _printable(text: str) -> str:
    """Names come from untrusted files: a terminal must show their control characters, not obey them."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class CheckpointError(FuselageError):
    """A model folder that cannot be read: config, index, header, tensor or file."""


class GraphError(FuselageError):
    """A model structure that breaks an invariant, or a pass asked for something the structure does not allow."""


class PlanError(FuselageError):
    """A plan or recipe that is malformed or does not fit its model."""


class TargetError(FuselageError):
    """A target (writer, reader or backend) that cannot express or run what was asked."""


class OutputError(FuselageError):
    """An output that cannot be written: it exists, the disk is full, permission is missing."""


class EngineError(FuselageError):
    """An engine folder, result file or runtime that is incomplete, altered or does not fit this machine."""


class IncompleteError(EngineError):
    """Work that ended early after a part worth keeping: the file that it names holds that part."""


def raise_all(problems: Sequence[FuselageError]) -> None:
    """Raise nothing, the only problem, or one error of the first problem's type that lists them all.

    What is wrong with several blocks alike takes one line, and there are 12 lines at most.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    lines = [f"  {line}" for line in _lines(problems)]
    if len(lines) > SHOWN_PROBLEMS:
        lines[SHOWN_PROBLEMS:] = [f"  ... and {len(lines) - SHOWN_PROBLEMS} more"]
    raise type(problems[0])(f"{len(problems)} problems:\n" + "\n".join(lines))


def _lines(problems: Sequence[FuselageError]) -> list[str]:
    """The problems as texts; of those that differ in their block alone, one."""
    alike: dict[str, list[FuselageError]] = {}
    for problem in problems:
        without_block = copy(problem)
        is_of_block = (problem.file, problem.tensor) == (None, None)
        without_block.block = None if is_of_block else problem.block
        alike.setdefault(str(without_block), []).append(problem)
    lines: list[str] = []
    for text, group in alike.items():
        blocks = [str(problem.block) for problem in group if problem.block is not None]
        more = f" and {len(blocks) - SHOWN_BLOCKS} more" if len(blocks) > SHOWN_BLOCKS else ""
        together = len(blocks) == len(group) > 1
        lines += [f"blocks {', '.join(blocks[:SHOWN_BLOCKS])}{more}: {text}"] if together else map(str, group)
    return lines
