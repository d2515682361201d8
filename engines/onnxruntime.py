"""ONNX Runtime on CPU: engines from ONNX networks, and a runner whose KV cache is updated in place.

Building takes over the network and its weight files and proves that they run, quantized linears with kernels of their
format (`onnxruntime_kernels`); ONNX Runtime optimizes when the engine is opened. The cache of a network with symbolic
capacity starts small and grows by `CACHE_STEP` positions, because on CPU an attention costs what its capacity is, not
what it holds.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil

from engines.base import (
    ENGINE_KIND,
    EngineManifest,
    Environment,
    Runner,
    backend_options,
    read_engine_manifest,
    save_engine,
)
from engines.machine import cpu_name, version_numbers
from engines.onnxruntime_kernels import (
    QuantizedLinear,
    check_kernels,
    executed_format,
    is_emulated,
    kernels_from_profile,
    quantized_linears,
    session_config,
)
from engines.sequences import Sequences, StepInputs
from exporter.dtypes import BY_NAME
from exporter.errors import EngineError, FuselageError, raise_all
from exporter.network import (
    CACHE_WRITE,
    INPUT_IDS,
    LOGITS,
    LOGITS_INDEX,
    NETWORK_FILE,
    NETWORK_KIND,
    NEXT_TOKENS,
    POSITION_IDS,
    NetworkManifest,
    NetworkVariant,
    network_manifest_from_json,
)
from exporter.safetensors_io import read_json
from exporter.structure import Sealed
from exporter.writers.files import FileLink, Manifest, check_folder, refuse_existing

if TYPE_CHECKING:
    import onnxruntime

NAME = "onnxruntime"
MIN_VERSION = (1, 25)  # the first with a TensorScatter kernel on CPU; 1.25, 1.26, 1.27, 1.28, 1.30 and 1.32 were run
INSTALL = "pip install 'onnxruntime>=1.28' (Python 3.11 or later)"
DTYPES = ("float32", "float16")  # networks that the CPU kernels run

CACHE_STEP = 128  # positions
BUFFER_ALIGNMENT = 64  # bytes: a cache line, and a register of AVX-512

# Worker threads that spin after a run take the CPU from whoever runs next: by default for about 40 ms.
SPIN_US = 200


class OnnxRuntime:
    """The backend; see `engines.base.Backend`."""

    name = NAME

    def missing(self) -> list[str]:
        try:
            import onnxruntime
        except ImportError:
            return [f"onnxruntime is not installed: {INSTALL}"]
        version = onnxruntime.__version__
        if version_numbers(version) < MIN_VERSION:
            return [f"onnxruntime {version} lacks operators of opset 24: {INSTALL}"]
        return []

    def environment(self) -> Environment:
        import onnxruntime

        cores = str(psutil.cpu_count(logical=False) or 1)
        return Environment(
            runtime={NAME: onnxruntime.__version__},
            machine={"cpu": cpu_name(), "arch": platform.machine(), "cores": cores},
        )

    def build(
        self,
        network: Path,
        output: Path,
        *,
        label: str | None,
        force: bool,
        details: Mapping[str, Any] | None = None,
    ) -> Path:
        """Copy a network into an engine folder, after a prefill and a decode step that give finite logits.

        Raises:
            CheckpointError: the network folder is incomplete, altered or malformed.
            EngineError: ONNX Runtime is missing or too old, cannot run the network, or runs its quantized linears as
                float ones.
            OutputError: the output is in the way or cannot be written.
        """
        raise_all([EngineError(problem) for problem in self.missing()])
        refuse_existing(output, force=force)
        folder = check_folder(network, NETWORK_KIND, hashes=True)
        contract = network_manifest_from_json(read_json(network / NETWORK_FILE), network / NETWORK_FILE)
        variant = _runnable(contract, folder, network)
        linears = quantized_linears(network / variant.file)
        manifest = _engine_manifest(contract, variant, folder, label or output.name, linears, self.environment())
        _prove(manifest, network, linears)
        files = [(name, FileLink(network / name)) for name in (variant.file, *variant.weight_files)]
        return save_engine(output, manifest, files, details=details, force=force)

    def open(self, engine: Path, *, threads: int | None, profile: Path | None = None) -> OnnxRuntimeRunner:
        """See `engines.base.Backend`; with `profile`, ONNX Runtime's profiler writes a file whose name begins so."""
        raise_all([EngineError(problem) for problem in self.missing()])
        folder = check_folder(engine, ENGINE_KIND, hashes=True)
        manifest = read_engine_manifest(engine)
        if manifest.backend != NAME:
            raise EngineError("engine of another backend", file=engine, expected=NAME, found=manifest.backend)
        if manifest.network_file not in folder.files:
            raise EngineError("the network is not in the engine folder", file=engine, found=manifest.network_file)
        _check_version(manifest, engine)
        return OnnxRuntimeRunner(manifest, _session(manifest, engine, threads, profile))


