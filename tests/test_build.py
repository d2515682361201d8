"""The command line as a user meets it: what it writes, what it prints, exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import transformers

import build
from engines.backends import BACKENDS, backends_by_setting
from exporter.dtypes import BFLOAT16, FLOAT32, DType
from exporter.errors import EngineError
from exporter.plan import read_plan
from exporter.read import open_model
from exporter.reference import Reference
from exporter.settings import Setting
from exporter.writers.files import MANIFEST, MARKER
from tests.checkpoints import saved_model, word_tokenizer, write_words
from tests.command_line import call, done, interrupt

ROOT = Path(__file__).parent.parent
PLAN = "drop_attention: [2, 3, 4]\nfuse: [[2, 3]]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of six layers with a plan beside it."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    sizes = {"intermediate_size": 256, "num_hidden_layers": 6, "max_position_embeddings": 128}
    saved_model(folder, "Llama", sizes)
    word_tokenizer(folder, 307)
    write_words(folder.parent / "text.txt", 200, 307)
    (folder.parent / "plan.yaml").write_text(PLAN)
    return folder


@pytest.fixture(scope="module")
def plan(model: Path) -> Path:
    return model.parent / "plan.yaml"


def test_every_command_prints_help_without_any_heavy_import() -> None:
    """`export` and `engine` ask what can be chosen, and so import what writers and backends need, but no runtime."""
    script = (
        "import sys, build\n"
        "from click.testing import CliRunner\n"
        "asking = ['export', 'engine']\n"
        "for name in ['', *build.main.commands.keys() - {*asking}, *asking]:\n"
        "    heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'tensorrt', 'matplotlib', 'rich'}\n"
        "    heavy |= {'numpy', 'pydantic'} if name not in asking else set()\n"
        "    result = CliRunner().invoke(build.main, [*([name] if name else []), '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def documented() -> dict[str, list[str]]:
    """Every call of build.py in help texts and documentation, as a shell would split it."""
    texts = {f"{name} --help": command.epilog or "" for name, command in build.main.commands.items()}
    texts |= {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    found = {}
    for source, text in texts.items():
        for number, line in enumerate(re.findall(r"python build\.py ([^`\n]*)", text.replace("\\\n", " "))):
            found[f"{source} {number}"] = shlex.split(line, comments=True)
    return found


@pytest.mark.parametrize("arguments", documented().values(), ids=documented().keys())
def test_documented_calls_have_options_that_exist(arguments: list[str]) -> None:
    name, *rest = arguments
    build.main.commands[name].make_context(name, rest)


@dataclass(frozen=True)
class AbacusSettings:
    """Settings of a backend that exists in these tests only: one of every kind."""

    beads: Annotated[int, Setting("beads of a wire; 10 if not given.", least=1, most=20)] = 10
    wires: Annotated[int | None, Setting("wires.", option="max-wires", least=2)] = None
    weight: Annotated[int | None, Setting("of all beads, e.g. 20GB.", in_bytes=True)] = None
    friction: Annotated[float | None, Setting("of beads on wires.")] = None
    wood: Annotated[DType | None, Setting("of the frame.", choices=(FLOAT32, BFLOAT16))] = None
    manual: Annotated[Path | None, Setting("file of instructions.")] = None
    colours: Annotated[tuple[str, ...], Setting("of the beads.")] = ()
    polished: Annotated[bool, Setting("shine.")] = False


@pytest.fixture
def abacus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings of every build with a backend of the name `abacus`."""
    built: list[Any] = []

    class Abacus:
        def __init__(self, settings: Any) -> None:
            self.settings = settings

        def build(self, network: Path, output: Path, *, label: str | None, force: bool) -> None:
            built.append(self.settings)

        def missing(self) -> list[str]:
            return []

    like = BACKENDS["onnxruntime"]
    kind = replace(like, make=lambda settings, progress: Abacus(settings), settings=AbacusSettings)
    monkeypatch.setitem(BACKENDS, "abacus", kind)
    return built


ABACUS = {
    "nothing": ([], None),
    "number": (["--beads", 20], AbacusSettings(beads=20)),
    "another_name": (["--max-wires", 3], AbacusSettings(wires=3)),
    "size": (["--weight", "2KB"], AbacusSettings(weight=2000)),
    "fraction": (["--friction", 0.5], AbacusSettings(friction=0.5)),
    "choice": (["--wood", "bfloat16"], AbacusSettings(wood=BFLOAT16)),
    "path": (["--manual", "a/b"], AbacusSettings(manual=Path("a/b"))),
    "texts": (["--colours", "red,blue"], AbacusSettings(colours=("red", "blue"))),
    "flag": (["--polished"], AbacusSettings(polished=True)),
}


