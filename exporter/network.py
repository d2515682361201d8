"""The I/O contract of an exported network: what a runtime has to bind, whatever format the network is in.

Shape letters: B = sequences side by side, S = tokens of one call, V = vocab_size, C = cache capacity,
Hkv = num_key_value_heads of one attention, d = head_dim.

One call appends S tokens to each sequence and returns the logits of what follows one of them, of each sequence:

| name            | dtype   | shape          | meaning                                                              |
|-----------------|---------|----------------|----------------------------------------------------------------------|
| `input_ids`     | int64   | [B, S]         | right-padded; what the padding holds does not matter                 |
| `position_ids`  | int64   | [B, S]         | absolute position of every token, below `max_positions`              |
| `cache_write`   | int64   | [B]            | first cache position written by this call: tokens the row holds      |
| `logits_index`  | int64   | [B]            | which of the S tokens the logits are wanted of                       |
| `past_k_i`, `past_v_i`       | network's | [B, Hkv, C, d] | the cache of KV slot i; finite everywhere (zero-filled)  |
| `logits`        | float32 | [B, V]         |                                                                      |
| `next_tokens`   | int64   | [B]            | first of the largest of each row of `logits`; see `chooses_tokens`     |
| `present_k_i`, `present_v_i` | network's | [B, Hkv, C, d] | `past_*` with the S tokens written; the same buffer     |

A token at position p attends to cache positions <= p, so padding needs no mask of its own: it writes behind its row's
last token, nothing valid looks there, and the next call writes over it. `cache_write + S <= C` is the caller's to
check (TensorRT ignores a write beyond the cache silently).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from exporter.manifests import manifest_from_json
from exporter.structure import Count, Positive, Sealed, StructureJson

NETWORK_FILE = "network.json"
NETWORK_KIND = "network"  # of the folder's manifest
NETWORK_SCHEMA = 1

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
CACHE_WRITE = "cache_write"
LOGITS_INDEX = "logits_index"
LOGITS = "logits"
NEXT_TOKENS = "next_tokens"

# A file directly in the folder: network definitions name their weight files by relative path.
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$"
FileName = Annotated[str, StringConstraints(pattern=FILE_NAME, max_length=200)]


class CacheSlot(Sealed):
    """The KV cache of one attention: two buffers [B, num_key_value_heads, capacity, head_dim] of the network's dtype.

    The four names are those of the network's inputs and outputs; a past and its present are bound to one buffer.
    """

    key: str
    value: str
    present_key: str
    present_value: str
    num_key_value_heads: Positive
    head_dim: Positive

    def elements_per_position(self) -> int:
        """Elements that one token of one sequence takes, keys and values together."""
        return 2 * self.num_key_value_heads * self.head_dim


class NetworkVariant(Sealed):
    """One network definition; those of one folder share weight files and differ in form."""

    file: FileName
    target: str  # the runtime whose preset it follows, e.g. "onnxruntime"
    dtype: str  # of activations and KV cache; logits are float32
    batch: Positive | None  # fixed B; None: any
    capacity: Positive | None  # fixed C; None: any
    max_positions: Positive  # tokens a sequence may reach
    weight_files: tuple[FileName, ...]  # those that this network refers to
    number_format: str | None = None  # of quantized linears, e.g. "int8 (W8A8 static)"; None: there are none
    options: dict[str, Any]  # of the writer, for people and for comparison

    @property
    def plugins(self) -> tuple[str, ...]:
        """Custom ops in place of standard ones, of `exporter.writers.onnx_options.PLUGINS`."""
        return tuple(self.options.get("plugins", ()))

    @property
    def chooses_tokens(self) -> bool:
        """Whether there is an output `next_tokens`."""
        return bool(self.options.get("choose_tokens", False))


class NetworkManifest(Sealed):
    """What a network folder says about itself in `network.json`; files' hashes are in the folder's manifest."""

    network_schema: int = NETWORK_SCHEMA
    vocab_size: Positive
    inputs: tuple[str, ...]  # without the caches
    outputs: tuple[str, ...]  # of all networks, without the caches; one that `chooses_tokens` has another
    cache: tuple[CacheSlot, ...]  # in the order of `ModelGraph.kv_slots`
    weight_bytes: Count  # of all tensors in all weight files
    structure: StructureJson
    networks: tuple[NetworkVariant, ...] = Field(min_length=1)


def network_manifest_from_json(document: Any, file: object) -> NetworkManifest:
    """Check parsed JSON and make it a manifest; `file` names it in errors.

    Raises:
        CheckpointError: fields are missing, unknown or of the wrong kind, or the schema is another version's.
    """
    return manifest_from_json(
        document,
        NetworkManifest,
        "network manifest",
        schema=("network_schema", NETWORK_SCHEMA),
        other_schema="not a network manifest of this version",
        hint="export the network again",
        file=file,
    )
