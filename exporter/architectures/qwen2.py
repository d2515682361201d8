"""Qwen 2 and 2.5 (dense): biases on q, k and v, and a sliding window in the upper layers where it is switched on."""

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


class SlidingUpperLayersConfig(LayerTypesConfig):
    """The window rule that Qwen 2 and 3 share (transformers `Qwen2Config`, `layer_types`)."""

    num_key_value_heads: Heads | None = 32  # what transformers takes where the key is missing; null is all heads
    use_sliding_window: bool = False
    sliding_window: Positions | None = 4096
    max_window_layers: int = 28

    def sliding_window_of(self, layer: int) -> int | None:
        is_sliding = self.is_sliding(layer, otherwise=layer >= self.max_window_layers)
        return self.sliding_window if self.use_sliding_window and is_sliding else None


class Qwen2Config(SlidingUpperLayersConfig):
    @property
    def qkv_bias(self) -> bool:
        return True


def window_keys(windows: Windows) -> Keys | None:
    """One window size, on any layers: `layer_types` names them, `max_window_layers` is what older readers go by."""
    sizes = sorted({window for window in windows if window is not None})
    if len(sizes) > 1:
        return None
    if not sizes:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": len(windows)}
    return {
        "use_sliding_window": True,
        "sliding_window": sizes[0],
        "max_window_layers": next(layer for layer, window in enumerate(windows) if window is not None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _config_keys(attention: AttentionSpec, ffn: FFNSpec, windows: Windows) -> Keys | None:
    if attention.qk_norm or not attention.qkv_bias or attention.o_bias or ffn.bias:
        return None
    return window_keys(windows)


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    config=Qwen2Config,
    tensors=LLAMA_TENSORS,
    unused=LLAMA_UNUSED,
    config_keys=_config_keys,
)
