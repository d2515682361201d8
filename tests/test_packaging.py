"""What `pip install` takes along: the code reads files beside itself, and a wheel has only those that are declared."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from pathlib import Path

import pytest

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


def test_the_installed_program_finds_its_own_modules(tmp_path: Path) -> None:
    """Other distributions have a top-level `build` too: PyPA's, for one."""
    (tmp_path / "build.py").write_text("raise AssertionError('somebody else')\n")
    (program,) = entry_points(group="console_scripts", name="fuselage")
    script = f"import sys; sys.path.append({str(ROOT)!r}); from {program.module} import {program.attr}; {program.attr}()"
    arguments = [sys.executable, "-c", script, "--version"]  # from a folder whose modules come first
    assert "version" in subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
