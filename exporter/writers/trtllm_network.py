"""The TensorRT-LLM model class of a fused model, for checkpoints that the stock Nemotron-NAS class does not build.

    trtllm-build --checkpoint_dir CKPT --model_cls_file CKPT/models.py --model_cls_name FuselageForCausalLM ...

This file is copied beside the weights and imported by TensorRT-LLM 1.1 or 1.2 alone; Fuselage itself never imports it.
Config, KV cache, embedding, final norm, lm_head and the pipeline are those of `DeciLMForCausalLM`, and so are the names
of tensors. What is ours is how a layer's parts are put together:

 - parallel blocks: y = x + sum_j (a_j + f_j), a_j = Attention_j(n1_j(x)), f_j = FFN_j(n2_j(x + a_j)). Every block is a
   layer of its own to the KV cache; the f_j are summed before they are reduced over the ranks, which takes one
   all-reduce for all of them;
 - FFNs that are cut into parts, each a gated MLP with GEMMs of its own: their sum is reduced once;
 - norms that hand on a pair (quantized tensor, scale per token), as those of SmoothQuant and row-wise FP8 do: their
   result goes to the next module as it is. The stock layer also hands those modules arguments that they do not take.

Quantized modules take the place of `Attention`, `GatedMLP`, `RmsNorm` and the linears after construction, by type, so
that none of them is subclassed here. Never executed in TensorRT-LLM: see docs/tensorrt_llm.md.
"""

from tensorrt_llm.functional import allreduce
from tensorrt_llm.layers.attention import KeyValueCacheParams
from tensorrt_llm.layers.mlp import GatedMLP
from tensorrt_llm.models.nemotron_nas.model import (
    DeciLMDecoderLayer,
    DeciLMDecoderLayerList,
    DeciLMForCausalLM,
    DeciLMLayerListOutput,
)
from tensorrt_llm.module import Module


class WideGatedMLP(Module):
    """A gated MLP as the sum of narrower ones; `partial` is this rank's share of it, `forward` that of all ranks.

    A linear without a `tp_group` does not reduce, so that the parts' sum can be.
    """

    def __init__(self, widths, *, hidden_size, hidden_act, dtype, tp_group, tp_size, quant_mode):
        super().__init__()
        self.tp_group = tp_group
        self.tp_size = tp_size
        self.num_parts = len(widths)
        for number, width in enumerate(widths):
            part = GatedMLP(
                hidden_size=hidden_size,
                ffn_hidden_size=width,
                hidden_act=hidden_act,
                bias=False,
                dtype=dtype,
                tp_group=None,
                tp_size=tp_size,
                quant_mode=quant_mode,
            )
            setattr(self, f"part_{number}", part)

    def partial(self, hidden_states):
        """[tokens, D], or the pair that a quantized norm gives, -> [tokens, D], not yet summed over the ranks."""
        return _sum([getattr(self, f"part_{number}")(hidden_states) for number in range(self.num_parts)])

    def forward(self, hidden_states):
        return _reduced(self.partial(hidden_states), self)


class FuselageDecoderLayer(DeciLMDecoderLayer):
    """One block: an attention, a linear in its place or nothing, then the same for the FFN."""

    def _init_ffn(self):
        super()._init_ffn()
        widths = self.config.fuselage["ffn_parts"].get(str(self.layer_idx))
        if widths is not None:
            mapping = self.config.mapping
            self.ffn = WideGatedMLP(
                widths,
                hidden_size=self.config.hidden_size,
                hidden_act=self.config.hidden_act,
                dtype=self.config.dtype,
                tp_group=mapping.tp_group,
                tp_size=mapping.tp_size,
                quant_mode=self.config.quant_mode,
            )

    def attend(self, x, *, use_cache, **attention_arguments):
        """Return what the attention adds to x [tokens, D] and the cache that it leaves; None for what is not there."""
        if self.layer_config.is_noop_attention_layer:
            return None, None
        normed = self.input_layernorm(x)
        if self.layer_config.is_linear_attention_layer:
            return self.attention(normed), None
        output = self.attention(hidden_states=normed, use_cache=use_cache, **attention_arguments)
        return output if use_cache else (output, None)

    def feed_forward(self, x, *, partial):
        """Return what the FFN adds to x [tokens, D], None if there is none; if `partial`, this rank's share of it."""
        if self.layer_config.is_noop_ffn_layer:
            return None
        normed = self.post_layernorm(x)
        return self.ffn.partial(normed) if partial else self.ffn(normed)


