"""Mistral 7B and its dense relatives: Llama's tensors, and a sliding window, in Ministral 8B on some of the layers."""

from exporter.architectures.base import (
    LLAMA_TENSORS,
    LLAMA_UNUSED,
    AttentionSpec,
    Family,
    FFNSpec,
    Heads,
    Keys,
    LayerTypesConfig,
    Positions,
    Windows,
)


class MistralConfig(LayerTypesConfig):
    # What transformers takes where a key is missing; null is all heads, and no window.
    num_key_value_heads: Heads | None = 8
    sliding_window: Positions | None = 4096

    def sliding_window_of(self, layer: int) -> int | None:
        return self.sliding_window if self.is_sliding(layer, otherwise=True) else None


def _config_keys(attention: AttentionSpec, ffn: FFNSpec, windows: Windows) -> Keys | None:
    has_bias = attention.qkv_bias or attention.o_bias or ffn.bias
    if attention.qk_norm or has_bias or len(set(windows)) > 1:
        return None
    return {"sliding_window": windows[0]}


FAMILY = Family(
    name="mistral",
    model_types=("mistral", "ministral"),
    architectures=("MistralForCausalLM", "MinistralForCausalLM"),
    config=MistralConfig,
    tensors=LLAMA_TENSORS,
    unused=LLAMA_UNUSED,
    config_keys=_config_keys,
)
