"""A model folder, a config or a structure file in; a ModelGraph with lazy weights out. No tensor data is read.

That holds for the scales of quantized folders too, and for a tied embedding that is there twice: names, shapes and
dtypes are checked here, their values when something reads them (`exporter.lazy_quantized.stored_scale`,
`_RepeatedEmbedding`).
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from exporter.architectures import family_of
from exporter.architectures.base import (
    AttentionSpec,
    Family,
    FFNSpec,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    refuse_unread,
)
from exporter.architectures.quantization import HF_QUANT_CONFIG, QuantizationSpec, Scheme, quantization_from_config
from exporter.dtypes import BFLOAT16, BY_NAME, FLOAT16, FLOAT32, FLOAT64, DType
from exporter.errors import CheckpointError, FuselageError, raise_all
from exporter.graph import (
    CODES,
    FFN,
    Attention,
    Block,
    InputQuantization,
    KVQuantization,
    Linear,
    LinearSublayer,
    ModelGraph,
    Quantization,
    RMSNorm,
    Segment,
)
from exporter.lazy import Derived, LazyTensor, full, shape_only, slice_rows
from exporter.lazy_quantized import stored_scale
from exporter.manifests import shown
from exporter.safetensors_io import SkippedTensor, has_checkpoint, path_inside, read_checkpoint, read_json
from exporter.writers.files import Manifest, check_files, read_manifest

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
STRUCTURE_SUFFIX = ".structure.json"
MAX_CONFIG_BYTES = 4 << 20  # the longest we know has 60 KB
WEIGHT_DTYPES = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)
SCALE_DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
# Why a tensor that belongs to a quantized linear may be one too many.
SCALE_HINTS = {
    "pre_quant_scale": "the input is multiplied by it before it is rounded; quantize again with the factors moved "
    "into the layer in front",
    "zero_point": "only symmetric codes are read",
    "scale": "the quantization config says nothing of it",
}

# Weights that are not read, by how their files end: what is wrong, and a way out.
PICKLES = (
    "weights are pickles, which can run code and are never opened",
    "save the model as safetensors (transformers: save_pretrained) and give that folder",
)
GGUF = ("weights are GGUF, which is not read", "give the folder of safetensors that it was made from")
OTHER_WEIGHTS = {".bin": PICKLES, ".gguf": GGUF, ".pt": PICKLES, ".pth": PICKLES}

TIE_HINT = "set tie_word_embeddings to false in config.json, or remove the tensor"

# Files beside the weights that belong to a model and that a writer copies along.
ASSET_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",  # Mistral's own
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model as found on disk."""

    path: Path  # the folder, config or structure file that was given
    graph: ModelGraph
    family: Family
    config: Mapping[str, Any]  # config.json as parsed; writers take over what the graph has no field for
    assets: Mapping[str, Path]  # tokenizer files and the like, by name
    quantization_layout: str | None  # of a quantized folder: "modelopt" or "compressed-tensors"


def open_model(path: Path, *, need_weights: bool) -> Checkpoint:
    """Open a model folder; without `need_weights` also a folder or file that holds only the structure.

    Raises:
        CheckpointError: anything about the folder, its config or its tensors that is not as it must be.
    """
    is_file = os.path.isfile(path)
    if is_file and path.suffix != ".json":
        problem, hint = OTHER_WEIGHTS.get(path.suffix, ("not a model", None))
        raise CheckpointError(problem, file=path, expected="a model folder, or a config.json alone", hint=hint)
    if path.name.endswith(STRUCTURE_SUFFIX) and is_file:
        folder, config_path, config = path.parent, path, _config_from_structure(path)
    else:
        folder = path.parent if is_file else path
        if not os.path.isdir(folder):
            raise CheckpointError("no such model folder", file=path, hint=_download_hint(path))
        manifest = read_manifest(folder)
        if manifest is not None:
            check_files(folder, manifest, hashes=False)
        if not is_file and os.path.lexists(folder / ADAPTER):  # transformers would apply it, where peft is installed
            raise CheckpointError(
                "an adapter (LoRA and the like) is not read",
                file=folder / ADAPTER,
                hint="merge it into its model (peft: merge_and_unload), and save that",
            )
        if not is_file and not os.path.lexists(folder / CONFIG):
            raise CheckpointError("no config.json in the model folder", file=folder, hint=_hint_for(folder, manifest))
        config_path = path if is_file else path_inside(folder, CONFIG)
        config = read_json(config_path, MAX_CONFIG_BYTES)
    family, spec = _understand(config, config_path)
    if not is_file and os.path.lexists(folder / HF_QUANT_CONFIG):
        spec = replace(spec, quantization=_quantization_beside(spec.quantization, path_inside(folder, HF_QUANT_CONFIG)))
    structure_only = is_file or not has_checkpoint(folder)
    if structure_only:
        _refuse_other_weights(None if is_file else folder)
        if need_weights:
            raise CheckpointError(
                "no safetensors weights",
                file=path,
                expected="model.safetensors or model.safetensors.index.json in the folder",
                hint="this command needs weights, a config alone will not do",
            )
        tensors: Mapping[str, LazyTensor | SkippedTensor] = _shapes_only(family, spec, config_path)
    else:
        tensors = read_checkpoint(folder)
    graph = _graph_from_tensors(family, spec, tensors, config_path)
    assets = {} if is_file else {name: path_inside(folder, name) for name in ASSET_NAMES if (folder / name).is_file()}
    layout = None if spec.quantization is None else spec.quantization.layout.name
    return Checkpoint(path=path, graph=graph, family=family, config=config, assets=assets, quantization_layout=layout)


