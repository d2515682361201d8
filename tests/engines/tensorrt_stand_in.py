"""A TensorRT that runs on a CPU: the recorder's classes, and ONNX Runtime for the arithmetic.

An "engine" is a small JSON file that names the network and the profiles it was built with. What TensorRT's
documentation asks of a caller is checked where a caller could get it wrong: shapes within the profile of the context,
an address for every tensor, aligned, and one address for a cache and its update.
"""

from __future__ import annotations

import ctypes
import json
import signal
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from engines.tensorrt_library import Gpu
from tests.engines.tensorrt_signatures import Api, Behaviour, Recorder

H100 = Gpu(name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), free_bytes=80 * 10**9)
DATA_TYPES = {onnx.TensorProto.INT64: "INT64", onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF",
              onnx.TensorProto.BFLOAT16: "BF16"}  # fmt: skip
ACTIVATION_BYTES = 4096
STREAM = 77


class StandIn:
    """What the recorder's objects do; `trt` is the module."""

    def __init__(self, api: Api, **changes: Behaviour) -> None:
        """`changes` replace behaviours; "__" stands for the dot of their names."""
        self.errors: list[Any] = []  # of the parser
        self.logged: list[tuple[str, str]] = []  # severity and words that a build logs
        self.interrupted_in: str | None = None  # the callback of a monitor in which a signal arrives
        self.interrupted_by = signal.SIGINT
        self.streamable = 1000
        self.enqueued: list[tuple[int, dict[str, tuple[int, ...]], dict[str, int]]] = []  # profile, shapes, addresses
        behaviours: dict[str, Behaviour] = {
            "OnnxParser.__init__": self._parser,
            "OnnxParser.parse_from_file": self._parse,
            "OnnxParser.num_errors": lambda parser: len(self.errors),
            "OnnxParser.get_error": lambda parser, index: self.errors[index],
            "INetworkDefinition.num_inputs": lambda network: len(network_of(network).input),
            "INetworkDefinition.num_outputs": lambda network: len(network_of(network).output),
            "INetworkDefinition.get_input": lambda network, index: self._tensor(network_of(network).input[index]),
            "INetworkDefinition.get_output": lambda network, index: self._tensor(network_of(network).output[index]),
            "INetworkDefinition.num_layers": lambda network: len(network_of(network).node),
            "INetworkDefinition.get_layer": self._layer,
            "IBuilderConfig.add_optimization_profile": self._add_profile,
            "IBuilderConfig.set_timing_cache": self._set_timing_cache,
            "IBuilderConfig.create_timing_cache": self._create_timing_cache,
            "IBuilderConfig.get_timing_cache": lambda config: vars(config)["timing_cache"],
            "ITimingCache.serialize": lambda cache: memoryview(vars(cache)["content"] + b"+measured"),
            "ITimingCache.combine": self._combine,
            "IOptimizationProfile.set_shape": self._set_shape,
            "Builder.build_serialized_network_to_stream": self._build,
            "Builder.__init__": lambda builder, logger: vars(builder).update(logger=logger),
            "Runtime.__init__": lambda runtime, logger: None,
            "Runtime.deserialize_cuda_engine": self._deserialize,
            "ICudaEngine.num_io_tensors": lambda engine: len(vars(engine)["tensors"]),
            "ICudaEngine.get_tensor_name": lambda engine, index: list(vars(engine)["tensors"])[index],
            "ICudaEngine.get_tensor_mode": lambda engine, name: vars(engine)["tensors"][name][0],
            "ICudaEngine.get_tensor_dtype": lambda engine, name: vars(engine)["tensors"][name][1],
            "ICudaEngine.get_tensor_shape": lambda engine, name: vars(engine)["tensors"][name][2],
            "ICudaEngine.get_aliased_input_tensor": lambda engine, name: vars(engine)["aliases"].get(name),
            "ICudaEngine.num_optimization_profiles": lambda engine: len(vars(engine)["profiles"]),
            "ICudaEngine.device_memory_size_v2": lambda engine: ACTIVATION_BYTES,
            "ICudaEngine.streamable_weights_size": lambda engine: self.streamable,
            "ICudaEngine.get_weight_streaming_automatic_budget": lambda engine: self.streamable // 2,
            "ICudaEngine.create_execution_context": self._context,
            "IExecutionContext.set_optimization_profile_async": self._choose_profile,
            "IExecutionContext.set_input_shape": self._set_input_shape,
            "IExecutionContext.set_tensor_address": self._set_address,
            "IExecutionContext.infer_shapes": lambda context: self._lacking(context),
            "IExecutionContext.set_device_memory": self._set_memory,
            "IExecutionContext.execute_async_v3": self._execute,
        }
        behaviours |= {name.replace("__", ".", 1): change for name, change in changes.items()}
        self.trt = Recorder(api, behaviours)

    # -- building

    def _parser(self, parser: Any, network: Any, logger: Any) -> None:
        vars(parser).update(network=network, logger=logger)

    def _parse(self, parser: Any, model: str) -> bool:
        if self.errors:
            return False
        vars(vars(parser)["network"]).update(file=model, onnx=onnx.load(model, load_external_data=False).graph)
        return True

    def _tensor(self, value: onnx.ValueInfoProto) -> Any:
        tensor = self.trt.returned("tensorrt.ITensor")
        kind, shape = described(value)
        vars(tensor).update(name=value.name, dtype=self.trt.DataType[kind], shape=shape)
        return tensor

    def _layer(self, network: Any, index: int) -> Any:
        layer = self.trt.returned("tensorrt.ILayer")
        kind = {"Attention": "ATTENTION_INPUT", "Gemm": "MATRIX_MULTIPLY"}
        node = network_of(network).node[index]
        vars(layer).update(type=self.trt.LayerType[kind.get(node.op_type, "ELEMENTWISE")])
        return layer

    def _set_shape(self, profile: Any, input: str, min: Any, opt: Any, max: Any) -> None:
        vars(profile).setdefault("shapes", {})[input] = (min, opt, max)

    def _add_profile(self, config: Any, profile: Any) -> int:
        profiles = vars(config).setdefault("profiles", [])
        profiles.append(vars(profile)["shapes"])
        return len(profiles) - 1

    def _create_timing_cache(self, config: Any, serialized_timing_cache: bytes) -> Any:
        cache = self.trt.returned("tensorrt.ITimingCache")
        vars(cache).update(content=serialized_timing_cache)
        return cache

    def _set_timing_cache(self, config: Any, cache: Any, ignore_mismatch: bool) -> bool:
        vars(config).update(timing_cache=cache)
        return True

    def _combine(self, cache: Any, input_cache: Any, ignore_mismatch: bool) -> bool:
        vars(cache).update(content=vars(cache)["content"] + b"|" + vars(input_cache)["content"])
        return True

    def _build(self, builder: Any, network: Any, config: Any, writer: Any) -> bool:
        for severity, words in self.logged:
            vars(builder)["logger"].log(self.trt.ILogger.Severity[severity], words)
        if any(severity == "ERROR" for severity, _ in self.logged):
            return False
        told = vars(config)["progress_monitor"]
        self._tell(told.phase_start, "Building Engine", None, 2)
        self._tell(told.phase_start, "Timing", "Building Engine", 1)
        for step in range(2):
            if not self._tell(told.step_complete, "Building Engine", step):
                return False
        self._tell(told.phase_finish, "Timing")
        self._tell(told.phase_finish, "Building Engine")
        content = json.dumps({"network": vars(network)["file"], "profiles": vars(config)["profiles"]}).encode()
        return all(writer.write(piece) == len(piece) for piece in (content[:20], content[20:]))

    def _tell(self, callback: Callable[..., Any], *arguments: Any) -> Any:
        """Call a monitor as the bindings do, which drop exceptions (python/src/infer/pyCore.cpp, PyProgressMonitor)."""
        try:
            if callback.__name__ == self.interrupted_in:
                signal.raise_signal(self.interrupted_by)
            return callback(*arguments)
        except BaseException:
            return False

    # -- running

    def _deserialize(self, runtime: Any, serialized_engine: Any) -> Any:
        content = json.loads(bytes(serialized_engine))
        graph = onnx.load(content["network"], load_external_data=False).graph
        engine = self.trt.returned("tensorrt.ICudaEngine")
        tensors = {}
        for mode, values in (("INPUT", graph.input), ("OUTPUT", graph.output)):
            for value in values:
                kind, shape = described(value)
                tensors[value.name] = self.trt.TensorIOMode[mode], self.trt.DataType[kind], shape
        vars(engine).update(
            tensors=tensors,
            profiles=content["profiles"],
            aliases={node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"},
            session=onnxruntime.InferenceSession(content["network"], providers=["CPUExecutionProvider"]),
        )
        return engine

    def _context(self, engine: Any, strategy: Any) -> Any:
        assert strategy.name == "USER_MANAGED"
        context = self.trt.returned("tensorrt.IExecutionContext")
        vars(context).update(engine=vars(engine), profile=0, shapes={}, addresses={}, memory=0)
        return context

    def _choose_profile(self, context: Any, profile_index: int, stream_handle: int) -> bool:
        vars(context).update(profile=profile_index, shapes={})
        return stream_handle == STREAM and profile_index < len(vars(context)["engine"]["profiles"])

    def _set_input_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> bool:
        state = vars(context)
        fixed = state["engine"]["tensors"][name][2]
        if -1 not in fixed:
            return shape == fixed
        low, _, high = state["engine"]["profiles"][state["profile"]][name]
        state["shapes"][name] = shape
        return all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True))

    def _set_address(self, context: Any, name: str, memory: int) -> bool:
        vars(context)["addresses"][name] = memory
        return name in vars(context)["engine"]["tensors"] and memory % 256 == 0

    def _set_memory(self, context: Any, memory: int, size: int) -> None:
        assert size >= ACTIVATION_BYTES
        vars(context).update(memory=memory)

    def _lacking(self, context: Any) -> list[str]:
        tensors = vars(context)["engine"]["tensors"]
        return [name for name, (mode, _, shape) in tensors.items()
                if mode.name == "INPUT" and -1 in shape and name not in vars(context)["shapes"]]  # fmt: skip

    def _execute(self, context: Any, stream_handle: int) -> bool:
        state = vars(context)
        engine, addresses = state["engine"], state["addresses"]
        assert stream_handle == STREAM
        assert state["memory"]
        assert not self._lacking(context)
        assert set(addresses) == set(engine["tensors"])
        assert all(addresses[present] == addresses[past] for present, past in engine["aliases"].items())
        self.enqueued.append((state["profile"], dict(state["shapes"]), dict(addresses)))
        session = engine["session"]
        feeds = {}
        for value in session.get_inputs():
            shape = state["shapes"].get(value.name, engine["tensors"][value.name][2])
            feeds[value.name] = memory_at(addresses[value.name], shape, numpy_type(value.type)).copy()
        tokens, capacity = feeds["input_ids"].shape[1], engine["tensors"]["past_k_0"][2][2]
        for name, size in (("position_ids", capacity), ("logits_index", tokens), ("cache_write", capacity)):
            assert ((feeds[name] >= 0) & (feeds[name] < size)).all(), name  # TensorRT checks none of them
        found = session.run(None, feeds)
        for value, result in zip(session.get_outputs(), found, strict=True):
            memory_at(addresses[value.name], result.shape, result.dtype)[...] = result
        return True