@pytest.mark.parametrize(("options", "settings"), ABACUS.values(), ids=ABACUS.keys())
def test_a_backend_has_the_options_of_its_settings(
    options: list[object], settings: AbacusSettings | None, abacus: list[Any]
) -> None:
    done("engine", "network", "--backend", "abacus", *options, "-o", "out")
    assert abacus == [settings]


ABACUS_REFUSED = {
    "above": (["--backend", "abacus", "--beads", 21], "21 is not in the range 1<=x<=20"),
    "below": (["--backend", "abacus", "--max-wires", 1], "1 is not in the range x>=2"),
    "no_choice": (["--backend", "abacus", "--wood", "float16"], "not one of 'float32', 'bfloat16'"),
    "size": (["--backend", "abacus", "--weight", "much"], "'--weight': 'much' is not a size"),
    "another_backend": (
        ["--max-wires", 3, "--beads", 3],
        "these options belong to --backend abacus: found beads, max-wires",
    ),
    "no_dry_run": (["--backend", "abacus", "--dry-run"], "a dry run has nothing to show here"),
}


@pytest.mark.parametrize(("options", "message"), ABACUS_REFUSED.values(), ids=ABACUS_REFUSED.keys())
def test_a_backend_refuses_what_its_settings_do(options: list[object], message: str, abacus: list[Any]) -> None:
    result = call("engine", "network", *options, "-o", "out")
    assert (result.exit_code, abacus) == (2, [])
    assert message in result.output


def test_help_says_which_backend_an_option_is_for(abacus: list[Any]) -> None:
    text = " ".join(done("engine", "--help").output.split())
    assert "tensorrt-llm|torch|abacus]" in text
    assert re.search(r"With --backend abacus: --beads INTEGER RANGE Beads of a wire; 10 if not given\.", text)
    shared = r"With --backend tensorrt or tensorrt-llm: --max-batch INTEGER RANGE Sequences side by side.* \[x>=1\]"
    assert re.search(rf"{shared} --dry-run Print what would be built, and its memory", text)


def test_no_two_settings_share_an_option() -> None:
    options = [setting.option for setting in backends_by_setting()]
    assert len(options) == len(set(options))


def test_inspect(model: Path) -> None:
    text = done("inspect", model).output
    assert "12 (6 attention, 6 FFN)" in text
    described = json.loads(done("inspect", model, "--json").output)
    assert described["num_parameters"] == sum(
        parameter.numel() for parameter in transformers.LlamaForCausalLM.from_pretrained(model).parameters()
    )


def test_inspect_needs_no_weights() -> None:
    text = done("inspect", ROOT / "tests" / "data" / "nemotron-ultra-253b.structure.json").output
    assert "253.4 billion" in text
    assert "145 (64 attention, 81 FFN)" in text


def test_the_main_job_step_by_step(model: Path, plan: Path, tmp_path: Path) -> None:
    told = done("transform", model, "--plan", plan, "-o", tmp_path / "fused").stdout
    assert told.startswith("sequential sublayers 12 -> 8, blocks 6 -> 5, parameters ")
    fused = open_model(tmp_path / "fused", need_weights=True).graph
    assert fused.sequential_sublayers == 8
    assert (
        done("transform", model, "--plan", plan, "-o", tmp_path / "again", "--dry-run").output.count("safetensors") == 1
    )
    assert not (tmp_path / "again").exists()
    for name, source in (("baseline", model), ("fused", tmp_path / "fused")):
        done("export", source, "--to", "onnx", "-o", tmp_path / f"{name}-network")
        done("engine", tmp_path / f"{name}-network", "--label", name, "-o", tmp_path / name / "engine")
    engines = [tmp_path / "baseline" / "engine", tmp_path / "fused" / "engine"]
    grid = ["--batch", "1,2", "--input-len", "8", "--output-len", "4", "--rounds", "2", "--runtime", "python"]
    shown = done("bench", *engines, *grid, "-o", tmp_path / "results.json").stdout.splitlines()
    rows = [line.split()[:2] for line in shown if line.startswith(("baseline", "fused"))]
    assert rows == [["baseline", "1"], ["fused", "1"], ["baseline", "2"], ["fused", "2"]]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [engine["label"] for engine in results["engines"]] == ["baseline", "fused"]
    done("report", tmp_path / "results.json", "-o", tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text()
    assert "baseline" in html
    assert "fused" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html


def test_an_engine_of_a_fused_model_generates_what_the_reference_does(model: Path, plan: Path, tmp_path: Path) -> None:
    from engines.backends import backend_named
    from engines.generate import greedy_generate

    done("transform", model, "--plan", plan, "-o", tmp_path / "fused")
    done("export", tmp_path / "fused", "--to", "onnx", "-o", tmp_path / "network")
    done("engine", tmp_path / "network", "-o", tmp_path / "engine")
    runner = backend_named("onnxruntime").open(tmp_path / "engine", threads=1)
    prompt = [5, 7, 11, 13]
    (generated,) = greedy_generate(runner, [prompt], max_new_tokens=12, stop_ids=())
    runner.close()
    reference = Reference(open_model(tmp_path / "fused", need_weights=True).graph)
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(reference.logits(torch.tensor([tokens]))[0, -1].argmax()))
    assert generated == tokens[len(prompt) :]


