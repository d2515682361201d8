# SPDX-License-Identifier: Apache-2.0
"""A Llama whose layers differ in KV heads and FFN width, and may lack either sublayer. For transformers 4 and 5.

Shape letters: B = batch, S = new positions, T = cached and new positions, D = hidden_size, H = query heads,
K = key-value heads of a layer, d = head_dim.
"""

import inspect
from collections import OrderedDict
from typing import ClassVar

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple

from .configuration_decilm import DeciLMConfig

MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters


def make_masks(windows, **arguments):
    """{window: mask} with the causal mask for None, the sliding one for a number, as the attention function wants them.

    The versions' mask functions name their arguments differently, and `generate` adds others: each takes its own.
    """
    arguments = {name: value for name, value in arguments.items() if name in MASK_PARAMETERS}
    overlays = {window: None if window is None else sliding_window_overlay(window) for window in windows}
    return {window: create_causal_mask(**arguments, and_mask_function=overlay) for window, overlay in overlays.items()}


class DeciLMAttention(nn.Module):
    def __init__(self, config, layer, cache_index):
        super().__init__()
        d, heads, kv_heads = config.head_dim, config.num_attention_heads, config.kv_heads_of(layer)
        self.config = config
        self.layer_idx = cache_index
        self.head_dim = d
        self.num_key_value_groups = heads // kv_heads
        self.scaling = d**-0.5
        self.is_causal = True
        self.sliding_window = config.sliding_window_of(layer)
        self.q_proj = nn.Linear(config.hidden_size, heads * d, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * d, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * d, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * d, config.hidden_size, bias=config.attention_bias)
        self.q_norm = LlamaRMSNorm(d, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(d, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden, masks, position_embeddings, cache_position, past_key_values=None, **kwargs):
        """[B, S, D] -> [B, S, D]; a cache is extended by S positions.

        `kwargs` are the attention function's: flash attention has no mask, and tells sequences in a row apart by them.
        """
        batch_and_length = hidden.shape[:-1]
        heads = (*batch_and_length, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden).view(heads)).transpose(1, 2)  # [B, H, S, d]
        key = self.k_norm(self.k_proj(hidden).view(heads)).transpose(1, 2)  # [B, K, S, d]
        value = self.v_proj(hidden).view(heads).transpose(1, 2)  # [B, K, S, d]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:  # -> [B, K, T, d]; transformers 4 needs the positions for a static cache
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})
        # `set_attn_implementation` searches this source for the way to the function: transformers 4 for the subscript
        # below, 5 for ALL_ATTENTION_FUNCTIONS.get_interface( which 4 does not have.
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended, _ = attend(
            self,
            query,
            key,
            value,
            masks[self.sliding_window],
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(attended.reshape(*batch_and_length, -1))


class DeciLMMLP(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        width = config.ffn_width_of(layer)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class DeciLMBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)); each is absent (None), the usual one, or one square matrix."""

    def __init__(self, config, layer, cache_index):
        super().__init__()
        size = config.hidden_size
        attention, ffn = config.block_configs[layer].attention, config.block_configs[layer].ffn
        self.self_attn = self.mlp = None
        if not attention.no_op:
            self.input_layernorm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
            if attention.replace_with_linear:
                self.self_attn = nn.Sequential(OrderedDict(linear_attn=nn.Linear(size, size, bias=False)))
            else:
                self.self_attn = DeciLMAttention(config, layer, cache_index)
        if not ffn.no_op:
            self.post_attention_layernorm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
            if ffn.replace_with_linear:
                self.mlp = nn.Sequential(OrderedDict(linear_mlp=nn.Linear(size, size, bias=False)))
            else:
                self.mlp = DeciLMMLP(config, layer)

    @property
    def has_attention(self):
        return isinstance(self.self_attn, DeciLMAttention)

    def forward(self, hidden, masks, position_embeddings, cache_position, past_key_values=None, **kwargs):
        if self.has_attention:
            hidden = hidden + self.self_attn(
                self.input_layernorm(hidden),
                masks,
                position_embeddings,
                cache_position,
                past_key_values=past_key_values,  # by name: compressed-tensors puts its own cache there
                **kwargs,
            )
        elif self.self_attn is not None:
            hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        if self.mlp is not None:
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden


class DeciLMPreTrainedModel(PreTrainedModel):
    config_class = DeciLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DeciLMBlock"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True


class DeciLMModel(DeciLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        cache_index = 0  # caches count attention layers only: their length is asked of entry 0, which must be in use
        for layer in range(config.num_hidden_layers):
            self.layers.append(DeciLMBlock(config, layer, cache_index))
            cache_index += self.layers[-1].has_attention
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.windows = {layer.self_attn.sliding_window for layer in self.layers if layer.has_attention}
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        cache_position = kwargs.pop("cache_position", None)  # given by transformers 4 when it generates
        if cache_position is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(hidden.shape[1], device=hidden.device) + seen
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = make_masks(
                self.windows,
                config=self.config,
                inputs_embeds=hidden,
                input_embeds=hidden,  # transformers 4
                attention_mask=attention_mask,
                cache_position=cache_position,  # transformers 4
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        position_embeddings = self.rotary_emb(hidden, position_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = ()  # the input of every layer, then the normed output of the last
        for layer in self.layers:
            if output_hidden_states:
                hidden_states += (hidden,)
            hidden = layer(
                hidden,
                masks,
                position_embeddings,
                cache_position,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states, hidden) if output_hidden_states else None,
        )


class DeciLMForCausalLM(DeciLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}  # transformers 4 reads the keys only

    def __init__(self, config):
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def create_masks_for_generate(self, **arguments):
        """Called by `generate` with a static cache; without it, all layers would get the mask without a window."""
        return make_masks(self.model.windows, **arguments)

    @can_return_tuple
    def forward(  # `generate` looks at these names to see what it may pass
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits [B, S, V], or of the last `logits_to_keep` positions only; with `labels` [B, S] also the loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            # `Trainer` leaves gradient accumulation to it (num_items_in_batch) where `forward` takes any keyword.
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


__all__ = ["DeciLMForCausalLM", "DeciLMModel", "DeciLMPreTrainedModel"]
