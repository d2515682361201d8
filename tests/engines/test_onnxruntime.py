"""Networks of every structure, run in ONNX Runtime, against the reference; and engine folders that must not open."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engines import onnxruntime as backend_module
from engines.backends import backend_named
from engines.base import Runner
from engines.generate import greedy_generate
from engines.onnxruntime import CACHE_STEP, OnnxRuntime
from engines.onnxruntime_kernels import kernels_from_profile
from exporter.dtypes import BFLOAT16, FLOAT16, FLOAT32
from exporter.errors import EngineError, FuselageError, OutputError
from exporter.graph import Activation, ModelGraph
from exporter.passes.drop_attention import drop_attention
from exporter.passes.fuse_ffn import fuse_ffn
from exporter.reference import Reference
from exporter.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from exporter.writers import onnx
from exporter.writers.files import save_folder
from exporter.writers.onnx import Network, Options
from tests.tiny import tiny_graph, with_dtypes

pytestmark = pytest.mark.skipif(bool(OnnxRuntime().missing()), reason="; ".join(OnnxRuntime().missing()))

FLOAT32_TOLERANCE = 1e-4  # max |difference| of logits, whose standard deviation is about 1 here
FLOAT16_TOLERANCE = 2e-2  # the same; float16 has 11 bits, and six sublayers round one after the other
LENGTHS = (33, 7, 120)

GRAPHS: dict[str, Callable[[], ModelGraph]] = {
    "plain": lambda: tiny_graph("AF AF"),
    "qwen3": lambda: tiny_graph("AF AF", qk_norm=True, head_dim=32),
    "qwen2": lambda: tiny_graph("AF AF", qkv_bias=True),
    "all biases": lambda: tiny_graph("AF AF", qkv_bias=True, o_bias=True, ffn_bias=True),
    "sliding window": lambda: tiny_graph("AF AF", sliding_window=9),
    "attention dropped": lambda: drop_attention(tiny_graph("AF AF AF AF"), [1, 2]),
    "fused": lambda: fuse_ffn(tiny_graph("AF F F F AF", intermediate_size=(192, 256, 128)), [(1, 3)]),
    "empty blocks": lambda: tiny_graph("AF - F - A"),
    "variable heads and widths": lambda: tiny_graph(
        "AF AF AF", num_key_value_heads=(1, 4, 2), intermediate_size=(64, 448, 256)
    ),
    "linear sublayers": lambda: tiny_graph("AF LF AL L"),
    "parallel": lambda: tiny_graph("AF (AF AF F) AF (A LF)"),
    "tied": lambda: tiny_graph("AF AF", tied=True),
    "no attention": lambda: tiny_graph("F F"),
    "gelu": lambda: tiny_graph("AF", activation=Activation.GELU),
    "gelu tanh": lambda: tiny_graph("AF", activation=Activation.GELU_TANH),
    "relu": lambda: tiny_graph("AF", activation=Activation.RELU),
    "linear rope": lambda: tiny_graph("AF AF", rope=Rope(theta=10000.0, scaling=LinearScaling(factor=4.0))),
    "llama3 rope": lambda: tiny_graph(
        "AF AF",
        rope=Rope(
            theta=500000.0,
            scaling=Llama3Scaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            ),
        ),
    ),
    "yarn rope": lambda: tiny_graph(
        "AF AF",
        rope=Rope(theta=10000.0, scaling=YarnScaling(factor=4.0, original_max_position_embeddings=128)),
    ),
    "bfloat16 weights": lambda: tiny_graph("AF F AF", dtype="bfloat16", tied=True),
    "float16 weights": lambda: tiny_graph("AF F AF", dtype="float16"),
    "weights of several dtypes": lambda: with_dtypes(tiny_graph("AF F"), "float32", "bfloat16", "float16"),
}

SYMBOLIC = onnx.PRESETS["onnxruntime"]
FIXED = Options(
    networks=(Network(target="tensorrt", dtype=FLOAT32, batch=len(LENGTHS), capacity="max_positions"),),
    max_positions=256,
)
PACKED = Options(networks=(Network(target="onnxruntime", dtype=FLOAT32, pack_qkv=True, pack_gate_up=True),))
ALONE = Options(
    networks=(Network(target="tensorrt", dtype=FLOAT32, batch=1, capacity=192, pack_qkv=True),), max_positions=256
)


def open_graph(graph: ModelGraph, options: Options, folder: Path) -> Runner:
    """Export, build and open."""
    save_folder(folder / "network", onnx.emit(graph, options), kind="network", details={})
    backend = backend_named("onnxruntime")
    backend.build(folder / "network", folder / "engine", label=None, force=False)
    return backend.open(folder / "engine", threads=1)


class Recorded:
    """A runner and, beside it, what every row holds and which logits came out where."""

    def __init__(self, runner: Runner, batch: int) -> None:
        self.runner = runner
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self._logits: list[dict[int, np.ndarray]] = [{} for _ in range(batch)]  # by position, [V]
        self._rng = np.random.default_rng(7)
        runner.start(batch, min(200, runner.manifest.max_positions))

    def prefill(self, *lengths: int) -> np.ndarray:
        """Append random tokens to the rows, the padding random, too."""
        ids = self._rng.integers(0, self.runner.manifest.vocab_size, (len(lengths), max(lengths)))
        for row, tokens, length in zip(self.rows, ids.tolist(), lengths, strict=True):
            row += tokens[:length]
        return self._recorded(self.runner.prefill(ids, np.array(lengths)), lengths)

    def decode(self, logits: np.ndarray, steps: int = 1) -> np.ndarray:
        """Append the most likely tokens, one by one."""
        for _ in range(steps):
            tokens = logits.argmax(axis=-1)
            for row, token in zip(self.rows, tokens.tolist(), strict=True):
                row.append(token)
            logits = self._recorded(self.runner.decode(tokens), (1,) * len(self.rows))
        return logits

    def _recorded(self, logits: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
        assert logits.dtype == np.float32
        for row, recorded, got, length in zip(self.rows, self._logits, logits, lengths, strict=True):
            if length:  # the logits of a row that got nothing mean nothing
                recorded[len(row) - 1] = got.copy()
        return logits

    def compare(self, graph: ModelGraph, tolerance: float = FLOAT32_TOLERANCE) -> None:
        """Hold every logit that came out against the reference's full forward over the row."""
        reference = Reference(graph, resident=True)
        for row, recorded in zip(self.rows, self._logits, strict=True):
            wanted = reference.logits(torch.tensor([row]))[0].numpy()
            got = np.stack(list(recorded.values()))
            np.testing.assert_allclose(got, wanted[list(recorded)], rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS.keys())