def graph_from_config(config: Mapping[str, Any], source: Path | str = CONFIG) -> ModelGraph:
    """Build a structure-only graph from a parsed config.json; `source` names it in errors."""
    family, spec = _understand(config, Path(source))
    return _graph_from_tensors(family, spec, _shapes_only(family, spec, Path(source)), Path(source))


def _understand(config: Any, path: Path) -> tuple[Family, ModelSpec]:
    if not isinstance(config, dict):
        raise CheckpointError("config is not a JSON object", file=path)
    try:
        family = family_of(config.get("architectures"), config.get("model_type"))
        refuse_unread(config, family.config)
        # By way of JSON, because pydantic's strict mode knows only there that a list can be a tuple.
        return family, family.config.model_validate_json(json.dumps(config)).spec()
    except ValidationError as error:
        raise_all([_config_error(problem, path) for problem in error.errors(include_url=False)])
        raise AssertionError("Bug: a ValidationError without errors") from error
    except CheckpointError as error:
        error.file = path
        error.found = None if error.found is None else shown(error.found)
        raise


def _quantization_beside(in_config: QuantizationSpec | None, path: Path) -> QuantizationSpec:
    """What hf_quant_config.json says; where config.json says it too, the same."""
    try:
        found = quantization_from_config(read_json(path, MAX_CONFIG_BYTES))
    except CheckpointError as error:
        error.file = path
        raise
    if in_config not in (None, found):
        raise CheckpointError(
            "the quantization is described twice, and differently", file=path, expected=f"what {CONFIG} says"
        )
    return found


def _config_error(problem: Any, path: Path) -> FuselageError:
    where = ".".join(str(part) for part in problem["loc"])
    missing = problem["type"] == "missing"
    return CheckpointError(f"{where}: {problem['msg']}", file=path, found=None if missing else shown(problem["input"]))


def _config_from_structure(path: Path) -> dict[str, Any]:
    """Expand a structure file: `constants` is a config, `blocks` holds [heads per group, ffn_mult] or "no_op"."""
    raw = read_json(path, MAX_CONFIG_BYTES)
    if (
        not isinstance(raw, dict)
        or not isinstance(raw.get("constants"), dict)
        or not isinstance(raw.get("blocks"), list)
    ):
        raise CheckpointError("not a structure file", file=path, expected="an object with constants and blocks")
    blocks = []
    for index, entry in enumerate(raw["blocks"]):
        if not isinstance(entry, list) or len(entry) != 2:
            raise CheckpointError(
                f"blocks[{index}] is malformed",
                file=path,
                expected="[attention, ffn]",
                found=shown(entry),
            )
        attention, ffn = entry
        blocks.append(
            {
                "attention": {"no_op": True} if attention == "no_op" else {"n_heads_in_group": attention},
                "ffn": {"no_op": True} if ffn == "no_op" else {"ffn_mult": ffn},
            }
        )
    return {**raw["constants"], "block_configs": blocks}


