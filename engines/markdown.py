"""Anybody's text in Markdown: nothing of it becomes markup, a link or a mention."""

from __future__ import annotations

import re
from typing import Any


class Verbatim(str):
    """Text that goes into Markdown as it is."""


def markdown_escaped(text: str) -> str:
    """Escape what Markdown or GitHub would take for markup."""
    escaped = "".join(f"\\{character}" if character in "\\`*_[]|~#$" else character for character in text)
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": " ", "\r": " "}
    escaped = "".join(entities.get(character, character) for character in escaped)
    # GitHub looks for mentions, issues and addresses in what is rendered, where escapes and entities are gone: a space
    # of no width is what keeps "@team" from being notified (github.com/github/cmark-gfm, issue 181).
    return re.sub(r"[@#]|:(?=//)|www(?=\.)", r"\g<0>&#8203;", escaped, flags=re.IGNORECASE)


def finalized(value: Any) -> Any:
    """Escape what a template prints, unless it is verbatim."""
    return value if isinstance(value, Verbatim) else markdown_escaped(str(value))


def code_block(text: str) -> Verbatim:
    """Fence text with more backticks than it has in a row."""
    fence = "```"
    while fence in text:
        fence += "`"
    return Verbatim(f"{fence}\n{text}\n{fence}")
