"""A recipe's run: what it refuses before its first step, and the steps that no test of the command line has."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import engines.run
from engines.backends import BACKENDS
from engines.base import read_engine_manifest
from engines.run import dry_run_recipe, run_recipe
from engines.run_engines import engine_step
from exporter.distill import _Trainer
from exporter.errors import FuselageError, OutputError
from exporter.read import open_model
from exporter.recipe import Recipe, read_recipe
from exporter.recipe_engines import Choice
from exporter.writers import hf
from exporter.writers.files import read_manifest, save_folder
from tests.checkpoints import word_tokenizer
from tests.command_line import done
from tests.exporter.test_distill import everything
from tests.tiny import tiny_graph

ROOT = Path(__file__).parents[2]


def save_model(folder: Path, pattern: str, width: int = 256) -> None:
    graph = tiny_graph(pattern, intermediate_size=width)
    save_folder(folder, hf.emit(graph, hf.Options()), kind="checkpoint", details={})
    word_tokenizer(folder, 320)


def recipe_of(keys: dict[str, Any]) -> Recipe:
    """Write a recipe into the current folder, and read it."""
    Path("recipe.json").write_text(json.dumps(keys))  # which is YAML
    return read_recipe(Path("recipe.json"), BACKENDS)


VARIANTS = [{"name": "a"}, {"name": "b", "plan": "auto"}]


def distilling(plan: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A recipe's keys for one variant that is distilled."""
    plan = {"drop_attention": [0]} if plan is None else plan
    return {"variants": [{"name": "a", "plan": plan, "distill": {"text": "text.txt", **options}}]}


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "text_missing": ({"evaluate": {"text": "nowhere.txt"}}, "out", "nowhere.txt: no such text"),
    "calibration_missing": ({"calibration": {"text": "nowhere.txt"}}, "out", "nowhere.txt: no such text"),
    "too_many_drops": ({"analysis": {"text": "text.txt", "drop": 3}}, "out", "fewer attentions to drop"),
    "no_tokenizer": ({"model": "bare", "evaluate": {"text": "text.txt"}}, "out", "no tokenizer.json"),
    "output_in_the_model": ({}, "model/out", "inside each other"),
    "model_in_a_step": ({"model": "out/report"}, "out", "inside each other"),
    "model_in_a_variant": ({"model": "out/a/checkpoint"}, "out", "inside each other"),
    "nothing_left": (
        {"variants": [{"name": "a"}, {"name": "b", "plan": {"drop_attention": [0, 2], "drop_ffn": [0, 1, 2]}}]},
        "out",
        "no layer to write",
    ),
    "network_of_any_plan": (
        {"variants": [{"name": "a"}, {"name": "b", "plan": "auto", "network": {"max_positions": 513}}]},
        "out",
        "variant 'b': max_positions does not fit the model: expected 1 to 512, found 513",
    ),
    "plan_that_does_not_fit": (
        {"variants": [{"name": "a"}, {"name": "b", "plan": {"fuse": [[0, 1]]}}]},
        "out",
        "variant 'b': fuse: the run contains an attention, in layer 0",
    ),
    "requests_too_long": ({"bench": {"input_len": [500], "output_len": [13]}}, "out", "at most 512 tokens, found 513"),
    "requests_longer_than_the_network": (
        {"network": {"max_positions": 100}, "bench": {"input_len": [9, 90], "output_len": [11, 1]}},
        "out",
        "variant 'a': bench: .*longer than a sequence of its engine may be: expected at most 100 tokens, found 101",
    ),
    "requests_longer_than_a_trtllm_engine": (
        {"network": {"to": "trtllm"}, "engine": {"max_seq_len": 64}},
        "out",
        "expected at most 64 tokens, found 96",
    ),
    "requests_longer_than_the_cache": (
        {"engine": {"backend": "torch", "device": "cpu", "capacity": 50}},
        "out",
        "expected at most 50 tokens, found 96",
    ),
    "fixed_batch": (
        {"network": {"target": "tensorrt", "batch": 2}, "bench": {"batch": [1, 2]}},
        "out",
        r"variant 'a': bench.batch: its engine has a fixed batch: expected \[2\], found \[1, 2\]",
    ),
    "fixed_batch_of_a_variant": (
        {"variants": [{"name": "a"}, {"name": "b", "network": {"batch": 2}}]},
        "out",
        r"variant 'b': bench.batch: its engine has a fixed batch: expected \[2\], found \[1\]",
    ),
    "large_batch": (
        {"network": {"to": "trtllm"}, "engine": {"max_batch": 2}, "bench": {"batch": [1, 3]}},
        "out",
        "variant 'a': .*takes fewer sequences: expected at most 2, found 3.* Give engine.max_batch",
    ),
    "plugin_in_float32": (
        {"engine": {"backend": "torch", "plugins": "wide_ffn", "dtype": "float32"}},
        "out",
        "the wide-FFN op computes in bfloat16",
    ),
    "plugin_with_long_prompts": (
        {"network": {"target": "tensorrt", "dtype": "bfloat16", "plugins": "wide_ffn"}},
        "out",
        "nodes of plugins, .* expected at most 64 tokens of all sequences in one call, found 512",
    ),
    "settings_of_a_builder": (
        {"engine": {"backend": "tensorrt", "max_input_len": 513}},
        "out",
        "max_input_len is more than a sequence may have: expected at most 512, found 513",
    ),
    "settings_of_trtllm_that_do_not_fit": (
        {"network": {"to": "trtllm"}, "engine": {"low_latency": True}},
        "out",
        "the low-latency GEMM plugin is for FP8: expected FP8, found bfloat16",
    ),
    "profile_of_torch": (
        {"engine": {"backend": "torch"}, "bench": {"profile": True}},
        "out",
        "cannot be profiled: expected .*, found torch",
    ),
    "format_unknown_to_a_gpu": (
        {
            "variants": [{"name": "a"}, {"name": "b", "quantize": "fp8"}],
            "calibration": {"text": "text.txt"},
            "predict": {"gpu": ["h100-sxm", "a100-80gb"]},
        },
        "out",
        "no matrix products in float8_e4m3fn",
    ),
    "sizes_that_divide_no_heads": (
        {"predict": {"gpu": ["h100-sxm"], "tp": [1, 3]}},
        "out",
        r"block 0: .* divides the attention heads \(predict.tp\): expected a divisor of 4, found 3",
    ),
    "distillation_text_missing": (distilling(text="nowhere.txt"), "out", "nowhere.txt: no such text"),
    "distillation_context": (distilling(context=5000), "out", "longer than the model was made for"),
    "distillation_pieces": (distilling(batch=4, accumulate=3), "out", "expected a multiple of 3, found 4"),
    "distillation_warmup": (distilling(steps=3, warmup=3), "out", "leaves no steps to train"),
    "distillation_warmup_of_an_epoch": (distilling(max_windows=16, warmup=2), "out", "leaves no steps to train"),
    "distillation_layer": (distilling(blocks=[[1, 3]]), "out", "layer 3 is not in the model"),
    "distillation_of_nothing": (distilling({"drop_attention": [0], "drop_ffn": [0]}, blocks=[0]), "out", "are empty"),
}


