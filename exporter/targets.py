"""Which formats a graph can be written in, by the name that `export --to` takes, and what can be chosen about each.

A new one is a module in `exporter.writers` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from exporter.errors import FuselageError
from exporter.graph import ModelGraph
from exporter.network import NETWORK_KIND
from exporter.read import Checkpoint
from exporter.settings import Setting, owners_by_setting
from exporter.writers import hf, onnx_options, trtllm
from exporter.writers.files import Content
from exporter.writers.trtllm_config import CHECKPOINT_KIND


@dataclass(frozen=True, slots=True)
class Target:
    """One format: its writer's functions, see `exporter.writers`, and the settings that these take."""

    description: str  # of the folder, for people
    kind: str  # of the folder's manifest
    settings: type  # a dataclass as in `exporter.settings`
    check: Callable[[ModelGraph, Any], list[FuselageError]]
    emit: Callable[[ModelGraph, Any], Iterator[tuple[str, Content | bytes]]]
    # Completes the settings by what the source's folder brings, such as its tokenizer.
    with_source: Callable[[Any, Checkpoint, ModelGraph], Any] = lambda settings, checkpoint, graph: settings


def _check_onnx(graph: ModelGraph, settings: onnx_options.Settings) -> list[FuselageError]:
    from exporter.writers import onnx  # imports onnx_ir, which takes longer than all the rest of a command's start

    return onnx.check(graph, onnx_options.options_from(settings))


def _emit_onnx(graph: ModelGraph, settings: onnx_options.Settings) -> Iterator[tuple[str, Content | bytes]]:
    from exporter.writers import onnx

    return onnx.emit(graph, onnx_options.options_from(settings))


TARGETS: dict[str, Target] = {
    "onnx": Target("an ONNX network", NETWORK_KIND, onnx_options.Settings, _check_onnx, _emit_onnx),
    "hf": Target("a Hugging Face folder", "checkpoint", hf.Options, hf.check, hf.emit, hf.with_source),
    "trtllm": Target("a TensorRT-LLM checkpoint", CHECKPOINT_KIND, trtllm.Options, trtllm.check, trtllm.emit),
}


def targets_by_setting() -> dict[Setting, list[str]]:
    """All that can be chosen about exports, each with the targets that it belongs to."""
    return owners_by_setting({name: target.settings for name, target in TARGETS.items()})
