"""The bundled demo model is the one its folder says, and its training script runs and repeats itself."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exporter.analysis.evaluate import evaluate
from exporter.pipeline import apply_plan
from exporter.plan import Plan
from exporter.read import open_model
from exporter.text import open_tokenizer, token_windows

transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).parents[1] / "demo"
MODEL = DEMO / "model"
SCRIPT = DEMO / "train.py"


@torch.inference_mode()
def perplexity(model, tokens: torch.Tensor, length: int) -> float:
    """Predict every token of each window of `length`, except the window's first."""
    logits = model(input_ids=tokens.view(-1, length)).logits[:, :-1]
    targets = tokens.view(-1, length)[:, 1:]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_heldout_perplexity_is_the_recorded_one():
    training = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text).input_ids[:4096])
    trained = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    torch.manual_seed(0)
    untrained = transformers.AutoModelForCausalLM.from_config(trained.config).float().eval()

    measured = perplexity(trained, tokens, training["heldout_sequence_length"])

    assert measured == pytest.approx(training["heldout_perplexity_first_4096_tokens"], rel=0.05)
    assert perplexity(untrained, tokens[:1024], 256) > 10 * measured


def test_fusing_costs_less_than_removing_and_the_last_of_a_run_costs_most():
    """Of the same FFNs; the paper's findings, on the first 4096 held-out tokens."""
    model = open_model(MODEL, need_weights=True)
    vocab_size = model.graph.vocab_size
    tokens = token_windows(
        MODEL / "heldout.txt",
        open_tokenizer(MODEL, vocab_size),
        vocab_size=vocab_size,
        max_positions=model.graph.max_position_embeddings,
        context=256,
        max_windows=16,
    )
    without_attention = {"drop_attention": [(8, 14)]}
    plans = {
        "dropped": Plan(**without_attention),
        "fused": Plan(**without_attention, fuse=[(8, 13)]),
        "fused with the last": Plan(**without_attention, fuse=[(8, 14)]),
        "removed": Plan(**without_attention, drop_ffn=[(8, 13)]),
    }
    found = {name: evaluate(apply_plan(model.graph, plan), tokens).perplexity for name, plan in plans.items()}
    assert found["dropped"] < found["fused"] < found["fused with the last"] < found["removed"]
    assert found["removed"] - found["dropped"] > 5 * (found["fused"] - found["dropped"])


def test_tokenizer_begins_texts_and_gives_them_back():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = 'The "import" statement\n   binds é, 漢字 and 🙂.'
    tokens = tokenizer(text).input_ids
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert len(tokenizer) == 2048


def test_model_folder_is_a_plain_bfloat16_llama_checkpoint():
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert {"torch_dtype", "rope_theta", "rope_scaling"} <= config.keys()
    assert "rope_parameters" not in config
    assert config["torch_dtype"] == "bfloat16"
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 12e6


def test_training_runs_and_repeats_itself(tmp_path, monkeypatch):
    """One run in a process of its own, with its own hash seed, and at the same time one in this process."""
    arguments = ["--steps", "2", "--batch-tokens", "256", "--held-out-tokens", "256", "--topics-only"]
    there, here = tmp_path / "there", tmp_path / "here"
    run_there = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "-o", str(there)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "-o", str(here)])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        output, _ = run_there.communicate()

    assert run_there.returncode == 0, output
    assert (there / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()
    assert (there / "training.json").read_text() == (here / "training.json").read_text()
    assert json.loads((here / "training.json").read_text(encoding="utf-8"))["steps"] == 2
