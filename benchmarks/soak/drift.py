"""How far two answers to the same question are apart."""

from typing import Any


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Of two answers' log-probabilities; infinite where the tokens differ."""
    if first["tokens"] != second["tokens"]:
        return float("inf")
    largest = 0.0
    for before, after in zip(first["top_logprobs"], second["top_logprobs"], strict=True):
        if before.keys() != after.keys():
            return float("inf")
        largest = max(largest, *(abs(before[token] - after[token]) for token in before))
    return largest
