"""What can be wrong with a network in TensorRT's eyes: one function per rule, which yields every place.

A condition that needs a type or a shape that inference could not find holds its peace; so does one that needs the
values of a tensor in a weight file.
"""

from __future__ import annotations

import math
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from exporter.writers.onnx_tensorrt_network import Size, TypedNetwork, attributes, version_text
from exporter.writers.onnx_tensorrt_ops import ALL, ANY, CODES, CUSTOM_OPS, FLOATS, KNOWN_DTYPES, OPS, Op

OPSETS = range(9, 25)
IR_VERSION = 11  # the newest that is known to be taken
OWN_DOMAINS = ("", "ai.onnx", "trt")  # the last is what NVIDIA's exporter for Edge-LLM writes
HEAD_SIZES = range(16, 257)  # what fused attention kernels are documented for
MOST_KEYS = 16_384  # that attention over a cache was reported to run fused with
MOST_TOP_K = 3839
MOST_ELEMENTS = 2**31 - 1
EXTERNAL_DATA_KEYS = frozenset({"location", "offset", "length", "checksum"})
CODE_OPSETS: dict[int, int] = {TensorProto.FLOAT8E4M3FN: 19, TensorProto.INT4: 21, TensorProto.FLOAT4E2M1: 23}
MOVES = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
PRODUCTS = frozenset({"Gemm", "MatMul"})


class Finding(NamedTuple):
    """One place where a rule is broken."""

    where: str  # "<node name> (<op>)", or the name of a value or function
    expected: str
    found: str


def _label(node: onnx.NodeProto) -> str:
    return f"{node.name or ', '.join(filter(None, node.output))} ({node.op_type})"


def _given(node: onnx.NodeProto, index: int) -> str | None:
    """The name of an input, None if it is left out."""
    return node.input[index] if index < len(node.input) and node.input[index] else None


def _dtype_name(dtype: int) -> str:
    return TensorProto.DataType.Name(dtype).lower()


def _dtype_names(dtypes: Collection[int]) -> str:
    return ", ".join(_dtype_name(dtype) for dtype in sorted(dtypes))


