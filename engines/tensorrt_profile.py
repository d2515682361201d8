"""Profiles of TensorRT engines: the times of its `IProfiler`, and which nodes each layer came from.

`IProfiler.report_layer_time(name, ms)` is called for every layer of a call. A layer that came from several ONNX nodes
lists them in the inspector's `Metadata` as "[ONNX Layer: <node>]", if the engine was built with detailed profiling
verbosity; else its name is all there is, in which a fused layer joins the names of what it fused with " + ". Written to
the documented format (TensorRT 10.15 to 11.4, Python API and `IEngineInspector`), and never executed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from engines.base import Runner
from engines.profile import Execution, Phase, Profile, place_of_all, profile_of
from exporter.errors import EngineError

PROFILER = "TensorRT's IProfiler, no CUDA graphs"
_NODE = re.compile(r"\[ONNX Layer: ([^\]|]*?)(?: \|[^\]]*)?\]")  # the importer joins " | Local Function: <name>"
_SEPARATOR = re.compile(r"\s\+\s|\|\|")


class ProfilableRunner(Runner, Protocol):
    """What is used of `engines.tensorrt_runner.TensorRtRunner`."""

    def report_layers(self, trt: Any, profiler: Any) -> str:
        """Have the time of every layer reported from now on; returns the inspector's document."""


def layer_kernels(inspected: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """Layer name -> the ONNX nodes it came from, and the kernel that runs it.

    Args:
        inspected: `IEngineInspector.get_engine_information(LayerInformationFormat.JSON)`. With layer names only, which
            is what engines have unless built otherwise, its layers are strings.

    Raises:
        EngineError: not such a document.
    """
    try:
        layers = json.loads(inspected)["Layers"]
        described = [layer if isinstance(layer, Mapping) else {"Name": layer} for layer in layers]
        return {str(layer["Name"]): (_nodes(layer), _kernel(layer)) for layer in described}
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError("not what TensorRT's engine inspector writes", found=inspected[:80]) from error


def _nodes(layer: Mapping[str, Any]) -> tuple[str, ...]:
    named = _NODE.findall(str(layer.get("Metadata", "")))
    return tuple(named) or nodes_in_name(str(layer["Name"]))


def nodes_in_name(name: str) -> tuple[str, ...]:
    """The nodes that the name of a fused layer joins; "{ForeignNode[first...last]}" names its first and last."""
    inner = re.search(r"ForeignNode\[(.*)\]", name)
    if inner is not None:
        return tuple(part for part in re.split(r"\.\.\.", inner[1]) if part)
    return tuple(part.strip() for part in _SEPARATOR.split(name) if part.strip())


def _kernel(layer: Mapping[str, Any]) -> str:
    """The tactic where the engine knows it, else the kind of layer."""
    return str(layer.get("TacticName") or layer.get("LayerType") or "layer")


def make_profiler(trt: Any) -> Any:
    """Make a `tensorrt.IProfiler` that keeps (layer name, ms) pairs in `times`."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # pybind11 wants the base's own, not super()
            self.times: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.append((layer_name, ms))

    return Profiler()


def profile_requests(
    trt: Any,
    runner: ProfilableRunner,
    input_ids: np.ndarray,
    output_len: int,
    *,
    requests: int,
    slot_blocks: Sequence[int],
) -> tuple[Profile, ...]:
    """Profile requests, after one that warms up: prefill and, if `output_len` is more than 1, decode.

    A call's total is the sum of its layers: TensorRT reports no time for a call as a whole.

    Args:
        trt: the module `tensorrt`.
        input_ids: int64 [B, S].
        slot_blocks: see `engines.profile.place_of`.

    Raises:
        EngineError: TensorRT reported no layer, or the inspector's document is not what it should be.
    """
    profiler = make_profiler(trt)
    kernels = layer_kernels(runner.report_layers(trt, profiler))
    batch, input_len = input_ids.shape
    calls: dict[Phase, list[list[Execution]]] = {"prefill": [], "decode": []}

    def call(phase: Phase, run: Callable[[], np.ndarray]) -> np.ndarray:
        profiler.times.clear()
        tokens = run()
        if not profiler.times:
            raise EngineError("TensorRT reported the time of no layer")
        calls[phase].append([_execution(name, ms, kernels, slot_blocks) for name, ms in profiler.times])
        return tokens

    for request in range(1 + requests):
        if request == 1:
            calls = {"prefill": [], "decode": []}
        runner.start(batch, input_len + output_len)
        tokens = call("prefill", lambda: runner.prefill_greedy(input_ids, np.full(batch, input_len)))
        for _ in range(output_len - 1):
            tokens = call("decode", lambda last=tokens: runner.decode_greedy(last))  # type: ignore[misc]
    shapes: dict[Phase, tuple[int, int]] = {"prefill": (input_len, 0), "decode": (1, input_len)}
    return tuple(
        profile_of(
            [(math.fsum(execution.time_us for execution in one), one) for one in found],
            phase=phase,
            batch=batch,
            tokens=shapes[phase][0],
            position=shapes[phase][1],
            profiler=PROFILER,
        )
        for phase, found in calls.items()
        if found
    )


def _execution(
    name: str, ms: float, kernels: Mapping[str, tuple[tuple[str, ...], str]], slot_blocks: Sequence[int]
) -> Execution:
    nodes, kernel = kernels.get(name, (nodes_in_name(name), "layer"))
    return Execution(place_of_all(nodes, slot_blocks), kernel, 1000 * ms)
