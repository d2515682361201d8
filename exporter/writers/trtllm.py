"""TensorRT-LLM checkpoints: config.json and one complete safetensors file per rank, for `trtllm-build` of 1.1 and 1.2.

The layout is that of the Nemotron-NAS model (`DeciLMForCausalLM`), which has its own attention, KV heads and FFN width
in every layer. Where its stock class does not do, the folder also holds our subclass of it (`trtllm_network.py`), for
`--model_cls_file`: for parallel blocks, for FFNs that are cut into several GEMMs, and for the formats whose modules the
stock layers call wrongly. Such FFNs have names that the stock class does not know, so that it refuses to load them.

    transformer.vocab_embedding.weight         [V, D]        on the first stage, whole on each of its ranks or split
    transformer.layers.{i}.input_layernorm     [D]           i counts from the start of the stage
    transformer.layers.{i}.attention.qkv       q, k, v of this rank below each other
    transformer.layers.{i}.attention.dense     columns of o_proj
    transformer.layers.{i}.post_layernorm      [D]
    transformer.layers.{i}.ffn.fc, gate, proj  gate_proj, up_proj, down_proj; of a cut FFN ffn.part_{p}.fc ...
    transformer.ln_f.weight, lm_head.weight    on the last stage; lm_head has zero rows up to a multiple of tp_size

Ranks are files that can be written side by side: each reads its own rows and columns of the source.
Source of names and shapes: TensorRT-LLM 1.1, `tensorrt_llm/models/nemotron_nas/{convert,model}.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from exporter.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from exporter.errors import FuselageError, TargetError, raise_all
from exporter.graph import FFN, Activation, Attention, LinearSublayer, ModelGraph, RMSNorm, linears, weights
from exporter.lazy import LazyTensor, cast, pad, slice_rows
from exporter.safetensors_io import SafetensorsFile
from exporter.settings import Setting
from exporter.writers import trtllm_formats
from exporter.writers.files import Content, FileCopy, json_bytes
from exporter.writers.model_wide import differences
from exporter.writers.trtllm_config import (
    CHECKPOINT_FILE,
    CONFIG,
    MODEL_FILE,
    Mapped,
    RankFile,
    checkpoint_json,
    config_of,
    is_known_rope,
    manifest_of,
)
from exporter.writers.trtllm_formats import NORMS, format_of
from exporter.writers.trtllm_layout import (
    Gemm,
    Layer,
    Rank,
    ffn_parts,
    kv_heads_of,
    layers_of,
    padded_vocab_size,
    parallel_groups,
    ranks,
    stages,
)

NETWORK = Path(__file__).parent / "trtllm_network.py"
DTYPES = (BFLOAT16, FLOAT16, FLOAT32)  # the last for checks: its attention has no fast kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a model is spread over GPUs."""

    tp_size: Annotated[int, Setting("tensor-parallel size; 1 if not given.", option="tp", least=1)] = 1
    pp_size: Annotated[int, Setting("pipeline-parallel size; 1 if not given.", option="pp", least=1)] = 1
    # Over the tensor-parallel ranks: less memory for one more all-reduce.
    split_embedding: Annotated[bool, Setting("every GPU holds a part of the embedding, not all.")] = False
    dtype: DType | None = None  # of the network; None: the graph's if it is bfloat16 or float16, else bfloat16
    # Sizes in GEMM kernels are 32-bit: a larger matrix (gate and up of an FFN as one, on one rank) is cut into several.
    max_gemm_elements: int = 2**31 - 1


def check(graph: ModelGraph, options: Options) -> list[FuselageError]:
    """Return everything a TensorRT-LLM checkpoint cannot express; `block` counts `graph.blocks`. Reads no weight."""
    problems = [*_mapping_problems(graph, options), *_model_problems(graph)]
    problems += trtllm_formats.check_schemes(layers_of(graph))
    return problems or list(_format_problems(_mapped(graph, options)))


