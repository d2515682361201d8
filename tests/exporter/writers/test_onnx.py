"""What an exported network looks like: its ops, its weights' whereabouts, its contract, and what is refused.

Whether it computes the right thing is tested where it can run, in tests/engines/test_onnxruntime.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from exporter.dtypes import BFLOAT16, FLOAT8_E4M3FN, FLOAT16, FLOAT32, FLOAT64, DType
from exporter.errors import TargetError
from exporter.graph import Activation, ModelGraph, structure
from exporter.lazy import array
from exporter.network import network_manifest_from_json
from exporter.rope import Llama3Scaling, Rope
from exporter.safetensors_io import read_safetensors
from exporter.writers import onnx as writer
from exporter.writers.files import save_folder, sizes_of
from exporter.writers.onnx import PRESETS, Network, Options, options_for
from exporter.writers.onnx_graph import IR_VERSION, OPS, OPSET
from exporter.writers.onnx_options import Settings, options_from, stored_dtype
from exporter.writers.onnx_weights import RopeTable, WeightStore
from tests.tiny import quantized_graph, tiny_graph

SMALL_BYTES = 64  # constants of shapes, axes and splits may be in the .onnx file; kv_pos is the one larger exception

BOTH = options_for({"tensorrt": BFLOAT16, "onnxruntime": None}, max_positions=64)
PACKED = Options(networks=(Network(target="onnxruntime", dtype=FLOAT32, pack_qkv=True, pack_gate_up=True),))


@cache
def quantized(format_name: str) -> ModelGraph:
    graph = tiny_graph("AF F LF (AF AL) A", qkv_bias=True, ffn_bias=True, num_key_value_heads=(1, 4, 2))
    return quantized_graph(graph, format_name)


GRAPHS: dict[str, Callable[[], ModelGraph]] = {
    "llama": lambda: tiny_graph("AF AF"),
    "tied bfloat16": lambda: tiny_graph("AF F", tied=True, dtype="bfloat16"),
    "everything": lambda: tiny_graph(
        "AF F - LF (AF AL) A",
        qk_norm=True,
        qkv_bias=True,
        ffn_bias=True,
        sliding_window=9,
        num_key_value_heads=(1, 4, 2),
        activation=Activation.GELU_TANH,
    ),
    "no attention": lambda: tiny_graph("F"),
    "int8": lambda: quantized("int8-smoothquant"),
    "fp8 per token": lambda: quantized("fp8-rowwise"),
}
OPTIONS = {
    "onnxruntime": PRESETS["onnxruntime"],
    "tensorrt": options_for({"tensorrt": None}, max_positions=64),
    "tensorrt bfloat16 and its twin": BOTH,
    "packed": PACKED,
    "tensorrt batch 3 float16": options_for({"tensorrt": FLOAT16}, max_positions=64, batch=3),
}


@pytest.fixture(scope="module", params=GRAPHS.values(), ids=GRAPHS.keys())
def graph(request: pytest.FixtureRequest) -> ModelGraph:
    return request.param()


@pytest.fixture(scope="module", params=OPTIONS.values(), ids=OPTIONS.keys())
def options(request: pytest.FixtureRequest) -> Options:
    return request.param


@pytest.fixture(scope="module")
def folder(graph: ModelGraph, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(graph, options, tmp_path_factory.mktemp("networks") / "network")


def save(graph: ModelGraph, options: Options, folder: Path) -> Path:
    save_folder(folder, writer.emit(graph, options), kind=writer.KIND, details={})
    return folder


def models(folder: Path) -> Iterator[onnx.ModelProto]:
    for path in sorted(folder.glob("*.onnx")):
        yield onnx.load(path, load_external_data=False)


def external(initializer: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in initializer.external_data}


def test_is_valid_onnx(folder: Path) -> None:
    """Types and shapes of every node, also in bfloat16, which no runtime on this machine could check."""
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)


def test_ops_are_those_that_both_runtimes_have(folder: Path) -> None:
    for model in models(folder):
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
        assert model.ir_version == IR_VERSION
        assert {(node.domain, node.op_type) for node in model.graph.node} <= {("", op) for op in OPS}
        names = Counter(node.name for node in model.graph.node)
        assert not [name for name, count in names.items() if count > 1]


def test_attention_is_in_the_form_that_tensorrt_imports(folder: Path) -> None:
    for model in models(folder):
        for node in model.graph.node:
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            if node.op_type == "Attention":
                assert attributes == {"scale": 1.0}
                assert (len(node.input), len(node.output)) == (4, 1)
            elif node.op_type == "TensorScatter":
                assert attributes == {"axis": -2, "mode": b"linear"}
            elif node.op_type == "Gemm":
                assert attributes == {"transB": 1}
            elif node.op_type == "RMSNormalization":
                assert (attributes["stash_type"], attributes["axis"]) == (1, -1)
            elif node.op_type == "RotaryEmbedding":
                assert not attributes
                assert len(node.input) == 4


def test_weights_are_in_safetensors_once(folder: Path) -> None:
    """Every initializer that is not tiny is a row range of a tensor of its dtype; every tensor's bytes are used."""
    files = {path.name: read_safetensors(path) for path in folder.glob("*.safetensors")}
    tensors = {(name, t.offset): t for name, file in files.items() for t in file.values()}
    covered: dict[tuple[str, int], set[tuple[int, int]]] = {key: set() for key in tensors}
    for model in models(folder):
        for initializer in model.graph.initializer:
            nbytes = (
                np.prod(initializer.dims, dtype=int)
                * onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type).itemsize
            )
            if initializer.data_location != onnx.TensorProto.EXTERNAL:
                assert nbytes <= SMALL_BYTES or initializer.name == "kv_pos"
                continue
            where = external(initializer)
            start, length = int(where["offset"]), int(where["length"])
            assert length == nbytes
            [key] = [
                (name, offset)
                for (name, offset), tensor in tensors.items()
                if name == where["location"] and offset <= start and start + length <= offset + tensor.nbytes
            ]
            assert tensors[key].dtype.onnx == initializer.data_type
            assert list(tensors[key].shape[1:]) == list(initializer.dims[1:])
            covered[key].add((start - key[1], start - key[1] + length))
    for key, ranges in covered.items():
        end = 0
        for start, stop in sorted(ranges):
            assert start <= end, f"bytes of {key} that nobody uses"
            end = max(end, stop)
        assert end == tensors[key].nbytes
    contents = Counter(tensor.numpy().tobytes() for tensor in tensors.values() if tensor.nbytes > 1024)
    assert max(contents.values()) == 1, "one tensor is stored twice"