def _hint_for(folder: Path, manifest: Manifest | None) -> str | None:
    """What a folder without a config may be instead of a model."""
    if manifest is not None:
        return "a network or engine folder is not a model folder"
    snapshots = folder / "snapshots"  # as in the cache of huggingface_hub
    names = sorted(os.listdir(snapshots)) if os.path.isdir(snapshots) else []
    return f"give one of its snapshots: {snapshots / names[0]}" if names else None


def _download_hint(path: Path) -> str:
    """A way to a model that is not here, with the command if its path may be a name on the Hugging Face Hub."""
    hint = "models are read from this machine, none is downloaded"
    name = re.fullmatch(r"(?:https?:/+huggingface\.co/)?([\w.-]*\w/[\w.-]+)", str(path), re.ASCII)
    if name is None or path.parent.is_dir():  # of our folders, not an organization
        return hint
    return f"{hint}: hf download {name[1]} --local-dir {Path(name[1]).name}"


def _refuse_other_weights(folder: Path | None) -> None:
    if folder is None:
        return
    others = sorted(path.name for suffix in OTHER_WEIGHTS for path in folder.glob(f"*{suffix}"))
    if others:
        problem, hint = OTHER_WEIGHTS[Path(others[0]).suffix]
        raise CheckpointError(problem, file=folder / others[0], hint=hint)


@dataclass(frozen=True, slots=True)
class _Expected:
    """One tensor that the config calls for."""

    name: str
    shape: tuple[int, ...]
    block: int | None
    origin: str  # where in the config the shape comes from
    dtypes: tuple[DType, ...] = WEIGHT_DTYPES
    also: tuple[int, ...] | None = None  # another shape in use
    optional: bool = False


def _expected_tensors(family: Family, spec: ModelSpec) -> Iterator[_Expected]:
    """Every tensor of the model, in the order of the forward pass."""
    table = family.tensors
    size = spec.hidden_size

    def linear(role: str, layer: int, shape: tuple[int, int], bias: bool, origin: str) -> Iterator[_Expected]:
        stem = table[role].format(layer=layer)
        scheme = _scheme_of(spec, stem)
        dtypes = WEIGHT_DTYPES if scheme is None else (scheme.codes,)
        yield _Expected(f"{stem}.weight", shape, layer, origin, dtypes)
        if bias:
            yield _Expected(f"{stem}.bias", shape[:1], layer, origin)
        if scheme is not None:
            yield scale(f"{stem}.weight_scale", () if scheme.weight == "tensor" else shape[:1], layer)
        if scheme is not None and scheme.input == "tensor":
            yield scale(f"{stem}.input_scale", (), layer)

    def scale(name: str, shape: tuple[int, ...], layer: int, optional: bool = False) -> _Expected:
        return _Expected(name, shape, layer, "the quantization config", SCALE_DTYPES, (*shape, 1), optional)

    def stacked(role: str, layer: int, parts: Mapping[str, tuple[int, str]], bias: bool) -> Iterator[_Expected]:
        """Linears by role, with their rows and where those come from, or the one that the family has in their place."""
        if role in table:
            sizes, origins = zip(*parts.values(), strict=True)
            parts = {role: (sum(sizes), " + ".join(origins))}
        for part, (rows, origin) in parts.items():
            yield from linear(part, layer, (rows, size), bias, origin)

    yield _Expected(table["embedding"], (spec.vocab_size, size), None, "vocab_size, hidden_size")
    for layer, entry in enumerate(spec.layers):
        attention, ffn = entry.attention, entry.ffn
        if attention is not None:
            yield _Expected(table["attention.norm"].format(layer=layer), (size,), layer, "hidden_size")
        if isinstance(attention, LinearSpec):
            yield from linear("attention.linear", layer, (size, size), False, "replace_with_linear")
        elif attention is not None:
            heads, kv_heads = "num_attention_heads * head_dim", "key-value heads * head_dim"
            projections = {
                "attention.q_proj": (attention.q_size, heads),
                "attention.k_proj": (attention.kv_size, kv_heads),
                "attention.v_proj": (attention.kv_size, kv_heads),
            }
            yield from stacked("attention.qkv_proj", layer, projections, attention.qkv_bias)
            yield from linear("attention.o_proj", layer, (size, attention.q_size), attention.o_bias, heads)
            if attention.qk_norm:
                for role in ("attention.q_norm", "attention.k_norm"):
                    yield _Expected(table[role].format(layer=layer), (attention.head_dim,), layer, "head_dim")
            for name in _kv_scale_names(family, spec, layer):
                yield scale(name, (), layer, optional=True)
        if ffn is not None:
            yield _Expected(table["ffn.norm"].format(layer=layer), (size,), layer, "hidden_size")
        if isinstance(ffn, LinearSpec):
            yield from linear("ffn.linear", layer, (size, size), False, "replace_with_linear")
        elif ffn is not None:
            width, origin = ffn.intermediate_size, f"intermediate_size of layer {layer}"
            projections = {"ffn.gate_proj": (width, origin), "ffn.up_proj": (width, origin)}
            yield from stacked("ffn.gate_up_proj", layer, projections, ffn.bias)
            yield from linear("ffn.down_proj", layer, (size, width), ffn.bias, origin)
    yield _Expected(table["norm"], (size,), None, "hidden_size")
    if not spec.tie_word_embeddings:
        yield _Expected(f"{table['lm_head']}.weight", (spec.vocab_size, size), None, "vocab_size, hidden_size")


