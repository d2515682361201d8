"""The C++ benchmark program of `engines/cpp`: built on first use, kept in a cache, driven like any other worker.

It times requests with no Python in the loop and speaks the lines of `engines.worker`. TensorRT engines need its headers
at build time: TENSORRT_INCLUDE_DIR names the folder of NvInferRuntime.h, CUDA_INCLUDE_DIR that of cuda_runtime_api.h.
The cache is the folder FUSELAGE_CACHE, else `fuselage` in the user's cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from engines.base import ENGINE_KIND, EngineManifest
from engines.bench import WorkerCommand, python_worker
from engines.programs import run_program
from engines.worker import cpu_options
from exporter.errors import EngineError, raise_all
from exporter.writers.files import NO_LOCKS, check_folder

SOURCES = Path(__file__).parent / "cpp"
PROGRAM = "fuselage-bench"
SERVED = ("onnxruntime", "tensorrt")  # backends that it opens; the others keep their own workers
CUDA_INCLUDE_DIR = "/usr/local/cuda/include"  # if none is named, as in CMakeLists.txt
SHOWN_LINES = 20  # of what a failed build printed
CUDA_HINT = "set CUDA_INCLUDE_DIR to the folder of cuda_runtime_api.h"
HINT = "use --runtime python (in a recipe: `runtime: auto`) to time with the Python program"

Runtime = Literal["cpp", "python", "auto"]  # auto: C++ where it can be built, else Python
Tell = Callable[[str], None]


def worker_for(runtime: Runtime, tell: Tell) -> WorkerCommand:
    """Return what `bench_engines` starts to serve an engine.

    Args:
        runtime: the program that is to take the samples.
        tell: called with a sentence when the program is built, and when `auto` falls back to Python.

    Raises:
        EngineError: only when called with an engine: the program cannot be built, or the engine was altered.
    """

    @functools.cache  # one decision, and one notice, for all engines of a backend
    def program_for(backend: str) -> Path | None:
        if runtime == "python" or backend not in SERVED:
            return None
        try:
            raise_all(missing_problems(backend))
            return built_program(tell)
        except EngineError as error:
            if runtime == "cpp":
                raise
            tell(f"timed with the Python program: {error.problem}")
            return None

    def command(
        engine: Path, manifest: EngineManifest, threads: int | None, cpus: Sequence[int] | None
    ) -> Sequence[str]:
        program = program_for(manifest.backend)
        if program is None:
            return python_worker(engine, manifest, threads, cpus)
        check_folder(engine, ENGINE_KIND, hashes=True)  # the program itself only looks at sizes
        return [str(program), "serve", str(engine), *library_options(manifest), *cpu_options(threads, cpus)]

    return command


def missing(backend: str) -> list[str]:
    """Say what this machine lacks to build the program with that backend, one actionable sentence each."""
    if backend not in SERVED:
        return []
    if sys.platform != "linux":
        return ["the C++ benchmark program runs on Linux"]
    problems = []
    if _compiler() is None:
        named = os.environ.get("CXX")
        problems.append(
            f"there is no C++ compiler {named!r}: set CXX to a program, without options or a launcher"
            if named
            else "there is no C++ compiler: install g++ or clang++, or set CXX"
        )
    if _cmake() is None:
        problems.append("there is no CMake: pip install cmake")
    if shutil.which("make") is None and shutil.which("ninja") is None:
        problems.append("there is neither make nor ninja: install one of them")
    if backend == "tensorrt" and not os.environ.get("TENSORRT_INCLUDE_DIR"):
        problems.append("TensorRT engines need its headers: set TENSORRT_INCLUDE_DIR to the folder of NvInferRuntime.h")
    return problems


def missing_problems(backend: str) -> list[EngineError]:
    """`missing`, with the way around it."""
    return [EngineError(problem, hint=HINT) for problem in missing(backend)]


def built_program(tell: Tell, *, options: Mapping[str, str] | None = None) -> Path:
    """Return the program, compiled if the cache does not have it for these sources, this compiler and these options.

    Processes that need the same one at the same time wait for the first of them.

    Args:
        tell: called with a sentence before compiling.
        options: of CMake, in addition to the usual ones.

    Raises:
        EngineError: it does not compile, or the cache cannot be written.
    """
    compiler, cmake = _compiler(), _cmake()
    if compiler is None or cmake is None:
        raise EngineError("the C++ benchmark program cannot be built here", hint=HINT)
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": compiler,
        **{name: os.environ[name] for name in ("TENSORRT_INCLUDE_DIR", "CUDA_INCLUDE_DIR") if os.environ.get(name)},
        **(options or {}),
    }
    cache = _cache_folder()
    program = cache / f"{PROGRAM}-{_digest(settings)}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(program.with_name(program.name + ".lock")):
            if not program.exists():
                tell("building the C++ benchmark program; this is done once")
                _build(cmake, settings, program)
    except OSError as error:
        raise EngineError(
            f"the cache cannot be written ({error.strerror})",
            file=cache,
            hint="set FUSELAGE_CACHE to a folder of yours",
        ) from error
    return program


def library_options(manifest: EngineManifest) -> list[str]:
    """Return the program's options that name the runtime's library, as it lies in the Python packages.

    Empty where it lies in none: the program then asks the system's loader for the usual name.

    Raises:
        EngineError: CUDA's headers do not say which runtime the program was compiled for.
    """
    if manifest.backend == "onnxruntime":
        return _library_option("--library", "onnxruntime", "capi/libonnxruntime.so.*")
    library = _library_option("--library", "tensorrt_libs", "libnvinfer.so.*")
    if not library and manifest.options.get("lean"):
        library = _library_option("--library", "tensorrt_lean_libs", "libnvinfer_lean.so.*")
    # The headers decide: structures and names of functions differ from one major version of CUDA to the next. TensorRT
    # brings a runtime of its own, and shares streams with this one through the driver.
    return [*library, *_library_option("--cuda-library", "nvidia", f"cu*/lib/libcudart.so.{_cuda_major()}")]


def _cuda_header() -> Path:
    return Path(os.environ.get("CUDA_INCLUDE_DIR") or CUDA_INCLUDE_DIR, "cuda_runtime_api.h")


def _cuda_major() -> int:
    """The major version of the CUDA runtime that the program is compiled for, e.g. 13."""
    header = _cuda_header()
    try:
        found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
    except OSError as error:
        raise EngineError(f"CUDA's headers cannot be read ({error.strerror})", file=header, hint=CUDA_HINT) from error
    if found is None:
        raise EngineError("CUDA's headers do not say their version", file=header, hint=CUDA_HINT)
    return int(found[1]) // 1000


def _library_option(option: str, package: str, pattern: str) -> list[str]:
    spec = importlib.util.find_spec(package)  # imports nothing: the package is not a submodule
    folders = spec.submodule_search_locations if spec is not None else None
    found = [path for folder in folders or () for path in Path(folder).glob(pattern)]
    # Of several the latest: "libnvinfer.so.11" before "libnvinfer.so.10".
    return [option, str(max(found, key=lambda path: path.name))] if found else []


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name)) is not None), None)


def _cmake() -> str | None:
    spec = importlib.util.find_spec("cmake")  # the wheel, which need not be on the PATH
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        program = Path(folder, "data", "bin", "cmake")
        if program.exists():
            return str(program)
    return shutil.which("cmake")


def _cache_folder() -> Path:
    if os.environ.get("FUSELAGE_CACHE"):
        return Path(os.environ["FUSELAGE_CACHE"]).absolute()  # workers are started in another folder
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fuselage"


def _digest(settings: Mapping[str, str]) -> str:
    """Of everything that decides what the compiler makes, but for the headers of the system."""
    digest = hashlib.sha256(platform.machine().encode())
    version = subprocess.run([settings["CMAKE_CXX_COMPILER"], "--version"], capture_output=True, check=False)
    digest.update(version.stdout)
    for name, value in sorted(settings.items()):
        digest.update(f"{name}={value}\n".encode())
    headers = []
    if settings.get("TENSORRT_INCLUDE_DIR"):
        headers = [Path(settings["TENSORRT_INCLUDE_DIR"], "NvInferVersion.h"), _cuda_header()]
    for path in [*sorted(SOURCES.rglob("*")), *headers]:
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until nobody else builds. Where a file system has no locks, the last one to finish wins, with the same."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def _build(cmake: str, settings: Mapping[str, str], program: Path) -> None:
    generator = [] if shutil.which("make") else ["-G", "Ninja"]
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    with tempfile.TemporaryDirectory(dir=program.parent, prefix=".build-") as folder:
        for command in (
            [cmake, "-S", str(SOURCES), "-B", folder, *generator, *definitions],
            [cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)],
        ):
            environment = {**os.environ, "TMPDIR": folder}  # a compiler that is killed leaves its files there
            done = run_program(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
            if done.returncode:
                printed = done.stdout.decode(errors="replace").strip().splitlines()
                raise EngineError(
                    "the C++ benchmark program does not compile; the end of what was printed:\n"
                    + "\n".join(printed[-SHOWN_LINES:])
                    + "\n",
                    hint=HINT,
                )
        Path(folder, PROGRAM).replace(program)
