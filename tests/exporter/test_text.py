"""Texts and tokenizers: windows of tokens, whole texts encoded a piece at a time, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from exporter import text
from exporter.errors import CheckpointError
from exporter.text import TextError, open_tokenizer, read_documents, token_windows
from tests.checkpoints import word_tokenizer

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


def windows(path: Path, **how: Any) -> np.ndarray:
    """Windows of a text beside a tokenizer and a model of ten tokens."""
    return token_windows(path, open_tokenizer(path.parent, 10), vocab_size=10, max_positions=5, **how)


def test_windows_are_cut_from_all_documents_in_a_row(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2 w3"}\n\n{"text": "w4 w5"}\n{"text": "w6 w7"}\n')
    found = windows(tmp_path / "text.jsonl", context=3)
    assert found.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert windows(tmp_path / "text.jsonl", context=3, max_windows=1).tolist() == [[1, 2, 3]]
    assert windows(tmp_path / "text.jsonl", context=2, max_windows=2).tolist() == [[1, 2], [3, 4]]
    assert windows(tmp_path / "text.jsonl", context=2, max_windows=9).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert found.dtype == np.int64


def test_documents_behind_the_last_window_are_not_encoded(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    tokenizer = open_tokenizer(tmp_path, 10)
    seen: list[str] = []

    class Spy:
        def encode(self, document: str) -> Any:
            seen.append(document)
            return tokenizer.encode(document)

    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "w{n} w{n}"}}\n' for n in range(9)))
    token_windows(
        tmp_path / "text.jsonl", cast(Tokenizer, Spy()), vocab_size=10, max_positions=5, context=3, max_windows=1
    )
    assert seen == ["w0 w0", "w1 w1"]


def test_added_tokens_may_lie_beyond_the_vocabulary_until_a_text_has_one(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.add_special_tokens(["<pad>"])
    stored.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w1 w2 w3 <pad>")
    assert windows(tmp_path / "text.txt", context=3).tolist() == [[1, 2, 3]]
    with pytest.raises(TextError, match=r"no embedding for: expected ids below 10, .* found 10, '<pad>'"):
        windows(tmp_path / "text.txt", context=4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.jsonl", '{"text": "w1\u2028w2"}\r\n{"text": "w3\x85w4"}\r\n', id="separators_in_json"),
        pytest.param("a.jsonl", '\ufeff{"text": "w1 w2 w3 w4"}', id="byte_order_mark_json"),
        pytest.param("a.txt", "\ufeffw1 w2 w3 w4", id="byte_order_mark"),
    ],
)
def test_a_text_is_read_whatever_wrote_it(name: str, content: str, tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    (tmp_path / name).write_bytes(content.encode())
    assert windows(tmp_path / name, context=4).tolist() == [[1, 2, 3, 4]]


def test_truncation_and_padding_in_the_file_are_for_batches(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_truncation(2)
    stored.enable_padding(length=8)
    stored.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": "w4"}\n')
    assert windows(tmp_path / "text.jsonl", context=4).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", "  \n", "text is empty", id="empty"),
        pytest.param("a.txt", "w1 w2", r"shorter than the context: expected >= 3 tokens, found 2", id="short"),
        pytest.param("a.txt", b"\xff\xfe\x00", "not a text in UTF-8", id="not_utf8"),
        pytest.param("a.jsonl", "{", "line 1 is not JSON", id="not_json"),
        pytest.param("a.jsonl", '{"text": "\\ud83d"}', "line 1 has half of a surrogate pair", id="half_a_pair"),
        pytest.param("a.jsonl", '{"txt": "w"}', "line 1 has no text", id="no_text"),
        pytest.param("b.txt", None, "no such text", id="missing"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(name: str, content: object, message: str, tmp_path: Path) -> None:
    word_tokenizer(tmp_path, 10)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(TextError, match=message):
        windows(tmp_path / name, context=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "no tokenizer.json", id="missing"),
        pytest.param("{}", "tokenizer cannot be read", id="malformed"),
        pytest.param(11, "at most 10 tokens, the model's vocab_size, found 11", id="vocabulary"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(content: object, message: str, tmp_path: Path) -> None:
    if isinstance(content, int):
        word_tokenizer(tmp_path, content)
    elif content is not None:
        (tmp_path / "tokenizer.json").write_text(str(content))
    with pytest.raises(CheckpointError, match=message):
        open_tokenizer(tmp_path, 10)
