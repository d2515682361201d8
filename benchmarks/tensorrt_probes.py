"""Questions to TensorRT that its documentation and sources leave open: each builds a tiny network and looks.

    python benchmarks/tensorrt_probes.py --list
    python benchmarks/tensorrt_probes.py --write DIR                    only the networks; needs no TensorRT
    python benchmarks/tensorrt_probes.py [PROBE...] -o results.json     on a machine with TensorRT and its GPU

Each probe runs in a process of its own, for TensorRT may abort it, and takes less than a minute. A claim is confirmed,
refuted, or the probe ends in an error; the evidence is what TensorRT said, or the layers that it made. The claims are
those of the import rules (exporter/writers/onnx_tensorrt_rules.py) that nobody has confirmed, and what the writers'
form rests on (exporter/writers/onnx_graph.py). Never executed so far: no machine with TensorRT was at hand.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engines import tensorrt_library as library
from engines.machine import version_numbers
from exporter.calibration import calibrate, ranges_of
from exporter.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from exporter.errors import FuselageError
from exporter.graph import ModelGraph
from exporter.passes.quantize_linears import quantize_linears
from exporter.quantization import read_quantization
from exporter.read import open_model
from exporter.writers import onnx as writer
from exporter.writers.files import save_folder
from exporter.writers.onnx import Network, Options

MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
CAPACITY = 64
TIMEOUT_S = 300
HEADS, KV_HEADS, HEAD_SIZE, KEYS = 4, 2, 32, 16  # of the networks that are one attention
TORCH_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}  # by TensorRT's names
Outcome = Literal["confirmed", "refuted", "error"]
Layers = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Answer:
    outcome: Outcome
    evidence: str


@dataclass(frozen=True, slots=True)
class Probe:
    """A claim, the networks to ask about, and how to ask.

    Args:
        write: writes the networks into an empty folder.
        ask: gets the laboratory and that folder.
        onnxruntime: which of the .onnx files ONNX Runtime on CPU runs, too: a glob.
    """

    claim: str
    write: Callable[[Path], object]
    ask: Callable[[Laboratory, Path], Answer]
    onnxruntime: str | None = None


def answer(confirmed: bool, evidence: object) -> Answer:
    return Answer("confirmed" if confirmed else "refuted", str(evidence)[:4000])


# --- TensorRT


class Refused(Exception):
    """TensorRT does not parse, build or run something; its words."""


class Laboratory:
    """TensorRT's calls, one network at a time; from 10.15 to 11.x."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.version = version_numbers(trt.__version__)[:2]
        self._logger = library.make_logger(trt)

    def parse(self, file: Path) -> tuple[Any, ...]:
        """(builder, network, parser) of an .onnx file; the parser holds the weights."""
        trt = self.trt
        builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(file)):
            raise Refused("parser: " + "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
        return builder, network, parser

    def build(self, file: Path, *, flags: Sequence[str] = (), decomposable: bool = False) -> bytes:
        """Build an engine: sizes that are open go from 1 to 4 on axis 0, to 32 elsewhere."""
        trt = self.trt
        builder, network, parser = self.parse(file)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for flag in flags:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        if decomposable:
            for index in range(network.num_layers):
                added = network.get_layer(index)
                if added.type == trt.LayerType.ATTENTION_INPUT:
                    added.__class__ = trt.IAttentionInputLayer
                    added.attention.decomposable = True
        profile, is_open = builder.create_optimization_profile(), False
        for index in range(network.num_inputs):
            given = network.get_input(index)
            if -1 in given.shape:
                is_open = True
                most = [4 if axis == 0 else 32 for axis in range(len(given.shape))]
                pairs = list(zip(given.shape, most, strict=True))
                low, opt, high = (
                    tuple(size if size != -1 else chosen(limit) for size, limit in pairs)
                    for chosen in (lambda limit: 1, lambda limit: limit // 2, lambda limit: limit)
                )
                profile.set_shape(given.name, low, opt, high)
        if is_open and config.add_optimization_profile(profile) < 0:
            raise Refused("the optimization profile is not valid")
        built = builder.build_serialized_network(network, config)
        del parser
        if built is None:
            raise Refused("builder: " + self._said())
        return bytes(built)

    def open(self, plan: bytes) -> Any:
        trt = self.trt
        runtime = trt.Runtime(self._logger)
        runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise Refused("runtime: " + self._said())
        return engine

    def layers(self, plan: bytes) -> Layers:
        """The engine inspector's layers."""
        trt, engine = self.trt, self.open(plan)
        inspector = engine.create_engine_inspector()
        document = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        return [layer if isinstance(layer, dict) else {"Name": layer} for layer in document["Layers"]]

    def aliases(self, plan: bytes) -> dict[str, str | None]:
        """Output name -> the input it is written over."""
        trt, engine = self.trt, self.open(plan)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        return {name: engine.get_aliased_input_tensor(name) for name in outputs}

    def run(self, plan: bytes, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; an output that is an input's memory is bound to it."""
        import torch

        engine = self.open(plan)
        context = engine.create_execution_context()
        stream = torch.cuda.Stream()
        buffers = {name: torch.from_numpy(value.copy()).cuda() for name, value in inputs.items()}
        for name, buffer in buffers.items():
            if not (context.set_input_shape(name, tuple(buffer.shape))):
                raise Refused(f"input shape of {name}: {self._said()}")
        for name, alias in self.aliases(plan).items():
            dtype = getattr(torch, TORCH_DTYPES[engine.get_tensor_dtype(name).name])
            shape = tuple(context.get_tensor_shape(name))
            buffers[name] = buffers[alias] if alias else torch.zeros(shape, dtype=dtype, device="cuda")
        for name, buffer in buffers.items():
            context.set_tensor_address(name, buffer.data_ptr())
        torch.cuda.synchronize()
        if not context.execute_async_v3(stream.cuda_stream):
            raise Refused("run: " + self._said())
        stream.synchronize()
        return {name: buffers[name].float().cpu().numpy() for name in self.aliases(plan)}

    def _said(self) -> str:
        return library.said(self._logger)


def accepts(file: str, *, parse_only: bool = False, **options: Any) -> Callable[[Laboratory, Path], Answer]:
    """The claim is that TensorRT takes the network."""

    def ask(laboratory: Laboratory, folder: Path) -> Answer:
        try:
            if parse_only:
                laboratory.parse(folder / file)
            else:
                laboratory.build(folder / file, **options)
        except Refused as error:
            return answer(False, error)
        return answer(True, "it was taken")

    return ask


def refuses(file: str, *, before: tuple[int, int] | None = None) -> Callable[[Laboratory, Path], Answer]:
    """The claim is that TensorRT refuses the network; with `before`, that only versions before that one do."""

    def ask(laboratory: Laboratory, folder: Path) -> Answer:
        expected = before is None or laboratory.version < before
        try:
            laboratory.build(folder / file)
        except Refused as error:
            return answer(expected, error)
        return answer(not expected, "it was taken")

    return ask


def layer_text(layer: dict[str, Any]) -> str:
    """All that names a layer: its own name, its kernel, and the ONNX nodes in its metadata."""
    return " ".join(str(layer.get(key, "")) for key in ("Name", "LayerType", "TacticName", "Metadata"))


def attention_is_one_kernel(file: str, **options: Any) -> Callable[[Laboratory, Path], Answer]:
    def ask(laboratory: Laboratory, folder: Path) -> Answer:
        try:
            layers = laboratory.layers(laboratory.build(folder / file, **options))
        except Refused as error:
            return answer(False, error)
        texts = [text for text in map(layer_text, layers) if re.search("attention|mha", text, re.IGNORECASE)]
        attentions = sum(node.op_type == "Attention" for node in load(folder / file).graph.node)
        kernels = [text for text in texts if "mha" in text.lower()]
        return answer(len(kernels) == attentions, f"{len(kernels)} of {attentions}: " + "\n".join(texts))

    return ask


# --- networks


@cache
def demo_graph() -> ModelGraph:
    """The first two blocks of the demo model, so that logits are those of real weights."""
    graph = open_model(MODEL, need_weights=True).graph
    return replace(graph, blocks=graph.blocks[:2])


@cache
def quantized(format_name: str) -> ModelGraph:
    graph = demo_graph()
    tokens = np.random.default_rng(0).integers(0, graph.vocab_size, (4, 64))
    ranges = ranges_of(calibrate(graph, tokens, text="random tokens"), graph)
    return quantize_linears(graph, read_quantization(format_name), ranges)


def decoder(
    dtype: DType = BFLOAT16,
    *,
    format_name: str | None = None,
    batch: int | None = 1,
    capacity: int = CAPACITY,
    twin: bool = False,
) -> Callable[[Path], object]:
    """Write what our writer makes for TensorRT as tensorrt.onnx; `twin`: and a float32 network for ONNX Runtime."""

    def write(folder: Path) -> None:
        graph = demo_graph() if format_name is None else quantized(format_name)
        networks = [
            Network(target="tensorrt", dtype=dtype, batch=batch, capacity="max_positions", share_rounded_inputs=True)
        ]
        if twin:
            networks.append(Network(target="onnxruntime", dtype=FLOAT32, pack_qkv=True, pack_gate_up=True))
        options = Options(networks=tuple(networks), max_positions=capacity)
        save_folder(folder / "network", writer.emit(graph, options), kind=writer.KIND, details={})

    return write


def changed(write: Callable[[Path], object], change: Callable[[ModelProto], object]) -> Callable[[Path], object]:
    """The same network after a change to its nodes."""

    def write_changed(folder: Path) -> None:
        write(folder)
        file = folder / "network" / "tensorrt.onnx"
        model = load(file)
        change(model)
        file.write_bytes(model.SerializeToString())

    return write_changed


def load(file: Path) -> ModelProto:
    return onnx.load(file, load_external_data=False)


def nodes(model: ModelProto, op_type: str) -> Iterator[onnx.NodeProto]:
    return (node for node in model.graph.node if node.op_type == op_type)


def constant(model: ModelProto, name: str, values: np.ndarray, dtype: int) -> str:
    model.graph.initializer.append(helper.make_tensor(name, dtype, values.shape, values.reshape(-1).tolist()))
    return name


def float_masks(model: ModelProto) -> None:
    """Masks in the dtype of the network: 0 where a token attends, -1e4 elsewhere."""
    kind = next(value for value in model.graph.input if value.name == "past_k_0").type.tensor_type.elem_type
    yes, no = (constant(model, f"mask.{value}", np.array(value), kind) for value in (0.0, -1e4))
    [mask] = [node for node in model.graph.node if node.name == "mask"]
    index = list(model.graph.node).index(mask)
    model.graph.node.insert(index + 1, helper.make_node("Where", ["mask.bool", yes, no], ["mask.float"], name="where"))
    for node in nodes(model, "Attention"):
        node.input[3] = "mask.float"
    mask.output[0] = "mask.bool"


def newer_ir(model: ModelProto) -> None:
    model.ir_version = 13


def empty_positions(model: ModelProto) -> None:
    node = next(nodes(model, "RotaryEmbedding"))
    node.input[3] = ""
    kind = next(value for value in model.graph.input if value.name == "past_k_0").type.tensor_type.elem_type
    for index in (1, 2):
        node.input[index] = constant(model, f"table.{index}", np.ones((1, 1, HEAD_SIZE // 2)), kind)
    for value in model.graph.input:  # the tables are for one position
        if value.name in ("input_ids", "position_ids"):
            value.type.tensor_type.shape.dim[1].dim_value = 1


def swish(model: ModelProto) -> None:
    for sigmoid in list(nodes(model, "Sigmoid")):
        [product] = [node for node in nodes(model, "Mul") if sigmoid.output[0] in node.input]
        sigmoid.op_type, sigmoid.output[0] = "Swish", product.output[0]
        model.graph.node.remove(product)


def zero_points(model: ModelProto) -> None:
    """An int8 zero point at every DequantizeLinear of activations, beside output_dtype."""
    zero = constant(model, "zero", np.zeros(()), TensorProto.INT8)
    for node in nodes(model, "DequantizeLinear"):
        if node.name.endswith(".input.values"):
            node.input.append(zero)


def float32_scales(model: ModelProto) -> None:
    for number, node in enumerate([*nodes(model, "QuantizeLinear"), *nodes(model, "DequantizeLinear")]):
        node.input[1] = constant(model, f"scale.{number}", np.array(0.03125), TensorProto.FLOAT)
        if node.op_type == "DequantizeLinear":
            kept = [attribute for attribute in node.attribute if attribute.name != "output_dtype"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("output_dtype", TensorProto.BFLOAT16)])


def growing_cache(model: ModelProto) -> None:
    """A symbolic capacity; the mask is an input, for the network's own has a fixed length."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_", "present_")):
            value.type.tensor_type.shape.dim[2].Clear()
            value.type.tensor_type.shape.dim[2].dim_param = "capacity"
    [mask] = [node for node in model.graph.node if node.name == "mask"]
    model.graph.node.remove(mask)
    shape = [1, 1, "sequence", "capacity"]
    model.graph.input.append(helper.make_tensor_value_info(mask.output[0], TensorProto.BOOL, shape))


def one_cache(model: ModelProto) -> None:
    keys, values = list(nodes(model, "TensorScatter"))[:2]
    values.input[0] = keys.input[0]


def empty_initializer(model: ModelProto) -> None:
    constant(model, "nothing", np.zeros((0, 4)), TensorProto.FLOAT)
    model.graph.node.append(helper.make_node("Shape", ["nothing"], ["nothing.shape"], name="nothing"))
    model.graph.output.append(helper.make_tensor_value_info("nothing.shape", TensorProto.INT64, [2]))


def foreign_gemm(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("probe", 1))
    next(nodes(model, "Gemm")).domain = "probe"


def functions_of_one_name(model: ModelProto) -> None:
    """Two functions `Shift`, which add 1 and 2 to the logits; the second is called."""
    opsets = [helper.make_opsetid("", 24)]
    for domain, value in (("one", 1.0), ("two", 2.0)):
        body = [
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(value, np.float32))),
            helper.make_node("Add", ["x", "c"], ["y"]),
        ]
        model.functions.append(helper.make_function(domain, "Shift", ["x"], ["y"], body, opsets))
        model.opset_import.append(helper.make_opsetid(domain, 1))
    model.graph.node.append(helper.make_node("Shift", ["logits"], ["shifted"], name="shift", domain="two"))
    logits = next(value for value in model.graph.output if value.name == "logits")
    shifted = helper.make_tensor_value_info("shifted", TensorProto.FLOAT, None)
    shifted.type.CopyFrom(logits.type)
    model.graph.output.append(shifted)


def attention(
    *, queries: int = KEYS, head_size: int = HEAD_SIZE, lengths: bool = False, **attributes: float
) -> Callable[[Path], object]:
    """Write a network that is one Attention in float16, over `KEYS` keys."""

    def write(folder: Path) -> None:
        sizes = {"q": (1, HEADS, queries), "k": (1, KV_HEADS, KEYS), "v": (1, KV_HEADS, KEYS)}
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT16, [*shape, head_size])
            for name, shape in sizes.items()
        ]
        given = [*sizes]
        if lengths:
            inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, [1]))
            given += ["", "", "", "lengths"]
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, HEADS, queries, head_size])
        node = helper.make_node("Attention", given, ["y"], name="attention", **attributes)
        graph = helper.make_graph([node], "attention", inputs, [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
        (folder / "attention.onnx").write_bytes(model.SerializeToString())

    return write


def argmax(folder: Path) -> None:
    """Write a network that is one ArgMax, as the writer ends a network in."""
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(tied_logits().shape))
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, list(tied_logits().shape[:1]))
    node = helper.make_node("ArgMax", ["logits"], ["tokens"], axis=-1, keepdims=0)
    model = helper.make_model(
        helper.make_graph([node], "argmax", [logits], [tokens]),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    (folder / "argmax.onnx").write_bytes(model.SerializeToString())


def tied_logits() -> np.ndarray:
    """Float32 [4, 2048], a largest value in every row several times."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 8, (4, 2048)).astype(np.float32)
    logits[1] = 0.0  # nothing but ties
    logits[2, [2047, 1023, 1024]] = 9.0
    return logits


def chooses_the_first(laboratory: Laboratory, folder: Path) -> Answer:
    logits = tied_logits()
    found = laboratory.run(laboratory.build(folder / "argmax.onnx"), {"logits": logits})["tokens"]
    return answer(bool((found == logits.argmax(-1)).all()), f"{found} where the first are {logits.argmax(-1)}")


# --- what attention gives


def attention_inputs(queries: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"q": (HEADS, queries), "k": (KV_HEADS, KEYS), "v": (KV_HEADS, KEYS)}
    return {name: rng.standard_normal((1, *size, HEAD_SIZE)).astype(np.float16) for name, size in sizes.items()}


def expected_attention(inputs: dict[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
    """softmax(q @ k.T where mask) @ v in float32, `mask` [queries, keys]; queries are already scaled."""
    q, k, v = (inputs[name].astype(np.float32) for name in "qkv")
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = np.where(mask, q @ k.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def gives(queries: int, masks: dict[str, np.ndarray], claimed: str, **more: np.ndarray) -> Callable[..., Answer]:
    """The claim is that an attention without mask input behaves like the mask of that name."""

    def ask(laboratory: Laboratory, folder: Path) -> Answer:
        inputs = attention_inputs(queries)
        found = laboratory.run(laboratory.build(folder / "attention.onnx", decomposable=True), {**inputs, **more})["y"]
        errors = {name: float(np.abs(found - expected_attention(inputs, mask)).max()) for name, mask in masks.items()}
        return answer(min(errors, key=lambda name: errors[name]) == claimed, f"largest differences: {errors}")

    return ask


def causal_masks(queries: int) -> dict[str, np.ndarray]:
    rows, keys = np.arange(queries)[:, None], np.arange(KEYS)[None, :]
    return {"upper left": keys <= rows, "lower right": keys <= rows + KEYS - queries}


def length_masks(length: int) -> dict[str, np.ndarray]:
    keys = np.broadcast_to(np.arange(KEYS)[None, :], (KEYS, KEYS))
    return {"all keys": keys >= 0, "the first keys": keys < length}


# --- what engines look like


def caches_are_aliased(laboratory: Laboratory, folder: Path) -> Answer:
    plan = laboratory.build(folder / "network" / "tensorrt.onnx")
    aliases = laboratory.aliases(plan)
    caches = {name: alias for name, alias in aliases.items() if name.startswith("present_")}
    return answer(all(alias == name.replace("present", "past") for name, alias in caches.items()), aliases)


def keys_are_not_copied(laboratory: Laboratory, folder: Path) -> Answer:
    """Nothing but the cache update writes a tensor as large as a cache."""
    layers = laboratory.layers(laboratory.build(folder / "network" / "tensorrt.onnx"))
    size = [1, demo_graph().attentions[0][1].num_key_value_heads, CAPACITY, HEAD_SIZE]
    writers = [
        layer_text(layer)
        for layer in layers
        if any(tensor.get("Dimensions") == size for tensor in layer.get("Outputs", ()))
        and not re.search("kv_?cache", layer_text(layer), re.IGNORECASE)
    ]
    return answer(not writers, "\n".join(writers) or "no other layer does")


def norms_round(laboratory: Laboratory, folder: Path) -> Answer:
    """A norm and the QuantizeLinear behind it are in one layer of the engine."""
    layers = laboratory.layers(laboratory.build(folder / "network" / "tensorrt.onnx"))
    texts = [text for text in map(layer_text, layers) if ".codes" in text]
    together = [text for text in texts if ".norm" in text]
    return answer(bool(together), f"{len(together)} of {len(texts)} roundings: " + "\n".join(texts))


def products_of_codes(dtype: str) -> Callable[[Laboratory, Path], Answer]:
    """Products read codes: no layer of the engine is a dequantized weight."""

    def ask(laboratory: Laboratory, folder: Path) -> Answer:
        layers = laboratory.layers(laboratory.build(folder / "network" / "tensorrt.onnx"))
        products = [layer for layer in layers if re.search("_proj", layer_text(layer))]
        reading = [
            layer for layer in products if any(dtype in str(tensor).lower() for tensor in layer.get("Inputs", ()))
        ]
        evidence = "\n".join(f"{layer_text(layer)} {layer.get('Inputs')}" for layer in products)
        return answer(bool(reading), f"{len(reading)} of {len(products)} layers read {dtype}: {evidence}")

    return ask


def weights_stay_codes(laboratory: Laboratory, folder: Path) -> Answer:
    trt, engine = laboratory.trt, laboratory.open(laboratory.build(folder / "network" / "tensorrt.onnx"))
    held = engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)
    stored = (folder / "network" / "weights.safetensors").stat().st_size
    return answer(held < 1.3 * stored, f"{held} bytes of weights in the engine, {stored} in the file")


def runs_any_batch(laboratory: Laboratory, folder: Path) -> Answer:
    plan = laboratory.build(folder / "network" / "tensorrt.onnx")
    shapes = {}
    for batch in (1, 3):
        inputs = {name: np.zeros((batch, 4), np.int64) for name in ("input_ids", "position_ids")}
        inputs["position_ids"][:] = np.arange(4)
        inputs |= {name: np.zeros(batch, np.int64) for name in ("cache_write", "logits_index")}
        size = (batch, demo_graph().attentions[0][1].num_key_value_heads, CAPACITY, HEAD_SIZE)
        inputs |= {f"past_{kind}_{slot}": np.zeros(size, np.float16) for kind in "kv" for slot in (0, 1)}
        logits = laboratory.run(plan, inputs)["logits"]
        shapes[batch] = logits.shape, bool(np.isfinite(logits).all())
    return answer(all(shape[0] == batch and finite for batch, (shape, finite) in shapes.items()), shapes)


def second_function_is_called(laboratory: Laboratory, folder: Path) -> Answer:
    """Refuted where the domain counts: the difference is then 2."""
    plan = laboratory.build(folder / "network" / "tensorrt.onnx")
    size = (1, demo_graph().attentions[0][1].num_key_value_heads, CAPACITY, HEAD_SIZE)
    inputs = {name: np.zeros((1, 1), np.int64) for name in ("input_ids", "position_ids")}
    inputs |= {name: np.zeros(1, np.int64) for name in ("cache_write", "logits_index")}
    inputs |= {f"past_{kind}_{slot}": np.zeros(size, np.float16) for kind in "kv" for slot in (0, 1)}
    found = laboratory.run(plan, inputs)
    shift = float(np.median(found["shifted"] - found["logits"]))
    return answer(abs(shift - 2.0) > 0.5, f"the call of the second function adds {shift:.3f}")


def loads_lean(laboratory: Laboratory, folder: Path) -> Answer:
    plan = laboratory.build(folder / "network" / "tensorrt.onnx", flags=["VERSION_COMPATIBLE"])
    import tensorrt_lean

    runtime = tensorrt_lean.Runtime(tensorrt_lean.Logger())
    runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    return answer(engine is not None, "loaded" if engine is not None else "the lean runtime does not load it")


def agrees_with_onnxruntime(laboratory: Laboratory, folder: Path) -> Answer:
    """Prefill and decode through our backends; from the third step on TensorRT's decode is a CUDA graph."""
    from engines.onnxruntime import OnnxRuntime
    from engines.tensorrt import TensorRt

    tokens = np.random.default_rng(0).integers(0, demo_graph().vocab_size, (1, 12))
    found: dict[str, list[np.ndarray]] = {}
    for backend in (OnnxRuntime(), TensorRt()):
        engine = backend.build(folder / "network", folder / backend.name, label=None, force=False)
        runner = backend.open(engine, threads=1)
        runner.start(1, 12)
        steps = [runner.prefill(tokens[:, :8], np.array([8])).copy()]
        steps += [runner.decode(tokens[:, position]).copy() for position in range(8, 12)]
        runner.close()
        found[backend.name] = steps
    expected, got = found["onnxruntime"], found["tensorrt"]
    errors = [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(expected, got, strict=True)]
    return answer(max(errors) < 0.02, f"largest difference of logits by step, relative to the largest logit: {errors}")


_DECODER = "network/tensorrt.onnx"

PROBES: dict[str, Probe] = {
    "cache-aliases": Probe(
        "a two-block decoder parses and builds from safetensors weights, and every present is the memory of its past",
        decoder(),
        caches_are_aliased,
    ),
    "attention-one-kernel": Probe(
        "attention over a cache, with a mask of bool, becomes one fused kernel",
        decoder(),
        attention_is_one_kernel(_DECODER),
    ),
    "attention-one-kernel-float-mask": Probe(
        "it does with a mask of floats, too",
        changed(decoder(), float_masks),
        attention_is_one_kernel(_DECODER),
    ),
    "attention-decomposable": Probe(
        "it stays one kernel where the builder may decompose it",
        decoder(),
        attention_is_one_kernel(_DECODER, decomposable=True),
    ),
    "attention-long-cache": Probe(
        "it does over a cache of 1024 positions, the demo model's most",
        decoder(capacity=1024),
        attention_is_one_kernel(_DECODER),
    ),
    "scale-folded": Probe(
        "the multiplication of keys by the scale 1.0 is folded away: nothing copies a cache",
        decoder(),
        keys_are_not_copied,
    ),
    "dynamic-batch": Probe(
        "a cache of any number of sequences builds and runs",
        decoder(FLOAT16, batch=None),
        runs_any_batch,
        onnxruntime=_DECODER,
    ),
    "growing-cache": Probe(
        "a cache of symbolic capacity is refused",
        changed(decoder(), growing_cache),
        refuses(_DECODER),
    ),
    "cache-once": Probe(
        "two updates of one cache are refused",
        changed(decoder(), one_cache),
        refuses(_DECODER),
    ),
    "norm-fp8": Probe(
        "an RMSNormalization and the QuantizeLinear to FP8 behind it become one layer",
        decoder(format_name="fp8"),
        norms_round,
    ),
    "fp8-products": Probe(
        "products of dequantized FP8 codes run on the codes",
        decoder(format_name="fp8"),
        products_of_codes("fp8"),
    ),
    "fp8-per-channel": Probe(
        "FP8 weights with a scale per channel run on the codes",
        decoder(format_name="fp8-rowwise"),
        products_of_codes("fp8"),
    ),
    "fp8-float32-scales": Probe(
        "float32 scales of FP8 in a bfloat16 network are refused",
        changed(decoder(format_name="fp8"), float32_scales),
        refuses(_DECODER),
    ),
    "int8-products": Probe(
        "products of dequantized int8 codes run on the codes, bfloat16 around them",
        decoder(format_name="int8-smoothquant"),
        products_of_codes("int8"),
    ),
    "int8-per-token": Probe(
        "they do where inputs are divided by a scale per token outside",
        decoder(format_name="int8-smoothquant-token"),
        products_of_codes("int8"),
    ),
    "int8-weight-only": Probe(
        "int8 weights of float inputs stay codes in the engine",
        decoder(format_name="int8-weight-only"),
        weights_stay_codes,
    ),
    "zero-point-output-dtype": Probe(
        "a DequantizeLinear with zero point and output_dtype is refused before 11.0",
        changed(decoder(format_name="int8-smoothquant"), zero_points),
        refuses(_DECODER, before=(11, 0)),
    ),
    "numbers": Probe(
        "prefill, decode and decode as a CUDA graph give the logits of ONNX Runtime within 2 %, float16 to float32",
        decoder(FLOAT16, twin=True),
        agrees_with_onnxruntime,
        onnxruntime="network/*.onnx",
    ),
    "numbers-bfloat16": Probe(
        "and in bfloat16",
        decoder(BFLOAT16, twin=True),
        agrees_with_onnxruntime,
        onnxruntime="network/onnxruntime.onnx",
    ),
    "argmax-ties": Probe(
        "ArgMax gives the first of several largest logits, as ONNX's does and our own choice on the host",
        argmax,
        chooses_the_first,
        onnxruntime="argmax.onnx",
    ),
    "lean": Probe(
        "a version-compatible engine with caches and attention builds, and the lean runtime loads it",
        decoder(),
        loads_lean,
    ),
    "ir-version": Probe(
        "a file of IR version 13 parses",
        changed(decoder(), newer_ir),
        accepts(_DECODER, parse_only=True),
    ),
    "swish": Probe(
        "Swish is refused before 11.0",
        changed(decoder(), swish),
        refuses(_DECODER, before=(11, 0)),
    ),
    "empty-positions": Probe(
        "an empty name for position_ids of RotaryEmbedding is refused",
        changed(decoder(FLOAT16), empty_positions),
        refuses(_DECODER),
        onnxruntime=_DECODER,
    ),
    "empty-initializer": Probe(
        "an empty initializer is taken",
        changed(decoder(FLOAT16), empty_initializer),
        accepts(_DECODER),
        onnxruntime=_DECODER,
    ),
    "foreign-domain": Probe(
        "an op of another domain is taken for ONNX's op of its name",
        changed(decoder(), foreign_gemm),
        accepts(_DECODER),
    ),
    "function-names": Probe(
        "of two local functions of one name the domain does not decide which is called",
        changed(decoder(FLOAT16), functions_of_one_name),
        second_function_is_called,
        onnxruntime=_DECODER,
    ),
    "attention-nonpad": Probe(
        "nonpad_kv_seqlen is dropped without a word",
        attention(lengths=True, scale=1.0),
        gives(KEYS, length_masks(4), "all keys", lengths=np.array([4])),
        onnxruntime="attention.onnx",
    ),
    "attention-causal": Probe(
        "is_causal is aligned to the upper left where there are more keys than queries",
        attention(queries=4, is_causal=1, scale=1.0),
        gives(4, causal_masks(4), "upper left"),
        onnxruntime="attention.onnx",
    ),
    "attention-large-heads": Probe(
        "heads of 512 have no fused kernel: they are refused unless attention may be decomposed",
        attention(head_size=512, scale=1.0),
        refuses("attention.onnx"),
        onnxruntime="attention.onnx",
    ),
}


# --- running them


def write_networks(names: Sequence[str], folder: Path) -> None:
    """Write the networks of these probes, a folder each."""
    for name in names:
        (folder / name).mkdir(parents=True)
        PROBES[name].write(folder / name)


def ask_here(name: str) -> Answer:
    """Ask in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        PROBES[name].write(Path(scratch))
        try:
            return PROBES[name].ask(Laboratory(library.load()), Path(scratch))
        except (Refused, FuselageError, ImportError) as error:
            return Answer("error", str(error)[:4000])


def ask_apart(name: str) -> Answer:
    """Ask in a process of its own; its death is an answer, too."""
    command = [sys.executable, __file__, "--here", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Answer("error", f"no answer in {TIMEOUT_S} s")
    if done.returncode:
        return Answer("error", f"exit code {done.returncode}: {done.stderr[-2000:]}")
    return Answer(**json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    command_line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_argument("probes", nargs="*", metavar="PROBE", help="only these")
    command_line.add_argument("--list", action="store_true", help="print the claims")
    command_line.add_argument("--write", type=Path, metavar="DIR", help="write the networks, a folder per probe")
    command_line.add_argument("--here", metavar="PROBE", help=argparse.SUPPRESS)
    command_line.add_argument("-o", "--output", type=Path, help="JSON of claims, outcomes and evidence")
    arguments = command_line.parse_args()
    names = arguments.probes or list(PROBES)
    if unknown := sorted(set(names) - set(PROBES)):
        command_line.error(f"no such probe: {', '.join(unknown)}; see --list")
    if arguments.list:
        for name in names:
            print(f"{name:32} {PROBES[name].claim}")
        return 0
    if arguments.write is not None:
        write_networks(names, arguments.write)
        return 0
    problems = library.missing()
    if problems:
        print("cannot ask TensorRT here:", *problems, sep="\n  ", file=sys.stderr)
        return 2
    if arguments.here is not None:
        print(json.dumps(asdict(ask_here(arguments.here))))
        return 0
    answers = {}
    for name in names:
        answers[name] = ask_apart(name)
        first = answers[name].evidence.splitlines() or [""]
        print(f"{name:32} {answers[name].outcome:10} {first[0][:100]}", flush=True)
    if arguments.output is not None:
        here = library.gpu()
        document = {
            "tensorrt": library.load().__version__,
            "gpu": None if here is None else here.name,
            "probes": {name: {"claim": PROBES[name].claim, **asdict(found)} for name, found in answers.items()},
        }
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
