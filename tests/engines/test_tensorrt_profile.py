"""Profiles of TensorRT engines on the stand-in of its execution: the calls are those of the real bindings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines import tensorrt_library
from engines.profile_worker import REQUESTS, profile_tensorrt
from engines.results import RequestShape
from tests.engines.tensorrt_signatures import Api, check_module_uses
from tests.engines.tensorrt_stand_in import HostDevice, StandIn
from tests.engines.test_tensorrt import api, built, machine, stand_in

__all__ = ["api", "machine", "stand_in"]  # fixtures

ROOT = Path(__file__).parents[2]
ALIASES: dict[str, dict[str, str]] = {  # how these sources call TensorRT's objects
    "engines/tensorrt_profile.py": {},
    "engines/tensorrt_runner.py": {
        "self._engine": "ICudaEngine",
        "self._engine.create_engine_inspector()": "EngineInspector",
        "context": "IExecutionContext",
    },
    "benchmarks/tensorrt_probes.py": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "given": "ITensor",
        "added": "IAttentionInputLayer",  # an `ILayer`, until it is cast
        "added.attention": "IAttention",
        "parser": "OnnxParser",
        "parser.get_error(i)": "ParserError",
        "config": "IBuilderConfig",
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "engine.get_tensor_dtype(name)": "DataType",
        "inspector": "EngineInspector",
        "context": "IExecutionContext",
    },
}
LAYERS = {"Layers": [{"Name": "gemm_0", "TacticName": "xmma", "Metadata": "[ONNX Layer: blocks.0.ffn.up_proj]"}]}


@pytest.mark.parametrize(("file", "aliases"), ALIASES.items(), ids=ALIASES.keys())
def test_every_name_is_tensorrts(file: str, aliases: dict[str, str], api: Api) -> None:
    assert {"IProfiler", "EngineInspector.get_engine_information"} & check_module_uses(api, ROOT / file, aliases)


def test_layers_are_reported_of_every_call(
    machine: list[HostDevice],
    api: Api,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Also of decode steps that would be replayed from a CUDA graph otherwise."""
    engine = built(tmp_path)

    def execute(context: Any, stream_handle: int) -> bool:
        done = reporting._execute(context, stream_handle)
        vars(context)["profiler"].report_layer_time("gemm_0", 0.25)
        vars(context)["profiler"].report_layer_time("unknown", 0.5)
        return done

    reporting = StandIn(
        api,
        IExecutionContext__execute_async_v3=execute,
        EngineInspector__get_engine_information=lambda inspector, format: json.dumps(LAYERS),
    )
    monkeypatch.setattr(tensorrt_library, "load", lambda: reporting.trt)
    prefill, decode = profile_tensorrt(engine, RequestShape(1, 3, 5), None, 0)
    assert machine[-1].captured == 0
    assert (prefill.phase, prefill.calls, prefill.tokens) == ("prefill", REQUESTS, 3)
    assert (decode.phase, decode.calls, decode.position) == ("decode", 4 * REQUESTS, 3)
    for profile in (prefill, decode):
        assert [(k.kind, k.block, k.name, k.time_us) for k in profile.kernels] == [
            ("ffn", 0, "xmma", 250.0),
            ("other", None, "layer", 500.0),
        ]