def test_contract_is_what_the_network_has(graph: ModelGraph, options: Options, folder: Path) -> None:
    manifest = network_manifest_from_json(json.loads((folder / "network.json").read_text()), "network.json")
    assert manifest.structure == json.loads(json.dumps(structure(graph)))
    assert [slot.num_key_value_heads for slot in manifest.cache] == [a.num_key_value_heads for _, a in graph.attentions]
    for network, variant in zip(options.networks, manifest.networks, strict=True):
        model = onnx.load(folder / variant.file, load_external_data=False)
        batch = variant.batch or "batch"
        capacity = variant.capacity or "capacity"
        dtype = network.dtype or graph.dtype
        assert variant.dtype == dtype.name
        expected: dict[str, tuple[int, list[int | str]]] = {
            "input_ids": (onnx.TensorProto.INT64, [batch, "sequence"]),
            "position_ids": (onnx.TensorProto.INT64, [batch, "sequence"]),
            "cache_write": (onnx.TensorProto.INT64, [batch]),
            "logits_index": (onnx.TensorProto.INT64, [batch]),
        }
        outputs: dict[str, tuple[int, list[int | str]]] = {
            "logits": (onnx.TensorProto.FLOAT, [batch, graph.vocab_size])
        }
        assert variant.chooses_tokens == (network.target == "tensorrt")
        if variant.chooses_tokens:
            outputs["next_tokens"] = onnx.TensorProto.INT64, [batch]
        for slot in manifest.cache:
            shape = [batch, slot.num_key_value_heads, capacity, slot.head_dim]
            expected |= {slot.key: (dtype.onnx, shape), slot.value: (dtype.onnx, shape)}
            outputs |= {slot.present_key: (dtype.onnx, shape), slot.present_value: (dtype.onnx, shape)}
        assert interface(model.graph.input) == expected
        assert interface(model.graph.output) == outputs
        locations = {external(i)["location"] for i in model.graph.initializer if i.external_data}
        assert set(variant.weight_files) == locations


