"""What the readers of a folder would reject or, worse, silently get wrong: rules as data.

A folder in a plain family (Llama, Mistral, Qwen) is what every reader was made for, but for what few models of it have:
`PLAIN_RULES`. The rules were established for the versions in `READERS`, by running the reader where `evidence` says so,
else by reading its model files (`nemotron_nas.py`, `nemotron-nas.py`, `modeling_nemotron_nas.py`, `conversion/deci.py`,
and those of the plain families), its rotary embedding and what it does with `quantization_config`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter.architectures import FAMILIES
from exporter.architectures.quantization import COMPRESSED_TENSORS, MODELOPT, Layout, Scheme, scheme_of
from exporter.dtypes import FLOAT8_E4M3FN, FLOAT64, INT8
from exporter.errors import TargetError
from exporter.graph import (
    CODES,
    FFN,
    FUSED_GEMMS,
    Activation,
    Attention,
    Block,
    Linear,
    LinearSublayer,
    ModelGraph,
    linears,
    weights,
)
from exporter.rope import Llama3Scaling, YarnScaling
from exporter.safetensors_io import read_json
from exporter.writers.hf import NEMOTRON_NAS, Options, folder_of
from exporter.writers.hf_quantization import FolderQuantization, differ, quantization_of


class Severity(enum.Enum):
    REJECTS = "rejects it"
    WRONG_RESULTS = "gives wrong results"


@dataclass(frozen=True, slots=True)
class Reader:
    name: str
    version: str
    evidence: str  # how the rules were established


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("transformers", "4.57.6 and 5.23.0", "run"),
        Reader("vllm", "0.33.0", "run on a CPU up to loaded weights; no forward pass"),
        Reader("sglang", "0.5.23", "read"),
        Reader("tensorrt-llm", "PyTorch backend, main branch of 2025 and 2026", "read"),
        Reader("llama.cpp", "as in llama-cpp-python 0.3.36", "run: converter and libllama"),
        Reader("mlx-lm", "0.32.2", "run"),
    )
}


class ReaderProblem(TargetError):
    """One rule that a folder breaks for one reader."""

    reader: Reader
    severity: Severity


@dataclass(frozen=True, slots=True)
class Folder:
    """What a rule looks at: the graph as written, and which block of the caller's graph each layer was."""

    graph: ModelGraph
    blocks: tuple[int, ...]  # index in the caller's `graph.blocks`, of every layer
    options: Options
    family: str  # "nemotron-nas", or a plain one
    quantization: FolderQuantization | None

    @property
    def layers(self) -> tuple[Block, ...]:
        return self.graph.flat_blocks

    @property
    def attentions(self) -> list[Attention]:
        return [attention for _, attention in self.graph.attentions]

    @property
    def ffns(self) -> list[FFN]:
        return [block.ffn for block in self.layers if isinstance(block.ffn, FFN)]

    def where(self, matches: Callable[[Block], object]) -> str | None:
        """Name the blocks that match, None if none does."""
        return _blocks_text([index for index, block in zip(self.blocks, self.layers, strict=True) if matches(block)])


@dataclass(frozen=True, slots=True)
class Rule:
    """`find` returns what it found, None if the folder is clean; `effects`: reader -> what it then does."""

    problem: str
    find: Callable[[Folder], str | None]
    effects: Mapping[str, tuple[Severity, str]]
    hint: str


def check_for(graph: ModelGraph, options: Options, readers: Iterable[str]) -> list[ReaderProblem]:
    """Return what each of `readers` would make of the folder that `hf.emit` writes, reader by reader.

    Args:
        graph: `hf.check` accepts it. Only shapes are read, tokenizer.json for llama.cpp, and scales that must be equal
            and are not one object.
        readers: keys of `READERS`.

    Raises:
        TargetError: an unknown reader; the message lists the known ones.
    """
    names = list(dict.fromkeys(readers))
    for name in names:
        if name not in READERS:
            raise TargetError("unknown reader", expected=", ".join(READERS), found=name)
    family, written = folder_of(graph, options)
    kept = tuple(index for index, entry in enumerate(graph.blocks) if not entry.is_empty)
    quantization = quantization_of(written, FAMILIES[family].tensors, options.quantization_layout)
    folder = Folder(written, kept, options, family, quantization)
    rules = (
        *(RULES if family == NEMOTRON_NAS else PLAIN_RULES),
        *SHARED_RULES,
        *(QUANTIZATION_RULES if quantization is not None else ()),
    )
    found = [(rule, rule.find(folder)) for rule in rules]
    return [
        _problem(rule, READERS[name], what)
        for name in names
        for rule, what in found
        if what is not None and name in rule.effects
    ]


