"""What a family's two tables look like, and the validated meaning of a config: a `ModelSpec`.

A config.json is untrusted data. pydantic holds it against types and bounds (strictly: "32", 32.0 or true are not 32);
everything a table does not read is ignored, as every reader of these files does, except what would change the
arithmetic, which is refused by name: `NEUTRAL`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from exporter.architectures.quantization import QuantizationSpec, quantization_from_config
from exporter.errors import CheckpointError
from exporter.graph import Activation
from exporter.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling

# Bounds are far beyond any model and far below what a hostile number could make us allocate.
Size = Annotated[int, Field(gt=0, le=1 << 24)]
Heads = Annotated[int, Field(gt=0, le=1 << 16)]
Layers = Annotated[int, Field(gt=0, le=8192)]
Positions = Annotated[int, Field(gt=0, le=1 << 30)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Factor = Annotated[float, Field(ge=1e-6, le=1e12, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class FFNSpec:
    intermediate_size: int
    activation: Activation
    bias: bool = False
    segments: tuple[tuple[int, int], ...] | None = None  # (source layer, width); None: the layer itself


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """A matrix in place of an attention or an FFN."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    attention: AttentionSpec | LinearSpec | None
    ffn: FFNSpec | LinearSpec | None
    source_layers: tuple[int, ...] | None = None  # None: the layer's own number


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A config.json, understood: everything needed to know the name and shape of every tensor."""

    hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str  # of a structure-only graph; with weights the tensors' own dtype counts
    layers: tuple[LayerSpec, ...]
    quantization: QuantizationSpec | None = None


Windows = Sequence[int | None]  # the attention window of every layer, None for all positions
Keys = dict[str, Any]  # of a config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of checkpoints. Both directions use the same tables: reading and writing.

    `config_keys` says what all layers have in common, but for their windows, in the family's words, beside the keys
    that all families share; None where it has no words for that. A family without it is read and never written, but
    for Nemotron-NAS, whose config describes every layer by itself.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config: type[DecoderConfig]
    # role -> name; "{layer}" is the layer number; linears without .weight / .bias. A family that stores some of them as
    # one matrix, their rows in this order, has "attention.qkv_proj" or "ffn.gate_up_proj" in their place.
    tensors: Mapping[str, str]
    unused: tuple[str, ...] = ()  # names that may occur and carry nothing
    config_keys: Callable[[AttentionSpec, FFNSpec, Windows], Keys | None] | None = None


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", populate_by_name=True)


class RopeTable(_Table):
    """`rope_scaling` (legacy, with `type` or `rope_type`) or `rope_parameters` (transformers >= 5)."""

    rope_type: str = Field("default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: Factor | None = None
    factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: Positions | None = None
    beta_fast: Factor | None = None
    beta_slow: Factor | None = None
    attention_factor: Factor | None = None
    mscale: Factor | None = None
    mscale_all_dim: Factor | None = None
    truncate: bool = True
    partial_rotary_factor: Factor = 1.0
    llama_4_scaling_beta: float | None = None  # Ministral 3

    @model_validator(mode="before")
    @classmethod
    def _refuse_nested(cls, table: Any) -> Any:
        """Transformers nests one table per kind of layer where they differ (`layer_types`)."""
        nested = [key for key, value in table.items() if isinstance(value, dict)] if isinstance(table, dict) else []
        if nested:
            raise ValueError(f"a RoPE of its own for each kind of layer ({nested[0][:40]}) is not supported")
        return table

    def rope(self, theta: float, max_position_embeddings: int) -> Rope:
        if self.partial_rotary_factor != 1.0:
            raise CheckpointError("partial rotary embedding is not supported", found=self.partial_rotary_factor)
        if self.llama_4_scaling_beta:
            raise CheckpointError("queries scaled by position are not supported", found=self.llama_4_scaling_beta)
        theta = self.rope_theta if self.rope_theta is not None else theta
        if theta <= 1:
            raise CheckpointError("rope_theta is greater than 1", found=theta)
        return Rope(theta=theta, scaling=self._scaling(max_position_embeddings))

    def _scaling(self, max_position_embeddings: int) -> LinearScaling | Llama3Scaling | YarnScaling | None:
        if self.rope_type == "default":
            return None
        if self.rope_type == "linear":
            return LinearScaling(factor=self._required("factor"))
        if self.rope_type == "llama3":
            scaling = Llama3Scaling(
                factor=self._required("factor"),
                low_freq_factor=self._required("low_freq_factor"),
                high_freq_factor=self._required("high_freq_factor"),
                original_max_position_embeddings=self._required("original_max_position_embeddings"),
            )
            if scaling.high_freq_factor <= scaling.low_freq_factor:
                raise CheckpointError(
                    "rope scaling: high_freq_factor is greater than low_freq_factor",
                    expected=f"more than {scaling.low_freq_factor}",
                    found=scaling.high_freq_factor,
                )
            return scaling
        if self.rope_type == "yarn":
            original = self.original_max_position_embeddings or max_position_embeddings
            return YarnScaling(
                factor=self.factor if self.factor is not None else max_position_embeddings / original,
                original_max_position_embeddings=original,
                beta_fast=self.beta_fast or 32.0,
                beta_slow=self.beta_slow or 1.0,
                attention_factor=self.attention_factor,
                mscale=self.mscale,
                mscale_all_dim=self.mscale_all_dim,
                truncate=self.truncate,
            )
        raise CheckpointError(
            "this kind of RoPE scaling is not supported", expected="default, linear, llama3, yarn", found=self.rope_type
        )

    def _required(self, key: str) -> Any:
        value = getattr(self, key)
        if value is None:
            raise CheckpointError(f"rope scaling of type {self.rope_type!r} needs {key!r}")
        return value


class AttentionBlock(_Table):
    """`attention` of a `block_configs` entry: DeciLM says `n_heads_in_group`, puzzletron `num_key_value_heads`."""

    no_op: bool = False
    replace_with_linear: bool = False
    n_heads_in_group: Heads | None = None
    num_key_value_heads: Heads | None = None
    window_length: Any = None
    num_sink_tokens: Any = None
    sparsify: Any = None
    mamba: Any = None
    llama4: Any = None


class FFNBlock(_Table):
    """`ffn` of a `block_configs` entry: DeciLM says `ffn_mult`, puzzletron `intermediate_size`."""

    no_op: bool = False
    replace_with_linear: bool = False
    ffn_mult: Factor | None = None
    intermediate_size: Size | None = None
    hidden_act: Activation | None = None
    gated: bool | None = None
    sparsify: Any = None
    moe: Any = None


class BlockConfig(_Table):
    attention: AttentionBlock
    ffn: FFNBlock
    parallel_blocks: Any = None


class WrittenBlock(_Table):
    """What we remember of a block in folders we write: where it came from."""

    source_layers: list[Annotated[int, Field(ge=0)]]
    segments: list[tuple[Annotated[int, Field(ge=0)], Size]] | None = None
    sliding_window: Positions | None = None


class WrittenModel(_Table):
    """The `fuselage` key of a config.json that we wrote; other readers ignore it."""

    qk_norm: bool = False
    blocks: list[WrittenBlock]


# Keys that some family or some reader of ours computes with and that leave no trace among the tensors, each with the
# value (or, of a list, the element) under which it changes nothing. A table that reads one has a field of its name.
NEUTRAL: Mapping[str, object] = {
    "is_causal": True,  # transformers >= 5 and vLLM, of every family: embedding models see both ways
    "layer_types": "full_attention",
    "attention_chunk_size": None,
    "no_rope_layers": 1,
    "rope_interleaved": False,
    "rotary_pct": 1,
    "rope_pct": 1,
    "alibi": False,
    "clip_qkv": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attn_temperature_tuning": False,
    "llama_4_scaling": None,  # vLLM, of Mistral
    "use_parallel_residual": False,
    "parallel_attn": False,
    "scale_emb": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,  # vLLM, of Llama
}


def refuse_unread(config: Mapping[str, Any], table: type[DecoderConfig]) -> None:
    """Raise CheckpointError for a key of `NEUTRAL` that `table` does not read and that would change the arithmetic."""
    for key, neutral in NEUTRAL.items():
        value = config.get(key)
        if value is None or key in table.model_fields:
            continue
        if any(element != neutral for element in (value if isinstance(value, list) else [value])):
            raise CheckpointError(
                f"{key!r} would change the arithmetic, and is not supported in this family",
                found=value,
                hint="if the model is run without it, remove the key",
            )


class DecoderConfig(_Table):
    """The config spellings that the families share; a family overrides fields or the properties below."""

    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Heads
    vocab_size: Size
    max_position_embeddings: Positions
    rms_norm_eps: Epsilon
    intermediate_size: Size | None = None
    num_key_value_heads: Heads | None = None
    head_dim: Heads | None = None
    hidden_act: Activation = Activation.SILU
    rope_theta: Factor = 10000.0
    rope_scaling: RopeTable | None = None
    rope_parameters: RopeTable | None = None
    original_max_position_embeddings: Positions | None = None
    partial_rotary_factor: Factor = 1.0
    attention_multiplier: Factor | None = None
    tie_word_embeddings: bool = False
    dtype: str | None = Field(None, validation_alias=AliasChoices("torch_dtype", "dtype"))
    block_configs: list[BlockConfig] | None = None
    per_layer_config: Any = None
    quantization_config: Any = None

    qk_norm: ClassVar[bool] = False

    # Which biases the family's linears have.
    @property
    def qkv_bias(self) -> bool:
        return False

    @property
    def o_bias(self) -> bool:
        return False

    @property
    def ffn_bias(self) -> bool:
        return False

    def sliding_window_of(self, layer: int) -> int | None:
        """The attention window of a layer, None for all positions."""
        return None

    def spec(self) -> ModelSpec:
        """Work out the per-layer structure.

        Raises:
            CheckpointError: sizes that contradict each other, or a feature that would change the arithmetic.
        """
        if self.partial_rotary_factor != 1.0:
            raise CheckpointError("partial rotary embedding is not supported", found=self.partial_rotary_factor)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                "num_attention_heads divides hidden_size", expected=self.hidden_size, found=self.num_attention_heads
            )
        if self.per_layer_config is not None:
            raise CheckpointError("'per_layer_config' is not supported", hint="block_configs says the same")
        return ModelSpec(
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.rms_norm_eps,
            rope=self.rope(),
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=self.tie_word_embeddings,
            dtype=self.dtype or "bfloat16",
            layers=self.layers(),
            quantization=None
            if self.quantization_config is None
            else quantization_from_config(self.quantization_config),
        )

    def rope(self) -> Rope:
        """The rotary embedding, from whichever of the two spellings is there; both must say the same."""
        tables = [table for table in (self.rope_scaling, self.rope_parameters) if table is not None]
        for table in tables:
            theta, original = table.rope_theta, table.original_max_position_embeddings
            for key, inner, outer in (
                ("rope_theta", theta, self.rope_theta if "rope_theta" in self.model_fields_set else None),
                ("original_max_position_embeddings", original, self.original_max_position_embeddings),
            ):
                if inner is not None and outer is not None and inner != outer:
                    raise CheckpointError(f"{key} is given twice", expected=outer, found=inner)
        ropes = [self._rope(table) for table in tables or [RopeTable.model_validate({})]]
        if ropes[0] != ropes[-1]:
            raise CheckpointError("rope_scaling and rope_parameters differ", hint="keep the one that is right")
        return ropes[0]

    def _rope(self, table: RopeTable) -> Rope:
        if self.original_max_position_embeddings is not None:
            table = table.model_copy(update={"original_max_position_embeddings": self.original_max_position_embeddings})
        return table.rope(self.rope_theta, self.max_position_embeddings)

    def layers(self) -> tuple[LayerSpec, ...]:
        """One entry per layer: the model-wide sizes, or `block_configs` where the config has them."""
        if self.block_configs is None:
            if self.intermediate_size is None:
                raise CheckpointError("config has no intermediate_size")
            return tuple(
                LayerSpec(
                    self.attention_spec(layer, self.num_key_value_heads or self.num_attention_heads),
                    FFNSpec(self.intermediate_size, self.hidden_act, self.ffn_bias),
                )
                for layer in range(self.num_hidden_layers)
            )
        if len(self.block_configs) != self.num_hidden_layers:
            raise CheckpointError(
                "block_configs has one entry per layer", expected=self.num_hidden_layers, found=len(self.block_configs)
            )
        return tuple(self.layer_spec(layer, block) for layer, block in enumerate(self.block_configs))

    def layer_spec(self, layer: int, block: BlockConfig) -> LayerSpec:
        """Translate one `block_configs` entry."""
        for part, keys in (
            (block.attention, ("window_length", "num_sink_tokens", "sparsify", "mamba", "llama4")),
            (block.ffn, ("sparsify", "moe")),
            (block, ("parallel_blocks",)),
        ):
            for key in keys:
                if getattr(part, key) is not None:
                    raise CheckpointError(f"block_configs[{layer}]: {key!r} is not supported", found=getattr(part, key))
        for name, sublayer in (("attention", block.attention), ("ffn", block.ffn)):
            if sublayer.no_op and sublayer.replace_with_linear:
                raise CheckpointError(f"block_configs[{layer}].{name} is both no_op and replace_with_linear")
        if block.ffn.gated is False:
            raise CheckpointError(f"block_configs[{layer}].ffn: an FFN without a gate is not supported")
        attention: AttentionSpec | LinearSpec | None
        if block.attention.no_op:
            attention = None
        elif block.attention.replace_with_linear:
            attention = LinearSpec()
        else:
            attention = self.attention_spec(layer, self.kv_heads_of(layer, block.attention))
        ffn: FFNSpec | LinearSpec | None
        if block.ffn.no_op:
            ffn = None
        elif block.ffn.replace_with_linear:
            ffn = LinearSpec()
        else:
            ffn = FFNSpec(self.width_of(layer, block.ffn), block.ffn.hidden_act or self.hidden_act, self.ffn_bias)
        return LayerSpec(attention, ffn)

    def attention_spec(self, layer: int, num_key_value_heads: int) -> AttentionSpec:
        if self.num_attention_heads % num_key_value_heads:
            raise CheckpointError(
                f"layer {layer}: key-value heads divide the attention heads",
                expected=f"a divisor of {self.num_attention_heads}",
                found=num_key_value_heads,
            )
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if head_dim % 2:
            raise CheckpointError("head_dim is even", found=head_dim)
        scale = head_dim**-0.5
        if self.attention_multiplier is not None and not math.isclose(self.attention_multiplier, scale, rel_tol=1e-6):
            raise CheckpointError(
                "attention_multiplier is 1 / sqrt(head_dim)", expected=scale, found=self.attention_multiplier
            )
        return AttentionSpec(
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            qk_norm=self.qk_norm,
            sliding_window=self.sliding_window_of(layer),
        )

    def kv_heads_of(self, layer: int, block: AttentionBlock) -> int:
        if block.n_heads_in_group is None and block.num_key_value_heads is not None:
            return block.num_key_value_heads
        if block.n_heads_in_group is None:
            raise CheckpointError(
                f"block_configs[{layer}].attention has neither n_heads_in_group nor num_key_value_heads"
            )
        if self.num_attention_heads % block.n_heads_in_group:
            raise CheckpointError(
                f"block_configs[{layer}].attention: n_heads_in_group divides the attention heads",
                expected=f"a divisor of {self.num_attention_heads}",
                found=block.n_heads_in_group,
            )
        kv_heads = self.num_attention_heads // block.n_heads_in_group
        if block.num_key_value_heads not in (None, kv_heads):
            raise CheckpointError(
                f"block_configs[{layer}].attention: n_heads_in_group and num_key_value_heads differ",
                expected=kv_heads,
                found=block.num_key_value_heads,
            )
        return kv_heads

    def width_of(self, layer: int, block: FFNBlock) -> int:
        if block.ffn_mult is None and block.intermediate_size is not None:
            return block.intermediate_size
        if block.ffn_mult is None:
            raise CheckpointError(f"block_configs[{layer}].ffn has neither ffn_mult nor intermediate_size")
        width = width_from_ffn_mult(block.ffn_mult, self.hidden_size)
        if not 0 < width <= 1 << 24:
            raise CheckpointError(f"block_configs[{layer}].ffn: ffn_mult gives an absurd width", found=width)
        if block.intermediate_size not in (None, width):
            raise CheckpointError(
                f"block_configs[{layer}].ffn: ffn_mult and intermediate_size differ",
                expected=width,
                found=block.intermediate_size,
            )
        return width


class AttentionBiasConfig(DecoderConfig):
    """One key says whether q, k, v and o have biases (Llama, Qwen 3)."""

    attention_bias: bool = False

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def o_bias(self) -> bool:
        return self.attention_bias


class LayerTypesConfig(DecoderConfig):
    """`layer_types` names the layers whose attention has the window (Mistral, Qwen 2 and 3)."""

    layer_types: list[str] | None = None

    def is_sliding(self, layer: int, otherwise: bool) -> bool:
        """Whether a layer is one of them, `otherwise` where the config has no list."""
        if self.layer_types is None:
            return otherwise
        if len(self.layer_types) != self.num_hidden_layers:
            raise CheckpointError(
                "layer_types has one entry per layer", expected=self.num_hidden_layers, found=len(self.layer_types)
            )
        kind = self.layer_types[layer]
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"layer_types[{layer}]: unknown kind of attention", found=kind)
        return kind == "sliding_attention"


WIDTH_MULTIPLE = 256


def width_from_ffn_mult(ffn_mult: float, hidden_size: int) -> int:
    """The rule of every Nemotron-NAS reader: int(2/3 * ffn_mult * hidden_size), rounded up to a multiple of 256.

    Source: `_ffn_mult_to_intermediate_size` in vLLM's, SGLang's and TensorRT-LLM's nemotron_nas models.
    """
    return -(-int(2 * ffn_mult * hidden_size / 3) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def ffn_mult_from_width(width: int, hidden_size: int) -> float:
    """The inverse of `width_from_ffn_mult` for multiples of 256; exact also after rounding to 6 decimals."""
    return 1.5 * width / hidden_size


# Names that the families of this package share; a family's table is this one or adds to it.
LLAMA_TENSORS: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head",
    "attention.norm": "model.layers.{layer}.input_layernorm.weight",
    "attention.q_proj": "model.layers.{layer}.self_attn.q_proj",
    "attention.k_proj": "model.layers.{layer}.self_attn.k_proj",
    "attention.v_proj": "model.layers.{layer}.self_attn.v_proj",
    "attention.o_proj": "model.layers.{layer}.self_attn.o_proj",
    "attention.q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "attention.k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "attention.linear": "model.layers.{layer}.self_attn.linear_attn",
    "ffn.norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "ffn.gate_proj": "model.layers.{layer}.mlp.gate_proj",
    "ffn.up_proj": "model.layers.{layer}.mlp.up_proj",
    "ffn.down_proj": "model.layers.{layer}.mlp.down_proj",
    "ffn.linear": "model.layers.{layer}.mlp.linear_mlp",
}

# Buffers that old transformers versions saved: recomputed from the config by every reader.
LLAMA_UNUSED: tuple[str, ...] = (
    "model.rotary_emb.inv_freq",
    "model.layers.{layer}.self_attn.rotary_emb.inv_freq",
)