def test_a_dry_run_needs_no_weights_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("fuse: [[100, 106]]\n")
    structure = ROOT / "tests" / "data" / "nemotron-ultra-253b.structure.json"
    arguments = ["transform", structure, "--plan", tmp_path / "plan.yaml", "-o", tmp_path / "out"]
    told, *lines, last = done(*arguments, "--dry-run").output.splitlines()
    assert told.startswith("sequential sublayers 145 -> 139, ")
    sizes = {name: int(size.replace(",", "")) for size, name in map(str.split, lines)}
    assert sum(size for name, size in sizes.items() if name.endswith(".safetensors")) == 506_802_420_480
    assert last == f" {sum(sizes.values()):,}  bytes in all; nothing was written"
    assert not (tmp_path / "out").exists()
    assert "needs weights" in call(*arguments).output


@pytest.mark.parametrize("command", [("transform",), ("quantize", "--format", "int8-weight-only")], ids=lambda c: c[0])
def test_weight_files_are_as_large_as_asked(command: tuple[str, ...], tmp_path: Path) -> None:
    name, *options = command
    output = done(name, ROOT / "demo" / "model", *options, "--shard-size", "2MB", "--dry-run", "-o", tmp_path / "out")
    files = [line.split() for line in output.output.splitlines() if line.endswith(".safetensors")]
    sizes = [int(size.replace(",", "")) for size, _ in files]
    assert sum(sizes) > 4 * 10**6
    assert max(sizes) <= 2 * 10**6 + 20_000  # and a header


def test_a_benchmark_is_made_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def bench_engines(engines: object, grid: object, **settings: Any) -> None:
        given.update(settings, engines=engines, grid=grid)
        raise EngineError("known enough")

    monkeypatch.setattr("engines.bench.bench_engines", bench_engines)
    lengths = ["--batch", "1,3", "--input-len", 5, "--output-len", "7,8"]
    counts = ["--rounds", 9, "--warmup", 0, "--threads", 2, "--seed", 11]
    arguments = ["bench", "a", "b", *lengths, *counts, "--cpus", "0,1", "--one-at-a-time", "--profile"]
    assert "known enough" in call(*arguments, "-o", tmp_path / "results.json").output
    assert given.pop("engines") == (Path("a"), Path("b"))
    assert given.pop("grid") == ((1, 5, 7), (1, 5, 8), (3, 5, 7), (3, 5, 8))
    assert {name: value for name, value in given.items() if name not in ("progress", "worker")} == {
        "rounds": 9,
        "warmup": 0,
        "threads": 2,
        "cpus": [0, 1],
        "seed": 11,
        "one_at_a_time": True,
        "profile": True,
    }


def test_evaluate_prints_and_writes_the_same_figures(model: Path, plan: Path, tmp_path: Path) -> None:
    text = ["--text", model.parent / "text.txt", "--context", 20]
    output = tmp_path / "evaluation.json"
    printed = done("evaluate", model, "--plan", plan, "--reference", model, *text, "-o", output).output
    written = json.loads(output.read_text())
    assert f"perplexity {written['perplexity']:.4f} over 190 tokens" in printed
    assert f"KL(reference || model) {written['kl_divergence']:.5f} nats per token, over 200 positions" in printed
    assert f"top-1 agreement {100 * written['top1_agreement']:.2f} %" in printed
    assert len(written["kl"]) == 20
    alone = done("evaluate", model, *text).output
    assert f"perplexity {written['reference_perplexity']:.4f}" in alone
    assert "KL" not in alone


