"""Texts of any length, encoded a piece at a time, give the tokens of the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from exporter import text
from exporter.text import TextError, open_tokenizer, read_documents, token_windows

DEMO = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture
def tokenizer() -> Tokenizer:
    return open_tokenizer(DEMO, 2048)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("space_first", [False, True])
def test_pieces_are_tokens_of_the_whole(
    space_first: bool, special: bool, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=space_first)
    if special:
        tokenizer.post_processor = TemplateProcessing(single="[B] [B] $A [E]", special_tokens=[("[B]", 0), ("[E]", 1)])
    whole = tokenizer.encode((DEMO / "heldout.txt").read_text()).ids
    monkeypatch.setattr(text, "MAX_PIECE", 1000)
    sizes = {"vocab_size": 2048, "max_positions": 2}
    found = token_windows(DEMO / "heldout.txt", tokenizer, context=2, **sizes)
    np.testing.assert_array_equal(found.ravel(), whole[: found.size])
    assert len(whole) - found.size < 2


def test_a_word_may_be_longer_than_a_piece(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Brontosaurus" * 500)
    monkeypatch.setattr(text, "MAX_PIECE", 1000)
    tokens = token_windows(tmp_path / "text.txt", tokenizer, vocab_size=2048, max_positions=1, context=1)
    assert tokenizer.decode(tokens.ravel().tolist()) == "Brontosaurus" * 500


def test_a_text_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(TextError, match="/dev/zero: text is too large: expected at most 1000"):
        read_documents(Path("/dev/zero"))