@pytest.mark.parametrize("options", [SYMBOLIC, FIXED], ids=["symbolic", "fixed"])
def test_equals_the_reference(make: Callable[[], ModelGraph], options: Options, tmp_path: Path) -> None:
    """Prefill of unequal lengths, decode, and a chunk on the filled cache, of which one row gets nothing."""
    graph = make()
    recorded = Recorded(open_graph(graph, options, tmp_path), len(LENGTHS))
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    recorded.decode(recorded.prefill(5, 1, 3))
    recorded.prefill(5, 0, 3)
    recorded.compare(graph)


@pytest.mark.parametrize(
    ("graph", "options"),
    [
        ("plain", SYMBOLIC),
        ("qwen3", SYMBOLIC),
        ("attention dropped", SYMBOLIC),
        ("fused", SYMBOLIC),
        ("empty blocks", SYMBOLIC),
        ("variable heads and widths", SYMBOLIC),
        ("parallel", SYMBOLIC),
        ("qwen2", PACKED),
        ("fused", PACKED),
        ("parallel", ALONE),
        ("sliding window", ALONE),
    ],
)
def test_64_decode_steps(graph: str, options: Options, tmp_path: Path) -> None:
    model = GRAPHS[graph]()
    recorded = Recorded(open_graph(model, options, tmp_path), options.networks[0].batch or len(LENGTHS))
    lengths = LENGTHS[-len(recorded.rows) :]
    recorded.decode(recorded.prefill(*lengths), 64)  # from 120 to 184 tokens, past a multiple of CACHE_STEP
    recorded.compare(model)
    if options is not ALONE:
        assert recorded.runner._capacity == 2 * CACHE_STEP


