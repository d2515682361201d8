"""Small random models as transformers saves them, and tokenizers and texts of the words w0, w1, ... for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


def saved_model(folder: Path, family: str, changes: dict[str, Any]) -> transformers.PreTrainedModel:
    """A random model with these changes to the sizes below, saved into `folder`."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": 307,
    }
    config = getattr(transformers, f"{family}Config")(**sizes | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # the usual start is so small that most mistakes would drown in the tolerance
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm" in name else 0.0
            parameter.copy_(shift + torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.12))
    model.save_pretrained(folder)
    return model


def word_tokenizer(folder: Path, words: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_words(path: Path, count: int, words: int) -> None:
    """Write a text of so many tokens, drawn from so many words."""
    path.write_text(" ".join(f"w{word}" for word in np.random.default_rng(0).integers(0, words, count)))
