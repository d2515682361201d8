"""Recipes: a YAML file that names a model and everything to do to it, for `build.py run`.

model: demo/model                 # paths are relative to the recipe; ~ is the home folder
network: {max_positions: 1024}
variants:
  - name: baseline
  - name: fused
    plan: {drop_attention: [[9, 12]], fuse: [[9, 12]]}
bench: {batch: [1, 4], input_len: [64], output_len: [32]}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from exporter.errors import PlanError
from exporter.manifests import shown
from exporter.plan import Layers, Plan, plan_from_data, read_plan, read_yaml, validation_error
from exporter.quantization import QuantizationRecipe, read_quantization
from exporter.recipe_engines import Backend, Choice, Sections, choices_from, sections_from
from exporter.settings import found_from

# Folders that `run` writes beside those of the variants.
STEP_FOLDERS = ("analysis", "calibration", "benchmark", "results", "report")


def _path(value: Any) -> Any:
    # pydantic's strict mode does not take the text that YAML gives for a Path.
    return Path(value) if isinstance(value, str) else value


Count = Annotated[int, Field(gt=0, le=1 << 20)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  # also a folder name


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WindowsRecipe(_Table):
    """How a text is cut."""

    context: Annotated[int, Field(ge=2, le=1 << 20)] = 512  # tokens per window
    max_windows: Count | None = None  # None: all of the text


class DistillRecipe(WindowsRecipe):
    """How a variant is trained on the logits of the recipe's model; see `distill --help`."""

    text: Annotated[Path, BeforeValidator(_path)]
    epochs: Annotated[float, Field(gt=0, le=1 << 20)] = 1.0
    steps: Count | None = None  # instead of epochs
    batch: Count = 8
    accumulate: Count = 1
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    warmup: Annotated[int, Field(ge=0)] | None = None  # steps; None: one in twenty
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    hidden_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    blocks: Annotated[Layers, Field(min_length=1)] | None = None  # source layers; None: everything
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    seed: Annotated[int, Field(ge=0)] = 0
    save_every: Count = 100


class VariantRecipe(_Table):
    """One model to compare: the source itself, or what a plan makes of it."""

    name: Name
    plan: Plan | Literal["auto"] = Plan()  # "auto": what the recipe's analysis suggests
    norm: Literal["fold", "last"] = "fold"
    checkpoint: bool = True  # also write a Hugging Face folder; it cannot hold parallel blocks
    bench: bool = True  # False: only evaluated, without network and engine
    distill: DistillRecipe | None = None  # train what the plan gives, before anything else is made of it
    quantize: QuantizationRecipe | None = None  # in the file: a name of `quantize --format`, or a recipe's path
    # In the file these two are tables, of which every variant may have some keys of its own; see `recipe_engines`.
    network: Choice | None  # the target that its engine is built from; None: its Hugging Face folder
    engine: Choice  # the backend that builds and runs it


class BenchRecipe(_Table):
    """The grid of workloads; every combination of the three lists is measured."""

    batch: Annotated[list[Count], Field(min_length=1)] = [1]
    input_len: Annotated[list[Count], Field(min_length=1)] = [64]
    output_len: Annotated[list[Count], Field(min_length=1)] = [32]
    rounds: Count = 8  # one change among 300 figures is told from noise, see engines/regression.py
    warmup: Annotated[int, Field(ge=0, le=1000)] = 1
    threads: Count | None = None  # None: one per CPU that the process may use
    seed: Annotated[int, Field(ge=0)] = 0
    runtime: Literal["cpp", "python", "auto"] = "auto"  # who takes the samples; auto: C++ where it can be built
    one_at_a_time: bool = False  # load an engine only when the one before is closed; rounds are not interleaved then
    profile: bool = False  # first run every engine under its runtime's profiler, at the first combination

    @property
    def longest(self) -> int:
        """Tokens of the longest request, input and output."""
        return max(self.input_len) + max(self.output_len)


