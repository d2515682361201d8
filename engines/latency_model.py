"""Predict latency and memory from a model's structure, its number format and the hardware. Nothing is run.

A forward pass is a row of stages: one per sequential sublayer, then lm_head. A stage takes

    max(bytes / (memory_efficiency * memory rate), operations / (compute_efficiency * rate of matrix products))
        + sublayer_us + all-reduce                                                   (neither of them for lm_head)

where bytes are a GPU's share of the weights and of the KV cache that attention reads and writes, and operations are 2
per weight and token and 4 per head dimension, query and visible position. Left out: activations in and out of memory
(small beside the weights in decode, and under the products in prefill), norms, the choice of the next token, the host.

Under tensor parallelism heads and FFN channels are shared out, key-value heads are copied where there are fewer of
them than GPUs, and every stage ends in an all-reduce of its output. The GPU with the largest share sets the pace.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from engines.hardware import Gpu
from exporter.dtypes import BY_NAME, FLOAT8_E4M3FN, INT8, DType
from exporter.errors import EngineError, PlanError
from exporter.graph import ModelGraph, linear_names
from exporter.graph import structure as structure_of_graph
from exporter.quantization import QuantizationRecipe, dtype_of, format_names, read_quantization
from exporter.structure import AttentionShape, FFNShape, LinearShape, ParallelShape, Structure

USABLE_MEMORY = 0.9  # of a GPU's; the rest is the CUDA context, graphs and the allocator's loss
PREFILL_TOKENS = 8192  # at a time; longer prompts are read in chunks, as serving runtimes do
LOGITS_BYTES = 4  # float32
MOST_SEQUENCES = 1 << 20  # where the search for the largest batch ends

StageKind = Literal["attention", "ffn", "lm_head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What hardware reaches of its rates, and what a stage costs beside them."""

    memory_efficiency: float  # of the memory rate
    sublayer_us: float  # launches, norm, residual, rotation: what a sublayer takes without its bytes and its all-reduce
    compute_efficiency: float  # of the dense rate of matrix products


# The first two are fitted to the decode rates in benchmarks/published_rates.yaml (see docs/latency_model.md). Decoding
# one sequence never meets the third: it is assumed, what large products reach on a Hopper GPU.
PUBLISHED = Constants(memory_efficiency=0.968, sublayer_us=23.5, compute_efficiency=0.7)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """How linears are stored and multiplied."""

    name: str
    dtype: DType  # of activations, and of what the recipe leaves alone
    kv_dtype: DType  # of the KV cache
    recipe: QuantizationRecipe | None = field(default=None, compare=False)  # the one of this name

    def with_kv_cache(self, name: str) -> NumberFormat:
        """The same with a KV cache in "fp8" or "int8"."""
        return replace(self, kv_dtype={"fp8": FLOAT8_E4M3FN, "int8": INT8}[name])

    def of_linear(self, name: str) -> tuple[DType, DType]:
        """The dtypes of a linear's weight and of its matrix product."""
        found = None if self.recipe is None else self.recipe.format_of(name)
        if found is None:
            return self.dtype, self.dtype
        return dtype_of(found.weights), self.dtype if found.inputs is None else dtype_of(found.inputs)


def number_format(name: str, *, dtype: str) -> NumberFormat:
    """Look up a number format.

    Args:
        name: a recipe of recipes/quantization ("fp8"), or a dtype for models that are not quantized ("bfloat16").
        dtype: of the model; a quantized one keeps it in activations and in what its recipe leaves alone.

    Raises:
        EngineError: neither a recipe nor a floating-point dtype.
    """
    floats = [known.name for known in BY_NAME.values() if known.is_float and known.itemsize > 1]
    recipes = format_names()
    if name not in floats + recipes:
        raise EngineError("unknown number format", expected=", ".join(floats + recipes), found=name)
    recipe = read_quantization(name) if name in recipes else None
    activations = BY_NAME[dtype if recipe else name]
    kv_dtype = activations if recipe is None or recipe.kv_cache is None else BY_NAME[recipe.kv_cache]
    return NumberFormat(name=name, dtype=activations, kv_dtype=kv_dtype, recipe=recipe)