def _shapes_only(family: Family, spec: ModelSpec, path: Path) -> dict[str, LazyTensor | SkippedTensor]:
    dtype = BY_NAME.get(spec.dtype)
    if dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            "unknown dtype", file=path, expected=", ".join(known.name for known in WEIGHT_DTYPES), found=spec.dtype[:40]
        )
    return {
        expected.name: shape_only(expected.shape, dtype if dtype in expected.dtypes else expected.dtypes[0])
        for expected in _expected_tensors(family, spec)
    }


def _scheme_of(spec: ModelSpec, module: str) -> Scheme | None:
    return None if spec.quantization is None else spec.quantization.scheme_of(module)


def _kv_scale_names(family: Family, spec: ModelSpec, layer: int) -> tuple[str, ...]:
    """The scales of a layer's keys and values, none where the cache is not quantized."""
    if spec.quantization is None or spec.quantization.kv_codes is None:
        return ()
    layout = spec.quantization.layout
    attention = family.tensors["attention.o_proj"].format(layer=layer).rpartition(".")[0]
    return tuple(name.format(attention=attention) for name in (layout.k_scale, layout.v_scale))


def _check_tensors(
    family: Family, spec: ModelSpec, tensors: Mapping[str, LazyTensor | SkippedTensor], path: Path
) -> dict[str, LazyTensor]:
    """Hold what is there against what the config calls for; raise all differences at once."""
    problems: list[FuselageError] = []
    weights: dict[str, LazyTensor] = {}
    if not spec.tie_word_embeddings and _scheme_of(spec, family.tensors["lm_head"]) is not None:
        problems.append(
            CheckpointError(
                "a quantized lm_head is not supported",
                file=path,
                expected=f"{family.tensors['lm_head']} among the modules that the quantization config leaves out",
            )
        )
    expected_tensors = list(_expected_tensors(family, spec))
    has_optional = any(expected.optional and expected.name in tensors for expected in expected_tensors)
    for expected in expected_tensors:
        found = tensors.get(expected.name)
        where = getattr(found, "path", path.parent)
        if found is None and expected.optional and not has_optional:
            continue
        if found is None:
            problems.append(
                CheckpointError("tensor is missing", file=where, tensor=expected.name, block=expected.block)
            )
        elif isinstance(found, SkippedTensor) or found.dtype not in expected.dtypes:
            problems.append(
                CheckpointError(
                    "wrong dtype for a weight",
                    file=where,
                    tensor=expected.name,
                    block=expected.block,
                    expected=" or ".join(dtype.name for dtype in expected.dtypes),
                    found=found.dtype,
                    hint=_dtype_hint(expected, found),
                )
            )
        elif found.shape not in (expected.shape, expected.also):
            problems.append(
                CheckpointError(
                    "wrong shape",
                    file=where,
                    tensor=expected.name,
                    block=expected.block,
                    expected=f"{list(expected.shape)} from {expected.origin}",
                    found=list(found.shape),
                    hint=_shape_hint(expected.shape, found.shape),
                )
            )
        else:
            weights[expected.name] = found
    head, embedding = f"{family.tensors['lm_head']}.weight", weights.get(family.tensors["embedding"])
    if spec.tie_word_embeddings and head in tensors and embedding is not None:
        found = tensors[head]
        if (found.dtype, found.shape) != (embedding.dtype, embedding.shape):
            problems.append(
                CheckpointError(
                    "a tied lm_head is the embedding once more",
                    file=getattr(found, "path", path.parent),
                    tensor=head,
                    expected=f"{embedding.dtype} {list(embedding.shape)}",
                    found=f"{found.dtype} {list(found.shape)}",
                    hint=TIE_HINT,
                )
            )
    unknown = _unknown_names(set(tensors) - {expected.name for expected in expected_tensors}, family, spec)
    for name in unknown:
        problems.append(
            CheckpointError(
                f"tensor is not part of a {family.name} model with this config",
                file=getattr(tensors[name], "path", path.parent),
                tensor=name,
                hint=next((hint for end, hint in SCALE_HINTS.items() if name.endswith(end)), None),
            )
        )
    raise_all(problems)
    return weights


