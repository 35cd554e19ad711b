"""Device functions: from products to weights, a tile of keys after another."""

import triton
import triton.language as tl


@triton.jit
def to_scores(product, scores, SOFT_CAP: tl.constexpr):
    """Products ``[ROWS, TOKENS]`` FP32 scaled and capped; ``scores`` is :class:`Scores`."""
    score = product * scores.scale
    if SOFT_CAP:
        score = capped(score, scores.soft_cap)
    return score


@triton.jit
def capped(score, cap):
    """``cap * tanh(score / cap)``; exp may overflow, and 1 - 2 / inf is right."""
    return cap * (1 - 2 / (1 + tl.exp(2 * score / cap)))


@triton.jit
def weigh(score, visible, largest, total):
    """One step of the online softmax.

    Args:
        score: ``[ROWS, TOKENS]``, FP32.
        visible: which of them a row sees.
        largest: ``[ROWS]``, FP32: the largest score before.
        total: ``[ROWS]``, FP32: the sum of weights before.

    Returns:
        Weights ``[ROWS, TOKENS]``, by what sums so far shrink ``[ROWS]``, and the new ``largest`` and ``total``.
    """
    score = tl.where(visible, score, float("-inf"))
    now = tl.maximum(largest, tl.max(score, 1))
    # A row may see nothing yet.
    shift = tl.where(now == float("-inf"), 0.0, now)
    weight = tl.exp(score - shift[:, None])
    decay = tl.exp(largest - shift)
    return weight, decay, now, total * decay + tl.sum(weight, 1)