def emit(graph: ModelGraph, options: Options) -> Iterator[tuple[str, Content | bytes]]:
    """Return the folder's files: config, model class if it needs ours, one weight file per rank. Reads no weight yet.

    Raises:
        TargetError: `check` finds a problem; at once, not at the first file.
    """
    raise_all(check(graph, options))
    return _files(_mapped(graph, options))


def network_dtype(graph: ModelGraph, options: Options) -> DType:
    """What a graph's network computes in."""
    return options.dtype or (FLOAT16 if graph.dtype == FLOAT16 else BFLOAT16)


def quant_algo(graph: ModelGraph) -> str | None:
    """What TensorRT-LLM calls the number format of a graph that `check` accepts; None: it is not quantized."""
    return format_of(layers_of(graph)).algo


def tensors_of_ranks(graph: ModelGraph, options: Options) -> dict[str, dict[str, LazyTensor]]:
    """Return every tensor of every rank's file, in the order of the forward pass, by file and name.

    Raises:
        TargetError: `check` finds a problem.
    """
    raise_all(check(graph, options))
    mapped = _mapped(graph, options)
    return {_file_name(rank): dict(_tensors(mapped, rank)) for rank in ranks(options.tp_size, options.pp_size)}


def _files(mapped: Mapped) -> Iterator[tuple[str, Content | bytes]]:
    yield CONFIG, json_bytes(config_of(mapped))
    if mapped.model_class is not None:
        yield MODEL_FILE, FileCopy(NETWORK)
    rank_files = []
    for rank in ranks(mapped.tp_size, mapped.pp_size):
        tensors = dict(_tensors(mapped, rank))
        rank_files.append(_rank_file(mapped, rank, tensors))
        yield _file_name(rank), SafetensorsFile(tensors)
    yield CHECKPOINT_FILE, checkpoint_json(manifest_of(mapped, rank_files))


def _file_name(rank: Rank) -> str:
    return f"rank{rank.number}.safetensors"


def _mapped(graph: ModelGraph, options: Options) -> Mapped:
    layers, groups = layers_of(graph), parallel_groups(graph)
    in_group = {number for group in groups for number in group}
    parts = {}
    for number, layer in enumerate(layers):
        if isinstance(layer.block.ffn, FFN):
            cut = ffn_parts(layer.block.ffn, options.tp_size, options.max_gemm_elements)
            if len(cut) > 1 or number in in_group:
                parts[number] = cut
    return Mapped(
        graph=graph,
        layers=layers,
        groups=groups,
        parts=parts,
        format=format_of(layers),
        dtype=network_dtype(graph, options),
        tp_size=options.tp_size,
        pp_size=options.pp_size,
        split_embedding=options.split_embedding,
    )


# --- the tensors of a rank


def _tensors(mapped: Mapped, rank: Rank) -> Iterator[tuple[str, LazyTensor]]:
    graph, dtype = mapped.graph, mapped.dtype
    if rank.is_first_stage:
        embedding = _vocab_share(graph.embedding, rank) if mapped.split_embedding else graph.embedding
        yield "transformer.vocab_embedding.weight", cast(embedding, dtype)
    for local, number in enumerate(mapped.stages[rank.pp_rank]):
        stem = f"transformer.layers.{local}"
        for name, tensor in _layer_tensors(mapped, number, rank):
            yield f"{stem}.{name}", tensor
    if rank.is_last_stage:
        yield "transformer.ln_f.weight", cast(graph.norm.weight, dtype)
        head = graph.embedding if graph.lm_head is None else graph.lm_head.weight
        yield "lm_head.weight", cast(_vocab_share(head, rank), dtype)


def _vocab_share(matrix: LazyTensor, rank: Rank) -> LazyTensor:
    """A rank's rows of a matrix [V, D] that is padded with zero rows to a multiple of tp_size."""
    padded = pad(matrix, 0, padded_vocab_size(matrix.shape[0], rank.tp_size))
    rows = padded.shape[0] // rank.tp_size
    return slice_rows(padded, rank.tp_rank * rows, (rank.tp_rank + 1) * rows)


