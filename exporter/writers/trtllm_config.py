"""config.json of a TensorRT-LLM checkpoint, and what the folder says about itself to our own engine driver.

The config's keys are those of `PretrainedConfig` and `DeciConfig` (TensorRT-LLM 1.1, `models/modeling_utils.py`,
`models/nemotron_nas/config.py`). What they have no word for is in the key `fuselage`, which TensorRT-LLM keeps as an
attribute and writes on into the engine's config; our model class reads it:

    {"model_class": "FuselageForCausalLM",     # null: the stock class builds this checkpoint
     "parallel_groups": [[4, 5], [8, 9, 10]],  # logical layers that read one input
     "ffn_parts": {"3": [65536, 40960]}}       # channels of the parts of an FFN, by logical layer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from exporter import __version__
from exporter.dtypes import DType
from exporter.graph import FFN, Attention, ModelGraph, structure
from exporter.manifests import manifest_from_json
from exporter.network import FileName
from exporter.rope import LinearScaling, Llama3Scaling, Rope
from exporter.safetensors_io import read_json
from exporter.structure import Count, Positive, Sealed, StructureJson
from exporter.writers.files import json_bytes
from exporter.writers.trtllm_formats import KV_ALGOS, Format, exclude_modules
from exporter.writers.trtllm_layout import Layer, Module, Rank, modules_of, stages

CONFIG = "config.json"
CHECKPOINT_KIND = "trtllm-checkpoint"  # of the folder's manifest
CHECKPOINT_FILE = "checkpoint.json"
CHECKPOINT_SCHEMA = 1
MODEL_CLASS = "FuselageForCausalLM"
# `trtllm-build --workers` pickles the class as one of a module of this name, wherever it came from.
MODEL_FILE = "models.py"
ARCHITECTURE = "DeciLMForCausalLM"


class RankFile(Sealed):
    """What one GPU gets."""

    file: FileName
    layers: tuple[Count, Count]  # logical layers [first, last + 1)
    weight_bytes: Count
    kv_bytes_per_token: Count  # of one sequence
    widest_gemm: Count  # outputs of the widest GEMM, gate and up as one: what activations are sized by


class CheckpointManifest(Sealed):
    """What a checkpoint folder says about itself in `checkpoint.json`; files' hashes are in the folder's manifest."""

    checkpoint_schema: int = CHECKPOINT_SCHEMA
    model_class: str | None  # in MODEL_FILE; None: the stock class
    dtype: str  # of the network
    quant_algo: str | None
    kv_cache_quant_algo: str | None
    tp_size: Positive
    pp_size: Positive
    vocab_size: Positive
    max_positions: Positive
    ranks: tuple[RankFile, ...] = Field(min_length=1)
    structure: StructureJson


def read_checkpoint_manifest(folder: Path) -> CheckpointManifest:
    """Read `checkpoint.json` of a folder.

    Raises:
        CheckpointError: there is none, or it is malformed or of another version.
    """
    path = folder / CHECKPOINT_FILE
    return manifest_from_json(
        read_json(path),
        CheckpointManifest,
        "checkpoint manifest",
        schema=("checkpoint_schema", CHECKPOINT_SCHEMA),
        other_schema="not a TensorRT-LLM checkpoint of this version",
        hint="export it again",
        file=path,
    )


def checkpoint_json(manifest: CheckpointManifest) -> bytes:
    """The content of `checkpoint.json`."""
    return json_bytes(manifest.model_dump(mode="json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """Everything about a checkpoint that its config says."""

    graph: ModelGraph
    layers: Sequence[Layer]
    groups: Sequence[range]  # parallel logical layers
    parts: Mapping[int, Sequence[range]]  # of the FFNs that are cut, by logical layer
    format: Format
    dtype: DType
    tp_size: int
    pp_size: int
    split_embedding: bool

    @property
    def stages(self) -> tuple[range, ...]:
        """The logical layers of every pipeline stage."""
        return stages(len(self.layers), self.pp_size)

    def modules(self, number: int, rank: Rank) -> Iterator[Module]:
        """Yield the modules of logical layer `number` on a rank of its stage."""
        return modules_of(self.layers[number], rank, tuple(self.parts.get(number, ())))

    def modules_by_stage(self) -> list[list[list[Module]]]:
        """The modules of every layer of every stage on the first rank of each."""
        first = Rank(0, self.tp_size, 0, self.pp_size)
        return [[list(self.modules(number, first)) for number in stage] for stage in self.stages]

    @property
    def model_class(self) -> str | None:
        """None where TensorRT-LLM's own class builds the same network."""
        return MODEL_CLASS if self.groups or self.parts or not self.format.is_stock else None

    @property
    def kv_cache_algo(self) -> str | None:
        """The format of the KV cache, which is one for all layers; None: the network's dtype."""
        kv = self.graph.attentions[0][1].kv_quantization
        return None if kv is None else KV_ALGOS[kv.dtype]


