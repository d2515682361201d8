"""From an ONNX network to a serialized TensorRT engine: the plan of a build, and TensorRT's calls in order.

The plan is plain data, made without TensorRT: `--dry-run` prints it. The calls are those of TensorRT's Python bindings,
the same from 10.15 to 11.x. Polygraphy's builder is not in between: it has the whole engine in memory before it writes,
knows no stream writer, and its defaults for TF32 and verbosity are not TensorRT's. Never executed on a GPU: see
docs/tensorrt.md.

Letters: B = sequences, S = tokens of one call, C = cache capacity, D = hidden_size, V = vocab_size.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from engines.base import BuildProgress, Foreseen
from engines.tensorrt_engine import (
    ANY,
    DATA_TYPES,
    DECODE,
    PREFILL,
    Profile,
    Tensors,
    check_tensors,
    tensors_of,
)
from engines.tensorrt_library import Gpu, failure, make_logger, start
from exporter.dtypes import BY_NAME
from exporter.errors import EngineError, FuselageError, OutputError, raise_all
from exporter.network import NETWORK_FILE, NETWORK_KIND, NetworkManifest, NetworkVariant, network_manifest_from_json
from exporter.safetensors_io import read_json
from exporter.settings import Setting, range_problems
from exporter.writers.files import check_folder, save_file
from plugins.contract import WIDE_FFN_MOST_TOKENS

GB = 10**9
Sizes3 = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # min, opt and max of one input's shape

# Builds of NVIDIA's own LLM exporter peaked at 3 to 4 times the weights in host memory, a small one at 14 GB.
HOST_BYTES_PER_WEIGHT_BYTE, HOST_BYTES_BESIDE = 4, 10 * GB
TIMING_ITERATIONS = 8  # measurements that a tactic's time is the mean of, as in trtexec; TensorRT's default is 1
LOWEST_CAPABILITY = {"bfloat16": (8, 0), "float16": (7, 5), "float32": (7, 5), "fp8": (8, 9)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What can be chosen about a build."""

    # Of a network that leaves it open.
    max_batch_size: Annotated[
        int | None,
        Setting("sequences side by side, where a network leaves it open; 8 if not given.", option="max-batch", least=1),
    ] = None
    # Longer prompts take several calls.
    max_input_len: Annotated[int | None, Setting("tokens of a prefill call; 2048 if not given.", least=1)] = None
    opt_input_len: Annotated[
        int | None, Setting("the length that kernels are chosen for; --max-input-len if not given.", least=1)
    ] = None
    builder_optimization_level: Annotated[
        int, Setting("0 builds fast, 5 compares most kernels; 3 if not given.", least=0, most=5)
    ] = 3
    timing_cache: Annotated[
        Path | None, Setting("file of measured tactics, read and extended.", is_of_machine=True)
    ] = None
    lean: Annotated[bool, Setting("an engine for later versions and the lean runtime.")] = False
    weight_streaming: Annotated[bool, Setting("weights may stay in host memory.")] = False
    weight_streaming_budget: Annotated[
        int | None,
        Setting("how much of them the GPU holds, e.g. 20GB; TensorRT's choice if not given.", least=1, in_bytes=True),
    ] = None
    decomposable_attention: Annotated[bool, Setting("attention need not be one fused kernel.")] = False
    detailed: Annotated[bool, Setting("keep what an engine inspector shows of layers.")] = False
    ignore_memory: Annotated[bool, Setting("build even if it is not expected to fit.", is_of_machine=True)] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """What an engine is expected to take when it runs, in bytes; without the runtime's own."""

    weights: int
    kv_cache: int  # of all sequences at their full length
    activations: int  # estimated, of the largest prefill call

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """Everything about a build that is known before TensorRT is asked."""

    folder: Path  # of the network
    fingerprint: str
    contract: NetworkManifest
    variant: NetworkVariant
    capacity: int  # C
    settings: BuildSettings
    profiles: tuple[Profile, Profile]
    flags: tuple[str, ...]  # of `tensorrt.BuilderFlag`, beside TensorRT's defaults
    weight_bytes: int
    kv_bytes_per_token: int
    host_bytes: int  # estimated peak of the build
    gpu_memory: GpuMemory

    @property
    def network_file(self) -> Path:
        """The .onnx file."""
        return self.folder / self.variant.file

    @property
    def tensors(self) -> Tensors:
        """The network's inputs and outputs."""
        return tensors_of(
            self.contract.cache,
            dtype=self.variant.dtype,
            batch=self.variant.batch,
            capacity=self.capacity,
            vocab_size=self.contract.vocab_size,
        )

    def shapes(self, profile: Profile) -> dict[str, Sizes3]:
        """Min, opt and max of every input whose shape is not fixed."""
        found: dict[str, Sizes3] = {}
        for name, (kind, _, shape) in self.tensors.items():
            if kind == "input" and ANY in shape:
                low, opt, high = (
                    tuple(size if size != ANY else (batch if axis == 0 else tokens) for axis, size in enumerate(shape))
                    for batch, tokens in zip(profile.batch, profile.tokens, strict=True)
                )
                found[name] = low, opt, high
        return found


