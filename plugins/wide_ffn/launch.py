"""The kernels on torch tensors: buffers, block sizes, launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from plugins.wide_ffn import kernels
from plugins.wide_ffn.configs import FP_FUSION, Config, ceil_div, config_for, norm_by_rule, norm_depth


def wide_ffn_by_kernels(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_scale: torch.Tensor | None,
    up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    inner_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    epsilon: float,
    activations: str,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """residual + down(silu(gate(n)) * up(n)), as `plugins.wide_ffn.reference`, for up to 64 tokens.

    On the meta device nothing is launched: the kernels are compiled into Triton's cache, where launches find them.

    Args:
        config: block sizes; by default what `config_for` says of this call.
    """
    (tokens, hidden), width = x.shape, len(gate)
    y = torch.empty_like(x)
    if not tokens:
        return y
    if config is None:
        config = config_for(
            tokens=tokens,
            hidden=hidden,
            width=width,
            weights=str(gate.dtype).removeprefix("torch."),
            activations=activations,
            multiprocessors=torch.cuda.get_device_properties(x.device).multi_processor_count,
        )
    first, second = config.gate_up, config.down
    steps = ceil_div(width, second.depth)
    if config.splits > steps:
        raise AssertionError(f"Bug: {config.splits} programs of `down` share {steps} steps")
    if config.norm == "before":
        normed = x.new_empty(tokens, hidden, dtype=x.dtype if activations == "none" else gate.dtype)
        scales = None if activations == "none" else x.new_empty(tokens, dtype=torch.float32)
        tiling = norm_by_rule(hidden)
        _entry(kernels.norm, (tokens,), x.device)(
            x,
            norm_weight,
            input_scale,
            hidden,
            normed,
            scales,
            EPSILON=epsilon,
            ACTIVATIONS=activations,
            DEPTH=tiling.depth,
            num_warps=tiling.warps,
        )
        n, n_weight, n_scale = normed, None, scales
    else:
        n, n_weight, n_scale = x, norm_weight, input_scale
    # What `gate_up` hands to `down`, and `down` to itself; nothing needs to be in them.
    inner = x.new_empty(tokens, width, dtype=gate.dtype if activations == "static" else x.dtype)
    largest_parts = x.new_empty(config.programs, config.tokens, dtype=torch.int32)
    arrivals = x.new_empty(ceil_div(hidden, kernels.ROWS_PER_COUNTER), dtype=torch.int32)
    sums = x.new_empty(config.splits, config.tokens, hidden, dtype=torch.float32) if config.splits > 1 else None
    _entry(kernels.gate_up, (config.programs,), x.device)(
        n,
        n_weight,
        gate,
        up,
        gate_scale,
        up_scale,
        n_scale,
        inner_scale,
        tokens,
        hidden,
        width,
        inner,
        largest_parts,
        arrivals,
        EPSILON=epsilon,
        ACTIVATIONS=activations,
        GATE_SCALE_PER_ROW=_is_per_row(gate_scale),
        UP_SCALE_PER_ROW=_is_per_row(up_scale),
        TOKENS=config.tokens,
        ROWS=first.rows,
        DEPTH=first.depth,
        NORM_DEPTH=norm_depth(config.tokens, first.warps),
        EVEN=hidden % first.depth == 0,
        ALIGNED=gate.data_ptr() % 16 == 0 and up.data_ptr() % 16 == 0,
        num_warps=first.warps,
        num_stages=first.stages,
        maxnreg=first.registers,
    )
    _entry(kernels.down, (ceil_div(hidden, second.rows), config.splits), x.device)(
        inner,
        largest_parts,
        arrivals,
        down,
        down_scale,
        inner_scale,
        residual,
        tokens,
        hidden,
        width,
        config.programs,
        sums,
        y,
        ACTIVATIONS=activations,
        SCALE_PER_ROW=_is_per_row(down_scale),
        TOKENS=config.tokens,
        ROWS=second.rows,
        DEPTH=second.depth,
        EVEN=width % second.depth == 0,
        num_warps=second.warps,
        num_stages=second.stages,
        maxnreg=second.registers,
    )
    return y


def _entry(kernel: Any, grid: tuple[int, ...], device: torch.device) -> Callable[..., Any]:
    """What launches a kernel on a device, or only compiles it."""
    launched = partial(kernel.warmup, grid=grid) if device.type == "meta" else kernel[grid]
    return partial(launched, enable_fp_fusion=FP_FUSION)


def _is_per_row(scale: torch.Tensor | None) -> bool:
    return scale is not None and len(scale) > 1
