"""Llama 1 to 3.x, and everything that writes its config as Llama (`LlamaForCausalLM`)."""

from exporter.architectures.base import (
    LLAMA_TENSORS,
    LLAMA_UNUSED,
    AttentionBiasConfig,
    AttentionSpec,
    Family,
    FFNSpec,
    Keys,
    Windows,
)


class LlamaConfig(AttentionBiasConfig):
    mlp_bias: bool = False

    @property
    def ffn_bias(self) -> bool:
        return self.mlp_bias


def _config_keys(attention: AttentionSpec, ffn: FFNSpec, windows: Windows) -> Keys | None:
    if attention.qk_norm or attention.qkv_bias != attention.o_bias or any(windows):
        return None
    return {"attention_bias": attention.qkv_bias, "mlp_bias": ffn.bias}


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    config=LlamaConfig,
    tensors=LLAMA_TENSORS,
    unused=LLAMA_UNUSED,
    config_keys=_config_keys,
)
