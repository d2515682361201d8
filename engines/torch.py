"""PyTorch: an engine is a Hugging Face folder, run with a static KV cache and, on a GPU, decode as a CUDA graph.

It needs nothing but PyTorch, so that variants of a model can be timed against each other on any NVIDIA GPU; on a CPU
the same code runs without graphs. The engine folder holds the model's files beside its manifest, and is itself a
model folder.
"""

from __future__ import annotations

import hashlib
import json
import os.path
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import psutil

from engines.base import (
    ENGINE_KIND,
    EngineManifest,
    Environment,
    Foreseen,
    Runner,
    backend_options,
    read_engine_manifest,
    save_engine,
)
from engines.machine import cpu_name
from engines.sequences import Sequences
from exporter.dtypes import BFLOAT16, BY_NAME, FLOAT8_E4M3FN, FLOAT16, FLOAT32, DType
from exporter.errors import EngineError, FuselageError, raise_all
from exporter.graph import CODES, FFN, ModelGraph, linear_names, linears, structure, weights
from exporter.network import NETWORK_FILE
from exporter.pipeline import refuse_overlap, source_fingerprint
from exporter.read import CONFIG, HF_QUANT_CONFIG, Checkpoint, open_model
from exporter.safetensors_io import checkpoint_files, path_inside
from exporter.settings import Setting
from exporter.structure import Sealed
from exporter.wide_ffn import wide_ffn_problems
from exporter.writers.files import FileCopy, FileLink, check_folder, read_manifest, refuse_existing

if TYPE_CHECKING:
    import torch

    from engines.torch_model import StaticCache, TorchModel

NAME = "torch"
WIDE_FFN = "wide_ffn"  # the plugin's name
PLUGINS = (WIDE_FFN,)
DTYPES = (BFLOAT16, FLOAT16, FLOAT32)
Device = Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """How an engine runs."""

    device: Annotated[Device, Setting("where it is to run; cuda if not given.", choices=get_args(Device))] = "cuda"
    dtype: Annotated[
        DType | None, Setting("of activations and KV cache; the model's if not given.", choices=DTYPES)
    ] = None
    plugins: Annotated[
        tuple[str, ...], Setting(f"custom ops in place of standard ones; {WIDE_FFN} is the only one.")
    ] = ()
    capacity: Annotated[int | None, Setting("tokens of a fixed KV cache; by request if not given.", least=1)] = None


class EngineOptions(Sealed):
    """What this backend keeps in `EngineManifest.options`."""

    device: Device
    emulated: bool  # whether a number format is imitated, so that timings say nothing about it


