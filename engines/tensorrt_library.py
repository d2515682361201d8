"""The TensorRT library of this machine: whether it is there, which version it is, what it logs; and its GPU.

Python bindings from 10.15 on (the first with the KV-cache layer) to 11.x: the names used here are the same in all of
them. Nothing is imported before a function asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from engines.machine import version_numbers
from exporter.errors import EngineError

FROM_VERSION, BELOW_VERSION = (10, 15), (12,)
INSTALL = "pip install 'tensorrt-cu13>=10.15,<12' (Linux, an NVIDIA driver for CUDA 13)"
SHOWN_ERRORS = 4  # of the log: the first, and the last, which says what came of all the tactics that failed before it


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that builds and runs."""

    name: str
    compute_capability: tuple[int, int]  # e.g. (9, 0)
    free_bytes: int

    @property
    def capability(self) -> str:
        """The compute capability as manifests spell it, e.g. "9.0"."""
        return ".".join(map(str, self.compute_capability))


def load() -> ModuleType:
    """Import TensorRT.

    Raises:
        ImportError, OSError: not installed, or its shared libraries are not found.
    """
    import tensorrt

    return tensorrt


def version() -> str | None:
    """Return the version of the installed TensorRT; None: it cannot be imported."""
    try:
        return load().__version__
    except (ImportError, OSError):
        return None


def missing() -> list[str]:
    """Say what this machine lacks to build and run, one sentence each."""
    problems = []
    try:
        found = load().__version__
    except (ImportError, OSError) as error:  # without its shared libraries either of them
        problems.append(f"TensorRT cannot be imported ({error}): {INSTALL}")
    else:
        if not FROM_VERSION <= version_numbers(found) < BELOW_VERSION:
            problems.append(f"TensorRT {found} is not one of 10.15 to 11, for which networks are written: {INSTALL}")
    if gpu() is None:
        problems.append(
            "PyTorch sees no NVIDIA GPU, and engines are built on the kind of GPU that runs them: check nvidia-smi, "
            "and that PyTorch is a build with CUDA (torch.version.cuda)"
        )
    return problems


def gpu() -> Gpu | None:
    """Describe the current GPU; None: there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return Gpu(
        name=torch.cuda.get_device_name(),
        compute_capability=torch.cuda.get_device_capability(),
        free_bytes=torch.cuda.mem_get_info()[0],
    )


def make_logger(trt: Any) -> Any:
    """Make a `trt.ILogger` that passes warnings and errors on to stderr and keeps the errors, in `errors`."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants the base's own, not super()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.WARNING):
                print(f"TensorRT: {msg}", file=sys.stderr)
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(msg)

    return Logger()


def start(make: Callable[[Any], Any], logger: Any) -> Any:
    """Make a `trt.Builder` or a `trt.Runtime`: the first call that needs the driver.

    Raises:
        EngineError: TensorRT gives none.
    """
    try:
        return make(logger)
    except TypeError as error:  # what pybind11 makes of a null pointer
        hint = "often the driver is older than the CUDA version that TensorRT was made for: see nvidia-smi"
        raise failure(logger, "TensorRT does not start", hint=hint) from error


def failure(logger: Any, problem: str, *, file: object = None, hint: str | None = None) -> EngineError:
    """Make an error of what TensorRT logged last."""
    return EngineError(problem, file=file, found=said(logger) or None, hint=hint)


def said(logger: Any) -> str:
    """Return the errors that TensorRT logged since it was asked last, or the first and the last of many."""
    errors = list(logger.errors)
    logger.errors.clear()
    return "; ".join(errors if len(errors) <= SHOWN_ERRORS else [*errors[: SHOWN_ERRORS - 1], errors[-1]])
