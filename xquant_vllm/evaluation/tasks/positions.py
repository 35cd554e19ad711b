"""Scores by position in the window: whether a cache loses more the further a token is from the start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from xquant_vllm.evaluation.model.logits import Rows
from xquant_vllm.evaluation.tasks.result import figures
from xquant_vllm.evaluation.tasks.scores import WindowScore, score_parts, total


@dataclass(frozen=True)
class PositionScores:
    """A window's scores in buckets of positions, a number for each; see :class:`WindowScore`."""

    predicted: Sequence[int]
    nll: Sequence[float]
    nll_16bit: Sequence[float]
    kl: Sequence[float]
    agreements: Sequence[int]

    @property
    def buckets(self) -> list[WindowScore]:
        """One by one, from the start of the window."""
        columns = zip(self.predicted, self.nll, self.nll_16bit, self.kl, self.agreements, strict=True)
        return [WindowScore(*column) for column in columns]

    def of_16bit(self) -> "PositionScores":
        """The 16-bit cache's own scores."""
        return together([score.of_16bit() for score in self.buckets])


def together(scores: Sequence[WindowScore]) -> PositionScores:
    """Scores of buckets as one."""
    rows = [(score.predicted, score.nll, score.nll_16bit, score.kl, score.agreements) for score in scores]
    return PositionScores(*map(list, zip(*rows, strict=True)))  # type: ignore[arg-type]


def bucket_ends(num_tokens: int, buckets: int) -> list[int]:
    """Ends of buckets of predicted tokens, as equal as can be, counted in tokens from the start of the window.

    Args:
        num_tokens: of the window, all of which but the first are predicted.
        buckets: how many, at most one for each predicted token.
    """
    return [(num_tokens - 1) * bucket // buckets for bucket in range(1, buckets + 1)]


def score_positions(tokens: torch.Tensor, reference: Rows, candidate: Rows, buckets: int) -> PositionScores:
    """Compare two models on a window, bucket by bucket.

    Args:
        tokens: ``[num_tokens]``, int64.
        reference: with the 16-bit cache, logits or log-probabilities ``[num_tokens, vocabulary]``.
        candidate: with the quantized cache, likewise.
        buckets: of how many.
    """
    return together(score_parts(tokens, reference, candidate, bucket_ends(len(tokens), buckets)))


def position_table(scores: Sequence[PositionScores], num_tokens: int) -> list[dict[str, Any]]:
    """All windows together, an entry for every bucket.

    Args:
        scores: of every window.
        num_tokens: of a window.

    Returns:
        ``first`` and ``last`` predicted token, counted from 0 at the start of the window, ``perplexity``,
        ``perplexity_16bit``, ``increase``, ``kl`` and ``top1_agreement``.
    """
    buckets = [total(of_bucket) for of_bucket in zip(*(score.buckets for score in scores), strict=True)]
    ends = pairwise((0, *bucket_ends(num_tokens, len(buckets))))
    return [
        {"first": start + 1, "last": end, **figures(whole)} for whole, (start, end) in zip(buckets, ends, strict=True)
    ]


def position_lines(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table to read."""
    lines = [f"{'positions':>15}{'perplexity':>12}{'16 bit':>10}{'increase':>10}{'KL':>10}{'top-1':>8}"]
    lines += [
        f"{row['first']:>8}-{row['last']:<6}{row['perplexity']:>12.3f}{row['perplexity_16bit']:>10.3f}"
        f"{row['increase']:>+10.3f}{row['kl']:>10.5f}{row['top1_agreement']:>8.1%}"
        for row in table
    ]
    return lines
