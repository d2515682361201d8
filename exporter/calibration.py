"""Activation ranges over text, in one pass over the weights: what static scales and smoothing are made of.

Every block is loaded once and sees all windows; kept is one number per channel and site (`exporter.ranges`), the
largest magnitude or, on request, a percentile of it over the tokens. Sites are filed under the source layers they came
from, so the ranges of a model also serve what passes make of it: fused FFNs put their layers' inner channels side by
side, and take the larger of their inputs, which is exact for what was measured and needs no second calibration.

Shape letters: N = windows, S = tokens per window, C = channels of a site.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from exporter.dtypes import FLOAT32
from exporter.errors import FuselageError
from exporter.graph import (
    FFN,
    Attention,
    Block,
    LinearSublayer,
    ModelGraph,
    linear_names,
    members,
    structure,
    weights,
)
from exporter.hidden_states import (
    DEFAULT_BATCH,
    DEFAULT_BUDGET_BYTES,
    HiddenStates,
    Progress,
    check_finite,
    states_folder,
)
from exporter.lazy import LazyTensor, array, concat, full
from exporter.manifests import validated
from exporter.ranges import DOWN_PROJ, BlockRanges, Ranges, SublayerRanges
from exporter.reference import Reference
from exporter.safetensors_io import SkippedTensor, read_json, read_safetensors
from exporter.writers.files import Content, json_bytes

RANGES_FILE = "ranges.safetensors"
CALIBRATION_FILE = "calibration.json"


class CalibrationError(FuselageError):
    """Ranges that cannot be used: of another model, incomplete, or not numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The ranges of one model over one text."""

    fingerprint: str  # of the graph that was measured, see `fingerprint`
    text: str  # what was read, for people
    tokens: int
    percentile: float | None  # None: the largest magnitude
    ranges: Mapping[str, np.ndarray]  # "<source layers>.<sublayer>.<site>", e.g. "8+9.ffn.down_proj": float32 [C]


def fingerprint(graph: ModelGraph) -> str:
    """Tell one model's weights from another's without reading them: structure, and the first row of every tensor."""
    found = hashlib.sha256(json.dumps(structure(graph), sort_keys=True).encode())
    for tensor in weights(graph):
        found.update(tensor.rows(0, 1).tobytes())
    return found.hexdigest()


def calibrate(
    graph: ModelGraph,
    tokens: np.ndarray,
    *,
    text: str,
    percentile: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    work: Path | None = None,
    batch: int = DEFAULT_BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure every site of a graph on tokens int64 [N, S].

    Args:
        percentile: of the tokens, per channel, e.g. 99.9: what lies above is clipped. None: nothing is.
        budget_bytes: hidden states beyond this go to files.
        work: folder for those files; an interrupted calibration goes on from there when called again with the same
            arguments, and a finished one is read from there, until `exporter.hidden_states.remove_states`.

    Raises:
        CalibrationError: a quantized graph, or a percentile out of range.
        CheckpointError: a weight is NaN or infinite; names the tensor.
        OutputError: `work` is the folder of something else, or the disk is full.
    """
    if percentile is not None and not 50 <= percentile <= 100:
        raise CalibrationError("a percentile of activations", expected="50 to 100", found=percentile)
    quantized = next((name for name, linear in linear_names(graph).items() if linear.quantization is not None), None)
    if quantized is not None:
        raise CalibrationError("the model is quantized already", found=quantized, hint="calibrate the original")
    reference = Reference(graph, device=device, dtype=dtype)
    shape = (*tokens.shape, graph.hidden_size)
    identity = fingerprint(graph)
    key = hashlib.sha256(f"{identity} {percentile} {dtype} {shape}".encode() + tokens.tobytes()).hexdigest()
    with states_folder(work, 4 * math.prod(shape), budget_bytes) as folder:
        states = HiddenStates(shape, dtype, folder, key)
        slices = [slice(start, start + batch) for start in range(0, len(tokens), batch)]
        saved = states.progress()
        if saved is None:
            saved = Progress(0, {})
            for part in slices:
                states.write("x", part, reference.embed(torch.from_numpy(tokens[part])))
            states.commit(0, {})
        found = saved.found
        span = reference.span((1, tokens.shape[1]), None)
        for index in range(saved.next_block, len(graph.blocks)):
            if progress is not None:
                progress(index, len(graph.blocks))
            of_block = _measured_block(reference, index, states, slices, span, percentile, tokens.size)
            states.commit(index + 1, of_block)
            found |= of_block
    if progress is not None:
        progress(len(graph.blocks), len(graph.blocks))
    return Calibration(fingerprint=identity, text=text, tokens=tokens.size, percentile=percentile, ranges=found)


