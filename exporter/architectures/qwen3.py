"""Qwen 3 (dense): norms on query and key heads, a head_dim of its own, and Qwen 2's window rule."""

from typing import ClassVar

from exporter.architectures.base import LLAMA_TENSORS, LLAMA_UNUSED, AttentionBiasConfig, Family, Heads
from exporter.architectures.qwen2 import SlidingUpperLayersConfig


class Qwen3Config(SlidingUpperLayersConfig, AttentionBiasConfig):
    head_dim: Heads = 128

    qk_norm: ClassVar[bool] = True


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    config=Qwen3Config,
    tensors=LLAMA_TENSORS,
    unused=LLAMA_UNUSED,
)
