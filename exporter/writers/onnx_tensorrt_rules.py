"""What TensorRT's ONNX importer and its builder take, per version: rules as data, and the check of a network.

A rule is one sentence about a network, the versions it holds for, what happens to a network that breaks it, and how we
know. Nobody here has run TensorRT: `Evidence` says whether a rule was read in the importer's source or in the
documentation, was reported by others, or is inferred and yet to be probed (benchmarks/tensorrt_probes.py).

Rules that only look at one op's row of `onnx_tensorrt_ops.OPS` come first, then rules about the network's form, the KV
cache, attention, and quantization. Weights in external files are never read.
"""

from __future__ import annotations

import enum
import os.path
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx
from google.protobuf.message import DecodeError

from exporter.errors import CheckpointError, TargetError
from exporter.network import NETWORK_FILE, network_manifest_from_json
from exporter.safetensors_io import read_json
from exporter.writers import onnx_tensorrt_conditions as conditions
from exporter.writers.onnx_tensorrt_conditions import Finding
from exporter.writers.onnx_tensorrt_network import TypedNetwork, Version, version_text

RUNTIME = "tensorrt"
VERSIONS: tuple[Version, ...] = ((10, 15), (10, 16), (11, 0), (11, 1), (11, 2), (11, 3), (11, 4))


class Severity(enum.Enum):
    REFUSED = "refuses it"
    WRONG_RESULTS = "gives wrong results"
    WARNING = "takes it, slower or less exactly, or nobody knows"

    @property
    def is_violation(self) -> bool:
        return self is not Severity.WARNING


class Evidence(enum.Enum):
    """How a rule is known; none of them was executed."""

    IMPORTER = "read in the importer's source"
    DOCUMENTED = "documented"
    REPORTED = "reported by others who ran it"
    UNVERIFIED = "inferred, unverified"


@dataclass(frozen=True, slots=True)
class Rule:
    """`find` yields every place of a network that breaks the rule."""

    id: str
    statement: str
    find: Callable[[TypedNetwork], Iterator[Finding]]
    severity: Severity
    evidence: Evidence
    source: str
    hint: str
    since: Version = VERSIONS[0]
    before: Version | None = None  # the first version that no longer has it

    def holds_for(self, version: Version) -> bool:
        return self.since <= version and (self.before is None or version < self.before)


class Violation(TargetError):
    """One place of a network that breaks one rule of one version of TensorRT."""

    def __init__(self, rule: Rule, version: Version, file: str, finding: Finding) -> None:
        self.rule = rule
        super().__init__(
            f"TensorRT {version_text(version)} {rule.severity.value} [{rule.id}, {rule.evidence.value}]: "
            f"{rule.statement}",
            file=file,
            tensor=finding.where,
            expected=finding.expected,
            found=finding.found,
            hint=rule.hint,
        )


class _Targeted(Protocol):
    """A network as an export's options, or a folder's manifest, describe it."""

    @property
    def file(self) -> str: ...

    @property
    def target(self) -> str: ...


def version_from_text(text: str) -> Version:
    """Parse what `--check` takes: "tensorrt" is the newest version that is known, "tensorrt:10.15" that one.

    Raises:
        TargetError: another runtime, or a version that no rule was established for.
    """
    known = {version_text(version): version for version in VERSIONS}
    runtime, colon, version = text.partition(":")
    if runtime != RUNTIME or (colon and version not in known):
        raise TargetError(
            "no rules for this runtime",
            expected=f"{RUNTIME} or {RUNTIME}:<version>, one of {', '.join(known)}",
            found=text,
        )
    return known.get(version, VERSIONS[-1])


def rules_for(installed: tuple[int, ...] | None) -> Version:
    """The version whose rules hold for an installed one: its own, or the last known before it. None: the newest."""
    if installed is None:
        return VERSIONS[-1]
    return max((known for known in VERSIONS if known <= installed[:2]), default=VERSIONS[0])


