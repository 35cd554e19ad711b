"""What stands in a long text: made-up orders of real countries, between passages of Python's documentation.

Nobody can know the answers without reading the text. All questions of a text begin with it.
"""

from __future__ import annotations

import calendar
import random
from collections.abc import Iterator
from typing import Any

from .packages import load
from .passages import topics
from .world import countries

TEXTS, QUESTIONS_PER_TEXT = 40, 6
ORDERS, SHOWN = 8, 2
PASSAGE_WORDS = 60
CARRIERS = ("by ship", "by train", "by truck", "by plane")
# The first elements, whose names are words that a small model has.
ELEMENTS = 30


def questions(texts: int = TEXTS) -> Iterator[dict[str, Any]]:
    """Questions about all texts; those about the same text follow each other and have the same ``context``."""
    chance = random.Random(2)
    names = [country.name for country in countries()]
    elements = [element.name for element in load("periodictable").elements if 0 < element.number <= ELEMENTS]
    words = " ".join(text for _, text in topics()).split()
    for _ in range(texts):
        orders = list(zip(chance.sample(names, ORDERS), chance.sample(elements, ORDERS), strict=True))
        parts = []
        for name, element in orders:
            start = chance.randrange(len(words) - PASSAGE_WORDS)
            when, how = chance.choice(list(calendar.month_name)[1:]), chance.choice(CARRIERS)
            parts.append(" ".join(words[start : start + PASSAGE_WORDS]))
            parts.append(f"{name} ordered {element}, {chance.randint(11, 99)} tons, to be sent in {when} {how}.")
        chance.shuffle(orders)
        shown = [f"{_question(name)} {element}" for name, element in orders[:SHOWN]]
        context = "\n\n".join([*parts, *shown])
        for name, element in orders[SHOWN : SHOWN + QUESTIONS_PER_TEXT]:
            yield {"context": context, "question": _question(name), "answer": element}


def _question(name: str) -> str:
    return f"Question: What did {name} order?\nAnswer: {name} ordered"
