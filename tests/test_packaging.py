"""What `pip install` takes along: the code reads files beside itself, and a wheel has only those that are declared."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from importlib.metadata import entry_points, packages_distributions, requires
from pathlib import Path

import pytest

import build

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("commands", "engines", "exporter", "plugins", "recipes", "demo/model")


def test_every_file_beside_the_code_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]

    def is_package(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in setuptools["packages"]["find"]["include"])

    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        if is_package(package)
    ]
    files = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("[!.]*") if path.is_file()]
    assert Path("recipes/quantization/fp8.yaml") in files
    left_out = [
        str(path)
        for path in files
        if not (path.suffix == ".py" and is_package(".".join(path.parent.parts)))
        and not any(path.match(pattern) for pattern in patterns)
        and path.suffix != ".pyc"
    ]
    assert left_out == []


def test_every_licence_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ours = [path for folder in ("demo", *FOLDERS) for path in (ROOT / folder).rglob("LICENSE*")]
    assert set(project["license-files"]) == {str(path.relative_to(ROOT)) for path in [ROOT / "LICENSE", *ours]}
    assert len(project["license"].split(" AND ")) == len(project["license-files"])


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a checkout of git")
def test_a_source_distribution_is_the_checkout(tmp_path: Path) -> None:
    """Setuptools alone takes the tests without what they import."""
    pytest.importorskip("setuptools", minversion="77")  # build-system.requires
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    setup = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "egg_info", "--egg-base"]
    subprocess.run([*setup, str(tmp_path)], cwd=ROOT, capture_output=True, check=True)
    packed = set((tmp_path / "fuselage.egg-info/SOURCES.txt").read_text("utf-8").splitlines())
    present = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()}
    assert [name for name in present - packed if not re.search(r"(^|/)\.", name)] == []
    assert [name for name in packed if re.search(r"(^|/)(out|__pycache__|\.venv[^/]*)/", name)] == []


def test_the_installed_program_finds_its_own_modules(tmp_path: Path) -> None:
    """Other distributions have a top-level `build` too: PyPA's, for one."""
    (tmp_path / "build.py").write_text("raise AssertionError('somebody else')\n")
    (program,) = entry_points(group="console_scripts", name="fuselage")
    main = f"from {program.module} import {program.attr}; {program.attr}()"
    script = f"import sys; sys.path.append({str(ROOT)!r}); {main}"
    arguments = [sys.executable, "-c", script, "--version"]  # from a folder whose modules come first
    assert "version" in subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True).stdout


def test_the_script_knows_every_dependency_by_its_module() -> None:
    distributions = packages_distributions()
    names = {re.split(r"[^\w.-]", text)[0] for text in requires("fuselage") or [] if "extra ==" not in text}
    modules = {module for module, found in distributions.items() if {name.lower() for name in found} & names}
    assert build.DEPENDENCIES - modules == set()
    known = {name.lower() for module in build.DEPENDENCIES for name in distributions[module]}
    assert names - known == {"cmake"}  # a program; nobody imports it


@pytest.mark.parametrize(
    ("module", "arguments", "code"),
    [("click", [], 2), ("pydantic", ["inspect", "demo/model"], 2), ("exporter.read", ["inspect", "demo/model"], 1)],
    ids=["at_once", "in_a_command", "a_module_of_ours"],
)
def test_outside_the_virtual_environment_one_line_says_so(module: str, arguments: list[str], code: int) -> None:
    script = (
        "import runpy, sys\n"
        "class Without:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {module!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
        f"sys.argv = ['build.py', *{arguments!r}]\n"
        "runpy.run_path('build.py', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code
    lines = result.stderr.splitlines()
    assert (len(lines) == 1 and lines[0].startswith(f"error: {module} is not installed")) == (code == 2)
