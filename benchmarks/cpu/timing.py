"""Variants timed in turns, so that what else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spread:
    """Of several measurements: the median, the quartiles, the extremes, and how many there are."""

    median: float
    low: float
    high: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Spread":
        """Of at least one number."""
        ordered = sorted(numbers)
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
        return cls(statistics.median(ordered), low, high, ordered[0], ordered[-1], len(ordered))

    def scaled(self, factor: float) -> dict[str, float]:
        """As a dictionary, in another unit."""
        return {name: value if name == "count" else value * factor for name, value in asdict(self).items()}


def in_turns(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, one of each variant in every round, after one of each that is not counted."""
    for call in variants.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    return taken


def ratios(taken: Mapping[str, Sequence[float]], name: str, baseline: str) -> Spread:
    """Speed of a variant relative to another: round by round, above 1 is faster."""
    return Spread.of([b / a for a, b in zip(taken[name], taken[baseline], strict=True)])