class FuselageDecoderLayerList(DeciLMDecoderLayerList):
    """The layers of this rank, walked group by group; a layer that is in no group is one of its own."""

    def __init__(self, config):
        super().__init__(FuselageDecoderLayer, config)
        first = self.layer_list[0]
        grouped = {numbers[0] - first: len(numbers) for numbers in config.fuselage["parallel_groups"]}
        self.groups = []
        local = 0
        while local < len(self.layer_list):
            size = grouped.get(local, 1)
            self.groups.append(range(local, local + size))
            local += size

    def forward(
        self,
        hidden_states,
        use_cache,
        attention_mask,
        kv_cache_params,
        attention_params=None,
        position_ids=None,
        lora_params=None,
        spec_decoding_params=None,
    ):
        if lora_params is not None and lora_params.lora_ranks is not None:
            raise NotImplementedError("this model class has no LoRA")
        kv_cache_params.fill_none_tensor_list(len(self.layer_list))
        presents = []
        for group in self.groups:
            attentions = []
            for local in group:
                output, present = self[local].attend(
                    hidden_states,
                    use_cache=use_cache,
                    attention_mask=attention_mask,
                    attention_params=attention_params,
                    kv_cache_params=_cache_of_layer(kv_cache_params, local),
                    spec_decoding_params=spec_decoding_params,
                )
                attentions.append(output)
                if present is not None:
                    presents.append(present)
            mixed = [_sum([hidden_states, output]) for output in attentions]
            added = mixed if len(group) == 1 else [hidden_states, *attentions]
            hidden_states = _sum([*added, self._feed_forwards(group, mixed)])
        return DeciLMLayerListOutput(hidden_states=hidden_states, present_kvs=presents)

    def _feed_forwards(self, group, mixed):
        """The sum of what the FFNs of a group add, None if it has none."""
        if len(group) == 1:
            return self[group[0]].feed_forward(mixed[0], partial=False)
        # Only gated MLPs are cut over the ranks: a linear in the place of an FFN gathers its outputs by itself.
        pairs = [(self[local], x) for local, x in zip(group, mixed, strict=True)]
        mlps = [(layer, x) for layer, x in pairs if layer.layer_config.is_mlp_layer]
        others = [(layer, x) for layer, x in pairs if not layer.layer_config.is_mlp_layer]
        whole = [layer.feed_forward(x, partial=False) for layer, x in others]
        if mlps:
            share = _sum([layer.feed_forward(x, partial=True) for layer, x in mlps])
            whole.append(_reduced(share, mlps[0][0].ffn))
        return _sum(whole)


class FuselageForCausalLM(DeciLMForCausalLM):
    """`DeciLMForCausalLM` with our layers; the config's key `fuselage` says what is parallel and what is cut."""

    def __init__(self, config):
        super().__init__(config)
        # In time: weights are loaded, and modules are quantized, once the model is constructed.
        self.transformer.layers = FuselageDecoderLayerList(config)


def _sum(tensors):
    """Add what is there; None if nothing is."""
    total = None
    for tensor in tensors:
        if tensor is not None:
            total = tensor if total is None else total + tensor
    return total


def _reduced(share, module):
    return allreduce(share, module.tp_group) if module.tp_size > 1 else share


def _cache_of_layer(params, local):
    """The arguments of one layer's attention. The past is None where the cache is paged, as it is in every build."""
    return KeyValueCacheParams(
        past_key_value=[params.past_key_value[local]],
        host_past_key_value_lengths=params.host_past_key_value_lengths,
        host_max_attention_window_sizes=params.host_max_attention_window_sizes,
        host_sink_token_length=params.host_sink_token_length,
        kv_cache_block_offsets=params.kv_cache_block_offsets,
        host_kv_cache_block_offsets=params.host_kv_cache_block_offsets,
        host_kv_cache_pool_pointers=params.host_kv_cache_pool_pointers,
        host_kv_cache_pool_mapping=params.host_kv_cache_pool_mapping,
        cache_indirection=params.cache_indirection,
    )