def format_of_graph(graph: ModelGraph) -> NumberFormat:
    """The number format that a graph is in.

    Raises:
        PlanError: its linears are quantized in a way that none of our recipes is.
    """
    found = {
        (linear.weight.dtype.name, linear.quantization.input and linear.quantization.input.dtype.name)
        for linear in linear_names(graph).values()
        if linear.quantization is not None
    }
    stored = [part.kv_quantization.dtype for _, part in graph.attentions if part.kv_quantization is not None]
    for name in format_names() if found else [graph.dtype.name]:
        number = number_format(name, dtype=graph.dtype.name)
        recipe = number.recipe
        if recipe is None or found == {(recipe.weights.dtype, recipe.inputs and recipe.inputs.dtype)}:
            return replace(number, kv_dtype=stored[0]) if stored else number
    raise PlanError(
        "the model is quantized in a way that no recipe of ours is",
        expected=", ".join(format_names()),
        found="; ".join(
            sorted(f"weights in {weights}, inputs in {inputs or graph.dtype}" for weights, inputs in found)
        ),
        hint="say with --format what to predict",
    )


def structure_from_graph(graph: ModelGraph) -> Structure:
    """A graph as the typed structure that this model works on."""
    return Structure.model_validate(structure_of_graph(graph))


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Where and how a model runs."""

    gpu: Gpu
    tp_size: int
    format: NumberFormat
    constants: Constants = PUBLISHED

    @property
    def name(self) -> str:
        return f"{self.tp_size}x {self.gpu.name}"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one forward pass reads: `new` tokens of each of `batch` sequences, the last one at position `context`."""

    batch: int
    new: int
    context: int

    @classmethod
    def decode(cls, batch: int, context: int) -> Tokens:
        return cls(batch, 1, context)

    @classmethod
    def prefill(cls, batch: int, length: int) -> Tokens:
        return cls(batch, length, length)

    def visible(self, window: int | None) -> int:
        """Positions that the new tokens of one sequence see, summed over these tokens."""
        first = self.context - self.new + 1
        if window is None or window >= self.context:
            return (first + self.context) * self.new // 2
        growing = max(0, window - first)  # tokens that see less than the window
        return (2 * first + growing - 1) * growing // 2 + window * (self.new - growing)

    def held(self, window: int | None) -> int:
        """Positions of one sequence whose keys and values are read."""
        return min(self.context, window + self.new - 1) if window else self.context


# --- Stages: one GPU's share of a sublayer


@dataclass(frozen=True, slots=True)
class LinearShard:
    """One GPU's part of a linear; `name` as in `exporter.graph.linear_names`."""

    name: str
    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class HeadShard:
    """One GPU's heads of an attention."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the sequence: a sublayer, those of parallel blocks together, or lm_head."""

    name: str
    kind: StageKind
    linears: tuple[LinearShard, ...]
    attentions: tuple[HeadShard, ...] = ()
    reduced: int = 0  # elements per token that the all-reduce sums


def stages_of(structure: Structure, tp_size: int) -> tuple[Stage, ...]:
    """The stages of a forward pass, as one of `tp_size` GPUs sees them.

    Raises:
        EngineError: the heads of an attention cannot be shared out evenly.
    """
    return tuple(_stages(structure, tp_size))


def _stages(structure: Structure, tp_size: int) -> Iterator[Stage]:
    hidden_size = structure.hidden_size
    index = 0
    for entry in structure.blocks:
        blocks = entry.parallel if isinstance(entry, ParallelShape) else (entry,)
        numbered = list(enumerate(blocks, start=index))
        index += len(blocks)
        name = f"blocks.{numbered[0][0]}" if len(blocks) == 1 else f"blocks.{numbered[0][0]}-{numbered[-1][0]}"
        attentions = [(i, block.attention) for i, block in numbered if block.attention is not None]
        if attentions:
            yield Stage(
                f"{name}.attention",
                "attention",
                tuple(shard for i, part in attentions for shard in _attention_linears(i, part, hidden_size, tp_size)),
                tuple(_heads(i, part, tp_size) for i, part in attentions if isinstance(part, AttentionShape)),
                # Each of a group's attentions feeds the norm of its own FFN: summed over the GPUs, not with each other.
                reduced=hidden_size * len(attentions),
            )
        ffns = [(i, block.ffn) for i, block in numbered if block.ffn is not None]
        if ffns:
            linears = tuple(shard for i, part in ffns for shard in _ffn_linears(i, part, hidden_size, tp_size))
            yield Stage(f"{name}.ffn", "ffn", linears, reduced=hidden_size)
    head = LinearShard("lm_head", _share(structure.vocab_size, tp_size), hidden_size)
    yield Stage("lm_head", "lm_head", (head,))


