"""Device functions: the scales of scale groups, and codes under them."""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.error_scale import BIAS, PER_OCTAVE, scale_value
from xquant_vllm.codec.allocated import CANDIDATES

_CANDIDATES = tl.constexpr(len(CANDIDATES))
_FIRST_CANDIDATE = tl.constexpr(CANDIDATES[0])
_CANDIDATE_STEP = tl.constexpr(CANDIDATES[1] - CANDIDATES[0])
assert tuple(range(CANDIDATES[0], CANDIDATES[-1] + 1, CANDIDATES[1] - CANDIDATES[0])) == CANDIDATES
_FP16_MAX = tl.constexpr(65504.0)
# What stands for infinite latents while a scale is chosen.
_LARGE = tl.constexpr(3e38)
# Adding it rounds a number in [0, 2^22] half to even.
_ROUNDER = tl.constexpr(8388608.0)


@triton.jit
def saturated_half(x):
    """FP32 to FP16, saturating; NaN stays NaN."""
    x = tl.where(x > _FP16_MAX, _FP16_MAX, x)
    return tl.where(x < -_FP16_MAX, -_FP16_MAX, x).to(tl.float16)


@triton.jit
def fit_group(x, counts, LARGEST: tl.constexpr):
    """Scale and zero point of groups, as codec/quantizer.py finds them.

    Args:
        x: FP32 ``[tokens, channels]``.
        counts: ``[tokens or 1, channels]``: which channels take part in the range.
        LARGEST: the largest code.

    Returns:
        Two of ``[tokens]``, FP16; NaN where any channel that counts is.
    """
    low = tl.min(tl.where(counts, x, float("inf")), 1)
    high = tl.max(tl.where(counts, x, float("-inf")), 1)
    unordered = tl.max(((x != x) & counts).to(tl.int32), 1) > 0
    zero = saturated_half(tl.where(unordered, float("nan"), low))
    scale = saturated_half(tl.div_rn(high - zero.to(tl.float32), LARGEST * 1.0))
    return scale, zero


@triton.jit
def uniform_codes(x, scale, zero, counts, LARGEST: tl.constexpr):
    """Codes ``[tokens, channels]`` int32; 0 where not ``counts``, and in groups without a positive scale."""
    step = scale.to(tl.float32)[:, None]
    counts = counts & (step > 0)
    level = tl.div_rn(x - zero.to(tl.float32)[:, None], tl.where(step > 0, step, 1.0) + tl.zeros_like(x))
    return _rounded(tl.where(counts, level, 0.0), LARGEST * 1.0)


@triton.jit
def _rounded(level, largest):
    """The nearest code, half to even."""
    level = tl.minimum(tl.maximum(level, 0.0), largest)
    return ((level + _ROUNDER) - _ROUNDER).to(tl.int32)


@triton.jit
def _finite(x):
    """As ``torch.nan_to_num(x, 0, 3e38, -3e38)``."""
    x = tl.where(x == x, x, 0.0)
    x = tl.where(x == float("inf"), _LARGE, x)
    return tl.where(x == float("-inf"), -_LARGE, x)


@triton.jit
def fit_scale(x, step, largest, worth, there):
    """The scale of a token that leaves the least weighted error, as codec/allocated.py finds it.

    Args:
        x: FP32 ``[tokens, channels]``.
        step: FP32 ``[channels]``; 0 in channels that are not stored, as the next two.
        largest: FP32 ``[channels]``, the largest codes.
        worth: FP32 ``[channels]``, what errors are worth.
        there: ``[tokens, channels]``: which channels are stored.

    Returns:
        Scales uint8 ``[tokens]``, and what they stand for, FP32 ``[tokens]``; this is 0 where the error is infinite
        under all of them, and all codes are to be 0.
    """
    x = _finite(x)
    step = tl.where(there, step[None, :], 1.0)
    largest, worth = largest[None, :], worth[None, :]
    mean_square = tl.sum(x * x * worth, 1) / tl.sum(worth, 1)
    mean_square = tl.minimum(tl.maximum(mean_square, 1e-30), 1e30)
    middle = tl.floor(tl.log2(mean_square) * (PER_OCTAVE / 2) + 0.5) + BIAS
    best_error = tl.zeros_like(mean_square) + float("inf")
    best_scale = tl.zeros_like(mean_square) + 1
    best_value = tl.zeros_like(mean_square)
    for index in tl.static_range(_CANDIDATES):
        scale = tl.minimum(tl.maximum(middle + (_FIRST_CANDIDATE + index * _CANDIDATE_STEP), 1.0), 255.0)
        value = scale_value(scale)
        code = allocated_codes(x, value, step, largest).to(tl.float32)
        error = x - (code - largest / 2) * (value[:, None] * step)
        error = tl.sum(error * error * worth, 1)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_value = tl.where(better, value, best_value)
    return best_scale.to(tl.int32).to(tl.uint8), best_value


@triton.jit
def allocated_codes(x, value, step, largest):
    """Codes ``[tokens, channels]`` int32 of channels of these steps and largest codes, 0 where ``value`` is.

    ``value`` is what the tokens' scales stand for, FP32 ``[tokens]``.
    """
    divisor = value[:, None] * step
    code = _rounded(_finite(x) / tl.where(divisor > 0, divisor, 1.0) + largest / 2, largest)
    return tl.where(divisor > 0, code, 0)
