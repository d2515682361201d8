"""Hugging Face folders: a plain family where the graph still is one, the Nemotron-NAS layout for everything else.

The Nemotron-NAS layout (`DeciLMForCausalLM`, the published Super-49B and Ultra-253B) is Llama with one `block_configs`
entry per layer. What it has no word for goes two ways:
 - exact rewriting (`as_written`): empty blocks are left out and their source layers are then in no block; FFN widths
   are padded with zero channels to a multiple of 256; where some linears of a kind have a bias, the others get a zero
   one, because `attention_bias` and `mlp_bias` hold for the whole model.
 - the `fuselage` key of config.json (`WrittenModel`): source layers, segments, q/k norms, sliding windows. Our reader
   and our modeling code, which lies beside the weights, read it; `hf_readers` knows who else would miss what.
Everything else is refused by `check`. Tensors keep their dtypes; `torch_dtype` is that of the embedding, and readers
that know one dtype only cast to it. Quantized linears have scales beside their codes, see `hf_quantization`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from exporter.architectures import FAMILIES, llama, nemotron_nas
from exporter.architectures.base import (
    WIDTH_MULTIPLE,
    AttentionSpec,
    FFNSpec,
    Keys,
    WrittenBlock,
    WrittenModel,
    ffn_mult_from_width,
    width_from_ffn_mult,
)
from exporter.architectures.quantization import HF_QUANT_CONFIG, MODELOPT, Layout
from exporter.dtypes import DType
from exporter.errors import FuselageError, TargetError, raise_all
from exporter.graph import (
    FFN,
    Activation,
    Attention,
    Block,
    KVQuantization,
    Linear,
    LinearSublayer,
    ModelGraph,
    ParallelBlocks,
    RMSNorm,
    linear_names,
    linears,
    members,
    weights,
)
from exporter.lazy import LazyTensor, concat, full, pad
from exporter.read import Checkpoint
from exporter.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from exporter.safetensors_io import INDEX_FILE, shard_tensors
from exporter.writers import hf_quantization
from exporter.writers.files import Content, FileCopy, json_bytes
from exporter.writers.model_wide import differences

CONFIG = "config.json"
NEMOTRON_NAS = nemotron_nas.FAMILY.name
REMOTE_CODE = Path(__file__).parent / "hf_remote_code"
AUTO_MAP = {
    "AutoConfig": "configuration_decilm.DeciLMConfig",
    "AutoModel": "modeling_decilm.DeciLMModel",
    "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
}
# Keys of the source's config.json that do not change what the graph computes and that users expect to survive.
TAKEN_OVER = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "use_cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to write a folder, and what of its source goes into it."""

    shard_bytes: int = 5_000_000_000  # a larger tensor gets a file of its own
    assets: Mapping[str, Path] = field(default_factory=dict)  # tokenizer files and the like, copied by name
    config: Mapping[str, Any] = field(default_factory=dict)  # the source's config.json; see TAKEN_OVER
    family: str = llama.FAMILY.name  # the source's; a graph that still fits it is written as such
    quantization_layout: str | None = None  # "modelopt" or "compressed-tensors"; None: by the graph's quantization


def check(graph: ModelGraph, options: Options) -> list[FuselageError]:
    """Return everything a Hugging Face folder cannot express, block by block; `block` counts `graph.blocks`."""
    return [*_problems(graph), *hf_quantization.check(graph, options.quantization_layout)]


def emit(graph: ModelGraph, options: Options) -> Iterator[tuple[str, Content | bytes]]:
    """Return the folder's files: config, code, weights in the order of the forward pass, assets. Reads no weight yet.

    Raises:
        TargetError: `check` finds a problem; at once, not at the first file.
    """
    raise_all(check(graph, options))
    return _files(graph, options)


def with_source(options: Options, checkpoint: Checkpoint, graph: ModelGraph) -> Options:
    """Return the options with what the folder of `graph`, made from `checkpoint`, takes over from its source."""
    kept = hf_quantization.layout_to_keep(graph, checkpoint.quantization_layout)
    return replace(
        options,
        assets=checkpoint.assets,
        config=checkpoint.config,
        family=checkpoint.family.name,
        quantization_layout=options.quantization_layout or kept,
    )