def read_network(file: str, content: bytes | Path) -> onnx.ModelProto:
    """Parse an .onnx file, or its bytes; external data stays where it is.

    Raises:
        CheckpointError: not an ONNX network, or not readable.
    """
    try:
        encoded = content if isinstance(content, bytes) else content.read_bytes()
        model = onnx.load_model_from_string(encoded)
    except (DecodeError, OSError) as error:
        raise CheckpointError("not a readable ONNX network", file=file) from error
    if not model.graph.node:
        raise CheckpointError("an ONNX network without nodes", file=file)
    return model


def check_network(
    model: onnx.ModelProto, version: Version = VERSIONS[-1], *, file: str = "", plugins: Collection[str] = ()
) -> list[Violation]:
    """Return every place of a network that breaks a rule of `version`, warnings included, in the order of the rules.

    Args:
        model: a network; its external data is not read.
        version: one of `VERSIONS`.
        file: what messages call it.
        plugins: op types that plugins implement: not looked into, and neither are local functions of their names.

    Raises:
        CheckpointError: not valid ONNX, so that types cannot be inferred, or values not be read.
    """
    network = TypedNetwork(model, version, plugins, file=file)
    return [
        Violation(rule, version, file, finding)
        for rule in RULES
        if rule.holds_for(version)
        for finding in rule.find(network)
    ]


def refuse_violations(
    files: Mapping[str, bytes | Path], version: Version, *, plugins: Collection[str] = ()
) -> list[Violation]:
    """Check networks, .onnx files or their bytes by name, and return the warnings.

    Raises:
        TargetError: a rule is broken; lists every place of every network.
        CheckpointError: a file is not an ONNX network.
    """
    found = [
        violation
        for file, content in files.items()
        for violation in check_network(read_network(file, content), version, file=file, plugins=plugins)
    ]
    broken = [violation for violation in found if violation.rule.severity.is_violation]
    if broken:
        raise summary(broken, version)
    return found


def networks_to_check(network: Path) -> tuple[dict[str, Path], list[str]]:
    """Find what to check in a network folder, or take the .onnx file itself.

    Returns:
        The files by name, those written for TensorRT or all if none is; their plugins, of `onnx_options.PLUGINS`.

    Raises:
        CheckpointError: neither a file nor a network folder.
    """
    if os.path.isfile(network):
        return {network.name: network}, []
    if not os.path.isfile(network / NETWORK_FILE):
        raise CheckpointError("no network to check", file=network, expected="an .onnx file, or a folder that has them")
    manifest = network_manifest_from_json(read_json(network / NETWORK_FILE), network / NETWORK_FILE)
    files = {file: network / file for file in files_for_tensorrt(manifest.networks)}
    plugins = {name for one in manifest.networks if one.file in files for name in one.plugins}
    return files, sorted(plugins)


def files_for_tensorrt(networks: Sequence[_Targeted]) -> list[str]:
    """The files of those written for TensorRT, or of all if none is."""
    return [one.file for one in networks if one.target == RUNTIME] or [one.file for one in networks]


def summary(violations: Sequence[Violation], version: Version) -> TargetError:
    """One error that lists them all: a paragraph for each rule, a line for each place."""
    paragraphs = []
    for rule in dict.fromkeys(violation.rule for violation in violations):
        broken = [violation for violation in violations if violation.rule is rule]
        head = f"{rule.id}: {rule.statement} (TensorRT {rule.severity.value}; {rule.evidence.value}: {rule.source})"
        places = [f"{v.file}: {v.tensor}: expected {v.expected}, found {v.found}" for v in broken]
        lines = ["    " + place.replace("\n", "\\n") for place in places]  # names are not ours
        paragraphs.append("\n".join([f"  {head}", *lines, f"    -> {rule.hint}"]))
    counts = f"{len(violations)} places against {len(paragraphs)} of its import rules"
    return TargetError("\n".join([f"TensorRT {version_text(version)}: {counts}", *paragraphs]))


