"""`build.py export` as a user meets it: a target is its writer and one line, and whatever it lets users choose."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
import pytest
import torch
from safetensors.torch import load_file

from commands.help import OwnedOption
from commands.networks import export
from exporter.errors import FuselageError, TargetError, raise_all
from exporter.graph import ModelGraph
from exporter.read import ASSET_NAMES
from exporter.safetensors_io import SafetensorsFile
from exporter.settings import Setting
from exporter.targets import TARGETS, Target
from exporter.writers.files import MANIFEST, Content, json_bytes
from tests.command_line import call, done

MODEL = Path(__file__).parent.parent / "demo" / "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpOptions:
    """Of a target that exists in these tests only: a file with the embedding, and one about it."""

    prefix: Annotated[str, Setting("before the tensor's name; dump if not given.")] = "dump"
    least_rows: Annotated[int, Setting("rows that there must be; 1 if not given.", option="rows", least=1)] = 1
    remarks: Annotated[tuple[str, ...], Setting("to be kept.", option="remark", is_repeated=True)] = ()
    # Also an option of ONNX networks, in the same words.
    max_positions: Annotated[
        int | None, Setting("tokens a sequence may reach; as many as the model knows if not given.", least=1)
    ] = None
    indent: int = 1  # nobody is asked for it


def check(graph: ModelGraph, options: DumpOptions) -> list[FuselageError]:
    if graph.embedding.shape[0] >= options.least_rows:
        return []
    return [TargetError("too few rows", expected=options.least_rows, found=graph.embedding.shape[0])]


def emit(graph: ModelGraph, options: DumpOptions) -> Iterator[tuple[str, Content | bytes]]:
    raise_all(check(graph, options))
    about = {"remarks": options.remarks, "positions": options.max_positions, "indent": options.indent}
    tensors = {f"{options.prefix}.embedding": graph.embedding}
    return iter([("dump.json", json_bytes(about)), ("dump.safetensors", SafetensorsFile(tensors))])


@pytest.fixture
def dump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "dump", Target("a dump", "dump", DumpOptions, check, emit))


@pytest.mark.usefixtures("dump")
def test_a_target_is_a_writer_and_a_line(tmp_path: Path) -> None:
    chosen = ["--prefix", "tiny", "--remark", "one, two", "--remark", "three", "--max-positions", 7]
    done("export", MODEL, "--to", "dump", *chosen, "-o", tmp_path / "out")
    found = load_file(tmp_path / "out" / "dump.safetensors")
    source = load_file(MODEL / "model.safetensors")
    assert found.keys() == {"tiny.embedding"}
    assert torch.equal(found["tiny.embedding"], source["model.embed_tokens.weight"])
    about = json.loads((tmp_path / "out" / "dump.json").read_text())
    assert about == {"remarks": ["one, two", "three"], "positions": 7, "indent": 1}
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    recorded = {"prefix": "tiny", "rows": 1, "remark": ["one, two", "three"], "max_positions": 7}
    assert (manifest["kind"], manifest["details"]) == ("dump", {"plan": None, "norm": "fold", **recorded})


@pytest.mark.usefixtures("dump")
def test_a_target_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    result = call("export", MODEL, "--to", "dump", "--rows", 10**6, "-o", tmp_path / "out")
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "too few rows: expected 1000000" in result.output


@pytest.mark.usefixtures("dump")
def test_help_says_which_targets_an_option_is_for() -> None:
    text = " ".join(done("export", "--help").output.split())
    assert f"--to [{'|'.join(TARGETS)}] What to write. onnx: an ONNX network; " in text
    assert "dump: a dump" in text
    assert re.search("With --to dump: --prefix TEXT .* --rows INTEGER RANGE Rows that there must be", text)
    assert re.search("With --to onnx or dump: --max-positions INTEGER RANGE Tokens", text)
    assert re.search("With --to trtllm: .* --format TEXT Quantize on the way", text)
    assert "--indent" not in text


@pytest.mark.usefixtures("dump")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "dump", "--tp", 2, "--pp", 2], "--tp, --pp belong to --to trtllm."),
        (["--to", "dump", "--check", "tensorrt"], "--check belongs to --to onnx."),
        (["--to", "dump", "--rows", 0], "0 is not in the range x>=1"),
        (["--to", "dump", "--indent", 2], "--indent"),
        (["--to", "onnx", "--rows", 1], "--rows belongs to --to dump."),
        (["--to", "hf", "--max-positions", 1], "--max-positions belongs to --to onnx or dump."),
        (["--to", "abacus"], "'abacus' is not one of 'onnx', "),
        (["--rows", 1], "Missing option '--to'"),
    ],
    ids=str,
)
def test_options_of_other_targets_are_refused(options: list[object], message: str, tmp_path: Path) -> None:
    result = call("export", MODEL, *options, "-o", tmp_path / "out")
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert message in result.output


def test_no_two_options_share_a_name() -> None:
    parameters = export.get_params(click.Context(export))
    spelled = [spelling for parameter in parameters for spelling in parameter.opts]
    assert len(spelled) == len(set(spelled))
    names = [parameter.name for parameter in parameters]
    assert len(names) == len(set(names))
    owned = [parameter for parameter in parameters if isinstance(parameter, OwnedOption)]
    assert {owner for option in owned for owner in option.owners} <= TARGETS.keys()


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_needs_no_weights(target: str, tmp_path: Path) -> None:
    """It knows the sizes from the structure alone; only what is copied from the model's folder is not there."""
    of_folder, of_config = (
        done("export", source, "--to", target, "--dry-run", "-o", tmp_path / "out").output.splitlines()
        for source in (MODEL, MODEL / "config.json")
    )
    assert len(of_config) > 1
    copied = {line.split()[1] for line in {*of_folder} - {*of_config} if "nothing was written" not in line}
    assert copied == ({name for name in ASSET_NAMES if (MODEL / name).exists()} if target == "hf" else set())
    result = call("export", MODEL / "config.json", "--to", target, "-o", tmp_path / "out")
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "no safetensors weights" in result.output
