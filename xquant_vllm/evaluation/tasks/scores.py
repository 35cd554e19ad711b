"""How well a model with a quantized cache predicts a window, and how far it is from itself with a 16-bit cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional

from xquant_vllm.evaluation.model.logits import Rows

# Positions compared at once; bounds the temporaries, which are as wide as the vocabulary.
_AT_ONCE = 64


@dataclass(frozen=True)
class WindowScore:
    """Sums over the predicted tokens of one window. Every token but the first is predicted from those before it.

    Attributes:
        predicted: how many tokens.
        nll: negative log-likelihood, in nats.
        nll_16bit: the same with the 16-bit cache.
        kl: Kullback-Leibler divergence of the distribution from the one with the 16-bit cache, in nats.
        agreements: positions at which both find the same token most likely.
    """

    predicted: int
    nll: float
    nll_16bit: float
    kl: float
    agreements: int

    @property
    def perplexity(self) -> float:
        """Of this window."""
        return math.exp(self.nll / self.predicted)

    @property
    def perplexity_16bit(self) -> float:
        """Of this window with the 16-bit cache."""
        return math.exp(self.nll_16bit / self.predicted)

    def of_16bit(self) -> "WindowScore":
        """The 16-bit cache's own score."""
        return WindowScore(self.predicted, self.nll_16bit, self.nll_16bit, 0.0, self.predicted)


def score_window(tokens: torch.Tensor, reference: Rows, candidate: Rows) -> WindowScore:
    """Compare two models on a window.

    Args:
        tokens: ``[num_tokens]``, int64.
        reference: with the 16-bit cache, logits or log-probabilities ``[num_tokens, vocabulary]``.
        candidate: with the quantized cache, likewise.
    """
    nll = nll_16bit = kl = 0.0
    agreements = 0
    targets = tokens[1:].to(reference.device)
    for start in range(0, len(targets), _AT_ONCE):
        target = targets[start : start + _AT_ONCE]
        exact, read = (
            functional.log_softmax(logits[start : start + len(target)].float(), -1) for logits in (reference, candidate)
        )
        nll_16bit += functional.nll_loss(exact, target, reduction="sum").item()
        nll += functional.nll_loss(read, target, reduction="sum").item()
        kl += functional.kl_div(read, exact, reduction="sum", log_target=True).item()
        agreements += int((exact.argmax(-1) == read.argmax(-1)).sum())
    return WindowScore(len(targets), nll, nll_16bit, kl, agreements)


def score_parts(tokens: torch.Tensor, reference: Rows, candidate: Rows, ends: Sequence[int]) -> list[WindowScore]:
    """Compare two models on a window, part by part.

    Args:
        tokens: ``[num_tokens]``, int64.
        reference: with the 16-bit cache, logits or log-probabilities ``[num_tokens, vocabulary]``.
        candidate: with the quantized cache, likewise.
        ends: of the parts, in predicted tokens from the start of the window; the last is that of the window.
    """
    return [
        score_window(tokens[start : end + 1], reference[start:end], candidate[start:end])
        for start, end in pairwise((0, *ends))
    ]


def total(scores: Sequence[WindowScore]) -> WindowScore:
    """All windows together; a token counts as much as any other."""
    return WindowScore(
        sum(score.predicted for score in scores),
        math.fsum(score.nll for score in scores),
        math.fsum(score.nll_16bit for score in scores),
        math.fsum(score.kl for score in scores),
        sum(score.agreements for score in scores),
    )
