"""What every runtime looks like to the rest of the program, and the manifest of an engine folder.

Shape letters: B = batch (sequences side by side), S = tokens of one call, V = vocab_size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

ENGINE_SCHEMA = 1


class CacheSlot(BaseModel):
    """The KV cache of one attention: two buffers [B, num_key_value_heads, capacity, head_dim] of the engine's dtype."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str  # name of the network's key-cache input
    value: str
    num_key_value_heads: int
    head_dim: int


class EngineManifest(BaseModel):
    """What an engine folder says about itself in `engine.json`; the files' hashes are in the folder's manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine_schema: int = ENGINE_SCHEMA
    backend: str  # a key of `engines.BACKENDS`
    runtime: dict[str, str]  # versions of what built it, e.g. {"onnxruntime": "1.32.0"}
    machine: dict[str, str]  # what it was built on, e.g. {"cpu": "...", "arch": "x86_64"}
    label: str  # how reports call it
    network_file: str  # path inside the folder
    network_sha256: str  # of the network definition it was built from
    dtype: str  # of activations, weights and KV cache
    vocab_size: int
    max_positions: int  # tokens a sequence may reach
    capacity: int | None  # fixed KV-cache capacity; None: chosen at run time
    cache: tuple[CacheSlot, ...]
    kv_bytes_per_token: int  # in the engine's own cache dtype
    weight_bytes: int  # as stored in the engine folder
    structure: dict[str, Any]  # see exporter.graph.structure
    options: dict[str, Any]  # of the backend, e.g. session options


class Runner(Protocol):
    """An opened engine with one KV cache. Not thread-safe; steps follow one another."""

    manifest: EngineManifest

    def start(self, batch: int, capacity: int) -> None:
        """Begin anew: `batch` empty sequences with room for `capacity` tokens each (the room may grow later)."""

    def prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Append right-padded `input_ids` int64 [B, S], of which `lengths` int64 [B] are valid in each row.

        Returns the logits of each row's last valid token, float32 [B, V], valid until the next call. May be called
        again on a filled cache (chunked prefill).
        """

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token per sequence, int64 [B]; returns logits float32 [B, V], valid until the next call."""

    def close(self) -> None:
        """Give everything back."""


class Backend(Protocol):
    """One runtime. Importing a backend's module imports nothing of the runtime itself."""

    name: str

    def missing(self) -> list[str]:
        """Say what this machine lacks to build and run, one actionable sentence each; empty if nothing."""

    def build(self, network: Path, output: Path, *, label: str | None, force: bool) -> Path:
        """Build an engine folder at `output` from a network-definition folder; returns `output`."""

    def open(self, engine: Path, *, threads: int | None) -> Runner:
        """Open an engine folder after checking its manifest and the hash of every file."""
