"""What generated texts are worth: the 16-bit model's opinion, repetitions, length."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy

# A text that is stuck says the same words again: so many tokens that were there before are a repetition.
NGRAM = 4
_DRAWS = 2000


def repetition(text: Sequence[int]) -> float:
    """Share of a text's runs of :data:`NGRAM` tokens that stood in it before; 0 if it is too short to have any."""
    runs = [tuple(text[start : start + NGRAM]) for start in range(len(text) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def same_tokens(text: Sequence[int], other: Sequence[int]) -> int:
    """After how many tokens two texts part."""
    for index, (one, two) in enumerate(zip(text, other, strict=False)):
        if one != two:
            return index
    return min(len(text), len(other))


def scores(texts: Sequence[Sequence[int]], nll: Sequence[Sequence[float]], parts: int, tokens: int) -> dict[str, Any]:
    """Scores of texts, one number for each.

    Args:
        texts: token ids of every text.
        nll: of every token by the 16-bit model, in nats.
        parts: into how many the longest text is cut, to see whether it gets worse.
        tokens: of the longest text.

    Returns:
        ``nll`` (mean of the text), ``repetition``, ``length``, and ``nll_parts``: of every part the texts' means, None
        for texts that have ended before.
    """
    step = tokens // parts
    return {
        "nll": [statistics.fmean(of_text) for of_text in nll],
        "repetition": [repetition(text) for text in texts],
        "length": [len(text) for text in texts],
        "nll_parts": [
            [
                statistics.fmean(of_text[start : start + step]) if len(of_text) >= start + step else None
                for of_text in nll
            ]
            for start in range(0, parts * step, step)
        ],
    }


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, and the 95% interval of the bootstrap over texts (fixed seed)."""
    known = numpy.array(values, dtype=float)
    drawn = known[numpy.random.default_rng(0).integers(len(known), size=(_DRAWS, len(known)))].mean(1)
    low, high = numpy.quantile(drawn, (0.025, 0.975))
    return {"mean": float(known.mean()), "low": float(low), "high": float(high)}


def spread(measured: dict[str, float]) -> str:
    """A difference with its interval, to read."""
    return f"{measured['mean']:+.3f} ({measured['low']:+.3f} to {measured['high']:+.3f})"


def row(ours: dict[str, Any], plain: dict[str, Any], same: Sequence[int]) -> dict[str, Any]:
    """A cache's row: means, and the difference to the 16-bit cache's texts, prompt by prompt.

    Args:
        ours: :func:`scores` of the cache's texts.
        plain: of those of the 16-bit cache.
        same: after how many tokens each text parts from that of the 16-bit cache.
    """
    measured = {name: interval(ours[name]) for name in ("nll", "repetition", "length")}
    apart = {
        name: interval([one - two for one, two in zip(ours[name], plain[name], strict=True)])
        for name in ("nll", "repetition", "length")
    }
    parts = []
    for of_ours, of_plain in zip(ours["nll_parts"], plain["nll_parts"], strict=True):
        both = [(one, two) for one, two in zip(of_ours, of_plain, strict=True) if one is not None and two is not None]
        parts.append({"texts": len(both), **(interval([one - two for one, two in both]) if both else {})})
    return {**measured, "difference": apart, "difference_parts": parts, "same_tokens": statistics.fmean(same)}