def layout_of(graph: ModelGraph, options: Options) -> str:
    """Return the family a graph is written as: a plain one that has words for it, its own first, or "nemotron-nas"."""
    return next((name for name in (options.family, *FAMILIES) if _plain_keys(graph, name) is not None), NEMOTRON_NAS)


def config_of(graph: ModelGraph, options: Options) -> dict[str, Any]:
    """Return config.json for a graph that `check` accepts."""
    layout, written = folder_of(graph, options)
    if layout == NEMOTRON_NAS:
        config = _nemotron_nas_config(written, options)
    else:
        config = _config(written, options, layout) | (_plain_keys(written, layout) or {})
    table = FAMILIES[layout].tensors
    quantization = hf_quantization.quantization_of(written, table, options.quantization_layout)
    if quantization is not None:
        config["quantization_config"] = hf_quantization.quantization_config(quantization, table)
    return config


def folder_of(graph: ModelGraph, options: Options) -> tuple[str, ModelGraph]:
    """Return the family a graph is written as and the graph that the folder's readers see."""
    layout = layout_of(graph, options)
    return layout, as_written(graph) if layout == NEMOTRON_NAS else graph


def as_written(graph: ModelGraph) -> ModelGraph:
    """Return the graph that a reader of the Nemotron-NAS folder sees; it computes the same (see the module's text)."""
    attention_bias = any(
        linear.bias is not None for _, part in _sublayers(graph, Attention) for linear in linears(part).values()
    )
    ffn_bias = any(linear.bias is not None for _, part in _sublayers(graph, FFN) for linear in linears(part).values())

    def written(block: Block) -> Block:
        attention, ffn = block.attention, block.ffn
        if isinstance(attention, Attention) and attention_bias:
            attention = _with_biases(attention)
        if isinstance(ffn, FFN):
            ffn = _padded(_with_biases(ffn) if ffn_bias else ffn)
        return replace(block, attention=attention, ffn=ffn)

    return replace(graph, blocks=tuple(written(block) for block in graph.flat_blocks if not block.is_empty))


def _files(graph: ModelGraph, options: Options) -> Iterator[tuple[str, Content | bytes]]:
    layout, written = folder_of(graph, options)
    table = FAMILIES[layout].tensors
    yield CONFIG, json_bytes(config_of(graph, options))
    if layout == NEMOTRON_NAS:
        for path in sorted(REMOTE_CODE.glob("*.py")):
            yield path.name, FileCopy(path)
    quantization = hf_quantization.quantization_of(written, table, options.quantization_layout)
    if quantization is not None and quantization.layout is MODELOPT:
        yield HF_QUANT_CONFIG, json_bytes(hf_quantization.hf_quant_config(quantization, table))
    scales = None if quantization is None else quantization.layout
    shards = shard_tensors(dict(_named_tensors(written, table, scales)), options.shard_bytes)
    if shards.index is not None:
        yield INDEX_FILE, json_bytes(shards.index)
    yield from shards.files.items()
    for name, path in options.assets.items():
        yield name, FileCopy(path)


def _named_tensors(
    graph: ModelGraph, table: Mapping[str, str], quantized: Layout | None
) -> Iterator[tuple[str, LazyTensor]]:
    """Yield every tensor with its name, in the order of the forward pass.

    `quantized` is the layout of the scales, None if there are none. The roles in `table` are the field names of the
    graph's classes, so a sublayer needs no list of its own here.
    """

    def named(role: str, layer: int, part: Any) -> Iterator[tuple[str, LazyTensor]]:
        if isinstance(part, RMSNorm):
            yield table[role].format(layer=layer), part.weight
        elif isinstance(part, Linear):
            stem = table[role].format(layer=layer)
            yield f"{stem}.weight", part.weight
            if part.bias is not None:
                yield f"{stem}.bias", part.bias
            if quantized is not None:
                yield from hf_quantization.scales(quantized, stem, part)
        elif isinstance(part, KVQuantization) and quantized is not None:
            attention = table["attention.k_proj"].format(layer=layer).rpartition(".")[0]
            yield from hf_quantization.kv_scales(quantized, attention, part)

    yield table["embedding"], graph.embedding
    for layer, block in enumerate(graph.flat_blocks):
        for kind, sublayer in (("attention", block.attention), ("ffn", block.ffn)):
            for entry in fields(sublayer) if sublayer is not None else ():
                yield from named(f"{kind}.{entry.name}", layer, getattr(sublayer, entry.name))
    yield from named("norm", 0, graph.norm)
    yield from named("lm_head", 0, graph.lm_head)