def _unknown_names(extra: Iterable[str], family: Family, spec: ModelSpec) -> list[str]:
    unused = [re.escape(name).replace(re.escape("{layer}"), r"\d+") for name in family.unused]
    if spec.tie_word_embeddings:  # some files repeat the tied embedding
        unused.append(re.escape(f"{family.tensors['lm_head']}.weight"))
    pattern = re.compile("|".join(unused) or "(?!)")
    return sorted(name for name in extra if not pattern.fullmatch(name))


def _shape_hint(expected: tuple[int, ...], found: tuple[int, ...]) -> str | None:
    if len(expected) == len(found) == 2 and found == expected[::-1]:
        return "the matrix is transposed"
    ratios = [want / have for want, have in zip(expected, found, strict=False) if have and want != have]
    if len(expected) == len(found) and len(ratios) == 1 and ratios[0] in (2, 4, 8, 16):
        return f"the size is 1/{ratios[0]:g} of what is expected: is this one tensor-parallel shard?"
    return None


def _dtype_hint(expected: _Expected, found: LazyTensor | SkippedTensor) -> str | None:
    if expected.dtypes == WEIGHT_DTYPES and found.dtype in CODES:
        return "codes need a quantization config that names this module"
    if expected.dtypes != WEIGHT_DTYPES and found.dtype in WEIGHT_DTYPES:
        return "the quantization config says that this module is quantized"
    return None


