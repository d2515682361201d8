"""What a target says once for a whole model, and a graph says of every block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from exporter.errors import TargetError


def differences(what: str, values: Iterable[tuple[int | None, Any]]) -> Iterator[TargetError]:
    """Yield an error for every block that differs from the majority in something that a target says once.

    Args:
        values: (block, or None for the final norm; value).
    """
    values = list(values)
    if not values:
        return
    ((usual, _),) = Counter(value for _, value in values).most_common(1)
    for index, value in dict.fromkeys(values):
        if value != usual:
            where = "" if index is not None else " (of the final norm)"
            yield TargetError(
                f"the whole model has one {what}",
                block=index,
                expected=f"{usual} as elsewhere",
                found=f"{value}{where}",
            )
