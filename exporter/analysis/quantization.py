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
from exporter.graph import FFN, Block, ModelGraph, members
from exporter.hidden_states import check_finite
from exporter.lazy import LazyTensor
from exporter.numerics import LARGEST
from exporter.passes.smooth_channels import Strengths, smoothable_sites, smoothing_factors
from exporter.quantization import LinearFormat, QuantizationRecipe, WeightFormat, dtype_of, sharing_scale
from exporter.ranges import DOWN_PROJ, NORM, SITE_OF, Ranges, SublayerRanges
from exporter.reference import ACTIVATIONS, LoadedLinear, Reference, fake_quantized, loaded_linear, scale_from_amax

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


def inputs_of_blocks(
    graph: ModelGraph, tokens: np.ndarray, *, device: str = "cpu", batch: int = DEFAULT_BATCH
) -> Iterator[Inputs]:
    """Walk through a graph on tokens int64 [N, S], block by block.

    A block is let go when the next one is loaded, if the caller does so, too. Inference mode is the caller's: around a
    generator its decorator keeps what was yielded last.
    """
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
        del block, loaded, observe, seen, sites  # before the next block is loaded, which may be as large


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
        for name, site in inputs.sites:
            if (inputs.index, name, site) in smoothable:
                best = _best_alpha(inputs, name, site, getattr(ranges[inputs.index], name)[site], recipe, alphas)
                if best is not None:
                    strengths[inputs.index, name, site] = best
        del inputs  # before the next block is loaded
    if progress is not None:
        progress(len(graph.flat_blocks), len(graph.flat_blocks))
    return strengths


def _best_alpha(
    inputs: Inputs, sublayer: str, site: str, ranges: LazyTensor, recipe: QuantizationRecipe, alphas: Sequence[float]
) -> float | None:
    """The alpha with the least error; None: no smoothing has, or nothing that reads the site is quantized."""
    part, x = getattr(inputs.block, sublayer), inputs.sites[sublayer, site]
    readers = readers_of(part, site)
    formats = {reader: recipe.format_of(f"blocks.{inputs.index}.{sublayer}.{reader}") for reader in readers}
    if not any(formats.values()):
        return None
    largest = torch.from_numpy(ranges.numpy()).to(x.device)
    if site == NORM:
        largest = largest * part.norm.weight.abs()
    columns = {name: linear.weight.abs().amax(0) for name, linear in readers.items()}
    of_all = torch.stack(list(columns.values())).amax(0)

    def error(factors: torch.Tensor) -> float:
        return _error(x / factors, readers, formats, largest / factors, columns, factors)

    best, least = None, error(torch.ones_like(largest))
    for alpha in alphas:
        factors = smoothing_factors(largest.cpu().numpy(), of_all.cpu().numpy(), alpha)
        found = error(torch.from_numpy(factors).to(x.device))
        if found < least:
            best, least = alpha, found
    return best


def _error(
    x: torch.Tensor,
    readers: Mapping[str, LoadedLinear],
    formats: Mapping[str, LinearFormat | None],
    largest: torch.Tensor,
    columns: Mapping[str, torch.Tensor],
    factors: torch.Tensor,
) -> float:
    """Squared output error of quantized linears of one input, relative to each token's output, mean over tokens.

    Token by token, because a few tokens with huge activations would otherwise decide alone. One matrix at a time is
    smoothed and rounded: of a wide FFN each has gigabytes.

    Args:
        x, largest: smoothed.
        columns: largest |weight| of every column of every linear, which `factors` will smooth.
    """
    lost = kept = torch.zeros(len(x), device=x.device)
    known = {name: wanted for name, wanted in formats.items() if wanted is not None}
    for name, linear in readers.items():
        weight = linear.weight * factors
        wanted = known.get(name)
        exact = x @ weight.T
        rounded = x
        if wanted is not None and wanted.inputs is not None:
            dtype = dtype_of(wanted.inputs)
            static = wanted.inputs.scale == "tensor"
            rounded = fake_quantized(x, dtype, scale_from_amax(largest.max(), dtype) if static else None)
        if wanted is not None:
            # Rounding is monotone: the largest of smoothed columns are the smoothed largest, bit for bit.
            sharing = [columns[other] * factors for other in sharing_scale(name, known)]
            weight = _as_stored(weight, wanted.weights, sharing)
        kept = kept + exact.square().sum(-1)
        lost = lost + (rounded @ weight.T - exact).square().sum(-1)
    return (lost / kept.clamp_min(torch.finfo(kept.dtype).tiny)).mean().item()


