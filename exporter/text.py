"""Text files to token windows, for everything that measures a model on text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from exporter.errors import CheckpointError, FuselageError
from exporter.graph import ModelGraph

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
MAX_TEXT_BYTES = 1 << 30
MAX_PIECE = 1 << 20  # characters that are encoded at a time: the library takes 200 bytes for each
# Before it no tokenizer of ours joins characters; Llama 3's joins "_" and the end of a line.
WORD_END = re.compile(r"(?<=[^\W_])\s")
HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # JSON can spell it, and tokenizers do not take it


class TextError(FuselageError):
    """A text that cannot be used: missing, empty, too short, or not made of this model's tokens."""


def read_documents(path: Path) -> list[str]:
    """Read a plain text file as one document, or a .jsonl file as one per line (its "text" field).

    Raises:
        TextError: the file is missing, too large, not UTF-8, empty, or a line is not such an object.
    """
    check_text(path)
    try:
        with path.open(encoding="utf-8-sig") as file:  # without the mark that some editors put in front
            raw = file.read(MAX_TEXT_BYTES + 1)  # what is no file has no size to ask for, and /dev/zero no end
    except OSError as error:
        raise TextError(f"cannot be read ({error.strerror or error})", file=path) from error
    except UnicodeDecodeError as error:
        raise TextError(f"not a text in UTF-8 ({error.reason} at byte {error.start:,})", file=path) from error
    if len(raw) > MAX_TEXT_BYTES:
        raise TextError("text is too large", file=path, expected=f"at most {MAX_TEXT_BYTES} characters")
    documents = _lines(raw, path) if path.suffix == ".jsonl" else [raw]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise TextError("text is empty", file=path)
    return documents


def check_text(path: Path) -> None:
    """Raise TextError if there is no such file, or one too large; cheap, for use before long work."""
    if os.path.isdir(path):
        raise TextError("a text is one file, and this is a folder", file=path)
    if not os.path.exists(path):  # a pipe is a text too
        raise TextError("no such text", file=path)
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise TextError("text is too large", file=path, expected=f"at most {MAX_TEXT_BYTES} bytes", found=size)


def check_context(context: int, max_positions: int) -> None:
    """Raise TextError if windows are longer than a model was made for: than its max_position_embeddings.

    Where RoPE is scaled, the config is expected to have the longer number, as transformers' documentation asks for.
    """
    if context > max_positions:
        raise TextError(
            "windows of text are longer than the model was made for",
            expected=f"at most {max_positions} tokens, its max_position_embeddings",
            found=context,
            hint="give a smaller --context (in a recipe: `context`)",
        )


def _lines(raw: str, path: Path) -> list[str]:
    documents = []
    # Not splitlines: JSON strings may hold the other characters that it takes for ends of lines, U+2028 for one.
    for number, line in enumerate(raw.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"line {number} is not JSON ({str(error)[:80]})", file=path) from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise TextError(f"line {number} has no text", file=path, expected='an object with a "text" string')
        if HALF_A_PAIR.search(entry["text"]):
            raise TextError(f"line {number} has half of a surrogate pair, which is no character", file=path)
        documents.append(entry["text"])
    return documents


