# SPDX-License-Identifier: Apache-2.0
"""Configuration of a Llama whose layers differ: `block_configs` says what each has. Works with transformers 4 and 5.

Written by Fuselage beside the weights; `auto_map` in config.json leads here. The `fuselage` key, which only this code
and Fuselage read, adds what the format has no word for: q/k norms and sliding windows.
"""

from typing import ClassVar

from transformers import PretrainedConfig


class BlockEntry(dict):
    """A JSON object whose keys are attributes too: serving engines read `block.attention.no_op`."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(PretrainedConfig):
    # Not a LlamaConfig: its fields are typed in transformers 5, and neither the nulls below nor the per-layer list
    # that TensorRT-LLM puts into num_key_value_heads would pass.
    model_type = "nemotron-nas"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(
        self,
        vocab_size=128256,
        hidden_size=8192,
        num_hidden_layers=0,
        num_attention_heads=64,
        head_dim=None,
        block_configs=(),
        hidden_act="silu",
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=None,
        rope_parameters=None,
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
        fuselage=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim if head_dim is not None else hidden_size // num_attention_heads
        self.block_configs = [
            BlockEntry(attention=BlockEntry(block["attention"]), ffn=BlockEntry(block["ffn"]))
            for block in block_configs
        ]
        self.intermediate_size = kwargs.pop("intermediate_size", None)  # per layer, but engines ask for the attribute
        self.num_key_value_heads = kwargs.pop("num_key_value_heads", None)
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.fuselage = fuselage
        # transformers 4 knows rope_theta and rope_scaling, 5 keeps both in rope_parameters: take either spelling.
        rope = {"rope_type": "default", "rope_theta": rope_theta, **(rope_parameters or rope_scaling or {})}
        self.rope_theta = rope["rope_theta"]
        if hasattr(PretrainedConfig, "standardize_rope_params"):
            self.rope_parameters = rope
        else:
            del rope["rope_theta"]
            self.rope_scaling = None if rope["rope_type"] == "default" else rope
        super().__init__(**kwargs)

    def kv_heads_of(self, layer):
        return self.num_attention_heads // self.block_configs[layer].attention.n_heads_in_group

    def ffn_width_of(self, layer):
        """int(2/3 * ffn_mult * hidden_size), rounded up to a multiple of 256: the format's rule."""
        width = int(2 * self.block_configs[layer].ffn.ffn_mult * self.hidden_size / 3)
        return -(-width // 256) * 256

    def sliding_window_of(self, layer):
        return self.fuselage["blocks"][layer]["sliding_window"] if self.fuselage else None

    @property
    def qk_norm(self):
        return bool(self.fuselage and self.fuselage["qk_norm"])
