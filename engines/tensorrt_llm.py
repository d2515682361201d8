"""TensorRT-LLM 1.1 and 1.2: engines that `trtllm-build` makes and that its C++ executor runs.

Engines of TensorRT-LLM answer whole requests, so `open` has no step-by-step runner to give: `bench` drives them through
a worker of their own, `engines.tensorrt_llm_worker`. Never executed on a GPU: see docs/tensorrt_llm.md.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from engines.base import EngineManifest, Environment, Foreseen, Runner, save_engine
from engines.machine import version_numbers
from engines.programs import run_program
from exporter.errors import EngineError, raise_all
from exporter.graph import ModelGraph
from exporter.safetensors_io import read_json
from exporter.settings import Setting, range_problems
from exporter.writers import trtllm
from exporter.writers.files import (
    FileLink,
    check_folder,
    parent_of,
    refuse_existing,
    space_problems,
)
from exporter.writers.trtllm_config import (
    CHECKPOINT_KIND,
    CONFIG,
    MODEL_FILE,
    CheckpointManifest,
    read_checkpoint_manifest,
)

NAME = "tensorrt-llm"
# 1.1 is the first that gets the cache size of models with dropped attention right; 1.3 drops TensorRT engines.
FROM_VERSION, BELOW_VERSION = (1, 1), (1, 3)
INSTALL = (
    "pip install tensorrt_llm==1.2.1 (Python 3.10 or 3.12, Linux, CUDA 13), "
    "or run in the container nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
)
NEWER = "from 1.3 on it loads Hugging Face folders and builds no engine: use `export --to hf`, see docs/tensorrt_llm.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What an engine is built for."""

    max_batch_size: Annotated[
        int,
        Setting("sequences side by side, where a network leaves it open; 8 if not given.", option="max-batch", least=1),
    ] = 8
    # Prompt and output; at most what the model knows.
    max_seq_len: Annotated[int, Setting("tokens of a sequence; 8192 if not given.", least=1)] = 8192
    # Over all sequences: sizes the activations.
    max_num_tokens: Annotated[int, Setting("tokens of a step; 8192 if not given.", least=1)] = 8192
    low_latency: Annotated[bool, Setting("FP8 GEMMs for few tokens at a time.")] = False
    # None: one per rank, or as many as there are.
    workers: Annotated[
        int | None, Setting("GPUs that build at the same time; all if not given.", least=1, is_of_machine=True)
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """What one rank is expected to take at run time, in bytes; without the runtime's own workspaces."""

    weights: int
    kv_cache: int  # of all sequences at their full length
    activations: int  # estimated from the widest GEMM

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


class TensorRtLlm:
    """The backend; see `engines.base.Backend`."""

    name = NAME

    def __init__(self, settings: BuildSettings | None = None) -> None:
        self.settings = settings or BuildSettings()

    def missing(self) -> list[str]:
        try:
            version = importlib.metadata.version("tensorrt_llm")
        except importlib.metadata.PackageNotFoundError:
            return [f"TensorRT-LLM is not installed: {INSTALL}"]
        if not FROM_VERSION <= version_numbers(version) < BELOW_VERSION:
            way_out = NEWER if version_numbers(version) >= BELOW_VERSION else INSTALL
            return [f"TensorRT-LLM {version} is not one of 1.1 and 1.2, for which checkpoints are written: {way_out}"]
        if shutil.which("trtllm-build") is None:
            return [f"trtllm-build is not on the PATH, though tensorrt_llm {version} is installed: {INSTALL}"]
        if not _gpus():
            return ["no NVIDIA GPU is visible, and engines are built on the kind of GPU that runs them"]
        return []

    def environment(self) -> Environment:
        return Environment(
            runtime={"tensorrt_llm": importlib.metadata.version("tensorrt_llm")},
            machine={"gpu": _gpus()[0]},
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
        """Build the engines of all ranks from a checkpoint folder.

        Raises:
            CheckpointError: the checkpoint folder is incomplete, altered or malformed.
            EngineError: TensorRT-LLM or a GPU is missing, or `trtllm-build` failed.
            OutputError: the output is in the way or cannot be written, or the disk has no room for it.
        """
        raise_all([EngineError(problem) for problem in self.missing()])
        refuse_existing(output, force=force)
        check_folder(network, CHECKPOINT_KIND, hashes=False)
        checkpoint = read_checkpoint_manifest(network)
        _check_settings(self.settings, checkpoint.quant_algo, checkpoint.dtype)
        with parent_of(output) as parent:
            _check_space(checkpoint, parent)
            folder = check_folder(network, CHECKPOINT_KIND, hashes=True)  # reads all of it
            with tempfile.TemporaryDirectory(dir=parent, prefix=f".{output.name}.build-") as built:
                workers = self.settings.workers or min(len(checkpoint.ranks), len(_gpus()))
                settings = replace(self.settings, workers=workers)
                command = build_command(network, Path(built), checkpoint, settings)
                _run(command, build_environment(network, checkpoint))
                manifest = _engine_manifest(
                    checkpoint, folder.fingerprint, label or output.name, settings, command, self.environment()
                )
                files = [(path.name, FileLink(path)) for path in sorted(Path(built).iterdir()) if path.is_file()]
                if checkpoint.model_class is not None:
                    files.append((MODEL_FILE, FileLink(network / MODEL_FILE)))
                return save_engine(output, manifest, files, details=details, force=force)

    def open(self, engine: Path, *, threads: int | None) -> Runner:
        raise EngineError(
            "TensorRT-LLM runs whole requests, not single steps", file=engine, hint="time it with `bench`"
        )


def build_command(
    checkpoint: Path, output: Path, manifest: CheckpointManifest, settings: BuildSettings
) -> tuple[str, ...]:
    """The complete `trtllm-build` command of a checkpoint folder.

    Raises:
        EngineError: the settings do not fit the model.
    """
    _check_settings(settings, manifest.quant_algo, manifest.dtype)
    world_size = manifest.tp_size * manifest.pp_size
    max_seq_len = min(settings.max_seq_len, manifest.max_positions)
    options: dict[str, object] = {
        "checkpoint_dir": checkpoint,
        "output_dir": output,
        "max_batch_size": settings.max_batch_size,
        "max_input_len": max_seq_len,
        "max_seq_len": max_seq_len,  # unset, it would be all positions, and the attention's workspace with it
        "max_num_tokens": settings.max_num_tokens,
        "max_beam_width": 1,
        "kv_cache_type": "paged",
        "workers": settings.workers or world_size,
        **_plugins(checkpoint, manifest, settings),
    }
    if manifest.model_class is not None:
        options |= {"model_cls_file": checkpoint / MODEL_FILE, "model_cls_name": manifest.model_class}
    return ("trtllm-build", *(word for key, value in options.items() for word in (f"--{key}", str(value))))


def build_environment(checkpoint: Path, manifest: CheckpointManifest) -> dict[str, str]:
    """What the build's environment needs beside the caller's: workers import our class by the name of its module.

    What Python would leave beside that module is not in the folder's manifest: the next build would refuse the folder.
    """
    if manifest.model_class is None:
        return {}
    existing = os.environ.get("PYTHONPATH")
    paths = [str(checkpoint.absolute()), *([existing] if existing else [])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def memory_per_gpu(manifest: CheckpointManifest, settings: BuildSettings) -> list[GpuMemory]:
    """What every rank is expected to take at run time.

    Activations: of `max_num_tokens` tokens, the outputs of the widest GEMM and three hidden states, in the network's
    dtype or, where that is larger, 16 bits; and the logits of every sequence in float32.
    """
    tokens = settings.max_num_tokens
    hidden_size = manifest.structure["hidden_size"]
    cached = settings.max_batch_size * min(settings.max_seq_len, manifest.max_positions)
    itemsize = 4 if manifest.dtype == "float32" else 2
    return [
        GpuMemory(
            weights=rank.weight_bytes,
            kv_cache=cached * rank.kv_bytes_per_token,
            activations=itemsize * tokens * (rank.widest_gemm + 3 * hidden_size)
            + 4 * settings.max_batch_size * manifest.vocab_size,
        )
        for rank in manifest.ranks
    ]


def foresee(graph: ModelGraph, network: trtllm.Options, settings: BuildSettings) -> Foreseen:
    """What engines of a graph will be like.

    Raises:
        EngineError: there can be none with these settings.
    """
    dtype = trtllm.network_dtype(graph, network).name
    _check_settings(settings, trtllm.quant_algo(graph), dtype)
    return Foreseen(
        dtype=dtype,
        max_positions=min(settings.max_seq_len, graph.max_position_embeddings),
        max_batch=settings.max_batch_size,
    )


def describe_build(checkpoint: Path, output: Path, settings: BuildSettings) -> str:
    """What `build` would do, as text: the command and the memory of every GPU. Needs no TensorRT-LLM.

    Raises:
        CheckpointError: not a checkpoint folder, or one that is incomplete.
    """
    check_folder(checkpoint, CHECKPOINT_KIND, hashes=False)
    manifest = read_checkpoint_manifest(checkpoint)
    command = build_command(checkpoint, output, manifest, settings)
    environment = [f"{name}={shlex.quote(value)}" for name, value in build_environment(checkpoint, manifest).items()]
    lines = [" ".join([*environment, shlex.join(command)]), ""]
    lines.append(
        f"expected at run time: {settings.max_batch_size} sequences, {settings.max_num_tokens:,} tokens a step"
    )
    lines.append("  rank   weights  KV cache  activations     total  (GiB)")
    for number, memory in enumerate(memory_per_gpu(manifest, settings)):
        figures = (memory.weights, memory.kv_cache, memory.activations, memory.total)
        weights, kv_cache, activations, total = (f"{figure / 2**30:.2f}" for figure in figures)
        lines.append(f"  {number:4}  {weights:>8}  {kv_cache:>8}  {activations:>11}  {total:>8}")
    return "\n".join(lines)


def _check_settings(settings: BuildSettings, quant_algo: str | None, dtype: str) -> None:
    raise_all(list(range_problems(settings, EngineError)))
    if settings.low_latency and quant_algo != "FP8":
        raise EngineError("the low-latency GEMM plugin is for FP8", expected="FP8", found=quant_algo or dtype)


def _check_space(manifest: CheckpointManifest, folder: Path) -> None:
    """Engines are about as large as their weights."""
    raise_all(list(space_problems(folder, sum(rank.weight_bytes for rank in manifest.ranks), of="the engines")))


def _plugins(checkpoint: Path, manifest: CheckpointManifest, settings: BuildSettings) -> dict[str, object]:
    """Plugins and kernels of a format on Hopper. Those of quantization are switched on by the build itself."""
    kv, is_fp8 = manifest.kv_cache_quant_algo, manifest.quant_algo == "FP8"
    # FP8 attention rounds its output with the scale of `dense`, which every layer must then have.
    fp8_attention = is_fp8 and kv == "FP8" and not _leaves_out(checkpoint, "attention")
    # Other attention over a paged context has no kernels for quantized caches; the build would switch it off silently.
    options: dict[str, object] = {"use_paged_context_fmha": _switch(fp8_attention or kv is None)}
    if not is_fp8:
        return {"gemm_plugin": "auto", **options}
    options["use_fp8_context_fmha"] = _switch(fp8_attention)
    if settings.low_latency:
        return {"low_latency_gemm_plugin": "fp8", **options}
    options = {"gemm_plugin": "fp8", **options}
    if not _leaves_out(checkpoint, "ffn"):  # gate, up and SwiGLU as one kernel, which every FFN has to take
        options["gemm_swiglu_plugin"] = "fp8"
    return options


def _switch(on: bool) -> str:
    return "enable" if on else "disable"


def _leaves_out(checkpoint: Path, sublayer: str) -> bool:
    """Whether linears of some attention or FFN are left as they are; plugin flags hold for the whole model."""
    excluded = read_json(checkpoint / CONFIG)["quantization"].get("exclude_modules") or []
    return any(f".{sublayer}" in pattern for pattern in excluded)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run `trtllm-build`; what it prints goes to stderr as it comes."""
    try:
        status = run_program(command, env={**os.environ, **environment}, stdout=sys.stderr).returncode
    except OSError as error:
        raise EngineError(f"{command[0]} does not start: {error.strerror}") from error
    if status:
        raise EngineError(f"{command[0]} failed with status {status}", hint="its last lines say why")


def _engine_manifest(
    checkpoint: CheckpointManifest,
    fingerprint: str,
    label: str,
    settings: BuildSettings,
    command: Sequence[str],
    here: Environment,
) -> EngineManifest:
    return EngineManifest(
        backend=NAME,
        runtime=here.runtime,
        machine=here.machine,
        label=label,
        network_file=CONFIG,
        network_sha256=fingerprint,
        dtype=checkpoint.dtype,
        number_format=checkpoint.quant_algo,
        vocab_size=checkpoint.vocab_size,
        max_positions=min(settings.max_seq_len, checkpoint.max_positions),
        capacity=None,
        cache=(),  # the runtime allocates and binds it
        kv_bytes_per_token=sum(rank.kv_bytes_per_token for rank in checkpoint.ranks),
        weight_bytes=sum(rank.weight_bytes for rank in checkpoint.ranks),
        structure=checkpoint.structure,
        options={
            "device": here.machine["gpu"],
            "world_size": len(checkpoint.ranks),
            "max_batch_size": settings.max_batch_size,
            "kv_cache": checkpoint.kv_cache_quant_algo or checkpoint.dtype,
            "command": list(command),
        },
    )


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
