"""Shares of right answers, and how far those of two caches are apart on the same questions, with 95% intervals.

Intervals are drawn by the bootstrap, with a fixed seed: questions are drawn with replacement, those that share a text
together, and of each question the answers of both caches. So what two caches get wrong alike does not widen the
interval of their difference.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000
_TAILS = (2.5, 97.5)


class Share(NamedTuple):
    """A share, or a difference of two, and the ends of its interval."""

    value: float
    least: float
    most: float


class Answers(NamedTuple):
    """Which answers to a task were right.

    Attributes:
        right: ``1`` or ``0`` for every question.
        together: how many successive questions share a text.
    """

    right: str
    together: int = 1

    def by_text(self) -> np.ndarray:
        """Right answers to the questions of every text."""
        answers = np.array([int(answer) for answer in self.right], dtype=np.float64)
        return answers.reshape(-1, self.together).sum(axis=1)


def share(tasks: Sequence[Answers]) -> Share:
    """Right answers; of several tasks the mean of their shares."""
    return _share([task.by_text() / task.together for task in tasks])


def difference(ours: Sequence[Answers], theirs: Sequence[Answers]) -> Share:
    """How many more answers are right than in another run with the same questions, as :func:`share`."""
    pairs = zip(ours, theirs, strict=True)
    return _share([(mine.by_text() - other.by_text()) / mine.together for mine, other in pairs])


def changed(ours: Sequence[Answers], theirs: Sequence[Answers]) -> tuple[int, int]:
    """How many answers are wrong that the other run has right, and the other way round."""
    pairs = [
        pair for mine, other in zip(ours, theirs, strict=True) for pair in zip(mine.right, other.right, strict=True)
    ]
    return pairs.count(("0", "1")), pairs.count(("1", "0"))


def _share(tasks: Sequence[np.ndarray]) -> Share:
    chance = np.random.default_rng(0)
    drawn = np.zeros(DRAWS)
    for texts in tasks:
        often = chance.multinomial(len(texts), np.full(len(texts), 1 / len(texts)), size=DRAWS)
        drawn += often @ texts / len(texts)
    least, most = (float(np.percentile(drawn / len(tasks), tail)) for tail in _TAILS)
    return Share(float(np.mean([texts.mean() for texts in tasks])), least, most)