# --- config.json


def _config(graph: ModelGraph, options: Options, layout: str) -> dict[str, Any]:
    """The keys that all families share.

    RoPE is written with the keys of transformers 4: 5 converts them, and mlx-lm knows no others.
    """
    # Without attention any head size will do, but readers want one, and an even one.
    heads = graph.attentions[0][1].num_attention_heads if graph.attentions else 1
    activations = [ffn.activation for _, ffn in _sublayers(graph, FFN)]
    return {
        "architectures": [FAMILIES[layout].architectures[0]],
        "model_type": FAMILIES[layout].model_types[0],
        "torch_dtype": graph.dtype.torch,
        "vocab_size": graph.vocab_size,
        "hidden_size": graph.hidden_size,
        "num_hidden_layers": len(graph.blocks),
        "num_attention_heads": heads,
        "head_dim": graph.head_dim or 2,
        "hidden_act": (activations[0] if activations else Activation.SILU).value,
        "rms_norm_eps": graph.norm.eps,
        "max_position_embeddings": graph.max_position_embeddings,
        "rope_theta": float(graph.rope.theta),
        "rope_scaling": _rope_scaling(graph.rope),
        "tie_word_embeddings": graph.lm_head is None,
        **{key: options.config[key] for key in TAKEN_OVER if key in options.config},
    }


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.scaling is None:
        return None
    rope_type = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}[type(rope.scaling)]
    values = {entry.name: getattr(rope.scaling, entry.name) for entry in fields(rope.scaling)}
    return {"rope_type": rope_type, **{key: value for key, value in values.items() if value is not None}}


def _nemotron_nas_config(graph: ModelGraph, options: Options) -> dict[str, Any]:
    """`graph` is `as_written`. Key sets: the published Super-49B and Ultra-253B configs."""
    attentions = [attention for _, attention in graph.attentions]
    ffns = [ffn for _, ffn in _sublayers(graph, FFN)]
    written = WrittenModel(
        qk_norm=any(attention.q_norm is not None for attention in attentions),
        blocks=[_written_block(block) for block in graph.flat_blocks],
    )
    return {
        **_config(graph, options, NEMOTRON_NAS),
        "auto_map": AUTO_MAP,
        "intermediate_size": None,
        "num_key_value_heads": None,
        "attention_bias": any(attention.q_proj.bias is not None for attention in attentions),
        "mlp_bias": any(ffn.gate_proj.bias is not None for ffn in ffns),
        "block_configs": [_block_config(block, graph.hidden_size) for block in graph.flat_blocks],
        "fuselage": written.model_dump(),
    }


def _block_config(block: Block, hidden_size: int) -> dict[str, Any]:
    """One entry, always with all keys: mlx-lm takes no other, llama.cpp looks each of them up."""
    attention, ffn = block.attention, block.ffn
    group = attention.num_attention_heads // attention.num_key_value_heads if isinstance(attention, Attention) else None
    return {
        "attention": {
            "n_heads_in_group": group,
            "no_op": attention is None,
            "replace_with_linear": isinstance(attention, LinearSublayer),
            "sparsify": None,
            "window_length": None,
            "num_sink_tokens": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
        },
        "ffn": {
            "ffn_mult": ffn_mult_from_width(ffn.intermediate_size, hidden_size) if isinstance(ffn, FFN) else None,
            "no_op": ffn is None,
            "replace_with_linear": isinstance(ffn, LinearSublayer),
            "sparsify": None,
        },
    }


