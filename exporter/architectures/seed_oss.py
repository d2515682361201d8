"""Seed-OSS (36B): Llama with biases on q, k and v, a key of its own for o's, and a head_dim of its own."""

from exporter.architectures.base import (
    LLAMA_TENSORS,
    LLAMA_UNUSED,
    AttentionSpec,
    Family,
    FFNSpec,
    Heads,
    Keys,
    Windows,
)
from exporter.architectures.llama import LlamaConfig


class SeedOssConfig(LlamaConfig):
    # What transformers takes where a key is missing.
    num_key_value_heads: Heads | None = 8
    head_dim: Heads | None = 128
    attention_bias: bool = True
    attention_out_bias: bool = False

    @property
    def o_bias(self) -> bool:
        return self.attention_out_bias


def _config_keys(attention: AttentionSpec, ffn: FFNSpec, windows: Windows) -> Keys | None:
    if attention.qk_norm or any(windows):
        return None
    return {"attention_bias": attention.qkv_bias, "attention_out_bias": attention.o_bias, "mlp_bias": ffn.bias}


FAMILY = Family(
    name="seed-oss",
    model_types=("seed_oss",),
    architectures=("SeedOssForCausalLM",),
    config=SeedOssConfig,
    tensors=LLAMA_TENSORS,
    unused=LLAMA_UNUSED,
    config_keys=_config_keys,
)