class HostDevice:
    """`engines.tensorrt_runner.Device` in host memory; a graph is the call itself."""

    stream = STREAM

    def __init__(self) -> None:
        self.captured = 0
        self.free = 10**9
        self.kept = 0  # bytes that nobody uses, and that are not free before they are released

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        kind = getattr(torch, dtype)
        count, spare = int(np.prod(shape)), 256 // kind.itemsize
        raw = torch.zeros(count + spare, dtype=kind)
        start = (-raw.data_ptr() % 256) // kind.itemsize
        tensor = raw[start : start + count].reshape(shape)
        self.free -= tensor.nbytes
        weakref.finalize(tensor, self._keep, tensor.nbytes)
        return tensor

    def staging(self, shape: tuple[int, ...], dtype: str) -> Any:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    def working(self) -> Any:
        return nullcontext()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return enqueue

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        self.free, self.kept = self.free + self.kept, 0

    def free_bytes(self) -> int:
        return self.free

    def _keep(self, nbytes: int) -> None:
        self.kept += nbytes


def network_of(network: Any) -> onnx.GraphProto:
    return vars(network)["onnx"]


def described(value: onnx.ValueInfoProto) -> tuple[str, tuple[int, ...]]:
    """TensorRT's name of the dtype, and the shape with -1 for what is symbolic."""
    kind = value.type.tensor_type
    sizes = [size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim]
    return DATA_TYPES[kind.elem_type], tuple(sizes)


def numpy_type(name: str) -> np.dtype:
    """ONNX Runtime's spelling of a tensor's type."""
    names: Mapping[str, Any] = {"int64": np.int64, "float": np.float32, "float16": np.float16}
    return np.dtype(names[name.removeprefix("tensor(").removesuffix(")")])


def memory_at(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array over memory that somebody else owns."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=dtype).reshape(shape)
