"""ONNX: one opset-24 network for prefill and decode over weights in safetensors files.

The folder: `network.json` (`exporter.network.NetworkManifest`), one .onnx file per network, which holds the nodes and
small constants only, and `weights*.safetensors`, which all networks of the folder refer to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from exporter.dtypes import BFLOAT16, FLOAT32, FLOAT64
from exporter.errors import FuselageError, TargetError, raise_all
from exporter.graph import Block, ModelGraph, linear_names, structure, weights
from exporter.network import (
    CACHE_WRITE,
    FILE_NAME,
    INPUT_IDS,
    LOGITS,
    LOGITS_INDEX,
    NETWORK_FILE,
    NETWORK_KIND,
    POSITION_IDS,
    NetworkManifest,
    NetworkVariant,
)
from exporter.safetensors_io import Shards
from exporter.wide_ffn import wide_ffn_problems
from exporter.writers.files import Content, json_bytes
from exporter.writers.onnx_graph import Form, NetworkBuilder, cache_slots
from exporter.writers.onnx_options import (
    NETWORK_DTYPES,
    PLUGINS,
    PRESETS,
    WIDE_FFN,
    Network,
    Options,
    network_dtype,
    options_for,
    stored_dtype,
)
from exporter.writers.onnx_quantization import number_format, quantization_problems
from exporter.writers.onnx_weights import STEM, WeightStore

KIND = NETWORK_KIND
INDEX_FILE = f"{STEM}.safetensors.index.json"
MAX_POSITIONS = 1 << 24  # beyond that a config is a mistake: cos and sin alone would take gigabytes
MAX_BATCH = 1 << 16
WEIGHT_DTYPES = (*NETWORK_DTYPES, FLOAT64)


def check(graph: ModelGraph, options: Options) -> list[FuselageError]:
    """Return all reasons why the network cannot be written as asked; no tensor is read."""
    problems: list[FuselageError] = []
    problems += _dtype_problems(graph, options)
    problems += _plugin_problems(graph, options)
    problems += quantization_problems(graph)
    problems += _size_problems(graph, options)
    if not options.networks:
        problems.append(TargetError("nothing to write", expected="at least one network"))
    files = [network.file for network in options.networks]
    for file in files:
        if not re.fullmatch(FILE_NAME, file):
            problems.append(TargetError("a network's name is not a file name", found=file))
    for file in sorted({file for file in files if files.count(file) > 1}):
        problems.append(TargetError("two networks have one name", found=file, hint="give each network its own name"))
    return problems


def emit(graph: ModelGraph, options: Options) -> Iterator[tuple[str, Content | bytes]]:
    """Return the folder's files for `files.save_folder(kind=KIND)`; weights stream in chunks.

    Raises:
        TargetError: what `check` returns; at once, not at the first file.
    """
    raise_all(check(graph, options))
    return _files(graph, options)


def _files(graph: ModelGraph, options: Options) -> Iterator[tuple[str, Content | bytes]]:
    laid_out = _lay_out(graph, options)
    yield NETWORK_FILE, json_bytes(laid_out.manifest.model_dump(mode="json"))
    yield from laid_out.networks.items()
    yield from laid_out.shards.files.items()
    if laid_out.shards.index is not None:
        yield INDEX_FILE, json_bytes(laid_out.shards.index)


@dataclass(frozen=True, slots=True)
class _Layout:
    """All networks of a folder, and the weight files they refer to."""

    manifest: NetworkManifest
    networks: dict[str, bytes]  # by file name
    shards: Shards


def _lay_out(graph: ModelGraph, options: Options) -> _Layout:
    store = WeightStore(lambda dtype: stored_dtype(options, dtype, graph.dtype))
    positions = _max_positions(graph, options)
    forms = [_form(graph, network, positions) for network in options.networks]
    builders = [NetworkBuilder(graph, form, store, positions) for form in forms]
    shards = store.shards(options.shard_bytes)
    variants = [
        NetworkVariant(
            file=network.file,
            target=network.target,
            dtype=form.dtype.name,
            batch=form.batch,
            capacity=form.capacity,
            max_positions=form.max_positions,
            weight_files=builder.weight_files(shards),
            number_format=number_format(graph),
            options={
                "pack_qkv": form.pack_qkv,
                "pack_gate_up": form.pack_gate_up,
                "share_rounded_inputs": form.share_rounded_inputs,
                "transpose_weight_only": form.transpose_weight_only,
                "choose_tokens": form.choose_tokens,
                "plugins": list(network.plugins),
            },
        )
        for network, form, builder in zip(options.networks, forms, builders, strict=True)
    ]
    slots = cache_slots(graph)
    manifest = NetworkManifest(
        vocab_size=graph.vocab_size,
        inputs=(INPUT_IDS, POSITION_IDS, CACHE_WRITE, LOGITS_INDEX),
        outputs=(LOGITS,),
        cache=slots,
        weight_bytes=store.nbytes,
        structure=structure(graph),
        networks=tuple(variants),
    )
    files = {
        network.file: builder.model_bytes(shards) for network, builder in zip(options.networks, builders, strict=True)
    }
    return _Layout(manifest, files, shards)


def _form(graph: ModelGraph, network: Network, max_positions: int) -> Form:
    capacity = max_positions if network.capacity == "max_positions" else network.capacity
    return Form(
        dtype=network_dtype(network, graph.dtype),
        batch=network.batch,
        capacity=capacity,
        max_positions=min(max_positions, capacity or max_positions),
        pack_qkv=network.pack_qkv,
        pack_gate_up=network.pack_gate_up,
        share_rounded_inputs=network.share_rounded_inputs,
        transpose_weight_only=network.transpose_weight_only,
        zero_points=network.target == "onnxruntime",
        choose_tokens=network.target == "tensorrt",  # its logits are on the GPU, and megabytes to copy from there
        wide_ffn=WIDE_FFN in network.plugins,
    )


def _max_positions(graph: ModelGraph, options: Options) -> int:
    return graph.max_position_embeddings if options.max_positions is None else options.max_positions


def _dtype_problems(graph: ModelGraph, options: Options) -> Iterator[TargetError]:
    names = ", ".join(dtype.name for dtype in NETWORK_DTYPES)
    codes = [linear.weight for linear in linear_names(graph).values() if linear.quantization is not None]
    formats = sorted({tensor.dtype.name for tensor in codes})
    for network in options.networks:
        dtype = network_dtype(network, graph.dtype)
        if dtype not in NETWORK_DTYPES:
            yield TargetError(f"{network.file} cannot have this dtype", expected=names, found=dtype)
        elif network.target == "onnxruntime" and dtype == BFLOAT16:
            yield TargetError(
                "ONNX Runtime has no bfloat16 kernels for a decoder on CPU",
                expected="float32 or float16",
                found=dtype,
                hint="a float32 network can keep bfloat16 weights in its files",
            )
        elif network.target == "onnxruntime" and dtype != FLOAT32 and formats:
            yield TargetError(
                "ONNX Runtime has 8-bit kernels for float32 networks only", expected="float32", found=dtype
            )
        if network.target == "onnxruntime" and len(formats) > 1:
            yield TargetError(
                "ONNX Runtime cannot imitate FP8 and use its int8 kernels in one network",
                expected="one format for all quantized linears",
                found=" and ".join(formats),
            )
    if options.weight_dtype is not None and options.weight_dtype not in NETWORK_DTYPES:
        yield TargetError("weights cannot be stored like this", expected=names, found=options.weight_dtype)
    quantized = {id(tensor) for tensor in codes}
    for index, part in _parts(graph):
        found = {tensor.dtype for tensor in weights(part) if id(tensor) not in quantized} - set(WEIGHT_DTYPES)
        if found:
            yield TargetError(
                "weights of this dtype cannot go into the network",
                block=index,
                expected=", ".join(dtype.name for dtype in WEIGHT_DTYPES),
                found=", ".join(sorted(dtype.name for dtype in found)),
            )


def _plugin_problems(graph: ModelGraph, options: Options) -> Iterator[TargetError]:
    for network in options.networks:
        for plugin in network.plugins:
            if plugin not in PLUGINS:
                yield TargetError(f"{network.file}: no such plugin", expected=", ".join(PLUGINS), found=plugin)
        dtype = network_dtype(network, graph.dtype)
        if network.plugins and network.target == "tensorrt" and dtype != BFLOAT16:
            yield TargetError(
                f"{network.file}: the plugins for TensorRT compute in bfloat16",
                expected=BFLOAT16,
                found=dtype,
                hint="give the target as tensorrt:bfloat16",
            )
    if any(WIDE_FFN in network.plugins for network in options.networks):
        yield from wide_ffn_problems(graph)


def _parts(graph: ModelGraph) -> Iterator[tuple[int | None, tuple | Block]]:
    yield None, (graph.embedding, graph.norm, graph.lm_head)
    yield from enumerate(graph.flat_blocks)


def _size_problems(graph: ModelGraph, options: Options) -> Iterator[TargetError]:
    limit = min(graph.max_position_embeddings, MAX_POSITIONS)
    positions = _max_positions(graph, options)
    if not 1 <= positions <= limit:
        yield TargetError(
            "max_positions does not fit the model",
            expected=f"1 to {limit}",
            found=positions,
            hint="the model's max_position_embeddings is the limit",
        )
    if options.shard_bytes < 1:
        yield TargetError("shard_bytes is positive", found=options.shard_bytes)
    for network in options.networks:
        if network.batch is not None and not 1 <= network.batch <= MAX_BATCH:
            yield TargetError(
                f"{network.file}: batch is out of range", expected=f"1 to {MAX_BATCH}", found=network.batch
            )
        if isinstance(network.capacity, int) and not 1 <= network.capacity <= positions:
            yield TargetError(
                f"{network.file}: the cache holds at most max_positions tokens",
                expected=f"a capacity of 1 to {positions}",
                found=network.capacity,
            )
        if network.target == "tensorrt" and network.capacity is None:
            yield TargetError(
                f"{network.file}: TensorRT needs a cache of fixed capacity",
                expected='a number or "max_positions"',
                found="a symbolic capacity",
            )


__all__ = [
    "INDEX_FILE",
    "KIND",
    "PRESETS",
    "Network",
    "Options",
    "check",
    "emit",
    "options_for",
]