def _check_version(manifest: EngineManifest, engine: Path) -> None:
    """Refuse an ONNX Runtime older than the build's: that it runs this network, and with which kernels, nobody saw."""
    import onnxruntime

    built_with = manifest.runtime.get(NAME, "")
    if version_numbers(onnxruntime.__version__) < version_numbers(built_with):
        raise EngineError(
            "ONNX Runtime is older than the one that the engine was built with",
            file=engine,
            expected=f"{built_with} or later",
            found=onnxruntime.__version__,
            hint="build the engine again, or install that version",
        )


class EngineOptions(Sealed):
    """What this backend keeps in `EngineManifest.options`."""

    device: Literal["cpu"]
    emulated: bool = False  # whether a number format is imitated, so that timings say nothing about it
    session: dict[str, str]  # session configuration: every run of an engine has the same
    network: dict[str, Any]  # options of the network's writer


class OnnxRuntimeRunner(Runner):
    """An opened engine; see `engines.base.Runner`. Every buffer is bound once and changed in place."""

    def __init__(self, manifest: EngineManifest, session: onnxruntime.InferenceSession) -> None:
        """Take over a session whose inputs and outputs are those of `manifest`."""
        self.manifest = manifest
        self._session: onnxruntime.InferenceSession | None = session
        self._dtype = BY_NAME[manifest.dtype].numpy
        self._sequences: Sequences | None = None
        self._capacity = 0
        self._caches: dict[str, np.ndarray] = {}  # by input name, [B, Hkv, capacity, d]
        self._cache_values: dict[str, onnxruntime.OrtValue] = {}
        self._calls: dict[int, _Call] = {}  # by S: that of decode, and the last prefill's

    def start(self, batch: int, capacity: int) -> None:
        self._sequences = Sequences(self.manifest, batch, capacity)
        self._capacity = 0
        self._caches, self._cache_values, self._calls = {}, {}, {}
        if self.manifest.capacity is not None:
            self._make_room(self._sequences, self.manifest.capacity)

    def prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        sequences = self._started()
        sequences.check_prefill(input_ids, lengths)
        sequences.check_room(input_ids, lengths)
        call = self._call(input_ids.shape[1])
        sequences.fill(call.inputs, input_ids, lengths)
        self._run(call)
        sequences.count(lengths)
        return call.logits

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        sequences = self._started()
        sequences.check_decode(tokens)
        call = self._call(1)
        sequences.fill_decode(call.inputs, tokens)
        self._run(call)
        sequences.count_decode()
        return call.logits

    def close(self) -> None:
        self._session = None
        self._caches, self._cache_values, self._calls = {}, {}, {}

    def end_profile(self) -> Path:
        """Stop the profiler that the engine was opened with, and return its file."""
        if self._session is None:
            raise AssertionError("Bug: a closed runner is used")
        return Path(self._session.end_profiling())

    def _run(self, call: _Call) -> None:
        if self._session is None:
            raise AssertionError("Bug: a closed runner is used")
        self._session.run_with_iobinding(call.binding)

    def _call(self, tokens: int) -> _Call:
        """What is bound for the next call of S = `tokens`, with room in the caches for it."""
        sequences = self._started()
        self._make_room(sequences, sequences.cache_needed(tokens))
        call = self._calls.get(tokens)
        if call is None:
            # One call of decode and one of prefill are kept; prefills of many lengths would keep many buffers.
            self._calls = {length: kept for length, kept in self._calls.items() if length == 1}
            call = self._calls[tokens] = self._bind(sequences.batch, tokens)
        return call

    def _make_room(self, sequences: Sequences, needed: int) -> None:
        """Grow the caches to hold `needed` positions, zero-filled: a NaN there would spread through the mask."""
        if needed <= self._capacity:
            return
        import onnxruntime

        capacity = self.manifest.capacity or -(-needed // CACHE_STEP) * CACHE_STEP
        nbytes = self.manifest.kv_bytes_per_token * capacity * sequences.batch
        available = psutil.virtual_memory().available
        if nbytes > available:
            raise EngineError(
                f"not enough memory for a KV cache of {sequences.batch} x {capacity} tokens",
                expected=f"{nbytes / 2**30:.1f} GiB",
                found=f"{available / 2**30:.1f} GiB",
                hint="run fewer sequences, or shorter ones",
            )
        for slot in self.manifest.cache:
            for name in (slot.key, slot.value):
                shape = (sequences.batch, slot.num_key_value_heads, capacity, slot.head_dim)
                grown = _zeros(shape, self._dtype)
                if self._capacity:
                    grown[:, :, : self._capacity] = self._caches[name]
                self._caches[name] = grown
                self._cache_values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(grown)
        self._capacity = capacity
        self._calls = {}

    def _bind(self, batch: int, tokens: int) -> _Call:
        """Make the buffers of a call with S = `tokens` and bind them, and each cache as both its past and present."""
        import onnxruntime

        if self._session is None:
            raise AssertionError("Bug: a closed runner is used")
        inputs = StepInputs(
            input_ids=np.zeros((batch, tokens), np.int64),
            position_ids=np.zeros((batch, tokens), np.int64),
            cache_write=np.zeros(batch, np.int64),
            logits_index=np.zeros(batch, np.int64),
        )
        logits = np.zeros((batch, self.manifest.vocab_size), np.float32)
        call = _Call(binding=self._session.io_binding(), inputs=inputs, logits=logits)
        for name, buffer in inputs.named().items():
            call.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(buffer))
        call.binding.bind_ortvalue_output(LOGITS, onnxruntime.OrtValue.ortvalue_from_numpy(call.logits))
        for slot in self.manifest.cache:
            for past, present in ((slot.key, slot.present_key), (slot.value, slot.present_value)):
                call.binding.bind_ortvalue_input(past, self._cache_values[past])
                call.binding.bind_ortvalue_output(present, self._cache_values[past])
        return call

    def _started(self) -> Sequences:
        if self._sequences is None:
            raise AssertionError("Bug: a runner is used before it is started")
        return self._sequences