def _layer_tensors(mapped: Mapped, number: int, rank: Rank) -> Iterator[tuple[str, LazyTensor]]:
    written: set[str] = set()  # norms: the parts of an FFN share one
    for module in mapped.modules(number, rank):
        norm = NORMS[module.name.partition(".")[0]]
        if norm not in written:
            written.add(norm)
            yield f"{norm}.weight", cast(module.sublayer.norm.weight, mapped.dtype)
            for name, tensor in mapped.format.norm(module):
                yield f"{norm}.{name}", tensor
        for gemm in module.gemms:
            stem = ".".join(part for part in (module.name, gemm.name) if part)
            for name, tensor in trtllm_formats.gemm_tensors(mapped.format, gemm, mapped.dtype):
                yield f"{stem}.{name}", tensor
        for name, tensor in mapped.format.module(module):
            yield f"{module.name}.{name}", tensor
        if isinstance(module.sublayer, Attention):
            for name, tensor in trtllm_formats.kv_tensors(module.sublayer):
                yield f"{module.name}.{name}", tensor


def _rank_file(mapped: Mapped, rank: Rank, tensors: dict[str, LazyTensor]) -> RankFile:
    stage = mapped.stages[rank.pp_rank]
    kv_bytes = 0
    gemms: list[Gemm] = []
    for number in stage:
        attention = mapped.layers[number].block.attention
        if isinstance(attention, Attention):
            kv = attention.kv_quantization
            itemsize = (mapped.dtype if kv is None else kv.dtype).itemsize
            kv_bytes += 2 * kv_heads_of(attention.num_key_value_heads, rank.tp_size) * attention.head_dim * itemsize
        gemms += [gemm for module in mapped.modules(number, rank) for gemm in module.gemms]
    return RankFile(
        file=_file_name(rank),
        layers=(stage.start, stage.stop),
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        kv_bytes_per_token=kv_bytes,
        widest_gemm=max((gemm.shape[0] * (2 if gemm.name == "fc" else 1) for gemm in gemms), default=0),
    )


# --- what cannot be expressed


def _mapping_problems(graph: ModelGraph, options: Options) -> Iterator[FuselageError]:
    layers, tp_size, pp_size = layers_of(graph), options.tp_size, options.pp_size
    for name, size in (("tp_size", tp_size), ("pp_size", pp_size), ("max_gemm_elements", options.max_gemm_elements)):
        if size < 1:
            yield TargetError(f"{name} is a whole number of at least 1", found=size)
            return
    if options.dtype is not None and options.dtype not in DTYPES:
        yield TargetError(
            "no network of TensorRT-LLM has this dtype", expected=" or ".join(map(str, DTYPES)), found=options.dtype
        )
    if pp_size > len(layers):
        yield TargetError("more pipeline stages than blocks", expected=f"at most {len(layers)}", found=pp_size)
        return
    for layer in layers:
        yield from _division_problems(layer, tp_size)
    cut = stages(len(layers), pp_size)
    for number, stage in enumerate(cut):
        if graph.attentions and not any(isinstance(layers[index].block.attention, Attention) for index in stage):
            yield TargetError(
                "a pipeline stage without attention cannot be built",
                found=f"stage {number} of {pp_size}: blocks {layers[stage.start].index} to {layers[stage[-1]].index}",
                hint="use fewer stages",
            )
    for group in parallel_groups(graph):
        if not any(group[0] in stage and group[-1] in stage for stage in cut):
            yield TargetError(
                "a pipeline stage ends inside a group of parallel blocks",
                block=layers[group[0]].index,
                expected=f"stages that end elsewhere than at logical layer {[stage.stop for stage in cut[:-1]]}",
                found=f"a group of the logical layers {list(group)}",
                hint="use another number of stages",
            )


