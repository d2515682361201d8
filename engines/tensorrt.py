"""TensorRT >= 10.15: engines from ONNX networks, and their folders.

The build is `tensorrt_build`, the runner `tensorrt_runner`. Never executed on a GPU: see docs/tensorrt.md.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from engines import tensorrt_library as library
from engines.base import (
    ENGINE_FILE,
    ENGINE_KIND,
    BuildProgress,
    EngineManifest,
    Environment,
    read_engine_manifest,
    save_engine,
)
from engines.machine import version_numbers
from engines.tensorrt_build import BuildPlan, BuildSettings, build_engine, describe, fit_problems, plan_build
from engines.tensorrt_engine import EngineOptions, engine_options
from engines.tensorrt_library import Gpu
from engines.tensorrt_runner import CudaDevice, TensorRtRunner
from exporter.errors import EngineError, IncompleteError, raise_all
from exporter.network import NETWORK_KIND
from exporter.writers.files import FileLink, check_folder, parent_of, refuse_existing

NAME = "tensorrt"
PLAN_FILE = "engine.plan"


class TensorRt:
    """The backend; see `engines.base.Backend`."""

    name = NAME

    def __init__(self, settings: BuildSettings | None = None, progress: BuildProgress | None = None) -> None:
        self.settings = settings or BuildSettings()
        self._progress = progress

    def missing(self) -> list[str]:
        return library.missing()

    def environment(self) -> Environment:
        return Environment(
            runtime={NAME: library.load().__version__},
            machine={"gpu": _gpu().name, "arch": platform.machine()},
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
        """Build an engine, and prove it by a prefill and two decode steps that give finite logits.

        Raises:
            CheckpointError: the network folder is incomplete, altered or malformed.
            TargetError: the network breaks a rule of TensorRT's importer.
            EngineError: TensorRT or a GPU is missing, the build is not expected to fit, or TensorRT refuses something.
            OutputError: the output is in the way or cannot be written.
            IncompleteError: the engine is there, but the timing cache could not be extended.
        """
        raise_all([EngineError(problem) for problem in self.missing()])
        refuse_existing(output, force=force)
        here = _gpu()
        plan = plan_build(network, self.settings)
        raise_all(fit_problems(plan, here, psutil.virtual_memory().available))
        trt = library.load()
        _check_import(plan, trt.__version__)
        check_folder(network, NETWORK_KIND, hashes=True)  # reads all weights, so everything quick comes before
        with (
            parent_of(output) as parent,
            tempfile.TemporaryDirectory(dir=parent, prefix=f".{output.name}.build-") as folder,
        ):
            built = Path(folder, PLAN_FILE)
            timing_cache, lost_timings = build_engine(trt, plan, built, self._progress)
            options = _options(plan, here, trt.__version__, timing_cache)
            manifest = _engine_manifest(plan, options, label or output.name, self.environment())
            _prove(trt, manifest, options, built)
            save_engine(output, manifest, [(PLAN_FILE, FileLink(built))], details=details, force=force)
        if lost_timings is not None:
            raise IncompleteError(
                f"the engine is built, but its timings are not in the cache: {lost_timings}", file=output
            ) from lost_timings
        return output

    def open(self, engine: Path, *, threads: int | None) -> TensorRtRunner:
        """See `engines.base.Backend`; `threads` are the CPU's and of no use here."""
        raise_all([EngineError(problem) for problem in self.missing()])
        folder = check_folder(engine, ENGINE_KIND, hashes=True)
        manifest = read_engine_manifest(engine)
        if manifest.backend != NAME:
            raise EngineError("engine of another backend", file=engine, expected=NAME, found=manifest.backend)
        if manifest.network_file not in folder.files:
            raise EngineError("the engine's file is not in its folder", file=engine, found=manifest.network_file)
        options = engine_options(manifest, engine / ENGINE_FILE)
        trt, here = library.load(), _gpu()
        raise_all(machine_problems(options, trt.__version__, here, engine))
        manifest = manifest.model_copy(update={"options": {**manifest.options, "device": here.name}})
        return TensorRtRunner(trt, manifest, options, engine / manifest.network_file, CudaDevice())


def describe_build(network: Path, output: Path, settings: BuildSettings) -> str:
    """What `build` would do, as text, and what it would fail for on this machine. Needs neither TensorRT nor a GPU.

    Raises:
        CheckpointError: not a network folder, or one that is incomplete.
        TargetError: the network breaks a rule of TensorRT's importer.
        EngineError: the settings do not fit the network.
    """
    plan = plan_build(network, settings)
    here, available, missing = library.gpu(), psutil.virtual_memory().available, library.missing()
    problems = [*missing, *map(str, fit_problems(plan, here, available))]
    lines = [
        describe(plan, output, here, available),
        f"import rules   {_check_import(plan, library.version())}",
        *(f"not here: {problem}" for problem in problems),
    ]
    return "\n".join(lines)


