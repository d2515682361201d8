"""Profiles of ONNX Runtime engines, from the files of its own profiler.

The file is a list of events (Chrome's trace event format): one "model_run" for every call, and one for every node that
ran within it, with the node's name, the op of its kernel and its duration in whole microseconds. What the profiler
itself takes is between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.profile import Execution, Phase, Profile, place_of, profile_of
from exporter.errors import EngineError

PROFILER = "ONNX Runtime's profiler"


def events_of(profile: Path) -> list[dict[str, Any]]:
    """Read what the profiler has recorded.

    Raises:
        EngineError: the file is cut short: the profiler does not say so where a disk is full.
    """
    try:
        events: list[dict[str, Any]] = json.loads(profile.read_bytes())
    except ValueError as error:
        raise EngineError(
            "the profile is cut short", file=profile, hint="is that disk full? TMPDIR names another folder"
        ) from error
    return events


def profiles_of_calls(
    profile: Path, calls: Sequence[Phase | None], *, batch: int, input_len: int, slot_blocks: Sequence[int]
) -> tuple[Profile, ...]:
    """Read the profile of a session, a phase at a time.

    Args:
        profile: file of ONNX Runtime's profiler.
        calls: what each call of the session was, in order; None for those that do not count.
        input_len: tokens of the prompt.
        slot_blocks: see `engines.profile.place_of`.

    Raises:
        EngineError: the file is cut short, or has another number of calls.
    """
    events = events_of(profile)
    runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    if len(runs) != len(calls):
        raise EngineError("the profile is of other calls", file=profile, expected=len(calls), found=len(runs))
    nodes = sorted((event for event in events if _is_kernel(event)), key=lambda event: event["ts"])
    taken_apart: dict[Phase, list[tuple[float, list[Execution]]]] = {"prefill": [], "decode": []}
    first = 0
    for run, phase in zip(runs, calls, strict=True):
        end = run["ts"] + run["dur"]
        while first < len(nodes) and nodes[first]["ts"] < run["ts"]:
            first += 1
        last = first
        while last < len(nodes) and nodes[last]["ts"] < end:
            last += 1
        if phase is not None:
            executions = [_execution(event, slot_blocks) for event in nodes[first:last]]
            taken_apart[phase].append((float(run["dur"]), executions))
        first = last
    shapes: dict[Phase, tuple[int, int]] = {"prefill": (input_len, 0), "decode": (1, input_len)}
    return tuple(
        profile_of(
            found,
            phase=phase,
            batch=batch,
            tokens=shapes[phase][0],
            position=shapes[phase][1],
            profiler=PROFILER,
        )
        for phase, found in taken_apart.items()
        if found
    )


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return event["cat"] == "Node" and event["name"].endswith("_kernel_time")


def _execution(event: Mapping[str, Any], slot_blocks: Sequence[int]) -> Execution:
    node = event["name"].removesuffix("_kernel_time")
    return Execution(place_of(node, slot_blocks), event["args"]["op_name"], float(event["dur"]))
