"""The PyTorch backend on a CPU: every structure and number format against the reference; folders; what is refused.

What needs a GPU has the marker `gpu`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engines.backends import backend_named
from engines.base import read_engine_manifest, save_engine
from engines.bench import bench_engines, request_grid
from engines.torch import BuildSettings, Torch, TorchRunner
from engines.torch_linear import (
    LONGEST_INT32_SUM,
    MIN_INT_ROWS,
    RoundedFP8,
    RoundedInt8,
    Rounding,
    linear_on_device,
)
from engines.torch_model import Call, TorchModel, recorded
from exporter.dtypes import BFLOAT16, FLOAT8_E4M3FN, FLOAT16, FLOAT32, FLOAT64, INT8, DType
from exporter.errors import CheckpointError, EngineError, FuselageError, OutputError
from exporter.graph import FFN, Activation, Block, KVQuantization, ModelGraph, map_blocks
from exporter.lazy import array
from exporter.read import open_model
from exporter.reference import Reference, fake_quantized, torch_from_lazy
from exporter.wide_ffn import wide_ffn_problems
from exporter.writers import hf, onnx
from exporter.writers.files import MANIFEST, save_folder
from tests.command_line import call, done
from tests.engines.test_bench import manifest_of
from tests.engines.test_onnxruntime import GRAPHS, LENGTHS, Recorded
from tests.marks import needs_scales_of_rows
from tests.tiny import quantized_graph, tiny_graph, with_twins

SLACK = 1.25  # times the error that the reference itself makes in 16 bits, root mean square over all logits
FORMATS = ("fp8", "fp8-rowwise", "int8-smoothquant", "int8-smoothquant-token", "int8-weight-only")
ON_CPU = BuildSettings(device="cpu")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
FORMATS_ON_CPU = [pytest.param(name, marks=needs_scales_of_rows if name == "fp8-rowwise" else ()) for name in FORMATS]


@cache
def quantized(format_name: str, dtype: str = "float32") -> ModelGraph:
    return quantized_graph(tiny_graph("AF F", qkv_bias=True, dtype=dtype), format_name)


def runner_of(
    graph: ModelGraph,
    *,
    dtype: DType = FLOAT32,
    wide_ffn: bool = False,
    device: str = "cpu",
    capacity: int | None = None,
) -> TorchRunner:
    """A runner without a folder."""
    if wide_ffn:
        import plugins.wide_ffn.op  # noqa: F401
    model = TorchModel(graph, device=torch.device(device), dtype=getattr(torch, dtype.torch), wide_ffn=wide_ffn)
    fields = {"vocab_size": graph.vocab_size, "max_positions": graph.max_position_embeddings, "capacity": capacity}
    return TorchRunner(manifest_of(dtype=dtype.name, **fields), model)


def checkpoint(graph: ModelGraph, folder: Path) -> Path:
    save_folder(folder, hf.emit(graph, hf.Options()), kind="checkpoint", details={})
    return folder


def engine(graph: ModelGraph, folder: Path, settings: BuildSettings = ON_CPU) -> Path:
    return Torch(settings).build(checkpoint(graph, folder / "model"), folder / "engine", label=None, force=False)


def run(recorded: Recorded) -> Recorded:
    """Prefill of unequal lengths, decode, and a chunk on the filled cache, of which one row gets nothing."""
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    recorded.decode(recorded.prefill(5, 1, 3))
    recorded.prefill(5, 0, 3)
    return recorded


def compare_16_bits(recorded: Recorded, graph: ModelGraph, dtype: DType = BFLOAT16) -> None:
    """Hold logits against the float32 reference: they may be as wrong as those of the reference in `dtype`.

    No fixed tolerance would do: where inputs become 8-bit codes, one rounding more moves some of them by a whole step.
    """
    exact, rounded = Reference(graph, resident=True), Reference(graph, dtype=getattr(torch, dtype.torch), resident=True)
    ours, theirs = [], []
    for row, got in zip(recorded.rows, recorded._logits, strict=True):
        wanted, other = (reference.logits(torch.tensor([row]))[0].float().numpy() for reference in (exact, rounded))
        ours.append(np.stack(list(got.values())) - wanted[list(got)])
        theirs.append((other - wanted)[list(got)])
    ours_rms, theirs_rms = (float(np.sqrt(np.mean(np.concatenate(one) ** 2))) for one in (ours, theirs))
    assert ours_rms < SLACK * theirs_rms


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS.keys())
def test_equals_the_reference(make: Callable[[], ModelGraph]) -> None:
    graph = make()
    run(Recorded(runner_of(graph), 3)).compare(graph)


@pytest.mark.parametrize("window", [None, 4])
def test_rows_may_begin_at_different_calls(window: int | None) -> None:
    graph = tiny_graph("AF AF", sliding_window=window)
    recorded = Recorded(runner_of(graph), 3)
    recorded.prefill(5, 0, 2)
    recorded.decode(recorded.prefill(3, 6, 1), 2)
    recorded.compare(graph)


@pytest.mark.parametrize("format_name", FORMATS_ON_CPU)
def test_quantized_linears_equal_the_reference(format_name: str) -> None:
    """On the products of codes that a GPU would run, too; PyTorch has them on a CPU."""
    graph = quantized(format_name)
    run(Recorded(runner_of(graph), 3)).compare(graph)


def test_one_scale_for_a_tensor_stays_one() -> None:
    """With it GPUs have a faster product than with a scale for every row."""
    down = quantized("fp8").flat_blocks[0].ffn.down_proj
    linear = linear_on_device(down, torch.device("cpu"), torch.float32, torch_from_lazy)
    assert isinstance(linear, RoundedFP8)
    assert linear.scale.shape == linear.rounding.scale.shape == ()


def test_rounded_caches_equal_the_reference() -> None:
    scale = array(np.array(0.02, np.float32))

    def with_kv(block: Block, index: int) -> Block:
        if block.attention is None:
            return block
        kv = KVQuantization(dtype=INT8, k_scale=scale, v_scale=scale)
        return replace(block, attention=replace(block.attention, kv_quantization=kv))

    graph = map_blocks(tiny_graph("AF AF"), with_kv)
    run(Recorded(runner_of(graph), 3)).compare(graph)


@pytest.mark.parametrize("format_name", [None, *FORMATS_ON_CPU])
@pytest.mark.parametrize("wide_ffn", [False, True], ids=["linears", "plugin"])
def test_bfloat16(format_name: str | None, wide_ffn: bool) -> None:
    """Also through the custom op, which there is in bfloat16 alone."""
    graph = tiny_graph("AF F (AF F)", dtype="bfloat16") if format_name is None else quantized(format_name, "bfloat16")
    assert not list(wide_ffn_problems(graph))
    compare_16_bits(run(Recorded(runner_of(graph, dtype=BFLOAT16, wide_ffn=wide_ffn), 3)), graph)


@pytest.mark.parametrize("rows", [1, MIN_INT_ROWS - 1, MIN_INT_ROWS, MIN_INT_ROWS + 9])
@pytest.mark.parametrize("longest", [6, LONGEST_INT32_SUM])
def test_int8_products(rows: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that a GPU's product insists on are added and taken away again; long sums are taken in parts."""
    monkeypatch.setattr("engines.torch_linear.LONGEST_INT32_SUM", longest)
    rng = np.random.default_rng(rows)
    weight = torch.from_numpy(rng.integers(-128, 128, (24, 16), dtype=np.int8))
    x = torch.from_numpy(rng.integers(-127, 128, (rows, 16))).to(torch.float32)
    linear = RoundedInt8(weight, torch.tensor(1.0), None, Rounding(torch.int8, torch.tensor(1.0)))
    np.testing.assert_array_equal(linear(x).numpy(), x.numpy() @ weight.numpy().T.astype(np.float32))