def plan_build(network: Path, settings: BuildSettings) -> BuildPlan:
    """Plan the build of a network folder's engine; no weight is read.

    Raises:
        CheckpointError: the network folder is incomplete or malformed.
        EngineError: no network of the folder is for TensorRT, or the settings do not fit it.
    """
    folder = check_folder(network, NETWORK_KIND, hashes=False)
    contract = network_manifest_from_json(read_json(network / NETWORK_FILE), network / NETWORK_FILE)
    candidates = [variant for variant in contract.networks if variant.target == "tensorrt"]
    if not candidates:
        raise EngineError(
            "no network of this folder is for TensorRT",
            file=network,
            found=", ".join(variant.target for variant in contract.networks),
            hint="export one with --target tensorrt, beside the others if you like: --target onnxruntime "
            "--target tensorrt",
        )
    variant = candidates[0]
    if variant.capacity is None or variant.dtype not in DATA_TYPES:
        raise EngineError(
            "not a network that TensorRT can build",
            file=network / variant.file,
            expected=f"a cache of fixed capacity, and one of {', '.join(DATA_TYPES)}",
            found=f"capacity {variant.capacity}, {variant.dtype}",
        )
    if not variant.chooses_tokens:
        raise EngineError(
            "not a network of this version: it does not choose the next tokens",
            file=network / variant.file,
            hint="export it again",
        )
    for name in (variant.file, *variant.weight_files):
        if name not in folder.files:
            raise EngineError("the network names a file that is not in its folder", file=network, found=name)
    engine = Foreseen(
        dtype=variant.dtype,
        max_positions=variant.max_positions,
        batch=variant.batch,
        plugins=variant.plugins,
    )
    raise_all(list(setting_problems(settings, engine)))
    profiles = _profiles(settings, engine)
    weight_bytes = _weight_bytes(contract, variant, sum(folder.files[name].bytes for name in variant.weight_files))
    itemsize = BY_NAME[variant.dtype].itemsize
    kv_bytes_per_token = sum(slot.elements_per_position() for slot in contract.cache) * itemsize
    batch, tokens = profiles[0].batch[2], profiles[0].tokens[2]
    on_gpu = settings.weight_streaming_budget if settings.weight_streaming else None
    return BuildPlan(
        folder=network,
        fingerprint=folder.fingerprint,
        contract=contract,
        variant=variant,
        capacity=variant.capacity,
        settings=settings,
        profiles=profiles,
        flags=tuple(_flags(settings)),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        host_bytes=HOST_BYTES_PER_WEIGHT_BYTE * weight_bytes + HOST_BYTES_BESIDE,
        gpu_memory=GpuMemory(
            weights=min(weight_bytes, on_gpu or weight_bytes),
            kv_cache=batch * variant.capacity * kv_bytes_per_token,
            activations=_activation_bytes(contract, batch, tokens, variant.capacity, itemsize),
        ),
    )


def fit_problems(plan: BuildPlan, gpu: Gpu | None, available_host_bytes: int) -> list[EngineError]:
    """Return why this machine cannot be expected to build the plan, or to run what comes of it."""
    problems = []
    wanted = [plan.variant.dtype] + (["fp8"] if "fp8" in (plan.variant.number_format or "") else [])
    for name in wanted if gpu is not None else []:
        if gpu is not None and gpu.compute_capability < LOWEST_CAPABILITY[name]:
            lowest = ".".join(map(str, LOWEST_CAPABILITY[name]))
            problems.append(
                EngineError(
                    f"the GPU has no {name} arithmetic",
                    file=plan.network_file,
                    expected=f"compute capability {lowest} or more",
                    found=f"{gpu.name}: {gpu.capability}",
                )
            )
    if plan.settings.ignore_memory:
        return problems
    way_out = "ignore the estimate with --ignore-memory"
    if plan.host_bytes > available_host_bytes:
        problems.append(
            EngineError(
                "not enough host memory to build",
                expected=f"about {plan.host_bytes / GB:.1f} GB (estimated)",
                found=f"{available_host_bytes / GB:.1f} GB available",
                hint=f"quantize the weights, build on a machine with more memory, or {way_out}",
            )
        )
    if gpu is not None and plan.gpu_memory.total > gpu.free_bytes:
        problems.append(
            EngineError(
                "not enough GPU memory to run the engine",
                expected=f"about {plan.gpu_memory.total / GB:.1f} GB (estimated)",
                found=f"{gpu.free_bytes / GB:.1f} GB free",
                hint=f"export with fewer max_positions, quantize, stream weights (--weight-streaming), or {way_out}",
            )
        )
    return problems