def _problem(rule: Rule, reader: Reader, found: str) -> ReaderProblem:
    severity, effect = rule.effects[reader.name]
    text = f"{reader.name} ({reader.version}) {severity.value}: {rule.problem}: {effect}"
    problem = ReaderProblem(text, found=found, hint=rule.hint)
    problem.reader, problem.severity = reader, severity
    return problem


# --- conditions


def _first_has_no_attention(folder: Folder) -> str | None:
    if not folder.attentions or isinstance(folder.layers[0].attention, Attention):
        return None
    return f"block {folder.blocks[0]}"


def _no_attention(folder: Folder) -> str | None:
    return None if folder.attentions else "no block with attention"


def _attention_only_before_the_last(folder: Folder) -> str | None:
    last = folder.layers[-1]
    return folder.where(lambda block: block.ffn is None and block is not last)


def _attention_only_last(folder: Folder) -> str | None:
    return f"block {folder.blocks[-1]}" if folder.layers[-1].ffn is None else None


def _linear_attention(folder: Folder) -> str | None:
    return folder.where(lambda block: isinstance(block.attention, LinearSublayer))


def _linear_ffn(folder: Folder) -> str | None:
    return folder.where(lambda block: isinstance(block.ffn, LinearSublayer))


def _scaled_other_than_llama3(folder: Folder) -> str | None:
    scaling = folder.graph.rope.scaling
    return None if scaling is None or isinstance(scaling, Llama3Scaling) else type(scaling).__name__


def _untruncated_yarn(folder: Folder) -> str | None:
    scaling = folder.graph.rope.scaling
    return "truncate False" if isinstance(scaling, YarnScaling) and not scaling.truncate else None


def _yarn_attention_factor(folder: Folder) -> str | None:
    rope = folder.graph.rope
    if not isinstance(rope.scaling, YarnScaling):
        return None
    otherwise = replace(rope, scaling=replace(rope.scaling, attention_factor=None)).attention_factor
    if math.isclose(rope.attention_factor, otherwise):
        return None
    return f"attention_factor {rope.attention_factor:g}, {otherwise:g} without it"


def _yarn_mscales(folder: Folder) -> str | None:
    scaling = folder.graph.rope.scaling
    if not isinstance(scaling, YarnScaling) or scaling.mscale is None or scaling.mscale_all_dim is None:
        return None
    return f"mscale {scaling.mscale:g}, mscale_all_dim {scaling.mscale_all_dim:g}"


def _yarn_mscale_alone(folder: Folder) -> str | None:
    """One of the two; what that means without the other is transformers' choice: nothing."""
    scaling = folder.graph.rope.scaling
    if not isinstance(scaling, YarnScaling) or (scaling.mscale is None) == (scaling.mscale_all_dim is None):
        return None
    if scaling.mscale is None:
        return f"mscale_all_dim {scaling.mscale_all_dim:g} alone"
    return None if scaling.mscale == 1 else f"mscale {scaling.mscale:g} alone"


def _own_head_dim_of_qwen2(folder: Folder) -> str | None:
    return _own_head_dim(folder) if folder.family == "qwen2" else None


def _own_head_dim(folder: Folder) -> str | None:
    if not folder.attentions:
        return None
    attention, hidden_size = folder.attentions[0], folder.graph.hidden_size
    if attention.head_dim * attention.num_attention_heads == hidden_size:
        return None
    return f"head_dim {attention.head_dim}, hidden_size {hidden_size}, {attention.num_attention_heads} heads"


def _qk_norm(folder: Folder) -> str | None:
    return folder.where(lambda block: isinstance(block.attention, Attention) and block.attention.q_norm)


def _different_kv_heads(folder: Folder) -> str | None:
    counts = sorted({attention.num_key_value_heads for attention in folder.attentions})
    return None if len(counts) < 2 else f"num_key_value_heads {counts}"


def _attention_bias(folder: Folder) -> str | None:
    return folder.where(lambda block: isinstance(block.attention, Attention) and block.attention.q_proj.bias)


def _qk_norm_and_bias(folder: Folder) -> str | None:
    return _attention_bias(folder) if _qk_norm(folder) else None