@pytest.mark.parametrize("dtype", [INT8, FLOAT8_E4M3FN])
def test_tiny_tokens_are_rounded_as_the_reference_rounds_them(dtype: DType) -> None:
    x = torch.tensor([[1e-42, 0.0, -3e-43], [2e-38, 1e-38, 0.0], [0.0, 0.0, 0.0]])
    codes, scale = Rounding(getattr(torch, dtype.torch), None)(x)
    torch.testing.assert_close(codes.to(torch.float32) * scale, fake_quantized(x, dtype, None), rtol=0, atol=0)


def step_without_data(graph: ModelGraph, *, wide_ffn: bool = False) -> None:
    """A prefill, a chunk and a decode step on tensors that are shapes only, where PyTorch has its rules of GPUs."""
    import plugins.wide_ffn.op  # noqa: F401

    device = torch.device("meta")
    model = TorchModel(
        graph,
        device=device,
        dtype=torch.bfloat16,
        wide_ffn=wide_ffn,
        load=lambda tensor, device, dtype: torch.empty(tensor.shape, dtype=dtype, device=device),
    )
    cache = model.new_cache(2, 50)
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    for tokens, fresh in ((7, True), (5, False), (1, False)):
        ids = torch.zeros(2, tokens, dtype=torch.int64, device=device)
        assert model.step(ids, ids, rows, cache, fresh=fresh).shape == (2, graph.vocab_size)


