"""A ModelGraph as one ONNX network for prefill, chunked prefill and decode.

Letters: B = sequences, S = tokens of one call, D = hidden_size, n = heads, d = head_dim, C = cache capacity, T = the
dtype of the network. Inputs and outputs are those of `exporter.network`.

    once      mask = kv_pos <= position_ids                    bool [B, 1, S, C], And kv_pos > position - window
              x = Gather(embedding, input_ids)                 T [B*S, D], as every x below
    attention q, k, v = Gemm(RMSNormalization(x))              [B*S, n*d] -> [B, S, n, d] -> [B, n, S, d]
              q, k = RotaryEmbedding(q | k, cos, sin, position_ids);  q = q * d^-0.5
              k, v = TensorScatter(past, k | v, cache_write)   in place, [B, n_kv, C, d]
              x = x + Gemm(Attention(q, k, v, mask, scale=1))
    ffn       x = x + Gemm(act(Gemm(n)) * Gemm(n)),  n = RMSNormalization(x)
    once      logits = Gemm(RMSNormalization(x[logits_index])) float32 [B, V]

What a quantized linear has in place of its Gemm is in `onnx_quantization`.

Why these ops, in TensorRT's words where it has some (importers of 10.15, 10.16 and 11.0):
  - Gemm(transB=1) on [B*S, D] takes weights as Hugging Face stores them, [out, in], without a transpose.
  - A boolean mask instead of `is_causal`: with a static cache TensorRT aligns causality to the upper left corner, and
    it drops `nonpad_kv_seqlen` without a word.
  - q is scaled here and `scale` is 1, because TensorRT multiplies q and k by sqrt(scale), rounded to T.
  - SiLU is x * Sigmoid(x): Swish is not importable before TensorRT 11, and ONNX Runtime has no kernel for it.
  - ReLU is Max(x, 0): ONNX Runtime leaves a quantized product in front of a Relu unfused.
  - RMSNormalization with input and weight of one dtype: ONNX takes the output's type from the weight, TensorRT from
    the input. stash_type 1 computes in float32.
  - Only the wanted row of hidden states goes through the last norm and the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter.dtypes import FLOAT32, DType
from exporter.graph import (
    FFN,
    Activation,
    Attention,
    Block,
    Linear,
    LinearSublayer,
    ModelGraph,
    ParallelBlocks,
    RMSNorm,
    members,
)
from exporter.network import CACHE_WRITE, INPUT_IDS, LOGITS, LOGITS_INDEX, NEXT_TOKENS, POSITION_IDS, CacheSlot
from exporter.one_gemm import can_be_one
from exporter.safetensors_io import Shards
from exporter.wide_ffn import WideFormat, wide_format
from exporter.writers.onnx_nodes import Nodes
from exporter.writers.onnx_plugins import DOMAIN as PLUGIN_DOMAIN
from exporter.writers.onnx_plugins import DOMAIN_VERSION as PLUGIN_DOMAIN_VERSION
from exporter.writers.onnx_plugins import wide_ffn, wide_ffn_functions
from exporter.writers.onnx_quantization import OPS as QUANTIZATION_OPS
from exporter.writers.onnx_quantization import LinearInput, quantized_product
from exporter.writers.onnx_weights import RopeTable, Stack, WeightStore, filled_biases

OPSET = 24  # TensorScatter needs 24; TensorRT's parser stops there
IR_VERSION = 11
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT

# Every op that a network may contain. All of them are in both runtimes (TensorRT >= 10.15, ONNX Runtime).
OPS = frozenset(
    {
        "Add", "And", "ArgMax", "Attention", "Cast", "Concat", "Gather", "Gelu", "Gemm", "Greater", "LessOrEqual",
        "Max", "Mul", "RMSNormalization", "Range", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Split",
        "Squeeze", "Sub", "TensorScatter", "Transpose", "Unsqueeze",
    }
) | QUANTIZATION_OPS  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A network's options, with everything that was left open filled in."""

    dtype: DType  # T
    batch: int | None
    capacity: int | None
    max_positions: int
    pack_qkv: bool
    pack_gate_up: bool
    share_rounded_inputs: bool
    transpose_weight_only: bool
    zero_points: bool
    choose_tokens: bool
    wide_ffn: bool


