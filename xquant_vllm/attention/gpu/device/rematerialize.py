"""Device functions: keys and values of a tile of cached tokens, from their pages."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.unpack import HAS_UNIFORM, load_band, load_outlier


class KeyTail(NamedTuple):
    """What happens to a key after its up-projection; all FP32.

    Channels of a head are in *pairs*: RoPE turns channel j of the first half with channel j of the second, whichever
    channels of the model's head these are. Pairs that do not rotate come last.
    """

    bias: Any  # [num_kv_heads, 2, half]
    norm: Any  # [num_kv_heads, 2, half]
    eps: Any
    cos: Any  # [positions, rotating pairs]
    sin: Any
    rotating: Any  # pairs that rotate
    head_size: Any


@triton.jit
def _add_band(
    low,
    high,
    pages,
    latent,
    band,
    number,
    scale,
    zero,
    page,
    within,
    valid,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the products of an unpacked band, whose numbers, scales and zero points are given; see project_pairs."""
    column = tl.arange(0, HALF)
    row = (band * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    up = latent.up + row[:, None] * (2 * HALF) + column[None, :]
    low += scale[:, None] * tl.dot(number, tl.load(up), input_precision=PRECISION)
    high += scale[:, None] * tl.dot(number, tl.load(up + HALF), input_precision=PRECISION)
    if HAS_UNIFORM & KINDS:
        total = latent.up_sum + band * (2 * HALF) + column
        low += zero[:, None] * tl.load(total)[None, :]
        high += zero[:, None] * tl.load(total + HALF)[None, :]
    for channel in tl.static_range(OUTLIERS):
        exact = load_outlier(latent, band, channel, pages, page, within, valid)
        of_channel = latent.up_outliers + (band * OUTLIERS + channel) * (2 * HALF) + column
        low += exact[:, None] * tl.load(of_channel)[None, :]
        high += exact[:, None] * tl.load(of_channel + HALF)[None, :]
    return low, high


@triton.jit
def project_pairs(
    pages,
    latent,
    first,
    last,
    block,
    within,
    valid,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    HIGH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of a tile's latents with both halves of an up-projection's columns.

    Args:
        latent: :class:`Latent`; ``up`` is ``[bands, WIDTH, 2 * HALF]``.
        first: band of the kv head at which to start.
        last: band at which to stop.

    Returns:
        Two of ``[TOKENS, HALF]``, FP32.
    """
    low = tl.zeros([TOKENS, HALF], tl.float32)
    high = tl.zeros([TOKENS, HALF], tl.float32)
    for band in range(first, last):
        page, number, scale, zero = load_band(pages, latent, band, block, within, valid, WIDTH, KINDS, HIGH)
        number = number.to(DTYPE)
        low, high = _add_band(
            low, high, pages, latent, band, number, scale, zero, page, within, valid, HALF, WIDTH, KINDS, OUTLIERS,
            PRECISION,
        )  # fmt: skip
    return low, high


@triton.jit
def project_both(
    pages,
    key,
    value,
    first,
    last,
    block,
    within,
    valid,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    HIGH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """:func:`project_pairs` of one latent, unpacked once, for keys and for values; their bands are alike.

    Returns:
        Four of ``[TOKENS, HALF]``, FP32: both halves of keys, then of values.
    """
    low_key = tl.zeros([TOKENS, HALF], tl.float32)
    high_key = tl.zeros([TOKENS, HALF], tl.float32)
    low_value = tl.zeros([TOKENS, HALF], tl.float32)
    high_value = tl.zeros([TOKENS, HALF], tl.float32)
    for band in range(first, last):
        page, number, scale, zero = load_band(pages, key, band, block, within, valid, WIDTH, KINDS, HIGH)
        number = number.to(DTYPE)
        low_key, high_key = _add_band(
            low_key, high_key, pages, key, band, number, scale, zero, page, within, valid, HALF, WIDTH, KINDS,
            OUTLIERS, PRECISION,
        )  # fmt: skip
        low_value, high_value = _add_band(
            low_value, high_value, pages, value, band, number, scale, zero, page, within, valid, HALF, WIDTH, KINDS,
            OUTLIERS, PRECISION,
        )  # fmt: skip
    return low_key, high_key, low_value, high_value


@triton.jit
def finish_keys(
    low,
    high,
    tail,
    head,
    position,
    valid,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Bias, norm and RoPE of a tile's keys of kv head ``head``.

    ``low`` and ``high`` are their halves, ``[TOKENS, HALF]`` FP32, and so are the results. Positions are looked up
    where ``valid``.
    """
    pair = tl.arange(0, HALF)
    if BIAS:
        at = tail.bias + head * (2 * HALF) + pair
        low += tl.load(at)[None, :]
        high += tl.load(at + HALF)[None, :]
    if NORM:
        mean_square = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / tail.head_size
        factor = tl.rsqrt(mean_square + tail.eps)[:, None]
        at = tail.norm + head * (2 * HALF) + pair
        low *= factor * tl.load(at)[None, :]
        high *= factor * tl.load(at + HALF)[None, :]
    if ROPE:
        at = position[:, None] * tail.rotating + pair[None, :]
        there = valid[:, None] & (pair < tail.rotating)[None, :]
        cos, sin = tl.load(tail.cos + at, there, 1.0), tl.load(tail.sin + at, there, 0.0)
        low, high = low * cos - high * sin, high * cos + low * sin
    return low, high


@triton.jit
def store_pairs(target, columns, row, low, high, valid, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """Write both halves of keys or values, ``[TOKENS, HALF]``, to the channels that they are.

    Args:
        target: where row 0 begins.
        columns: which channel a column is; -1 is padding.
        row: where every token's head begins, ``[TOKENS, 1]``.
        DTYPE: of the target.
    """
    half = tl.arange(0, HALF)
    low_column, high_column = tl.load(columns + half)[None, :], tl.load(columns + HALF + half)[None, :]
    tl.store(target + row + low_column, low.to(DTYPE), valid[:, None] & (low_column >= 0))
    tl.store(target + row + high_column, high.to(DTYPE), valid[:, None] & (high_column >= 0))