def _attention_linears(
    index: int, part: AttentionShape | LinearShape, hidden_size: int, tp_size: int
) -> Iterator[LinearShard]:
    prefix = f"blocks.{index}.attention"
    if isinstance(part, LinearShape):
        yield LinearShard(f"{prefix}.linear", _share(hidden_size, tp_size), hidden_size)
        return
    shard = _heads(index, part, tp_size)
    queries, keys = shard.heads * part.head_dim, shard.kv_heads * part.head_dim
    yield LinearShard(f"{prefix}.q_proj", queries, hidden_size)
    yield LinearShard(f"{prefix}.k_proj", keys, hidden_size)
    yield LinearShard(f"{prefix}.v_proj", keys, hidden_size)
    yield LinearShard(f"{prefix}.o_proj", hidden_size, queries)


def _heads(index: int, part: AttentionShape, tp_size: int) -> HeadShard:
    if part.num_attention_heads % tp_size:
        raise EngineError(
            "the tensor-parallel size divides the attention heads",
            block=index,
            expected=f"a divisor of {part.num_attention_heads}",
            found=tp_size,
        )
    return HeadShard(
        part.num_attention_heads // tp_size,
        _share(part.num_key_value_heads, tp_size),
        part.head_dim,
        part.sliding_window,
    )


def _ffn_linears(index: int, part: FFNShape | LinearShape, hidden_size: int, tp_size: int) -> Iterator[LinearShard]:
    prefix = f"blocks.{index}.ffn"
    if isinstance(part, LinearShape):
        yield LinearShard(f"{prefix}.linear", _share(hidden_size, tp_size), hidden_size)
        return
    width = _share(part.intermediate_size, tp_size)
    yield LinearShard(f"{prefix}.gate_proj", width, hidden_size)
    yield LinearShard(f"{prefix}.up_proj", width, hidden_size)
    yield LinearShard(f"{prefix}.down_proj", hidden_size, width)


