"""The demo model's text: the Python language reference and the docstrings of the standard library."""

import ast
import hashlib
import re
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics


def docstrings() -> list[str]:
    """Return one document per module of the standard library that has docstrings."""
    root, documents = Path(sysconfig.get_paths()["stdlib"]), []
    for name in sorted(sys.stdlib_module_names):
        for path in [root / f"{name}.py", *sorted((root / name).rglob("*.py"))]:
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(root).parts):
                nodes = ast.walk(ast.parse(path.read_bytes()))
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                found = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
                documents.append("\n\n".join(text for text in found if text))
    return [text for text in documents if text]


def unwrapped(text: str, width: int = 70) -> str:
    """Join the lines of `text` that end only because the next word would have passed `width`."""
    joined, last = [], ""
    for line in text.strip("\n").split("\n"):
        first_word = re.match(r"\s*([\w\"'(*`]\S*)", line)
        if last and first_word and width <= len(last) + len(first_word[1]) and len(last) < 80:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line)
        last = line
    return "\n".join(joined)


def word_runs(text: str, length: int = 10) -> set[tuple[str, ...]]:
    """Return all runs of `length` words; a shorter text, say a heading, has none."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def split_documents(others: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return held-out topics, training topics and `others`, the latter two without what stood before.

    One topic in ten is held out, by a hash of its name. Topics and docstrings quote each other, so a training
    paragraph of ten words or more goes if it repeats one or shares ten words in a row with the held-out text.
    """
    held_out = {name for name in topics if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0}
    held_out_texts = [unwrapped(topics[name]) for name in sorted(held_out)]
    held_out_runs = set().union(*map(word_runs, held_out_texts))
    seen = set()

    def is_fresh(paragraph: str) -> bool:
        runs, words = word_runs(paragraph), " ".join(paragraph.split())
        return not runs or (not (words in seen or seen.add(words)) and held_out_runs.isdisjoint(runs))

    def fresh(texts: list[str]) -> list[str]:
        return ["\n\n".join(filter(is_fresh, unwrapped(text).split("\n\n"))) for text in texts]

    return held_out_texts, fresh([topics[name] for name in sorted(topics) if name not in held_out]), fresh(others)


def calibration_text(training_topics: list[str], characters: int = 120_000) -> str:
    """Return training topics for calibration, as many as fit, in an order that mixes long and short ones."""
    chosen, length = [], 0
    for text in sorted(filter(str.strip, training_topics), key=lambda text: hashlib.sha256(text.encode()).digest()):
        if length + len(text) <= characters:
            chosen.append(text)
            length += len(text)
    return "\n\n\n".join(chosen) + "\n"