def cache_slots(graph: ModelGraph) -> tuple[CacheSlot, ...]:
    """Name the caches of a graph's attentions, in the order of `ModelGraph.kv_slots`."""
    return tuple(
        CacheSlot(
            key=f"past_k_{slot}",
            value=f"past_v_{slot}",
            present_key=f"present_k_{slot}",
            present_value=f"present_v_{slot}",
            num_key_value_heads=attention.num_key_value_heads,
            head_dim=attention.head_dim,
        )
        for slot, (_, attention) in enumerate(graph.attentions)
    )


class NetworkBuilder(Nodes):
    """Writes down the nodes of one network.

    Every decision that depends on T is in `Nodes`, in `table` and `cache` below, and in `onnx_quantization`.
    """

    def __init__(self, graph: ModelGraph, form: Form, weights: WeightStore, max_positions: int) -> None:
        """Build all nodes; `max_positions` is the length of the stored cos and sin, of which `form` may want less."""
        super().__init__(form.dtype, weights, zero_points=form.zero_points)
        self._graph = graph
        self._form = form
        self._table_positions = max_positions
        self._slots = cache_slots(graph)
        self._presents: list[ir.Value] = []
        self._functions: dict[WideFormat, list[ir.Function]] = {}  # local functions that nodes refer to

        sizes = [form.batch or "batch", "sequence"]
        self._ids = _input(INPUT_IDS, INT64, sizes)
        self._positions = _input(POSITION_IDS, INT64, sizes)
        self._cache_write = _input(CACHE_WRITE, INT64, sizes[:1])
        self._logits_index = _input(LOGITS_INDEX, INT64, sizes[:1])
        self._caches = [(self.cache(slot, slot.key), self.cache(slot, slot.value)) for slot in self._slots]
        self._logits = self._model()
        self._outputs = [self._logits, *self._presents]
        if form.choose_tokens:
            tokens = self.op("ArgMax", self._logits, axis=-1, keepdims=0, name=NEXT_TOKENS)
            tokens.name, tokens.shape, tokens.type = NEXT_TOKENS, ir.Shape(sizes[:1]), ir.TensorType(INT64)
            self._outputs.insert(1, tokens)

    def model_bytes(self, shards: Shards) -> bytes:
        """Serialize, with every initializer pointing to where `shards` put it."""
        sizes = [self._form.batch or "batch", self._graph.vocab_size]
        self._logits.name, self._logits.shape, self._logits.type = LOGITS, ir.Shape(sizes), ir.TensorType(FLOAT)
        graph = ir.Graph(
            inputs=[
                self._ids,
                self._positions,
                self._cache_write,
                self._logits_index,
                *(cache for pair in self._caches for cache in pair),
            ],
            outputs=self._outputs,
            nodes=self.nodes,
            initializers=self.initializers(shards),
            opset_imports={"": OPSET} | ({PLUGIN_DOMAIN: PLUGIN_DOMAIN_VERSION} if self._functions else {}),
            name="decoder",
        )
        functions = [function for pair in self._functions.values() for function in pair]
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="fuselage", functions=functions)
        return ir.to_proto(model).SerializeToString()

    # -- the model, top down

    def _model(self) -> ir.Value:
        graph = self._graph
        x = self._embedded(self.op("Reshape", self._ids, self.ints(-1), name="input_ids.flat"))
        index = 0  # in graph.flat_blocks
        for entry in graph.blocks:
            x = self._parallel(x, entry, index) if isinstance(entry, ParallelBlocks) else self._block(x, entry, index)
            index += len(members(entry))
        rows = self.op("Gather", x, self._logits_rows(), axis=0, name="logits.rows")
        rows = self._normed(rows, graph.norm, "norm")
        if graph.lm_head is not None:
            logits = self._linear(rows, graph.lm_head, "lm_head")
        else:
            table = self.parameter("embedding.weight", [graph.embedding])
            logits = self.op("Gemm", rows, table, transB=1, name="lm_head")
        return self.cast(logits, self.dtype, FLOAT32, "logits.float32")

    def _embedded(self, ids: ir.Value) -> ir.Value:
        """Look up in the stored dtype and cast the rows: a cast of the table would keep a copy of it in memory."""
        reference = self.weights.parameter("embedding.weight", [self._graph.embedding])
        rows = self.op("Gather", self.initializer(reference.tensor, reference), ids, axis=0, name="embedding")
        return self.cast(rows, reference.dtype, self.dtype, "embedding.cast")

    def _logits_rows(self) -> ir.Value:
        """Which rows of [B*S, D] the logits are wanted of: row * S + logits_index, int64 [B]."""
        if self._form.batch == 1:
            return self._logits_index
        length = self.op("Shape", self._ids, start=1, end=2, name="sequence")
        if self._form.batch is None:
            batch = self.op("Shape", self._ids, start=0, end=1, name="batch")
            batch = self.op("Squeeze", batch, self.ints(0), name="batch.scalar")
            rows = self.op("Range", self.scalar_int(0), batch, self.scalar_int(1), name="rows")
        else:
            rows = self.ints(*range(self._form.batch))
        return self.op(
            "Add", self.op("Mul", rows, length, name="rows.start"), self._logits_index, name="logits.rows.index"
        )

    def _block(self, x: ir.Value, block: Block, index: int) -> ir.Value:
        for sublayer, scope in _sublayers(block, index):
            if self._form.wide_ffn and isinstance(sublayer, FFN):
                x = self._wide_ffn(x, x, sublayer, scope)
                continue
            x = self.op("Add", x, self._sublayer(x, sublayer, index, scope), name=f"{scope}.residual")
        return x

    def _parallel(self, x: ir.Value, group: ParallelBlocks, first: int) -> ir.Value:
        """y = x + sum_j (f_j(x) - x), where f_j(x) - x is what the sublayers of block j add."""
        y = x
        for index, block in enumerate(group.blocks, start=first):
            inner = x
            sublayers = _sublayers(block, index)
            for number, (sublayer, scope) in enumerate(sublayers):
                if self._form.wide_ffn and isinstance(sublayer, FFN):  # the last of its block
                    y = self._wide_ffn(inner, y, sublayer, scope)
                    continue
                part = self._sublayer(inner, sublayer, index, scope)
                y = self.op("Add", y, part, name=f"{scope}.parallel_residual")
                if number + 1 < len(sublayers):
                    inner = self.op("Add", inner, part, name=f"{scope}.residual")
        return y

    def _sublayer(self, x: ir.Value, sublayer: Attention | FFN | LinearSublayer, index: int, scope: str) -> ir.Value:
        normed = self._normed(x, sublayer.norm, f"{scope}.norm")
        if isinstance(sublayer, Attention):
            return self._attention(normed, sublayer, self._graph.kv_slots[index], scope)
        if isinstance(sublayer, FFN):
            return self._ffn(normed, sublayer, scope)
        return self._linear(normed, sublayer.linear, f"{scope}.linear")

    def _attention(self, x: ir.Value, attention: Attention, slot: int, scope: str) -> ir.Value:
        q, k, v = self._projected_heads(x, attention, scope)
        if attention.q_norm is not None:
            q = self._normed(q, attention.q_norm, f"{scope}.q_norm")
        if attention.k_norm is not None:
            k = self._normed(k, attention.k_norm, f"{scope}.k_norm")
        q, k = self._rotated(q, f"{scope}.q.rope"), self._rotated(k, f"{scope}.k.rope")
        q = self.op("Mul", q, self.scalar(attention.head_dim**-0.5), name=f"{scope}.q.scale")
        names = self._slots[slot]
        past_k, past_v = self._caches[slot]
        k = self._cached(past_k, k, names.present_key)
        v = self._cached(past_v, v, names.present_value)
        mask = self._mask(attention.sliding_window)
        y = self.op("Attention", q, k, v, mask, scale=1.0, name=f"{scope}.attention")
        y = self.op("Transpose", y, perm=[0, 2, 1, 3], name=f"{scope}.attention.transpose")
        y = self.op("Reshape", y, self.ints(-1, attention.o_proj.in_features), name=f"{scope}.attention.flat")
        return self._linear(y, attention.o_proj, f"{scope}.o_proj")

    def _projected_heads(self, x: ir.Value, attention: Attention, scope: str) -> Sequence[ir.Value]:
        """Query, key and value heads of x, [B, n, S, d] each."""
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        heads = [linear.out_features // attention.head_dim for linear in linears]
        joined = f"{scope}.qkv_proj"
        if self._form.pack_qkv and can_be_one(linears):  # heads of all three travel together until the last moment
            y = self._heads(self._packed_linear(x, linears, joined), sum(heads), attention.head_dim, f"{scope}.qkv")
            return self.split(y, heads, axis=1, name=f"{joined}.split")
        rows = self._separate_linears(x, linears, ["q_proj", "k_proj", "v_proj"], joined)
        return [
            self._heads(y, count, attention.head_dim, f"{scope}.{letter}")
            for y, count, letter in zip(rows, heads, "qkv", strict=True)
        ]

    def _heads(self, x: ir.Value, heads: int, d: int, name: str) -> ir.Value:
        """[B*S, heads * d] -> [B, heads, S, d]."""
        x = self.op("Reshape", x, self._heads_shape(heads, d), name=f"{name}.heads")
        return self.op("Transpose", x, perm=[0, 2, 1, 3], name=f"{name}.transpose")

    def _heads_shape(self, heads: int, d: int) -> ir.Value:
        """[B, S, heads, d]; one unknown size can be left to Reshape, two cannot."""
        if self._form.batch is not None:
            return self.ints(self._form.batch, -1, heads, d)
        if "ids.shape" not in self.once:
            self.once["ids.shape"] = self.op("Shape", self._ids, name="input_ids.shape")
        if ("heads", heads) not in self.once:
            shape = self.op("Concat", self.once["ids.shape"], self.ints(heads, d), axis=0, name=f"shape.{heads}_heads")
            self.once["heads", heads] = shape
        return self.once["heads", heads]

    def _rotated(self, x: ir.Value, name: str) -> ir.Value:
        cos, sin = (self.table(function.__name__, function) for function in (np.cos, np.sin))
        return self.op("RotaryEmbedding", x, cos, sin, self._positions, name=name)

    def _cached(self, past: ir.Value, update: ir.Value, present: str) -> ir.Value:
        y = self.op("TensorScatter", past, update, self._cache_write, axis=-2, mode="linear", name=present)
        y.name, y.shape, y.type = present, past.shape, past.type
        self._presents.append(y)
        return y

    def _mask(self, window: int | None) -> ir.Value:
        """Which cache positions a token attends to, bool [B, 1, S, C]: computed once per window, not per block."""
        if ("mask", window) not in self.once:
            self.once["mask", window] = self._causal_mask() if window is None else self._window_mask(window)
        return self.once["mask", window]

    def _causal_mask(self) -> ir.Value:
        if self._form.capacity is not None:
            kv_pos = self.constant("kv_pos", np.arange(self._form.capacity, dtype=np.int64).reshape(1, 1, 1, -1))
        else:
            capacity = self.op("Shape", self._caches[0][0], start=2, end=3, name="capacity")
            limit = self.op("Squeeze", capacity, self.ints(0), name="capacity.scalar")
            kv_pos = self.op("Range", self.scalar_int(0), limit, self.scalar_int(1), name="kv_pos")  # [C]
        positions = self.op("Unsqueeze", self._positions, self.ints(1, 3), name="query_pos")  # [B, 1, S, 1]
        self.once["kv_pos"], self.once["query_pos"] = kv_pos, positions
        return self.op("LessOrEqual", kv_pos, positions, name="mask")

    def _window_mask(self, window: int) -> ir.Value:
        causal = self._mask(None)
        start = self.op("Sub", self.once["query_pos"], self.ints(window), name=f"window_{window}.start")
        inside = self.op("Greater", self.once["kv_pos"], start, name=f"window_{window}.inside")
        return self.op("And", causal, inside, name=f"mask.window_{window}")

    def _ffn(self, x: ir.Value, ffn: FFN, scope: str) -> ir.Value:
        linears = [ffn.gate_proj, ffn.up_proj]
        joined = f"{scope}.gate_up_proj"
        if self._form.pack_gate_up and can_be_one(linears):
            y = self._packed_linear(x, linears, joined)
            gate, up = self.split(y, [ffn.intermediate_size] * 2, axis=1, name=f"{joined}.split")
        else:
            gate, up = self._separate_linears(x, linears, ["gate_proj", "up_proj"], joined)
        inner = self.op("Mul", self._activated(gate, ffn.activation, scope), up, name=f"{scope}.gated")
        return self._linear(inner, ffn.down_proj, f"{scope}.down_proj")

    def _wide_ffn(self, x: ir.Value, residual: ir.Value, ffn: FFN, scope: str) -> ir.Value:
        """residual + FFN(norm(x)), as the nodes of a plugin."""
        format = wide_format(ffn)
        if format not in self._functions:
            self._functions[format] = wide_ffn_functions(format, OPSET)
        return wide_ffn(self, x, residual, ffn, scope)

    def _activated(self, x: ir.Value, activation: Activation, scope: str) -> ir.Value:
        name = f"{scope}.activation"
        if activation is Activation.SILU:
            return self.op("Mul", x, self.op("Sigmoid", x, name=f"{scope}.sigmoid"), name=name)
        if activation is Activation.RELU:
            return self.op("Max", x, self.scalar(0.0), name=name)
        approximate = {Activation.GELU: "none", Activation.GELU_TANH: "tanh"}[activation]
        return self.op("Gelu", x, approximate=approximate, name=name)

    def _normed(self, x: ir.Value, norm: RMSNorm, name: str) -> ir.Value:
        weight = self.parameter(f"{name}.weight", [norm.weight])
        return self.op("RMSNormalization", x, weight, axis=-1, epsilon=norm.eps, stash_type=1, name=name)

    # -- linears

    def _linear(self, x: ir.Value, linear: Linear, name: str) -> ir.Value:
        return self._product(self._linear_input(x, linear, name), Stack.of([linear], name))

    def _packed_linear(self, x: ir.Value, linears: Sequence[Linear], joined: str) -> ir.Value:
        """Several linears of one input as one Gemm; their outputs lie side by side."""
        return self._product(self._linear_input(x, linears[0], joined), Stack.of(linears, joined))

    def _separate_linears(
        self, x: ir.Value, linears: Sequence[Linear], names: Sequence[str], joined: str
    ) -> list[ir.Value]:
        """The same as a Gemm each; those that could be packed read rows of what a packed network would read whole."""
        scope = joined.rpartition(".")[0]
        names = [f"{scope}.{name}" for name in names]
        if not can_be_one(linears):
            return [self._linear(x, linear, name) for linear, name in zip(linears, names, strict=True)]
        inputs = self._linear_input(x, linears[0], joined)
        return [self._product(inputs, part) for part in Stack.of(linears, joined).members(names)]

    def _linear_input(self, x: ir.Value, linear: Linear, name: str) -> LinearInput:
        quantization = None if linear.quantization is None else linear.quantization.input
        return LinearInput(self, x, quantization, name, shared=self._form.share_rounded_inputs)

    def _product(self, x: LinearInput, stack: Stack) -> ir.Value:
        """x @ weight.T + bias, [B*S, out]."""
        bias = None
        biases = filled_biases(stack.linears) if stack.has_bias else None
        if biases is not None:
            bias = self.parameter(f"{stack.stored}.bias", biases, stack.rows, f"{stack.name}.bias")
        if stack.linears[0].quantization is not None:
            y = quantized_product(self, x, stack, transpose_weight_only=self._form.transpose_weight_only)
            return y if bias is None else self.op("Add", y, bias, name=f"{stack.name}.biased")
        weights = [linear.weight for linear in stack.linears]
        weight = self.parameter(f"{stack.stored}.weight", weights, stack.rows, f"{stack.name}.weight")
        inputs = [weight] if bias is None else [weight, bias]
        return self.op("Gemm", x.values(stack.name), *inputs, transB=1, name=stack.name)

    # -- values

    def cache(self, slot: CacheSlot, name: str) -> ir.Value:
        """A cache input, T [B, n_kv, C, d]."""
        form = self._form
        sizes = [form.batch or "batch", slot.num_key_value_heads, form.capacity or "capacity", slot.head_dim]
        return _input(name, self.T, sizes)

    def table(self, kind: str, function: np.ufunc) -> ir.Value:
        """cos or sin of the rotary embedding, T [max_positions, d / 2]: computed in float32, then rounded to T."""
        head_dim = self._graph.head_dim
        assert head_dim is not None
        tensor = RopeTable(self._graph.rope, function, self._table_positions, head_dim, self.dtype)
        return self.tensor(f"rope.{kind}.{self.dtype.name}", [tensor], (0, self._form.max_positions))


def _input(name: str, dtype: ir.DataType, sizes: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(dtype))


def _sublayers(block: Block, index: int) -> list[tuple[Attention | FFN | LinearSublayer, str]]:
    """The sublayers that are there, with the prefix of their names."""
    pairs = ((block.attention, f"blocks.{index}.attention"), (block.ffn, f"blocks.{index}.ffn"))
    return [(sublayer, scope) for sublayer, scope in pairs if sublayer is not None]