def test_a_new_start_forgets(tmp_path: Path) -> None:
    graph = GRAPHS["plain"]()
    runner = open_graph(graph, SYMBOLIC, tmp_path)
    for batch in (2, 1, 3):
        recorded = Recorded(runner, batch)
        recorded.decode(recorded.prefill(*LENGTHS[:batch]))
        recorded.compare(graph)


def test_padding_beyond_the_last_position(tmp_path: Path) -> None:
    """One row is nearly full, another takes a long chunk: the first row's padding has no position of its own."""
    graph = tiny_graph("AF AF", max_position_embeddings=140)
    recorded = Recorded(open_graph(graph, SYMBOLIC, tmp_path), 2)
    recorded.prefill(130, 10)
    recorded.prefill(10, 130)
    recorded.compare(graph)


def test_float16_network(tmp_path: Path) -> None:
    graph = tiny_graph("AF F AF", dtype="float16")
    options = Options(networks=(Network(target="onnxruntime", dtype=FLOAT16),))
    runner = open_graph(graph, options, tmp_path)
    assert runner.manifest.dtype == "float16"
    assert runner.manifest.kv_bytes_per_token == graph.kv_bytes_per_token(FLOAT16)
    recorded = Recorded(runner, 3)
    recorded.decode(recorded.prefill(*LENGTHS), 8)
    recorded.compare(graph, FLOAT16_TOLERANCE)


def test_twin_of_a_bfloat16_network(tmp_path: Path) -> None:
    """The float32 network beside a bfloat16 one computes with the weights that TensorRT gets, to float32's accuracy."""
    graph = tiny_graph("AF F AF", dtype="bfloat16", qkv_bias=True)
    options = onnx.options_for({"tensorrt": BFLOAT16, "onnxruntime": None}, max_positions=256)
    runner = open_graph(graph, options, tmp_path)
    assert runner.manifest.network_file == "onnxruntime.onnx"
    recorded = Recorded(runner, 3)
    recorded.decode(recorded.prefill(*LENGTHS), 4)
    recorded.compare(graph)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    open_graph(tiny_graph("AF F"), SYMBOLIC, folder).close()
    return folder / "engine"


@pytest.fixture
def copied(engine: Path, tmp_path: Path) -> Path:
    """An engine folder to spoil."""
    return Path(shutil.copytree(engine, tmp_path / "engine"))


def test_an_engine_takes_no_space_beside_its_network(engine: Path) -> None:
    for name in ("onnxruntime.onnx", "weights.safetensors"):
        assert (engine / name).samefile(engine.parent / "network" / name)


def test_manifest(engine: Path) -> None:
    manifest = OnnxRuntime().open(engine, threads=None).manifest
    assert manifest.label == "engine"
    assert set(manifest.runtime) == {"onnxruntime"}
    assert manifest.kv_bytes_per_token == 2 * 2 * 16 * 4
    assert manifest.structure["sequential_sublayers"] == 3
    assert manifest.options["emulated"] is False
    assert manifest.weight_bytes == (engine / "weights.safetensors").stat().st_size


