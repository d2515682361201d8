"""Train the demo model: a small Llama on English text that every CPython ships (`corpus.py`).

Two choices suit the model to FFN fusion; neither acts in evaluation:
  - while training, the attention of layers 8 to 14 is skipped at random, one time in three (`AttentionSkip`), so
    that the deeper layers lean on it less;
  - the checkpoint kept is the one with the lowest held-out loss, so the recorded perplexity is a little flattered.

The folder written is a plain bfloat16 Llama checkpoint, plus `heldout.txt` and `training.json`. The same Python,
torch, tokenizers, CPU and arguments give the same bytes.
"""

import argparse
import copy
import json
import math
import platform
import random
from importlib.metadata import version
from pathlib import Path

import torch
from corpus import calibration_text, docstrings, split_documents
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SKIPPED_ATTENTION = range(8, 15)
SEQUENCE_LENGTHS = (256, 256, 256, 1024)  # every step draws one
EVALUATION_LENGTH = 256
SLICE_TOKENS = 4096
TOPIC_WEIGHT = 3  # copies of the topics for one of the docstrings

CONFIG = {  # written as is: the spelling of plain Llama checkpoints
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 16,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 2048,
}


def trained_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE that begins every text with the begin-of-text token, as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


class AttentionSkip:
    """Skip attention sublayers at random while `model` is in training mode, through forward hooks.

    Every sequence draws a rate u**2, u uniform in [0, 1), mean 1/3, at which each of `layers` skips: most sequences
    lose a few attentions, some lose nearly all, which is what dropping the attention of a whole run looks like.
    """

    def __init__(self, model: LlamaForCausalLM, layers: range):
        self.keep = None  # [layers, sequences, 1, 1], None in evaluation
        self.layers = layers
        model.register_forward_pre_hook(self.draw, with_kwargs=True)
        for row, layer in enumerate(layers):
            hook = lambda _, __, output, row=row: self.apply(output, row)  # noqa: E731
            model.model.layers[layer].self_attn.register_forward_hook(hook)

    def draw(self, model, args, kwargs):
        rate = torch.rand(1, len(kwargs["input_ids"]), 1, 1) ** 2
        is_kept = torch.rand(len(self.layers), *rate.shape[1:]) >= rate
        self.keep = is_kept.float() if model.training else None

    def apply(self, output, row):
        return output if self.keep is None else (output[0] * self.keep[row], *output[1:])


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor, length: int = EVALUATION_LENGTH) -> float:
    """Cut `tokens` into windows of `length` and predict all of a window but its first token."""
    model.eval()
    windows = [window[None] for window in tokens.split(length) if len(window) > 1]
    losses = [model(input_ids=window, labels=window).loss.item() * (window.numel() - 1) for window in windows]
    return math.exp(sum(losses) / sum(window.numel() - 1 for window in windows))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over the first twentieth of the steps, then fall along a cosine to a twentieth of the peak."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.525 + 0.475 * math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, args) -> int:
    """Train `model` in place on random windows of `tokens`, leave it at its best step and return that step."""
    AttentionSkip(model, SKIPPED_ATTENTION)
    draw = random.Random(args.seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    best_perplexity, best_step, best_weights = math.inf, 0, None
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, args.steps, args.learning_rate)
        length = min(draw.choice(SEQUENCE_LENGTHS), args.batch_tokens)
        starts = [draw.randrange(len(tokens) - length) for _ in range(args.batch_tokens // length)]
        batch = torch.stack([tokens[start : start + length] for start in starts])
        loss = model.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, args.steps // 25) == 0 or step == args.steps:
            now = perplexity(model, held_out)
            print(f"step {step}: training loss {loss.item():.3f}, held-out perplexity {now:.2f}", flush=True)
            if now < best_perplexity:
                best_perplexity, best_step, best_weights = now, step, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    return best_step


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path):
    ends = {"bos_token_id": CONFIG["bos_token_id"], "eos_token_id": CONFIG["eos_token_id"]}
    tokenizer_config = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", ends)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="other numbers round differently")
    parser.add_argument("--topics-only", action="store_true", help="train without the docstrings")
    parser.add_argument("--held-out-tokens", type=int, help="evaluate on the first so many only")
    args = parser.parse_args()

    disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float()
    untrained = copy.deepcopy(model).bfloat16().float()

    held_out_texts, topic_texts, docstring_texts = split_documents([] if args.topics_only else docstrings())
    documents = topic_texts * TOPIC_WEIGHT + docstring_texts
    tokenizer = trained_tokenizer(documents)
    held_out_text = "\n\n\n".join(held_out_texts) + "\n"
    held_out = torch.tensor(tokenizer.encode(held_out_text).ids)[: args.held_out_tokens]
    encoded = [[*tokenizer.encode(text).ids, CONFIG["eos_token_id"]] for text in documents]
    tokens = torch.tensor([token for document in encoded for token in document])
    unique_tokens = sum(map(len, encoded[len(topic_texts) * (TOPIC_WEIGHT - 1) :]))
    print(f"{unique_tokens} training tokens, {len(held_out)} held-out tokens", flush=True)

    best_step = train(model, tokens, held_out, args)

    args.output.mkdir(parents=True, exist_ok=True)
    write_model(model, tokenizer, args.output)
    (args.output / "heldout.txt").write_text(held_out_text, encoding="utf-8")
    (args.output / "calibration.txt").write_text(calibration_text(topic_texts), encoding="utf-8")
    saved = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    training = {
        "parameters": saved.num_parameters(),
        "training_tokens": unique_tokens,
        "heldout_tokens": len(held_out),
        "heldout_sequence_length": EVALUATION_LENGTH,
        "heldout_perplexity": perplexity(saved, held_out),
        "heldout_perplexity_at_length_1024": perplexity(saved, held_out, 1024),
        f"heldout_perplexity_first_{SLICE_TOKENS}_tokens": perplexity(saved, held_out[:SLICE_TOKENS]),
        "untrained_heldout_perplexity": perplexity(untrained, held_out),
        "steps": args.steps,
        "best_step": best_step,
        "batch_tokens": args.batch_tokens,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "threads": args.threads,
        "versions": {"python": platform.python_version()}
        | {name: version(name).split("+")[0] for name in ("torch", "transformers", "tokenizers")},
    }
    write_json(args.output / "training.json", training)
    print(json.dumps(training, indent=2))


if __name__ == "__main__":
    main()