def config_of(mapped: Mapped) -> dict[str, Any]:
    """Return config.json of a checkpoint."""
    graph = mapped.graph
    excluded = exclude_modules(mapped.format, mapped.modules_by_stage())
    attentions = [attention for _, attention in graph.attentions]
    widths = [layer.block.ffn.intermediate_size for layer in mapped.layers if isinstance(layer.block.ffn, FFN)]
    return {
        "producer": {"name": "fuselage", "version": __version__},
        "architecture": ARCHITECTURE,
        "dtype": mapped.dtype.name,
        "logits_dtype": "float32",
        "vocab_size": graph.vocab_size,
        "hidden_size": graph.hidden_size,
        "num_hidden_layers": len(mapped.layers),
        "num_attention_heads": attentions[0].num_attention_heads,
        "num_key_value_heads": max(attention.num_key_value_heads for attention in attentions),
        "head_size": attentions[0].head_dim,
        "intermediate_size": max(widths, default=graph.hidden_size),
        "hidden_act": "silu",
        "norm_epsilon": graph.norm.eps,
        "max_position_embeddings": graph.max_position_embeddings,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": float(graph.rope.theta),
        "rotary_scaling": rotary_scaling(graph.rope),
        "use_parallel_embedding": mapped.split_embedding,
        "embedding_sharding_dim": 0,
        "mapping": {
            "world_size": mapped.tp_size * mapped.pp_size,
            "tp_size": mapped.tp_size,
            "pp_size": mapped.pp_size,
        },
        "quantization": {
            "quant_algo": mapped.format.algo,
            "kv_cache_quant_algo": mapped.kv_cache_algo,
            **({} if excluded is None else {"exclude_modules": excluded}),
        },
        "layer_configs": [_layer_config(layer) for layer in mapped.layers],
        "fuselage": {
            "model_class": mapped.model_class,
            "parallel_groups": [list(group) for group in mapped.groups],
            "ffn_parts": {str(number): [len(part) for part in parts] for number, parts in mapped.parts.items()},
        },
    }


def rotary_scaling(rope: Rope) -> dict[str, Any] | None:
    """`rotary_scaling` of a rotary embedding that `is_known_rope`."""
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return {"type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return None


def is_known_rope(rope: Rope) -> bool:
    """Whether the config has words for a rotary embedding."""
    return rope.scaling is None or rotary_scaling(rope) is not None


def manifest_of(mapped: Mapped, rank_files: Sequence[RankFile]) -> CheckpointManifest:
    """Return what `checkpoint.json` says."""
    return CheckpointManifest(
        model_class=mapped.model_class,
        dtype=mapped.dtype.name,
        quant_algo=mapped.format.algo,
        kv_cache_quant_algo=mapped.kv_cache_algo,
        tp_size=mapped.tp_size,
        pp_size=mapped.pp_size,
        vocab_size=mapped.graph.vocab_size,
        max_positions=mapped.graph.max_position_embeddings,
        ranks=tuple(rank_files),
        structure=structure(mapped.graph),
    )


def _layer_config(layer: Layer) -> dict[str, Any]:
    attention, ffn = layer.block.attention, layer.block.ffn
    is_attention, is_mlp = isinstance(attention, Attention), isinstance(ffn, FFN)
    return {
        "attention": {
            "impl": "no_op" if attention is None else "attention" if is_attention else "linear",
            "num_key_value_heads": attention.num_key_value_heads if isinstance(attention, Attention) else None,
        },
        "ffn": {
            "impl": "no_op" if ffn is None else "mlp" if is_mlp else "linear",
            "intermediate_size": ffn.intermediate_size if isinstance(ffn, FFN) else None,
        },
    }
