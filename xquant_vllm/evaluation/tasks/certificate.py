"""From scores of stretches of a text to a certificate: means, and how sure they are."""

from collections.abc import Callable, Sequence

import torch

from xquant_vllm.evaluation.model.logits import Rows
from xquant_vllm.evaluation.tasks.scores import WindowScore, score_parts, total
from xquant_vllm.scheme.certificate import Certificate, Measured

# Predicted tokens of a stretch. Errors of tokens that are nearer to each other go together.
STRETCH = 64
_DRAWS = 2000
_OUTSIDE = 0.05


def score_stretches(tokens: torch.Tensor, reference: Rows, candidate: Rows) -> list[WindowScore]:
    """Compare two models on a window, stretch by stretch.

    Args:
        tokens: ``[num_tokens]``, int64.
        reference: with the 16-bit cache, logits ``[num_tokens, vocabulary]``.
        candidate: with the quantized cache, likewise.
    """
    predicted = len(tokens) - 1
    return score_parts(tokens, reference, candidate, [*range(STRETCH, predicted, STRETCH), predicted])


def certificate_of(scores: Sequence[WindowScore], text: str, dtype: str, bytes_per_token: int) -> Certificate:
    """What stretches say together.

    Intervals are those of the bootstrap: how much means differ between texts that are put together from these stretches
    at random (with a fixed seed).

    Args:
        scores: of stretches.
        text: name of the text.
        dtype: that the model computed in.
        bytes_per_token: of the cache.
    """
    sums = torch.tensor([[s.predicted, s.nll, s.nll_16bit, s.kl, s.agreements] for s in scores], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(scores), (_DRAWS, len(scores)), generator=generator)
    drawn = sums[draws].sum(1)

    def measured(of: Callable[[torch.Tensor], torch.Tensor]) -> Measured:
        low, high = of(drawn).quantile(torch.tensor([_OUTSIDE / 2, 1 - _OUTSIDE / 2], dtype=torch.float64)).tolist()
        return Measured(mean=of(sums.sum(0, keepdim=True)).item(), low=low, high=high)

    whole = total(scores)
    return Certificate(
        text=text,
        tokens=whole.predicted,
        dtype=dtype,
        bytes_per_token=bytes_per_token,
        kl=measured(lambda s: s[:, 3] / s[:, 0]),
        increase=measured(lambda s: (s[:, 1] / s[:, 0]).exp() - (s[:, 2] / s[:, 0]).exp()),
        perplexity_16bit=whole.perplexity_16bit,
        top1=measured(lambda s: s[:, 4] / s[:, 0]),
    )
