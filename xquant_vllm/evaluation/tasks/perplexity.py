"""Windows scored one after another, whatever yields the logits."""

from collections.abc import Callable, Iterator

import torch

from xquant_vllm.evaluation.model.logits import Logits, Rows
from xquant_vllm.evaluation.tasks.kept_scores import KeptScores, Score


def evaluate_windows(
    windows: torch.Tensor,
    reference: Logits,
    candidate: Logits | None,
    score_window: Callable[[torch.Tensor, Rows, Rows], Score],
    kept: KeptScores[Score] | None = None,
) -> Iterator[Score]:
    """Score windows, yielding each as soon as it is done. Logits of no more than one window are held.

    Args:
        windows: ``[windows, num_tokens]``, int64.
        reference: with the 16-bit cache.
        candidate: with the quantized cache; None to score the 16-bit cache itself.
        score_window: from a window, and both caches' logits of it, to its score.
        kept: scores to take and to add to, or None.
    """
    for tokens in windows:
        score = kept.load(tokens) if kept is not None else None
        if score is None:
            exact = reference(tokens)
            score = score_window(tokens, exact, exact if candidate is None else candidate(tokens))
            del exact
            if kept is not None:
                kept.save(tokens, score)
        yield score
