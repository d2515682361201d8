"""Recipes and plans as files: what they become, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from commands.models import distill, quantize
from commands.studies import analyze
from commands.timing import bench
from engines.backends import BACKENDS
from exporter.errors import PlanError
from exporter.plan import Plan, plan_from_data, read_plan
from exporter.recipe import AnalysisRecipe, BenchRecipe, CalibrationRecipe, Recipe, read_recipe
from exporter.settings import record_of

ROOT = Path(__file__).parents[2]


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def read(folder: Path, text: str) -> Recipe:
    return read_recipe(written(folder, text), BACKENDS)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid(path: Path) -> None:
    assert read_recipe(path, BACKENDS).model.is_dir()


def test_paths_are_relative_to_the_recipe_and_plans_may_be_files(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "a.yaml").write_text("drop_attention: [1, [3, 5]]\ndrop_ffn: [[7, 8], 2]\nfuse: [[3, 5]]\n")
    recipe = read(
        tmp_path,
        "model: weights\nvariants: [{name: a, plan: plans/a.yaml}, {name: b, plan: {}, bench: false}]\n"
        "evaluate: {tasks: [some], include_path: tasks}\nbench: null\n",
    )
    assert recipe.model == tmp_path / "weights"
    assert recipe.variants[0].plan.dropped_layers == [1, 3, 4, 5]
    assert recipe.variants[0].plan.dropped_ffn_layers == [2, 7, 8]
    assert recipe.variants[0].plan.fuse == [(3, 5)]
    assert recipe.variants[1].plan == Plan()
    assert recipe.evaluate is not None
    assert (recipe.evaluate.text, recipe.evaluate.include_path) == (None, tmp_path / "tasks")
    assert recipe.bench is None
    assert recipe.baseline_name == "a"


def test_paths_may_begin_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "plan.yaml").write_text("drop_attention: [1]\n")
    (tmp_path / "home" / "format.yaml").write_text("weights: {dtype: int8, scale: row}\n")
    text = "model: ~/m\ncalibration: {text: ~/t}\nvariants: [{name: a, plan: ~/plan.yaml, quantize: ~/format.yaml}]\n"
    recipe = read(tmp_path, text)
    assert recipe.model == tmp_path / "home" / "m"
    assert recipe.calibration is not None
    assert recipe.calibration.text == tmp_path / "home" / "t"
    assert recipe.variants[0].plan == Plan(drop_attention=[1])
    assert read(tmp_path, "model: ~nobody-of-that-name/m\nvariants: [{name: a}]\n").model == (
        tmp_path / "~nobody-of-that-name" / "m"
    )


def test_a_distillation_has_the_options_and_defaults_of_the_command(tmp_path: Path) -> None:
    text = "model: m\nvariants: [{name: a, plan: {drop_ffn: [1]}, distill: {text: t, lr: 1e-4}}]\n"
    found = read(tmp_path, text).variants[0].distill
    assert found is not None
    assert found.text == tmp_path / "t"
    command = distill.make_context("distill", ["m", "--teacher", "m", "--text", "t", "-o", "o"])
    chosen = {option.opts[0]: command.params[option.name or ""] for option in distill.params}
    others = (
        "model",
        "--teacher",
        "--plan",
        "--norm",
        "--text",
        "--resume",
        "-o",
        "--output",
        "--force",
        "-q",
        "--quiet",
    )
    expected = {name[2:].replace("-", "_"): value for name, value in chosen.items() if name not in others}
    assert {name: value for name, value in found if name != "text"} == expected


SECTIONS: dict[str, tuple[BaseModel, click.Command, str, int]] = {
    "analysis": (AnalysisRecipe(text=Path("t")), analyze, "m --text t -o o", 7),
    "bench": (BenchRecipe(), bench, "e -o o", 9),
    "calibration": (CalibrationRecipe(text=Path("t")), quantize, "m --format fp8 --text t -o o", 3),
}


@pytest.mark.parametrize(("section", "command", "arguments", "shared"), SECTIONS.values(), ids=SECTIONS.keys())
def test_sections_have_the_defaults_of_commands(
    section: BaseModel, command: click.Command, arguments: str, shared: int
) -> None:
    chosen = command.make_context(command.name, arguments.split()).params
    found = {name: value for name, value in section if name in chosen and name not in ("text", "runtime")}
    assert len(found) == shared
    assert found == {name: chosen[name] for name in found}


CHOSEN: dict[str, tuple[str, str, list[tuple[str, dict[str, object], dict[str, object]]]]] = {
    "nothing": ("", "", [("onnxruntime", {"target": ["onnxruntime"], "dtype": None}, {})]),
    "nulls": (
        "network: {to: null, target: null, dtype: null}\nengine: {backend: null}",
        "network: {target: null}",
        [("onnxruntime", {"dtype": None}, {}), ("onnxruntime", {"dtype": None}, {})],
    ),
    "form_of_tensorrt": (
        "network: {target: tensorrt, dtype: bfloat16, batch: 2}",
        "network: {dtype: float16}",
        [
            ("tensorrt", {"target": ["tensorrt"], "dtype": "bfloat16", "batch": 2}, {"timing_cache": None}),
            ("tensorrt", {"target": ["tensorrt"], "dtype": "float16", "batch": 2}, {"timing_cache": None}),
        ],
    ),
    "backend_alone": (
        "engine: {backend: tensorrt, timing_cache: tactics, weight_streaming_budget: null, lean: true}",
        "engine: {builder_optimization_level: 5, lean: false}",
        [
            ("tensorrt", {"target": ["tensorrt"]}, {"timing_cache": "FOLDER/tactics", "lean": True}),
            ("tensorrt", {}, {"timing_cache": "FOLDER/tactics", "builder_optimization_level": 5, "lean": False}),
        ],
    ),
    "tensorrt_llm": (
        "network: {to: trtllm, tp: 4}\nengine: {max_batch: 3}",
        "network: {pp: 2}\n    engine: {max_seq_len: 512}",
        [
            ("tensorrt-llm", {"tp": 4, "pp": 1, "split_embedding": False}, {"max_batch": 3, "max_seq_len": 8192}),
            ("tensorrt-llm", {"tp": 4, "pp": 2}, {"max_batch": 3, "max_seq_len": 512}),
        ],
    ),
    "torch": (
        "engine: {backend: torch, dtype: float16, capacity: 64}",
        "engine: {plugins: wide_ffn, dtype: bfloat16}",
        [
            ("torch", {}, {"device": "cuda", "dtype": "float16", "plugins": [], "capacity": 64}),
            ("torch", {}, {"device": "cuda", "dtype": "bfloat16", "plugins": ["wide_ffn"], "capacity": 64}),
        ],
    ),
    "another_backend": (
        "network: {target: tensorrt, dtype: bfloat16, plugins: [wide_ffn]}\nengine: {max_input_len: 9}",
        "engine: {backend: torch}",
        [
            ("tensorrt", {"plugins": ["wide_ffn"]}, {"max_input_len": 9}),
            ("torch", {}, {"device": "cuda", "dtype": None, "capacity": None}),
        ],
    ),
    "another_form_of_onnx": (
        "network: {target: tensorrt, dtype: bfloat16, max_positions: 99}\nengine: {max_input_len: 9}",
        "engine: {backend: onnxruntime}\n    network: {dtype: float32}",
        [
            ("tensorrt", {"dtype": "bfloat16", "max_positions": 99}, {"max_input_len": 9}),
            ("onnxruntime", {"target": ["onnxruntime"], "dtype": "float32", "max_positions": 99}, {}),
        ],
    ),
    "back_from_torch": (
        "engine: {backend: torch, device: cpu}",
        "network: {to: trtllm, tp: 2}",
        [("torch", {}, {"device": "cpu"}), ("tensorrt-llm", {"tp": 2}, {"max_batch": 8})],
    ),
    "either_is_onnx": (
        "network: {target: tensorrt}",
        "network: {to: onnx, batch: 4}",
        [("tensorrt", {"batch": None}, {}), ("tensorrt", {"batch": 4}, {})],
    ),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_a_variants_own_keys_go_before_the_recipes(case: str, tmp_path: Path) -> None:
    shared, own, expected = CHOSEN[case]
    variants = f"variants:\n  - name: a\n  - name: b\n    {own}\n"
    recipe = read(tmp_path, f"model: m\n{shared}\n{variants}")
    for variant, (backend, network, engine) in zip(recipe.variants, expected, strict=False):
        assert variant.engine.name == backend
        found = {} if variant.network is None else record_of(variant.network.settings)
        assert {key: found[key] for key in network} == network
        found = record_of(variant.engine.settings)
        texts = {key: str(value).replace("FOLDER", str(tmp_path)) for key, value in engine.items()}
        assert {key: str(found[key]) for key in engine} == texts
        assert variant.network is None or variant.network.name == BACKENDS[backend].builds_from["to"]
        assert (variant.network is None) == (backend == "torch")


REFUSED = {
    "not_a_mapping": ("- a\n- b\n", "not a recipe: expected keys title, model, network"),
    "no_model": ("variants: [{name: a}]\n", "model: key is missing"),
    "misspelled_key": (
        "modle: m\nvariants: [{name: a}]\n",
        "modle: unknown key: expected one of title, model, network, .*, found m",
    ),
    "plan_of_a_variant": (
        "model: m\nvariants: [{name: a}, {name: b, plan: {fuse: [1, 2]}}]\n",
        r"variants.1.plan.fuse.0: expected a range of two layers, like \[3, 8\]: found 1",
    ),
    "no_plan": ("model: m\nvariants: [{name: a, plan: 3}]\n", "yaml: variants.0.plan: not a plan: expected keys drop_"),
    "too_many_variants": (
        f"model: m\nvariants: [{', '.join(f'{{name: v{i}}}' for i in range(65))}]\n",
        "variants: List should have at most 64 items after validation, not 65$",
    ),
    "format": (
        "model: m\nvariants: [{name: a, quantize: fp9}]\n",
        "recipe.yaml: unknown quantization format.*found fp9",
    ),
    "variant_after_what_is_none": (
        "model: m\nvariants: [1, {name: a, network: {foo: 1}}]\n",
        "variants.1.network.foo: unknown key",
    ),
    "nul": ('model: "a\\0b"\nvariants: [{name: a}]\n', "a text has a NUL character: found a"),
    "network_is_a_word": ("model: m\nnetwork: trtllm\nvariants: [{name: a}]\n", "network: "),
    "no_variants": ("model: m\nvariants: []\n", "variants: List should have at least 1 item"),
    "unknown_key": ("model: m\nvariants: [{name: a}]\nbatch: 1\n", "batch: unknown key"),
    "unknown_plan_key": (
        "model: m\nvariants: [{name: a, plan: {drop: [1]}}]\n",
        "drop: unknown key: expected one of drop_attention, ",
    ),
    "unknown_key_of_a_variant": (
        "model: m\nvariants: [{name: a}, {name: b, distill: {text: t, lrr: 1}}]\n",
        "variants.1.distill.lrr: unknown key: expected one of context, max_windows, text, epochs",
    ),
    "same_name": ("model: m\nvariants: [{name: a}, {name: a}]\n", "same name"),
    "name_is_no_folder": ("model: m\nvariants: [{name: ../a}]\n", r"variants.0.name: String should match"),
    "baseline": ("model: m\nvariants: [{name: a}]\nbaseline: b\n", "baseline is one of the variants"),
    "parallel_checkpoint": ("model: m\nvariants: [{name: a, plan: {parallel: [[0, 1]]}}]\n", "checkpoint: false"),
    "plan_file_missing": ("model: m\nvariants: [{name: a, plan: none.yaml}]\n", "none.yaml: cannot be read"),
    "text_for_a_number": ("model: m\nvariants: [{name: a}]\nbench: {rounds: '5'}\n", "bench.rounds: .*found 5"),
    "zero": ("model: m\nvariants: [{name: a}]\nbench: {batch: [0]}\n", "bench.batch.0: .*greater than 0"),
    "engine_of_another_network": (
        "model: m\nnetwork: {target: onnxruntime}\nvariants: [{name: a}]\nengine: {backend: tensorrt}\n",
        "network: tensorrt builds from another network: expected {to: onnx, target: tensorrt}, "
        "found {target: onnxruntime}",
    ),
    "engine_of_another_form": (
        "model: m\nvariants: [{name: a, network: {to: trtllm}, engine: {backend: tensorrt}}]\n",
        "variants.0.network: tensorrt builds from another network: expected {to: onnx, .*found {to: trtllm}",
    ),
    "network_for_nobody": (
        "model: m\nnetwork: {to: trtllm, target: tensorrt}\nvariants: [{name: a}]\n",
        "no backend builds from such a network: expected {to: onnx, .* or {to: hf}, found {to: trtllm, target: ten",
    ),
    "target": (
        "model: m\nnetwork: {target: tpu}\nvariants: [{name: a}]\n",
        "no backend builds from such a network: .*found {target: tpu}",
    ),
    "network_is_no_table": (
        "model: m\nvariants: [{name: a, network: [x]}]\n",
        "variants.0.network: a mapping of keys is wanted: found",
    ),
    "network_is_empty": ("model: m\nnetwork: []\nvariants: [{name: a}]\n", r"yaml: network: a mapping.* found \[\]"),
    "backend": (
        "model: m\nengine: {backend: [torch]}\nvariants: [{name: a}]\n",
        r"engine.backend: no such backend: expected one of onnxruntime, .*found \[",
    ),
    "network_for_torch": (
        "model: m\nengine: {backend: torch}\nvariants: [{name: a, network: {dtype: float16}}]\n",
        "variants.0.network.dtype: the engine is built from a Hugging Face folder",
    ),
    "shared_network_for_torch": (
        "model: m\nengine: {backend: torch}\nnetwork: {batch: 1}\nvariants: [{name: a}]\n",
        "yaml: network.batch: the engine is built from a Hugging Face folder",
    ),
    "nothing_to_run": (
        "model: m\nengine: {backend: torch}\nvariants: [{name: a, plan: {parallel: [[0, 1]]}, checkpoint: false}]\n",
        "variant 'a': without a checkpoint there is nothing that torch could run",
    ),
    "engine_that_is_not_built": (
        "model: m\nevaluate: {text: t}\nvariants: [{name: a}, {name: b, bench: false, engine: {backend: torch}}]\n",
        "variants.1.bench: with `false` there is no engine",
    ),
    "dtype_of_another_target": (
        "model: m\nnetwork: {to: trtllm}\nvariants: [{name: a, network: {dtype: float16}}]\n",
        "variants.0.network.dtype: unknown key",
    ),
    "network_dtype": (
        "model: m\nnetwork: {dtype: float64}\nvariants: [{name: a}]\n",
        "network.dtype: Input should be 'float32', 'float16' or 'bfloat16': found float64",
    ),
    "engine_option": (
        "model: m\nvariants: [{name: a}]\nengine: {backend: tensorrt, optimization: 3}\n",
        "engine.optimization: unknown key: expected one of max_batch, max_input_len",
    ),
    "engine_option_of_a_variant": (
        "model: m\nvariants: [{name: a, engine: {backend: tensorrt, lean: 1}}]\n",
        "variants.0.engine.lean: Input should be a valid boolean: found 1",
    ),
    "engine_range": (
        "model: m\nvariants: [{name: a}]\nengine: {backend: tensorrt, builder_optimization_level: 6}\n",
        "engine.builder_optimization_level: .*less than or equal to 5",
    ),
    "option_of_a_backend_without": (
        "model: m\nvariants: [{name: a}]\nengine: {backend: onnxruntime, capacity: 3}\n",
        "engine.capacity: unknown key: found 3. The backend is onnxruntime",
    ),
    "option_of_another_backend": (
        "model: m\nvariants: [{name: a}, {name: b, engine: {backend: torch, lean: true}}]\n"
        "engine: {backend: tensorrt, lean: true}\n",
        "variants.1.engine.lean: unknown key",
    ),
    "no_requests": (
        "model: m\nvariants: [{name: a}]\nbench: {input_len: []}\n",
        "bench.input_len: List should have at least 1 item",
    ),
    "name_of_a_step": ("model: m\nvariants: [{name: a}, {name: report}]\n", "name of a step's folder: found report"),
    "not_yaml": ("model: [\n", "not valid YAML"),
    "nothing_to_evaluate_on": ("model: m\nvariants: [{name: a}]\nevaluate: {context: 9}\n", "nothing to evaluate on"),
    "only_evaluated": ("model: m\nvariants: [{name: a}, {name: b, bench: false}]\n", "needs a section `evaluate`"),
    "untimed_baseline": (
        "model: m\nvariants: [{name: a, bench: false}, {name: b}]\nevaluate: {text: t}\n",
        "baseline cannot go without a benchmark",
    ),
    "tasks_without_folder": (
        "model: m\nvariants: [{name: b, plan: {drop_ffn: [1]}, checkpoint: false}]\nevaluate: {tasks: [x]}\n",
        "variant 'b': tasks are run on a Hugging Face folder",
    ),
    "predicted_without_a_report": (
        "model: m\nvariants: [{name: a}]\nbench: null\npredict: {gpu: [h100-sxm]}\n",
        "predict: .* without `bench` there is none",
    ),
    "auto": ("model: m\nvariants: [{name: a, plan: auto}]\n", "needs a section `analysis`"),
    "distilled_without_plan": (
        "model: m\nvariants: [{name: a, distill: {text: t}}]\n",
        "variant 'a': what is distilled .* there is no plan",
    ),
    "distilled_without_folder": (
        "model: m\nvariants: [{name: a, plan: {drop_ffn: [1]}, checkpoint: false, distill: {text: t}}]\n",
        "variant 'a': what is distilled is written as a Hugging Face folder",
    ),
    "quantized_without_folder": (
        "model: m\ncalibration: {text: t}\nvariants: [{name: a, checkpoint: false, quantize: fp8}]\n",
        "variant 'a': what is quantized is written as a Hugging Face folder",
    ),
    "quantized_without_calibration": (
        "model: m\nvariants: [{name: a, quantize: fp8}]\n",
        "variant 'a': quantize needs a section `calibration`",
    ),
    "distilled_without_text": ("model: m\nvariants: [{name: a, distill: {}}]\n", "distill.text: key is missing"),
    "rate": ("model: m\nvariants: [{name: a, distill: {text: t, lr: .inf}}]\n", "distill.lr: .*finite"),
    "alias": ("model: &m x\nvariants: [{name: *m}]\n", "aliases"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_recipe_is_refused(case: str, tmp_path: Path) -> None:
    text, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("drop_attention: [1.5]\n", "drop_attention.0", id="float"),
        pytest.param("drop_attention: [-1]\n", "drop_attention.0", id="negative"),
        pytest.param("fuse: [[1, 2, 3]]\n", "fuse.0", id="three"),
        pytest.param("fuse: [3]\n", r"fuse.0: expected a range of two layers, like \[3, 8\]: found 3", id="no_range"),
        pytest.param("drop_ffn: [3-5]\n", "drop_ffn.0: expected a layer, or a range .*found 3-5", id="dash"),
        pytest.param(
            "fuse: [[1, 99999999]]\n", "fuse.0: expected a layer, a whole number from 0 to 65535: found", id="huge"
        ),
        pytest.param("drop_ffn: [[1, -2]]\n", r"drop_ffn.0: expected a layer.* found \[1, -2\]", id="negative_end"),
        pytest.param("drop_ffn: [yes]\n", "drop_ffn.0: expected a layer, .*found true", id="boolean"),
        pytest.param("drop_ffn: 3-5\n", "drop_ffn: expected a list in brackets, of ranges .*found 3-5", id="no_list"),
        pytest.param("", "not a plan", id="empty"),
        pytest.param("fuse: {a: 1}\n", "fuse: expected a list in brackets", id="mapping"),
        pytest.param("fuse: [[1, 2]]\nfuse: []\n", "key 'fuse' occurs twice", id="repeated_key"),
        pytest.param("fuse: " + "[" * 200_000, "nested too deeply", id="deep"),
    ],
)
def test_a_malformed_plan_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        read_plan(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("drop_attention: [[5, 3]]", r"lower to its higher layer: found \[5, 3\]", id="reversed"),
        pytest.param("drop_attention: [4, [3, 5]]", r"twice in drop_attention: found \[3, 5\]", id="twice"),
        pytest.param("drop_ffn: [4, [3, 5]]", r"twice in drop_ffn: found \[3, 5\]", id="ffn_twice"),
        pytest.param(f"drop_ffn: {[[0, 65535]] * 9000}", "listed twice", id="thousands_of_times"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(text: str, message: str, tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path, text))
    with pytest.raises(PlanError, match=message):
        _ = plan.dropped_layers + plan.dropped_ffn_layers


def test_a_plan_as_json_is_the_plan(tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path, "drop_attention: [1, [3, 5]]\ndrop_ffn: [[7, 8]]\nfuse: [[3, 5]]\n"))
    data = plan.model_dump(mode="json")
    assert data == {"drop_attention": [1, [3, 5]], "drop_ffn": [[7, 8]], "fuse": [[3, 5]], "parallel": []}
    assert plan_from_data(data) == plan


def test_errors_show_control_characters_instead_of_sending_them_to_the_terminal() -> None:
    assert str(PlanError("bad \x1b[2J name", found="a\rb")) == "bad \\x1b[2J name: found a\\rb"
