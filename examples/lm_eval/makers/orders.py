"""What stands in a long list: made-up orders of real countries, and questions about one of them.

Nobody can know the answers without reading the list. All questions of a list begin with the same text.
"""

from __future__ import annotations

import calendar
import random
from collections.abc import Iterator
from typing import Any

from .choices import ask
from .packages import load
from .world import countries

LISTS, QUESTIONS_PER_LIST, ORDERS = 100, 4, 45
CARRIERS = ("by ship", "by train", "by truck", "by plane")
# The first elements, whose names are words that a small model has.
ELEMENTS = 30


def questions(lists: int = LISTS) -> Iterator[dict[str, Any]]:
    """Questions of all lists; rows of the same list have the same ``context`` and ``list``."""
    chance = random.Random(2)
    names = [country.name for country in countries()]
    elements = [element.name for element in load("periodictable").elements if 0 < element.number <= ELEMENTS]
    months = list(calendar.month_name)[1:]
    for number in range(lists):
        orders = [(name, chance.choice(elements), chance.choice(months)) for name in chance.sample(names, ORDERS)]
        lines = [
            f"{name} ordered {chance.randint(11, 99)} tons of {element}, "
            f"to be sent in {month} {chance.choice(CARRIERS)}."
            for name, element, month in orders
        ]
        about = chance.sample(orders, QUESTIONS_PER_LIST + 2)
        rows = [_ask(order, orders, bool(turn % 2), chance) for turn, order in enumerate(about)]
        shown = "\n\n".join(f"{row['question']}\nAnswer: {row['answer']}" for row in rows[:2])
        context = "\n".join(["These are the orders of the year.", "", *lines, "", shown])
        for row in rows[2:]:
            yield {"list": number, "context": context, **row}


def _ask(
    order: tuple[str, str, str], orders: list[tuple[str, str, str]], when: bool, chance: random.Random
) -> dict[str, Any]:
    name, element, month = order
    if when:
        return ask(f"When is the order of {name} sent?", month, [month for _, _, month in orders], chance)
    return ask(f"What did {name} order?", element, [element for _, element, _ in orders], chance)