def _written_block(block: Block) -> WrittenBlock:
    segments = None
    if isinstance(block.ffn, FFN):
        segments = [(segment.source_layer, segment.width) for segment in block.ffn.segments]
    return WrittenBlock(
        source_layers=list(block.source_layers),
        segments=segments,
        sliding_window=block.attention.sliding_window if isinstance(block.attention, Attention) else None,
    )


# --- plain families


def _plain_keys(graph: ModelGraph, family: str) -> Keys | None:
    """The keys that say this graph in a plain family's config, beside those of `_config`; None if it cannot."""
    config_keys = FAMILIES[family].config_keys
    layers = {_plain_layer(layer, entry) for layer, entry in enumerate(graph.blocks)}
    layer = layers.pop() if len(layers) == 1 else None
    if config_keys is None or layer is None:
        return None
    attention, ffn = layer
    keys = config_keys(attention, ffn, [attention.sliding_window for _, attention in graph.attentions])
    if keys is None:
        return None
    return {
        "intermediate_size": ffn.intermediate_size,
        "num_key_value_heads": attention.num_key_value_heads,
        **keys,
    }


def _plain_layer(layer: int, entry: Block | ParallelBlocks) -> tuple[AttentionSpec, FFNSpec] | None:
    """What is the same in all layers of a plain model; None if this is not exactly layer `layer` of some."""
    if not isinstance(entry, Block) or entry.source_layers != (layer,):
        return None
    attention, ffn = entry.attention, entry.ffn
    if not isinstance(attention, Attention) or not isinstance(ffn, FFN) or ffn.padding or len(ffn.segments) > 1:
        return None
    qkv_biases = {linear.bias is not None for linear in (attention.q_proj, attention.k_proj, attention.v_proj)}
    ffn_biases = {linear.bias is not None for linear in linears(ffn).values()}
    if len(qkv_biases) > 1 or len(ffn_biases) > 1:
        return None
    return (
        AttentionSpec(
            num_attention_heads=attention.num_attention_heads,
            num_key_value_heads=attention.num_key_value_heads,
            head_dim=attention.head_dim,
            qkv_bias=qkv_biases.pop(),
            o_bias=attention.o_proj.bias is not None,
            qk_norm=attention.q_norm is not None,
        ),
        FFNSpec(ffn.intermediate_size, ffn.activation, ffn_biases.pop()),
    )


# --- exact rewriting


def _with_biases(part: Any) -> Any:
    """The same sublayer with a zero bias on every linear that has none."""

    def with_bias(linear: Linear) -> Linear:
        dtype = linear.weight.dtype if linear.quantization is None else part.norm.weight.dtype
        zeros = full((linear.out_features,), 0.0, dtype)
        return linear if linear.bias is not None else replace(linear, bias=zeros)

    return replace(part, **{name: with_bias(linear) for name, linear in linears(part).items()})


def _padded(ffn: FFN) -> FFN:
    """The same FFN with zero channels up to a multiple of 256: act(0) * 0 = 0, and down has zero columns there."""
    width = _padded_width(ffn)
    if width == ffn.intermediate_size:
        return ffn

    def rows(linear: Linear) -> Linear:
        bias = None if linear.bias is None else pad(linear.bias, 0, width)
        quantization = linear.quantization
        if quantization is not None and quantization.weight_scale.shape:
            ones = full((width - linear.out_features,), 1.0, quantization.weight_scale.dtype)
            quantization = replace(quantization, weight_scale=concat([quantization.weight_scale, ones], axis=0))
        return replace(linear, weight=pad(linear.weight, 0, width), bias=bias, quantization=quantization)

    return replace(
        ffn,
        gate_proj=rows(ffn.gate_proj),
        up_proj=rows(ffn.up_proj),
        down_proj=replace(ffn.down_proj, weight=pad(ffn.down_proj.weight, 1, width)),
    )