def _graph_from_tensors(
    family: Family, spec: ModelSpec, tensors: Mapping[str, LazyTensor | SkippedTensor], path: Path
) -> ModelGraph:
    weights = _check_tensors(family, spec, tensors, path)
    table = family.tensors

    def tensor(role: str, layer: int = 0) -> LazyTensor:
        return weights[table[role].format(layer=layer)]

    def norm(role: str, layer: int = 0) -> RMSNorm:
        return RMSNorm(weight=tensor(role, layer), eps=spec.rms_norm_eps)

    def linear(role: str, layer: int = 0) -> Linear:
        stem = table[role].format(layer=layer)
        weight = weights[f"{stem}.weight"]
        return Linear(weight=weight, bias=weights.get(f"{stem}.bias"), quantization=quantization(stem, weight.shape[0]))

    def stacked(role: str, layer: int, parts: Mapping[str, int]) -> Iterator[Linear]:
        if role not in table:
            yield from (linear(part, layer) for part in parts)
            return
        whole, start = linear(role, layer), 0
        for rows in parts.values():
            yield _rows_of(whole, start, start + rows)
            start += rows

    def quantization(stem: str, rows: int) -> Quantization | None:
        scheme = _scheme_of(spec, stem)
        if scheme is None:
            return None
        inputs = None
        if scheme.input is not None:
            static = scale(f"{stem}.input_scale") if scheme.input == "tensor" else None
            inputs = InputQuantization(dtype=scheme.codes, scale=static)
        shape = () if scheme.weight == "tensor" else (rows,)
        return Quantization(weight_scale=scale(f"{stem}.weight_scale", shape), input=inputs)

    def scale(name: str, shape: tuple[int, ...] = ()) -> LazyTensor:
        if name not in weights:  # of a KV cache that was not calibrated: every reader takes 1
            return full(shape, 1.0, FLOAT32)
        return stored_scale(weights[name], shape, file=getattr(weights[name], "path", path), tensor=name)

    def kv_quantization(layer: int) -> KVQuantization | None:
        names = _kv_scale_names(family, spec, layer)
        if spec.quantization is None or spec.quantization.kv_codes is None:
            return None
        k_scale, v_scale = (scale(name) for name in names)
        return KVQuantization(dtype=spec.quantization.kv_codes, k_scale=k_scale, v_scale=v_scale)

    def attention(layer: int, entry: AttentionSpec | LinearSpec | None) -> Attention | LinearSublayer | None:
        if entry is None:
            return None
        if isinstance(entry, LinearSpec):
            return LinearSublayer(norm=norm("attention.norm", layer), linear=linear("attention.linear", layer))
        projections = {
            "attention.q_proj": entry.q_size,
            "attention.k_proj": entry.kv_size,
            "attention.v_proj": entry.kv_size,
        }
        q_proj, k_proj, v_proj = stacked("attention.qkv_proj", layer, projections)
        return Attention(
            norm=norm("attention.norm", layer),
            q_proj=q_proj,
            k_proj=k_proj,
            v_proj=v_proj,
            o_proj=linear("attention.o_proj", layer),
            num_attention_heads=entry.num_attention_heads,
            num_key_value_heads=entry.num_key_value_heads,
            q_norm=norm("attention.q_norm", layer) if entry.qk_norm else None,
            k_norm=norm("attention.k_norm", layer) if entry.qk_norm else None,
            sliding_window=entry.sliding_window,
            kv_quantization=kv_quantization(layer),
        )

    def ffn(layer: int, entry: FFNSpec | LinearSpec | None) -> FFN | LinearSublayer | None:
        if entry is None:
            return None
        if isinstance(entry, LinearSpec):
            return LinearSublayer(norm=norm("ffn.norm", layer), linear=linear("ffn.linear", layer))
        width = entry.intermediate_size
        segments = entry.segments or ((layer, width),)
        gate_proj, up_proj = stacked("ffn.gate_up_proj", layer, {"ffn.gate_proj": width, "ffn.up_proj": width})
        return FFN(
            norm=norm("ffn.norm", layer),
            gate_proj=gate_proj,
            up_proj=up_proj,
            down_proj=linear("ffn.down_proj", layer),
            activation=entry.activation,
            segments=tuple(Segment(source, width) for source, width in segments),
        )

    def block(layer: int, entry: LayerSpec) -> Block:
        return Block(
            attention=attention(layer, entry.attention),
            ffn=ffn(layer, entry.ffn),
            source_layers=entry.source_layers if entry.source_layers is not None else (layer,),
        )

    embedding, head = tensor("embedding"), tensors.get(f"{table['lm_head']}.weight")
    if spec.tie_word_embeddings and isinstance(head, LazyTensor):
        embedding = _RepeatedEmbedding(embedding, head)
    try:
        return ModelGraph(
            embedding=embedding,
            blocks=tuple(block(layer, entry) for layer, entry in enumerate(spec.layers)),
            norm=norm("norm"),
            lm_head=None if spec.tie_word_embeddings else linear("lm_head"),
            rope=spec.rope,
            max_position_embeddings=spec.max_position_embeddings,
        )
    except FuselageError as error:
        raise CheckpointError(f"contradictory config ({error})", file=path) from error


def _rows_of(linear: Linear, start: int, stop: int) -> Linear:
    """The linear that gives outputs `start` to `stop` of another."""
    bias, quantization = linear.bias, linear.quantization
    if quantization is not None and quantization.weight_scale.shape:
        quantization = replace(quantization, weight_scale=slice_rows(quantization.weight_scale, start, stop))
    return Linear(
        weight=slice_rows(linear.weight, start, stop),
        bias=None if bias is None else slice_rows(bias, start, stop),
        quantization=quantization,
    )


class _RepeatedEmbedding(Derived):
    """A tied embedding that the files hold once more as the head: what is read of the two has to be equal.

    Where it is not, transformers from 5 on takes them as they are, and other readers take the embedding for both.
    """

    __slots__ = ()

    def __init__(self, embedding: LazyTensor, head: LazyTensor) -> None:
        super().__init__(embedding.shape, embedding.dtype, embedding, head)

    def rows(self, start: int, stop: int) -> np.ndarray:
        embedding, head = (source.rows(start, stop) for source in self.sources)
        if not np.array_equal(embedding, head):
            raise CheckpointError(
                "lm_head differs from the embedding, and the config says that the two are tied",
                file=getattr(self.sources[1], "path", None),
                tensor=getattr(self.sources[1], "name", None),
                hint=TIE_HINT,
            )
        return embedding