def _as_stored(weight: torch.Tensor, wanted: WeightFormat, sharing: Sequence[torch.Tensor]) -> torch.Tensor:
    """A weight as a recipe would store it, back in float32.

    Args:
        sharing: largest |weight| of every column, of each of the linears that share its scale if that is one.
    """
    scale = None  # one per row
    if wanted.scale == "tensor":
        scale = scale_from_amax(torch.stack(list(sharing)).max(), dtype_of(wanted))
    return fake_quantized(weight, dtype_of(wanted), scale)


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
    found: list[LinearError] = []
    for inputs in inputs_of_blocks(graph, tokens, device=device):
        if progress is not None:
            progress(inputs.index, len(graph.flat_blocks))
        found += _errors_of(inputs, quantized.flat_blocks[inputs.index])
        del inputs  # before the next block is loaded
    if progress is not None:
        progress(len(graph.flat_blocks), len(graph.flat_blocks))
    return sorted(found, key=lambda error: -error.relative_error)


def _errors_of(inputs: Inputs, quantized: Block) -> Iterator[LinearError]:
    for (name, site), x in inputs.sites.items():
        for reader, linear in readers_of(getattr(inputs.block, name), site).items():
            codes = getattr(getattr(quantized, name), reader)
            if codes.quantization is not None:
                rounded = loaded_linear(codes, x.device, x.dtype)
                yield _linear_error(f"blocks.{inputs.index}.{name}.{reader}", x, linear.weight, rounded)


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
    if progress is not None:
        progress(0, total)
    for inputs in inputs_of_blocks(graph, tokens, device=device):
        ffn = fused.get(inputs.index)
        if ffn is not None:
            for cell in _cells_of(inputs, ffn, ranges[inputs.index].ffn, strengths):
                found.append(cell)
                if progress is not None:
                    progress(len(found), total)
        del inputs  # before the next block is loaded
        if len(found) == total:
            break
    return found


def _cells_of(
    inputs: Inputs, ffn: FFN, ranges: SublayerRanges, strengths: Mapping[str, float]
) -> Iterator[SmoothingCell]:
    loaded = inputs.block.ffn
    x, inner = inputs.sites["ffn", NORM], inputs.sites["ffn", DOWN_PROJ]
    outer_range = torch.from_numpy(ranges[NORM].numpy()).to(x.device) * loaded.norm.weight.abs()
    inner_range = torch.from_numpy(ranges[DOWN_PROJ].numpy()).to(x.device)
    exact = inner @ loaded.down_proj.weight.T
    for label, dtype, scale in SCHEMES:
        for smoothing in SMOOTHINGS:
            alpha = strengths[scale] if smoothing in ("per channel", "both inputs") else None
            wide = _WideFFN(loaded, outer_range, inner_range, dtype, scale)
            if smoothing == "per segment":
                wide.divide_inner(_segment_factors(ffn, inner_range))
            elif alpha is not None:
                if smoothing == "both inputs":
                    wide.smooth_outer(alpha)
                wide.smooth_inner(alpha)
            error = _relative(wide(x) - exact, exact)
            yield SmoothingCell(
                block=inputs.index, scheme=label, smoothing=smoothing, alpha=alpha, relative_error=error
            )


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