def _division_problems(layer: Layer, tp_size: int) -> Iterator[FuselageError]:
    attention, ffn = layer.block.attention, layer.block.ffn
    sizes: list[tuple[str, int]] = []
    if isinstance(attention, Attention):
        sizes.append(("attention heads", attention.num_attention_heads))
        kv_heads = attention.num_key_value_heads
        if kv_heads % tp_size and tp_size % kv_heads:
            yield TargetError(
                "tp_size and key-value heads do not divide each other",
                block=layer.index,
                expected=f"a divisor or a multiple of {kv_heads}",
                found=tp_size,
            )
    if isinstance(ffn, FFN):
        sizes.append(("intermediate_size", ffn.intermediate_size))
    sizes += [("hidden_size", one.hidden_size) for one in (attention, ffn) if isinstance(one, LinearSublayer)]
    for name, size in sizes:
        if size % tp_size:
            yield TargetError(
                f"tp_size does not divide the {name}",
                block=layer.index,
                expected=f"a divisor of {size}",
                found=tp_size,
                hint="pad the FFN to a multiple" if name == "intermediate_size" else None,
            )


def _model_problems(graph: ModelGraph) -> Iterator[FuselageError]:
    layers = layers_of(graph)
    if not graph.attentions:
        yield TargetError("a model without attention cannot be built: its inputs would have no KV cache")
    if not is_known_rope(graph.rope):
        yield TargetError(
            "this RoPE scaling is not expressed",
            expected="none, linear or llama3",
            found=type(graph.rope.scaling).__name__,
        )
    attentions = [(layer.index, a) for layer in layers if isinstance(a := layer.block.attention, Attention)]
    yield from differences("num_attention_heads", ((index, part.num_attention_heads) for index, part in attentions))
    yield from differences("rms_norm_eps", [(None, graph.norm.eps), *_epsilons(layers)])
    for index, attention in attentions:
        if attention.q_norm is not None or attention.k_norm is not None:
            yield TargetError("norms on query and key heads are not expressed", block=index)
        if attention.sliding_window is not None:
            yield TargetError(
                "a sliding window is not part of a checkpoint: TensorRT-LLM takes it when it runs",
                block=index,
                found=attention.sliding_window,
            )
    for layer in layers:
        ffn = layer.block.ffn
        if isinstance(ffn, FFN) and ffn.activation is not Activation.SILU:
            yield TargetError(
                "the gate's activation is not expressed", block=layer.index, expected="silu", found=ffn.activation.value
            )
        for sublayer in (layer.block.attention, ffn):
            for name, linear in linears(sublayer).items() if sublayer is not None else ():
                if linear.bias is not None:
                    yield TargetError(f"{name} has a bias, and this model class has none", block=layer.index)
                if linear.quantization is None and not _is_plain(linear.weight):
                    yield _no_scales(layer.index, linear.weight)
    head = graph.lm_head
    if head is not None and (head.bias is not None or head.quantization is not None):
        yield TargetError("lm_head is a plain matrix in this format", found="a bias or a quantized weight")
    for tensor in weights((graph.embedding, graph.norm)):
        if not _is_plain(tensor):
            yield _no_scales(None, tensor)


def _is_plain(tensor: LazyTensor) -> bool:
    return tensor.dtype.is_float and tensor.dtype.itemsize >= 2


def _no_scales(block: int | None, tensor: LazyTensor) -> FuselageError:
    return TargetError(
        "weights of this dtype need scales", block=block, expected="a float of 16+ bits", found=tensor.dtype
    )


def _epsilons(layers: Iterable[Layer]) -> Iterator[tuple[int, float]]:
    for layer in layers:
        for sublayer in (layer.block.attention, layer.block.ffn):
            for entry in fields(sublayer) if sublayer is not None else ():
                norm = getattr(sublayer, entry.name)
                if isinstance(norm, RMSNorm):
                    yield layer.index, norm.eps


def _format_problems(mapped: Mapped) -> Iterator[FuselageError]:
    by_stage = mapped.modules_by_stage()
    for layer, modules in zip(mapped.layers, itertools.chain(*by_stage), strict=True):
        for module in modules:
            yield from trtllm_formats.check_module(mapped.format, module, layer.index, mapped.tp_size)
    yield from trtllm_formats.check_stages(mapped.format, by_stage)
