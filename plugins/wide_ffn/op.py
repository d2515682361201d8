"""`torch.ops.fuselage.wide_ffn`: importing this module registers it, for CPU (the reference), CUDA and tracing.

On CUDA up to 64 tokens go to the kernels, more to library GEMMs. Nothing waits for the device, and every buffer comes
from PyTorch's allocator during the call, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from exporter.errors import TargetError
from plugins.contract import WIDE_FFN
from plugins.wide_ffn.configs import BUCKETS
from plugins.wide_ffn.reference import wide_ffn_reference

CAPABILITY = (9, 0)  # H100, H200
NAME = f"{WIDE_FFN.namespace}::{WIDE_FFN.name}"


@torch.library.custom_op(NAME, mutates_args=(), device_types="cpu")
def wide_ffn(
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
) -> torch.Tensor:
    """residual + down(silu(gate(n)) * up(n)), n = rms_norm(x); see `plugins.wide_ffn.reference`.

    Args:
        x: bfloat16 [tokens, hidden].
        norm_weight: bfloat16 [hidden].
        gate, up: bfloat16, float8_e4m3fn or int8 [width, hidden].
        down: the same dtype [hidden, width].
        gate_scale, up_scale, down_scale: float32 [1] or one per row of the weight; None for bfloat16.
        input_scale, inner_scale: float32 [1], of the inputs of gate and up, and of down; for "static" alone.
        residual: bfloat16 [tokens, hidden], or None.
        activations: "none" (bfloat16; 8-bit weights are then weight-only), "static" or "token".

    Returns:
        bfloat16 [tokens, hidden].

    Raises:
        TargetError: the arguments do not fit `plugins.contract.WIDE_FFN`.
    """
    tensors = (x, norm_weight, gate, up, down, gate_scale, up_scale, down_scale, input_scale, inner_scale, residual)
    check(*tensors, epsilon=epsilon, activations=activations)
    return wide_ffn_reference(*tensors, epsilon, activations)


@wide_ffn.register_kernel("cuda")
def _on_cuda(
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
) -> torch.Tensor:
    tensors = (x, norm_weight, gate, up, down, gate_scale, up_scale, down_scale, input_scale, inner_scale, residual)
    check(*tensors, epsilon=epsilon, activations=activations)
    capability = torch.cuda.get_device_capability(x.device)
    if capability != CAPABILITY:
        raise TargetError(f"{NAME} is written for other GPUs", expected=f"capability {CAPABILITY}", found=capability)
    if len(x) <= BUCKETS[-1]:
        from plugins.wide_ffn.launch import wide_ffn_by_kernels

        with torch.cuda.device(x.device):  # Triton launches on the current device, which need not be that of x
            return wide_ffn_by_kernels(*tensors, epsilon, activations)
    from plugins.wide_ffn.library import wide_ffn_by_library

    return wide_ffn_by_library(*tensors, epsilon, activations)


@wide_ffn.register_fake
def _fake(x: torch.Tensor, *others: torch.Tensor | float | str | None) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate: torch.Tensor,
    *others: torch.Tensor | None,
    epsilon: float,
    activations: str,
) -> None:
    """Raise TargetError unless the op's arguments fit the contract, lie on one device and are contiguous."""
    given = dict(zip((one.name for one in WIDE_FFN.inputs), (x, norm_weight, gate, *others), strict=True))
    described = {
        name: None if tensor is None else (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in given.items()
    }
    problems = WIDE_FFN.problems(described, {"epsilon": epsilon, "activations": activations})
    if gate.dtype == torch.bfloat16 and activations != "none":
        problems.append(f"bfloat16 weights take activations as they come: found {activations}")
    for name, tensor in given.items():
        if tensor is not None and tensor.device != x.device:
            problems.append(f"{name} is on the device of x, {x.device}: found {tensor.device}")
        if tensor is not None and not tensor.is_contiguous():
            problems.append(f"{name} is contiguous: found strides {list(tensor.stride())}")
    if problems:
        raise TargetError(f"{NAME}: " + "; ".join(problems))
