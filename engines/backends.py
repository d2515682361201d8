"""Which runtimes there are, by the name that engine manifests carry."""

from __future__ import annotations

from collections.abc import Callable

from engines.base import Backend
from engines.onnxruntime import OnnxRuntime
from engines.tensorrt_llm import TensorRtLlm
from exporter.errors import EngineError

BACKENDS: dict[str, Callable[[], Backend]] = {
    "onnxruntime": OnnxRuntime,
    "tensorrt-llm": TensorRtLlm,
}


def backend_named(name: str) -> Backend:
    """Return the backend of that name.

    Raises:
        EngineError: there is none.
    """
    if name not in BACKENDS:
        raise EngineError("no such backend", expected=f"one of {', '.join(BACKENDS)}", found=name)
    return BACKENDS[name]()