def _padded_width(ffn: FFN) -> int:
    return -(-ffn.intermediate_size // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


# --- what cannot be expressed


def _problems(graph: ModelGraph) -> Iterator[FuselageError]:
    for index, entry in enumerate(graph.blocks):
        if isinstance(entry, ParallelBlocks):
            yield TargetError(
                "parallel blocks cannot be expressed in a Hugging Face folder",
                block=index,
                found=f"source layers {list(entry.source_layers)} side by side",
                hint="export to ONNX, or leave `parallel` out of the plan",
            )
    if all(entry.is_empty for entry in graph.blocks):
        yield TargetError("no block has an attention or an FFN, so there is no layer to write")
    attentions = list(_sublayers(graph, Attention))
    ffns = list(_sublayers(graph, FFN))
    yield from differences("num_attention_heads", [(index, part.num_attention_heads) for index, part in attentions])
    yield from differences("hidden_act", [(index, part.activation.value) for index, part in ffns])
    yield from differences("kind of q/k norm", [(index, _qk_norm(part)) for index, part in attentions])
    yield from differences("rms_norm_eps", [(None, graph.norm.eps), *_epsilons(graph)])
    for index, part in attentions:
        if (part.q_norm is None) != (part.k_norm is None):
            yield TargetError("a q norm and a k norm come together", block=index, found=_qk_norm(part))
    for index, linear in _sublayers(graph, LinearSublayer):
        if linear.linear.bias is not None:
            yield TargetError("a linear layer in place of a sublayer has no bias in this format", block=index)
    if graph.lm_head is not None and graph.lm_head.bias is not None:
        yield TargetError("lm_head has no bias in this format")
    for index, part in ffns:
        width = _padded_width(part)
        ffn_mult = ffn_mult_from_width(width, graph.hidden_size)
        for value in (ffn_mult, round(ffn_mult, 6)):  # mlx-lm rounds to 6 decimals
            if width_from_ffn_mult(value, graph.hidden_size) != width:
                yield TargetError(
                    "no ffn_mult gives this width in every reader",
                    block=index,
                    expected=width,
                    found=f"{width_from_ffn_mult(value, graph.hidden_size)} from ffn_mult {value}",
                )
    yield from _unreadable_dtypes(graph)


def _epsilons(graph: ModelGraph) -> Iterator[tuple[int, float]]:
    for kind in (Attention, FFN, LinearSublayer):
        for index, part in _sublayers(graph, kind):
            norms = (getattr(part, entry.name) for entry in fields(part))
            yield from ((index, norm.eps) for norm in norms if isinstance(norm, RMSNorm))


def _qk_norm(attention: Attention) -> str:
    present = [name for name in ("q_norm", "k_norm") if getattr(attention, name) is not None]
    return " and ".join(present) or "none"


def _unreadable_dtypes(graph: ModelGraph) -> Iterator[FuselageError]:
    """Without scales, a code of 8 bits is no weight."""

    def refused(dtype: DType) -> bool:
        return not dtype.is_float or dtype.itemsize < 2

    codes = {id(linear.weight) for linear in linear_names(graph).values() if linear.quantization is not None}

    parts: list[tuple[int | None, Any]] = [(None, (graph.embedding, graph.norm, graph.lm_head))]
    parts += [(index, members(entry)) for index, entry in enumerate(graph.blocks)]
    for index, part in parts:
        found = (tensor for tensor in weights(part, scales=False) if id(tensor) not in codes)
        for name in sorted({tensor.dtype.name for tensor in found if refused(tensor.dtype)}):
            yield TargetError(
                "weights of this dtype need a quantized format", block=index, expected="a float of 16+ bits", found=name
            )


def _sublayers(graph: ModelGraph, kind: type) -> Iterator[tuple[int, Any]]:
    """(index in `graph.blocks`, sublayer) of all sublayers of one kind."""
    for index, entry in enumerate(graph.blocks):
        for block in members(entry):
            yield from ((index, part) for part in (block.attention, block.ffn) if isinstance(part, kind))
