"""The wide FFN's plugins, held against the real `tensorrt.plugin` module; no GPU, and none of TensorRT's libraries."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.tensorrt_build import BuildSettings, plan_build
from exporter.errors import EngineError, TargetError
from exporter.writers import onnx
from exporter.writers.files import save_folder
from exporter.writers.onnx import options_for
from plugins.contract import WIDE_FFN_FORMATS, WIDE_FFN_MOST_TOKENS, CustomOp, wide_ffn_halves
from plugins.wide_ffn.configs import BUCKETS, Config, config_for
from plugins.wide_ffn.kernels import ROWS_PER_COUNTER
from plugins.wide_ffn.tensorrt_plugin import TYPES, register_plugins
from tests.engines import tensorrt_signatures as bindings
from tests.tiny import tiny_graph

pytest.importorskip("triton", reason="Triton is not installed (its wheels are for Linux)")

HIDDEN, WIDTH = 8192, 28672
UNKNOWN = -1  # a size that only a call knows
HALVES = {half.name: half for format in WIDE_FFN_FORMATS for half in wide_ffn_halves(*format)}
INTEGERS = {"up": ("tokens", "hidden", "width"), "down": ("tokens", "hidden", "width", "parts")}
# The slowest to compile are left to tests/plugins/test_wide_ffn_kernels.py.
COMPILED = ("wide_ffn_up_bf16", "wide_ffn_up_fp8_static", "wide_ffn_down_bf16", "wide_ffn_down_int8_static")

pytestmark = pytest.mark.skipif(bindings.why_not() is not None, reason=str(bindings.why_not()))
Probe = Callable[..., list[dict[str, Any]]]


def case(half: CustomOp, *, tokens: int = 16, hidden: int = HIDDEN, compile: bool = False, per_row: bool = True) -> Any:
    """A call of up to so many tokens, for the probe; `per_row`: every output channel has a scale."""
    sizes = {"tokens": UNKNOWN, "hidden": hidden, "width": WIDTH, "programs": 132, "most_tokens": WIDE_FFN_MOST_TOKENS,
             "counters": hidden // ROWS_PER_COUNTER}  # fmt: skip

    def shape(one: Any, known: dict[str, int]) -> list[int]:
        wanted = one.shapes[0] if per_row or one.name == "norm_weight" else one.shapes[-1]
        return [known.get(size, size) for size in wanted]

    return {
        "name": f"{half.namespace}::{half.name}",
        "attributes": {attribute.name: 1e-5 for attribute in half.attributes},
        "inputs": [
            [TYPES[one.dtypes[0]], shape(one, sizes), shape(one, {**sizes, "tokens": tokens})] for one in half.inputs
        ],
        "compile": compile,
    }


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """Runs cases through the plugins, in a process that has the bindings."""
    stubs = tmp_path_factory.mktemp("tensorrt_stubs")

    def run(*cases: Any) -> list[dict[str, Any]]:
        program = f"from tests.plugins import tensorrt_probe as probe\nprobe.main({cases!r})"
        printed = json.loads(bindings.run_with_bindings(stubs, program).splitlines()[-1])
        assert printed["registered"] == sorted(f"fuselage::{name}" for name in HALVES)
        return printed["found"]

    return run


def two_launches(tokens: int, weights: str, activations: str) -> Config:
    return config_for(
        tokens=tokens, hidden=HIDDEN, width=WIDTH, weights=weights, activations=activations, norm="inside"
    )


def test_every_plugin_describes_its_outputs(probe: Probe) -> None:
    """Their dtypes, and their sizes as expressions; formats are the contract's dtypes, all of them linear."""
    found = probe(*(case(half) for half in HALVES.values()))
    for half, one in zip(HALVES.values(), found, strict=True):
        weights, activations = next(f for f in WIDE_FFN_FORMATS if half in wide_ffn_halves(*f))
        configs = [two_launches(bucket, weights, activations) for bucket in BUCKETS]
        sizes = {
            "tokens": UNKNOWN,
            "hidden": HIDDEN,
            "width": WIDTH,
            "programs": max(config.programs for config in configs),
            "splits": max(config.splits for config in configs),
            "most_tokens": WIDE_FFN_MOST_TOKENS,
            "counters": HIDDEN // ROWS_PER_COUNTER,
        }
        outputs = [[TYPES[one.dtype], [sizes[str(size)] for size in one.shape]] for one in half.outputs]
        assert one["outputs"] == outputs, half.name
        dtypes = [item.dtypes[0] for item in half.inputs] + [item.dtype for item in half.outputs]
        assert one["formats"] == [[TYPES[dtype], "LINEAR"] for dtype in dtypes]
        assert one["tactics"] == []  # the default one alone
        # As the parser makes them: arrays. A plain float would be FLOAT64, and in older versions an error with
        # NumPy 2.4.
        assert one["fields"] == [[attribute.name, "FLOAT32"] for attribute in half.attributes]