def _ffn_bias(folder: Folder) -> str | None:
    return folder.where(lambda block: isinstance(block.ffn, FFN) and block.ffn.gate_proj.bias)


def _window(folder: Folder) -> str | None:
    limit = folder.graph.max_position_embeddings

    def matches(block: Block) -> bool:
        window = block.attention.sliding_window if isinstance(block.attention, Attention) else None
        return window is not None and window < limit

    return folder.where(matches)


def _not_silu(folder: Folder) -> str | None:
    names = {ffn.activation.value for ffn in folder.ffns} - {Activation.SILU.value}
    return f"hidden_act {names.pop()}" if names else None


def _gelu_tanh(folder: Folder) -> str | None:
    found = any(ffn.activation is Activation.GELU_TANH for ffn in folder.ffns)
    return f"hidden_act {Activation.GELU_TANH.value}" if found else None


def _several_dtypes(folder: Folder) -> str | None:
    found = {tensor.dtype for tensor in weights(folder.graph, scales=False)} - {*CODES, folder.graph.dtype}
    names = sorted(dtype.name for dtype in found)
    return f"{', '.join(names)} beside {folder.graph.dtype.name}" if names else None


def _float64(folder: Folder) -> str | None:
    found = any(tensor.dtype is FLOAT64 for tensor in weights(folder.graph))
    return FLOAT64.name if found else None


def _schemes(folder: Folder, layout: Layout, matches: Callable[[Scheme], bool] = lambda scheme: True) -> str | None:
    """Name the schemes that match, None if none does or the folder has another layout."""
    quantization = folder.quantization
    if quantization is None or quantization.layout is not layout:
        return None
    return "; ".join(str(scheme) for scheme in quantization.modules if matches(scheme)) or None


def _modelopt_and_nemotron_nas(folder: Folder) -> str | None:
    return _schemes(folder, MODELOPT) if folder.family == NEMOTRON_NAS else None


def _several_schemes(folder: Folder) -> str | None:
    several = folder.quantization is not None and len(folder.quantization.modules) > 1
    return _schemes(folder, COMPRESSED_TENSORS) if several else None


def _quantized_cache(folder: Folder) -> str | None:
    cached = folder.quantization is not None and folder.quantization.kv_cache
    return _schemes(folder, COMPRESSED_TENSORS) if cached else None


def _gemms(block: Block) -> list[list[Linear]]:
    """The linears of a block that engines run as one GEMM."""
    parts = [linears(part) for part in (block.attention, block.ffn) if part is not None]
    return [[part[name] for name in group] for part in parts for group in FUSED_GEMMS if group[0] in part]


def _unlike_in_a_gemm(folder: Folder) -> str | None:
    return folder.where(lambda block: any(len({scheme_of(one) for one in group}) > 1 for group in _gemms(block)))


def _unequal_scales_in_a_gemm(folder: Folder) -> str | None:
    def unequal(group: list[Linear]) -> bool:
        scales = [one.quantization.weight_scale for one in group if one.quantization is not None]
        return all(scale.shape == () for scale in scales) and differ(scales)

    return folder.where(lambda block: any(unequal(group) for group in _gemms(block)))


LLAMA3_VOCAB_SIZE = 128256


def _byte_level_tokenizer(folder: Folder) -> str | None:
    """llama.cpp takes a GPT-2-style tokenizer at Llama 3's vocabulary size only; elsewhere it wants Llama 2's kind."""
    assets = folder.options.assets
    if folder.graph.vocab_size == LLAMA3_VOCAB_SIZE or "tokenizer.json" not in assets or "tokenizer.model" in assets:
        return None
    tokenizer: Any = read_json(assets["tokenizer.json"])
    decoder = tokenizer.get("decoder") if isinstance(tokenizer, dict) else None
    kind = decoder.get("type") if isinstance(decoder, dict) else None
    return None if kind == "Sequence" else f"vocab_size {folder.graph.vocab_size}, decoder {kind}"


