"""The house: imports point to lower floors only (DESIGN.md, section 4)."""

from __future__ import annotations

import ast
import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up. Modules of one floor do not import each other, unless the row says so ("*" after the floor).
FLOORS: list[tuple[str, list[str], bool]] = [
    ("words", ["exporter.dtypes", "exporter.errors"], False),
    ("matter", ["exporter.lazy", "exporter.rope"], False),
    ("form", ["exporter.graph", "exporter.safetensors_io"], False),
    ("saving", ["exporter.writers.files"], False),
    ("networks", ["exporter.network"], False),
    ("names", ["exporter.architectures.*", "exporter.architectures"], True),
    ("reading", ["exporter.read", "exporter.plan", "exporter.reference"], False),
    ("work", ["exporter.passes.*", "exporter.passes"], True),
    ("writing", ["exporter.writers.*", "exporter.writers"], True),
    ("order", ["exporter.recipe", "exporter.pipeline"], False),
    ("run", ["engines.base"], False),
    ("runtimes", ["engines.onnxruntime", "engines.generate"], False),
    ("which runtime", ["engines.backends"], False),
    (
        "judge",
        ["engines.results", "engines.worker", "engines.bench", "engines.structure_strip", "engines.report"],
        True,
    ),
    ("door", ["build"], False),
]

# Modules of the "work" and "writing" floors know nothing of each other but for these.
ALLOWED = {("exporter.passes.*", "exporter.passes.find_blocks"), ("exporter.writers.*", "exporter.writers.files")}

# Only these may import a runtime or a big framework at module level; everyone else does it inside functions.
HEAVY = {"torch": ["exporter.reference"], "onnx_ir": ["exporter.writers.onnx*"], "onnx": ["exporter.writers.onnx*"]}
HEAVY |= {name: [] for name in ("onnxruntime", "tensorrt", "tensorrt_llm", "transformers", "matplotlib", "triton")}


def modules() -> dict[str, Path]:
    files = [
        *ROOT.glob("exporter/**/*.py"),
        *ROOT.glob("engines/**/*.py"),
        *ROOT.glob("plugins/**/*.py"),
        ROOT / "build.py",
    ]
    named = {}
    for path in files:
        if "hf_remote_code" in path.parts:
            continue  # shipped as data, never imported
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def floor_of(module: str) -> int:
    for floor, (_, patterns, _) in enumerate(FLOORS):
        if any(fnmatch.fnmatch(module, pattern) for pattern in patterns):
            return floor
    raise AssertionError(f"{module} has no floor: add it to the table, and to the design")


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", [m for m in modules() if m not in ("exporter", "engines", "plugins")])
def test_imports_point_down(module: str) -> None:
    ours = modules()
    floor = floor_of(module)
    siblings_may = FLOORS[floor][2]
    for imported in imports(ours[module]) & set(ours) - {"exporter", "engines", "plugins", module}:
        if any(fnmatch.fnmatch(module, a) and fnmatch.fnmatch(imported, b) for a, b in ALLOWED):
            continue
        below = floor_of(imported)
        assert below < floor or (below == floor and siblings_may), f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("module", modules())
def test_heavy_imports_stay_inside_functions(module: str) -> None:
    for imported in imports(modules()[module], top_level_only=True):
        owners = HEAVY.get(imported.partition(".")[0])
        if owners is not None:
            assert any(fnmatch.fnmatch(module, owner) for owner in owners), (
                f"{module} imports {imported} at module level"
            )
