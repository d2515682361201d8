"""Nemotron-NAS (`DeciLMForCausalLM`): Llama with one `block_configs` entry per layer; also what we write ourselves.

In folders we wrote, the `fuselage` key adds what the format has no word for: the source layers of every block, the
segments of fused FFNs, q/k norms and sliding windows.
"""

from dataclasses import replace

from exporter.architectures.base import (
    LLAMA_TENSORS,
    LLAMA_UNUSED,
    AttentionSpec,
    BlockConfig,
    Family,
    FFNSpec,
    LayerSpec,
    WrittenModel,
)
from exporter.architectures.llama import LlamaConfig
from exporter.errors import CheckpointError


class NemotronNasConfig(LlamaConfig):
    block_configs: list[BlockConfig]  # required here
    fuselage: WrittenModel | None = None

    def layers(self) -> tuple[LayerSpec, ...]:
        if self.fuselage is not None and len(self.fuselage.blocks) != self.num_hidden_layers:
            raise CheckpointError(
                "fuselage.blocks has one entry per layer",
                expected=self.num_hidden_layers,
                found=len(self.fuselage.blocks),
            )
        return super().layers()

    def layer_spec(self, layer: int, block: BlockConfig) -> LayerSpec:
        spec = super().layer_spec(layer, block)
        if self.fuselage is None:
            return spec
        written = self.fuselage.blocks[layer]
        attention, ffn = spec.attention, spec.ffn
        if isinstance(attention, AttentionSpec):
            attention = replace(attention, qk_norm=self.fuselage.qk_norm, sliding_window=written.sliding_window)
        if isinstance(ffn, FFNSpec) and written.segments is not None:
            ffn = replace(ffn, segments=tuple(written.segments))
        return LayerSpec(attention, ffn, tuple(written.source_layers))


FAMILY = Family(
    name="nemotron-nas",
    model_types=("nemotron-nas", "nemotron_nas", "deci"),
    architectures=("DeciLMForCausalLM",),
    config=NemotronNasConfig,
    tensors=LLAMA_TENSORS,
    unused=LLAMA_UNUSED,
)