@torch.inference_mode()
def _measured_block(
    reference: Reference,
    index: int,
    states: HiddenStates,
    slices: Sequence[slice],
    span: Any,
    percentile: float | None,
    tokens: int,
) -> dict[str, np.ndarray]:
    """Move the hidden states through one block and return the ranges of its sites."""
    blocks = members(reference.graph.blocks[index])
    # The range leaves out so many tokens; rounded first, because 100 - 99.9 is a little less than 0.1.
    above = 0 if percentile is None else math.floor(round((100 - percentile) * tokens / 100, 6))
    kept = above + 1
    largest: dict[str, torch.Tensor] = {}  # [kept, C], descending

    def observe(member: int, sublayer: str, site: str, values: torch.Tensor) -> None:
        if values.dim() == 4:  # [B, H, S, d]: the heads' channels side by side
            values = values.transpose(1, 2).flatten(2)
        magnitudes = values.flatten(0, 1).abs().float()
        name = _name(blocks[member], sublayer, site)
        if kept == 1:
            magnitudes = magnitudes.amax(0, keepdim=True)
        before = largest.get(name)
        pool = magnitudes if before is None else torch.cat([before, magnitudes])
        largest[name] = pool.topk(min(kept, len(pool)), dim=0).values if kept > 1 else pool.amax(0, keepdim=True)

    block = reference.block(index)
    for part in slices:
        x = states.read("x", part, reference.device)
        y = block(x, span, observe)
        check_finite(y, reference.graph, index)
        states.write("x", part, y)
    return {name: values[-1].cpu().numpy() for name, values in largest.items()}


def _name(block: Block, sublayer: str, site: str) -> str:
    return _site_name(_layers(block, sublayer), sublayer, site)


def _site_name(layers: Sequence[int], sublayer: str, site: str) -> str:
    return f"{'+'.join(map(str, layers))}.{sublayer}.{site}"


def _layers(block: Block, sublayer: str) -> tuple[int, ...]:
    ffn = block.ffn
    return ffn.source_layers if sublayer == "ffn" and isinstance(ffn, FFN) else block.source_layers


def ranges_of(calibration: Calibration, graph: ModelGraph) -> Ranges:
    """Find the ranges of a graph's sites: its own, or merged from those of the layers that it was fused from.

    Raises:
        CalibrationError: a site has no range, or one of another size; names the block and the source layers.
    """
    found = []
    for index, block in enumerate(graph.flat_blocks):
        try:
            attention = {} if block.attention is None else _attention_ranges(calibration, block, block.attention)
            ffn = {} if block.ffn is None else _ffn_ranges(calibration, block, block.ffn)
        except CalibrationError as error:
            error.block = index
            raise
        found.append(BlockRanges(attention, ffn))
    return tuple(found)


def _attention_ranges(calibration: Calibration, block: Block, attention: Attention | LinearSublayer) -> SublayerRanges:
    sizes = {"norm": attention.hidden_size}
    if isinstance(attention, Attention):
        kv = attention.num_key_value_heads * attention.head_dim
        sizes |= {"o_proj": attention.o_proj.in_features, "key": kv, "value": kv}
    return {site: _range(calibration, _name(block, "attention", site), size) for site, size in sizes.items()}


