"""Mistral 7B and its dense relatives: Llama's tensors, and a sliding window in the first release."""

from exporter.architectures.base import LLAMA_TENSORS, LLAMA_UNUSED, DecoderConfig, Family, Positions


class MistralConfig(DecoderConfig):
    sliding_window: Positions | None = 4096  # what transformers takes where the key is missing; null is none

    def sliding_window_of(self, layer: int) -> int | None:
        return self.sliding_window


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    config=MistralConfig,
    tensors=LLAMA_TENSORS,
    unused=LLAMA_UNUSED,
)
