"""Recipes: a YAML file that names a model and everything to do to it, for `build.py run`.

model: demo/model                 # paths are relative to the recipe; ~ is the home folder
network: {dtype: float32, max_positions: 1024}
variants:
  - name: baseline
  - name: fused
    plan: {drop_attention: [[9, 12]], fuse: [[9, 12]]}
bench: {batch: [1, 4], input_len: [64], output_len: [32]}
"""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from exporter.errors import PlanError
from exporter.manifests import shown
from exporter.plan import LayerOrRange, Plan, plan_from_data, read_plan, read_yaml, validation_error
from exporter.quantization import QuantizationRecipe, read_quantization
from exporter.writers.onnx_options import PRESETS

# Folders that `run` writes beside those of the variants.
STEP_FOLDERS = ("analysis", "calibration", "benchmark", "results", "report")


def _path(value: Any) -> Any:
    # pydantic's strict mode does not take the text that YAML gives for a Path.
    return Path(value) if isinstance(value, str) else value


Count = Annotated[int, Field(gt=0, le=1 << 20)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  # also a folder name


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


NetworkDType = Literal["float32", "float16", "bfloat16"]


class NetworkRecipe(_Table):
    """The network definition that every variant is exported to."""

    to: Literal["onnx"] = "onnx"
    target: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    dtype: NetworkDType = "float32"
    max_positions: Count | None = None  # None: the model's max_position_embeddings
    batch: Count | None = None  # a fixed number of sequences; None: the target's, any or 1


class TensorRtLlmRecipe(_Table):
    """The TensorRT-LLM checkpoint that every variant is exported to, and what its engine is built for."""

    to: Literal["trtllm"]
    tp: Count = 1
    pp: Count = 1
    split_embedding: bool = False  # over the tensor-parallel ranks
    max_batch: Count = 8  # sequences side by side
    max_seq_len: Count = 8192  # tokens of one sequence
    max_num_tokens: Count = 8192  # tokens of one step
    low_latency: bool = False  # FP8 GEMMs for few tokens at a time


class TensorRtEngineRecipe(_Table):
    """How TensorRT builds every variant's engine, see `engine --help`; what is not given has the backend's default."""

    backend: Literal["tensorrt"]
    max_input_len: Count | None = None  # tokens of one prefill call
    opt_input_len: Count | None = None  # the length that kernels are chosen for
    builder_optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    timing_cache: Annotated[Path, BeforeValidator(_path)] | None = None
    lean: bool = False
    weight_streaming: bool = False
    weight_streaming_budget: Annotated[int, Field(ge=1)] | None = None  # bytes
    decomposable_attention: bool = False
    detailed: bool = False
    ignore_memory: bool = False


def _network(value: Any) -> Any:
    return {"to": "onnx", **value} if isinstance(value, dict) else value


Network = Annotated[NetworkRecipe | TensorRtLlmRecipe, Field(discriminator="to"), BeforeValidator(_network)]


class WindowsRecipe(_Table):
    """How a text is cut."""

    context: Annotated[int, Field(ge=2, le=1 << 20)] = 512  # tokens per window
    max_windows: Count | None = None  # None: all of the text


class DistillRecipe(WindowsRecipe):
    """How a variant is trained on the logits of the recipe's model; see `distill --help`."""

    text: Annotated[Path, BeforeValidator(_path)]
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    steps: Count | None = None  # instead of epochs
    batch: Count = 8
    accumulate: Count = 1
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    warmup: Annotated[int, Field(ge=0)] | None = None  # steps; None: one in twenty
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    hidden_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    blocks: Annotated[list[LayerOrRange], Field(min_length=1)] | None = None  # source layers; None: everything
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
    dtype: NetworkDType | None = None  # of its ONNX network; None: the recipe's


class BenchRecipe(_Table):
    """The grid of workloads; every combination of the three lists is measured."""

    batch: Annotated[list[Count], Field(min_length=1)] = [1]
    input_len: Annotated[list[Count], Field(min_length=1)] = [64]
    output_len: Annotated[list[Count], Field(min_length=1)] = [32]
    rounds: Count = 5
    warmup: Annotated[int, Field(ge=0, le=1000)] = 1
    threads: Count | None = None  # None: one per core
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
    network: Network = NetworkRecipe()
    engine: TensorRtEngineRecipe | None = None  # None: the defaults of the network's runtime
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


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file; a variant's plan may be inline or the path of a plan file.

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
    paths.append((data.get("engine"), "timing_cache"))
    variants = data.get("variants")
    variants = [variant for variant in variants if isinstance(variant, dict)] if isinstance(variants, list) else []
    paths += [(variant.get("distill"), "text") for variant in variants]
    for table, key in paths:
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str(_found_from(folder, table[key]))
    for variant in variants:
        if "plan" in variant:
            variant["plan"] = _plan(variant["plan"], folder, path)
        if isinstance(variant.get("quantize"), str):
            name = variant["quantize"]
            variant["quantize"] = read_quantization(
                _found_from(folder, name) if name.endswith((".yaml", ".yml")) else name
            )
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, path) from error
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
    _check_engine(recipe, path)
    _check_bench(recipe, path)
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


def _check_engine(recipe: Recipe, path: Path) -> None:
    network = recipe.network
    for variant in recipe.variants:
        if variant.dtype is not None and not isinstance(network, NetworkRecipe):
            raise PlanError(f"variant {variant.name!r}: dtype is for ONNX networks", file=path, found=variant.dtype)
    is_for_tensorrt = isinstance(network, NetworkRecipe) and network.target == "tensorrt"
    if recipe.engine is not None and not is_for_tensorrt:
        raise PlanError(
            "engine: TensorRT builds from a network of its own",
            file=path,
            expected="network: {target: tensorrt}",
        )


def _check_bench(recipe: Recipe, path: Path) -> None:
    """Refuse requests that no engine of the recipe will run: the benchmark itself is far behind the builds."""
    network, bench = recipe.network, recipe.bench
    if bench is None:
        return
    room: int | None
    batch: int | None
    if isinstance(network, TensorRtLlmRecipe):
        room, batch = network.max_seq_len, None
    else:
        room, batch = network.max_positions, network.batch or PRESETS[network.target].networks[0].batch
    if batch is not None and set(bench.batch) != {batch}:
        raise PlanError(
            "bench.batch: the networks have a fixed batch",
            file=path,
            expected=[batch],
            found=bench.batch,
            hint="give network.batch, and one recipe for each",
        )
    if room is not None and bench.longest > room:
        raise PlanError(
            "bench: input and output are longer than the networks' sequences",
            file=path,
            expected=f"at most {room} tokens",
            found=bench.longest,
            hint="give more network.max_positions, or max_seq_len for TensorRT-LLM",
        )


def _plan(value: Any, folder: Path, recipe: Path) -> Plan | Literal["auto"]:
    if value == "auto":
        return "auto"
    return read_plan(_found_from(folder, value)) if isinstance(value, str) else plan_from_data(value, recipe)


def _found_from(folder: Path, name: str) -> Path:
    """Where a path in a recipe leads, `folder` being the recipe's."""
    return folder / os.path.expanduser(name)