def _check_import(plan: BuildPlan, version: str | None) -> str:
    """Hold a plan's network against what is known of TensorRT's importer, which no weight is read for; in words.

    Args:
        version: of the TensorRT that is to build; None: the newest whose rules are known.

    Raises:
        TargetError: a rule is broken; TensorRT would say so after it has read all weights, or later, or never.
    """
    from exporter.writers.onnx_plugins import plugin_ops  # imports onnx_ir
    from exporter.writers.onnx_tensorrt_rules import refuse_violations, rules_for, version_text

    known = rules_for(None if version is None else version_numbers(version))
    plugins = plugin_ops(plan.variant.plugins)
    warnings = refuse_violations({plan.variant.file: plan.network_file}, known, plugins=plugins)
    kept = f"those of TensorRT {version_text(known)} are kept"
    return f"{kept}; {len(warnings)} warnings, see `check`" if warnings else kept


def machine_problems(options: EngineOptions, version: str, here: Gpu, engine: Path) -> list[EngineError]:
    """Return why an engine cannot run on this machine: engines belong to a version of TensorRT and a kind of GPU.

    A lean engine runs in its own and in later versions of one major version.
    """
    problems = []
    built, found = version_numbers(options.tensorrt), version_numbers(version)
    fits = built[:1] == found[:1] and built <= found if options.lean else built == found
    if not fits:
        problems.append(
            EngineError(
                "the engine was built by another version of TensorRT",
                file=engine,
                expected=f"{options.tensorrt}{' or a later one of this major version' if options.lean else ''}",
                found=version,
                hint="build it again, or with --lean for later versions" if not options.lean else "build it again",
            )
        )
    if options.compute_capability != here.capability or options.gpu != here.name:
        problems.append(
            EngineError(
                "the engine was built on another kind of GPU",
                file=engine,
                expected=f"{options.gpu} ({options.compute_capability})",
                found=f"{here.name} ({here.capability})",
                hint="build it on the kind of GPU that runs it",
            )
        )
    return problems


def _gpu() -> Gpu:
    found = library.gpu()
    if found is None:
        raise AssertionError("Bug: `missing` found a GPU")
    return found


def _options(plan: BuildPlan, here: Gpu, version: str, timing_cache: Any) -> EngineOptions:
    settings = plan.settings
    return EngineOptions(
        gpu=here.name,
        compute_capability=here.capability,
        tensorrt=version,
        profiles=plan.profiles,
        builder_optimization_level=settings.builder_optimization_level,
        timing_cache=timing_cache,
        lean=settings.lean,
        weight_streaming=settings.weight_streaming,
        weight_streaming_budget=settings.weight_streaming_budget,
        decomposable_attention=settings.decomposable_attention,
        detailed=settings.detailed,
        network=plan.variant.options,
    )


def _engine_manifest(plan: BuildPlan, options: EngineOptions, label: str, here: Environment) -> EngineManifest:
    contract, variant = plan.contract, plan.variant
    return EngineManifest(
        backend=NAME,
        runtime=here.runtime,
        machine=here.machine,
        label=label,
        network_file=PLAN_FILE,
        network_sha256=plan.fingerprint,
        dtype=variant.dtype,
        number_format=variant.number_format,
        plugins=variant.plugins,
        vocab_size=contract.vocab_size,
        max_positions=variant.max_positions,
        batch=variant.batch,
        capacity=plan.capacity,
        cache=contract.cache,
        kv_bytes_per_token=plan.kv_bytes_per_token,
        weight_bytes=plan.weight_bytes,
        structure=contract.structure,
        options=options.model_dump(mode="json"),
    )


def _prove(trt: Any, manifest: EngineManifest, options: EngineOptions, file: Path) -> None:
    """Run a prefill of two tokens and decode steps, of which the second is a CUDA graph where there are any."""
    runner = TensorRtRunner(trt, manifest, options, file, CudaDevice())
    try:
        batch = manifest.batch or 1
        tokens = min(2, manifest.max_positions)
        runner.start(batch, tokens)
        steps = [runner.prefill(np.zeros((batch, tokens), np.int64), np.full(batch, tokens)).copy()]
        for _ in range(min(2, manifest.max_positions - tokens)):
            steps.append(runner.decode(np.zeros(batch, np.int64)).copy())
    finally:
        runner.close()
    if not all(np.isfinite(logits).all() for logits in steps):
        raise EngineError(
            "the engine gives logits that are not finite",
            file=file,
            hint="weights with NaN or infinity, or values beyond float16: check the checkpoint, or export bfloat16",
        )