def _shape_text(shape: Sequence[Size]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


# --- one op at a time


def _rows(network: TypedNetwork) -> Iterator[tuple[onnx.NodeProto, Op]]:
    """Nodes that a built-in importer of this version takes, with their row of the table."""
    for node in network.all_nodes:
        op = OPS.get(node.op_type)
        own = node.op_type not in network.plugins and node.domain in OWN_DOMAINS
        if op is not None and own and op.since <= network.version:
            yield node, op


def _typed(node: onnx.NodeProto, op: Op) -> list[str]:
    indices = range(len(node.input)) if op.typed == (ALL,) else op.typed
    return [name for index in indices if (name := _given(node, index))]


def unknown_ops(network: TypedNetwork) -> Iterator[Finding]:
    known = set(OPS) | set(CUSTOM_OPS) | network.plugins
    for node in network.all_nodes:
        if node.op_type not in known:
            yield Finding(
                _label(node),
                "an op with an importer, a local function or a plugin",
                f"{node.domain or 'ai.onnx'}::{node.op_type}",
            )


def later_ops(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.all_nodes:
        since = OPS[node.op_type].since if node.op_type in OPS else CUSTOM_OPS.get(node.op_type, network.version)
        if since > network.version and node.op_type not in network.plugins:
            yield Finding(_label(node), f"TensorRT {version_text(since)} or later", version_text(network.version))


def foreign_domains(network: TypedNetwork) -> Iterator[Finding]:
    names = {(function.domain, function.name) for function in network.functions}
    for node in network.all_nodes:
        if node.op_type in OPS and node.domain not in OWN_DOMAINS and node.op_type not in network.plugins:
            yield Finding(_label(node), "a name that no ONNX op has", f"{node.domain}::{node.op_type}")
    for domain, name in sorted(names):
        if name in OPS:
            yield Finding(name, "a name that no ONNX op has", f"local function {domain}::{name}")


def wrong_dtypes(network: TypedNetwork) -> Iterator[Finding]:
    for node, op in _rows(network):
        wanted = [(name, op.dtypes) for name in _typed(node, op)]
        wanted += [(name, dtypes) for index, dtypes in op.others.items() if (name := _given(node, index))]
        for name, dtypes in wanted:
            found = network.dtype(name)
            if found is None or found in dtypes or _is_wrong_anywhere(network, name):
                continue
            yield Finding(_label(node), _dtype_names(dtypes), f"{_dtype_name(found)} in {name}")


def _is_wrong_anywhere(network: TypedNetwork, name: str) -> bool:
    """Whether a rule about dtypes as such names this value already."""
    dtype = network.dtype(name)
    if dtype == TensorProto.UINT8:
        return name not in network.inputs | network.outputs
    return dtype == TensorProto.DOUBLE or dtype not in KNOWN_DTYPES


def mixed_dtypes(network: TypedNetwork) -> Iterator[Finding]:
    for node, op in _rows(network):
        found = [dtype for name in _typed(node, op) if (dtype := network.dtype(name)) is not None]
        if op.alike and len(set(found)) > 1:
            yield Finding(_label(node), "inputs of one dtype", " and ".join(_dtype_name(dtype) for dtype in found))


def attribute_names(network: TypedNetwork) -> Iterator[Finding]:
    for node, op in _rows(network):
        known = op.attributes
        if known is not None:
            for name in sorted(set(attributes(node)) - set(known)):
                yield Finding(_label(node), f"no attribute but {', '.join(known)}", name)


def attribute_values(network: TypedNetwork) -> Iterator[Finding]:
    for node, op in _rows(network):
        for name, value in attributes(node).items():
            taken = (op.attributes or {}).get(name, ANY)
            if taken is not ANY and value not in taken:
                yield Finding(_label(node), f"{name} {' or '.join(map(str, taken))}", str(value))


def input_counts(network: TypedNetwork) -> Iterator[Finding]:
    for node, op in _rows(network):
        least, most = op.inputs or (0, len(node.input))
        if not least <= len(node.input) <= most:
            yield Finding(_label(node), f"{least} to {most} inputs", str(len(node.input)))


def output_counts(network: TypedNetwork) -> Iterator[Finding]:
    for node, op in _rows(network):
        # The importer of Attention also counts those that an empty name leaves out.
        found = len(node.output) if node.op_type == "Attention" else sum(map(bool, node.output))
        if op.outputs not in (None, found):
            yield Finding(_label(node), f"{op.outputs} output(s)", str(found))


def ranks(network: TypedNetwork) -> Iterator[Finding]:
    for node, op in _rows(network):
        for index, ranks in op.ranks.items():
            shape = network.shape(_given(node, index))
            if shape is not None and len(shape) not in ranks:
                expected = f"input {index} with {' or '.join(map(str, sorted(ranks)))} dimensions"
                yield Finding(_label(node), expected, _shape_text(shape))


def variable_axes(network: TypedNetwork) -> Iterator[Finding]:
    for node, op in _rows(network):
        for index in op.constant:
            name = _given(node, index)
            if name is not None and name not in network.rooted_in_constants:
                yield Finding(_label(node), f"a constant as input {index}", name)


def large_top_k(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("TopK"):
        k = network.constant(_given(node, 1))
        if k is not None and k.size == 1 and int(k.item()) > MOST_TOP_K:
            yield Finding(_label(node), f"K up to {MOST_TOP_K}", str(int(k.item())))


# --- the network's form


def opset(network: TypedNetwork) -> Iterator[Finding]:
    for opset in network.source.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            yield Finding("opset_import", f"opset {OPSETS[0]} to {OPSETS[-1]}", str(opset.version))


def ir_version(network: TypedNetwork) -> Iterator[Finding]:
    if network.source.ir_version > IR_VERSION:
        yield Finding("ir_version", f"up to {IR_VERSION}", str(network.source.ir_version))


def doubles(network: TypedNetwork) -> Iterator[Finding]:
    for name, dtype in network.dtypes.items():
        if dtype == TensorProto.DOUBLE:
            yield Finding(name, "float32 at most", "double")


def inner_uint8(network: TypedNetwork) -> Iterator[Finding]:
    for name, dtype in network.dtypes.items():
        if dtype == TensorProto.UINT8 and name not in network.inputs | network.outputs:
            yield Finding(name, "uint8 only as an input or output of the network", "uint8")


def unknown_dtypes(network: TypedNetwork) -> Iterator[Finding]:
    for name, dtype in network.dtypes.items():
        if dtype not in KNOWN_DTYPES:
            yield Finding(name, _dtype_names(KNOWN_DTYPES), _dtype_name(dtype))


def casts_of_codes(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Cast"):
        found = [attributes(node).get("to"), network.dtype(_given(node, 0))]
        for dtype in found:
            if dtype in CODES:
                yield Finding(_label(node), "QuantizeLinear or DequantizeLinear", f"a cast with {_dtype_name(dtype)}")


def function_names(network: TypedNetwork) -> Iterator[Finding]:
    counts = Counter(function.name for function in network.functions)
    for name, count in counts.items():
        if count > 1:
            domains = [function.domain for function in network.functions if function.name == name]
            yield Finding(name, "one local function of a name, over all domains", " and ".join(domains))


def function_inputs(network: TypedNetwork) -> Iterator[Finding]:
    functions = {function.name: function for function in network.functions if function.name not in network.plugins}
    bodies: list[Sequence[onnx.NodeProto]] = [network.source.graph.node, *(f.node for f in network.functions)]
    for body in bodies:
        for node in body:
            function = functions.get(node.op_type)
            if function is not None and len(node.input) != len(function.input):
                yield Finding(_label(node), f"{len(function.input)} inputs, as it declares", str(len(node.input)))


def large_initializers(network: TypedNetwork) -> Iterator[Finding]:
    for name, tensor in network.initializers.items():
        elements = math.prod(tensor.dims)
        if elements > MOST_ELEMENTS:
            yield Finding(name, f"at most {MOST_ELEMENTS:,} elements", f"{elements:,} in {_shape_text(tensor.dims)}")


def external_data(network: TypedNetwork) -> Iterator[Finding]:
    for name, tensor in network.initializers.items():
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        unknown = sorted(set(entries) - EXTERNAL_DATA_KEYS)
        if unknown:
            yield Finding(name, f"no key but {', '.join(sorted(EXTERNAL_DATA_KEYS))}", ", ".join(unknown))
        location = posixpath.normpath(entries.get("location", ""))
        if location.startswith(("../", "/")):
            yield Finding(name, "a file beside the network or below", location)


def empty_initializers(network: TypedNetwork) -> Iterator[Finding]:
    for name, tensor in network.initializers.items():
        if 0 in tensor.dims:
            yield Finding(name, "at least one element", _shape_text(tensor.dims))


# --- norms and rotary embedding


def norm_weights(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("RMSNormalization"):
        x, weight = (network.dtype(_given(node, index)) for index in (0, 1))
        if x is not None and weight is not None and x != weight:
            yield Finding(_label(node), f"a weight in {_dtype_name(x)}, as the input", _dtype_name(weight))


def empty_positions(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("RotaryEmbedding"):
        if len(node.input) > 3 and not node.input[3]:
            yield Finding(_label(node), "three inputs, or a name for the fourth", "an empty name")


def rotary_tables(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("RotaryEmbedding"):
        expected = 2 if _given(node, 3) else 3
        for index in (1, 2):
            shape = network.shape(_given(node, index))
            if shape is not None and len(shape) != expected:
                given = "with" if expected == 2 else "without"
                text = f"cos and sin of {expected} dimensions {given} position_ids"
                yield Finding(_label(node), text, _shape_text(shape))


def rotary_heads(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("RotaryEmbedding"):
        shape = network.shape(_given(node, 0))
        if shape is not None and len(shape) == 3 and "num_heads" not in attributes(node):
            yield Finding(_label(node), "num_heads where x has 3 dimensions", _shape_text(shape))


# --- KV cache


def cache_inputs(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("TensorScatter"):
        cache = _given(node, 0)
        if cache not in network.inputs:
            yield Finding(_label(node), "an input of the network as past_cache", cache or "none")


def cache_outputs(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("TensorScatter"):
        if not set(node.output) <= network.outputs:
            yield Finding(_label(node), "its output to be an output of the network", ", ".join(node.output))


def caches_written_twice(network: TypedNetwork) -> Iterator[Finding]:
    writers: dict[str | None, list[onnx.NodeProto]] = {}
    for node in network.built_in("TensorScatter"):
        writers.setdefault(_given(node, 0), []).append(node)
    for cache, nodes in writers.items():
        for node in nodes[1:]:
            yield Finding(_label(node), "a cache of its own", f"{cache}, which {_label(nodes[0])} writes to")


def cache_capacity(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("TensorScatter"):
        size = network.size(_given(node, 0), 2)
        if network.shape(_given(node, 0)) is not None and not isinstance(size, int):
            yield Finding(_label(node), "a number of positions", f"{size or 'an unknown size'}")


def cache_batch(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("TensorScatter"):
        size = network.size(_given(node, 0), 0)
        if network.shape(_given(node, 0)) is not None and not isinstance(size, int):
            yield Finding(_label(node), "a number of sequences", f"{size or 'an unknown size'}")


def cache_updates(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("TensorScatter"):
        cache, update = (network.shape(_given(node, index)) for index in (0, 1))
        if cache is None or update is None or len(cache) != 4 or len(update) != 4:
            continue
        pairs = [(cache[axis], update[axis]) for axis in (0, 1, 3)]
        if any(isinstance(one, int) and isinstance(other, int) and one != other for one, other in pairs):
            yield Finding(_label(node), f"an update like {_shape_text(cache)} but for axis 2", _shape_text(update))


# --- attention


def attention_pasts(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        for index, name in ((4, "past_key"), (5, "past_value")):
            if _given(node, index):
                yield Finding(_label(node), f"no {name}", node.input[index])


def attention_lengths(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        if _given(node, 6):
            yield Finding(_label(node), "no nonpad_kv_seqlen", node.input[6])


def attention_causal(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        producer = network.producer(_given(node, 1))
        if attributes(node).get("is_causal") and producer is not None and producer.op_type == "TensorScatter":
            yield Finding(_label(node), "a mask", f"is_causal over the cache of {_label(producer)}")


def attention_causal_and_mask(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        if attributes(node).get("is_causal") and _given(node, 3):
            yield Finding(_label(node), "a mask or is_causal", "both")


def attention_mask_dtypes(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        mask, query = network.dtype(_given(node, 3)), network.dtype(_given(node, 0))
        if mask is not None and query is not None and mask not in (TensorProto.BOOL, query):
            yield Finding(_label(node), f"a mask of bool or {_dtype_name(query)}", _dtype_name(mask))


def attention_mask_shapes(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        mask = _given(node, 3)
        wanted = (network.size(_given(node, 0), -2), network.size(_given(node, 1), -2))
        found = (network.size(mask, -2), network.size(mask, -1))
        if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(wanted, found, strict=True)):
            yield Finding(_label(node), f"a mask that ends in {_shape_text(wanted)}", _shape_text(found))


def attention_heads(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        for index in (0, 1, 2):
            shape = network.shape(_given(node, index))
            if shape is not None and len(shape) == 4 and any(isinstance(shape[axis], str) for axis in (1, 3)):
                yield Finding(_label(node), f"numbers for heads and head size of input {index}", _shape_text(shape))


def _heads(network: TypedNetwork, node: onnx.NodeProto, index: int) -> int | None:
    """Heads of the queries (input 0) or the keys (1) of an Attention; None if unknown."""
    shape = network.shape(_given(node, index))
    if shape is not None and len(shape) == 3:
        return attributes(node).get(("q_num_heads", "kv_num_heads")[index])
    heads = network.size(_given(node, index), 1)
    return heads if isinstance(heads, int) else None


def attention_groups(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        queries, keys = (_heads(network, node, index) for index in (0, 1))
        if queries and keys and queries % keys:
            yield Finding(_label(node), "query heads in a whole multiple of key heads", f"{queries} and {keys}")


def attention_in_conditions(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.conditional:
        if node.op_type == "Attention":
            yield Finding(_label(node), "attention outside of If, Loop and Scan", "inside")


def attention_scales(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        scale = attributes(node).get("scale")
        if scale != 1.0:
            yield Finding(_label(node), "scale 1.0 and queries scaled before", f"scale {scale}")


def attention_head_sizes(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        size = network.size(_given(node, 0), 3)
        if isinstance(size, int) and (size not in HEAD_SIZES or size % 8):
            yield Finding(
                _label(node), f"a head size of {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}, a multiple of 8", str(size)
            )


def attention_lengths_of_keys(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        keys = network.size(_given(node, 1), -2)
        if isinstance(keys, int) and keys > MOST_KEYS:
            yield Finding(_label(node), f"at most {MOST_KEYS:,} keys", f"{keys:,}")


def attention_casts(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        for index in (0, 1, 2):
            producer = network.producer(_given(node, index))
            if producer is not None and producer.op_type == "Cast":
                yield Finding(_label(node), f"no Cast in front of input {index}", _label(producer))


def attention_float_masks(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("Attention"):
        mask = network.dtype(_given(node, 3))
        if mask in FLOATS:
            yield Finding(_label(node), "a mask of bool", _dtype_name(mask))


# --- quantization


def _codes_dtype(network: TypedNetwork, node: onnx.NodeProto) -> int | None:
    """What a Q makes or a DQ takes, as TensorRT sees it; None if unknown."""
    if node.op_type == "DequantizeLinear":
        return network.dtype(_given(node, 0))
    if _given(node, 2):
        return network.dtype(_given(node, 2))
    return attributes(node).get("output_dtype") or TensorProto.INT8


def zero_points(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear", "DequantizeLinear"):
        value = network.constant(_given(node, 2))
        if value is not None and np.any(value.astype(np.float32) != 0):
            first = value.reshape(-1)[np.flatnonzero(value)[0]]
            yield Finding(
                _label(node), "a zero point of zeros: quantization is symmetric", f"{first} in {node.input[2]}"
            )


def unread_zero_points(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear", "DequantizeLinear"):
        name = _given(node, 2)
        if name in network.constants and network.constant(name) is None:
            yield Finding(_label(node), "zeros, or no zero point", f"{name} in a weight file, which is not read")


def unsigned_zero_points(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear", "DequantizeLinear"):
        if network.dtype(_given(node, 2)) == TensorProto.UINT8:
            yield Finding(_label(node), "a zero point of int8", "uint8")


def missing_code_dtypes(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear"):
        if not _given(node, 2) and not attributes(node).get("output_dtype"):
            yield Finding(_label(node), "output_dtype or a zero point", "neither: ONNX rounds to uint8 then")


def wrong_code_dtypes(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear"):
        dtype = _codes_dtype(network, node)
        if dtype is not None and dtype not in CODES | {TensorProto.UINT8}:
            yield Finding(_label(node), _dtype_names(CODES), _dtype_name(dtype))


def early_code_dtypes(network: TypedNetwork) -> Iterator[Finding]:
    opset = max((entry.version for entry in network.source.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    for node in network.built_in("QuantizeLinear", "DequantizeLinear"):
        needed = CODE_OPSETS.get(_codes_dtype(network, node) or 0, 0)
        if opset < needed:
            yield Finding(_label(node), f"opset {needed} or later", str(opset))


def zero_point_and_output_dtype(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("DequantizeLinear"):
        zero, output = network.dtype(_given(node, 2)), attributes(node).get("output_dtype")
        if zero is not None and output and zero != output:
            found = f"a zero point in {_dtype_name(zero)} and output_dtype {_dtype_name(output)}"
            yield Finding(_label(node), "a zero point or output_dtype", found)


def dequantized_dtypes(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("DequantizeLinear"):
        output = attributes(node).get("output_dtype")
        if output and output not in FLOATS:
            yield Finding(_label(node), f"output_dtype of {_dtype_names(FLOATS)}", _dtype_name(output))


def scale_dtypes(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear"):
        x, scale = (network.dtype(_given(node, index)) for index in (0, 1))
        if x is not None and scale in (TensorProto.FLOAT16, TensorProto.BFLOAT16) and scale != x:
            yield Finding(_label(node), f"a scale in float or {_dtype_name(x)}", _dtype_name(scale))


def float32_scales_of_fp8(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear", "DequantizeLinear"):
        value = _given(node, 0) if node.op_type == "QuantizeLinear" else "".join(node.output)
        half, scale = network.dtype(value), network.dtype(_given(node, 1))
        is_fp8 = _codes_dtype(network, node) == TensorProto.FLOAT8E4M3FN
        if is_fp8 and scale == TensorProto.FLOAT and half in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            yield Finding(_label(node), f"a scale in {_dtype_name(half)}", "float")


def scale_values(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear", "DequantizeLinear"):
        scale = network.constant(_given(node, 1))
        if scale is not None and not np.all(scale.astype(np.float32) > 0):
            yield Finding(_label(node), "positive scales", str(scale.astype(np.float32).min()))


def scale_shapes(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear", "DequantizeLinear"):
        data, scale = (network.shape(_given(node, index)) for index in (0, 1))
        if data is None or scale is None:
            continue
        problem = _scale_problem(data, scale, attributes(node).get("axis", 1))
        if problem is not None:
            yield Finding(_label(node), problem, f"{_shape_text(scale)} for {_shape_text(data)}")


def _scale_problem(data: Sequence[Size], scale: Sequence[Size], axis: int) -> str | None:
    if all(size == 1 for size in scale):
        return None
    if len(scale) == 1 and isinstance(scale[0], int) and -len(data) <= axis < len(data):
        channels = data[axis]
        matches = channels == scale[0] or not isinstance(channels, int)
        return None if matches else f"a scale for each of {channels} on axis {axis}"
    if len(scale) == len(data):
        is_static = all(isinstance(size, int) for size in (*data, *scale))
        blocked_axes = sum(ours != theirs for ours, theirs in zip(data, scale, strict=True))
        return None if blocked_axes == 1 or not is_static else "blocks along one axis"
    return "a scale of one element, of one dimension and fixed size, or of the rank of the data"


def per_channel_activations(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear", "DequantizeLinear"):
        scale = network.shape(_given(node, 1))
        per_channel = scale is not None and len(scale) == 1 and scale[0] != 1
        if per_channel and _given(node, 0) not in network.rooted_in_constants:
            yield Finding(_label(node), "one scale for a tensor that is no weight", _shape_text(scale or ()))


def fp8_per_channel(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("DequantizeLinear"):
        scale = network.shape(_given(node, 1))
        if network.dtype(_given(node, 0)) == TensorProto.FLOAT8E4M3FN and scale and scale[0] != 1 and len(scale) == 1:
            yield Finding(_label(node), "one scale per FP8 weight", _shape_text(scale))


def _origin(network: TypedNetwork, name: str | None) -> tuple[list[onnx.NodeProto], onnx.NodeProto | None]:
    """The nodes that only move or cast a value, from the last to the first, and what made it before them."""
    between: list[onnx.NodeProto] = []
    producer = network.producer(name)
    while producer is not None and producer.op_type in MOVES:
        between.append(producer)
        producer = network.producer(_given(producer, 0))
    return between, producer


def moved_after_dequantizing(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in(*PRODUCTS):
        for index in (0, 1):
            between, producer = _origin(network, _given(node, index))
            if between and producer is not None and producer.op_type == "DequantizeLinear":
                yield Finding(_label(node), f"{_label(producer)} right in front of it", _label(between[0]))


def half_quantized_products(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in(*PRODUCTS):
        x, weight = (_origin(network, _given(node, index))[1] for index in (0, 1))
        if x is not None and x.op_type == "DequantizeLinear" and (weight is None or weight.op_type != x.op_type):
            yield Finding(_label(node), "both operands out of a DequantizeLinear", f"{_given(node, 1)} is not")


def weights_quantized_late(network: TypedNetwork) -> Iterator[Finding]:
    for node in network.built_in("QuantizeLinear"):
        weight = _given(node, 0)
        if weight in network.constants:
            yield Finding(_label(node), "a weight that is stored as codes", f"{weight} in floats")