def test_analyze_suggests_a_plan_that_transform_takes(model: Path, tmp_path: Path) -> None:
    text = ["--text", model.parent / "text.txt", "--context", 20]
    wishes = ["--drop", 3, "--greedy", "--kl", "--parallel", 1, "--window", 2]
    told = done("analyze", model, *text, *wishes, "-o", tmp_path / "a").stdout
    assert re.match(r"suggested: sequential sublayers 12 -> \d, blocks 6 -> \d, parameters ", told)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    kinds = ("block", "attention", "ffn")
    pictures = {f"{what}_{kind}.png" for what in ("dependency", "importance", "importance_kl") for kind in kinds}
    assert names >= {"dependency.json", "plan.yaml", *pictures}
    assert f"of text.txt, model in {model.parent.name}/llama" in (tmp_path / "a" / "plan.yaml").read_text()
    plan = read_plan(tmp_path / "a" / "plan.yaml")
    assert len(plan.dropped_layers) == 3
    assert len(plan.parallel) == 1
    done("export", model, "--to", "onnx", "--plan", tmp_path / "a" / "plan.yaml", "-o", tmp_path / "network")


@pytest.mark.parametrize(("gib", "is_fused"), [(1, True), (1e-6, False)])
def test_analyze_fuses_what_a_gpu_holds(gib: float, is_fused: bool, model: Path, tmp_path: Path) -> None:
    arguments = ["--text", model.parent / "text.txt", "--context", 20, "--drop", 4, "--fuse-last"]
    done("analyze", model, *arguments, "--max-gib-per-gpu", gib, "-o", tmp_path / "a")
    assert bool(read_plan(tmp_path / "a" / "plan.yaml").fuse) is is_fused


def test_analyze_of_a_range(model: Path, tmp_path: Path) -> None:
    text = ["--text", model.parent / "text.txt", "--context", 20]
    done("analyze", model, *text, "--layers", "2-4", "-o", tmp_path / "a")
    assert len(json.loads((tmp_path / "a" / "dependency.json").read_text())["matrices"]["block"]) == 3


RECIPE = """
model: {model}
network: {{max_positions: 64}}
evaluate: {{text: {text}, context: 20}}
analysis: {{text: {text}, context: 20, drop: 3}}
variants:
  - name: baseline
  - name: fused
    plan: {plan}
  - name: auto
    plan: auto
  - name: parallel
    checkpoint: false
    plan: {{parallel: [[1, 2]]}}
  - name: removed
    bench: false
    plan: {{drop_attention: [2, 3, 4], drop_ffn: [2, 3]}}
bench: {{input_len: [8], output_len: [4], rounds: 1, warmup: 0, threads: 1}}
"""


@pytest.fixture
def recipe(model: Path, plan: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, plan=plan, text=model.parent / "text.txt"))
    return path


