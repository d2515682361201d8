"""The house: imports point to lower floors only (DESIGN.md, section 4)."""

from __future__ import annotations

import ast
import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PACKAGES = ("exporter", "engines", "plugins", "commands")

# From the ground up: name, modules, and which modules of the same floor may import each other: "none", "all", or
# "kin", whose names begin with the same word ("exporter.writers.onnx_graph" and "exporter.writers.onnx").
FLOORS: list[tuple[str, list[str], str]] = [
    ("words", ["exporter.dtypes", "exporter.errors", "plugins.contract"], "none"),
    ("choices", ["exporter.settings"], "none"),
    ("matter", ["exporter.lazy", "exporter.rope", "exporter.numerics"], "none"),
    ("codes", ["exporter.lazy_quantized"], "none"),
    ("form", ["exporter.graph", "exporter.safetensors_io", "exporter.structure"], "none"),
    ("saving", ["exporter.writers.files", "exporter.writers.model_wide", "exporter.manifests"], "none"),
    ("networks", ["exporter.network", "exporter.one_gemm"], "none"),
    ("names", ["exporter.architectures.*", "exporter.architectures"], "all"),
    ("reading", ["exporter.read", "exporter.plan", "exporter.reference", "exporter.text", "exporter.wide_ffn"], "none"),
    ("ranges", ["exporter.ranges", "exporter.hidden_states", "exporter.quantization"], "none"),
    ("finding", ["exporter.passes.find_blocks"], "none"),
    ("work", ["exporter.passes.*", "exporter.passes"], "none"),
    ("writing", ["exporter.writers.*", "exporter.writers"], "kin"),
    ("study", ["exporter.analysis.*", "exporter.analysis", "exporter.calibration", "exporter.distill*"], "kin"),
    ("suggestion", ["exporter.suggest", "exporter.quantize"], "none"),
    ("which target", ["exporter.targets"], "none"),
    ("which engine", ["exporter.recipe_engines"], "none"),
    ("order", ["exporter.recipe", "exporter.pipeline", "exporter.summary"], "none"),
    ("custom ops", ["plugins.wide_ffn", "plugins.wide_ffn.*"], "kin"),
    ("run", ["engines.base", "engines.machine", "engines.programs"], "none"),
    ("steps", ["engines.sequences", "engines.profile"], "none"),
    (
        "kernels",
        [
            "engines.onnxruntime_kernels",
            "engines.onnxruntime_profile",
            "engines.tensorrt_profile",
            "engines.torch_*",
            "engines.tensorrt_library",
            "engines.tensorrt_engine",
            "engines.tensorrt_build",
            "engines.tensorrt_runner",
        ],
        "kin",
    ),
    (
        "runtimes",
        ["engines.onnxruntime", "engines.tensorrt", "engines.tensorrt_llm", "engines.torch", "engines.generate"],
        "none",
    ),
    ("which runtime", ["engines.backends"], "none"),
    (
        "judge",
        [
            "engines.results",
            "engines.worker",
            "engines.tensorrt_llm_worker",
            "engines.trtllm_bench",
            "engines.bench",
            "engines.profile_worker",
            "engines.profiling",
            "engines.cpp_program",
            "engines.structure_strip",
            "engines.hardware",
            "engines.latency_model",
            "engines.latency_fit",
            "engines.what_if",
            "engines.intervals",
            "engines.markdown",
            "engines.regression",
        ],
        "all",
    ),
    (
        "report",
        [
            "engines.report",
            "engines.report_words",
            "engines.results_table",
            "engines.report_pages",
            "engines.charts",
            "engines.comparison_table",
            "engines.time_chart",
            "engines.throughput",
            "engines.prediction*",
            "engines.tradeoff",
            "engines.point_charts",
            "engines.accuracy",
            "engines.analysis",
            "engines.quantization_errors",
        ],
        "all",
    ),
    ("recipe", ["engines.run", "engines.run_*"], "kin"),
    ("help", ["commands.help"], "none"),
    ("options", ["commands.options", "commands.terminal"], "none"),
    (
        "commands",
        ["commands.models", "commands.networks", "commands.timing", "commands.studies", "commands.recipes"],
        "none",
    ),
    ("door", ["commands.main"], "none"),
    ("script", ["build"], "none"),
]

# Only these may import a runtime or a big framework at module level; everyone else does it inside functions.
HEAVY = {
    "torch": [
        "exporter.reference",
        "engines.torch_*",
        "exporter.hidden_states",
        "exporter.calibration",
        "exporter.distill*",
        "exporter.analysis.*",
        "plugins.wide_ffn.*",
    ],
    "triton": ["plugins.wide_ffn.kernels", "plugins.wide_ffn.launch"],
    "onnx_ir": ["exporter.writers.onnx*"],
    "onnx": ["exporter.writers.onnx*"],
}
HEAVY |= {name: [] for name in ("onnxruntime", "tensorrt", "tensorrt_llm", "transformers", "matplotlib", "scipy")}


@cache
def modules() -> dict[str, Path]:
    files = [
        *ROOT.glob("exporter/**/*.py"),
        *ROOT.glob("engines/**/*.py"),
        *ROOT.glob("plugins/**/*.py"),
        *ROOT.glob("commands/**/*.py"),
        ROOT / "build.py",
    ]
    named = {}
    for path in files:
        if "hf_remote_code" in path.parts or path.name == "trtllm_network.py":
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


@pytest.mark.parametrize("module", [m for m in modules() if m not in PACKAGES])
def test_imports_point_down(module: str) -> None:
    ours = modules()
    floor = floor_of(module)
    for imported in imports(ours[module]) & set(ours) - {*PACKAGES, module}:
        if imported == module.rpartition(".")[0]:
            continue  # importing a module runs its package first in any case
        below = floor_of(imported)
        allowed = {"none": False, "all": True, "kin": kin(module) == kin(imported)}[FLOORS[floor][2]]
        assert below < floor or (below == floor and allowed), f"{module} imports {imported}, which is not below it"


def kin(module: str) -> str:
    return module.partition("_")[0]


@pytest.mark.parametrize("module", modules())
def test_heavy_imports_stay_inside_functions(module: str) -> None:
    for imported in imports(modules()[module], top_level_only=True):
        owners = HEAVY.get(imported.partition(".")[0])
        if owners is not None:
            assert any(fnmatch.fnmatch(module, owner) for owner in owners), (
                f"{module} imports {imported} at module level"
            )