def _blocks_text(indices: Sequence[int]) -> str | None:
    """`blocks 3, 5-9`; None for no block."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    if not spans:
        return None
    return f"block {text}" if len(indices) == 1 else f"blocks {text}"


# --- the rules

REJECTS, WRONG_RESULTS = Severity.REJECTS, Severity.WRONG_RESULTS
_IGNORES_WINDOW = (WRONG_RESULTS, "it attends to all positions")
_NULL_SIZE = (REJECTS, "it computes with n_heads_in_group or ffn_mult, which are null here")

# Of folders in the Nemotron-NAS layout.
RULES: tuple[Rule, ...] = (
    Rule(
        "the first layer has no attention",
        _first_has_no_attention,
        {
            "vllm": (
                REJECTS,
                "its norm returns one tensor where two are unpacked (two tokens would be split silently)",
            ),
            "llama.cpp": (REJECTS, "it takes head counts from layer 0, and they come out 0"),
        },
        "keep the attention of the first block",
    ),
    Rule(
        "no layer has attention",
        _no_attention,
        {
            "vllm": (REJECTS, "the number of key-value heads is unknown to it"),
            "sglang": (REJECTS, "the number of key-value heads is unknown to it"),
            "llama.cpp": (REJECTS, "it takes head counts from layer 0, and they come out 0"),
            "mlx-lm": (REJECTS, "it asks the first entry of an empty cache"),
        },
        "keep the attention of the first block",
    ),
    Rule(
        "a layer before the last has attention and no FFN",
        _attention_only_before_the_last,
        {"llama.cpp": (WRONG_RESULTS, "it skips the layer, attention and all")},
        "keep an FFN in every block that has attention",
    ),
    Rule(
        "the last layer has no FFN",
        _attention_only_last,
        {"llama.cpp": (REJECTS, "it aborts while it builds its graph")},
        "keep the FFN of the last block",
    ),
    Rule(
        "a linear layer in place of an attention",
        _linear_attention,
        {
            "vllm": _NULL_SIZE,
            "sglang": _NULL_SIZE,
            "mlx-lm": (REJECTS, "it names the tensor self_attn.linear, not self_attn.linear_attn as the format does"),
        },
        "use TensorRT-LLM, transformers or ONNX for this model",
    ),
    Rule(
        "a linear layer in place of an FFN",
        _linear_ffn,
        {
            "vllm": _NULL_SIZE,
            "sglang": _NULL_SIZE,
            "mlx-lm": (REJECTS, "it names the tensor mlp.linear, not mlp.linear_mlp as the format does"),
            "llama.cpp": (REJECTS, "its converter has no name for the tensor"),
        },
        "use TensorRT-LLM, transformers or ONNX for this model",
    ),
    Rule(
        "RoPE is scaled otherwise than in Llama 3",
        _scaled_other_than_llama3,
        {"llama.cpp": (WRONG_RESULTS, "it ignores the scaling")},
        "use another reader, or a model with default or llama3 RoPE",
    ),
    Rule(
        "head_dim is not hidden_size / num_attention_heads",
        _own_head_dim,
        {
            "mlx-lm": (REJECTS, "it ignores head_dim, and shapes do not fit"),
            "llama.cpp": (REJECTS, "it mixes both sizes and trips over an assertion"),
        },
        "use another reader",
    ),
    Rule(
        "norms on queries and keys",
        _qk_norm,
        {
            "vllm": (REJECTS, "it does not know the tensors"),
            "llama.cpp": (REJECTS, "its converter does not know the tensors"),
            "mlx-lm": (REJECTS, "it does not know the tensors"),
            "sglang": (WRONG_RESULTS, "it skips the tensors with a warning"),
            "tensorrt-llm": (WRONG_RESULTS, "it does not load the tensors"),
        },
        "use transformers or ONNX for a Qwen3 model that is no longer plain",
    ),
    Rule(
        "layers differ in their number of key-value heads",
        _different_kv_heads,
        {"sglang": (REJECTS, 'it says "Variable GQA ... not yet supported"')},
        "use another reader",
    ),
    Rule(
        "attentions have biases",
        _attention_bias,
        {"tensorrt-llm": (WRONG_RESULTS, "it leaves them out")},
        "use another reader",
    ),
    Rule(
        "FFNs have biases",
        _ffn_bias,
        {
            "tensorrt-llm": (WRONG_RESULTS, "it leaves them out"),
            "sglang": (WRONG_RESULTS, "it skips the tensors silently"),
        },
        "use another reader",
    ),
    Rule(
        "sliding windows",
        _window,
        dict.fromkeys(("vllm", "sglang", "tensorrt-llm", "llama.cpp", "mlx-lm"), _IGNORES_WINDOW),
        "keep sequences within the window, or use transformers or ONNX",
    ),
    Rule(
        "the activation is not silu",
        _not_silu,
        {
            "vllm": (REJECTS, "it knows no other"),
            "sglang": (REJECTS, "it knows no other"),
            "tensorrt-llm": (WRONG_RESULTS, "it computes silu"),
            "llama.cpp": (WRONG_RESULTS, "it computes silu"),
        },
        "use another reader",
    ),
    Rule(
        "the activation is the tanh form of gelu",
        _gelu_tanh,
        {"mlx-lm": (REJECTS, "it does not know the name")},
        "use another reader",
    ),
    Rule(
        "a byte-level tokenizer with another vocabulary than Llama 3's",
        _byte_level_tokenizer,
        {"llama.cpp": (REJECTS, f"its converter takes one at vocab_size {LLAMA3_VOCAB_SIZE} only")},
        "use another reader",
    ),
)

# Of folders in a plain family: what readers leave out of models that are not quite the usual ones.
PLAIN_RULES: tuple[Rule, ...] = (
    Rule(
        "sliding windows",
        _window,
        dict.fromkeys(("llama.cpp", "mlx-lm"), _IGNORES_WINDOW),
        "keep sequences within the window, or use another reader",
    ),
    Rule(
        "the activation is not silu",
        _not_silu,
        {
            "vllm": (REJECTS, "it knows no other"),
            "sglang": (REJECTS, "it knows no other"),
            "llama.cpp": (WRONG_RESULTS, "it computes silu"),
            "mlx-lm": (WRONG_RESULTS, "it computes silu"),
        },
        "use another reader",
    ),
    Rule(
        "attention biases beside norms on queries and keys",
        _qk_norm_and_bias,
        {"mlx-lm": (REJECTS, "it does not know the tensors")},
        "use another reader",
    ),
    Rule(
        "head_dim of a Qwen2 is not hidden_size / num_attention_heads",
        _own_head_dim_of_qwen2,
        {"mlx-lm": (REJECTS, "it ignores head_dim, and shapes do not fit")},  # others were not tried
        "use another reader",
    ),
)

# Of both.
SHARED_RULES: tuple[Rule, ...] = (
    Rule(
        "YaRN without truncation",
        _untruncated_yarn,
        {"mlx-lm": (WRONG_RESULTS, "it truncates")},
        "use another reader",
    ),
    Rule(
        "YaRN with an attention factor of its own",
        _yarn_attention_factor,
        dict.fromkeys(("vllm", "sglang", "mlx-lm"), (WRONG_RESULTS, "it does not read the key")),
        "use another reader",
    ),
    Rule(
        "YaRN with mscale and mscale_all_dim",
        _yarn_mscales,
        {"vllm": (WRONG_RESULTS, "it reads neither key")},
        "use another reader",
    ),
    Rule(
        "YaRN with mscale or mscale_all_dim alone",
        _yarn_mscale_alone,
        {"mlx-lm": (WRONG_RESULTS, "it reads each by itself")},
        "remove the key: without the other it means nothing",
    ),
    Rule(
        "weights of several dtypes",
        _several_dtypes,
        {"transformers": (WRONG_RESULTS, "it rounds all of them to the embedding's unless dtype says otherwise")},
        "cast the model to one dtype",
    ),
    Rule(
        "weights in float64",
        _float64,
        {"mlx-lm": (REJECTS, "it has no such dtype")},
        "cast the model to float32",
    ),
)

_OTHER_LAYOUT = f"choose the layout {COMPRESSED_TENSORS.name}"
_OTHER_SCHEME = "quantize in another format, or use another reader"
_NO_MLX = (REJECTS, "it knows no quantization but its own")
_ROUNDS_AGAIN = (WRONG_RESULTS, "it rounds the codes once more, under the largest of the scales")

QUANTIZATION_RULES: tuple[Rule, ...] = (
    Rule(
        "quantized in the layout modelopt",
        lambda folder: _schemes(folder, MODELOPT),
        {
            "transformers": (WRONG_RESULTS, "it warns that it skips the quantization, and takes codes for weights"),
            "mlx-lm": _NO_MLX,
        },
        _OTHER_LAYOUT,
    ),
    Rule(
        "quantized in the layout compressed-tensors",
        lambda folder: _schemes(folder, COMPRESSED_TENSORS),
        {"mlx-lm": _NO_MLX},
        "write the unquantized model, and let mlx-lm quantize it",
    ),
    Rule(
        "quantized in the layout modelopt and not plain",
        _modelopt_and_nemotron_nas,
        {"sglang": (REJECTS, "its model code asks for get_cache_scale, which only compressed-tensors has there")},
        _OTHER_LAYOUT,
    ),
    Rule(
        "FP8 weights per channel in the layout modelopt",
        lambda folder: _schemes(folder, MODELOPT, lambda s: (s.codes, s.weight) == (FLOAT8_E4M3FN, "channel")),
        {"sglang": (REJECTS, "it takes FP8 per tensor only")},
        _OTHER_LAYOUT,
    ),
    Rule(
        "INT8 in the layout modelopt",
        lambda folder: _schemes(folder, MODELOPT, lambda s: s.codes == INT8),
        {
            "vllm": (REJECTS, "it does not know the quant_algo"),
            "sglang": (REJECTS, "it takes FP8 per tensor only"),
        },
        _OTHER_LAYOUT,
    ),
    Rule(
        "INT8 inputs in the layout modelopt",
        lambda folder: _schemes(folder, MODELOPT, lambda s: s.codes == INT8 and s.input is not None),
        {"tensorrt-llm": (REJECTS, "its PyTorch backend multiplies no INT8 inputs")},
        _OTHER_SCHEME,
    ),
    Rule(
        "weights per tensor in the layout compressed-tensors",
        lambda folder: _schemes(folder, COMPRESSED_TENSORS, lambda s: s.weight == "tensor"),
        {
            "tensorrt-llm": (REJECTS, "it takes scales per channel or block there"),
            "llama.cpp": (REJECTS, "its converter takes scales per channel or block there"),
        },
        f"choose the layout {MODELOPT.name}",
    ),
    Rule(
        "FP8 weights per channel in the layout compressed-tensors",
        lambda folder: _schemes(folder, COMPRESSED_TENSORS, lambda s: s == Scheme(FLOAT8_E4M3FN, "channel", "token")),
        {"tensorrt-llm": (REJECTS, "up to 1.2 it copies scales of shape [out, 1] into [out] (#15415 mends it in 1.3)")},
        f"choose the layout {MODELOPT.name}",
    ),
    Rule(
        "INT8 in the layout compressed-tensors",
        lambda folder: _schemes(folder, COMPRESSED_TENSORS, lambda s: s == Scheme(INT8, "channel", "token")),
        {"tensorrt-llm": (WRONG_RESULTS, "it takes the codes for FP8")},
        _OTHER_SCHEME,
    ),
    Rule(
        "static inputs in the layout compressed-tensors",
        lambda folder: _schemes(folder, COMPRESSED_TENSORS, lambda s: s.input == "tensor"),
        {
            "tensorrt-llm": (REJECTS, "it takes inputs per token there"),
            "llama.cpp": (REJECTS, "its converter does not know input_scale there"),
        },
        _OTHER_SCHEME,
    ),
    Rule(
        "static INT8 inputs in the layout compressed-tensors",
        lambda folder: _schemes(folder, COMPRESSED_TENSORS, lambda s: (s.codes, s.input) == (INT8, "tensor")),
        {"sglang": (WRONG_RESULTS, "it ignores input_scale and scales every token by itself")},
        "quantize inputs per token",
    ),
    Rule(
        "a quantized KV cache in the layout compressed-tensors",
        _quantized_cache,
        {"llama.cpp": (REJECTS, "its converter does not know k_scale there")},
        f"choose the layout {MODELOPT.name}, or leave the KV cache as it is",
    ),
    Rule(
        "several quantizations in one model",
        _several_schemes,
        {"llama.cpp": (REJECTS, "its converter takes one group")},
        "quantize all linears alike",
    ),
    Rule(
        "q, k, v or gate, up quantized differently",
        _unlike_in_a_gemm,
        {
            "vllm": (REJECTS, "it runs them as one GEMM"),
            "sglang": (REJECTS, "it runs them as one GEMM"),
            "tensorrt-llm": (WRONG_RESULTS, "it goes by q_proj and gate_proj alone"),
        },
        "quantize them alike",
    ),
    Rule(
        "q, k, v or gate, up with weight scales of their own, per tensor",
        _unequal_scales_in_a_gemm,
        dict.fromkeys(("vllm", "sglang", "tensorrt-llm"), _ROUNDS_AGAIN),
        "quantize from the unquantized model: they share a scale then",
    ),
)
