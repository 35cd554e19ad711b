"""Passages of the documentation that ships with CPython: which words follow, and pages to predict word by word.

They are of the half that `xquant factorize --calibration python-docs` does not read. Other versions of Python have
other texts. Python's documentation has the PSF licence.
"""

from __future__ import annotations

import pydoc_data.topics
import random
from collections.abc import Iterator
from typing import Any

QUESTIONS = 400
CONTEXT_WORDS, CONTINUATION_WORDS = 450, 12
# From one passage to the next of a topic: no two continuations share words of the text.
STRIDE_WORDS = 40
PAGES, PAGE_WORDS = 5, 500


def topics() -> list[tuple[str, str]]:
    """Names and texts."""
    return sorted(pydoc_data.topics.topics.items())[1::2]


def continuations(questions: int = QUESTIONS) -> Iterator[dict[str, Any]]:
    """Which words follow? Four choices, of which three follow other passages, of the same topic where it has enough."""
    chance = random.Random(0)
    passages = [(topic, passage) for topic, text in topics() for passage in cut(text)]
    for topic, passage in chance.sample(passages, questions):
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
    """Passages of a text, as words."""
    words, length = text.split(), CONTEXT_WORDS + CONTINUATION_WORDS
    return [words[start : start + length] for start in range(0, len(words) - length + 1, STRIDE_WORDS)]


def pages() -> Iterator[dict[str, Any]]:
    """The beginnings of the longest pages."""
    for text in sorted((text for _, text in topics()), key=len)[-PAGES:]:
        yield {"page": " ".join(text.split()[:PAGE_WORDS])}