def describe(plan: BuildPlan, output: Path, gpu: Gpu | None, available_host_bytes: int) -> str:
    """Put a plan into words, one fact a line."""
    variant, settings, memory = plan.variant, plan.settings, plan.gpu_memory
    batch = variant.batch or f"1 to {plan.profiles[0].batch[2]}"
    lines = [
        f"network        {plan.network_file}",
        f"               {variant.dtype}, {variant.number_format or 'no quantized linears'}, batch {batch}, "
        f"cache of {plan.capacity:,} tokens",
        f"engine         {output}",
        f"GPU            {'none here' if gpu is None else f'{gpu.name}, compute capability {gpu.capability}'}",
        f"optimization   level {settings.builder_optimization_level}, "
        f"{TIMING_ITERATIONS} measurements a tactic, timing cache {settings.timing_cache or 'none'}",
        "types          those of the network (strongly typed)"
        + ("; products of float32 in TF32" if variant.dtype == "float32" else ""),  # TensorRT's default
        f"flags          {', '.join(plan.flags) or 'none'}",
    ]
    if settings.decomposable_attention:
        lines.append("attention      may be decomposed")
    for profile in plan.profiles:
        lines.append(f"profile {profile.index}      {profile.name}: min, opt, max of each open input")
        for name, sizes in plan.shapes(profile).items():
            lines.append(f"  {name:<12} " + "  ".join("x".join(map(str, shape)) for shape in sizes))
    lines += [
        f"host memory    {plan.host_bytes / GB:.1f} GB to build (estimated), "
        f"{available_host_bytes / GB:.1f} GB available",
        f"GPU memory     {memory.total / GB:.2f} GB to run (estimated): weights {memory.weights / GB:.2f}, "
        f"KV cache {memory.kv_cache / GB:.2f}, activations {memory.activations / GB:.2f}",
    ]
    return "\n".join(lines)


def build_engine(
    trt: Any, plan: BuildPlan, engine_file: Path, progress: BuildProgress | None
) -> tuple[Literal["none", "begun", "continued"], FuselageError | None]:
    """Build a plan's engine into a file.

    Args:
        trt: the module `tensorrt`.

    Returns:
        What the timing cache was before, and what kept it from being extended: no reason to lose the engine.

    Raises:
        EngineError: TensorRT does not import or build the network, one problem for each error that its parser names;
            or the timing cache is another version's or another GPU's.
        OutputError: the engine cannot be written, or not the folder of the timing cache.
        KeyboardInterrupt, SystemExit: what SIGINT or SIGTERM raises here.
    """
    logger = make_logger(trt)
    builder = start(trt.Builder, logger)
    config = builder.create_builder_config()
    timings = None if plan.settings.timing_cache is None else _TimingCache(config, plan.settings.timing_cache, logger)
    # From 11.0 on every network is strongly typed; before, it has to be asked for.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if plan.variant.plugins:
        from plugins.wide_ffn.tensorrt_plugin import register_plugins

        register_plugins()  # the parser looks for them by name
    parser = trt.OnnxParser(network, logger)  # holds the weights: it must outlive the build
    if not parser.parse_from_file(str(plan.network_file)):
        raise_all(list(_parser_problems(parser, plan.network_file)))
        raise failure(logger, "TensorRT does not import the network", file=plan.network_file)
    check_tensors(plan.tensors, _network_tensors(network), plan.network_file)
    if plan.settings.decomposable_attention:
        _make_attention_decomposable(trt, network)
    _configure(trt, config, builder, plan, logger)
    monitor = _make_monitor(trt, progress)
    config.progress_monitor = monitor
    try:
        with engine_file.open("wb") as file, _signals_put_off(monitor):
            writer = _make_writer(trt, file)
            built = builder.build_serialized_network_to_stream(network, config, writer)
    except OSError as error:
        raise OutputError(f"the engine cannot be written ({error.strerror})", file=engine_file.parent) from error
    if writer.error is not None:
        raise OutputError(
            f"the engine cannot be written ({writer.error.strerror})", file=engine_file.parent
        ) from writer.error
    if not built:
        hint = (
            None if plan.settings.decomposable_attention else "if it names an attention, try --decomposable-attention"
        )
        raise failure(logger, "TensorRT does not build the network", file=plan.network_file, hint=hint)
    if timings is None:
        return "none", None
    try:
        timings.save()
    except FuselageError as error:
        return timings.state, error
    return timings.state, None