class Torch:
    """The backend; see `engines.base.Backend`."""

    name = NAME

    def __init__(self, settings: BuildSettings | None = None) -> None:
        self.settings = settings or BuildSettings()

    def missing(self) -> list[str]:
        try:
            import torch
        except ImportError:
            return ["PyTorch is not installed: pip install 'torch>=2.8'"]
        if self.settings.device == "cuda" and not torch.cuda.is_available():
            return ["PyTorch sees no GPU to run the engine on: choose the device cpu, or another machine"]
        return []

    def environment(self) -> Environment:
        import torch

        machine = {"cpu": cpu_name(), "arch": platform.machine()}
        if self.settings.device == "cuda" and torch.cuda.is_available():  # no GPU is needed for the build
            machine["gpu"] = torch.cuda.get_device_name()
        return Environment(runtime={NAME: torch.__version__}, machine=machine)

    def build(
        self,
        network: Path,
        output: Path,
        *,
        label: str | None,
        force: bool,
        details: Mapping[str, Any] | None = None,
    ) -> Path:
        """Make an engine folder of a model folder, `network`. No GPU is needed for it.

        Weights of a folder that we wrote get a second name there, where the file system allows; the rest is copied.

        Raises:
            CheckpointError: the model folder is incomplete, altered or malformed.
            EngineError: the settings do not fit the model, or the folder is a network and not a model.
            OutputError: the output is in the way or cannot be written.
        """
        refuse_existing(output, force=force)
        refuse_overlap(network, output)
        if os.path.lexists(network / NETWORK_FILE):
            raise EngineError(
                "the torch backend runs model folders, and this is a network definition",
                file=network,
                hint="give the Hugging Face folder that it was exported from",
            )
        checkpoint = open_model(network, need_weights=True)
        manifest = _engine_manifest(checkpoint, self.settings, label or output.name, self.environment())
        written = read_manifest(network)
        # Beside weights lie texts that people do edit in their model.
        ours = {network / name for name in written.files if name.endswith(".safetensors")} if written else set()
        files = [
            (name, FileLink(path) if path in ours else FileCopy(path))
            for name, path in _model_files(checkpoint).items()
        ]
        return save_engine(output, manifest, files, details=details, force=force)

    def open(self, engine: Path, *, threads: int | None) -> TorchRunner:
        import torch

        check_folder(engine, ENGINE_KIND, hashes=True)
        manifest = read_engine_manifest(engine)
        if manifest.backend != NAME:
            raise EngineError("engine of another backend", file=engine, expected=NAME, found=manifest.backend)
        options = backend_options(manifest, EngineOptions, engine)
        if not set(manifest.plugins) <= set(PLUGINS):
            raise EngineError("no such plugin", file=engine, expected=", ".join(PLUGINS), found=manifest.plugins)
        if manifest.dtype not in {dtype.name for dtype in DTYPES}:
            raise EngineError("not a dtype that runs here", file=engine, expected=_names(DTYPES), found=manifest.dtype)
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                "the engine runs on a GPU, and PyTorch sees none", file=engine, hint="build it with --device cpu"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        graph = open_model(engine, need_weights=True).graph
        _refuse_beyond(device, _bytes_on_device(graph, BY_NAME[manifest.dtype]), "the model's weights", engine)
        if device.type == "cuda":  # what reports call the device is its name
            manifest = manifest.model_copy(
                update={"options": {**manifest.options, "device": torch.cuda.get_device_name(device)}}
            )
        return TorchRunner(manifest, _model(graph, device, manifest.dtype, WIDE_FFN in manifest.plugins))


