"""What every runtime looks like to the rest of the program, and the manifest of an engine folder.

Shape letters: B = batch (sequences side by side), S = tokens of one call, V = vocab_size.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from exporter.errors import EngineError
from exporter.manifests import Model, manifest_from_json, validated
from exporter.network import CacheSlot, FileName
from exporter.safetensors_io import read_json
from exporter.structure import Count, Positive, Sealed, StructureJson
from exporter.writers.files import Content, json_bytes, save_folder

ENGINE_KIND = "engine"  # of the folder's manifest
ENGINE_FILE = "engine.json"
ENGINE_SCHEMA = 1

BuildProgress = Callable[[int, int, str], None]  # (done, total, what is being done)


class EngineManifest(Sealed):
    """What an engine folder says about itself in `engine.json`; the files' hashes are in the folder's manifest."""

    engine_schema: int = ENGINE_SCHEMA
    backend: str  # a key of `engines.backends.BACKENDS`
    runtime: dict[str, str]  # versions of what built it, e.g. {"onnxruntime": "1.32.0"}
    machine: dict[str, str]  # what it was built on, e.g. {"cpu": "...", "arch": "x86_64"}
    label: str  # how reports call it
    network_file: FileName  # in the folder
    network_sha256: str  # fingerprint of the network folder it was built from (`Manifest.fingerprint`)
    dtype: str  # of activations and KV cache
    number_format: str | None = None  # of quantized linears as this engine runs them; None: there are none
    plugins: tuple[str, ...] = ()  # custom ops in place of standard ones
    vocab_size: Positive
    max_positions: Positive  # tokens a sequence may reach
    batch: Positive | None = None  # fixed number of sequences; None: chosen at run time
    capacity: Positive | None  # fixed KV-cache capacity; None: chosen at run time
    cache: tuple[CacheSlot, ...]
    kv_bytes_per_token: Count  # in the engine's own cache dtype
    weight_bytes: Count  # as stored in the engine folder
    structure: StructureJson  # see exporter.graph.structure
    options: dict[str, Any]  # of the backend, e.g. session options


def read_engine_manifest(engine: Path) -> EngineManifest:
    """Read `engine.json` of an engine folder; the files' hashes are the backend's to check when it opens them.

    Raises:
        CheckpointError: not JSON.
        EngineError: no such file, fields are missing, unknown or of the wrong kind, or the schema is another version's.
    """
    path = engine / ENGINE_FILE
    if not os.path.lexists(path):
        raise EngineError(f"not an engine: no {ENGINE_FILE}", file=engine, hint="build one with `engine` first")
    return manifest_from_json(
        read_json(path),
        EngineManifest,
        "engine manifest",
        schema=("engine_schema", ENGINE_SCHEMA),
        other_schema="not an engine manifest of this version",
        hint="build the engine again",
        file=path,
        error=EngineError,
    )


def save_engine(
    output: Path,
    manifest: EngineManifest,
    files: Iterable[tuple[str, Content | bytes]],
    *,
    details: Mapping[str, Any] | None,
    force: bool,
) -> Path:
    """Write an engine folder, `files` (name, content) beside its manifest; returns `output`.

    `details` are those of `Backend.build`; None: backend, label and network.

    Raises:
        OutputError: the output is in the way or cannot be written.
    """
    if details is None:
        details = {
            "backend": manifest.backend,
            "label": manifest.label,
            "network_sha256": manifest.network_sha256,
        }
    contents = [(ENGINE_FILE, json_bytes(manifest.model_dump(mode="json"))), *files]
    save_folder(output, contents, kind=ENGINE_KIND, details=details, force=force)
    return output


def backend_options(manifest: EngineManifest, model: type[Model], file: object) -> Model:
    """Read what a backend keeps in `EngineManifest.options`; `file` names the manifest in errors.

    Raises:
        EngineError: fields are missing, unknown or of the wrong kind.
    """
    return validated(manifest.options, model, "options in the engine manifest", file=file, error=EngineError)


@dataclass(frozen=True, slots=True)
class Environment:
    """What an engine depends on beside its network and settings; both as in `EngineManifest`."""

    runtime: dict[str, str]
    machine: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """What is known of an engine before there is anything that it could be built from."""

    dtype: str  # of activations and KV cache
    max_positions: int  # tokens a sequence may reach
    batch: int | None = None  # fixed number of sequences; None: chosen at run time
    max_batch: int | None = None  # None: as many as there is memory for
    plugins: tuple[str, ...] = ()  # custom ops in place of standard ones


class Runner(Protocol):
    """An opened engine with one KV cache. Not thread-safe; steps follow one another."""

    manifest: EngineManifest

    def start(self, batch: int, capacity: int) -> None:
        """Begin anew: `batch` empty sequences with room for `capacity` tokens each (the room may grow later)."""

    def prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Append right-padded `input_ids` int64 [B, S], of which `lengths` int64 [B] are valid in each row.

        Returns the logits of each row's last valid token, float32 [B, V], valid until the next call. May be called
        again on a filled cache (chunked prefill); a row of length 0 then stays as it is, and its logits mean nothing.
        """

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token per sequence, int64 [B]; returns logits float32 [B, V], valid until the next call."""

    # What benchmarks time. A runner whose logits are elsewhere than in host memory does better than this.

    def prefill_greedy(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """As `prefill`; returns each row's most likely token, int64 [B], of several the first."""
        return self.prefill(input_ids, lengths).argmax(axis=-1)

    def decode_greedy(self, tokens: np.ndarray) -> np.ndarray:
        """As `decode`; returns each row's most likely token, int64 [B], of several the first."""
        return self.decode(tokens).argmax(axis=-1)

    def close(self) -> None:
        """Give everything back."""


class Backend(Protocol):
    """One runtime. Importing a backend's module imports nothing of the runtime itself."""

    name: str

    def missing(self) -> list[str]:
        """Say what this machine lacks to build and run, one actionable sentence each; empty if nothing."""

    def environment(self) -> Environment:
        """What an engine that is built here and now would depend on. Nothing may be `missing`."""

    def build(
        self,
        network: Path,
        output: Path,
        *,
        label: str | None,
        force: bool,
        details: Mapping[str, Any] | None = None,
    ) -> Path:
        """Build an engine folder at `output` from a network-definition folder; returns `output`.

        `details` goes into the folder's manifest; None: what the backend has to say itself.
        """

    def open(self, engine: Path, *, threads: int | None) -> Runner:
        """Open an engine folder after checking its manifest and the hash of every file."""
