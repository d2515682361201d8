"""The documentation against the repository: links lead somewhere; commands and keys are described, examples valid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import build
from engines.backends import BACKENDS
from exporter import recipe
from exporter.plan import Plan, read_plan
from exporter.quantization import QuantizationRecipe, read_quantization
from exporter.recipe_engines import MODEL_FOLDER
from exporter.settings import settings_of
from exporter.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md", ROOT / "demo/README.md"]
RECIPES = (ROOT / "docs/recipes.md").read_text("utf-8")
# The keys of `network` and `engine` are options of `export` and `engine`.
TABLES = (
    Plan,
    QuantizationRecipe,
    recipe.Recipe,
    recipe.VariantRecipe,
    recipe.DistillRecipe,
    recipe.AnalysisRecipe,
    recipe.CalibrationRecipe,
    recipe.EvaluateRecipe,
    recipe.BenchRecipe,
    recipe.PredictRecipe,
)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text("utf-8"))
    assert [link for link in links if link[1] not in anchors(page.parent / link[0] if link[0] else page)] == []


def anchors(page: Path) -> list[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text("utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("table", TABLES)
def test_every_key_of_a_recipe_is_described(table: type[Plan]) -> None:
    assert [key for key in table.model_fields if not re.search(rf"(`|^){key}(`|:)", RECIPES, re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("section", "table", "count"),
    [
        ("analysis", recipe.AnalysisRecipe, 4),
        ("bench", recipe.BenchRecipe, 6),
        ("distill", recipe.DistillRecipe, 3),
        ("predict", recipe.PredictRecipe, 1),
    ],
)
def test_defaults_of_a_recipe_are_those_described(section: str, table: type[Plan], count: int) -> None:
    (text,) = re.findall(rf"^\*\*`{section}`(.*?)\n\n", RECIPES, re.MULTILINE | re.DOTALL)
    described = re.findall(r"`(\w+)`\s\(`?(?:[^`();]*; )?([\w.\[\]-]+)`?[;:)]", text)  # `key` (what it is; default)
    assert len(described) == count
    for key, value in described:
        default = table.model_fields[key].default
        written = "all" if default is None else json.dumps(default).strip('"')
        assert value == written or float(value) == default, key


def test_the_examples_are_valid(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", RECIPES, re.DOTALL)
    files = [tmp_path / name for name in ("some.yaml", "recipe.yaml", "engines.yaml", "quantization.yaml", "llm.yaml")]
    (llm,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/tensorrt_llm.md").read_text("utf-8"), re.DOTALL)
    for file, example in zip(files, [*examples, llm], strict=True):
        file.write_text(example)
    plan = read_plan(files[0])
    assert (plan.dropped_layers, plan.fuse) == ([9, 10, 11, 12, 13, 14], [(9, 13)])
    (tmp_path / "plan.yaml").write_text("drop_attention: [3]")  # of the recipe's second variant
    assert [variant.plan for variant in recipe.read_recipe(files[1], BACKENDS).variants] == [
        Plan(),
        Plan(drop_attention=[3]),
    ]
    engines = [variant.engine for variant in recipe.read_recipe(files[2], BACKENDS).variants]
    assert [engine.name for engine in engines] == ["torch", "torch", "torch", "tensorrt"]
    assert engines[2].settings.plugins == ("wide_ffn",)
    assert read_quantization(files[3]).kv_cache == "float8_e4m3fn"
    assert recipe.read_recipe(files[4], BACKENDS).variants[1].engine.settings.max_seq_len == 8192


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_of_a_recipes_engine_is_described(backend: str) -> None:
    kind = BACKENDS[backend]
    page = ROOT / f"docs/{backend}.md"
    text = RECIPES + (page.read_text("utf-8") if page.exists() else "")
    known = [] if kind.settings is None else settings_of(kind.settings)
    if kind.builds_from != MODEL_FOLDER:
        known += settings_of(TARGETS[kind.builds_from["to"]].settings)
    options = [setting.option or "" for setting in known]
    assert [name for name in options if not re.search(rf"`{name.replace('-', '_')}(`|:)|--{name}\b", text)] == []


def test_every_command_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/commands.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`([\w-]+)`", row)) == sorted(build.main.commands)