def open_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Open a model folder's tokenizer, which then encodes whole documents and nothing but them.

    Raises:
        CheckpointError: there is none, it is malformed, or its vocabulary is larger than the model's. Tokens that were
            added to it may lie beyond: many models have a padding token that no embedding was made for.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if not os.path.isfile(path):
        raise CheckpointError(
            "there is no tokenizer.json, and text cannot be measured without one",
            file=folder,
            hint="give the model's folder"
            if os.path.isfile(folder)
            else "transformers makes one of tokenizer.model: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for anything wrong with the file
        raise CheckpointError(f"tokenizer cannot be read ({str(error)[:120]})", file=path) from error
    # Files keep what the last call of transformers asked for, often the length of a training batch.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = tokenizer.get_vocab_size(with_added_tokens=False)
    if tokens > vocab_size:
        raise CheckpointError(
            "tokenizer and model do not belong together",
            file=path,
            expected=f"at most {vocab_size} tokens, the model's vocab_size",
            found=tokens,
        )
    return tokenizer


def check_same_tokens(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    """Raise TextError if another model folder's tokenizer, where it has one, means other tokens by the same ids.

    Args:
        vocab_size: of both models; tokens beyond, which neither has an embedding for, do not count.
    """
    if not os.path.isfile(folder / TOKENIZER):
        return
    ours, theirs = (
        {(token, number) for token, number in one.get_vocab().items() if number < vocab_size}
        for one in (tokenizer, open_tokenizer(folder, vocab_size))
    )
    differing = sorted(token for token, _ in ours ^ theirs)
    if differing:
        raise TextError(
            "the two models' tokenizers have different tokens",
            file=folder / TOKENIZER,
            found=f"{len(differing)} that differ, {differing[0]!r} for one",
        )


def _encoded(document: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of a document, int64, a piece at a time; special tokens stand around the whole, as if it were one."""
    start = ahead = 0
    while start < len(document):
        stop, word_end = len(document), None
        if stop - start > MAX_PIECE:
            word_end = WORD_END.search(document, start + MAX_PIECE // 2, start + MAX_PIECE)
            stop = start + MAX_PIECE if word_end is None else word_end.start()
        encoding = tokenizer.encode(document[start - ahead : stop])
        of_text = np.flatnonzero(np.asarray(encoding.special_tokens_mask) == 0).tolist()
        offsets = encoding.offsets
        first = 0 if start == 0 else next((i for i in of_text if offsets[i][0] >= ahead), len(encoding))
        last = len(encoding) if stop == len(document) else max(of_text, default=-1) + 1
        yield np.asarray(encoding.ids[first:last], dtype=np.int64)
        start = stop
        # Llama's and Mistral's put a space in front of any text: then it is the last word's end that gets it.
        ahead = 0 if word_end is None else 1


class Model(Protocol):
    """A model folder that was opened (`exporter.read.Checkpoint`)."""

    @property
    def path(self) -> Path:
        """The folder, which has the tokenizer."""

    @property
    def graph(self) -> ModelGraph:
        """Says how many tokens and positions the model has."""


def model_windows(path: Path, *models: Model, context: int, max_windows: int | None = None) -> np.ndarray:
    """Cut a text file into windows that all of the models take: int64 [windows, context]; see `token_windows`.

    Raises:
        CheckpointError: as `open_tokenizer` for the first model, whose tokenizer is used.
        TextError: as `token_windows`, or the models' tokenizers differ.
    """
    first, *others = models
    tokenizer = open_tokenizer(first.path, first.graph.vocab_size)
    for other in others:
        check_same_tokens(tokenizer, other.path, other.graph.vocab_size)
    return token_windows(
        path,
        tokenizer,
        vocab_size=first.graph.vocab_size,
        max_positions=min(model.graph.max_position_embeddings for model in models),
        context=context,
        max_windows=max_windows,
    )


def token_windows(
    path: Path,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_positions: int,
    context: int,
    max_windows: int | None = None,
) -> np.ndarray:
    """Encode a text file, its documents one after the other, and cut it into windows: int64 [windows, context].

    What is left at the end and does not fill a window is dropped; what lies behind the last window is not encoded.

    Args:
        vocab_size: the model's, which every token must be below.
        max_positions: the model's max_position_embeddings, which a window must not be longer than.

    Raises:
        TextError: also if there is not one whole window, or the text has a token that the model has no embedding for.
    """
    check_context(context, max_positions)
    encoded: list[np.ndarray] = []
    found = 0
    for ids in (ids for document in read_documents(path) for ids in _encoded(document, tokenizer)):
        encoded.append(ids)
        found += len(ids)
        if max_windows is not None and found >= max_windows * context:
            break
    count = found // context
    if count == 0:
        raise TextError("text is shorter than the context", file=path, expected=f">= {context} tokens", found=found)
    ids = np.concatenate(encoded)[: min(count, max_windows or count) * context]
    if ids.max() >= vocab_size:
        raise TextError(
            "the text has a token that the model has no embedding for",
            file=path,
            expected=f"ids below {vocab_size}, the model's vocab_size",
            found=f"{ids.max()}, {tokenizer.id_to_token(int(ids.max()))!r}",
        )
    return ids.reshape(-1, context)