@pytest.mark.parametrize("format_name", [None, *FORMATS])
@pytest.mark.parametrize("wide_ffn", [False, True], ids=["linears", "plugin"])
def test_no_step_waits_for_the_device(format_name: str | None, wide_ffn: bool) -> None:
    """Reading a value would fail here, as it would while a CUDA graph is recorded."""
    graph = (
        tiny_graph("AF (AF F)", dtype="bfloat16", sliding_window=9) if format_name is None else quantized(format_name)
    )
    step_without_data(graph, wide_ffn=wide_ffn)


def test_sizes_that_are_refused_are_those_that_pytorch_refuses() -> None:
    with pytest.raises(RuntimeError, match="divisible by 16"):
        step_without_data(quantized_graph(tiny_graph("AF", intermediate_size=72), "fp8"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_the_most_likely_token_is_the_first_of_several(device: str) -> None:
    """As NumPy has it."""
    graph = with_twins(tiny_graph("AF AF"))
    ids, lengths = np.array([[5, 6, 7], [8, 9, 0]]), np.array([3, 2])
    greedy, plain = runner_of(graph, device=device), runner_of(graph, device=device)
    for runner in (greedy, plain):
        runner.start(2, 8)
    tokens = greedy.prefill_greedy(ids, lengths)
    np.testing.assert_array_equal(tokens, plain.prefill(ids, lengths).argmax(axis=-1))
    for _ in range(3):
        assert (tokens < graph.vocab_size // 2).all()
        before, tokens = tokens, greedy.decode_greedy(tokens)
        np.testing.assert_array_equal(tokens, plain.decode(before).argmax(axis=-1))


def test_starts_keep_their_room_while_they_ask_for_the_same() -> None:
    graph = tiny_graph("AF AF")
    runner = runner_of(graph)
    rooms = []
    for batch in (2, 2, 1):
        recorded = Recorded(runner, batch)
        recorded.decode(recorded.prefill(*LENGTHS[:batch]))
        recorded.compare(graph)
        rooms.append(runner._room)
    assert rooms[0] is rooms[1]
    assert rooms[1] is not rooms[2]


def test_a_start_clears_what_earlier_sequences_left() -> None:
    """Of a masked position the weight is 0, and 0 times NaN is NaN."""
    graph = tiny_graph("AF AF")
    runner = runner_of(graph)
    run(Recorded(runner, 3))
    assert runner._room is not None
    cache = runner._room.cache
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)
    again = run(Recorded(runner, 3))
    assert runner._room.cache is cache
    again.compare(graph)


def test_what_a_recorded_graph_reads_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has addresses and no references: what is freed, the next tensor is written over."""
    for name, stand_in in {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    x = torch.ones(3)
    was_read = weakref.ref(x)
    replay = recorded(partial(torch.add, x, 1))
    del x
    assert was_read() is not None
    assert replay().tolist() == [2, 2, 2]


def test_a_cache_goes_back_to_the_gpu_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps what is freed, and a GPU's free memory is what a cache is held against."""
    runner = runner_of(tiny_graph("AF"))
    runner.start(1, 8)
    assert runner._room is not None
    old = weakref.ref(runner._room.cache.keys[0])
    was_there: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: was_there.append(old() is not None))
    runner.start(2, 8)
    assert was_there == [False]


def test_a_window_that_holds_the_prompt_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph("AF AF", sliding_window=9)
    masked = []
    mask = Call.mask
    monkeypatch.setattr(Call, "mask", lambda call, window: masked.append(call.fresh) or mask(call, window))
    for tokens in (9, 10):
        recorded = Recorded(runner_of(graph), 1)
        recorded.decode(recorded.prefill(tokens), 2)
        recorded.compare(graph)
    assert masked == [False] * 4 + [True] * 2 + [False] * 4


def test_padding_beyond_the_last_position() -> None:
    """One row is nearly full, another takes a long chunk: the first row's padding has no position of its own."""
    graph = tiny_graph("AF AF", max_position_embeddings=140)
    recorded = Recorded(runner_of(graph), 2)
    recorded.prefill(130, 10)
    recorded.decode(recorded.prefill(9, 129))
    recorded.compare(graph)


def test_an_engine_folder_runs_without_its_source(tmp_path: Path) -> None:
    graph = tiny_graph("AF F AF")
    built = engine(graph, tmp_path, replace(ON_CPU, dtype=FLOAT32, capacity=200))
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    runner = backend_named("torch").open(built, threads=1)
    assert isinstance(runner, TorchRunner)
    run(Recorded(runner, 3)).compare(graph)
    assert runner._room is not None
    assert runner._room.cache.capacity == 200
    runner.close()
    np.testing.assert_array_equal(open_model(built, need_weights=True).graph.embedding.numpy(), graph.embedding.numpy())


def test_only_weights_of_ours_are_shared(tmp_path: Path) -> None:
    built = engine(tiny_graph("AF"), tmp_path)
    names = ("config.json", "model.safetensors")
    assert [(built / name).samefile(tmp_path / "model" / name) for name in names] == [False, True]
    (tmp_path / "model" / MANIFEST).unlink()  # as if somebody else had written them
    again = Torch(ON_CPU).build(tmp_path / "model", tmp_path / "again", label=None, force=False)
    assert not any((again / name).samefile(tmp_path / "model" / name) for name in names)


def test_what_an_engine_says_about_itself(tmp_path: Path) -> None:
    graph = quantized("fp8", "bfloat16")
    manifest = read_engine_manifest(engine(graph, tmp_path, replace(ON_CPU, plugins=("wide_ffn",))))
    assert (manifest.backend, manifest.dtype, manifest.number_format) == ("torch", "bfloat16", "fp8 (W8A8 static)")
    assert manifest.plugins == ("wide_ffn",)
    assert manifest.options == {"device": "cpu", "emulated": True}
    assert manifest.kv_bytes_per_token == graph.kv_bytes_per_token(BFLOAT16)


@pytest.mark.parametrize(
    ("format_name", "plugins", "device", "emulated"),
    [
        (None, (), "cpu", False),
        (None, ("wide_ffn",), "cpu", False),
        ("int8-smoothquant", (), "cpu", False),
        ("int8-smoothquant", ("wide_ffn",), "cpu", True),
        ("fp8", (), "cpu", True),
        ("fp8", (), "cuda", False),
        ("fp8", ("wide_ffn",), "cuda", False),
    ],
)
def test_emulated_formats_are_marked(
    format_name: str | None, plugins: tuple[str, ...], device: str, emulated: bool, tmp_path: Path
) -> None:
    graph = tiny_graph("AF", dtype="bfloat16") if format_name is None else quantized(format_name, "bfloat16")
    settings = BuildSettings(device="cuda" if device == "cuda" else "cpu", plugins=plugins)
    assert read_engine_manifest(engine(graph, tmp_path, settings)).options["emulated"] is emulated


def test_shards_and_the_quantization_config_come_along(tmp_path: Path) -> None:
    graph = quantized("fp8")
    options = hf.Options(shard_bytes=100_000)
    save_folder(tmp_path / "model", hf.emit(graph, options), kind="checkpoint", details={})
    built = Torch(ON_CPU).build(tmp_path / "model", tmp_path / "engine", label=None, force=False)
    names = {path.name for path in built.iterdir()}
    assert {"hf_quant_config.json", "model.safetensors.index.json"} <= names
    assert len([name for name in names if name.startswith("model-")]) > 1
    recorded = Recorded(Torch().open(built, threads=1), 3)
    run(recorded).compare(graph)


def test_the_benchmark_runs_torch_engines(tmp_path: Path) -> None:
    engines = []
    for name, pattern in (("baseline", "AF AF"), ("dropped", "AF F")):
        folder = tmp_path / name
        model = checkpoint(tiny_graph(pattern), folder / "model")
        engines.append(Torch(ON_CPU).build(model, folder / "engine", label=name, force=False))
    results = bench_engines(engines, request_grid([2], [5], [3]), rounds=1, warmup=0, threads=1)
    assert [(one.label, one.device, one.kind) for one in results.engines] == [
        ("baseline", "cpu", "measured"),
        ("dropped", "cpu", "measured"),
    ]
    assert [len(step) for cell in results.cells for step in cell.step_ms] == [2, 2]


def past_the_cache(runner: TorchRunner) -> None:
    runner.prefill(np.zeros((1, 8), np.int64), np.array([8]))
    runner.decode(np.array([1]))


class TestRefusals:
    """One clear error each, and no folder."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dtype": FLOAT64}, "not a dtype of activations: expected bfloat16, float16, float32, found float64"),
            ({"capacity": 513}, "expected a capacity of 1 to 512, found 513"),
            ({"plugins": ("narrow",)}, "no such plugin: expected wide_ffn, found narrow"),
            ({"plugins": ("wide_ffn",)}, "the wide-FFN op computes in bfloat16: expected bfloat16, found float32"),
        ],
    )
    def test_settings(self, settings: dict, message: str, tmp_path: Path) -> None:
        with pytest.raises(FuselageError, match=message):
            engine(tiny_graph("AF"), tmp_path, replace(ON_CPU, **settings))
        assert not (tmp_path / "engine").exists()

    @pytest.mark.parametrize(
        ("graph", "message"),
        [
            (tiny_graph("AF", ffn_bias=True), "block 0: the wide-FFN op has no biases"),
            (tiny_graph("AF", activation=Activation.RELU), "block 0: the wide-FFN op gates with silu: found relu"),
        ],
    )
    def test_ffns_that_the_op_lacks(self, graph: ModelGraph, message: str) -> None:
        assert message in [str(problem) for problem in wide_ffn_problems(graph)]

    def test_ffns_in_several_formats(self) -> None:
        static, token = quantized("int8-smoothquant"), quantized("int8-smoothquant-token")

        def mixed(block: Block, index: int) -> Block:
            other = token.flat_blocks[index].ffn
            assert isinstance(block.ffn, FFN)
            assert isinstance(other, FFN)
            return replace(block, ffn=replace(block.ffn, down_proj=other.down_proj))

        found = [str(problem) for problem in wide_ffn_problems(map_blocks(static, mixed))]
        assert found[0] == (
            "block 0: the wide-FFN op rounds the inputs of gate, up and down in the same way: found static and token"
        )

    @pytest.mark.parametrize(
        ("graph", "dtype", "message"),
        [
            (quantized("fp8-rowwise"), None, "FP8 products with a scale per row give bfloat16"),
            (
                quantized_graph(tiny_graph("AF", intermediate_size=72), "fp8"),
                None,
                r"blocks.0.ffn.gate_proj: cuBLASLt .*: expected multiples of 16, found \[72, 64\]",
            ),
        ],
    )
    def test_products_that_a_gpu_lacks(
        self, graph: ModelGraph, dtype: DType | None, message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(FuselageError, match=message):
            engine(graph, tmp_path, BuildSettings(device="cuda", dtype=dtype))
        assert not (tmp_path / "engine").exists()

    def test_a_product_that_an_older_pytorch_lacks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        multiply = torch._scaled_mm

        def of_scalars(codes: torch.Tensor, weight: torch.Tensor, **scales: Any) -> torch.Tensor:
            if scales["scale_a"].ndim:
                raise RuntimeError("only supports per-tensor scaling")
            return multiply(codes, weight, **scales)

        monkeypatch.setattr(torch, "_scaled_mm", of_scalars)
        engine(quantized("fp8"), tmp_path / "tensor")
        with pytest.raises(EngineError, match="multiplies no FP8 matrices with a scale per row"):
            engine(quantized("fp8-rowwise"), tmp_path / "row")
        assert not (tmp_path / "row" / "engine").exists()

    def test_a_network_is_no_model(self, tmp_path: Path) -> None:
        network = tmp_path / "network"
        save_folder(network, onnx.emit(tiny_graph("AF"), onnx.PRESETS["onnxruntime"]), kind="network", details={})
        result = call("engine", network, "--backend", "torch", "-o", tmp_path / "engine")
        assert result.exit_code == 2
        assert "the torch backend runs model folders, and this is a network definition" in result.output

    def test_an_output_in_the_way(self, tmp_path: Path) -> None:
        built = engine(tiny_graph("AF"), tmp_path)
        with pytest.raises(OutputError, match="output exists"):
            Torch(ON_CPU).build(tmp_path / "model", built, label=None, force=False)
        with pytest.raises(OutputError, match="inside each other"):
            Torch(ON_CPU).build(tmp_path / "model", tmp_path / "model" / "engine", label=None, force=False)

    def test_an_altered_engine(self, tmp_path: Path) -> None:
        built = engine(tiny_graph("AF"), tmp_path)
        weights = built / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
        with pytest.raises(CheckpointError, match="file was altered"):
            Torch().open(built, threads=1)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"backend": "onnxruntime"}, "engine of another backend: expected torch, found onnxruntime"),
            ({"plugins": ("narrow",)}, "no such plugin: expected wide_ffn, found .*narrow"),
            ({"dtype": "float64"}, "not a dtype that runs here: .*found float64"),
            ({"options": {"device": "tpu", "emulated": False}}, "options in the engine manifest .device"),
        ],
    )
    def test_an_engine_of_something_else(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        manifest = read_engine_manifest(engine(tiny_graph("AF"), tmp_path)).model_copy(update=changes)
        save_engine(tmp_path / "other", manifest, [], details={}, force=False)
        with pytest.raises(EngineError, match=message):
            Torch().open(tmp_path / "other", threads=1)

    def test_weights_larger_than_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        graph = tiny_graph("AF")
        built = engine(graph, tmp_path, replace(ON_CPU, dtype=FLOAT32))
        memory = SimpleNamespace(available=graph.weight_bytes)
        monkeypatch.setattr("engines.torch.psutil.virtual_memory", lambda: memory)
        Torch().open(built, threads=1)
        memory.available -= 1
        with pytest.raises(EngineError, match="not enough memory for the model's weights"):
            Torch().open(built, threads=1)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_machine_without_gpu(self, tmp_path: Path) -> None:
        built = engine(tiny_graph("AF"), tmp_path, BuildSettings(device="cuda"))
        with pytest.raises(EngineError, match="PyTorch sees none"):
            Torch().open(built, threads=1)

    @pytest.mark.parametrize(
        ("step", "message"),
        [
            (lambda runner: runner.start(0, 8), "cannot run this batch: expected >= 1, found 0"),
            (lambda runner: runner.start(1, 513), "expected at most 512 tokens"),
            (lambda runner: runner.prefill(np.zeros((1, 9), np.int64), np.array([9])), "expected at most 8 tokens"),
            (lambda runner: runner.prefill(np.zeros((2, 3), np.int64), np.array([3, 3])), "does not fit the batch"),
            (lambda runner: runner.prefill(np.zeros((1, 3), np.int64), np.array([4])), "lengths are beyond"),
            (lambda runner: runner.decode(np.array([320])), "expected 0 to 319, found 320"),
            (past_the_cache, "the KV cache is full: expected at most 8 tokens, found 9"),
        ],
    )
    def test_steps(self, step: Callable[[TorchRunner], object], message: str) -> None:
        runner = runner_of(tiny_graph("AF"))
        runner.start(1, 8)
        with pytest.raises(EngineError, match=message):
            step(runner)

    def test_a_cache_larger_than_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = runner_of(tiny_graph("AF"))
        runner.manifest = runner.manifest.model_copy(update={"kv_bytes_per_token": 1000})
        monkeypatch.setattr("engines.torch.psutil.virtual_memory", lambda: SimpleNamespace(available=2 * 8 * 1000))
        runner.start(2, 8)
        with pytest.raises(EngineError, match="not enough memory for a KV cache of 3 x 8 tokens"):
            runner.start(3, 8)


class TestCommand:
    def test_builds(self, tmp_path: Path) -> None:
        model = checkpoint(tiny_graph("AF F"), tmp_path / "model")
        built = tmp_path / "engine"
        options = ("--device", "cpu", "--dtype", "bfloat16", "--plugins", "wide_ffn", "--capacity", "512")
        done("engine", model, "--backend", "torch", *options, "--label", "fused", "-o", built)
        manifest = read_engine_manifest(built)
        assert (manifest.label, manifest.capacity, manifest.dtype) == ("fused", 512, "bfloat16")
        assert manifest.plugins == ("wide_ffn",)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_says_that_an_engine_does_not_run_here(self, tmp_path: Path) -> None:
        model = checkpoint(tiny_graph("AF", dtype="bfloat16"), tmp_path / "model")
        found = done("engine", model, "--backend", "torch", "-o", tmp_path / "cuda")
        assert "note: it is built, but this machine cannot run it: PyTorch sees no GPU" in found.stderr
        assert done("engine", model, "--backend", "torch", "--device", "cpu", "-o", tmp_path / "cpu").stderr == ""


@pytest.mark.gpu
@needs_gpu
class TestOnAGpu:
    """Never executed so far."""

    @pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS.keys())
    def test_equals_the_reference(self, make: Callable[[], ModelGraph]) -> None:
        graph = make()
        run(Recorded(runner_of(graph, device="cuda"), 3)).compare(graph, 1e-3)

    @pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
    def test_16_bits(self, dtype: DType) -> None:
        graph = tiny_graph("AF F (AF AL)", dtype=dtype.name)
        compare_16_bits(run(Recorded(runner_of(graph, dtype=dtype, device="cuda"), 3)), graph, dtype)

    @pytest.mark.parametrize("format_name", FORMATS)
    @pytest.mark.parametrize("wide_ffn", [False, True], ids=["linears", "plugin"])
    def test_quantized(self, format_name: str, wide_ffn: bool) -> None:
        graph = quantized(format_name, "bfloat16")
        runner = runner_of(graph, dtype=BFLOAT16, wide_ffn=wide_ffn, device="cuda")
        compare_16_bits(run(Recorded(runner, 3)), graph)

    def test_what_pytorch_keeps_is_room_for_a_cache(self) -> None:
        runner = runner_of(tiny_graph("AF"), device="cuda")
        runner.manifest = runner.manifest.model_copy(update={"kv_bytes_per_token": 1 << 20})
        torch.empty(torch.cuda.mem_get_info()[0] - (1 << 28), dtype=torch.uint8, device="cuda")  # freed, and kept
        runner.start(1, 512)