@pytest.mark.parametrize(("spare", "disabled"), [(0, "0"), (-1, "1")])
def test_weights_are_packed_where_memory_holds_them_twice(
    spare: int, disabled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny_graph("F")
    memory = SimpleNamespace(total=2 * 4 * graph.num_parameters + spare, available=10**9)
    monkeypatch.setattr(backend_module.psutil, "virtual_memory", lambda: memory)
    options = open_graph(graph, SYMBOLIC, tmp_path).manifest.options
    assert options["session"]["session.disable_prepacking"] == disabled


def test_generation(engine: Path) -> None:
    runner = OnnxRuntime().open(engine, threads=1)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = greedy_generate(runner, prompts, 12)
    assert together == [greedy_generate(runner, [prompt], 12)[0] for prompt in prompts]
    assert [len(tokens) for tokens in together] == [12, 12, 12]
    stop = together[0][4]
    stopped = greedy_generate(runner, prompts, 12, {stop})
    for tokens, full in zip(stopped, together, strict=True):
        assert tokens == full[: full.index(stop) + 1 if stop in full else 12]
    assert greedy_generate(runner, prompts, 0) == [[], [], []]


def long_prompt(runner: Runner) -> None:
    runner.start(1, 16)
    runner.prefill(np.zeros((1, 513), np.int64), np.array([513]))


def one_step_too_many(runner: Runner) -> None:
    runner.start(1, 512)
    runner.prefill(np.zeros((1, 512), np.int64), np.array([512]))
    runner.decode(np.zeros(1, np.int64))


REFUSED: dict[str, tuple[Callable[[Runner], object], str]] = {
    "start beyond the model": (lambda runner: runner.start(1, 513), "at most 512 tokens"),
    "no sequences": (lambda runner: runner.start(0, 16), "batch"),
    "prompt beyond the model": (long_prompt, "at most 512 tokens"),
    "decode beyond the model": (one_step_too_many, "at most 512 tokens"),
    "generation beyond the model": (lambda runner: greedy_generate(runner, [[1] * 500], 13), "500 . 13"),
    "empty prompt": (lambda runner: greedy_generate(runner, [[1], []], 1), "empty"),
    "token beyond the vocabulary": (lambda runner: greedy_generate(runner, [[320]], 1), "0 to 319"),
    "negative token": (lambda runner: greedy_generate(runner, [[-1]], 1), "0 to 319"),
}


@pytest.mark.parametrize(("act", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_what_does_not_fit(engine: Path, act: Callable[[Runner], object], problem: str) -> None:
    runner = OnnxRuntime().open(engine, threads=1)
    with pytest.raises(EngineError, match=problem):
        act(runner)


def test_refuses_a_cache_beyond_memory(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = OnnxRuntime().open(engine, threads=1)
    monkeypatch.setattr(
        backend_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=CACHE_STEP * 256 - 1)
    )
    with pytest.raises(EngineError, match="not enough memory for a KV cache of 1 x 128 tokens"):
        greedy_generate(runner, [[1]], 1)


def test_fixed_batch_and_padding(tmp_path: Path) -> None:
    runner = open_graph(tiny_graph("AF"), FIXED, tmp_path)
    with pytest.raises(EngineError, match="batch"):
        runner.start(1, 16)
    runner.start(3, 256)
    runner.prefill(np.zeros((3, 200), np.int64), np.array([200, 1, 1]))
    with pytest.raises(EngineError, match="past the cache"):
        runner.prefill(np.zeros((3, 100), np.int64), np.array([1, 100, 100]))


def flip_last_byte(file: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[-1] ^= 1
        (folder / file).write_bytes(content)

    return spoil


def rewrite_engine_json(**changes: object) -> Callable[[Path], None]:
    """Change engine.json and bring the folder's manifest in line: an attacker, or another version, could."""

    def spoil(folder: Path) -> None:
        document = json.loads((folder / "engine.json").read_text()) | changes
        contents = [(path.name, path.read_bytes()) for path in folder.iterdir() if "manifest" not in path.name]
        contents = [(name, content) for name, content in contents if name != "engine.json"]
        contents.append(("engine.json", json.dumps(document).encode()))
        save_folder(folder, contents, kind="engine", details={}, force=True)

    return spoil


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "altered weights": (flip_last_byte("weights.safetensors"), "altered"),
    "altered network": (flip_last_byte("onnxruntime.onnx"), "altered"),
    "altered engine.json": (flip_last_byte("engine.json"), "altered"),
    "missing weights": (lambda folder: (folder / "weights.safetensors").unlink(), "missing"),
    "no manifest": (lambda folder: (folder / "fuselage.manifest.json").unlink(), "not a folder of kind 'engine'"),
    "no folder": (shutil.rmtree, "no such folder"),
    "another backend": (rewrite_engine_json(backend="tensorrt"), "another backend"),
    "a later build": (
        rewrite_engine_json(runtime={"onnxruntime": "999.1"}),
        "older than the one .*: expected 999.1 or later, found .* Build the engine again",
    ),
    "another schema": (rewrite_engine_json(engine_schema=99), "version"),
    "unknown field": (rewrite_engine_json(surprise=1), "surprise"),
    "wrong kind": (rewrite_engine_json(max_positions="many"), "max_positions"),
    "another file": (rewrite_engine_json(network_file="weights.safetensors"), "does not load"),
    "outside file": (rewrite_engine_json(network_file="../network.onnx"), "network_file"),
    "file without a hash": (rewrite_engine_json(network_file="other.onnx"), "not in the engine folder"),
    "another dtype": (rewrite_engine_json(dtype="bfloat16"), "bfloat16"),
    "no session options": (rewrite_engine_json(options={}), "options"),
    "another vocabulary": (rewrite_engine_json(vocab_size=321), "logits: .* not what its manifest says"),
    "no caches": (rewrite_engine_json(cache=[]), "past_k_0: .* not what its manifest says"),
    "another batch": (rewrite_engine_json(batch=2), "not what its manifest says"),
    "absurd positions": (rewrite_engine_json(max_positions=0), "max_positions"),
}


@pytest.mark.parametrize(("spoil", "problem"), SPOILED.values(), ids=SPOILED.keys())
def test_does_not_open_a_spoiled_engine(copied: Path, spoil: Callable[[Path], None], problem: str) -> None:
    spoil(copied)
    with pytest.raises(FuselageError, match=problem):
        OnnxRuntime().open(copied, threads=1)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    save_folder(tmp_path / "network", onnx.emit(tiny_graph("AF"), SYMBOLIC), kind="network", details={})
    return tmp_path / "network"


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """After a build that failed there is no engine, and no temporary folder."""
    yield
    assert [path.name for path in tmp_path.iterdir()] == ["network"]


@pytest.mark.usefixtures("nothing_left")
class TestBuildRefuses:
    def test_an_altered_network(self, network: Path) -> None:
        flip_last_byte("weights.safetensors")(network)
        with pytest.raises(FuselageError, match="altered"):
            OnnxRuntime().build(network, network.parent / "engine", label=None, force=False)

    def test_a_folder_of_another_kind(self, network: Path, engine: Path) -> None:
        with pytest.raises(FuselageError, match="another kind"):
            OnnxRuntime().build(engine, network.parent / "engine", label=None, force=False)

    def test_a_bfloat16_network(self, network: Path) -> None:
        options = onnx.options_for({"tensorrt": BFLOAT16}, max_positions=64)
        save_folder(network, onnx.emit(tiny_graph("AF"), options), kind="network", details={}, force=True)
        with pytest.raises(EngineError, match="cannot run the networks"):
            OnnxRuntime().build(network, network.parent / "engine", label=None, force=False)

    def test_logits_that_are_not_finite(self, network: Path) -> None:
        graph = tiny_graph("AF")
        graph.norm.weight.rows(0, 1)[:] = np.nan  # an array in memory: the rows are the array itself
        save_folder(network, onnx.emit(graph, SYMBOLIC), kind="network", details={}, force=True)
        with pytest.raises(EngineError, match="not finite"):
            OnnxRuntime().build(network, network.parent / "engine", label=None, force=False)

    def test_a_full_disk_of_temporary_files(self, network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "_get_default_tempdir", lambda: Path("/nowhere/at all").read_text())
        monkeypatch.setattr(tempfile, "tempdir", None)
        with pytest.raises(EngineError, match="no temporary folder can be written"):
            OnnxRuntime().build(network, network.parent / "engine", label=None, force=False)

    def test_without_a_usable_runtime(self, network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend_module, "MIN_VERSION", (99, 0))
        assert "pip install 'onnxruntime>=" in OnnxRuntime().missing()[0]
        with pytest.raises(EngineError, match="pip install"):
            OnnxRuntime().build(network, network.parent / "engine", label=None, force=False)


def test_a_profile_that_is_cut_short(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text('[{"cat": ')
    with pytest.raises(EngineError, match=r"profile.json: the profile is cut short. Is that disk full\?"):
        kernels_from_profile(tmp_path / "profile.json")


def test_build_refuses_an_existing_output(network: Path, engine: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        OnnxRuntime().build(network, engine, label=None, force=False)


def test_unknown_backend() -> None:
    with pytest.raises(EngineError, match="one of onnxruntime"):
        backend_named("tpu")
