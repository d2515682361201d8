"""Bad checkpoints and plans: one clear error each, never a traceback of ours, in bounded time and memory."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import stat
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from exporter.errors import CheckpointError, PlanError
from exporter.graph import Attention
from exporter.pipeline import apply_plan
from exporter.plan import read_plan
from exporter.read import open_model
from tests.mutants import mutate, mutate_bytes
from tests.tiny import tiny_graph

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
DOWN = "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors() -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,), "lm_head.weight": (10, 8)}
    for layer in range(2):
        stem = f"model.layers.{layer}"
        shapes |= {
            f"{stem}.input_layernorm.weight": (8,),
            f"{stem}.self_attn.q_proj.weight": (8, 8),
            f"{stem}.self_attn.k_proj.weight": (4, 8),
            f"{stem}.self_attn.v_proj.weight": (4, 8),
            f"{stem}.self_attn.o_proj.weight": (8, 8),
            f"{stem}.post_attention_layernorm.weight": (8,),
            f"{stem}.mlp.gate_proj.weight": (12, 8),
            f"{stem}.mlp.up_proj.weight": (12, 8),
            f"{stem}.mlp.down_proj.weight": (8, 12),
        }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))


def write_single(folder: Path) -> None:
    write_config(folder)
    save_file(tensors(), folder / "model.safetensors", {"format": "pt"})


def write_sharded(folder: Path) -> None:
    write_config(folder)
    weight_map = {}
    for shard, layer in zip(SHARDS, (0, 1), strict=True):
        part = {name: value for name, value in tensors().items() if (".layers.0." in name) == (layer == 0)}
        save_file(part, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def sound(folder: Path, write: Callable[[Path], None]) -> Path:
    folder.mkdir()
    write(folder)
    open_model(folder, need_weights=True)
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return sound(tmp_path / "model", write_single)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return sound(tmp_path / "model", write_sharded)


def refused(folder: Path, *parts: str) -> None:
    """Opening raises one CheckpointError whose text has all parts, in order, and nothing long."""
    with pytest.raises(CheckpointError) as caught:
        open_model(folder, need_weights=True)
    text = str(caught.value)
    assert re.search(".*".join(map(re.escape, parts)), text, re.DOTALL), text
    assert len(text) < 3000, text


# --- headers

Header = dict[str, Any]


def rewrite(path: Path, change: Callable[[Header], object], data: Callable[[bytes], bytes] = lambda raw: raw) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data(raw[8 + size :]))


def in_header(**change: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "model.safetensors", lambda header: header[DOWN].update(change))


def offsets(name: str, begin: int, end: int) -> Callable[[Path], None]:
    """Move one tensor: `begin` and `end` are added to its offsets."""

    def change(header: Header) -> None:
        old = header[name]["data_offsets"]
        header[name]["data_offsets"] = [old[0] + begin, old[1] + end]

    return lambda folder: rewrite(folder / "model.safetensors", change)


def overlap(folder: Path) -> None:
    """Two tensors of one size on the same bytes, a hole where the second was."""

    def change(header: Header) -> None:
        one, two = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
        header[two]["data_offsets"] = header[one]["data_offsets"]

    rewrite(folder / "model.safetensors", change)


def hole(folder: Path) -> None:
    """Everything behind the first tensor moves by 4 bytes, and the file has them."""

    def change(header: Header) -> None:
        for fields in header.values():
            if "data_offsets" in fields and fields["data_offsets"][0] > 0:
                fields["data_offsets"] = [offset + 4 for offset in fields["data_offsets"]]

    rewrite(folder / "model.safetensors", change, lambda raw: raw + bytes(4))


def set_header_length(length: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])

    return change


def raw_header(header: bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header) and None
    )


def cut(keep: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])

    return change


def with_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def rewrite_tensors(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return rewrite_tensors


FILE = "model.safetensors"
HEADERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "header length 2^62": (
        set_header_length(1 << 62),
        (FILE, "header length is beyond", f"found {1 << 62}", "truncat"),
    ),
    "header length 2^64-1": (set_header_length((1 << 64) - 1), (FILE, "header length is beyond")),
    "header one byte too long for the file": (
        lambda folder: set_header_length((folder / FILE).stat().st_size - 7)(folder),
        (FILE, "header length is beyond"),
    ),
    "header length 0": (set_header_length(0), (FILE, "not valid JSON")),
    "no bytes": (cut(0), (FILE, "too short for a header: expected >= 8 bytes, found 0")),
    "seven bytes": (cut(7), (FILE, "too short for a header", "found 7")),
    "cut in the header": (cut(100), (FILE, "header length is beyond")),
    "cut in the data": (cut(-1), (FILE, "data does not end where the header says", "found", "truncated")),
    "data too long": (
        lambda folder: (folder / FILE).open("ab").write(b"x"),
        (FILE, "data does not end where the header says"),
    ),
    "header is a list": (raw_header(b"[]"), (FILE, "header is not a JSON object")),
    "header is not JSON": (raw_header(b"{'a': 1}"), (FILE, "not valid JSON")),
    "header is not UTF-8": (raw_header(b'{"\xff": 1}'), (FILE, "not valid JSON")),
    "header with a tensor twice": (raw_header(b'{"a": {}, "a": {}}'), (FILE, "a key occurs twice")),
    "header nested deeply": (raw_header(b'{"a":' * 5000 + b"1" + b"}" * 5000), (FILE, "not valid JSON")),
    "header that is a pointer to elsewhere": (
        lambda folder: (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        (FILE, "a Git LFS pointer is in the place of the file. Fetch the file itself (git lfs pull)"),
    ),
    "header of something else": (
        lambda folder: (folder / FILE).write_text("GGUF, for example, and more of it"),
        (FILE, "header length is beyond", "not a safetensors file"),
    ),
    "entry is a number": (
        lambda folder: rewrite(folder / FILE, lambda header: header.update({DOWN: 1})),
        (DOWN, "malformed header entry"),
    ),
    "entry without shape": (
        lambda folder: rewrite(folder / FILE, lambda header: header[DOWN].pop("shape")),
        (DOWN, "malformed header entry"),
    ),
    "entry with more": (in_header(strides=[1, 8]), (DOWN, "malformed header entry")),
    "dtype unknown": (in_header(dtype="F7"), (FILE, DOWN, "unknown dtype", "BF16", "found F7")),
    "dtype a list": (in_header(dtype=["F32"]), (DOWN, "unknown dtype")),
    "shape negative": (in_header(shape=[-8, -12]), (FILE, DOWN, "malformed shape", "[-8, -12]")),
    "shape of floats": (in_header(shape=[8.0, 12.0]), (DOWN, "malformed shape")),
    "shape of booleans": (in_header(shape=[True, 96]), (DOWN, "malformed shape")),
    "shape a string": (in_header(shape="8"), (DOWN, "malformed shape")),
    "shape of too many sizes": (in_header(shape=[8, 12] + [1] * 50), (DOWN, "malformed shape")),
    "shape beyond 64 bits": (in_header(shape=[1 << 63, 12]), (DOWN, "malformed shape")),
    "shape whose product overflows": (in_header(shape=[1 << 62, 1 << 62]), (DOWN, "do not fit shape and dtype")),
    "shape of another size": (in_header(shape=[8, 11]), (DOWN, "do not fit shape and dtype", "352 bytes")),
    "offsets beyond the file": (offsets(DOWN, 1 << 40, 1 << 40), (FILE, "hole in the data")),
    "last offsets beyond the file": (
        lambda folder: rewrite(
            folder / FILE,
            lambda header: header.update(
                extra={
                    "dtype": "F32",
                    "shape": [1 << 30],
                    "data_offsets": [
                        max(fields["data_offsets"][1] for fields in header.values() if "shape" in fields),
                        max(fields["data_offsets"][1] for fields in header.values() if "shape" in fields) + (4 << 30),
                    ],
                }
            ),
        ),
        (FILE, "data does not end where the header says"),
    ),
    "offsets reversed": (in_header(data_offsets=[384, 0]), (FILE, DOWN, "do not fit shape and dtype")),
    "offsets negative": (in_header(data_offsets=[-384, 0]), (FILE, DOWN, "malformed data_offsets")),
    "offsets of three": (in_header(data_offsets=[0, 384, 1]), (FILE, DOWN, "malformed data_offsets")),
    "offsets overlapping": (overlap, (FILE, "down_proj.weight", "tensor data overlaps the tensor before it")),
    "offsets overlapping by four bytes": (offsets(DOWN, -4, -4), (FILE, "overlaps")),
    "a hole": (hole, (FILE, "hole in the data: expected", "found")),
    "name of 5000 characters": (
        lambda folder: rewrite(folder / FILE, lambda header: header.update({"n" * 5000: header.pop(DOWN)})),
        (FILE, "tensor name is too long", "5000"),
    ),
    "name with half a surrogate pair": (
        lambda folder: rewrite(folder / FILE, lambda header: header.update({"\ud800": header.pop(DOWN)})),
        (FILE, "not valid JSON", "surrogates"),
    ),
    "name with a line of its own": (
        with_tensors(lambda found: found.update({"a\nerror: b": np.zeros(1, np.float32)})),
        (FILE, "a\\nerror: b", "not part of a llama model"),
    ),
    "wrong shape": (
        with_tensors(lambda found: found.update({DOWN: np.zeros((8, 6), np.float32)})),
        (FILE, DOWN, "(block 1)", "wrong shape: expected [8, 12] from intermediate_size", "found [8, 6]", "1/2"),
    ),
    "transposed": (
        with_tensors(lambda found: found.update({DOWN: np.zeros((12, 8), np.float32)})),
        (FILE, DOWN, "(block 1)", "wrong shape", "found [12, 8]", "transposed"),
    ),
    "wrong rank": (
        with_tensors(lambda found: found.update({DOWN: np.zeros(96, np.float32)})),
        (DOWN, "wrong shape", "found [96]"),
    ),
    "wrong dtype": (
        with_tensors(lambda found: found.update({DOWN: np.zeros((8, 12), np.int8)})),
        (FILE, DOWN, "(block 1)", "wrong dtype for a weight: expected float32 or float16", "found int8"),
    ),
    "wrong dtype that we never read": (
        with_tensors(lambda found: found.update({DOWN: np.zeros((8, 12), np.int64)})),
        (DOWN, "wrong dtype", "I64"),
    ),
    "tensor missing": (with_tensors(lambda found: found.pop(DOWN)), (DOWN, "(block 1)", "tensor is missing")),
    "tensor unknown": (
        with_tensors(lambda found: found.update({"model.layers.1.mlp.router.weight": np.zeros(3, np.float32)})),
        (FILE, "model.layers.1.mlp.router.weight", "not part of a llama model"),
    ),
    "tensor of a layer beyond": (
        with_tensors(
            lambda found: found.update({"model.layers.2.mlp.down_proj.weight": np.zeros((8, 12), np.float32)})
        ),
        (FILE, "model.layers.2.mlp.down_proj.weight", "not part of a llama model"),
    ),
    "buffer of a layer, misspelled": (
        with_tensors(lambda found: found.update({"model.layers.x.self_attn.rotary_emb.inv_freq": np.zeros(1)})),
        (FILE, "inv_freq", "not part of"),
    ),
    "bias where the config has none": (
        with_tensors(lambda found: found.update({"model.layers.0.mlp.up_proj.bias": np.zeros(12, np.float32)})),
        (FILE, "model.layers.0.mlp.up_proj.bias", "not part of"),
    ),
    "all tensors renamed": (
        with_tensors(lambda found: [found.update({"x." + name: found.pop(name)}) for name in list(found)]),
        ("42 problems", "tensor is missing", "and 30 more"),
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_and_tensors(case: str, single: Path) -> None:
    spoil, parts = HEADERS[case]
    spoil(single)
    refused(single, *parts)


# --- index and files


def in_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite_index(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return rewrite_index


def map_to(name: object) -> Callable[[Path], None]:
    return in_index(lambda index: index["weight_map"].update({DOWN: name}))


def replace_by(make: Callable[[Path], object], name: str = SHARDS[1]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.rename(folder.parent / "outside")
        make(path)

    return change


def only(name: str) -> Callable[[Path], None]:
    """Weights in a file of another format."""

    def replace_weights(folder: Path) -> None:
        no_weights(folder)
        (folder / name).write_bytes(b"\x80\x04.")

    return replace_weights


def no_weights(folder: Path) -> None:
    for name in (*SHARDS, INDEX):
        (folder / name).unlink()


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("may not make a device here")


FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "shard missing": (lambda folder: (folder / SHARDS[1]).unlink(), (SHARDS[1], "cannot be opened (No such file")),
    "shard truncated": (
        lambda folder: (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-100]),
        (SHARDS[1], "data does not end where the header says", "truncated"),
    ),
    "shard empty": (lambda folder: (folder / SHARDS[1]).write_bytes(b""), (SHARDS[1], "too short")),
    "shard a folder": (replace_by(Path.mkdir), (SHARDS[1], "not a regular file")),
    "shard a FIFO": (replace_by(os.mkfifo), (SHARDS[1], "not a regular file")),
    "shard a device": (replace_by(device), (SHARDS[1], "not a regular file")),
    "shard a link out": (
        replace_by(lambda path: path.symlink_to("../outside")),
        (SHARDS[1], "link leaves", "outside", "Copy the file"),
    ),
    "shard a link to a device": (replace_by(lambda path: path.symlink_to("/dev/zero")), (SHARDS[1], "link leaves")),
    "shard a link to itself": (replace_by(lambda path: path.symlink_to(path.name)), (SHARDS[1], "cannot be")),
    "shard a link to nothing": (replace_by(lambda path: path.symlink_to("nothing")), (SHARDS[1], "No such file")),
    "index a link out": (replace_by(lambda path: path.symlink_to("../outside"), INDEX), (INDEX, "link leaves")),
    "config a link out": (
        replace_by(lambda path: path.symlink_to("../outside"), "config.json"),
        ("config.json", "link leaves"),
    ),
    "config a FIFO": (replace_by(os.mkfifo, "config.json"), ("config.json", "not a regular file")),
    "config a folder": (replace_by(Path.mkdir, "config.json"), ("config.json", "not a regular file")),
    "tokenizer a link out": (
        lambda folder: (folder / "tokenizer.json").symlink_to("/etc/passwd"),
        ("tokenizer.json", "link leaves"),
    ),
    "folder link out": (
        lambda folder: ((folder / "sub").symlink_to("/etc"), map_to("sub/passwd")(folder)),
        ("sub/passwd", "link leaves"),
    ),
    "path with ..": (map_to("../outside"), (INDEX, "path leaves the model folder", "'../outside'")),
    "path with .. inside": (map_to("a/../../outside"), (INDEX, "path leaves the model folder")),
    "absolute path": (map_to("/etc/passwd"), (INDEX, "path leaves the model folder", "'/etc/passwd'")),
    "path of another system": (map_to("..\\outside"), (INDEX, "path leaves the model folder")),
    "path with NUL": (map_to("a\0b"), (INDEX, "path leaves the model folder")),
    "path empty": (map_to(""), (INDEX, "path leaves the model folder")),
    "path the folder": (map_to("."), ("not a regular file",)),
    "path too long": (map_to("x/" * 2000 + "x"), (INDEX, "file name is too long", "found 4001")),
    "name too long": (map_to("x" * 300), ("cannot be opened",)),
    "file name a number": (map_to(7), (INDEX, "weight_map maps tensor names to file names")),
    "other shard": (map_to(SHARDS[0]), (SHARDS[1], DOWN, "not where the index says", SHARDS[0])),
    "tensor that no shard has": (
        in_index(lambda index: index["weight_map"].update({"model.layers.9.x": SHARDS[0]})),
        (SHARDS[0], "model.layers.9.x", "the index names a tensor that the shard lacks"),
    ),
    "tensor that the index lacks": (
        in_index(lambda index: index["weight_map"].pop(DOWN)),
        (SHARDS[1], DOWN, "not where the index says", "an entry in weight_map"),
    ),
    "index a list": (lambda folder: (folder / INDEX).write_text("[]"), (INDEX, "no weight_map")),
    "index empty": (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), (INDEX, "no weight_map")),
    "index with a list": (in_index(lambda index: index.update(weight_map=[1])), (INDEX, "no weight_map")),
    "index not JSON": (lambda folder: (folder / INDEX).write_text("{"), (INDEX, "not valid JSON")),
    "index names a tensor twice": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        (INDEX, "a key occurs twice"),
    ),
    "pickle only": (only("pytorch_model.bin"), ("pytorch_model.bin", "pickles", "never opened", "safetensors")),
    "GGUF only": (only("m-Q4_K_M.gguf"), ("m-Q4_K_M.gguf: weights are GGUF", "Give the folder of safetensors")),
    "no weights": (no_weights, ("no safetensors weights: expected model.safetensors or model.safetensors.index.json",)),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        ("adapter_config.json: an adapter", "is not read. Merge it into its model"),
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("no config.json in the model folder",)),
    "marker of an interrupted run": (
        lambda folder: (folder / ".fuselage-incomplete").touch(),
        ("model: folder is incomplete", "interrupted"),
    ),
    "manifest with a file that is not there": (
        lambda folder: (folder / "fuselage.manifest.json").write_text(
            json.dumps(
                {"manifest_schema": 1, "kind": "checkpoint", "details": {}, "files": {"x": {"bytes": 1, "sha256": ""}}}
            )
        ),
        ("x: file is missing",),
    ),
    "manifest a FIFO": (lambda folder: os.mkfifo(folder / "fuselage.manifest.json"), ("not a regular file",)),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_and_indices(case: str, sharded: Path) -> None:
    spoil, parts = FOLDERS[case]
    spoil(sharded)
    refused(sharded, *parts)


@pytest.mark.parametrize("path", ["nowhere", "x" * 300, "a\0b"])
def test_paths_that_are_no_model(path: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        open_model(tmp_path / path, need_weights=True)


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("no-such-org/Llama-3.1-8B", ": hf download no-such-org/Llama-3.1-8B --local-dir Llama-3.1-8B"),
        ("https://huggingface.co/org/Model_2", ": hf download org/Model_2 --local-dir Model_2"),
        ("./Llama-3.1-8B", ""),
        ("../org/model", ""),
        ("/org/model", ""),
        ("https://huggingface.co/org/model/tree/main", ""),
        ("here/Llama-3.1-8B", ""),  # this folder is there
    ],
)
def test_a_name_on_the_hub_is_no_folder(
    path: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(CheckpointError, match=r"no such model folder\. .* none is downloaded") as refusal:
        open_model(Path(path), need_weights=True)
    assert str(refusal.value).partition("none is downloaded")[2] == command


def test_a_cache_is_no_model_but_its_snapshots_are(sharded: Path) -> None:
    cache = sharded.parent / "models--some--model"
    (cache / "snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no config\.json in the model folder$"):
        open_model(cache, need_weights=True)
    sharded.rename(cache / "snapshots" / "0123abcd")
    with pytest.raises(CheckpointError, match=r"Give one of its snapshots: .*snapshots/0123abcd$"):
        open_model(cache, need_weights=True)
    open_model(cache / "snapshots" / "0123abcd", need_weights=True)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_weight_file_is_no_model(need_weights: bool, sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a model: expected a model folder, or a config\.json alone"):
        open_model(sharded / SHARDS[0], need_weights=need_weights)
    (sharded / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=r"m\.gguf: weights are GGUF, which is not read: expected a model folder"):
        open_model(sharded / "m.gguf", need_weights=need_weights)


# --- config

BAD_VALUES: dict[str, Any] = {
    "0": 0,
    "-1": -1,
    "1e12": 1e12,
    "10^12": 10**12,
    "10^4000": 10**4000,
    "string": "8",
    "true": True,
    "null": None,
    "list": [8],
    "object": {"a": 8},
    "8.5": 8.5,
    "8.0": 8.0,
}
SIZE_KEYS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"]


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("key", [*SIZE_KEYS, "intermediate_size", "num_key_value_heads", "head_dim"])
def test_sizes_in_the_config(key: str, value: str, single: Path) -> None:
    (single / "config.json").write_text(json.dumps(CONFIG | {key: BAD_VALUES[value]}))
    if value == "null" and key == "head_dim":  # hidden_size / num_attention_heads, which is right here
        open_model(single, need_weights=True)
    elif value == "null" and key == "num_key_value_heads":  # as many as attention heads, which is not
        refused(single, "k_proj.weight", "wrong shape: expected [8, 8]")
    elif value == "null" and key == "intermediate_size":
        refused(single, "config.json", "no intermediate_size")
    else:
        refused(single, "config.json", f"{key}: ", "found " + json.dumps(BAD_VALUES[value]).strip('"')[:60])


RAW_VALUES = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, '"\\ud800"', "[" * 200 + "]" * 200]


@pytest.mark.parametrize("raw", RAW_VALUES, ids=lambda raw: raw[:12])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "something_that_nobody_reads"])
def test_values_that_are_not_json(key: str, raw: str, single: Path) -> None:
    text = json.dumps(CONFIG | {key: "HERE"}).replace('"HERE"', raw)
    (single / "config.json").write_text(text)
    refused(single, "config.json", "not valid JSON")


CONFIGS: dict[str, tuple[str | dict[str, Any], tuple[str, ...]]] = {
    "empty": ("", ("not valid JSON",)),
    "a list": ("[]", ("config is not a JSON object",)),
    "a number": ("7", ("config is not a JSON object",)),
    "no keys": ("{}", ("unknown architecture", "LlamaForCausalLM")),
    "only the architecture": ('{"architectures": ["LlamaForCausalLM"]}', ("6 problems", "hidden_size: Field required")),
    "a key twice": ('{"hidden_size": 8, "hidden_size": 9}', ("a key occurs twice",)),
    "too large": ('{"x": "' + "y" * (5 << 20) + '"}', ("file is too large", "found 52428")),
    "binary": ("\0" * 100, ("not valid JSON",)),
    "unknown architecture": ({"architectures": ["GPT2LMHeadModel"]}, ("unknown architecture", "GPT2LMHeadModel")),
    "architectures a string": ({"architectures": "LlamaForCausalLM"}, ("unknown architecture",)),
    "architectures of objects": ({"architectures": [{"a": 1}, None, 3]}, ("unknown architecture",)),
    "architectures of megabytes": ({"architectures": ["x" * 1_000_000]}, ("unknown architecture", "xxxxx")),
    "eps zero": ({"rms_norm_eps": 0.0}, ("rms_norm_eps: ", "greater than 0")),
    "eps negative": ({"rms_norm_eps": -1e-5}, ("rms_norm_eps: ", "found -1e-05")),
    "eps one": ({"rms_norm_eps": 1.0}, ("rms_norm_eps: ", "less than 1")),
    "eps a string": ({"rms_norm_eps": "1e-5"}, ("rms_norm_eps: ", "valid number")),
    "tied a string": ({"tie_word_embeddings": "false"}, ("tie_word_embeddings: ", "valid boolean")),
    "bias a number": ({"attention_bias": 1}, ("attention_bias: ", "valid boolean")),
    "activation unknown": ({"hidden_act": "tanh"}, ("hidden_act: ", "silu", "found tanh")),
    "theta zero": ({"rope_theta": 0}, ("rope_theta: ", "found 0")),
    "rope scaling a list": ({"rope_scaling": [1]}, ("rope_scaling: ",)),
    "rope type of megabytes": ({"rope_scaling": {"rope_type": "x" * 1_000_000}}, ("RoPE scaling", "xxxx")),
    "quantized in megabytes": (
        {"quantization_config": {"quant_method": "x" * 1_000_000}},
        ("unknown quantization method", "modelopt or compressed-tensors", "xxxx"),
    ),
    "blocks of nothing": ({"block_configs": [None, {}]}, ("problems", "block_configs.0", "block_configs.1.attention")),
    "blocks of megabytes": ({"block_configs": ["x" * 10] * 50_000}, ("50000 problems", "and 49988 more")),
    "too many heads for the matrix": (
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        ("q_proj.weight (block 0)", "wrong shape", "[16, 8]"),
    ),
    "more layers than tensors": ({"num_hidden_layers": 3}, ("layers.2.input_layernorm.weight (block 2)", "is missing")),
    "fewer layers than tensors": ({"num_hidden_layers": 1}, ("9 problems", "not part of a llama model")),
    "most layers there can be": ({"num_hidden_layers": 8192}, ("73710 problems", "and 73698 more")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, single: Path) -> None:
    config, parts = CONFIGS[case]
    (single / "config.json").write_text(config if isinstance(config, str) else json.dumps(CONFIG | config))
    refused(single, *parts)


# --- plans

PLANS: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty": ("", ("not a plan", "drop_attention, drop_ffn, fuse, parallel", "null")),
    "a list": ("- 1", ("not a plan", "[1]")),
    "a word": ("fuse", ("not a plan",)),
    "unknown key": ("fuze: [[1, 2]]", ("fuze: unknown key",)),
    "tabs": ("fuse:\n\t- [1, 2]", ("not valid YAML", "line 2")),
    "not closed": ("fuse: [[1, 2]", ("not valid YAML",)),
    "two documents": ("fuse: []\n---\nfuse: []", ("not valid YAML",)),
    "python object": ("fuse: !!python/object/apply:os.system ['true']", ("tags (!name)", "python/object")),
    "tag of a boolean that is none": ("fuse: !!bool x", ("tags (!name)", "bool")),
    "tag of an empty number": ("fuse: [!!int '']", ("tags (!name)", "int")),
    "alias": ("fuse: &a [[1, 2]]\nparallel: *a", ("aliases",)),
    "alias bomb": (
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijkl")),
        ("aliases",),
    ),
    "not UTF-8": ("fuse: \udcff", ("cannot be read",)),
    "NUL in a text": ('fuse: "a\\0b"', ("a text has a NUL character", "found a")),
    "impossible date": ("fuse: 2020-99-99", ("fuse: ", "expected a list", "found 2020-99-99")),
    "date for a key": ("2020-01-01: 3", ("2020-01-01: unknown key",)),
    "number of 5000 digits": ("drop_attention: [" + "9" * 5000 + "]", ("not valid YAML", "digits")),
    "nested deeply": ("fuse: " + "[" * 400 + "]" * 400, ("plan.yaml", "nested too deeply", "<= 16 levels")),
    "too large": ("fuse: []\n" + "#" * (1 << 18), ("too large",)),
    "fuse a number": ("fuse: 3", ("fuse: ", "expected a list")),
    "fuse flat": ("fuse: [1, 2]", ("fuse.0", "found 1")),
    "range of one": ("fuse: [[1]]", ("fuse.0",)),
    "range of three": ("fuse: [[1, 2, 3]]", ("fuse.0",)),
    "range of strings": ("fuse: [['1', '2']]", ("fuse.0", "a whole number from 0")),
    "range of floats": ("fuse: [[1.0, 2.0]]", ("fuse.0", "a whole number from 0")),
    "range of booleans": ("fuse: [[true, false]]", ("fuse.0", "a whole number from 0")),
    "range of nulls": ("fuse: [[null, 2]]", ("fuse.0", "a whole number from 0")),
    "layer negative": ("drop_attention: [-1]", ("drop_attention.0", "from 0 to 65535")),
    "layer absurd": ("drop_attention: [1000000000000]", ("drop_attention.0", "from 0 to 65535")),
    "infinity": ("drop_attention: [.inf]", ("drop_attention.0",)),
    "dropped reversed": ("drop_attention: [[3, 2]]", ("lower to its higher layer", "[3, 2]")),
    "dropped twice": ("drop_attention: [0, [0, 1]]", ("listed twice", "[0, 1]")),
    "fused with attention": ("fuse: [[0, 2]]", ("block 0", "the run contains an attention, in layer 0", "end the run")),
    "fused overlapping": ("fuse: [[1, 2], [2, 3]]", ("fused runs overlap", "[1, 2] and [2, 3]")),
    "run of one": ("fuse: [[1, 1]]", ("block 1", "a run needs at least two FFNs", "found 1")),
    "run of one FFN and an empty block": ("drop_attention: [5]\nfuse: [[5, 5]]", ("at least two FFNs",)),
    "parallel of one": ("parallel: [[0, 0]]", ("block 0", "at least two blocks that do something", "found 1")),
    "parallel cuts a fused block": (
        "fuse: [[1, 3]]\nparallel: [[0, 2]]",
        ("[0, 2] cuts through a block of several layers: expected [0, 3]",),
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans(case: str, tmp_path: Path) -> None:
    text, parts = PLANS[case]
    path = tmp_path / "plan.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    graph = tiny_graph("AF F F F AF AF", hidden_size=16, intermediate_size=8, vocab_size=8)
    with pytest.raises(PlanError) as caught:
        apply_plan(graph, read_plan(path))
    found = str(caught.value)
    assert re.search(".*".join(map(re.escape, parts)), found, re.DOTALL), found
    assert len(found) < 1000


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(PlanError, match=r"cannot be read \("):
            read_plan(path)


# --- thousands of mutants

BLOCKS = {
    "block_configs": [
        {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"no_op": False, "intermediate_size": 12}},
        {"attention": {"num_key_value_heads": 1, "mamba": None}, "ffn": {"ffn_mult": None, "intermediate_size": 12}},
    ]
}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
WRITTEN = {
    "architectures": ["DeciLMForCausalLM"],
    "fuselage": {"qk_norm": False, "blocks": [{"source_layers": [i], "segments": [[i, 12]]} for i in range(2)]},
}
CONFIG_BASES = [
    CONFIG,
    CONFIG | BLOCKS,
    CONFIG | BLOCKS | WRITTEN,
    CONFIG | {"rope_scaling": ROPE},
    CONFIG | {"rope_parameters": {**ROPE, "rope_type": "yarn", "rope_theta": 1e4}},
    CONFIG | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
]


def check_text(text: str) -> None:
    """An error can be printed, and is not the file it is about."""
    assert len(text.encode()) < 20_000


def check_mutant(folder: Path) -> None:
    """Open it; only our errors may come out. Whatever opens must be readable to the last byte and tell its size."""
    try:
        graph = open_model(folder, need_weights=False).graph
    except CheckpointError as error:
        check_text(str(error))
        return
    assert graph.num_parameters > 0
    if graph.has_bytes:
        for _, attention in graph.attentions:
            assert isinstance(attention, Attention)
            attention.q_proj.weight.numpy()
    if graph.head_dim is not None and graph.head_dim <= 4096:
        cos, sin = graph.rope.tables(4, graph.head_dim)
        assert np.isfinite(cos).all()
        assert np.isfinite(sin).all()


@dataclass(frozen=True)
class Kind:
    """A sound folder of one kind, of which an example spoils one file and then puts it back."""

    folder: Path
    files: dict[str, bytes]

    def check(self, name: str, raw: bytes) -> None:
        (self.folder / name).write_bytes(raw)
        try:
            check_mutant(self.folder)
        finally:
            (self.folder / name).write_bytes(self.files[name])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("mutants")
    found = {}
    for name, write in (("structure", write_config), ("single", write_single), ("sharded", write_sharded)):
        (root / name).mkdir()
        write(root / name)
        found[name] = Kind(root / name, {path.name: path.read_bytes() for path in (root / name).iterdir()})
    return found


seeds = st.integers(0, 2**32 - 1).map(random.Random)
thousands = settings(
    max_examples=1000,
    deadline=20_000,  # ms: what takes longer hangs
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()  # with NaN and Infinity, as a careless writer has it


@thousands
@given(rng=seeds)
def test_mutated_configs(rng: random.Random, kinds: dict[str, Kind]) -> None:
    config: Any = copy.deepcopy(rng.choice(CONFIG_BASES))
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        config = mutate(config, rng)
    kinds["structure"].check("config.json", dumps(config))


@thousands
@given(rng=seeds)
def test_mutated_headers(rng: random.Random, kinds: dict[str, Kind]) -> None:
    raw = kinds["single"].files[FILE]
    size = int.from_bytes(raw[:8], "little")
    header: Any = json.loads(raw[8 : 8 + size])
    for _ in range(rng.choice([1, 1, 2, 5])):
        header = mutate(header, rng)
    encoded = dumps(header)
    kinds["single"].check(FILE, len(encoded).to_bytes(8, "little") + encoded + raw[8 + size :])


@thousands
@given(rng=seeds)
def test_mutated_indices(rng: random.Random, kinds: dict[str, Kind]) -> None:
    index: Any = json.loads(kinds["sharded"].files[INDEX])
    for _ in range(rng.choice([1, 1, 2, 5])):
        index = mutate(index, rng)
    kinds["sharded"].check(INDEX, dumps(index))


@thousands
@given(rng=seeds)
def test_mutated_bytes(rng: random.Random, kinds: dict[str, Kind]) -> None:
    kind = kinds[rng.choice(["single", "sharded"])]
    name = rng.choice(sorted(kind.files))
    kind.check(name, mutate_bytes(kind.files[name], rng))


BOMBS: dict[str, Callable[[Path], object]] = {
    "header length": lambda folder: set_header_length(1 << 40)(folder),
    "header of 50 MB": raw_header(b"{" + b" " * (50 << 20)),
    "shape": in_header(shape=[1 << 40, 1 << 20]),
    "sizes": lambda folder: (folder / "config.json").write_text(
        json.dumps(CONFIG | {"hidden_size": 1 << 24, "intermediate_size": 1 << 24, "vocab_size": 1 << 24})
    ),
    "config": lambda folder: (folder / "config.json").write_text('{"a": [' + "{}," * 10_000_000 + "{}]}"),
    "depth": lambda folder: (folder / "config.json").write_text("[" * 2_000_000),
}


@pytest.mark.parametrize("case", BOMBS)
def test_memory_is_bounded(case: str, single: Path) -> None:
    BOMBS[case](single)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            open_model(single, need_weights=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 << 20
