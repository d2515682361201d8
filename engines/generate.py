"""Generating text token by token with any opened engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from engines.base import Runner
from exporter.errors import EngineError


def greedy_generate(
    runner: Runner, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int] = ()
) -> list[list[int]]:
    """Continue each prompt with the most likely tokens, all prompts as one batch.

    Args:
        prompts: token ids; the lengths may differ, none is empty.
        max_new_tokens: at most this many per prompt.
        stop_ids: a sequence ends with the first of these that it generates.

    Returns:
        The new tokens of each prompt, the stop token included.

    Raises:
        EngineError: a prompt is empty, or prompt and new tokens together exceed the engine's `max_positions`.
    """
    if max_new_tokens < 1 or not prompts:
        return [[] for _ in prompts]
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    if lengths.min() == 0:
        raise EngineError("a prompt is empty", hint="begin it with the tokenizer's start token")
    longest, limit = int(lengths.max()), runner.manifest.max_positions
    if longest + max_new_tokens > limit:
        raise EngineError(
            "prompt and new tokens do not fit the engine",
            expected=f"at most {limit} tokens",
            found=f"{longest} + {max_new_tokens}",
            hint="generate fewer tokens, or export the network with more max_positions",
        )
    input_ids = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    generated: list[list[int]] = [[] for _ in prompts]
    running = np.ones(len(prompts), dtype=bool)
    runner.start(len(prompts), longest + max_new_tokens)
    tokens = runner.prefill_greedy(input_ids, lengths)
    while True:
        for index in np.flatnonzero(running):
            generated[index].append(int(tokens[index]))
            running[index] = tokens[index] not in stop_ids and len(generated[index]) < max_new_tokens
        if not running.any():
            return generated
        tokens = runner.decode_greedy(tokens)  # a finished row goes on unseen: it costs nothing extra in the batch
