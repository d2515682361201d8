"""A ModelGraph as a PyTorch module: parameters in place of lazy tensors, the arithmetic of `exporter.reference`.

Parameters are named after the graph's fields ("blocks.3.ffn.gate_proj.weight"). Under torchrun they are sharded with
FSDP2 (`torch.distributed.fsdp.fully_shard`), one group per entry of `graph.blocks` and one for the ends of the model;
every process then reads, holds and writes some rows of every tensor, so none ever holds a model.

Shape letters: B = batch, S = tokens, D = hidden_size, V = vocab_size.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from exporter.dtypes import FLOAT32
from exporter.errors import FuselageError, raise_all
from exporter.graph import Block, Linear, ModelGraph, ParallelBlocks, weights
from exporter.lazy import LazyTensor, cast, slice_rows
from exporter.lazy_quantized import dequantized
from exporter.reference import LoadedLinear, Reference, Span, contributions, rms_norm, torch_from_lazy


class DistillError(FuselageError):
    """A distillation that cannot be started, or whose numbers ran away."""


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that train together, and the device of this one."""

    rank: int
    count: int
    device: torch.device

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all processes of a tensor that each of them has."""
        if self.count > 1:
            dist.all_reduce(values)
        return values / self.count

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """Join the other processes if `torchrun` started this one: over NCCL on CUDA, over Gloo on a CPU.

    Raises:
        DistillError: this machine has fewer devices than processes.
    """
    kind, local_rank = torch.device(device).type, int(os.environ.get("LOCAL_RANK", 0))
    raise_all(device_problems(kind, local_rank + 1))
    if not dist.is_torchelastic_launched():
        yield Processes(0, 1, torch.device(device))
        return
    here = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()


def device_problems(kind: str, processes: int = 1) -> list[DistillError]:
    """Say whether this machine has fewer devices of a kind, "cuda" or "cpu", than processes on it need."""
    if kind != "cuda" or torch.cuda.device_count() >= processes:
        return []
    return [
        DistillError(
            "every process on this machine needs a CUDA device of its own",
            expected=f"at least {processes}",
            found=torch.cuda.device_count(),
        )
    ]


class _Part(nn.Module):
    """A dataclass of the graph as a module: the same attributes, with parameters in place of its lazy tensors."""

    def __init__(self, part: Any, dtype: torch.dtype) -> None:
        super().__init__()
        for name, value in _fields(part).items():
            setattr(self, name, _module(value, dtype))


class _Block(_Part):
    """One entry of `graph.blocks`."""

    blocks: nn.ModuleList  # of a parallel group

    def __init__(self, entry: Block | ParallelBlocks, dtype: torch.dtype) -> None:
        super().__init__(entry, dtype)
        self._is_parallel = isinstance(entry, ParallelBlocks)

    def forward(self, x: torch.Tensor, span: Span, recompute: bool) -> torch.Tensor:
        """f(x), [B, S, D]; with `recompute` the backward pass runs it again instead of keeping what is in between."""
        if recompute and torch.is_grad_enabled():
            return checkpoint(self._run, x, span, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, span)

    def _run(self, x: torch.Tensor, span: Span) -> torch.Tensor:
        members = tuple(self.blocks) if self._is_parallel else (self,)
        attention, ffn = contributions(members, [None] * len(members), x, span)
        return x + attention + ffn


class Decoder(_Part):
    """A whole graph. Its tensors are on the meta device until `load_weights`.

    A quantized linear holds the values that its codes stand for; what its input is rounded to is rounded here too.
    """

    embedding: nn.Parameter  # [V, D]
    blocks: nn.ModuleList
    norm: Any
    lm_head: Any  # None: tied to the embedding

    def __init__(self, graph: ModelGraph, dtype: torch.dtype, *, recompute: bool = False) -> None:
        super().__init__(graph, dtype)
        self._graph = graph
        self._recompute = recompute

    def forward(self, input_ids: torch.Tensor, keep: Collection[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Full causal forward.

        Args:
            input_ids: int64 [B, S].
            keep: indices of entries of `graph.blocks`.

        Returns:
            The final states, normed, that `head` makes logits of, and the residual stream after each of the entries in
            `keep`; [B, S, D] each.
        """
        x = F.embedding(input_ids, self.embedding)
        span = Reference(self._graph, device=x.device, dtype=x.dtype).span(input_ids.shape, None)
        kept = []
        for index, block in enumerate(self.blocks):
            x = block(x, span, self._recompute)
            if index in keep:
                kept.append(x)
        return rms_norm(x, self.norm.weight, self.norm.eps), kept

    @property
    def head(self) -> Any:
        """What `apply_linear` takes to logits, [..., D] -> [..., V]. Sharded, it is whole after a forward pass only."""
        return LoadedLinear(self.embedding) if self.lm_head is None else self.lm_head