def setting_problems(settings: BuildSettings, engine: Foreseen) -> Iterator[EngineError]:
    """What of the settings does not fit an engine of this form, or anything; reads nothing."""
    yield from range_problems(settings, EngineError)
    if settings.max_batch_size is not None and engine.batch is not None:
        yield EngineError("the network has a fixed batch", expected="no max_batch", found=settings.max_batch_size)
    if settings.max_input_len is not None and settings.max_input_len > engine.max_positions:
        yield EngineError(
            "max_input_len is more than a sequence may have",
            expected=f"at most {engine.max_positions}",
            found=settings.max_input_len,
        )
    longest = _max_input_len(settings, engine)
    if settings.opt_input_len is not None and settings.opt_input_len > longest:
        yield EngineError(
            "opt_input_len is within max_input_len", expected=f"at most {longest}", found=settings.opt_input_len
        )
    if settings.weight_streaming_budget is not None and not settings.weight_streaming:
        yield EngineError("weight_streaming_budget belongs to weight_streaming")
    most_tokens = _max_batch(settings, engine) * longest
    if engine.plugins and most_tokens > WIDE_FFN_MOST_TOKENS:
        yield EngineError(
            "the network has nodes of plugins, which take few tokens at a time",
            expected=f"at most {WIDE_FFN_MOST_TOKENS} tokens of all sequences in one call",
            found=most_tokens,
            hint="choose a smaller max_input_len; longer prompts then take several calls",
        )


def _max_batch(settings: BuildSettings, engine: Foreseen) -> int:
    return engine.batch or settings.max_batch_size or 8


def _max_input_len(settings: BuildSettings, engine: Foreseen) -> int:
    return settings.max_input_len or min(2048, engine.max_positions)


def _profiles(settings: BuildSettings, engine: Foreseen) -> tuple[Profile, Profile]:
    most = _max_batch(settings, engine)
    batch = (most, most, most) if engine.batch is not None else (1, most, most)
    longest = _max_input_len(settings, engine)
    prefill = (1, settings.opt_input_len or longest, longest)
    return (
        Profile(name=PREFILL, index=0, batch=batch, tokens=prefill),
        # Decode has a profile of its own because kernels are chosen for opt, and a matrix of one row wants others.
        Profile(name=DECODE, index=1, batch=batch, tokens=(1, 1, 1)),
    )


def _flags(settings: BuildSettings) -> Iterator[str]:
    if settings.lean:
        yield "VERSION_COMPATIBLE"
    if settings.weight_streaming:
        yield "WEIGHT_STREAMING"


def _weight_bytes(contract: NetworkManifest, variant: NetworkVariant, stored: int) -> int:
    """Bytes of weights in the engine: float weights take the network's dtype, whatever they are stored as."""
    if variant.number_format is not None:
        return stored
    return int(contract.structure["num_parameters"]) * BY_NAME[variant.dtype].itemsize


def _activation_bytes(contract: NetworkManifest, batch: int, tokens: int, capacity: int, itemsize: int) -> int:
    """The outputs of the widest GEMM and three hidden states [B*S, ...], the mask [B, S, C], the logits [B, V]."""
    columns = _widest_gemm(contract.structure) + 3 * int(contract.structure["hidden_size"])
    return batch * tokens * (itemsize * columns + capacity) + 4 * batch * contract.vocab_size


def _widest_gemm(structure: dict[str, Any]) -> int:
    """Columns of the widest product that is alive at once: gate and up, or query, key and value."""
    widest = 0
    for entry in structure["blocks"]:
        for block in entry.get("parallel", [entry]):
            attention, ffn = block["attention"] or {}, block["ffn"] or {}
            heads = attention.get("num_attention_heads", 0) + 2 * attention.get("num_key_value_heads", 0)
            widest = max(widest, 2 * ffn.get("intermediate_size", 0), heads * attention.get("head_dim", 0))
    return widest


def _parser_problems(parser: Any, file: Path) -> Iterator[FuselageError]:
    for index in range(parser.num_errors):
        reported = parser.get_error(index)
        where = (
            f"node {reported.node()} {reported.node_name()!r} ({reported.node_operator()})"
            if reported.node() >= 0
            else "file"
        )
        yield EngineError(
            f"{where}: {reported.desc()}", file=file, found=f"{reported.code().name}, in {reported.func()}"
        )


