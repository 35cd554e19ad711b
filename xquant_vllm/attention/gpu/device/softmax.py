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


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """``1 / x`` of normal FP32 numbers, to the last bit but one; division as others have it takes ten instructions."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1 / x


@triton.jit
def binary_logarithm(x, PTX: tl.constexpr):
    """Logarithm to base 2 of normal FP32 numbers, to 22 bits behind the point."""
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)
