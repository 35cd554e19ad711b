"""Questions of which one of four choices is right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

CHOICES = 4


def ask(question: str, answer: str, others: Sequence[str], chance: random.Random) -> dict[str, Any]:
    """A row of a dataset, with the right answer anywhere among the choices.

    Args:
        question: what is asked.
        answer: the right answer.
        others: answers of the same kind that are wrong; three of them become choices.
        chance: draws and shuffles.
    """
    choices = [answer, *chance.sample(sorted(set(others) - {answer}), CHOICES - 1)]
    chance.shuffle(choices)
    return {"question": f"Question: {question}", "choices": choices, "label": choices.index(answer)}