_REFUSED, _WRONG, _WARNING = Severity.REFUSED, Severity.WRONG_RESULTS, Severity.WARNING
_IMPORTER, _DOCUMENTED, _REPORTED, _UNVERIFIED = (
    Evidence.IMPORTER,
    Evidence.DOCUMENTED,
    Evidence.REPORTED,
    Evidence.UNVERIFIED,
)
_OPERATORS = "onnx-tensorrt, docs/operators.md of 10.15 and 11.1"
_ATTENTION = "AttentionHelpers.cpp and onnxOpCheckers.cpp of 10.16 and 11.0"
_QDQ = "QuantDequantLinearHelper in onnxOpImporters.cpp of 10.16 and 11.0"
_CACHE_LAYER = "NvInfer.h of 11.1, IKVCacheUpdateLayer"
_STRONG_TYPES = "the importer casts nothing in a strongly typed network, the only kind since 11.0"
_OWN_FORM = f"export with --target {RUNTIME}"

RULES: tuple[Rule, ...] = (
    # one op at a time
    Rule(
        "op-unknown",
        "every op has an importer, is a local function, or is a plugin",
        conditions.unknown_ops,
        _REFUSED,
        _DOCUMENTED,
        _OPERATORS,
        "write it with other ops, or name it with --plugin if a plugin implements it",
    ),
    Rule(
        "op-version",
        "every op's importer is there in this version",
        conditions.later_ops,
        _REFUSED,
        _DOCUMENTED,
        f"{_OPERATORS}; CHANGELOG.md of TensorRT",
        "use a newer TensorRT, or write the op with others (Swish: Mul and Sigmoid)",
    ),
    Rule(
        "op-domain",
        "no op of another domain has the name of an ONNX op, which TensorRT would take it for",
        conditions.foreign_domains,
        _WRONG,
        _IMPORTER,
        "parseNode in ModelImporter.cpp of 10.16 and 11.0: looked up by name alone; Edge-LLM 0.11 relies on it",
        "use the op of ONNX, or another name",
    ),
    Rule(
        "op-dtype",
        "inputs have dtypes that the op's importer takes",
        conditions.wrong_dtypes,
        _REFUSED,
        _DOCUMENTED,
        _OPERATORS,
        "cast, or quantize and dequantize, before it",
    ),
    Rule(
        "op-mixed-dtypes",
        "operands of one op have one dtype",
        conditions.mixed_dtypes,
        _REFUSED,
        _IMPORTER,
        _STRONG_TYPES,
        "insert a Cast where the dtypes meet",
    ),
    Rule(
        "op-attribute",
        "a node has only attributes that its importer reads",
        conditions.attribute_names,
        _REFUSED,
        _IMPORTER,
        _ATTENTION,
        "leave the attribute out",
    ),
    Rule(
        "op-attribute-value",
        "attributes have values that the importer takes",
        conditions.attribute_values,
        _REFUSED,
        _IMPORTER,
        f"{_ATTENTION}; {_OPERATORS}",
        "use another value, or other ops",
    ),
    Rule(
        "op-inputs",
        "a node has as many inputs as its importer takes",
        conditions.input_counts,
        _REFUSED,
        _IMPORTER,
        _QDQ,
        "give the inputs that are missing",
    ),
    Rule(
        "op-outputs",
        "a node has the outputs that its importer makes; of Attention, the first, and none with an empty name",
        conditions.output_counts,
        _REFUSED,
        _IMPORTER,
        "parseNode in ModelImporter.cpp, and Attention in onnxOpImporters.cpp, of 10.16 and 11.0; issue 4738 of "
        "NVIDIA/TensorRT",
        "drop outputs that nobody reads, with their empty names; compute the others with other nodes",
    ),
    Rule(
        "op-rank",
        "inputs have the number of dimensions that the importer takes",
        conditions.ranks,
        _REFUSED,
        _DOCUMENTED,
        _OPERATORS,
        "reshape before it",
    ),
    Rule(
        "op-constant-input",
        "axes are constants",
        conditions.variable_axes,
        _REFUSED,
        _DOCUMENTED,
        _OPERATORS,
        "make the axes an initializer",
    ),
    Rule(
        "top-k",
        "TopK takes less than 3840 elements",
        conditions.large_top_k,
        _REFUSED,
        _DOCUMENTED,
        _OPERATORS,
        "take fewer elements",
    ),
    # the network's form
    Rule(
        "opset",
        "the opset is one that the parser knows",
        conditions.opset,
        _REFUSED,
        _DOCUMENTED,
        _OPERATORS,
        "export with opset 24",
    ),
    Rule(
        "ir-version",
        "the IR version is one that the parser is known to take",
        conditions.ir_version,
        _WARNING,
        _UNVERIFIED,
        "which version the parser's own ONNX stops at is not published",
        f"write ir_version {conditions.IR_VERSION}",
    ),
    Rule(
        "double",
        "nothing is float64, which is clamped to float32",
        conditions.doubles,
        _WRONG,
        _DOCUMENTED,
        _OPERATORS,
        "cast to float32 where the difference does not matter",
    ),
    Rule(
        "uint8",
        "uint8 is at the network's inputs and outputs only",
        conditions.inner_uint8,
        _REFUSED,
        _DOCUMENTED,
        _OPERATORS,
        "use int8 codes, or cast at the input",
    ),
    Rule(
        "dtype",
        "every dtype is one that TensorRT has",
        conditions.unknown_dtypes,
        _REFUSED,
        _DOCUMENTED,
        _OPERATORS,
        "use another dtype",
    ),
    Rule(
        "cast-codes",
        "codes of FP8, FP4, INT4 and INT8 are made and read by Q and DQ, never by Cast",
        conditions.casts_of_codes,
        _REFUSED,
        _IMPORTER,
        "onnxOpImporters.cpp, Cast; docs/operators.md",
        "use QuantizeLinear and DequantizeLinear",
    ),
    Rule(
        "function-name",
        "local functions have names that are unique over all domains",
        conditions.function_names,
        _WRONG,
        _IMPORTER,
        "importLocalFunctions in ModelImporter.cpp of 10.16 and 11.0: the first of a name stays",
        "rename one of them",
    ),
    Rule(
        "function-inputs",
        "a call passes as many inputs as its local function declares",
        conditions.function_inputs,
        _REFUSED,
        _IMPORTER,
        "onnxOpCheckers.cpp of 11.0, LocalFunctionImporter",
        "pass all inputs, or write a function for each number of inputs",
    ),
    Rule(
        "large-initializer",
        "no initializer has more elements than 32 bits can count",
        conditions.large_initializers,
        _WARNING,
        _REPORTED,
        "issues 1948 and 4123 of NVIDIA/TensorRT; issue 3495 of NVIDIA/TensorRT-LLM, about the FFNs of Ultra-253B",
        "fuse fewer FFNs into one",
    ),
    Rule(
        "external-data",
        "weight files are beside the network or below, and named by location, offset, length and checksum",
        conditions.external_data,
        _REFUSED,
        _IMPORTER,
        "WeightsContext.cpp of 10.16",
        "save the network again, with its weights in its folder",
    ),
    Rule(
        "empty-initializer",
        "no initializer is empty",
        conditions.empty_initializers,
        _WARNING,
        _UNVERIFIED,
        "Edge-LLM 0.11 rewrites such initializers before it parses",
        "leave the node out that reads it",
    ),
    # norms and rotary embedding
    Rule(
        "rms-norm-dtype",
        "RMSNormalization has one dtype: ONNX types the output by the weight, TensorRT by the input",
        conditions.norm_weights,
        _WRONG,
        _IMPORTER,
        "onnxOpImporters.cpp of 11.0, RMSNormalization",
        "cast the weight to the dtype of the input",
    ),
    Rule(
        "rotary-empty-positions",
        "position_ids of RotaryEmbedding are given or left out, not given as an empty name",
        conditions.empty_positions,
        _REFUSED,
        _UNVERIFIED,
        "onnxOpImporters.cpp of 11.0, RotaryEmbedding: counts inputs, and looks for no empty name",
        "leave the input out",
    ),
    Rule(
        "rotary-tables",
        "cos and sin have 2 dimensions with position_ids and 3 without",
        conditions.rotary_tables,
        _REFUSED,
        _DOCUMENTED,
        "NvInfer.h of 11.1, IRotaryEmbeddingLayer",
        "gather the rows in the network, or give position_ids",
    ),
    Rule(
        "rotary-heads",
        "a RotaryEmbedding of 3 dimensions has num_heads",
        conditions.rotary_heads,
        _REFUSED,
        _IMPORTER,
        "onnxOpImporters.cpp of 10.16 and 11.0, RotaryEmbedding",
        "set num_heads",
    ),
    # KV cache
    Rule(
        "cache-input",
        "the cache that TensorScatter writes to is an input of the network",
        conditions.cache_inputs,
        _REFUSED,
        _DOCUMENTED,
        _CACHE_LAYER,
        "pass the input to TensorScatter itself, with nothing between",
    ),
    Rule(
        "cache-output",
        "what TensorScatter writes is an output of the network, bound to the memory of its input",
        conditions.cache_outputs,
        _REFUSED,
        _DOCUMENTED,
        _CACHE_LAYER,
        "declare it an output of the network",
    ),
    Rule(
        "cache-once",
        "one TensorScatter writes to a cache",
        conditions.caches_written_twice,
        _REFUSED,
        _UNVERIFIED,
        _CACHE_LAYER,
        "give each a cache of its own: keys and values, and every layer",
    ),
    Rule(
        "cache-capacity",
        "the capacity of a cache is fixed",
        conditions.cache_capacity,
        _REFUSED,
        _REPORTED,
        f"{_CACHE_LAYER}; NVIDIA's TensorRT-Model-Connect has a test of the refusal with 11.2",
        f"{_OWN_FORM}, whose capacity is max_positions",
    ),
    Rule(
        "cache-batch",
        "the number of sequences in a cache is fixed",
        conditions.cache_batch,
        _WARNING,
        _UNVERIFIED,
        "not forbidden; all known users of the layer fix it",
        "export with --batch",
    ),
    Rule(
        "cache-update",
        "an update has the cache's sequences, heads and head size",
        conditions.cache_updates,
        _REFUSED,
        _DOCUMENTED,
        _CACHE_LAYER,
        "make the shapes agree",
    ),
    # attention
    Rule(
        "attention-past",
        "past_key and past_value are left out",
        conditions.attention_pasts,
        _REFUSED,
        _IMPORTER,
        _ATTENTION,
        "write the cache with TensorScatter",
    ),
    Rule(
        "attention-nonpad",
        "nonpad_kv_seqlen is left out: it is dropped without a word, and the unwritten end of the cache attended to",
        conditions.attention_lengths,
        _WRONG,
        _IMPORTER,
        f"{_ATTENTION}; later importers were not readable",
        "pass a mask",
    ),
    Rule(
        "attention-causal",
        "is_causal is not for caches: query i attends to keys up to i, however many the cache holds before them",
        conditions.attention_causal,
        _WRONG,
        _DOCUMENTED,
        "NvInfer.h of 11.1, CausalMaskKind; ONNX's offset comes from nonpad_kv_seqlen, which is not read",
        "pass a mask: key position <= query position",
    ),
    Rule(
        "attention-causal-mask",
        "a mask or is_causal, not both",
        conditions.attention_causal_and_mask,
        _REFUSED,
        _DOCUMENTED,
        "NvInfer.h of 11.1, IAttention::setMask",
        "put causality into the mask",
    ),
    Rule(
        "attention-mask-dtype",
        "a mask is bool, or has the dtype of the queries",
        conditions.attention_mask_dtypes,
        _REFUSED,
        _DOCUMENTED,
        "NvInfer.h of 11.1, IAttention::setMask",
        "compare positions, which gives bool",
    ),
    Rule(
        "attention-mask-shape",
        "a mask has all queries and all keys; only sequences and heads are broadcast",
        conditions.attention_mask_shapes,
        _REFUSED,
        _DOCUMENTED,
        "NvInfer.h of 11.1, IAttention::setMask; AttentionHelpers.cpp of 11.0 pads no mask",
        "make the mask as long as the cache",
    ),
    Rule(
        "attention-heads",
        "heads and head size are numbers, not symbols",
        conditions.attention_heads,
        _REFUSED,
        _REPORTED,
        "Torch-TensorRT; TensorRT's page on fused attention",
        "reshape with numbers for heads and head size",
    ),
    Rule(
        "attention-groups",
        "query heads are a whole multiple of key heads",
        conditions.attention_groups,
        _REFUSED,
        _DOCUMENTED,
        "NvInfer.h of 11.1, IAttention",
        "use as many query heads for every key head",
    ),
    Rule(
        "attention-condition",
        "attention is outside of control flow",
        conditions.attention_in_conditions,
        _REFUSED,
        _REPORTED,
        "issues 4739 and 4757 of NVIDIA/TensorRT, with 10.16",
        "take it out of the condition",
    ),
    Rule(
        "attention-scale",
        "scale is 1 and queries are scaled before: TensorRT multiplies queries and all keys by its rounded root",
        conditions.attention_scales,
        _WARNING,
        _IMPORTER,
        f"{_ATTENTION}; 0.3 % off in bfloat16 with a head size of 128",
        "multiply the queries, and set scale to 1",
    ),
    Rule(
        "attention-head-size",
        "the head size is one that fused kernels have",
        conditions.attention_head_sizes,
        _WARNING,
        _DOCUMENTED,
        "TensorRT's page on fused attention; issue 4705 of NVIDIA/TensorRT",
        "build the engine with --decomposable-attention",
    ),
    Rule(
        "attention-keys",
        "attention is over as many keys as fused kernels are known for; a longer cache may have none",
        conditions.attention_lengths_of_keys,
        _WARNING,
        _REPORTED,
        "NVIDIA's TensorRT-Model-Connect, pull requests 1035 (16,384 is qualified) and 873 (40,960 had none on SM86)",
        "export with fewer --max-positions, or build the engine with --decomposable-attention",
    ),
    Rule(
        "attention-cast",
        "no Cast stands in front of queries, keys or values: it breaks the fusion",
        conditions.attention_casts,
        _WARNING,
        _REPORTED,
        "Torch-TensorRT",
        "cast before the projection, or compute in one dtype",
    ),
    Rule(
        "attention-float-mask",
        "a mask is bool: one of floats takes the memory of its values, and needs a finite minus infinity",
        conditions.attention_float_masks,
        _WARNING,
        _UNVERIFIED,
        "NvInfer.h of 11.1, IAttention; which form fuses on Hopper is to be probed",
        "compare positions, which gives bool",
    ),
    # quantization
    Rule(
        "zero-point",
        "zero points are zero",
        conditions.zero_points,
        _REFUSED,
        _IMPORTER,
        _QDQ,
        "quantize symmetrically",
    ),
    Rule(
        "zero-point-unread",
        "zero points are left out, or in the .onnx file where they can be checked",
        conditions.unread_zero_points,
        _WARNING,
        _IMPORTER,
        _QDQ,
        _OWN_FORM,
    ),
    Rule(
        "zero-point-uint8",
        "codes are signed: a uint8 zero point is taken for int8",
        conditions.unsigned_zero_points,
        _WRONG,
        _IMPORTER,
        _QDQ,
        "use int8 codes",
    ),
    Rule(
        "zero-point-output-dtype",
        "a DequantizeLinear has a zero point or output_dtype, unless they name one dtype",
        conditions.zero_point_and_output_dtype,
        _REFUSED,
        _IMPORTER,
        "QuantDequantLinearHelper in onnxOpImporters.cpp of 10.16; 11.0 asks it of QuantizeLinear only",
        "leave the zero point out",
        before=(11, 0),
    ),
    Rule(
        "codes-dtype-missing",
        "QuantizeLinear says which codes it makes: TensorRT makes int8 of what is uint8 in ONNX",
        conditions.missing_code_dtypes,
        _WRONG,
        _IMPORTER,
        _QDQ,
        "set output_dtype",
    ),
    Rule(
        "codes-dtype",
        "codes are int8, FP8 E4M3, int4 or FP4",
        conditions.wrong_code_dtypes,
        _REFUSED,
        _IMPORTER,
        _QDQ,
        "quantize to one of these",
    ),
    Rule(
        "codes-opset",
        "the opset has these codes",
        conditions.early_code_dtypes,
        _REFUSED,
        _DOCUMENTED,
        "ONNX, QuantizeLinear",
        "export with opset 24",
    ),
    Rule(
        "dequantized-dtype",
        "DequantizeLinear makes floats",
        conditions.dequantized_dtypes,
        _REFUSED,
        _IMPORTER,
        _QDQ,
        "dequantize to the dtype of the network",
    ),
    Rule(
        "scale-dtype",
        "a scale of 16 bits has the dtype of what is quantized",
        conditions.scale_dtypes,
        _REFUSED,
        _DOCUMENTED,
        "NvInfer.h of 11.1, IQuantizeLayer",
        "use a float32 scale, or the dtype of the input",
    ),
    Rule(
        "fp8-scale-dtype",
        "scales of FP8 have the dtype of the network",
        conditions.float32_scales_of_fp8,
        _WARNING,
        _REPORTED,
        "NVIDIA's TensorRT-Model-Connect: float32 scales failed in the compiler",
        "round the scales to the dtype of the network before quantizing",
    ),
    Rule(
        "scale-positive",
        "scales are positive",
        conditions.scale_values,
        _REFUSED,
        _IMPORTER,
        _QDQ,
        "quantize again, with a smallest scale",
    ),
    Rule(
        "scale-shape",
        "a scale is per tensor, per channel of its axis, or per block of one axis",
        conditions.scale_shapes,
        _REFUSED,
        _IMPORTER,
        _QDQ,
        "set axis: 0 for weights [out, in]",
    ),
    Rule(
        "scale-activation",
        "scales per channel are for weights",
        conditions.per_channel_activations,
        _REFUSED,
        _DOCUMENTED,
        "NvInfer.h of 11.1, IQuantizeLayer and IDequantizeLayer",
        "use one scale, or divide by the scales outside",
    ),
    Rule(
        "fp8-channel",
        "FP8 weights have one scale each",
        conditions.fp8_per_channel,
        _WARNING,
        _UNVERIFIED,
        "allowed by NvInfer.h of 11.1, but no NVIDIA exporter writes it",
        "quantize in the format fp8 until it is probed",
    ),
    Rule(
        "dequantize-adjacent",
        "nothing stands between a DequantizeLinear and its product",
        conditions.moved_after_dequantizing,
        _WARNING,
        _DOCUMENTED,
        "TensorRT's page on quantized types; ModelOpt folds such nodes away",
        "transpose the codes instead, or use Gemm(transB=1)",
    ),
    Rule(
        "product-half-quantized",
        "a product with quantized inputs has a quantized weight",
        conditions.half_quantized_products,
        _WARNING,
        _DOCUMENTED,
        "TensorRT's page on quantized types",
        "quantize the weight, too",
    ),
    Rule(
        "weight-codes",
        "weights are stored as codes",
        conditions.weights_quantized_late,
        _WARNING,
        _DOCUMENTED,
        "TensorRT's page on quantized types",
        "store codes, and let DequantizeLinear read them",
    ),
)
