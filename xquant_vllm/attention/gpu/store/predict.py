"""The kernels that subtract from rows what earlier layers' pages say of them (XQuant-CL).

Only the difference is stored. A reader never repeats these computations: what they round is stored as well.
"""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.unpack import (
    HAS_UNIFORM,
    add_terms,
    load_band,
    load_outlier,
)
from xquant_vllm.attention.gpu.tables.prediction_tables import SEGMENT_FIELDS

_FIELDS = tl.constexpr(len(SEGMENT_FIELDS))
_START = tl.constexpr(SEGMENT_FIELDS.index("start"))
_STOP = tl.constexpr(SEGMENT_FIELDS.index("stop"))
_FIRST = tl.constexpr(SEGMENT_FIELDS.index("first"))
_CHANNELS = tl.constexpr(SEGMENT_FIELDS.index("channels"))


@triton.jit(do_not_specialize=["num_tokens"])
def subtract_terms(
    x,
    token_stride,
    slots,
    num_tokens,
    pages,
    latent,
    segments,
    order,
    rows,
    row_stride,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    HIGH: tl.constexpr,
    OUTLIERS: tl.constexpr,
):
    """Subtract from a tile of tokens the sum of terms, over the channels of one segment.

    Grid: ``(tiles of tokens, segments)``; tokens that are not stored are left out. Reads pages and ``x``, writes
    ``rows``.

    Args:
        x: ``[tokens, channels of all heads]``, any float dtype, contiguous channels.
        token_stride: of x, in elements.
        latent: :class:`Latent`; ``up`` is ``[bands, WIDTH, 1]``, the factors of channels.
        segments: see :class:`PredictionTables`, as ``order``.
        rows: FP32 ``[tokens, channels of all heads]``; may be ``x``, whose tiles only their own program reads.
        row_stride: of the rows, in elements.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + token, token < num_tokens, -1)
    valid = slot >= 0
    block = slot // pages.block_size
    within = slot - block * pages.block_size
    segment = segments + tl.program_id(1) * _FIELDS
    channel = tl.arange(0, WIDTH)
    sums = tl.zeros([TOKENS, WIDTH], tl.float32)
    start, stop = tl.load(segment + _START), tl.load(segment + _STOP)
    sums = add_terms(sums, pages, latent, order, start, stop, block, within, valid, WIDTH, KINDS, HIGH, OUTLIERS)
    first = tl.load(segment + _FIRST)
    there = valid[:, None] & (channel < tl.load(segment + _CHANNELS))[None, :]
    at = token.to(tl.int64)[:, None] * token_stride + first + channel[None, :]
    of_rows = tl.load(x + at, there, 0.0).to(tl.float32) - sums
    tl.store(rows + token.to(tl.int64)[:, None] * row_stride + first + channel[None, :], of_rows, there)


@triton.jit(do_not_specialize=["num_tokens"])
def subtract_product(
    x,
    token_stride,
    slots,
    num_tokens,
    pages,
    latent,
    rows,
    row_stride,
    width,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    HIGH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Subtract from a tile of tokens the product of terms and a matrix, over a tile of columns of one head.

    Grid: ``(tiles of tokens, heads, tiles of columns)``. Reads and writes what :func:`subtract_terms` does.

    Args:
        latent: :class:`Latent`; ``up`` is FP32 ``[bands, WIDTH, width]``.
        width: channels of a head of the rows.
        TOKENS: tokens of a tile, at least 16.
        COLUMNS: channels of a tile.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    slot = tl.load(slots + token, token < num_tokens, -1)
    valid = slot >= 0
    block = slot // pages.block_size
    within = slot - block * pages.block_size
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    channel = tl.arange(0, WIDTH)
    product = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for band in range(tl.load(latent.first_band + head), tl.load(latent.first_band + head + 1)):
        page, number, scale, zero = load_band(pages, latent, band, block, within, valid, WIDTH, KINDS, HIGH)
        row = (band * WIDTH + channel).to(tl.int64)
        up = tl.load(latent.up + row[:, None] * width + column[None, :], inside[None, :], 0.0)
        product += scale[:, None] * tl.dot(number, up, input_precision=PRECISION)
        if HAS_UNIFORM & KINDS:
            product += zero[:, None] * tl.load(latent.up_sum + band * width + column, inside, 0.0)[None, :]
        for outlier in tl.static_range(OUTLIERS):
            exact = load_outlier(latent, band, outlier, pages, page, within, valid)
            of_outlier = latent.up_outliers + (band * OUTLIERS + outlier) * width + column
            product += exact[:, None] * tl.load(of_outlier, inside, 0.0)[None, :]
    of_head = head * width + column
    there = valid[:, None] & inside[None, :]
    of_rows = tl.load(x + token.to(tl.int64)[:, None] * token_stride + of_head[None, :], there, 0.0).to(tl.float32)
    tl.store(rows + token.to(tl.int64)[:, None] * row_stride + of_head[None, :], of_rows - product, there)
