"""Qwen 3 (dense): norms on query and key heads, a head_dim of its own, and Qwen 2's window rule."""

from typing import ClassVar

from exporter.architectures.base import (
    LLAMA_TENSORS,
    LLAMA_UNUSED,
    AttentionBiasConfig,
    AttentionSpec,
    Family,
    FFNSpec,
    Heads,
    Keys,
    Windows,
)
from exporter.architectures.qwen2 import SlidingUpperLayersConfig, window_keys


class Qwen3Config(SlidingUpperLayersConfig, AttentionBiasConfig):
    head_dim: Heads = 128

    qk_norm: ClassVar[bool] = True


def _config_keys(attention: AttentionSpec, ffn: FFNSpec, windows: Windows) -> Keys | None:
    keys = window_keys(windows)
    if not attention.qk_norm or attention.qkv_bias != attention.o_bias or ffn.bias or keys is None:
        return None
    return {"attention_bias": attention.qkv_bias, **keys}


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    config=Qwen3Config,
    tensors=LLAMA_TENSORS,
    unused=LLAMA_UNUSED,
    config_keys=_config_keys,
)