def shard(decoder: Decoder, compute_dtype: torch.dtype) -> None:
    """Spread the parameters over the joined processes; products are then taken in `compute_dtype`."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in decoder.blocks:
        if next(block.parameters(), None) is not None:
            fully_shard(block, mp_policy=policy)
    fully_shard(decoder, mp_policy=policy, reshard_after_forward=False)  # the loss begins with its head


@torch.no_grad()
def load_weights(decoder: Decoder, graph: ModelGraph, device: torch.device) -> None:
    """Read the rows of `graph` that this process holds, one tensor at a time."""
    decoder.to_empty(device=device)
    sources = dict(named_tensors(graph))
    for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers()):
        load_rows(tensor, sources[name])


def load_rows(tensor: torch.Tensor, source: LazyTensor) -> None:
    """Fill the rows of `tensor` that this process holds from `source`, which is as large as all of it."""
    held, first = held_rows(tensor)
    part = slice_rows(source, first, first + len(held)) if source.shape else source
    held.copy_(torch_from_lazy(part, held.device, held.dtype))


def held_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What this process holds of a tensor: rows in a row (all of them if it is not sharded), and the first's index."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    # FSDP2 shards axis 0 as `torch.chunk` splits it: equal pieces, the last ones shorter or empty.
    step = -(-tensor.shape[0] // tensor.device_mesh.size())
    return tensor.to_local(), min(step * tensor.device_mesh.get_local_rank(), tensor.shape[0])


class HeldRows(LazyTensor):
    """The float32 rows that this process holds of a tensor, read from its device in chunks."""

    __slots__ = ("_held",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._held = held_rows(tensor.detach())[0]
        super().__init__(self._held.shape, FLOAT32)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._held[start:stop].cpu().numpy()


def named_tensors(part: Any, name: str = "") -> Iterator[tuple[str, LazyTensor]]:
    """Yield every tensor of a graph with the name that its `Decoder` has for it."""
    if isinstance(part, LazyTensor):
        yield name, part
    elif isinstance(part, tuple):
        for index, item in enumerate(part):
            yield from named_tensors(item, f"{name}.{index}")
    elif is_dataclass(part):
        for field, value in _fields(part).items():
            yield from named_tensors(value, f"{name}.{field}" if name else field)


def with_tensors(part: Any, tensors: Mapping[str, LazyTensor], name: str = "") -> Any:
    """The same graph (or part of one) with the tensors that `tensors` names, in the dtypes that they replace."""
    if isinstance(part, LazyTensor):
        return cast(tensors[name], part.dtype) if name in tensors else part
    if isinstance(part, tuple):
        return tuple(with_tensors(item, tensors, f"{name}.{index}") for index, item in enumerate(part))
    if not _has_tensors(part):
        return part
    changed = {f.name: f"{name}.{f.name}" if name else f.name for f in fields(part)}
    return replace(part, **{field: with_tensors(getattr(part, field), tensors, at) for field, at in changed.items()})


def _fields(part: Any) -> dict[str, Any]:
    """The fields of a dataclass; a linear's are those of `exporter.reference.LoadedLinear`."""
    if not isinstance(part, Linear):
        return {field.name: getattr(part, field.name) for field in fields(part)}
    if part.quantization is None:
        return {"weight": part.weight, "bias": part.bias, "input": None}
    values = dequantized(part.weight, part.quantization.weight_scale)
    return {"weight": values, "bias": part.bias, "input": part.quantization.input}


def _module(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, LazyTensor):
        if not value.shape:  # a scale, which nobody trains and FSDP would not take
            return nn.Buffer(torch.empty((), dtype=torch.float32, device="meta"))
        return nn.Parameter(torch.empty(value.shape, dtype=dtype, device="meta"))
    if isinstance(value, tuple) and all(isinstance(item, Block | ParallelBlocks) for item in value):
        return nn.ModuleList(_Block(item, dtype) for item in value)
    return _Part(value, dtype) if _has_tensors(value) else value


def _has_tensors(value: Any) -> bool:
    return next(weights(value), None) is not None