def interface(values: object) -> dict[str, tuple[int, list[int | str]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values  # type: ignore[attr-defined]
    }


def test_plan_announces_what_emit_writes(graph: ModelGraph, options: Options, folder: Path) -> None:
    written = {path.name: path.stat().st_size for path in folder.iterdir() if "manifest" not in path.name}
    assert sizes_of(writer.emit(graph, options)) == written


def test_tensorrt_has_fixed_sizes_and_no_shape_arithmetic(tmp_path: Path) -> None:
    folder = save(GRAPHS["llama"](), OPTIONS["tensorrt"], tmp_path / "network")
    [model] = models(folder)
    assert not {"Shape", "Range", "Concat", "Cast"} & {node.op_type for node in model.graph.node[:-1]}
    [variant] = network_manifest_from_json(json.loads((folder / "network.json").read_text()), "").networks
    assert (variant.capacity, variant.batch, variant.max_positions) == (64, 1, 64)


def test_one_network_per_batch_over_one_weight_file() -> None:
    graph = GRAPHS["llama"]()
    one = options_for({"tensorrt": BFLOAT16}, max_positions=64)
    networks = tuple(replace(one.networks[0], batch=batch, name=f"batch_{batch}") for batch in (1, 4))
    plan = sizes_of(writer.emit(graph, replace(one, networks=networks)))
    assert set(plan) == {"network.json", "batch_1.onnx", "batch_4.onnx", "weights.safetensors"}
    assert plan["weights.safetensors"] == sizes_of(writer.emit(graph, one))["weights.safetensors"]


@pytest.mark.parametrize("order", [(FLOAT16, BFLOAT16), (BFLOAT16, FLOAT16), (FLOAT32, BFLOAT16, FLOAT16)], ids=str)
def test_parts_of_several_dtypes_lose_nothing(order: tuple[DType, ...]) -> None:
    """float16 has the finer steps and bfloat16 the wider range: only float32 holds a stack of both."""
    values = np.array([[1 + 2.0**-10, -3e38, 2.0**-100, 65504.0]])
    with np.errstate(over="ignore"):
        parts = [array(values.astype(np.float32).astype(dtype.numpy)) for dtype in order]
    store = WeightStore(lambda dtype: dtype)
    reference = store.parameter("packed", parts)
    [file] = store.shards(1 << 20).files.values()
    stored = b"".join(bytes(piece) for piece in file.chunks())[file.offsets["packed"] :]
    expected = np.concatenate([part.numpy().astype(np.float32) for part in parts])
    assert (reference.dtype, reference.shape) == (FLOAT32, expected.shape)
    np.testing.assert_array_equal(np.frombuffer(stored, np.float32).reshape(expected.shape), expected)


def test_weights_in_shards(tmp_path: Path) -> None:
    graph = GRAPHS["everything"]()
    folder = save(graph, replace(BOTH, shard_bytes=100_000), tmp_path / "network")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((folder / writer.INDEX_FILE).read_text())
    assert set(index["weight_map"].values()) == set(shards)
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)


def test_stored_values(tmp_path: Path) -> None:
    """Weights are the model's, joined ones in the order that the splits and row ranges assume."""
    graph = tiny_graph("AF", qkv_bias=True)
    [file] = save(graph, PACKED, tmp_path / "network").glob("*.safetensors")
    tensors = read_safetensors(file)
    _, attention = graph.attentions[0]
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    joined = np.concatenate([linear.weight.numpy() for linear in linears])
    np.testing.assert_array_equal(tensors["blocks.0.attention.qkv_proj.weight"].numpy(), joined)
    cos, sin = graph.rope.tables(512, 16)
    np.testing.assert_array_equal(tensors["rope.cos.float32"].numpy(), cos)
    np.testing.assert_array_equal(tensors["rope.sin.float32"].numpy(), sin)


def test_rope_tables_in_pieces() -> None:
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    rope = Rope(theta=500000.0, scaling=scaling)
    cos, sin = rope.tables(300, 32)
    for function, whole in ((np.cos, cos), (np.sin, sin)):
        table = RopeTable(rope, function, 300, 32, BFLOAT16)
        pieces = np.concatenate(list(table.chunks(max_bytes=100)))
        np.testing.assert_array_equal(pieces, whole.astype(ml_dtypes.bfloat16))


def only(*dtypes: DType) -> Options:
    return Options(networks=tuple(Network(target="tensorrt", dtype=dtype) for dtype in dtypes))


@pytest.mark.parametrize(
    ("tensor", "networks", "expected"),
    [
        (FLOAT32, (FLOAT32,), FLOAT32),
        (BFLOAT16, (FLOAT32,), BFLOAT16),
        (FLOAT32, (BFLOAT16,), BFLOAT16),
        (FLOAT32, (BFLOAT16, FLOAT32), BFLOAT16),
        (FLOAT16, (BFLOAT16,), BFLOAT16),
        (FLOAT16, (BFLOAT16, FLOAT32), FLOAT16),
        (BFLOAT16, (FLOAT16, BFLOAT16), BFLOAT16),
        (FLOAT32, (FLOAT16, BFLOAT16), FLOAT32),
        (FLOAT64, (FLOAT32,), FLOAT32),
    ],
    ids=str,
)
def test_stored_dtype(tensor: DType, networks: tuple[DType, ...], expected: DType) -> None:
    assert stored_dtype(only(*networks), tensor, FLOAT32) == expected
    assert stored_dtype(replace(only(*networks), weight_dtype=FLOAT16), tensor, FLOAT32) == FLOAT16


