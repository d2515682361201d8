"""Running a TensorRT engine step by step: two contexts over one KV cache, decode as a CUDA graph.

Prefill and decode have a context each, with its profile set once: switching profiles costs time, and a captured graph
holds one context's shapes and addresses. Both share the cache and, because steps follow one another on one stream, one
block of activation memory. What changes from step to step (tokens, positions, the cache position written) are values in
buffers that stay where they are, so a graph of one decode step serves all of them.

Buffers, stream and graphs are PyTorch's: it is a dependency anyway, works in the CUDA context that TensorRT uses, and
its allocations are aligned as TensorRT wants (256 bytes). Never executed on a GPU: see docs/tensorrt.md.

Letters: B = sequences, S = tokens of one call, C = cache capacity, V = vocab_size.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engines.base import EngineManifest, Runner
from engines.sequences import Sequences, StepInputs
from engines.tensorrt_engine import (
    DECODE,
    PREFILL,
    EngineOptions,
    Profile,
    ProfileName,
    Tensors,
    check_tensors,
    past_and_present,
    tensors_of,
)
from engines.tensorrt_library import failure, make_logger, start
from exporter.dtypes import BY_NAME
from exporter.errors import EngineError
from exporter.network import CACHE_WRITE, INPUT_IDS, LOGITS, LOGITS_INDEX, NEXT_TOKENS, POSITION_IDS

ALIGNMENT = 256  # bytes: of every address that TensorRT is given


class Device(Protocol):
    """Memory, one stream and graphs. Tensors are PyTorch's."""

    stream: int  # CUDA's handle

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Make a zero-filled tensor; `dtype` is PyTorch's name."""

    def staging(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Make a tensor in host memory from and to which copies are asynchronous."""

    def working(self) -> Any:
        """Return a context manager: what PyTorch does within happens on the stream."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` puts on the stream; returns a function that puts it there again."""

    def synchronize(self) -> None:
        """Wait for everything on the stream."""

    def release(self) -> None:
        """Give back what no tensor holds any more: PyTorch keeps it, where TensorRT cannot use it."""

    def free_bytes(self) -> int:
        """Return how much memory is free."""


class CudaDevice:
    """The current GPU; see `Device`."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._stream = torch.cuda.Stream()  # not the default stream, on which an enqueue would wait for all others
        self.stream: int = self._stream.cuda_stream

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._torch.zeros(shape, dtype=getattr(self._torch, dtype), device="cuda")

    def staging(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._torch.zeros(shape, dtype=getattr(self._torch, dtype), pin_memory=True)

    def working(self) -> Any:
        return self._torch.cuda.stream(self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        graph = self._torch.cuda.CUDAGraph()
        # "thread_local": TensorRT's other threads may allocate while this one captures.
        with self._torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            enqueue()
        return graph.replay

    def synchronize(self) -> None:
        self._stream.synchronize()

    def release(self) -> None:
        self._torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        return self._torch.cuda.mem_get_info()[0]


class TensorRtRunner(Runner):
    """An opened engine; see `engines.base.Runner`."""

    def __init__(self, trt: Any, manifest: EngineManifest, options: EngineOptions, file: Path, device: Device) -> None:
        """Load the serialized engine `file` and hold its tensors against the manifest.

        Args:
            trt: the module `tensorrt`.

        Raises:
            EngineError: TensorRT does not load it, or it is not what its manifest says.
        """
        self.manifest = manifest
        self._file = file
        self._device = device
        self._logger = make_logger(trt)
        self._runtime = start(trt.Runtime, self._logger)
        if options.lean:  # the runtime that is inside the engine is code
            self._runtime.engine_host_code_allowed = True
        with _mapped(file) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise failure(self._logger, "TensorRT does not load the engine", file=file, hint="build it again here")
        self._engine: Any = engine
        self._check(options)
        self._is_capturable = not options.weight_streaming or self._set_streaming_budget(options)
        self._profiles = {profile.name: profile for profile in options.profiles}
        self._contexts = {name: self._context(trt, profile) for name, profile in self._profiles.items()}
        with device.working():
            self._activations = device.zeros((max(engine.device_memory_size_v2, ALIGNMENT),), "uint8")
        for context in self._contexts.values():
            context.set_device_memory(self._activations.data_ptr(), self._activations.numel())
        self._sequences: Sequences | None = None
        self._caches: dict[str, Any] = {}  # by the name of the input, [B, Hkv, C, d]
        self._calls: dict[ProfileName, _Call] = {}  # by profile: the last of each

    def start(self, batch: int, capacity: int) -> None:
        before, self._sequences = self._sequences, None
        sequences = Sequences(self.manifest, batch, capacity)
        least, _, most = self._profiles[DECODE].batch
        if not least <= batch <= most:
            raise EngineError("the engine cannot run this batch", expected=f"{least} to {most}", found=batch)
        with self._device.working():
            if before is None or before.batch != batch:
                self._device.synchronize()
                self._calls, self._caches = {}, {}  # a captured graph must not outlive what it reads
                self._device.release()
                self._allocate_caches(batch)
            else:
                for cache in self._caches.values():
                    cache.zero_()  # a NaN that an earlier sequence left there would spread through the mask
            self._device.synchronize()  # else the time of the request that follows has the clearing in it
        self._sequences = sequences

    def prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._prefill(LOGITS, input_ids, lengths)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self._decode(LOGITS, tokens)

    def prefill_greedy(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._prefill(NEXT_TOKENS, input_ids, lengths)

    def decode_greedy(self, tokens: np.ndarray) -> np.ndarray:
        return self._decode(NEXT_TOKENS, tokens).copy()  # who generates keeps the tokens of every step

    def report_layers(self, trt: Any, profiler: Any) -> str:
        """Have the time of every layer reported to a `tensorrt.IProfiler` from now on.

        Steps are no longer captured: of a graph that is replayed TensorRT reports nothing.

        Returns:
            What the engine inspector says of the layers, JSON.
        """
        self._is_capturable = False
        for context in self._contexts.values():
            context.profiler = profiler
        return str(self._engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        if self._engine is None:
            return
        self._device.synchronize()
        self._sequences = None
        self._calls, self._caches = {}, {}
        self._contexts = {}  # before the engine, which goes before the runtime
        self._engine = self._activations = None
        self._runtime = None
        self._device.release()

    def _prefill(self, wanted: str, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Append `input_ids` in as many calls as it takes; returns a copy of the output `wanted`."""
        sequences = self._started()
        sequences.check_prefill(input_ids, lengths)
        sequences.check_room(input_ids, lengths)
        sequences.cache_needed(input_ids.shape[1])
        longest = self._profiles[PREFILL].tokens[2]
        found = self._step(wanted, input_ids[:, :longest], np.minimum(lengths, longest)).copy()
        for first in range(longest, input_ids.shape[1], longest):
            chunk = input_ids[:, first : first + longest]
            in_chunk = np.clip(lengths - first, 0, chunk.shape[1])
            called = self._step(wanted, chunk, in_chunk)
            found[in_chunk > 0] = called[in_chunk > 0]  # the last that a row has a token in stays
        return found

    def _decode(self, wanted: str, tokens: np.ndarray) -> np.ndarray:
        """Append `tokens`; returns the output `wanted`, valid until the next call."""
        sequences = self._started()
        sequences.check_decode(tokens)
        sequences.cache_needed(1)
        found = self._call(wanted, 1, lambda inputs: sequences.fill_decode(inputs, tokens))
        sequences.count_decode()
        return found

    def _step(self, wanted: str, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Run one call of S tokens that was checked; returns the output `wanted`, valid until the next call."""
        sequences = self._started()
        found = self._call(wanted, input_ids.shape[1], lambda inputs: sequences.fill(inputs, input_ids, lengths))
        sequences.count(lengths)
        return found

    def _call(self, wanted: str, tokens: int, fill: Callable[[StepInputs], None]) -> np.ndarray:
        """Run one call of S = `tokens` whose inputs `fill` writes; only its output `wanted` is copied to the host."""
        name: ProfileName = DECODE if tokens == 1 else PREFILL
        with self._device.working():
            call = self._calls.get(name)
            if call is None or call.tokens != tokens:
                self._calls.pop(name, None)
                call = self._calls[name] = self._bind(name, self._started().batch, tokens)
            fill(call.inputs)
            call.device_inputs.copy_(call.host_inputs, non_blocking=True)
            if call.replay is None:
                self._enqueue(name)
            else:
                call.replay()
            output = call.outputs[wanted]
            output.on_host.copy_(output.on_device, non_blocking=True)
            self._device.synchronize()
            # A step must run as it is before it is captured; not later, for a request that warms up may have but one.
            if name == DECODE and call.replay is None and self._is_capturable:
                call.replay = self._captured(name)
        return output.on_host.numpy()

    def _captured(self, name: ProfileName) -> Callable[[], None]:
        try:
            return self._device.capture(lambda: self._enqueue(name))
        except RuntimeError as error:  # how PyTorch passes on what CUDA says
            raise EngineError(
                f"a step of {name} cannot be captured as a CUDA graph ({error})", file=self._file
            ) from error

    def _enqueue(self, name: ProfileName) -> None:
        self._must(self._contexts[name].execute_async_v3(self._device.stream), f"run a step of {name}")

    def _context(self, trt: Any, profile: Profile) -> Any:
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise failure(self._logger, "TensorRT makes no execution context", file=self._file)
        chosen = context.set_optimization_profile_async(profile.index, self._device.stream)
        self._must(chosen, f"choose the profile of {profile.name}")
        self._device.synchronize()
        return context

    def _bind(self, name: ProfileName, batch: int, tokens: int) -> _Call:
        """Make the buffers of a call with S = `tokens` and bind them, and each cache as both its past and present."""
        call = _make_call(self._device, batch, tokens, self.manifest.vocab_size)
        context = self._contexts[name]
        addresses = {key: output.on_device.data_ptr() for key, output in call.outputs.items()} | call.addresses
        shapes = {key: buffer.shape for key, buffer in call.inputs.named().items()}
        for slot in self.manifest.cache:
            for past, present in past_and_present(slot):
                addresses[past] = addresses[present] = self._caches[past].data_ptr()
                shapes[past] = tuple(self._caches[past].shape)
        for tensor, shape in shapes.items():
            self._must(context.set_input_shape(tensor, tuple(shape)), f"take {tensor} as {list(shape)}")
        for tensor, address in addresses.items():
            self._must(context.set_tensor_address(tensor, address), f"take an address for {tensor}")
        unknown = context.infer_shapes()
        if unknown:
            raise failure(self._logger, f"TensorRT lacks the shapes of {', '.join(unknown)}", file=self._file)
        return call

    def _allocate_caches(self, batch: int) -> None:
        capacity = self.manifest.capacity
        assert capacity is not None  # checked when the engine was opened
        nbytes = self.manifest.kv_bytes_per_token * capacity * batch
        free = self._device.free_bytes()
        if nbytes > free:
            raise EngineError(
                f"not enough GPU memory for a KV cache of {batch} x {capacity} tokens",
                expected=f"{nbytes / 2**30:.1f} GiB",
                found=f"{free / 2**30:.1f} GiB",
                hint="run fewer sequences, or export the network with fewer max_positions",
            )
        dtype = BY_NAME[self.manifest.dtype].torch
        for slot in self.manifest.cache:
            shape = (batch, slot.num_key_value_heads, capacity, slot.head_dim)
            for name in (slot.key, slot.value):
                self._caches[name] = self._device.zeros(shape, dtype)

    def _check(self, options: EngineOptions) -> None:
        manifest, engine = self.manifest, self._engine
        if manifest.capacity is None:
            raise EngineError("an engine of TensorRT has a cache of fixed capacity", file=self._file)
        expected = tensors_of(
            manifest.cache,
            dtype=manifest.dtype,
            batch=manifest.batch,
            capacity=manifest.capacity,
            vocab_size=manifest.vocab_size,
        )
        found: Tensors = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_mode(name).name.lower()
            found[name] = kind, engine.get_tensor_dtype(name).name, tuple(engine.get_tensor_shape(name))
        check_tensors(expected, found, self._file)
        for slot in manifest.cache:
            for past, present in past_and_present(slot):
                alias = engine.get_aliased_input_tensor(present)
                if alias != past:
                    raise EngineError(
                        f"{present}: the engine does not update its cache in place",
                        file=self._file,
                        expected=past,
                        found=alias,
                    )
        if engine.num_optimization_profiles != len(options.profiles):
            raise EngineError(
                "the engine's profiles are not its manifest's",
                file=self._file,
                expected=len(options.profiles),
                found=engine.num_optimization_profiles,
            )

    def _set_streaming_budget(self, options: EngineOptions) -> bool:
        """Choose how many weights stay on the GPU, before there are contexts; returns whether all of them do.

        Only then can a step be captured: else TensorRT copies weights, and waits for them, within it.
        """
        engine = self._engine
        streamable = engine.streamable_weights_size
        wanted = options.weight_streaming_budget
        budget = engine.get_weight_streaming_automatic_budget() if wanted is None else min(wanted, streamable)
        engine.weight_streaming_budget_v2 = budget
        if engine.weight_streaming_budget_v2 != budget:
            raise failure(self._logger, f"TensorRT refuses to stream weights with {budget} bytes", file=self._file)
        return budget >= streamable

    def _must(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise failure(self._logger, f"TensorRT does not {what}", file=self._file)

    def _started(self) -> Sequences:
        if self._sequences is None:
            raise AssertionError("Bug: a runner is used before it is started, or after it is closed")
        return self._sequences


@dataclass(slots=True)
class _Call:
    """Everything bound for calls of one S."""

    tokens: int  # S
    inputs: StepInputs  # views of `host_inputs`
    host_inputs: Any  # int64: the four inputs one after the other, each from an aligned place on
    device_inputs: Any  # the same on the device: one copy brings all
    addresses: dict[str, int]  # of each input in `device_inputs`
    outputs: dict[str, _Output]
    replay: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class _Output:
    """Where a step writes what may be wanted of it, and where that is copied to."""

    on_device: Any
    on_host: Any


def _make_call(device: Device, batch: int, tokens: int, vocab_size: int) -> _Call:
    shapes = {INPUT_IDS: (batch, tokens), POSITION_IDS: (batch, tokens), CACHE_WRITE: (batch,), LOGITS_INDEX: (batch,)}
    starts, end = {}, 0  # in elements
    aligned = ALIGNMENT // 8
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-prod(shape) // aligned) * aligned
    host, on_device = device.staging((end,), "int64"), device.zeros((end,), "int64")
    flat = host.numpy()
    views = {name: flat[starts[name] : starts[name] + prod(shape)].reshape(shape) for name, shape in shapes.items()}
    outputs = {LOGITS: ((batch, vocab_size), "float32"), NEXT_TOKENS: ((batch,), "int64")}
    return _Call(
        tokens=tokens,
        inputs=StepInputs(
            input_ids=views[INPUT_IDS],
            position_ids=views[POSITION_IDS],
            cache_write=views[CACHE_WRITE],
            logits_index=views[LOGITS_INDEX],
        ),
        host_inputs=host,
        device_inputs=on_device,
        addresses={name: on_device.data_ptr() + 8 * start for name, start in starts.items()},
        outputs={
            name: _Output(on_device=device.zeros(shape, dtype), on_host=device.staging(shape, dtype))
            for name, (shape, dtype) in outputs.items()
        },
    )


def _mapped(file: Path) -> mmap.mmap:
    """A file as memory that is read when it is looked at: an engine may be larger than the host's memory."""
    try:
        with file.open("rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise EngineError(f"the engine cannot be read ({error})", file=file) from error
