"""Which runtimes there are, by the name that engine manifests carry, and what can be chosen about a build with each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import tensorrt, tensorrt_build, tensorrt_llm, torch
from engines.base import Backend, BuildProgress, Foreseen
from engines.onnxruntime import OnnxRuntime
from exporter.errors import EngineError, raise_all
from exporter.graph import ModelGraph
from exporter.settings import Setting, owners_by_setting
from exporter.writers import onnx_options


@dataclass(frozen=True, slots=True)
class Kind:
    """One runtime. `settings` and `progress` of a build may be None."""

    make: Callable[[Any, BuildProgress | None], Backend]
    builds_from: Mapping[str, str]  # the keys of a recipe's `network` that it asks for, see `exporter.recipe_engines`
    # Graph, settings of the network's target and of the build -> the engine; raises EngineError if there can be none.
    foresee: Callable[[ModelGraph, Any, Any], Foreseen]
    settings: type | None = None  # a dataclass as in `exporter.settings`; None: nothing can be chosen
    describe: Callable[[Path, Path, Any], str] | None = None  # a build in words, from network, output and settings
    tells_progress: bool = False


def _foresee_from_network(graph: ModelGraph, network: onnx_options.Settings, settings: object) -> Foreseen:
    (form,) = onnx_options.options_from(network).networks
    return Foreseen(
        dtype=onnx_options.network_dtype(form, graph.dtype).name,
        max_positions=network.max_positions or graph.max_position_embeddings,
        batch=form.batch,
        plugins=network.plugins,
    )


def _foresee_tensorrt(
    graph: ModelGraph, network: onnx_options.Settings, settings: tensorrt_build.BuildSettings
) -> Foreseen:
    engine = _foresee_from_network(graph, network, settings)
    raise_all(list(tensorrt_build.setting_problems(settings, engine)))
    return engine


BACKENDS: dict[str, Kind] = {
    "onnxruntime": Kind(
        lambda settings, progress: OnnxRuntime(), {"to": "onnx", "target": "onnxruntime"}, _foresee_from_network
    ),
    "tensorrt": Kind(
        tensorrt.TensorRt,
        {"to": "onnx", "target": "tensorrt"},
        _foresee_tensorrt,
        tensorrt_build.BuildSettings,
        tensorrt.describe_build,
        tells_progress=True,
    ),
    "tensorrt-llm": Kind(
        lambda settings, progress: tensorrt_llm.TensorRtLlm(settings),
        {"to": "trtllm"},
        tensorrt_llm.foresee,
        tensorrt_llm.BuildSettings,
        tensorrt_llm.describe_build,
    ),
    "torch": Kind(lambda settings, progress: torch.Torch(settings), {"to": "hf"}, torch.foresee, torch.BuildSettings),
}


def backend_named(
    name: str, options: Mapping[str, Any] | None = None, progress: BuildProgress | None = None
) -> Backend:
    """Return the backend of that name.

    Args:
        options: what is chosen about its builds, by the names of its settings; the others have their defaults.
        progress: is told how a build comes along, by those backends that know.

    Raises:
        EngineError: there is none, or it has no such options.
    """
    kind = _kind(name)
    return kind.make(_settings(name, options), progress)


def describe_build(name: str, network: Path, output: Path, options: Mapping[str, Any] | None = None) -> str:
    """What a backend's `build` would do, as text; the runtime need not be there.

    Raises:
        EngineError: there is no such backend, it has no such options or they do not fit, or it plans nothing.
        CheckpointError: the network folder is incomplete or malformed.
    """
    kind = _kind(name)
    settings = _settings(name, options)
    if kind.describe is None or kind.settings is None:
        planning = " or ".join(describing_backends())
        raise EngineError("a dry run has nothing to show here", expected=f"--backend {planning}", found=name)
    return kind.describe(network, output, settings or kind.settings())


def describing_backends() -> list[str]:
    """The backends whose builds `describe_build` can put in words."""
    return [name for name, kind in BACKENDS.items() if kind.describe is not None]


def backends_by_setting() -> dict[Setting, list[str]]:
    """All that can be chosen about builds, each with the backends that it belongs to."""
    return owners_by_setting({name: kind.settings for name, kind in BACKENDS.items()})


def tells_progress(name: str) -> bool:
    """Whether a backend says how its build comes along; what the others print must not meet a progress bar."""
    return _kind(name).tells_progress


def _kind(name: str) -> Kind:
    if name not in BACKENDS:
        raise EngineError("no such backend", expected=f"one of {', '.join(BACKENDS)}", found=name)
    return BACKENDS[name]


def _settings(name: str, options: Mapping[str, Any] | None) -> Any:
    """The settings of a backend, checked for being its own; None: it has none, or none was chosen."""
    refused = sorted(set(options or ()) - _options_of(name))
    if refused:
        owners = " or ".join(owner for owner in BACKENDS if set(refused) & _options_of(owner))
        spelled = {setting.name: setting.option or setting.name for setting in backends_by_setting()}
        found = ", ".join(spelled.get(name, name) for name in refused)
        raise EngineError(f"these options belong to --backend {owners}", found=found)
    kind = BACKENDS[name]
    return kind.settings(**options) if kind.settings is not None and options else None


def _options_of(name: str) -> set[str]:
    return {setting.name for setting, owners in backends_by_setting().items() if name in owners}