def _ffn_ranges(calibration: Calibration, block: Block, ffn: FFN | LinearSublayer) -> SublayerRanges:
    if not isinstance(ffn, FFN):
        return {"norm": _range(calibration, _name(block, "ffn", "norm"), ffn.hidden_size)}
    norms, inner = [], []
    start = 0
    while start < len(ffn.segments):
        run = _longest_known(calibration, ffn.source_layers[start:])
        layers = ffn.source_layers[start : start + run]
        norms.append(_range(calibration, _site_name(layers, "ffn", "norm"), ffn.hidden_size))
        width = sum(segment.width for segment in ffn.segments[start : start + run])
        inner.append(_range(calibration, _site_name(layers, "ffn", DOWN_PROJ), width))
        start += run
    if ffn.padding:
        inner.append(full((ffn.padding,), 0.0, FLOAT32))
    largest = np.max([norm.numpy() for norm in norms], axis=0)
    return {"norm": array(largest), DOWN_PROJ: concat(inner, axis=0)}


def _longest_known(calibration: Calibration, layers: Sequence[int]) -> int:
    """How many of these layers were measured as one FFN; 1 if none were."""
    known = (
        run for run in range(len(layers), 0, -1) if _site_name(layers[:run], "ffn", DOWN_PROJ) in calibration.ranges
    )
    return next(known, 1)


def _range(calibration: Calibration, name: str, size: int) -> LazyTensor:
    values = calibration.ranges.get(name)
    if values is None:
        raise CalibrationError(
            "the calibration has no range for this site",
            found=f"nothing for {name}",
            hint="calibrate this model, or the one it was made from",
        )
    if len(values) < size or values[size:].any():  # zeros: an FFN was measured with its padding
        raise CalibrationError(f"the range of {name} has another size", expected=size, found=len(values))
    values = values[:size]
    if not np.isfinite(values).all() or (values < 0).any():
        raise CalibrationError(f"the range of {name} is not made of finite numbers", found=values.max())
    return array(values)


def check_belongs(calibration: Calibration, *graphs: ModelGraph) -> None:
    """Raise CalibrationError unless one of `graphs` is the model that was measured."""
    if calibration.fingerprint not in map(fingerprint, graphs):
        raise CalibrationError(
            "this calibration is of another model",
            expected=f"fingerprint {fingerprint(graphs[0])[:16]}",
            found=calibration.fingerprint[:16],
            hint="calibrate this model",
        )


class _Described(BaseModel):
    """What CALIBRATION_FILE says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    fingerprint: str
    text: str
    tokens: int
    percentile: float | None


def calibration_files(calibration: Calibration) -> dict[str, Content | bytes]:
    """The files of a calibration folder: a small safetensors file and a JSON file."""
    from safetensors.numpy import save

    described = {name: getattr(calibration, name) for name in _Described.model_fields}
    return {CALIBRATION_FILE: json_bytes(described), RANGES_FILE: save(dict(calibration.ranges))}


def read_calibration(folder: Path) -> Calibration:
    """Read a calibration folder.

    Raises:
        CalibrationError, CheckpointError: a file is missing or malformed.
    """
    path = folder / CALIBRATION_FILE
    described = validated(read_json(path), _Described, "calibration", file=path, error=CalibrationError)
    ranges = {}
    for name, tensor in read_safetensors(folder / RANGES_FILE).items():
        if isinstance(tensor, SkippedTensor) or tensor.dtype != FLOAT32 or len(tensor.shape) != 1:
            raise CalibrationError("a range is a row of float32 numbers", file=folder / RANGES_FILE, tensor=name)
        ranges[name] = tensor.numpy()
    return Calibration(**described.model_dump(), ranges=ranges)