class PredictRecipe(_Table):
    """Where the latency model is to see the benchmarked engines, for a section of the report."""

    gpu: Annotated[list[str], Field(min_length=1, max_length=16)]  # names of engines/gpus.yaml
    tp: list[Count] = [1]
    batch: list[Count] | None = None  # None: those of the benchmark
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # of what is not quantized; None: the network's


class EvaluateRecipe(WindowsRecipe):
    """How well every variant still does on a text, on tasks or on both, for the report to show beside its latency."""

    text: Annotated[Path, BeforeValidator(_path)] | None = None
    tasks: list[str] = []  # of lm-evaluation-harness; needs the extra `tasks`
    include_path: Annotated[Path, BeforeValidator(_path)] | None = None  # folder of further tasks
    limit: Count | None = None  # samples per task; None: all
    trust_remote_code: bool = False  # tasks may run code that the source model brings


class CalibrationRecipe(WindowsRecipe):
    """The text that quantized variants take their ranges from; its last windows choose the strength of smoothing."""

    text: Annotated[Path, BeforeValidator(_path)]
    percentile: Annotated[float, Field(ge=50, le=100)] | None = None  # None: the largest magnitude


class AnalysisRecipe(WindowsRecipe):
    """What to measure, and what the plan it suggests may do; see `analyze --help`."""

    text: Annotated[Path, BeforeValidator(_path)]
    drop: Annotated[int, Field(ge=0, le=1 << 16)] = 0  # attentions
    greedy: bool = False  # measure again after each
    max_width: Count | None = None  # of a fused FFN
    max_dependency: Annotated[float, Field(ge=0)] | None = None
    keep_last: bool = True  # the last FFN of a run stays alone


class Recipe(_Table):
    """A validated recipe with all paths resolved and all plans read."""

    title: str | None = None  # of the report; None: it names the variants
    model: Annotated[Path, BeforeValidator(_path)]
    # Of variants that say nothing else, as in `VariantRecipe`.
    network: Choice | None = None
    engine: Choice | None = None
    analysis: AnalysisRecipe | None = None
    calibration: CalibrationRecipe | None = None
    variants: Annotated[list[VariantRecipe], Field(min_length=1, max_length=64)]
    evaluate: EvaluateRecipe | None = None
    bench: BenchRecipe | None = BenchRecipe()
    predict: PredictRecipe | None = None
    baseline: Name | None = None  # of the report; None: the first variant

    @property
    def baseline_name(self) -> str:
        return self.baseline or self.variants[0].name