@dataclass(frozen=True, slots=True)
class _Call:
    """Everything bound for calls of one S. ONNX Runtime reads and writes these arrays where they are."""

    binding: Any  # onnxruntime.IOBinding
    inputs: StepInputs
    logits: np.ndarray  # float32 [B, V]


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A zero-filled array that begins at a multiple of BUFFER_ALIGNMENT."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + BUFFER_ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % BUFFER_ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _runnable(contract: NetworkManifest, folder: Manifest, path: Path) -> NetworkVariant:
    """Choose the network for this runtime: its own preset's first, else any that the CPU kernels run."""
    candidates = [variant for variant in contract.networks if variant.dtype in DTYPES]
    if not candidates:
        raise EngineError(
            "ONNX Runtime on CPU cannot run the networks of this folder",
            file=path,
            expected=" or ".join(DTYPES),
            found=", ".join(f"{variant.file}: {variant.dtype}" for variant in contract.networks),
            hint="export a float32 network beside them; it can share their weights",
        )
    variant = min(candidates, key=lambda variant: variant.target != NAME)
    for name in (variant.file, *variant.weight_files):
        if name not in folder.files:
            raise EngineError("the network names a file that is not in its folder", file=path, found=name)
    return variant


def _engine_manifest(
    contract: NetworkManifest,
    variant: NetworkVariant,
    folder: Manifest,
    label: str,
    linears: Sequence[QuantizedLinear],
    here: Environment,
) -> EngineManifest:
    itemsize = BY_NAME[variant.dtype].itemsize
    weight_bytes = sum(folder.files[name].bytes for name in variant.weight_files)
    emulated = is_emulated(variant.number_format, linears, variant.plugins)
    return EngineManifest(
        backend=NAME,
        runtime=here.runtime,
        machine=here.machine,
        label=label,
        network_file=variant.file,
        network_sha256=folder.fingerprint,
        dtype=variant.dtype,
        number_format=executed_format(variant.number_format, emulated=emulated),
        plugins=variant.plugins,
        vocab_size=contract.vocab_size,
        max_positions=variant.max_positions,
        batch=variant.batch,
        capacity=variant.capacity,
        cache=contract.cache,
        kv_bytes_per_token=sum(slot.elements_per_position() * itemsize for slot in contract.cache),
        weight_bytes=weight_bytes,
        structure=contract.structure,
        options=EngineOptions(
            device="cpu",
            emulated=emulated,
            session=_session_config(contract.structure) | session_config(linears),
            network=variant.options,
        ).model_dump(),
    )


