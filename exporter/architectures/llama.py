"""Llama 1 to 3.x, and everything that writes its config as Llama (`LlamaForCausalLM`)."""

from exporter.architectures.base import LLAMA_TENSORS, LLAMA_UNUSED, AttentionBiasConfig, Family


class LlamaConfig(AttentionBiasConfig):
    mlp_bias: bool = False

    @property
    def ffn_bias(self) -> bool:
        return self.mlp_bias


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    config=LlamaConfig,
    tensors=LLAMA_TENSORS,
    unused=LLAMA_UNUSED,
)
