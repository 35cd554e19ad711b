"""Make two small datasets from the documentation that ships with CPython, for the tasks beside this file.

They take the half of it that `xquant factorize --calibration python-docs` does not read. Other versions of Python have
other texts.

Usage: python make_dataset.py [FOLDER]
"""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

QUESTIONS = 100
CONTEXT_WORDS, CONTINUATION_WORDS = 40, 12
PAGES, PAGE_WORDS = 5, 500


def topics() -> list[tuple[str, str]]:
    """Names and texts."""
    return sorted(pydoc_data.topics.topics.items())[1::2]


def continuations() -> Iterator[dict[str, Any]]:
    """Which words follow? Four choices, of which three follow other passages, of the same topic where it has enough."""
    chance = random.Random(0)
    passages = [(topic, passage) for topic, text in topics() for passage in cut(text)]
    for topic, passage in chance.sample(passages, QUESTIONS):
        others = [other for name, other in passages if name == topic and other != passage]
        if len(others) < 3:
            others = [other for _, other in passages if other != passage]
        choices = [passage, *chance.sample(others, 3)]
        chance.shuffle(choices)
        yield {
            "context": " ".join(passage[:CONTEXT_WORDS]),
            "choices": [" ".join(words[CONTEXT_WORDS:]) for words in choices],
            "label": choices.index(passage),
        }


def cut(text: str) -> list[list[str]]:
    """Passages of a text that are long enough, as words."""
    length = CONTEXT_WORDS + CONTINUATION_WORDS
    paragraphs = (paragraph.split() for paragraph in text.split("\n\n"))
    return [words[:length] for words in paragraphs if len(words) >= length]


def pages() -> Iterator[dict[str, Any]]:
    """The beginnings of the longest pages, to predict word by word."""
    for text in sorted((text for _, text in topics()), key=len)[-PAGES:]:
        yield {"page": " ".join(text.split()[:PAGE_WORDS])}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path) -> None:
    """Write both datasets."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "continuations.jsonl", continuations())
    write(folder / "pages.jsonl", pages())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