class TorchRunner(Runner):
    """An opened engine; see `engines.base.Runner`. Cache and recorded decode are kept while starts ask for the same."""

    def __init__(self, manifest: EngineManifest, model: TorchModel) -> None:
        self.manifest = manifest
        self._model: TorchModel | None = model
        self._sequences: Sequences | None = None
        self._room: _Room | None = None

    def start(self, batch: int, capacity: int) -> None:
        import torch

        if self._model is None:
            raise AssertionError("Bug: a closed runner is used")
        self._sequences = None
        sequences = Sequences(self.manifest, batch, capacity)
        wanted = batch, self.manifest.capacity or max(1, capacity)
        if self._room is None or (self._room.batch, self._room.cache.capacity) != wanted:
            self._room = None  # the old cache goes before the new one comes, and from PyTorch back to the GPU
            torch.cuda.empty_cache()
            self._room = _Room(self._model, *wanted, self.manifest)
        else:
            self._room.clear()
        self._sequences = sequences

    def prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._on_host(self._prefill(input_ids, lengths))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self._on_host(self._decode(tokens))

    def prefill_greedy(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return _most_likely(self._prefill(input_ids, lengths))

    def decode_greedy(self, tokens: np.ndarray) -> np.ndarray:
        return _most_likely(self._decode(tokens))

    def close(self) -> None:
        self._room = self._model = self._sequences = None

    def _prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """Logits on the device, float32 [B, V]."""
        import torch

        sequences, room = self._started()
        sequences.check_prefill(input_ids, lengths)
        sequences.check_room(input_ids, lengths)
        self._check_cache(int((sequences.filled + lengths).max()))
        filled, columns = sequences.filled, np.arange(input_ids.shape[1])
        positions = np.where(columns < lengths[:, None], filled[:, None] + columns, room.cache.capacity)
        rows = np.arange(room.batch) * len(columns) + np.maximum(lengths - 1, 0)
        device = room.model.device
        logits = room.model.step(
            torch.from_numpy(input_ids).to(device),
            torch.from_numpy(positions).to(device),
            torch.from_numpy(rows).to(device),
            room.cache,
            fresh=not filled.any(),
        )
        sequences.count(lengths)
        return logits

    def _decode(self, tokens: np.ndarray) -> torch.Tensor:
        """Logits on the device, float32 [B, V], valid until the next call."""
        import torch

        sequences, room = self._started()
        sequences.check_decode(tokens)
        self._check_cache(sequences.longest + 1)
        room.decode.tokens.copy_(torch.from_numpy(tokens))
        room.decode.positions.copy_(torch.from_numpy(sequences.filled))
        logits = room.decode()
        sequences.count_decode()
        return logits

    def _on_host(self, logits: torch.Tensor) -> np.ndarray:
        """Wait for logits; valid until the next call."""
        _, room = self._started()
        return room.logits.copy_(logits).numpy()

    def _started(self) -> tuple[Sequences, _Room]:
        if self._sequences is None or self._room is None:
            raise AssertionError("Bug: a step without a start")
        return self._sequences, self._room

    def _check_cache(self, longest: int) -> None:
        _, room = self._started()
        if longest > room.cache.capacity:
            raise EngineError(
                "the KV cache is full",
                expected=f"at most {room.cache.capacity} tokens",
                found=longest,
                hint="start with a larger capacity",
            )


class _Room:
    """Everything that depends on batch and capacity."""

    def __init__(self, model: TorchModel, batch: int, capacity: int, manifest: EngineManifest) -> None:
        import torch

        from engines.torch_model import DecodeStep

        nbytes = manifest.kv_bytes_per_token * capacity * batch
        _refuse_beyond(model.device, nbytes, f"a KV cache of {batch} x {capacity} tokens")
        self.model = model
        self.batch = batch
        self.cache: StaticCache = model.new_cache(batch, capacity)
        self.decode = DecodeStep(model, self.cache, batch)
        self.logits = torch.empty((batch, manifest.vocab_size), pin_memory=model.device.type == "cuda")

    def clear(self) -> None:
        """Zero the cache: a NaN that earlier sequences left there would spread through the mask."""
        import torch

        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.zero_()
        if self.model.device.type == "cuda":  # else the time of the request that follows has the clearing in it
            torch.cuda.synchronize(self.model.device)


def _most_likely(logits: torch.Tensor) -> np.ndarray:
    """Wait for the most likely tokens, int64 [B], chosen where the logits are: V floats a row stay there."""
    return logits.argmax(dim=-1).cpu().numpy()


def foresee(graph: ModelGraph, network: None, settings: BuildSettings) -> Foreseen:
    """What the engine of a graph will be like.

    Raises:
        EngineError: there can be none with these settings.
    """
    dtype = settings.dtype or graph.dtype
    raise_all(list(_problems(graph, dtype, settings)))
    positions = settings.capacity or graph.max_position_embeddings
    return Foreseen(dtype=dtype.name, max_positions=positions, plugins=settings.plugins)


def _model(graph: ModelGraph, device: Any, dtype: str, wide_ffn: bool) -> TorchModel:
    import torch

    from engines.torch_model import TorchModel

    if wide_ffn:
        import plugins.wide_ffn.op  # noqa: F401  registers torch.ops.fuselage.wide_ffn
    return TorchModel(graph, device=device, dtype=getattr(torch, BY_NAME[dtype].torch), wide_ffn=wide_ffn)


def _bytes_on_device(graph: ModelGraph, dtype: DType) -> int:
    """What the weights of a graph take, scales aside: codes are one byte each, everything else is in `dtype`."""
    return sum(
        tensor.size * (1 if tensor.dtype in CODES else dtype.itemsize) for tensor in weights(graph, scales=False)
    )


def _refuse_beyond(device: Any, nbytes: int, what: str, file: Path | None = None) -> None:
    """Raise EngineError if the device has no room for so much more."""
    import torch

    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if nbytes > available:
        raise EngineError(
            f"not enough memory for {what}",
            file=file,
            expected=f"{nbytes / 2**30:.1f} GiB",
            found=f"{available / 2**30:.1f} GiB",
        )


def _engine_manifest(checkpoint: Checkpoint, settings: BuildSettings, label: str, here: Environment) -> EngineManifest:
    from exporter.writers.onnx_quantization import number_format

    graph = checkpoint.graph
    dtype = settings.dtype or graph.dtype
    raise_all(list(_problems(graph, dtype, settings)))
    source = json.dumps(source_fingerprint(checkpoint.path), sort_keys=True)
    return EngineManifest(
        backend=NAME,
        runtime=here.runtime,
        machine=here.machine,
        label=label,
        network_file=CONFIG,
        network_sha256=hashlib.sha256(source.encode()).hexdigest(),
        dtype=dtype.name,
        number_format=number_format(graph),
        plugins=settings.plugins,
        vocab_size=graph.vocab_size,
        max_positions=settings.capacity or graph.max_position_embeddings,
        capacity=settings.capacity,
        cache=(),  # the runner's own affair
        kv_bytes_per_token=graph.kv_bytes_per_token(dtype),
        weight_bytes=graph.weight_bytes,
        structure=structure(graph),
        options=EngineOptions(device=settings.device, emulated=_is_emulated(graph, settings)).model_dump(mode="json"),
    )


def _problems(graph: ModelGraph, dtype: DType, settings: BuildSettings) -> Iterator[FuselageError]:
    import torch

    from engines.torch_linear import can_scale_rows, has_scales_of_rows, linear_problems

    if dtype not in DTYPES:
        yield EngineError("not a dtype of activations", expected=_names(DTYPES), found=dtype)
    if settings.capacity is not None and not 1 <= settings.capacity <= graph.max_position_embeddings:
        yield EngineError(
            "the KV cache holds no more tokens than the model knows positions",
            expected=f"a capacity of 1 to {graph.max_position_embeddings}",
            found=settings.capacity,
        )
    for plugin in settings.plugins:
        if plugin not in PLUGINS:
            yield EngineError("no such plugin", expected=", ".join(PLUGINS), found=plugin)
    if WIDE_FFN in settings.plugins:
        if dtype != BFLOAT16:
            yield EngineError(
                "the wide-FFN op computes in bfloat16",
                expected=BFLOAT16,
                found=dtype,
                hint="build the engine with --dtype bfloat16",
            )
        yield from wide_ffn_problems(graph)
    if settings.device == "cuda":
        in_op = {id(linear) for linear in _ffn_linears(graph)} if WIDE_FFN in settings.plugins else set()
        for name, linear in linear_names(graph).items():
            if id(linear) not in in_op:
                yield from linear_problems(name, linear, dtype)
    elif any(map(has_scales_of_rows, linear_names(graph).values())) and not can_scale_rows(torch.device("cpu")):
        yield EngineError(
            f"PyTorch {torch.__version__} multiplies no FP8 matrices with a scale per row on a CPU",
            hint="upgrade PyTorch, 2.13 does",
        )


def _ffn_linears(graph: ModelGraph) -> Iterator[Any]:
    for block in graph.flat_blocks:
        if isinstance(block.ffn, FFN):
            yield from linears(block.ffn).values()


def _is_emulated(graph: ModelGraph, settings: BuildSettings) -> bool:
    """FP8 on a CPU, the plugin's reference over codes, and caches that hold rounded values and not their codes."""
    formats = {linear.weight.dtype for linear in linear_names(graph).values()} & set(CODES)
    imitated = FLOAT8_E4M3FN in formats or (bool(formats) and bool(settings.plugins))
    return (settings.device == "cpu" and imitated) or any(a.kv_quantization is not None for _, a in graph.attentions)


def _model_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files of a model folder that belong to the model, by relative path."""
    folder = checkpoint.path
    names = [CONFIG, *checkpoint_files(folder)]
    if os.path.lexists(folder / HF_QUANT_CONFIG):
        names.append(HF_QUANT_CONFIG)
    return {name: path_inside(folder, name) for name in names} | dict(checkpoint.assets)


def _names(dtypes: tuple[DType, ...]) -> str:
    return ", ".join(dtype.name for dtype in dtypes)