def _network_tensors(network: Any) -> Tensors:
    found: Tensors = {}
    for kind, count, get in (
        ("input", network.num_inputs, network.get_input),
        ("output", network.num_outputs, network.get_output),
    ):
        for index in range(count):
            tensor = get(index)
            found[tensor.name] = kind, tensor.dtype.name, tuple(tensor.shape)
    return found


def _make_attention_decomposable(trt: Any, network: Any) -> None:
    """Not an attribute of ONNX's Attention, so it cannot be in the file; this is how trtexec does it, too."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way of casting
            layer.attention.decomposable = True


def _configure(trt: Any, config: Any, builder: Any, plan: BuildPlan, logger: Any) -> None:
    config.builder_optimization_level = plan.settings.builder_optimization_level
    config.avg_timing_iterations = TIMING_ITERATIONS
    for name in plan.flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if plan.settings.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for wanted in plan.profiles:
        made = builder.create_optimization_profile()
        for name, (low, opt, high) in plan.shapes(wanted).items():
            made.set_shape(name, low, opt, high)
        if config.add_optimization_profile(made) != wanted.index:
            raise failure(logger, f"TensorRT refuses the {wanted.name} profile", file=plan.network_file)


class _TimingCache:
    """The file of measured tactics: read before the build, extended after it.

    Another build may have written it in between; its measurements are kept.
    """

    def __init__(self, config: Any, file: Path, logger: Any) -> None:
        self._config, self._file, self._logger = config, file, logger
        self._read = self._content()
        folder = next(path for path in file.absolute().parents if path.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError("the timing cache cannot be written: no write permission", file=folder)
        self.state: Literal["begun", "continued"] = "continued" if self._read else "begun"
        # With ignore_mismatch, timings of another GPU would choose this one's kernels.
        if not config.set_timing_cache(self._cache_from(self._read), ignore_mismatch=False):
            raise self._refused()

    def save(self) -> None:
        """Write the cache so that it appears whole or not at all."""
        cache = self._config.get_timing_cache()
        current = self._content()
        if current != self._read and not cache.combine(self._cache_from(current), ignore_mismatch=False):
            raise self._refused()
        save_file(self._file, bytes(memoryview(cache.serialize())), force=True)

    def _cache_from(self, content: bytes) -> Any:
        cache = self._config.create_timing_cache(content)
        if cache is None:
            raise self._refused()
        return cache

    def _content(self) -> bytes:
        try:
            return self._file.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise EngineError(f"the timing cache cannot be read ({error.strerror})", file=self._file) from error

    def _refused(self) -> EngineError:
        return failure(
            self._logger,
            "TensorRT does not take this timing cache",
            file=self._file,
            hint="it belongs to one version of TensorRT and one kind of GPU: name another file",
        )


def _make_monitor(trt: Any, progress: BuildProgress | None) -> Any:
    """Make a `trt.IProgressMonitor` that reports the outermost phase's steps and names the latest inner phase."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._lock = threading.Lock()  # TensorRT calls from several threads
            self._outer: tuple[str, int] | None = None  # name, steps
            self._done = 0
            self._inner = ""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                if parent_phase is None:
                    self._outer, self._done, self._inner = (phase_name, num_steps), 0, ""
                else:
                    self._inner = phase_name
            self._tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Return whether to go on."""
            with self._lock:
                if self._outer is not None and phase_name == self._outer[0]:
                    self._done = step + 1
            self._tell()
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                if self._outer is not None and phase_name == self._outer[0]:
                    self._done = self._outer[1]
            self._tell()

        def _tell(self) -> None:
            if progress is None or self._outer is None:
                return
            name, steps = self._outer
            progress(self._done, steps, f"{name}: {self._inner}" if self._inner else name)

    return Monitor()


@contextmanager
def _signals_put_off(monitor: Any) -> Iterator[None]:
    """Have SIGINT and SIGTERM set `monitor.interrupted`, for which TensorRT stops at the next step; then they count.

    Python would raise what they stand for in the callback that happens to run next, and there TensorRT's bindings drop
    it.
    """
    if threading.current_thread() is not threading.main_thread():  # which no signal reaches
        yield
        return
    arrived: list[int] = []

    def tell(number: int, _: object) -> None:
        monitor.interrupted = True
        arrived.append(number)

    # Where Python has no handler, a signal does what it does: SIGTERM ends a program that is not our command line.
    known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in known.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, tell)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _make_writer(trt: Any, file: BinaryIO) -> Any:
    """Make a `trt.IStreamWriter` into a file; what goes wrong is kept in `error`."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            """Return the bytes written; an exception must not travel through TensorRT."""
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()
