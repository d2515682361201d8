"""Write tasks/fuselage_demo.jsonl: places in the held-out text, each with its true continuation and three others.

A sample is {"context": str, "choices": [str, str, str, str], "answer": int}; see tasks/fuselage_demo.yaml.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

DEMO = Path(__file__).parent
CONTEXT_WORDS, CHOICE_WORDS, CHOICES = 40, 6, 4


def samples(text: str, seed: int = 0) -> list[dict]:
    """Cut a text into contexts of 40 words and the 6 words that follow; wrong choices are other contexts' words.

    Returns:
        Samples in the order of the text, the same for the same text and seed on every machine.
    """
    words = text.split()
    step = CONTEXT_WORDS + CHOICE_WORDS
    starts = range(0, len(words) - step + 1, step)
    contexts = [" ".join(words[start : start + CONTEXT_WORDS]) for start in starts]
    continuations = [" " + " ".join(words[start + CONTEXT_WORDS : start + step]) for start in starts]
    found = []
    for index, context in enumerate(contexts):
        # A hash, not Python's: the order of a set of texts differs from process to process.
        chance = random.Random(hashlib.sha256(f"{seed} {context}".encode()).hexdigest())
        others = sorted(set(continuations) - {continuations[index]})
        choices = chance.sample(others, CHOICES - 1)
        answer = chance.randrange(CHOICES)
        choices.insert(answer, continuations[index])
        found.append({"context": context, "choices": choices, "answer": answer})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=DEMO / "tasks" / "fuselage_demo.jsonl")
    lines = [json.dumps(sample) for sample in samples((DEMO / "model" / "heldout.txt").read_text("utf-8"))]
    parser.parse_args().output.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