@pytest.mark.parametrize("tokens", [16, WIDE_FFN_MOST_TOKENS])
def test_kernels_take_what_tensorrt_passes(probe: Probe, tokens: int) -> None:
    """Pointers to inputs, integers, pointers to outputs, and nothing more; grids are those of a launch from PyTorch."""
    names = COMPILED if tokens == 16 else COMPILED[2:3]
    found = probe(*(case(HALVES[name], tokens=tokens, compile=True) for name in names))
    for name, one in zip(names, found, strict=True):
        half, kind = HALVES[name], name.split("_")[2]
        weights, activations = next(f for f in WIDE_FFN_FORMATS if half in wide_ffn_halves(*f))
        config = two_launches(tokens, weights, activations)
        parameters = re.findall(r"\.param \.(u64|u32) ", one["ptx"][: one["ptx"].index(")")])
        assert parameters == ["u64"] * len(half.inputs) + ["u32"] * len(INTEGERS[kind]) + ["u64"] * len(half.outputs)
        integers = {"tokens": UNKNOWN, "hidden": HIDDEN, "width": WIDTH, "parts": config.programs}
        assert one["integers"] == [["INT32", integers[name]] for name in INTEGERS[kind]]
        grid = (config.programs, 1) if kind == "up" else (-(-HIDDEN // config.down.rows), config.splits)
        launch = one["launch"]
        assert (launch["grid_x"], launch["grid_y"], launch["grid_z"]) == (*grid, 1)
        tiling = config.gate_up if kind == "up" else config.down
        assert (launch["block_x"], launch["block_y"], launch["block_z"]) == (32 * tiling.warps, 1, 1)
        assert 0 < launch["shared_mem"] <= 227 << 10
        assert f".entry {one['kernel']}(" in one["ptx"]


def test_one_scale_for_a_weight_and_odd_sizes_have_kernels_of_their_own(probe: Probe) -> None:
    half = HALVES["wide_ffn_down_fp8_token"]
    kernels = probe(
        case(half, compile=True), case(half, compile=True, per_row=False), case(half, compile=True, hidden=8200)
    )
    assert len({one["ptx"] for one in kernels}) == 3


def test_more_tokens_than_a_call_may_have(probe: Probe) -> None:
    [found] = probe(case(HALVES["wide_ffn_up_bf16"], tokens=WIDE_FFN_MOST_TOKENS + 1, compile=True))
    assert found["error"].startswith("TargetError: the wide-FFN plugin takes few tokens at a time: expected at most 64")


def test_gate_and_up_with_scales_of_two_kinds(probe: Probe) -> None:
    half = HALVES["wide_ffn_up_fp8_static"]
    mixed = case(half, compile=True)
    mixed["inputs"][[one.name for one in half.inputs].index("up_scale")][1:] = [[1], [1]]
    [found] = probe(mixed)
    assert found["error"] == "TargetError: the scales of gate and up are of one kind: expected row, found tensor"


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(TargetError, match="TensorRT is not installed"):
        register_plugins()


def test_engines_are_built_for_as_many_tokens_as_a_call_may_have(tmp_path: Path) -> None:
    graph = tiny_graph("AF F", dtype="bfloat16")
    options = options_for({"tensorrt": None}, max_positions=256, batch=4, plugins=("wide_ffn",))
    save_folder(tmp_path / "network", onnx.emit(graph, options), kind=onnx.KIND, details={})
    with pytest.raises(EngineError, match="expected at most 64 tokens of all sequences in one call, found 1024"):
        plan_build(tmp_path / "network", BuildSettings())
    plan = plan_build(tmp_path / "network", BuildSettings(max_input_len=16))
    assert plan.variant.options["plugins"] == ["wide_ffn"]
