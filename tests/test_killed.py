"""Killed with SIGKILL, a run leaves nothing that a later step accepts unless it is whole; the next run cleans up.

`sys.addaudithook` gives every file-system call of the victim a number, so a kill can be put before any one of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.errors import FuselageError
from exporter.read import open_model
from exporter.writers.files import MANIFEST, check_folder, read_manifest, save_folder
from tests.checkpoints import saved_model

ROOT = Path(__file__).parent.parent

# Kill this process before file-system call number `fatal`, counted from the making of the partial folder.
TRAP = """
import os, signal, sys

PREFIXES = ("open", "os.", "shutil.", "fcntl.", "ctypes.", "chunk")
count = None

def trap(fatal):
    def hook(event, arguments):
        global count
        if event == "tempfile.mkdtemp":
            count = 0
        elif count is not None and event.startswith(PREFIXES) and event != "os.kill":
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
"""

# Saves a copy of a model folder in pieces, once for every point of death, each in a process and a folder of its own.
VICTIMS = (
    TRAP
    + """
from pathlib import Path
from exporter.writers.files import save_folder

class Drip:
    def __init__(self, path):
        self.raw = path.read_bytes()
        self.nbytes = len(self.raw)

    def chunks(self):
        step = max(1, self.nbytes // 3)
        for start in range(0, self.nbytes, step):
            sys.audit("chunk")
            yield self.raw[start : start + step]

def save(source, output, force):
    contents = [(path.name, Drip(path)) for path in sorted(source.iterdir())]
    save_folder(output, contents, kind="checkpoint", details={}, force=force)

source, parent, force = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "force"
for fatal in range(1, 1000):
    folder = parent / str(fatal)
    folder.mkdir()
    if force:
        save_folder(folder / "out", [("config.json", b"old")], kind="checkpoint", details={})
    pid = os.fork()
    if pid == 0:
        trap(fatal)
        save(source, folder / "out", force)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
        sys.exit(0)
"""
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "llama"
    saved_model(folder, "Llama", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 97})
    (folder.parent / "plan.yaml").write_text("drop_attention: [1, 2]\nfuse: [[1, 2]]\n")
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def accepted(parent: Path) -> Iterator[Path]:
    """The folders below `parent`, hidden ones included, that some step would take for a finished one."""
    for folder in (path for path in parent.rglob("*") if path.is_dir()):
        with contextlib.suppress(FuselageError):
            open_model(folder, need_weights=True)
            yield folder
        for kind in ("checkpoint", "network", "engine"):
            with contextlib.suppress(FuselageError):
                check_folder(folder, kind, hashes=False)
                yield folder


def can_exchange_names(folder: Path) -> bool:
    """Whether this kernel and file system know renameat2(RENAME_EXCHANGE)."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    a, b = (ctypes.c_char_p(os.fsencode(folder / name)) for name in ("a", "b"))
    return renameat2 is not None and renameat2(-100, a, -100, b, 2) == 0


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_killed_before_every_single_call(force: bool, model: Path, tmp_path: Path) -> None:
    contents = [(path.name, path.read_bytes()) for path in sorted(model.iterdir())]
    save_folder(tmp_path / "whole", contents, kind="checkpoint", details={})
    save_folder(tmp_path / "old", [("config.json", b"old")], kind="checkpoint", details={})
    whole, old = listing(tmp_path / "whole"), listing(tmp_path / "old")
    (tmp_path / "runs").mkdir()
    arguments = [sys.executable, "-c", VICTIMS, model, tmp_path / "runs", "force" if force else "new"]
    subprocess.run(arguments, check=True, timeout=120, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    runs = sorted(tmp_path.joinpath("runs").iterdir(), key=lambda path: int(path.name))
    assert len(runs) > 30  # as many kills, and one run that got through
    exchange = force and can_exchange_names(tmp_path / "names")
    leftovers, published = 0, 0
    for run in runs:
        output = run / "out"
        for folder in accepted(run):
            assert listing(folder) == whole or (force and listing(folder) == old), folder
        assert output.is_dir() or not exchange  # there is no moment without one of the two
        published += output.is_dir() and listing(output) == whole
        leftovers += len(os.listdir(run)) > output.is_dir()
        if force or not output.exists():
            save_folder(output, contents, kind="checkpoint", details={}, force=force)
        assert listing(output) == whole
        assert os.listdir(run) == ["out"]
    assert leftovers > 20
    assert 1 <= published < len(runs)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_time(seed: int, tmp_path: Path) -> None:
    """By the clock instead of by the call, so that also writing itself is cut short."""
    rng = random.Random(seed)
    script = (
        "import sys; from pathlib import Path; from exporter.writers.files import save_folder\n"
        "class Slow:\n"
        "    nbytes = 1 << 22\n"
        "    def chunks(self):\n"
        "        for _ in range(1 << 10): yield bytes(1 << 12)\n"
        "print('go', flush=True)\n"
        "while True: save_folder(Path(sys.argv[1]), [('config.json', b'{}'), ('a', Slow()), ('b', Slow())],"
        " kind='checkpoint', details={}, force=True)\n"
    )
    save_folder(tmp_path / "out", [("config.json", b"{}")], kind="checkpoint", details={})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as victim:
        assert victim.stdout is not None
        victim.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    check_folder(tmp_path / "out", "checkpoint", hashes=True)
    for folder in accepted(tmp_path):
        check_folder(folder, "checkpoint", hashes=True)
    save_folder(tmp_path / "out", [("only", b"this")], kind="checkpoint", details={}, force=True)
    assert set(listing(tmp_path)) == {"out/only", f"out/{MANIFEST}"}


COMMAND = (
    TRAP
    + """
import build
fatal = int(sys.argv.pop(1))
trap(fatal)
build.main(standalone_mode=False)
if fatal < 0:
    print("calls", count)
"""
)


def command(fatal: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, str(fatal), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def chain(model: Path) -> dict[str, tuple[tuple[object, ...], Path, int]]:
    """Each command: its arguments but for -o, its undisturbed output, and how many calls that took."""
    work = model.parent
    commands = {
        "transform": ("transform", model, "--plan", work / "plan.yaml", "-q"),
        "export": ("export", work / "transform", "--to", "onnx", "-q"),
        "engine": ("engine", work / "export", "--label", "x", "-q"),
    }
    found = {}
    for name, arguments in commands.items():
        result = command(-1, *arguments, "-o", work / name)
        assert result.returncode == 0, result.stderr
        found[name] = (arguments, work / name, int(result.stdout.split()[-1]))
    return found


@pytest.mark.parametrize("name", ["transform", "export", "engine"])
def test_commands_killed(name: str, chain: dict[str, tuple[tuple[object, ...], Path, int]], tmp_path: Path) -> None:
    arguments, whole, calls = chain[name]
    expected = read_manifest(whole)
    assert expected is not None
    assert calls > 20
    # halfway, and right before the end, where the folder is complete but has another name
    for fatal in (calls // 2, calls - 3):
        result = command(fatal, *arguments, "-o", tmp_path / "out")
        assert result.returncode == -signal.SIGKILL, (fatal, result.stderr)
        for folder in accepted(tmp_path):
            found = check_folder(folder, expected.kind, hashes=True)
            assert found.fingerprint == expected.fingerprint
        if (tmp_path / "out").exists():
            (tmp_path / "out").rename(tmp_path / f"out-{fatal}")  # it was whole: out of the way of the next
    result = command(-1, *arguments, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert check_folder(tmp_path / "out", expected.kind, hashes=True).fingerprint == expected.fingerprint
    assert not [name for name in os.listdir(tmp_path) if not name.startswith("out")]


RUN_STEPS = (
    ("baseline/network", "network"),
    ("baseline/engine", "engine"),
    ("fused/checkpoint", "checkpoint"),
    ("fused/network", "network"),
    ("fused/engine", "engine"),
    ("benchmark", "results"),
    ("report", "report"),
)


@pytest.fixture(scope="module")
def recipe(model: Path) -> tuple[Path, int]:
    """A recipe, and how many file-system calls it takes."""
    path = model.parent / "recipe.yaml"
    path.write_text(
        f"model: {model}\n"
        "variants: [{name: baseline}, {name: fused, plan: {drop_attention: [1, 2], fuse: [[1, 2]]}}]\n"
        "bench: {input_len: [4], output_len: [3], rounds: 1, warmup: 0}\n"
    )
    result = command(-1, "run", path, "-o", model.parent / "run", "-q")
    assert result.returncode == 0, result.stderr
    return path, int(result.stdout.split()[-1])


def finished_steps(output: Path) -> dict[str, int]:
    """The steps whose folders are whole, with the inode of each folder: one that is made again has another."""
    found = {}
    for step, kind in RUN_STEPS:
        with contextlib.suppress(FuselageError):
            check_folder(output / step, kind, hashes=True)
            found[step] = (output / step).stat().st_ino
    return found


def test_run_killed_again_and_again(recipe: tuple[Path, int], tmp_path: Path) -> None:
    path, calls = recipe
    output = tmp_path / "out"
    before: dict[str, int] = {}
    kills = 0
    while True:
        fatal = calls * (kills + 1) // 8  # the steps that a killed run has finished are not made again by the next
        result = command(fatal, "run", path, "-o", output, "-q")
        for folder in accepted(tmp_path):
            check_folder(folder, read_manifest(folder).kind, hashes=True)  # type: ignore[union-attr]
        after = finished_steps(output)
        assert before.items() <= after.items()  # what was finished is still there, and was not made again
        before = after
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        kills += 1
    assert kills >= 3
    assert list(after) == [step for step, _ in RUN_STEPS]
    assert not [path for path in output.rglob(".*") if path.is_dir()]
