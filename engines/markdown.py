"""Anybody's text in Markdown: nothing of it becomes markup, a link or a mention."""

from __future__ import annotations

from typing import Any


class Verbatim(str):
    """Text that goes into Markdown as it is."""


def markdown_escaped(text: str) -> str:
    """Escape what Markdown or GitHub would take for markup."""
    escaped = "".join(f"\\{character}" if character in "\\`*_[]|~#$" else character for character in text)
    # A mention would notify somebody, an entity is the only way to write one without.
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "\n": " ", "\r": " "}
    return "".join(entities.get(character, character) for character in escaped)


def finalized(value: Any) -> Any:
    """Escape what a template prints, unless it is verbatim."""
    return value if isinstance(value, Verbatim) else markdown_escaped(str(value))


def code_block(text: str) -> Verbatim:
    """Fence text with more backticks than it has in a row."""
    fence = "```"
    while fence in text:
        fence += "`"
    return Verbatim(f"{fence}\n{text}\n{fence}")
