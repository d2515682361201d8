"""Phi-3 and Phi-4: Llama with one matrix for q, k and v and one for gate and up, and in Phi-3 mini a sliding window."""

from exporter.architectures.base import LLAMA_TENSORS, DecoderConfig, Family, Positions
from exporter.errors import CheckpointError
from exporter.rope import Rope

STACKED = {
    "attention.qkv_proj": "model.layers.{layer}.self_attn.qkv_proj",
    "ffn.gate_up_proj": "model.layers.{layer}.mlp.gate_up_proj",
}
APART = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "ffn.gate_proj", "ffn.up_proj")


class Phi3Config(DecoderConfig):
    sliding_window: Positions | None = None

    def sliding_window_of(self, layer: int) -> int | None:
        return self.sliding_window

    def rope(self) -> Rope:
        rope = super().rope()
        if rope.scaling is not None:  # here transformers takes "yarn" for another word for "longrope"
            raise CheckpointError(
                "this kind of RoPE scaling is not supported in Phi-3",
                expected="default",
                found=type(rope.scaling).__name__,
            )
        return rope


FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    config=Phi3Config,
    tensors={role: name for role, name in LLAMA_TENSORS.items() if role not in APART} | STACKED,
)
