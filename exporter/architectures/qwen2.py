"""Qwen 2 and 2.5 (dense): biases on q, k and v, and a sliding window in the upper layers where it is switched on."""

from exporter.architectures.base import LLAMA_TENSORS, LLAMA_UNUSED, DecoderConfig, Family, Positions
from exporter.errors import CheckpointError


class SlidingUpperLayersConfig(DecoderConfig):
    """The window rule that Qwen 2 and 3 share (transformers `Qwen2Config`, `layer_types`)."""

    use_sliding_window: bool = False
    sliding_window: Positions | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def sliding_window_of(self, layer: int) -> int | None:
        if not self.use_sliding_window:
            return None
        if self.layer_types is None:
            return self.sliding_window if layer >= self.max_window_layers else None
        if len(self.layer_types) != self.num_hidden_layers:
            raise CheckpointError(
                "layer_types has one entry per layer", expected=self.num_hidden_layers, found=len(self.layer_types)
            )
        kind = self.layer_types[layer]
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"layer_types[{layer}]: unknown kind of attention", found=kind)
        return self.sliding_window if kind == "sliding_attention" else None


class Qwen2Config(SlidingUpperLayersConfig):
    @property
    def qkv_bias(self) -> bool:
        return True


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    config=Qwen2Config,
    tensors=LLAMA_TENSORS,
    unused=LLAMA_UNUSED,
)
