"""Text files to token windows, for everything that measures a model on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.errors import CheckpointError, FuselageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
MAX_TEXT_BYTES = 1 << 30


class TextError(FuselageError):
    """A text that cannot be used: missing, empty, too short, or not made of this model's tokens."""


def read_documents(path: Path) -> list[str]:
    """Read a plain text file as one document, or a .jsonl file as one per line (its "text" field).

    Raises:
        TextError: the file is missing, too large, not UTF-8, empty, or a line is not such an object.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise TextError("text is too large", file=path, expected=f"at most {MAX_TEXT_BYTES} bytes")
        raw = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot be read ({error})", file=path) from error
    documents = _lines(raw, path) if path.suffix == ".jsonl" else [raw]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise TextError("text is empty", file=path)
    return documents


def _lines(raw: str, path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"line {number} is not JSON ({str(error)[:80]})", file=path) from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise TextError(f"line {number} has no text", file=path, expected='an object with a "text" string')
        documents.append(entry["text"])
    return documents


def open_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Open a model folder's tokenizer.

    Raises:
        CheckpointError: there is none, it is malformed, or it has tokens that the model has no embedding for.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            "the model folder has no tokenizer.json, and text cannot be measured without one", file=folder
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for anything wrong with the file
        raise CheckpointError(f"tokenizer cannot be read ({str(error)[:120]})", file=path) from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise CheckpointError(
            "tokenizer and model do not belong together",
            file=path,
            expected=f"at most {vocab_size} tokens, the model's vocab_size",
            found=tokenizer.get_vocab_size(),
        )
    return tokenizer


def check_same_tokens(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    """Raise TextError if another model folder's tokenizer, where it has one, means other tokens by the same ids."""
    if not (folder / TOKENIZER).is_file():
        return
    ours, theirs = tokenizer.get_vocab(), open_tokenizer(folder, vocab_size).get_vocab()
    differing = sorted(token for token, _ in ours.items() ^ theirs.items())
    if differing:
        raise TextError(
            "the two models' tokenizers have different tokens",
            file=folder / TOKENIZER,
            found=f"{len(differing)} that differ, {differing[0]!r} for one",
        )


def token_windows(path: Path, tokenizer: Tokenizer, *, context: int, max_windows: int | None = None) -> np.ndarray:
    """Encode a text file, its documents one after the other, and cut it into windows: int64 [windows, context].

    What is left at the end and does not fill a window is dropped.

    Raises:
        TextError: also if there is not one whole window.
    """
    documents = read_documents(path)
    ids = np.concatenate([np.asarray(tokenizer.encode(document).ids, dtype=np.int64) for document in documents])
    count = len(ids) // context
    if count == 0:
        raise TextError("text is shorter than the context", file=path, expected=f">= {context} tokens", found=len(ids))
    count = min(count, max_windows or count)
    return ids[: count * context].reshape(count, context)