def test_run_makes_every_step_once_and_resumes(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    foreseen = done("run", recipe, "-o", output, "--dry-run").output
    assert foreseen.count("make  ") == 16  # of `auto` nothing is known yet: checkpoint, network, engine, evaluation
    assert "its plan is what the analysis will suggest" in foreseen
    assert not output.exists()
    first = done("run", recipe, "-o", output).output
    assert first.count("made  ") == 20
    results = json.loads((output / "results" / "results.json").read_text())
    accuracies = {engine["label"]: engine["accuracy"] for engine in results["engines"]}
    assert accuracies["baseline"]["kl_divergence"] is None
    assert accuracies["fused"]["kl_divergence"] > 0
    assert len(read_plan(output / "analysis" / "plan.yaml").dropped_layers) == 3
    assert not (output / "removed" / "engine").exists()
    removed = results["evaluated"][0]
    assert (removed["label"], removed["structure"]["sequential_sublayers"]) == ("removed", 7)
    assert removed["accuracy"]["perplexity"] > 0
    html = (output / "report" / "report.html").read_text()
    assert "with the same FFNs removed instead" in html
    assert html.count('<img src="data:image/png;base64,') == 6  # three kinds, dependency and importance
    again = ["--analysis", output / "analysis", "--baseline", "baseline", "-o", tmp_path / "report"]
    done("report", output / "results" / "results.json", *again)
    written = {path.name: path.read_bytes() for path in (output / "report").glob("*.png")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").glob("*.png")} == written
    assert (output / "report" / "report.html").is_file()
    second = done("run", recipe, "-o", output).output
    assert (second.count("made  "), second.count("kept  ")) == (0, 20)
    shutil.rmtree(output / "fused" / "engine")  # as after a killed run: the steps before it are whole
    foreseen = done("run", recipe, "-o", output, "--dry-run").output
    assert foreseen.count("keep  ") == 16  # it cannot know that the engine will be the same, and the rest is kept
    assert "keep  fused: network" in foreseen
    assert "make  fused: engine" in foreseen
    third = done("run", recipe, "-o", output).output
    assert "kept  fused: network" in third
    assert "made  fused: engine" in third
    assert "kept  parallel: engine" in third


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_our_recipes_can_be_checked_anywhere(name: str, tmp_path: Path) -> None:
    found = done("run", ROOT / "recipes" / name, "--dry-run", "-o", tmp_path / "out")
    assert f"make  baseline: {'engine' if 'torch' in name else 'network'}" in found.stdout
    apart = " without those of auto" if name == "demo.yaml" else ""
    sizes = rf"models and networks{apart} would take [\d.]+ MB, engines come on top, [\d.]+ .B are free\n"
    assert re.search(f"nothing was written; {sizes}", found.stdout)
    has_runtime = name == "demo.yaml" or torch.cuda.is_available()
    assert ("this machine cannot carry it out" in found.stderr) == (not has_runtime)
    assert not (tmp_path / "out").exists()


FOLDERS = {
    "other_files": ({"notes.txt": "mine"}, False),
    "a_model": ({"config.json": "{}", "model.safetensors": ""}, False),
    "files_further_down": ({"a/b/notes.txt": "mine"}, False),
    "an_output_of_ours": ({MANIFEST: "{}", "config.json": "{}"}, False),
    "empty": ({}, True),
    "a_step": ({f"report/{MANIFEST}": "{}"}, True),
    "a_step_of_a_variant": ({f"parallel/engine/{MANIFEST}": "{}", "notes.txt": "mine"}, True),
    "a_step_that_was_killed": ({f"parallel/.network.partial-x/{MARKER}": ""}, True),
}


@pytest.mark.parametrize(("files", "is_taken"), FOLDERS.values(), ids=FOLDERS.keys())
def test_run_leaves_folders_of_something_else_alone(
    files: dict[str, str], is_taken: bool, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "folder").mkdir(parents=True)  # one without files: left by a run that was killed early
    for name, text in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nvariants: [{{name: same}}]\n")
    result = call("run", recipe, "-o", tmp_path / "out")
    assert (result.exit_code, "folder of something else" in result.output) == ((0, False) if is_taken else (2, True))


def test_a_run_with_too_long_a_name_is_one_error(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nvariants: [{{name: same}}]\n")
    result = call("run", recipe, "-o", tmp_path / ("x" * 300))
    assert (result.exit_code, "its name is too long" in result.output) == (2, True)


SMALL_RECIPE = """
model: {model}
network: {{max_positions: 64}}
variants:
  - {{name: fused, plan: {plan}}}
  - {{name: parallel, checkpoint: false, plan: {{parallel: [[1, 2]]}}}}
bench: {{input_len: [8], output_len: [4], rounds: 1, warmup: 0, threads: 1}}
predict: {{gpu: [h100-sxm], tp: [2], batch: [1, 4], dtype: bfloat16}}
"""


@pytest.mark.parametrize(
    ("key", "message"),
    [("exclude: [decoder.*]", "matches no linear"), ("kv_cache: int8", "no reader has a KV cache of this dtype")],
)
def test_run_refuses_a_quantization_before_it_calibrates(key: str, message: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "format.yaml").write_text(f"weights: {{dtype: int8, scale: row}}\n{key}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\nvariants: [{{name: small, quantize: format.yaml}}]\n"
        f"calibration: {{text: {model.parent / 'text.txt'}, context: 20}}\n"
    )
    result = call("run", recipe, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("network", "quantize", "message"),
    [
        ("{dtype: bfloat16}", "", "no bfloat16 kernels"),
        ("{max_positions: 100000}", "", "max_positions does not fit the model"),
        ("{dtype: float16}", ", quantize: int8-weight-only", "8-bit kernels for float32 networks only"),
        ("{target: tensorrt}", ", quantize: kv.yaml", "KV cache cannot hold codes"),
        ("{to: trtllm, tp: 3}", "", "tensor-parallel|tp_size"),
    ],
    ids=["dtype", "positions", "format", "cache", "ranks"],
)
def test_run_refuses_a_network_before_it_measures(
    network: str, quantize: str, message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.tensorrt.TensorRt.missing", lambda backend: [])
    monkeypatch.setattr("engines.tensorrt_llm.TensorRtLlm.missing", lambda backend: [])
    fp8 = "{dtype: float8_e4m3fn, scale: tensor}"
    (tmp_path / "kv.yaml").write_text(f"weights: {fp8}\ninputs: {fp8}\nkv_cache: float8_e4m3fn\n")
    recipe, text = tmp_path / "recipe.yaml", model.parent / "text.txt"
    recipe.write_text(
        f"model: {model}\nnetwork: {network}\nvariants: [{{name: one{quantize}}}]\n"
        f"analysis: {{text: {text}, context: 20}}\ncalibration: {{text: {text}, context: 20}}\nbench: {{}}\n"
    )
    result = call("run", recipe, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert re.search(message, result.output), result.output
    assert not (tmp_path / "out").exists()


def test_run_repeats_what_a_changed_recipe_changes(model: Path, plan: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SMALL_RECIPE.format(model=model, plan=plan))
    done("run", recipe, "-o", tmp_path / "out")
    recipe.write_text(recipe.read_text().replace("[[1, 2]]", "[[0, 1]]"))
    again = done("run", recipe, "-o", tmp_path / "out").output
    report = tmp_path / "out" / "report"
    assert "Predicted figures on 2x H100 SXM" in (report / "report.html").read_text()
    assert (report / "throughput_predicted_0.svg").is_file()
    assert "kept  fused: engine" in again
    for step in ("parallel: network", "parallel: engine", "benchmark", "report"):
        assert f"made  {step}" in again


@pytest.mark.parametrize(
    ("change", "message"),
    [(("h100-sxm", "h1000"), "unknown GPU"), (("tp: [2]", "tp: [3]"), "divides the attention heads")],
)
def test_run_knows_before_it_writes_what_it_cannot_predict(
    model: Path, plan: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SMALL_RECIPE.format(model=model, plan=plan).replace(*change))
    result = call("run", recipe, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_run_knows_before_it_writes_that_the_harness_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nvariants: [{{name: a}}]\nevaluate: {{tasks: [x]}}\n")
    result = call("run", recipe, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "lm-evaluation-harness is not installed" in result.output
    assert not (tmp_path / "out").exists()


TOO_LONG = "longer than the model was made for: expected at most 128 tokens, its max_position_embeddings, found 129"
REFUSED = {
    "no_model": (["inspect", "{tmp}/nothing"], "no such model folder"),
    "output_exists": (["transform", "{model}", "--plan", "{plan}", "-o", "{tmp}"], "output exists"),
    "output_is_input": (["transform", "{model}", "-o", "{model}", "--force"], "are the same"),
    "output_name": (["transform", "{model}", "-o", "{tmp}/" + "x" * 250], "its name is too long"),
    "engine_in_its_network": (["engine", "{model}", "-o", "{model}/engine"], "inside each other"),
    "report_in_place_of_its_analysis": (
        ["report", "a.json", "--analysis", "{model}", "-o", "{model}", "--force"],
        "are the same",
    ),
    "not_ours": (["transform", "{model}", "-o", "{tmp}", "--force"], "did not write"),
    "output_is_a_loop": (["transform", "{model}", "-o", "{tmp}/loop"], "loop: output exists"),
    "no_plan": (["transform", "{model}", "--plan", "{tmp}/none.yaml", "-o", "{tmp}/out"], "cannot be read"),
    "endless_plan": (["transform", "{model}", "--plan", "/dev/zero", "-o", "{tmp}/out"], "too large for a plan"),
    "long_network": (["check", "x" * 5000], "no network to check"),
    "long_format": (["quantize", "{model}", "--format", "x" * 300, "-o", "{tmp}/out"], "unknown quantization format"),
    "long_text": (["evaluate", "{model}", "--text", "x" * 300, "--context", "20"], "no such text"),
    "no_utf8": (["report", "{tmp}/\udcff.json", "-o", "{tmp}/out"], "udcff.json' is not text in UTF-8"),
    "reader": (["transform", "{model}", "--plan", "{plan}", "--check-for", "nobody", "-o", "{tmp}/out"], "nobody"),
    "parallel_hf": (["transform", "{model}", "--plan", "{tmp}/parallel.yaml", "-o", "{tmp}/out"], "parallel"),
    "no_network": (["engine", "{model}", "-o", "{tmp}/out"], "Run `export` first; only `engine --backend torch` takes"),
    "backend": (["engine", "{model}", "--backend", "nobody", "-o", "{tmp}/out"], "onnxruntime"),
    "no_engine": (["bench", "{model}", "-o", "{tmp}/out.json"], "no engine.json. Build one with `engine` first"),
    "grid": (["bench", "{model}", "--batch", "1,x", "-o", "{tmp}/out.json"], "list of whole numbers"),
    "results": (["report", "{plan}", "-o", "{tmp}/out"], "plan.yaml"),
    "recipe": (["run", "{plan}", "-o", "{tmp}/out"], "plan.yaml"),
    "layers": (
        ["analyze", "{model}", "--text", "{plan}", "--layers", "2-9", "--context", "2", "-o", "{tmp}/out"],
        "layer 9",
    ),
    "drops": (["analyze", "{model}", "--text", "{plan}", "--drop", "9", "--context", "2", "-o", "{tmp}/out"], "fewer"),
    "no_text": (["evaluate", "{model}", "--text", "{tmp}/none.txt", "--context", "20"], "none.txt: no such text"),
    "folder_of_texts": (["evaluate", "{model}", "--text", "{tmp}", "--context", "20"], "text is one file"),
    "binary_text": (
        ["evaluate", "{model}", "--text", "{model}/model.safetensors", "--context", "20"],
        "not a text in UTF-8 (invalid",
    ),
    "nothing_to_evaluate_on": (["evaluate", "{model}"], "--text, --tasks or both"),
    "reference_without_text": (["evaluate", "{model}", "--tasks", "x", "--reference", "{model}"], "give --text"),
    "tasks_of_a_plan": (["evaluate", "{model}", "--plan", "{plan}", "--tasks", "x"], "`transform` first"),
    "tasks_folder": (["evaluate", "{model}", "--tasks", "x", "--include-path", "{tmp}/none"], "tasks"),
    "analysis": (["report", "{tmp}/none.json", "--analysis", "{tmp}", "-o", "{tmp}/out"], "none.json"),
    "short_text": (["evaluate", "{model}", "--text", "{plan}", "--context", "100"], "shorter than the context"),
    "window_of_evaluate": (["evaluate", "{model}", "--text", "{plan}", "--context", "129"], TOO_LONG),
    "window_of_analyze": (["analyze", "{model}", "--text", "{plan}", "--context", "129", "-o", "{tmp}/out"], TOO_LONG),
    "window_of_run": (["run", "{tmp}/windows.yaml", "-o", "{tmp}/out"], TOO_LONG),
    "target": (["export", "{model}", "--to", "onnx", "--target", "abacus", "-o", "{tmp}/out"], "abacus"),
    "not_a_number": (
        ["analyze", "{model}", "--text", "{plan}", "--max-gib-per-gpu", "nan", "-o", "{tmp}/out"],
        "'nan' is not a finite number",
    ),
    "gpu_without_bound": (
        ["analyze", "{model}", "--text", "{plan}", "--max-gib-per-gpu", "1e308", "-o", "{tmp}/out"],
        "1e+308 is not in the range",
    ),
    "shard_size": (["transform", "{model}", "--shard-size", "many", "-o", "{tmp}/out"], "not a size"),
    "shard_size_without_unit": (["transform", "{model}", "--shard-size", "5", "-o", "{tmp}/out"], "'5' is 5 bytes"),
    "small_shard_size": (["transform", "{model}", "--shard-size", "999KB", "-o", "{tmp}/out"], "give at least 1MB"),
    "readers": (["transform", "{model}", "--check-for", "vllm,", "-o", "{tmp}/out"], "not a list of names"),
    "weights_of_trtllm": (
        ["export", str(ROOT / "tests" / "data" / "llama-3.1-405b.config.json"), "--to", "trtllm", "-o", "{tmp}/out"],
        "needs weights",
    ),
    "list_tensors": (
        ["export", "{model}", "--to", "trtllm", "--list-tensors", "-o", "{tmp}/out"],
        "--list-tensors belongs to --dry-run",
    ),
    "limit": (["evaluate", "{model}", "--text", "{plan}", "--limit", "3"], "--limit belongs to --tasks"),
    "title_of_comparison": (
        ["report", "a", "b", "--compare", "--title", "c"],
        "--title belongs to a report",
    ),
    "comparison_into_a_folder": (["report", "a", "b", "--compare", "-o", ""], "not a folder"),
    "metric_of_report": (["report", "a", "--metric", "ttft_ms", "-o", "{tmp}/out"], "--metric belongs to --compare"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_ends_with_code_2_one_message_and_no_output(
    case: str, model: Path, plan: Path, tmp_path: Path
) -> None:
    arguments, message = REFUSED[case]
    (tmp_path / "parallel.yaml").write_text("parallel: [[0, 1]]\n")
    (tmp_path / "loop").symlink_to("loop")
    windows = f"evaluate: {{text: {plan}, context: 129}}"
    (tmp_path / "windows.yaml").write_text(f"model: {model}\nvariants: [{{name: same}}]\n{windows}\n")
    before = sorted(tmp_path.rglob("*"))
    result = call(*(argument.format(model=model, plan=plan, tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        ("engine", "{tmp}/network"),
        ("import-bench", "{tmp}/report.json", "--requests", "{tmp}/requests.json", "--model", "{tmp}/model"),
    ],
    ids=lambda command: command[0],
)
def test_a_label_that_no_report_takes_is_refused_before_any_work(command, tmp_path):
    arguments = [argument.format(tmp=tmp_path) for argument in command]
    result = call(*arguments, "--label", "a" * 101, "-o", tmp_path / "out")
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "this cannot be the label of an engine: expected one line of at most 100 characters" in result.output


ANALYZE = ["{model}", "--text", "{text}", "--context", "20", "-o", "{tmp}/out"]
MEASURE = "exporter.analysis.dependency.measure_dependency"
INTERRUPTED = {
    "run": (["run", "{recipe}", "-o", "{tmp}/out"], "engines.run.run_recipe", True),
    "resumable_analysis": (["analyze", *ANALYZE, "--resume", "{tmp}/work"], MEASURE, True),
    "resumable_suggestion": (["analyze", *ANALYZE, "--resume", "{tmp}/work"], "exporter.suggest.suggest", True),
    "analysis": (["analyze", *ANALYZE], MEASURE, False),
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_an_interrupted_command_says_whether_it_can_go_on(
    case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, work, goes_on = INTERRUPTED[case]
    monkeypatch.setattr(work, interrupt)
    places = {"model": model, "tmp": tmp_path, "text": model.parent / "text.txt", "recipe": ROOT / "recipes/demo.yaml"}
    result = call(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 130
    assert ("the same command goes on from here" in result.output, "Aborted!" in result.output) == (goes_on, True)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["--help"], ["inspect", "demo/model"], ["inspect", "demo/model", "--json"]])
def test_a_full_disk_under_standard_output_is_one_error(command: list[str], unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "build.py", *command], stdout=full, stderr=subprocess.PIPE, env=environment, cwd=ROOT
        )
    assert result.returncode == 2
    assert result.stderr == b"error: standard output cannot be written (No space left on device)\n"


def test_an_error_of_another_file_is_not_taken_for_one_of_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, need_weights: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("exporter.read.open_model", full)
    assert isinstance(call("inspect", "model").exception, OSError)


def test_sigterm_leaves_nothing_half_written(
    model: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    output = tmp_path / "folders" / "out"
    written = []

    def publish(partial: Path, *_: object, **__: object) -> None:
        written.extend(partial.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("exporter.writers.files._publish", publish)
    result = call("transform", model, "--plan", plan, "-o", output)
    assert result.exit_code == 128 + signal.SIGTERM
    assert len(written) > 3
    assert not (tmp_path / "folders").exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("command", ["transform", "bench", "report"])
def test_a_folder_that_is_gone(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = call(command, ROOT / "demo" / "model", "-o", "out")
    assert (result.exit_code, result.stderr) == (2, "error: the folder that this command was started in is gone\n")


ENCODINGS = {
    "c": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin": {"PYTHONIOENCODING": "latin-1"},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_output_that_lacks_characters_has_question_marks(encoding: str, tmp_path: Path) -> None:
    model = tmp_path / "模型"
    shutil.copytree(ROOT / "demo" / "model", model)
    command = [sys.executable, "build.py", "transform", model, "-o", tmp_path / "変換"]
    result = subprocess.run(command, capture_output=True, env=os.environ | ENCODINGS[encoding], cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, b"")
    assert re.fullmatch(rb"wrote \S+/\?+\n", result.stdout)