@pytest.mark.parametrize("carry_out", [run_recipe, dry_run_recipe])
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_known_beforehand_is_refused_beforehand(
    case: str, carry_out: Callable[[Recipe, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, output, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(engines.run, "missing_runtimes", lambda recipe, backends: [])
    save_folder(Path("bare"), hf.emit(tiny_graph("AF F AF"), hf.Options()), kind="checkpoint", details={})
    save_model(Path("model"), "AF F AF")
    Path("text.txt").write_text("w1 w2 w3 " * 50)
    defaults = {"model": "model", "variants": VARIANTS, "analysis": {"text": "text.txt"}}
    recipe = recipe_of(defaults | keys)
    before = sorted(os.walk(tmp_path))
    with pytest.raises(FuselageError, match=message):
        carry_out(recipe, Path(output))
    assert sorted(os.walk(tmp_path)) == before


LACKING: dict[str, tuple[dict[str, Any], str]] = {
    "gpu": (distilling(device="cuda"), "a CUDA device of its own: expected at least 1, found 0"),
    "runtime": ({"network": {"to": "trtllm"}, "bench": None}, "TensorRT-LLM"),
    "gpu_of_an_engine": (
        {"engine": {"backend": "torch"}, "bench": None},
        "PyTorch sees no GPU to run",
    ),
    "runtime_of_a_variant": (
        {
            "variants": [
                {"name": "a"},
                {"name": "b", "network": {"to": "trtllm"}},
                {"name": "c", "network": {"to": "trtllm"}},
            ]
        },
        "TensorRT-LLM",
    ),
    "compiler": ({"bench": {"runtime": "cpp"}}, "there is no C\\+\\+ compiler .* Use --runtime python"),
    "harness": ({"evaluate": {"tasks": ["hellaswag"]}}, "lm-evaluation-harness is not installed"),
}


@pytest.mark.parametrize("case", LACKING)
def test_what_a_machine_lacks_stops_a_run_and_not_a_dry_one(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, message = LACKING[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    for module in ("lm_eval", "tensorrt_llm"):
        monkeypatch.setitem(sys.modules, module, None)
    save_model(Path("model"), "AF F AF")
    Path("text.txt").write_text("w1 w2 w3 " * 50)
    recipe = recipe_of({"model": "model", "variants": [{"name": "a"}], **keys})
    before = sorted(os.walk(tmp_path))
    (problem,) = dry_run_recipe(recipe, Path("out")).missing
    assert re.search(message, str(problem))
    with pytest.raises(FuselageError, match=message):
        run_recipe(recipe, Path("out"))
    assert sorted(os.walk(tmp_path)) == before


def engine_key(backend: str, **chosen: Any) -> str:
    kind = BACKENDS[backend]
    settings = kind.settings(**chosen) if kind.settings is not None else None
    variant: Any = SimpleNamespace(
        name="a",
        folder=Path("a"),
        key={},
        checkpoint=SimpleNamespace(path=Path("model")),
        recipe=SimpleNamespace(engine=Choice(backend, settings)),
    )
    return engine_step(kind.make(settings, None), variant, None).key


@pytest.mark.parametrize(
    ("backend", "of_machine", "of_engine"),
    [
        ("tensorrt", {"timing_cache": Path("tactics"), "ignore_memory": True}, {"lean": True}),
        ("tensorrt-llm", {"workers": 1}, {"max_seq_len": 64}),
        ("torch", {}, {"device": "cpu"}),
    ],
)
def test_an_engine_is_built_again_where_it_would_be_another(
    backend: str, of_machine: dict[str, Any], of_engine: dict[str, Any]
) -> None:
    assert engine_key(backend, **of_machine) == engine_key(backend)
    assert engine_key(backend, **of_engine) != engine_key(backend)


PLAN = "drop_attention: [1, 2]\nfuse: [[1, 2]]\n"
TRAINING = {"text": "text.txt", "context": 16, "steps": 6, "batch": 4, "lr": 3e-3, "temperature": 2.0, "save_every": 2}
RECIPE = f"""
model: model
calibration: {{text: text.txt, context: 16}}
variants:
  - name: trained
    plan: plan.yaml
    distill: {json.dumps(TRAINING)}
  - name: rounded
    plan: plan.yaml
    distill: {json.dumps({**TRAINING, "blocks": [[1, 2], 3]})}
    quantize: int8-smoothquant
evaluate: {{text: text.txt, context: 16}}
bench: null
"""
STEPS = [
    "trained: distillation",
    "trained: network",
    "trained: engine",
    "trained: evaluation",
    "rounded: distillation",
    "rounded: calibration",
    "rounded: quantization",
    "rounded: checkpoint",
    "rounded: network",
    "rounded: engine",
    "rounded: evaluation",
]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with two variants that are distilled, in the current folder."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"), "AF AF AF AF AF", width=200)  # Nemotron-NAS folders pad it
    words = np.random.default_rng(0).integers(0, 320, 800)
    Path("text.txt").write_text(" ".join(f"w{word}" for word in words))
    Path("plan.yaml").write_text(PLAN)
    Path("recipe.yaml").write_text(RECIPE)
    return Path("recipe.yaml")


def steps_made(recipe: Path) -> list[str]:
    """Run a recipe; returns the steps that were made now."""
    made: list[str] = []
    run_recipe(read_recipe(recipe, BACKENDS), Path("out"), notify=lambda step, now: made.append(step) if now else None)
    return made


def steps_foreseen(recipe: Path) -> list[str]:
    """The steps that a dry run says would be made."""
    return [step.name for step in dry_run_recipe(read_recipe(recipe, BACKENDS), Path("out")).steps if not step.is_there]


CHANGES = [  # before, after, steps that are made again
    ("evaluate: {text: text.txt, context: 16}", "evaluate: {text: text.txt, context: 12}", [STEPS[3], STEPS[10]]),
    ("int8-smoothquant", "fp8", STEPS[6:]),
    ("bench: null", "bench: {rounds: 1, output_len: [2], runtime: python}", ["benchmark", "results", "report"]),
]


def test_a_dry_run_foresees_the_steps_and_their_sizes(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreseen = dry_run_recipe(read_recipe(recipe, BACKENDS), Path("out")).steps
    assert [(step.name, step.is_there) for step in foreseen] == [(name, False) for name in STEPS]
    assert not Path("out").exists()
    assert steps_made(recipe) == STEPS
    before = sorted(os.walk("out"))
    found = dry_run_recipe(read_recipe(recipe, BACKENDS), Path("out"))
    assert sorted(os.walk("out")) == before
    assert [(step.name, step.is_there) for step in found.steps] == [(name, True) for name in STEPS]
    assert [step.total_bytes for step in found.steps] == [step.total_bytes for step in foreseen]
    assert [variant.name for variant in found.variants] == ["trained", "rounded"]
    for step in found.steps:
        manifest = read_manifest(Path("out") / step.name.replace(": ", "/"))
        if step.total_bytes is not None and manifest is not None:
            files = {name: entry.bytes for name, entry in manifest.files.items() if name != "distill.json"}
            assert step.total_bytes == sum(files.values()), step.name
    assert [step.name for step in found.steps if step.total_bytes] == [
        "trained: distillation",
        "trained: network",
        "rounded: distillation",
        "rounded: checkpoint",
        "rounded: network",
    ]
    for old, new, made_again in CHANGES:
        recipe.write_text(recipe.read_text().replace(old, new))
        assert steps_foreseen(recipe) == made_again
        assert steps_made(recipe) == made_again
    monkeypatch.chdir(Path.cwd().rename(tmp_path.with_name(f"{tmp_path.name}-moved")))
    assert steps_foreseen(recipe) == []


def test_a_disk_without_room_is_known_beforehand(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and networks, each beside what it replaces; the engine of the torch backend would be links."""
    recipe.write_text("model: model\nvariants: [{name: a, plan: plan.yaml}]\nbench: null\n")
    steps = dry_run_recipe(read_recipe(recipe, BACKENDS), Path("out")).steps
    needed = sum(step.total_bytes or 0 for step in steps)
    room = SimpleNamespace(free=needed)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: room)
    room.free -= 1
    (problem,) = dry_run_recipe(read_recipe(recipe, BACKENDS), Path("out")).missing
    assert problem.problem == "not enough disk space for the models and networks of the recipe"
    with pytest.raises(OutputError, match="not enough disk space for"):
        steps_made(recipe)
    assert not Path("out").exists()
    room.free += 1
    assert steps_made(recipe) == ["a: checkpoint", "a: network", "a: engine"]
    room.free = 0
    assert steps_made(recipe) == []
    Path("plan.yaml").write_text("drop_attention: [1, 2]\n")  # without fusing: as many bytes but for the norms
    larger = max(step.total_bytes or 0 for step in steps)
    room.free = larger - 1
    with pytest.raises(OutputError, match="not enough disk space for the models"):
        steps_made(recipe)
    room.free = larger + 10_000
    assert steps_made(recipe) == ["a: checkpoint", "a: network", "a: engine"]


def test_a_dry_run_does_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    variants = [{"name": "source"}, {"name": "fused", "plan": {"fuse": [[42, 50], [53, 69]]}}]
    model = ROOT / "tests/data/nemotron-super-49b.structure.json"
    network = {"target": "tensorrt", "dtype": "bfloat16"}
    recipe = recipe_of({"model": str(model), "network": network, "variants": variants, "bench": None})
    found = dry_run_recipe(recipe, tmp_path / "out")
    fused = found.variants[1].structure
    assert fused is not None
    assert len(fused.blocks) == 80 - 8 - 16
    assert [step.name for step in found.steps if step.total_bytes is not None] == [
        "source: network",
        "fused: checkpoint",
        "fused: network",
    ]
    for step in found.steps:
        assert step.total_bytes is None or step.total_bytes == pytest.approx(2 * fused.num_parameters, rel=1e-3)
    with pytest.raises(FuselageError, match=r"TensorRT cannot be imported|structure without weights"):
        run_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_ends_where_a_plan_is_yet_to_be_suggested(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = {"analysis": {"text": "text.txt", "drop": 1}, "variants": [{"name": "a"}, {"name": "b", "plan": "auto"}]}
    recipe.write_text(
        json.dumps({"model": "model", **auto, "bench": {"rounds": 1, "output_len": [2], "runtime": "python"}})
    )
    first = dry_run_recipe(read_recipe(recipe, BACKENDS), Path("out"))
    assert [step.name for step in first.steps] == ["analysis", "a: network", "a: engine", "benchmark", "report"]
    assert [variant.structure is None for variant in first.variants] == [False, True]
    made = steps_made(recipe)
    then = dry_run_recipe(read_recipe(recipe, BACKENDS), Path("out"))
    assert [step.name for step in then.steps] == made
    assert all(step.is_there for step in then.steps)
    monkeypatch.chdir(Path.cwd().rename(tmp_path.with_name(f"{tmp_path.name}-moved")))
    assert steps_foreseen(recipe) == []
    assert None not in [variant.structure for variant in then.variants]


def assert_same_model(found: Path, expected: Path) -> None:
    ours, theirs = (everything(open_model(folder, need_weights=True).graph) for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_a_variant_is_distilled_and_quantized_as_the_commands_would_do_it(recipe: Path) -> None:
    assert steps_made(recipe) == STEPS
    assert steps_made(recipe) == []
    out = Path("out")
    assert sorted(path.name for path in out.iterdir()) == ["rounded", "trained"]  # no ranges of the original
    options = [("--" + name.replace("_", "-"), value) for name, value in TRAINING.items()]
    command = ["distill", "model", "--teacher", "model", "--plan", "plan.yaml", *(x for pair in options for x in pair)]
    done(*command, "-o", "a")
    assert_same_model(out / "trained" / "distilled", Path("a"))
    record = json.loads((out / "trained" / "distilled" / "distill.json").read_text())
    assert record["context"] == 16
    assert not {"step", "step_key"} & record.keys()  # else the same weights would be another model to later steps
    done(*command, "--blocks", "1-2,3-3", "-o", "b")
    assert_same_model(out / "rounded" / "distilled", Path("b"))
    text = ["--text", "text.txt", "--context", 16]
    done("quantize", "b", "--format", "int8-smoothquant", *text, "-o", "c")
    assert_same_model(out / "rounded" / "checkpoint", Path("c"))
    done("evaluate", "c", "--reference", "model", *text, "-o", "c.json")
    found, expected = (
        json.loads(path.read_text()) for path in (out / "rounded/evaluation/evaluation.json", Path("c.json"))
    )
    assert found["kl_divergence"] == expected["kl_divergence"]


def test_an_interrupted_distillation_goes_on_from_its_last_save(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_made(recipe)
    Path("out").rename("expected")
    taken: list[int] = []
    take_step = _Trainer.step

    def step(trainer: _Trainer, number: int, windows: np.ndarray) -> tuple[float, float]:
        taken.append(number)
        if taken == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return take_step(trainer, number, windows)

    def remove_run(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        steps_made(recipe)
    assert [path.name for path in Path("out/trained").iterdir()] == ["distilling"]
    with monkeypatch.context() as patch:
        patch.setattr("exporter.distill_state.remove_run", remove_run)
        with pytest.raises(KeyboardInterrupt):
            steps_made(recipe)
    assert taken == [0, 1, 2, 3, 4, 4, 5]
    Path("out/trained/distilling/.run.json.partial-1").touch()  # as a killed run leaves it
    assert steps_made(recipe) == STEPS[1:]
    assert not [path for path in Path("out").rglob("*") if path.name.startswith(("distilling", "."))]
    assert_same_model(Path("out/trained/distilled"), Path("expected/trained/distilled"))


def test_a_saved_run_of_other_settings_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "check_weights", Mock(side_effect=[None, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            steps_made(recipe)
    recipe.write_text(recipe.read_text().replace('"lr": 0.003', '"lr": 1e-3'))
    with pytest.raises(FuselageError, match=r"distilling: .* belongs to another run.* or remove this one"):
        steps_made(recipe)


@pytest.mark.parametrize("changes", [{"lr": 1e-3}, {"save_every": 3, "recompute": True, "accumulate": 2}])
def test_what_only_the_machine_sees_does_not_train_again(recipe: Path, changes: dict[str, Any]) -> None:
    recipe.write_text(RECIPE[: RECIPE.index("  - name: rounded")] + "bench: null\n")
    assert steps_made(recipe) == STEPS[:3]
    changed = json.dumps({**TRAINING, **changes})
    recipe.write_text(recipe.read_text().replace(json.dumps(TRAINING), changed))
    assert steps_made(recipe) == (STEPS[:3] if "lr" in changes else [])


SUGGESTED = "drop_attention: [1]\n"
COPY = r"Copy it beside the recipe, name it there \(`plan: plan.yaml`\), and remove the folder"
EDITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "longer": (
        lambda folder: (folder / "plan.yaml").write_text(SUGGESTED + "fuse: [[1, 2]]\n"),
        rf"plan.yaml: the file was changed by hand.*{COPY}",
    ),
    "as_long": (
        lambda folder: (folder / "plan.yaml").write_text(SUGGESTED.replace("1", "2")),
        rf"plan.yaml: the file was changed by hand.*{COPY}",
    ),
    "another_file": (
        lambda folder: (folder / "dependency.json").write_text("[]"),
        r"dependency.json: the file was changed by hand.*Keep a copy elsewhere, and remove the folder",
    ),
    "added": (
        lambda folder: (folder / "mine.yaml").write_text(SUGGESTED),
        r"mine.yaml: the file was added by hand.*Move it elsewhere",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_file_that_people_edited_is_neither_lost_nor_believed(case: str, recipe: Path) -> None:
    edit, message = EDITS[case]
    folder = Path("out/analysis")
    files = [("plan.yaml", SUGGESTED.encode()), ("dependency.json", b"{}")]
    save_folder(folder, files, kind="analysis", details={})
    edit(folder)
    before = sorted((path, path.read_bytes()) for path in folder.iterdir())
    with pytest.raises(OutputError, match=message):
        steps_made(recipe)
    assert sorted((path, path.read_bytes()) for path in folder.iterdir()) == before
    assert [path.name for path in Path("out").iterdir()] == ["analysis"]


@pytest.mark.parametrize("carry_out", [run_recipe, dry_run_recipe])
@pytest.mark.parametrize("is_link", [False, True])
def test_what_is_in_the_way_of_a_step_is_said_before_its_work(
    is_link: bool, carry_out: Callable[[Recipe, Path], object], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_folder(Path("out/analysis"), [("plan.yaml", SUGGESTED.encode())], kind="analysis", details={})
    Path("elsewhere").mkdir()
    Path("out/trained").mkdir()
    if is_link:
        Path("out/trained/distilled").symlink_to(Path("elsewhere").absolute())
    else:
        Path("out/trained/distilled").mkdir()
    monkeypatch.setattr("exporter.distill.distill", Mock(side_effect=AssertionError))
    with pytest.raises(
        OutputError, match=rf"distilled: refusing to replace {'a link' if is_link else 'what Fuselage'}"
    ):
        carry_out(read_recipe(recipe, BACKENDS), Path("out"))


QUANTIZED = """
model: model
calibration: {text: text.txt, context: 16}
variants: [{name: a, quantize: int8.yaml, bench: false}]
evaluate: {text: other.txt, context: 16}
bench: null
"""
INT8 = """
weights: {dtype: int8, scale: row}
inputs: {dtype: int8, scale: token}
kv_cache: float8_e4m3fn
"""
# What a change makes again, though what the step before writes is the same byte by byte.
QUANTIZED_AGAIN: dict[str, tuple[str, str, str, list[str]]] = {
    "last_window": ("text.txt", " last", " other", ["calibration", "a: quantization"]),
    "kv_cache": ("int8.yaml", "kv_cache: float8_e4m3fn", "", ["a: quantization", "a: checkpoint"]),
    "kv_range": (
        "recipe.yaml",
        "16}\nv",
        "16, percentile: 60}\nv",
        ["calibration", "a: quantization", "a: checkpoint"],
    ),
}


@pytest.mark.parametrize("case", QUANTIZED_AGAIN)
def test_what_changes_a_quantized_model_makes_it_again(case: str, recipe: Path) -> None:
    file, before, after, again = QUANTIZED_AGAIN[case]
    recipe.write_text(QUANTIZED)
    Path("int8.yaml").write_text(INT8)
    Path("other.txt").write_text(Path("text.txt").read_text())
    Path("text.txt").write_text(Path("text.txt").read_text().rpartition(" ")[0] + " last")
    assert steps_made(recipe) == ["calibration", "a: quantization", "a: checkpoint", "a: evaluation"]
    Path(file).write_text(Path(file).read_text().replace(before, after))
    assert steps_made(recipe)[: len(again)] == again


def test_a_file_that_people_removed_is_made_again(recipe: Path) -> None:
    recipe.write_text("model: model\nvariants: [{name: a}]\nbench: null\n")
    assert steps_made(recipe) == ["a: network", "a: engine"]
    assert steps_made(recipe) == []
    Path("out/a/engine/engine.json").unlink()
    assert steps_made(recipe) == ["a: engine"]


@pytest.mark.parametrize(
    ("what", "other"), [("onnxruntime.__version__", "99.0"), ("engines.onnxruntime.cpu_name", lambda: "other CPU")]
)
def test_an_engine_of_another_version_or_machine_is_made_again(
    what: str, other: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.write_text("model: model\nvariants: [{name: a}]\nbench: null\n")
    steps_made(recipe)
    monkeypatch.setattr(what, other)
    assert steps_foreseen(recipe) == ["a: engine"]
    assert steps_made(recipe) == ["a: engine"]
    assert steps_made(recipe) == []


ENGINES = """
model: model
engine: {backend: torch, device: cpu, dtype: float32}
calibration: {text: text.txt, context: 16}
variants:
  - {name: plain}
  - {name: fused, plan: plan.yaml}
  - {name: capped, plan: plan.yaml, engine: {capacity: 32}}
  - {name: onnx, plan: plan.yaml, engine: {backend: onnxruntime}, network: {plugins: wide_ffn}}
  - {name: int8, quantize: int8-smoothquant}
  - {name: int8-capped, quantize: int8-smoothquant, engine: {capacity: 32}}
evaluate: {text: text.txt, context: 16, max_windows: 2}
bench: {rounds: 1, input_len: [4], output_len: [2], runtime: python}
"""


def test_variants_with_engines_of_their_own_share_their_other_steps(recipe: Path) -> None:
    recipe.write_text(ENGINES)
    foreseen = dry_run_recipe(read_recipe(recipe, BACKENDS), Path("out"))
    assert [variant.backend for variant in foreseen.variants] == [*["torch"] * 3, "onnxruntime", *["torch"] * 2]
    forms = [variant.engine for variant in foreseen.variants if variant.engine is not None]
    assert [(form.dtype, form.plugins, form.max_positions) for form in forms] == [
        ("float32", (), 512),
        ("float32", (), 512),
        ("float32", (), 32),
        ("float32", ("wide_ffn",), 512),
        ("float32", (), 512),
        ("float32", (), 32),
    ]
    made = steps_made(recipe)
    assert made == [step.name for step in foreseen.steps]
    assert made == [
        "calibration",
        *("plain: engine", "plain: evaluation"),
        *("fused: checkpoint", "fused: engine", "fused: evaluation"),
        "capped: engine",
        *("onnx: network", "onnx: engine"),
        *("int8: quantization", "int8: checkpoint", "int8: engine", "int8: evaluation"),
        "int8-capped: engine",
        *("benchmark", "results", "report"),
    ]
    results = json.loads(Path("out/results/results.json").read_text())
    engines = {engine["label"]: engine for engine in results["engines"]}
    assert [engine["backend"] for engine in engines.values()] == [*["torch"] * 3, "onnxruntime", *["torch"] * 2]
    assert engines["capped"]["accuracy"] == engines["fused"]["accuracy"] != engines["plain"]["accuracy"]
    assert {name: engine["plugins"] for name, engine in engines.items() if engine["plugins"]} == {"onnx": ["wide_ffn"]}
    assert read_engine_manifest(Path("out/capped/engine")).capacity == 32
    report = Path("out/report/report.md").read_text()
    assert "| float32 | float32, wide\\_ffn | int8 " in report
    assert report.count("Quantization error of int8") == 1
    recipe.write_text(ENGINES.replace("capacity: 32", "capacity: 33", 1))
    assert steps_made(recipe) == ["capped: engine", "benchmark", "results", "report"]
