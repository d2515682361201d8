"""What rounding costs: how strongly to smooth each site, which linears lose most, and which scheme suits a wide FFN.

Everything is measured on activations of the unquantized model, block by block, one pass over the weights: a linear gets
the input that it would get there, so errors do not add up from block to block and each can be told from the others.

Shape letters: N = windows, S = tokens per window, T = N * S, C = channels of a site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from exporter.dtypes import FLOAT8_E4M3FN, INT8, DType
from exporter.graph import FFN, ModelGraph, members
from exporter.hidden_states import check_finite
from exporter.numerics import LARGEST
from exporter.passes.smooth_channels import Strengths, smoothable_sites, smoothing_factors
from exporter.quantization import LinearFormat, QuantizationRecipe, dtype_of, sharing_scale
from exporter.ranges import DOWN_PROJ, NORM, SITE_OF, Ranges
from exporter.reference import ACTIVATIONS, LoadedLinear, Reference, fake_quantized, scale_from_amax

ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9)
DEFAULT_BATCH = 4  # windows that go through a block at a time
TINY = float(np.finfo(np.float32).tiny)  # in place of a norm of zero

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """One of `ModelGraph.flat_blocks` with its weights, and what its linears read."""

    index: int
    block: Any  # a Block of torch tensors
    sites: Mapping[tuple[str, str], torch.Tensor]  # (sublayer, site) -> float32 [T, C]; the norm's weight is in it


@torch.inference_mode()
def inputs_of_blocks(
    graph: ModelGraph, tokens: np.ndarray, *, device: str = "cpu", batch: int = DEFAULT_BATCH
) -> Iterator[Inputs]:
    """Walk through a graph on tokens int64 [N, S], block by block."""
    reference = Reference(graph, device=device)
    parts = [slice(start, start + batch) for start in range(0, len(tokens), batch)]
    states = [reference.embed(torch.from_numpy(tokens[part])) for part in parts]
    span = reference.span((1, tokens.shape[1]), None)
    flat = 0
    for index, entry in enumerate(graph.blocks):
        block = reference.block(index)
        seen: dict[tuple[int, str, str], list[torch.Tensor]] = {}

        def observe(
            member: int, sublayer: str, site: str, values: torch.Tensor, seen: dict[Any, list[torch.Tensor]] = seen
        ) -> None:
            if values.dim() == 3:  # keys and values are nobody's input
                seen.setdefault((member, sublayer, site), []).append(values.flatten(0, 1))

        for number, x in enumerate(states):
            states[number] = block(x, span, observe)
            check_finite(states[number], graph, index)
        for member in range(len(members(entry))):
            loaded = block.members[member]
            sites = {
                (sublayer, site): torch.cat(values) * (getattr(loaded, sublayer).norm.weight if site == NORM else 1)
                for (at, sublayer, site), values in seen.items()
                if at == member
            }
            yield Inputs(flat, loaded, sites)
            flat += 1


def readers_of(sublayer: Any, site: str) -> dict[str, LoadedLinear]:
    """The linears of a sublayer that read a site."""
    return {name: getattr(sublayer, name) for name, read in SITE_OF.items() if read == site and hasattr(sublayer, name)}


# -- how strongly to smooth


@torch.inference_mode()
def search_strengths(
    graph: ModelGraph,
    ranges: Ranges,
    recipe: QuantizationRecipe,
    tokens: np.ndarray,
    *,
    alphas: Sequence[float] = ALPHAS,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Strengths:
    """Choose for every site the alpha with the least output error of the linears that read it, or none at all.

    Args:
        ranges: calibrated; the factors are made from them.
        tokens: int64 [N, S], a few windows. On what was calibrated on, static ranges look better than they are.

    Returns:
        Strengths for `smooth_channels`; sites that are better left alone, or are not quantized, are not in it.
    """
    smoothable = set(smoothable_sites(graph))
    strengths: dict[tuple[int, str, str], float] = {}
    for inputs in inputs_of_blocks(graph, tokens, device=device):
        if progress is not None:
            progress(inputs.index, len(graph.flat_blocks))
        for (name, site), x in inputs.sites.items():
            sublayer = getattr(inputs.block, name)
            readers = readers_of(sublayer, site)
            formats = {reader: recipe.format_of(f"blocks.{inputs.index}.{name}.{reader}") for reader in readers}
            if (inputs.index, name, site) not in smoothable or not any(formats.values()):
                continue
            largest = torch.from_numpy(getattr(ranges[inputs.index], name)[site].numpy()).to(x.device)
            if site == NORM:
                largest = largest * sublayer.norm.weight.abs()
            columns = torch.stack([reader.weight.abs().amax(0) for reader in readers.values()]).amax(0)
            best, least = None, _error(x, readers, formats, largest)
            for alpha in alphas:
                found = smoothing_factors(largest.cpu().numpy(), columns.cpu().numpy(), alpha)
                factors = torch.from_numpy(found).to(x.device)
                scaled = {
                    reader: LoadedLinear(linear.weight * factors, linear.bias) for reader, linear in readers.items()
                }
                error = _error(x / factors, scaled, formats, largest / factors)
                if error < least:
                    best, least = alpha, error
            if best is not None:
                strengths[inputs.index, name, site] = best
    if progress is not None:
        progress(len(graph.flat_blocks), len(graph.flat_blocks))
    return strengths


def _error(
    x: torch.Tensor,
    readers: Mapping[str, LoadedLinear],
    formats: Mapping[str, LinearFormat | None],
    largest: torch.Tensor,
) -> float:
    """Squared output error of quantized linears of one input, relative to each token's output, mean over tokens.

    Token by token, because a few tokens with huge activations would otherwise decide alone.
    """
    lost = kept = torch.zeros(len(x), device=x.device)
    weights = _rounded_weights(readers, formats)
    for name, linear in readers.items():
        wanted = formats[name]
        exact = x @ linear.weight.T
        rounded = x
        if wanted is not None and wanted.inputs is not None:
            dtype = dtype_of(wanted.inputs)
            static = wanted.inputs.scale == "tensor"
            rounded = fake_quantized(x, dtype, scale_from_amax(largest.max(), dtype) if static else None)
        kept = kept + exact.square().sum(-1)
        lost = lost + (rounded @ weights[name].T - exact).square().sum(-1)
    return (lost / kept.clamp_min(torch.finfo(kept.dtype).tiny)).mean().item()


def _rounded_weights(
    readers: Mapping[str, LoadedLinear], formats: Mapping[str, LinearFormat | None]
) -> dict[str, torch.Tensor]:
    """Weights as a recipe would store them, back in float32."""
    found = {name: linear.weight for name, linear in readers.items()}
    known = {name: wanted for name, wanted in formats.items() if wanted is not None}
    for name, wanted in known.items():
        dtype = dtype_of(wanted.weights)
        scale = None  # one per row
        if wanted.weights.scale == "tensor":
            largest = [readers[other].weight.abs().max() for other in sharing_scale(name, known)]
            scale = scale_from_amax(torch.stack(largest).max(), dtype)
        found[name] = fake_quantized(readers[name].weight, dtype, scale)
    return found


# -- which linears lose most


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearError:
    """What quantization does to the output of one linear."""

    name: str
    relative_error: float  # |y' - y| / |y|, L2 over all tokens
    sqnr_db: float | None  # 10 log10(|y|^2 / |y' - y|^2); None: nothing is lost
    saturation: float | None  # share of input values beyond the static range; None: there is no such range


@torch.inference_mode()
def linear_errors(
    graph: ModelGraph,
    quantized: ModelGraph,
    tokens: np.ndarray,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[LinearError]:
    """Compare every quantized linear of the blocks with its counterpart on the same input; the worst come first.

    Args:
        graph: what was quantized (smoothed already, if it was).
        quantized: the same structure with codes.
        tokens: int64 [N, S].
    """
    reference = Reference(quantized, device=device)
    entries = [(index, member) for index, entry in enumerate(graph.blocks) for member in range(len(members(entry)))]
    found = []
    for inputs in inputs_of_blocks(graph, tokens, device=device):
        if progress is not None:
            progress(inputs.index, len(graph.flat_blocks))
        entry, member = entries[inputs.index]
        other = reference.block(entry).members[member]
        codes = quantized.flat_blocks[inputs.index]
        for (name, site), x in inputs.sites.items():
            for reader, linear in readers_of(getattr(inputs.block, name), site).items():
                if getattr(getattr(codes, name), reader).quantization is None:
                    continue
                rounded = getattr(getattr(other, name), reader)
                full_name = f"blocks.{inputs.index}.{name}.{reader}"
                found.append(_linear_error(full_name, x, linear.weight, rounded))
    if progress is not None:
        progress(len(graph.flat_blocks), len(graph.flat_blocks))
    return sorted(found, key=lambda error: -error.relative_error)


def _linear_error(name: str, x: torch.Tensor, weight: torch.Tensor, rounded: LoadedLinear) -> LinearError:
    exact = x @ weight.T
    saturation, y = None, x
    if rounded.input is not None:
        y = fake_quantized(x, rounded.input.dtype, rounded.input.scale)
        if rounded.input.scale is not None:
            limit = rounded.input.scale * LARGEST[rounded.input.dtype]
            saturation = (x.abs() > limit * (1 + 1e-6)).double().mean().item()
    relative = _relative(y @ rounded.weight.T - exact, exact)
    return LinearError(
        name=name,
        relative_error=relative,
        sqnr_db=-20 * math.log10(relative) if relative else None,
        saturation=saturation,
    )


def _relative(lost: torch.Tensor, exact: torch.Tensor) -> float:
    return lost.double().norm().item() / max(exact.double().norm().item(), TINY)


# -- which scheme suits a wide FFN

SCHEMES: tuple[tuple[str, DType, str], ...] = (  # label, codes, activations' scale; weights: see `compare_smoothing`
    ("FP8, per tensor", FLOAT8_E4M3FN, "tensor"),
    ("FP8, per row and token", FLOAT8_E4M3FN, "token"),
    ("INT8, static", INT8, "tensor"),
    ("INT8, per token", INT8, "token"),
)
SMOOTHINGS = ("none", "per segment", "per channel", "both inputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothingCell:
    """Output error of a wide FFN under one scheme."""

    block: int  # in flat_blocks
    scheme: str
    smoothing: str
    alpha: float | None
    relative_error: float  # of what the FFN adds to the residual but for down_proj's bias, L2 over all tokens


@torch.inference_mode()
def compare_smoothing(
    graph: ModelGraph,
    ranges: Ranges,
    tokens: np.ndarray,
    *,
    device: str = "cpu",
    alphas: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> list[SmoothingCell]:
    """Compare ways of smoothing on every fused FFN of a graph, on real activations.

    Smoothings: none; per segment (one factor for each source layer's inner channels, which makes their largest
    activations equal); per channel (SmoothQuant at the input of down_proj); both inputs (that, and at the input of
    gate/up). Weights: INT8 per row; FP8 per tensor with static, per row with per-token activations.

    Args:
        alphas: "tensor" and "token" -> SmoothQuant's alpha with such activations; None: 0.65 and 0.5.
        progress: called with (cells done, cells in all), each cell being three products of wide matrices.
    """
    strengths = alphas or {"tensor": 0.65, "token": 0.5}
    fused = {
        index: block.ffn
        for index, block in enumerate(graph.flat_blocks)
        if isinstance(block.ffn, FFN) and len(block.ffn.segments) > 1
    }
    if not fused:
        return []
    total = len(fused) * len(SCHEMES) * len(SMOOTHINGS)
    found: list[SmoothingCell] = []
    for inputs in inputs_of_blocks(graph, tokens, device=device):
        ffn = fused.get(inputs.index)
        if ffn is None:
            continue
        loaded = inputs.block.ffn
        x, inner = inputs.sites["ffn", NORM], inputs.sites["ffn", DOWN_PROJ]
        known = ranges[inputs.index].ffn
        outer_range = torch.from_numpy(known[NORM].numpy()).to(x.device) * loaded.norm.weight.abs()
        inner_range = torch.from_numpy(known[DOWN_PROJ].numpy()).to(x.device)
        exact = inner @ loaded.down_proj.weight.T
        for label, dtype, scale in SCHEMES:
            for smoothing in SMOOTHINGS:
                if progress is not None:
                    progress(len(found), total)
                alpha = strengths[scale] if smoothing in ("per channel", "both inputs") else None
                wide = _WideFFN(loaded, outer_range, inner_range, dtype, scale)
                if smoothing == "per segment":
                    wide.divide_inner(_segment_factors(ffn, inner_range))
                elif alpha is not None:
                    if smoothing == "both inputs":
                        wide.smooth_outer(alpha)
                    wide.smooth_inner(alpha)
                error = _relative(wide(x) - exact, exact)
                found.append(
                    SmoothingCell(
                        block=inputs.index, scheme=label, smoothing=smoothing, alpha=alpha, relative_error=error
                    )
                )
        if len(found) == total:
            break
    if progress is not None:
        progress(total, total)
    return found


class _WideFFN:
    """One FFN under one scheme; smoothing changes it in place."""

    def __init__(self, ffn: Any, outer: torch.Tensor, inner: torch.Tensor, dtype: DType, scale: str) -> None:
        self._ffn, self._dtype, self._static = ffn, dtype, scale == "tensor"
        self._gate, self._up, self._down = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight
        self._up_bias = ffn.up_proj.bias
        self._outer, self._inner = outer, inner  # ranges
        self._outer_factors = torch.ones_like(outer)

    def smooth_outer(self, alpha: float) -> None:
        columns = torch.maximum(self._gate.abs().amax(0), self._up.abs().amax(0))
        factors = self._factors(self._outer, columns, alpha)
        self._gate, self._up = self._gate * factors, self._up * factors
        self._outer, self._outer_factors = self._outer / factors, factors

    def smooth_inner(self, alpha: float) -> None:
        self.divide_inner(self._factors(self._inner, self._down.abs().amax(0), alpha))

    def divide_inner(self, factors: torch.Tensor) -> None:
        self._up, self._down = self._up / factors[:, None], self._down * factors
        self._up_bias = None if self._up_bias is None else self._up_bias / factors
        self._inner = self._inner / factors

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        shared = None
        if self._dtype == FLOAT8_E4M3FN and self._static:
            shared = scale_from_amax(torch.maximum(self._gate.abs().max(), self._up.abs().max()), self._dtype)
        own = None if shared is None else scale_from_amax(self._down.abs().max(), self._dtype)
        outer, inner = (
            scale_from_amax(ranges.max(), self._dtype) if self._static else None
            for ranges in (self._outer, self._inner)
        )
        rounded = fake_quantized(x / self._outer_factors, self._dtype, outer)
        # Each matrix is rounded where it is used: one rounded copy at a time.
        gated = F.linear(rounded, fake_quantized(self._gate, self._dtype, shared), self._ffn.gate_proj.bias)
        gated = ACTIVATIONS[self._ffn.activation](gated)
        hidden = gated * F.linear(rounded, fake_quantized(self._up, self._dtype, shared), self._up_bias)
        return fake_quantized(hidden, self._dtype, inner) @ fake_quantized(self._down, self._dtype, own).T

    @staticmethod
    def _factors(inputs: torch.Tensor, columns: torch.Tensor, alpha: float) -> torch.Tensor:
        found = smoothing_factors(inputs.cpu().numpy(), columns.cpu().numpy(), alpha)
        return torch.from_numpy(found).to(inputs.device)


def _segment_factors(ffn: FFN, inner: torch.Tensor) -> torch.Tensor:
    """Every segment's largest activation over the largest of all; 1 for a segment that is zero throughout."""
    factors = torch.ones_like(inner)
    start = 0
    for segment in ffn.segments:
        part = slice(start, start + segment.width)
        if inner[part].any():
            factors[part] = inner[part].max() / inner.max()
        start += segment.width
    return factors


def to_json(parts: Sequence[LinearError | SmoothingCell]) -> list[dict[str, Any]]:
    """Plain JSON data."""
    return [asdict(part) for part in parts]
