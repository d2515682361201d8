"""What every step-by-step runner keeps about its sequences, and what it checks before a step.

Shape letters: B = batch (sequences side by side), S = tokens of one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.base import EngineManifest
from exporter.errors import EngineError
from exporter.network import CACHE_WRITE, INPUT_IDS, LOGITS_INDEX, POSITION_IDS


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one call that are not caches; see `exporter.network`. Filled in place, call after call."""

    input_ids: np.ndarray  # int64 [B, S]
    position_ids: np.ndarray  # int64 [B, S]
    cache_write: np.ndarray  # int64 [B]
    logits_index: np.ndarray  # int64 [B]

    def named(self) -> dict[str, np.ndarray]:
        """The same by the names that the network has for them."""
        return {
            INPUT_IDS: self.input_ids,
            POSITION_IDS: self.position_ids,
            CACHE_WRITE: self.cache_write,
            LOGITS_INDEX: self.logits_index,
        }


class Sequences:
    """How full the rows of a batch are. A step is checked, its inputs are filled, it runs, and then it counts.

    Decode has methods of its own, because it is timed: on arrays of a few numbers every call of numpy costs
    microseconds, and more after a step that has swept the CPU's caches.
    """

    def __init__(self, manifest: EngineManifest, batch: int, capacity: int) -> None:
        """Begin with `batch` empty sequences of up to `capacity` tokens.

        Raises:
            EngineError: the engine has another batch, or allows fewer tokens.
        """
        if batch < 1 or (manifest.batch is not None and batch != manifest.batch):
            raise EngineError("the engine cannot run this batch", expected=manifest.batch or ">= 1", found=batch)
        self._manifest = manifest
        self.filled = np.zeros(batch, dtype=np.int64)  # [B] tokens that each row holds
        self.longest = 0  # the largest of them
        if capacity > manifest.max_positions:
            raise self._too_long(capacity)

    @property
    def batch(self) -> int:
        """How many there are."""
        return len(self.filled)

    def check_prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> None:
        """Check the form of `input_ids` int64 [B, S], of which `lengths` int64 [B] are valid in each row.

        Raises:
            EngineError: another batch, or lengths beyond the input.
        """
        batch, tokens = input_ids.shape
        if batch != self.batch or lengths.shape != (batch,):
            raise EngineError(
                "input does not fit the batch that was started", expected=self.batch, found=input_ids.shape
            )
        if lengths.min() < 0 or lengths.max() > tokens:
            raise EngineError("lengths are beyond the input", expected=f"0 to {tokens}", found=lengths.tolist())

    def check_room(self, input_ids: np.ndarray, lengths: np.ndarray) -> None:
        """Check that every row may grow by its length, and that every token is in the vocabulary.

        Raises:
            EngineError: a sequence would be too long, or a token is unknown.
        """
        self._check_length(int((self.filled + lengths).max()))
        self._check_tokens(int(input_ids.min()), int(input_ids.max()))

    def check_decode(self, tokens: np.ndarray) -> None:
        """Check `tokens` int64 [B], of which every row appends one.

        Raises:
            EngineError: a sequence would be too long, or a token is unknown.
        """
        self._check_length(self.longest + 1)
        listed = tokens.tolist()
        self._check_tokens(min(listed), max(listed))

    def cache_needed(self, tokens: int) -> int:
        """Return how many cache positions a call of S = `tokens` writes or has written, padding included.

        Raises:
            EngineError: more than the engine's fixed cache has.
        """
        needed, fixed = self.longest + tokens, self._manifest.capacity
        if fixed is not None and needed > fixed:
            raise EngineError(
                "padding runs past the cache",
                expected=f"at most {fixed} positions",
                found=needed,
                hint="prefill rows of such different lengths one by one",
            )
        return needed

    def fill(self, inputs: StepInputs, input_ids: np.ndarray, lengths: np.ndarray) -> None:
        """Write the inputs of a step that was checked."""
        inputs.input_ids[:] = input_ids
        positions = self.filled[:, None] + np.arange(input_ids.shape[1])
        # Padding may lie beyond the last position; nothing looks at it, but it must not leave the rotation tables.
        np.minimum(positions, self._manifest.max_positions - 1, out=inputs.position_ids)
        inputs.cache_write[:] = self.filled
        inputs.logits_index[:] = np.maximum(lengths - 1, 0)

    def fill_decode(self, inputs: StepInputs, tokens: np.ndarray) -> None:
        """Write the inputs of a decode step that was checked; `logits_index` is 0 in each call of S = 1."""
        inputs.input_ids[:, 0] = tokens
        inputs.position_ids[:, 0] = self.filled
        inputs.cache_write[:] = self.filled

    def count(self, lengths: np.ndarray) -> None:
        """Count the tokens of a step that ran."""
        self.filled += lengths
        self.longest = int(self.filled.max())

    def count_decode(self) -> None:
        """Count the tokens of a decode step that ran."""
        self.filled += 1
        self.longest += 1

    def _check_length(self, longest: int) -> None:
        if longest > self._manifest.max_positions:
            raise self._too_long(longest)

    def _check_tokens(self, lowest: int, highest: int) -> None:
        vocab_size = self._manifest.vocab_size
        if lowest < 0 or highest >= vocab_size:
            raise EngineError(
                "a token is not in the vocabulary",
                expected=f"0 to {vocab_size - 1}",
                found=lowest if lowest < 0 else highest,
            )

    def _too_long(self, found: int) -> EngineError:
        return EngineError(
            "a sequence would be longer than the engine allows",
            expected=f"at most {self._manifest.max_positions} tokens, prompt included",
            found=found,
            hint="generate fewer tokens, or export the network with more max_positions",
        )