def _share(count: int, tp_size: int) -> int:
    return -(-count // tp_size)


@dataclass(frozen=True, slots=True)
class Load:
    """What the linears of a stage cost in a number format."""

    stage: Stage
    weight_bytes: int
    operations: tuple[tuple[DType, int], ...]  # (dtype of the product, operations per row of the input)


@lru_cache(maxsize=64)  # sweeps and fits ask for the same few again and again
def loads_of(structure: Structure, tp_size: int, number: NumberFormat) -> tuple[Load, ...]:
    """The stages of `stages_of` with the bytes and operations of their linears."""
    loads = []
    for stage in stages_of(structure, tp_size):
        dtypes = [number.of_linear(linear.name) for linear in stage.linears]
        operations = tuple(
            (product, 2 * linear.size) for linear, (_, product) in zip(stage.linears, dtypes, strict=True)
        )
        nbytes = sum(linear.size * weight.itemsize for linear, (weight, _) in zip(stage.linears, dtypes, strict=True))
        loads.append(Load(stage, nbytes, operations))
    return tuple(loads)


# --- Time


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """Where a stage's time goes; of the first two only the larger one counts."""

    stage: Stage
    memory_us: float
    compute_us: float
    sublayer_us: float
    all_reduce_us: float

    @property
    def is_memory_bound(self) -> bool:
        return self.memory_us >= self.compute_us

    @property
    def total_us(self) -> float:
        return max(self.memory_us, self.compute_us) + self.sublayer_us + self.all_reduce_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted time of one forward pass, stage by stage."""

    tokens: Tokens
    stages: tuple[StageTime, ...]

    @property
    def latency_us(self) -> float:
        return sum(stage.total_us for stage in self.stages)

    @property
    def latency_ms(self) -> float:
        return self.latency_us / 1000

    @property
    def tokens_per_s_per_user(self) -> float:
        """Passes a second: of decoding, the tokens that one sequence gets."""
        return 1e6 / self.latency_us

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second of all sequences together."""
        return self.tokens.batch * self.tokens_per_s_per_user

    def parts_ms(self) -> dict[str, float]:
        """The latency in parts that add up to it."""
        memory = sum(stage.memory_us for stage in self.stages if stage.is_memory_bound)
        compute = sum(stage.compute_us for stage in self.stages if not stage.is_memory_bound)
        parts = {
            "memory": memory,
            "compute": compute,
            "sublayers": sum(stage.sublayer_us for stage in self.stages),
            "all-reduce": sum(stage.all_reduce_us for stage in self.stages),
        }
        return {name: us / 1000 for name, us in parts.items()}


def predict(structure: Structure, deployment: Deployment, tokens: Tokens) -> Prediction:
    """Predict one forward pass: a decode step, or the prefill of a prompt.

    Raises:
        EngineError: the GPU lacks the format's products, the heads cannot be shared out, or nothing links so many GPUs.
    """
    loads = loads_of(structure, deployment.tp_size, deployment.format)
    return Prediction(tokens=tokens, stages=tuple(_stage_time(load, deployment, tokens) for load in loads))


def _stage_time(load: Load, deployment: Deployment, tokens: Tokens) -> StageTime:
    stage, gpu, number, constants = load.stage, deployment.gpu, deployment.format, deployment.constants
    # Only the last token of each sequence becomes logits.
    rows = tokens.batch * (1 if stage.kind == "lm_head" else tokens.new)
    nbytes = load.weight_bytes
    compute_us = sum(operations * rows / gpu.flops_per_us(product) for product, operations in load.operations)
    for part in stage.attentions:
        positions = tokens.batch * (tokens.held(part.window) + tokens.new)  # read, and written
        nbytes += 2 * part.kv_heads * part.head_dim * number.kv_dtype.itemsize * positions
        flops = 4 * part.heads * part.head_dim * tokens.batch * tokens.visible(part.window)
        compute_us += flops / gpu.flops_per_us(number.dtype)
    is_sublayer = stage.kind != "lm_head"
    return StageTime(
        stage=stage,
        memory_us=nbytes / (constants.memory_efficiency * gpu.memory_gb_per_s * 1e3),
        compute_us=compute_us / constants.compute_efficiency,
        sublayer_us=constants.sublayer_us if is_sublayer else 0.0,
        all_reduce_us=gpu.all_reduce_us(deployment.tp_size, stage.reduced * rows * number.dtype.itemsize)
        if is_sublayer
        else 0.0,
    )


def cost_per_million_tokens(prediction: Prediction, deployment: Deployment, price_per_gpu_hour: float) -> float:
    """The price of a million output tokens while decoding at this batch, in the price's currency."""
    return price_per_gpu_hour * deployment.tp_size / 3600 / prediction.tokens_per_s * 1e6


# --- Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one GPU. Activations are an estimate, the other two are exact but for biases, scales and head norms."""

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    usable_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.usable_bytes


def memory_per_gpu(structure: Structure, deployment: Deployment, batch: int, context: int) -> Memory:
    """What one GPU holds while it serves `batch` sequences of `context` tokens.

    Embedding and lm_head are shared out along the vocabulary. Activations: two hidden states and what the linears of
    the widest stage give, for as many tokens as are prefilled at a time, and the logits.
    """
    number, tp_size = deployment.format, deployment.tp_size
    loads = loads_of(structure, tp_size, number)
    stages = [load.stage for load in loads]
    weights = sum(load.weight_bytes for load in loads[: -1 if structure.tie_word_embeddings else None])
    sublayers = {linear.name.rpartition(".")[0] for stage in stages[:-1] for linear in stage.linears}
    embedding = _share(structure.vocab_size, tp_size)
    weights += (embedding + len(sublayers) + 1) * structure.hidden_size * number.dtype.itemsize  # and their norms
    held = sum(
        2 * part.kv_heads * part.head_dim * min(context, part.window or context)
        for stage in stages
        for part in stage.attentions
    )
    widest = max((sum(linear.out_features for linear in stage.linears) for stage in stages[:-1]), default=0)
    tokens = max(batch, min(batch * context, PREFILL_TOKENS))
    activations = tokens * (2 * structure.hidden_size + widest) * number.dtype.itemsize
    return Memory(
        weight_bytes=weights,
        kv_bytes=batch * held * number.kv_dtype.itemsize,
        activation_bytes=activations + batch * embedding * LOGITS_BYTES,
        usable_bytes=int(USABLE_MEMORY * deployment.gpu.memory_bytes),
    )


def largest_batch(structure: Structure, deployment: Deployment, context: int) -> int:
    """The most sequences of `context` tokens that fit, 0 where not even one does."""
    return _largest(MOST_SEQUENCES, lambda batch: memory_per_gpu(structure, deployment, batch, context).fits)


def largest_context(structure: Structure, deployment: Deployment, batch: int) -> int:
    """The most tokens per sequence that fit, at most what the model was made for; 0 where not even one does."""
    limit = structure.max_position_embeddings
    return _largest(limit, lambda context: memory_per_gpu(structure, deployment, batch, context).fits)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, where everything below one that fits does too."""
    return bisect_left(range(1, limit + 1), True, key=lambda number: not fits(number))