def _session_config(structure: Mapping[str, Any]) -> dict[str, str]:
    # Packed weights are private memory beside the mapped file: worth it as long as they fit with room to spare. On the
    # model of benchmarks/compare_decode.py packing makes decode 1.1 times as fast at batch 1 and 1.9 times at batch 4,
    # and opening it takes 0.6 s instead of 0.05 s.
    packed_bytes = 4 * int(structure["num_parameters"])
    prepack = 2 * packed_bytes <= psutil.virtual_memory().total
    return {
        "session.intra_op.spin_duration_us": str(SPIN_US),
        "session.disable_prepacking": "0" if prepack else "1",
    }


def _session(
    manifest: EngineManifest, folder: Path, threads: int | None, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """Load a network and hold its inputs and outputs against the manifest; `profile` begins a profile's file name."""
    import onnxruntime

    path = folder / manifest.network_file
    ours = backend_options(manifest, EngineOptions, path)
    if manifest.dtype not in DTYPES:
        raise EngineError("not a dtype that runs here", file=path, expected=" or ".join(DTYPES), found=manifest.dtype)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: one per physical core
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    for key, value in ours.session.items():
        options.add_session_config_entry(key, value)
    with _runtime_errors("ONNX Runtime does not load the network", path):
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs, outputs = _interface(manifest)
    for expected, found in ((inputs, session.get_inputs()), (outputs, session.get_outputs())):
        # Sizes that are symbolic have names in the file and are None to us.
        actual = {
            tensor.name: (tensor.type, [size if isinstance(size, int) else None for size in tensor.shape])
            for tensor in found
            if tensor.name != NEXT_TOKENS  # of networks for TensorRT; nobody reads it here
        }
        for name in {**expected, **actual}:
            if expected.get(name) != actual.get(name):
                raise EngineError(
                    f"{name}: the network is not what its manifest says",
                    file=path,
                    expected=expected.get(name, "nothing of that name"),
                    found=actual.get(name, "nothing of that name"),
                )
    return session


Tensors = dict[str, tuple[str, list[int | None]]]  # name -> (ONNX type, shape)


def _interface(manifest: EngineManifest) -> tuple[Tensors, Tensors]:
    """The inputs and outputs of the network that a manifest describes; see `exporter.network`."""
    batch, dtype = manifest.batch, {"float32": "tensor(float)", "float16": "tensor(float16)"}[manifest.dtype]
    inputs: Tensors = {name: ("tensor(int64)", [batch, None]) for name in (INPUT_IDS, POSITION_IDS)}
    inputs |= {name: ("tensor(int64)", [batch]) for name in (CACHE_WRITE, LOGITS_INDEX)}
    outputs: Tensors = {LOGITS: ("tensor(float)", [batch, manifest.vocab_size])}
    for slot in manifest.cache:
        cache = dtype, [batch, slot.num_key_value_heads, manifest.capacity, slot.head_dim]
        inputs |= {slot.key: cache, slot.value: cache}
        outputs |= {slot.present_key: cache, slot.present_value: cache}
    return inputs, outputs


def _prove(manifest: EngineManifest, folder: Path, linears: Sequence[QuantizedLinear]) -> None:
    """Run a prefill of two tokens and one decode step of a network that is not yet an engine; see which kernels ran."""
    path = folder / manifest.network_file
    batch = manifest.batch or 1
    tokens = min(2, manifest.max_positions)
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise EngineError(
            "no temporary folder can be written", hint="is its disk full? TMPDIR names another folder"
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        session = _session(manifest, folder, None, profile=Path(temporary, "profile"))
        runner = OnnxRuntimeRunner(manifest, session)
        try:
            with _runtime_errors("ONNX Runtime does not run the network", path):
                runner.start(batch, tokens)
                steps = [runner.prefill(np.zeros((batch, tokens), np.int64), np.full(batch, tokens)).copy()]
                if manifest.max_positions > tokens:
                    steps.append(runner.decode(np.zeros(batch, np.int64)).copy())
        finally:
            runner.close()
            profile = Path(session.end_profiling())
        check_kernels(linears, kernels_from_profile(profile), path)
    if not all(np.isfinite(logits).all() for logits in steps):
        raise EngineError(
            "the network gives logits that are not finite",
            file=path,
            hint="weights with NaN or infinity, or values beyond float16: check the checkpoint, or export float32",
        )


@contextmanager
def _runtime_errors(problem: str, path: Path) -> Iterator[None]:
    """Turn what ONNX Runtime raises into our error; our own errors pass."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
        RuntimeError,  # what a run with bound inputs raises, whatever the problem
        UnicodeDecodeError,  # its message quotes a name of the file that is no text
    )
    try:
        yield
    except FuselageError:
        raise
    except kinds as error:
        raise EngineError(f"{problem} ({str(error)[:300]})", file=path) from error