def with_float8_norm() -> ModelGraph:
    graph = tiny_graph("AF AF")
    block = graph.blocks[1]
    attention = block.attention  # type: ignore[union-attr]
    norm = replace(attention.norm, weight=array(np.ones(64, ml_dtypes.float8_e4m3fn)))  # type: ignore[union-attr]
    spoiled = replace(block, attention=replace(attention, norm=norm))  # type: ignore[type-var]
    return replace(graph, blocks=(graph.blocks[0], spoiled))


ORT, TRT = Network(target="onnxruntime", dtype=FLOAT32), Network(target="tensorrt", capacity="max_positions")
REFUSED: dict[str, tuple[Callable[[], ModelGraph], Options, str]] = {
    "float8 weights": (with_float8_norm, Options(networks=(ORT,)), "block 1: .*float8_e4m3fn"),
    "float8 network": (GRAPHS["llama"], Options(networks=(replace(TRT, dtype=FLOAT8_E4M3FN),)), "cannot have this"),
    "float64 network": (lambda: tiny_graph("F", dtype="float64"), Options(networks=(TRT,)), "found float64"),
    "float8 storage": (GRAPHS["llama"], Options(networks=(ORT,), weight_dtype=FLOAT8_E4M3FN), "cannot be stored"),
    "bfloat16 for ONNX Runtime": (
        GRAPHS["llama"],
        Options(networks=(replace(ORT, dtype=BFLOAT16),)),
        "no bfloat16 kernels",
    ),
    "no networks": (GRAPHS["llama"], Options(networks=()), "at least one network"),
    "one name twice": (GRAPHS["llama"], Options(networks=(ORT, replace(ORT, batch=2))), "one name"),
    "a path for a name": (GRAPHS["llama"], Options(networks=(replace(ORT, name="../x"),)), "not a file name"),
    "no positions": (GRAPHS["llama"], Options(networks=(ORT,), max_positions=0), "1 to 512"),
    "more positions than the model has": (GRAPHS["llama"], Options(networks=(ORT,), max_positions=513), "1 to 512"),
    "absurd positions": (
        lambda: tiny_graph("AF", max_position_embeddings=10**12),
        Options(networks=(ORT,)),
        "1 to 16777216",
    ),
    "capacity beyond positions": (
        GRAPHS["llama"],
        Options(networks=(replace(TRT, capacity=65),), max_positions=64),
        "1 to 64",
    ),
    "no capacity for TensorRT": (GRAPHS["llama"], Options(networks=(replace(TRT, capacity=None),)), "fixed capacity"),
    "no batch": (GRAPHS["llama"], Options(networks=(replace(ORT, batch=0),)), "batch is out of range"),
    "no bytes per shard": (GRAPHS["llama"], Options(networks=(ORT,), shard_bytes=0), "shard_bytes"),
}


@pytest.mark.parametrize(("make", "options_", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(make: Callable[[], ModelGraph], options_: Options, problem: str) -> None:
    graph = make()
    with pytest.raises(TargetError, match=problem):
        list(writer.emit(graph, options_))
    assert len(writer.check(graph, options_)) == 1


def test_options_are_what_users_choose() -> None:
    assert options_from(Settings(targets=("tensorrt:bfloat16", "onnxruntime"), max_positions=64)) == BOTH
    assert options_from(Settings(targets=("tensorrt", "onnxruntime:float32"), dtype=BFLOAT16, max_positions=64)) == BOTH
    assert options_from(Settings()) == PRESETS["onnxruntime"]


@pytest.mark.parametrize(
    "targets",
    [("abacus",), ("",), ("tensorrt", "tensorrt:bfloat16"), ("tensorrt:int5",), ("tensorrt:float16:x",)],
    ids=str,
)
def test_targets_that_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(TargetError, match=f"no such --target: expected onnxruntime or tensorrt.*found {targets[-1]}$"):
        options_from(Settings(targets=targets))


def test_all_problems_at_once() -> None:
    options = Options(
        networks=(replace(ORT, dtype=BFLOAT16, batch=0), replace(TRT, capacity=None)), max_positions=0, shard_bytes=0
    )
    assert len(writer.check(tiny_graph("AF"), options)) == 5


def test_check_reads_nothing() -> None:
    assert writer.check(GRAPHS["everything"](), BOTH) == []