def read_recipe(path: Path, backends: Mapping[str, Backend]) -> Recipe:
    """Read a recipe file; a variant's plan may be inline or the path of a plan file.

    Args:
        backends: by the name that recipes call them; where a recipe names none, the first.

    Raises:
        PlanError: the file or a plan it names is malformed, two variants share a name or one has a step's, a variant
            asks for a checkpoint that the format cannot hold, or what is to be evaluated, benchmarked or predicted is
            missing.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise PlanError(
            "not a recipe", file=path, expected=f"keys {', '.join(Recipe.model_fields)}", found=shown(data, 60)
        )
    folder = path.absolute().parent
    evaluate = data.get("evaluate")
    paths = [(data, "model"), (evaluate, "text"), (evaluate, "include_path")]
    paths += [(data.get(section), "text") for section in ("analysis", "calibration")]
    variants = data.get("variants")
    variants = dict(enumerate(variants)) if isinstance(variants, list) else {}
    variants = {number: variant for number, variant in variants.items() if isinstance(variant, dict)}
    paths += [(variant.get("distill"), "text") for variant in variants.values()]
    for table, key in paths:
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str(found_from(folder, table[key]))
    shared = sections_from(data, "", path)
    choices = choices_from(Sections(), shared, backends, path)
    data["network"], data["engine"] = choices.network, choices.engine
    for number, variant in variants.items():
        own = sections_from(variant, f"variants.{number}.", path)
        if "plan" in variant:
            variant["plan"] = _plan(variant["plan"], folder, path, f"{own.where}plan")
        if isinstance(variant.get("quantize"), str):
            variant["quantize"] = _quantization(variant["quantize"], folder, path)
        if variant.get("bench") is False and (own.network or own.engine):
            raise PlanError(f"{own.where}bench: with `false` there is no engine to choose anything about", file=path)
        choices = choices_from(own, shared, backends, path)
        variant["network"], variant["engine"] = choices.network, choices.engine
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, Recipe, path) from error
    names = [variant.name for variant in recipe.variants]
    if len(set(names)) != len(names):
        raise PlanError("two variants have the same name", file=path, found=", ".join(names))
    taken = [name for name in names if name in STEP_FOLDERS]
    if taken:
        raise PlanError("a variant has the name of a step's folder", file=path, found=", ".join(taken))
    if recipe.baseline_name not in names:
        raise PlanError("the baseline is one of the variants", file=path, expected=names, found=recipe.baseline_name)
    if recipe.evaluate is not None and recipe.evaluate.text is None and not recipe.evaluate.tasks:
        raise PlanError("evaluate: there is nothing to evaluate on", file=path, expected="a text, tasks or both")
    if recipe.predict is not None and recipe.bench is None:
        raise PlanError("predict: it is a section of the report, and without `bench` there is none", file=path)
    _check_variants(recipe, path)
    return recipe


def _check_variants(recipe: Recipe, path: Path) -> None:
    for variant in recipe.variants:
        if not variant.bench and recipe.evaluate is None:
            raise PlanError(
                f"variant {variant.name!r}: with `bench: false` it is only evaluated, which needs a section `evaluate`",
                file=path,
            )
        if not variant.bench and variant.name == recipe.baseline_name and recipe.bench is not None:
            raise PlanError(f"variant {variant.name!r}: the baseline cannot go without a benchmark", file=path)
        if not variant.checkpoint and variant.plan != Plan() and recipe.evaluate is not None and recipe.evaluate.tasks:
            raise PlanError(f"variant {variant.name!r}: tasks are run on a Hugging Face folder", file=path)
        if variant.distill is not None and variant.plan == Plan():
            raise PlanError(
                f"variant {variant.name!r}: what is distilled is what a plan makes of the model, and there is no plan",
                file=path,
            )
        if variant.bench and not variant.checkpoint and variant.network is None and variant.plan != Plan():
            raise PlanError(
                f"variant {variant.name!r}: without a checkpoint there is nothing that {variant.engine.name} could run",
                file=path,
            )
        if not variant.checkpoint and (variant.distill is not None or variant.quantize is not None):
            what = "distilled" if variant.distill is not None else "quantized"
            raise PlanError(f"variant {variant.name!r}: what is {what} is written as a Hugging Face folder", file=path)
        if variant.quantize is not None and recipe.calibration is None:
            raise PlanError(f"variant {variant.name!r}: quantize needs a section `calibration`", file=path)
        if variant.plan == "auto" and recipe.analysis is None:
            raise PlanError(f"variant {variant.name!r}: plan: auto needs a section `analysis`", file=path)
        if variant.plan != "auto" and variant.plan.parallel and variant.checkpoint:
            raise PlanError(
                f"variant {variant.name!r}: a Hugging Face folder cannot hold parallel blocks",
                file=path,
                hint="add `checkpoint: false` to the variant; its network is then exported without one",
            )


def _quantization(name: str, folder: Path, recipe: Path) -> QuantizationRecipe:
    try:
        return read_quantization(found_from(folder, name) if name.endswith((".yaml", ".yml")) else name)
    except PlanError as error:
        error.file = error.file or recipe
        raise


def _plan(value: Any, folder: Path, recipe: Path, where: str) -> Plan | Literal["auto"]:
    if value == "auto":
        return "auto"
    return read_plan(found_from(folder, value)) if isinstance(value, str) else plan_from_data(value, recipe, where)
