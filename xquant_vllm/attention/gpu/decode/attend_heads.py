"""The attention kernel for latents per head of one bit width: what decode/attend.py computes, in fewer instructions.

docs/kernels/triton.md draws a tile. In short, with ``R(p)`` the rotation by a position's angles, ``b`` the first
position of a tile, ``d`` the distance of a token from it, and ``q`` a query turned back by ``b``::

    key    = R(b) R(d) (scale * U codes + zero * S + outlier * o + bias)           S: sum of the rows of U
    score  = scale * (R(d) U codes) q  +  zero * (R(d) S) q  +  outlier * (R(d) o) q  +  (R(d) bias) q

``R(d)`` is the same in every tile, and so are all matrices but the codes: they stay where the first tile put them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.code_units import by_channels, pieces_of, row_channels, turned
from xquant_vllm.attention.gpu.device.softmax import capped
from xquant_vllm.attention.gpu.tables.tile_rotation import TILE

_TILE = tl.constexpr(TILE)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# The smallest FP16 number: what stands for a scale of 0, whose codes are all 0.
_SMALLEST_SCALE = tl.constexpr(2.0**-24)


class Heads(NamedTuple):
    """The tensors of :class:`HeadTables` and the pages; strides in bytes."""

    pages: Any  # uint8: the layer's own pages
    page_stride: Any
    up: Any
    rows: Any
    factors: Any
    base: Any  # FP32 [tiles, HALF, 2]
    offset: Any  # FP16 [TILE, HALF, 2]


@triton.jit
def _load_pieces(at, step: tl.constexpr, PIECES: tl.constexpr):
    """Blocks of pointers ``at``, ``at + step``, ...: 2, 4 or 8 of them, as a tuple."""
    if PIECES == 2:
        return (tl.load(at), tl.load(at + step))
    if PIECES == 4:
        return (tl.load(at), tl.load(at + step), tl.load(at + 2 * step), tl.load(at + 3 * step))
    return (
        tl.load(at),
        tl.load(at + step),
        tl.load(at + 2 * step),
        tl.load(at + 3 * step),
        tl.load(at + 4 * step),
        tl.load(at + 5 * step),
        tl.load(at + 6 * step),
        tl.load(at + 7 * step),
    )


@triton.jit
def _load_units(row, UNITS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """``[TILE, UNITS]`` uint16 from pointers to bytes ``[TILE]``; 0 where a row has no more units."""
    unit = tl.arange(0, UNITS)
    at = row.to(tl.pointer_type(tl.uint16))[:, None] + unit[None, :]
    if 2 * UNITS == ROW_BYTES:
        # What is read of tokens that are not there is in page 0, and is not used.
        return tl.load(at)
    return tl.load(at, (2 * unit < ROW_BYTES)[None, :], 0)


@triton.jit
def _load_parameters(
    page,
    within,
    valid,
    head,
    BLOCK_SIZE: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    KEY_ZEROS: tl.constexpr,
    KEY_OUTLIERS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    VALUE_ZEROS: tl.constexpr,
):
    """Scales and zero points of keys and values, and the outlier, of every token; FP16 ``[TILE]`` each."""
    at = page.to(tl.pointer_type(tl.float16)) + head * BLOCK_SIZE + within
    outlier = tl.load(at + KEY_OUTLIERS // 2, valid & (OUTLIERS > 0), 0.0)
    return (
        tl.load(at + KEY_SCALES // 2, valid, 0.0),
        tl.load(at + KEY_ZEROS // 2, valid, 0.0),
        tl.load(at + VALUE_SCALES // 2, valid, 0.0),
        tl.load(at + VALUE_ZEROS // 2, valid, 0.0),
        outlier,
    )


@triton.jit
def _page_of(batch, heads, sequence, position, begin, stop, BLOCK_SIZE: tl.constexpr):
    """Pointers to the pages of positions, ``[TILE]``: of those outside of ``[begin, stop)`` to page 0."""
    valid = (position >= begin) & (position < stop)
    of_table = batch.block_table + sequence.to(tl.int64) * batch.table_stride + position // BLOCK_SIZE
    return heads.pages + tl.load(of_table, valid, 0).to(tl.int64) * heads.page_stride, valid


@triton.jit(do_not_specialize=["query_tiles", "splits"])
def attend_heads(
    batch,
    columns,
    heads,
    partial,
    scores,
    query_tiles,
    splits,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SINGLE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_UNITS: tl.constexpr,
    KEY_ROW_BYTES: tl.constexpr,
    KEY_CODES: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    KEY_ZEROS: tl.constexpr,
    KEY_OUTLIERS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    MIDDLE: tl.constexpr,
    BIAS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_UNITS: tl.constexpr,
    VALUE_ROW_BYTES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    VALUE_ZEROS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    """Attend over one split of one sequence, for one kv head and a tile of query tokens.

    Grid: ``(sequences * query_tiles, num_kv_heads, splits)``, as that of ``attend``. Reads queries and pages, writes
    ``partial``: sums over value latents. ``ROWS`` is a power of two of at least 8 here.

    Args:
        heads: :class:`Heads`.
        SINGLE: whether sequences have one query token at most; else a tile has ``ROWS // GROUP``.
        BLOCK_SIZE: tokens of a page, a multiple of 16.
        KEY_BITS: of codes; the next ones are of :class:`HeadStream`, and so for values.
        OUTLIERS: outlier channels of keys, 0 or 1.
        MIDDLE: see :class:`HeadTables`.
        VALUE_WIDTH: columns of ``partial.sums``.
        STAGES: tiles whose codes are on their way or worked on.
        PTX: see device/code_units.py.
    """
    sequence, tile_of = tl.program_id(0) // query_tiles, tl.program_id(0) % query_tiles
    head, split = tl.program_id(1), tl.program_id(2)
    first_query = tl.load(batch.query_start_loc + sequence)
    query_len = tl.load(batch.query_start_loc + sequence + 1) - first_query
    TOKENS: tl.constexpr = 1 if SINGLE else ROWS // GROUP
    tile_first = tile_of * TOKENS
    if tile_first >= query_len:
        return
    past = tl.load(batch.seq_lens + sequence) - query_len
    of_row = tl.arange(0, ROWS)
    token = tile_first + of_row // GROUP
    row_valid = (of_row < TOKENS * GROUP) & (token < query_len)
    query_position = past + token
    row = (first_query + token) * batch.num_heads + head * GROUP + of_row % GROUP
    stats = partial.stats + (row.to(tl.int64) * splits + split) * 3

    end = past + tl.minimum(tile_first + TOKENS, query_len)
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(0, past + tile_first - scores.window + 1)
    first_tile, tiles = oldest // _TILE, tl.cdiv(end, _TILE)
    of_split = tl.cdiv(tiles - first_tile, splits)
    first_tile += split * of_split
    tiles = tl.minimum(tiles, first_tile + of_split)
    if first_tile >= tiles:
        tl.store(stats, tl.full([ROWS], float("-inf"), tl.float32), row_valid)
        return

    pair, distance = tl.arange(0, HALF), tl.arange(0, _TILE)
    # What stays: the up-projection, rows and angles of all distances, queries.
    KEY_PIECES: tl.constexpr = 16 // KEY_BITS
    STEP: tl.constexpr = KEY_UNITS * 2 * HALF
    up = heads.up + head * (KEY_PIECES * STEP) + tl.arange(0, KEY_UNITS)[:, None] * (2 * HALF) + pair[None, :]
    up_low, up_high = _load_pieces(up, STEP, KEY_PIECES), _load_pieces(up + HALF, STEP, KEY_PIECES)
    offset = heads.offset + distance[:, None] * (2 * HALF) + 2 * pair[None, :]
    cos, sin = tl.load(offset), tl.load(offset + 1)
    NUM_ROWS: tl.constexpr = 1 + OUTLIERS + BIAS
    of_distance = heads.rows + head * (NUM_ROWS * _TILE * 2 * HALF) + distance[:, None] * (2 * HALF) + pair[None, :]
    zero_low, zero_high = tl.load(of_distance), tl.load(of_distance + HALF)
    if OUTLIERS:
        outlier_low, outlier_high = (
            tl.load(of_distance + _TILE * 2 * HALF),
            tl.load(of_distance + _TILE * 2 * HALF + HALF),
        )
    if BIAS:
        of_bias = of_distance + (NUM_ROWS - 1) * _TILE * 2 * HALF
        bias_low, bias_high = tl.load(of_bias), tl.load(of_bias + HALF)
    at = batch.query + (first_query + token).to(tl.int64)[None, :] * batch.token_stride
    at += (head * GROUP + of_row % GROUP)[None, :] * batch.head_stride
    low_column, high_column = tl.load(columns + pair)[:, None], tl.load(columns + HALF + pair)[:, None]
    low_query = tl.load(at + low_column, row_valid[None, :] & (low_column >= 0), 0.0).to(tl.float32)
    high_query = tl.load(at + high_column, row_valid[None, :] & (high_column >= 0), 0.0).to(tl.float32)
    # FP16 has room for turned queries whose largest number is 1.
    largest_query = tl.maximum(tl.max(tl.max(tl.abs(low_query), 1), 0), tl.max(tl.max(tl.abs(high_query), 1), 0))
    largest_query = tl.where(largest_query > 0, largest_query, 1.0)
    low_query /= largest_query
    high_query /= largest_query
    unit = largest_query * scores.scale
    if not SOFT_CAP:
        unit *= _LOG2E
    of_head = heads.factors + head * (1 + NUM_ROWS)
    of_codes, of_zero = tl.load(of_head) * unit, tl.load(of_head + 1) * unit
    of_outlier, of_bias_row = tl.load(of_head + 1 + OUTLIERS) * unit, tl.load(of_head + NUM_ROWS) * unit

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([_TILE, ROWS], tl.float32)
    zeros = tl.zeros([_TILE, ROWS], tl.float32)
    VALUE_ROWS: tl.constexpr = VALUE_UNITS * (8 // VALUE_BITS)
    first_sums = tl.zeros([VALUE_ROWS, ROWS], tl.float32)
    second_sums = tl.zeros([VALUE_ROWS, ROWS], tl.float32)

    # Codes come by asynchronous copies. Parameters are loaded one tile ahead, and their block ids two.
    begin, stop = tl.maximum(oldest, first_tile * _TILE), tl.minimum(end, tiles * _TILE)
    position = first_tile * _TILE + distance
    page, valid = _page_of(batch, heads, sequence, position, begin, stop, BLOCK_SIZE)
    key_scale, key_zero, value_scale, value_zero, outlier = _load_parameters(
        page, position % BLOCK_SIZE, valid, head, BLOCK_SIZE, KEY_SCALES, KEY_ZEROS, KEY_OUTLIERS, OUTLIERS,
        VALUE_SCALES, VALUE_ZEROS,
    )  # fmt: skip
    next_page, next_valid = _page_of(batch, heads, sequence, position + _TILE, begin, stop, BLOCK_SIZE)
    for tile in tl.range(first_tile, tiles, num_stages=STAGES):
        position = tile * _TILE + distance
        page, valid = _page_of(batch, heads, sequence, position, begin, stop, BLOCK_SIZE)
        within = position % BLOCK_SIZE
        codes = page + KEY_CODES + head * (BLOCK_SIZE * KEY_ROW_BYTES) + within * KEY_ROW_BYTES
        key_units = _load_units(codes, KEY_UNITS, KEY_ROW_BYTES)
        codes = page + VALUE_CODES + head * (BLOCK_SIZE * VALUE_ROW_BYTES) + within * VALUE_ROW_BYTES
        value_units = _load_units(codes, VALUE_UNITS, VALUE_ROW_BYTES)
        ks, kz = key_scale.to(tl.float32), key_zero.to(tl.float32) + MIDDLE * key_scale.to(tl.float32)
        vs, vz, ko = tl.maximum(value_scale.to(tl.float32), _SMALLEST_SCALE), value_zero.to(tl.float32), outlier
        key_scale, key_zero, value_scale, value_zero, outlier = _load_parameters(
            next_page, (position + _TILE) % BLOCK_SIZE, next_valid, head, BLOCK_SIZE, KEY_SCALES, KEY_ZEROS,
            KEY_OUTLIERS, OUTLIERS, VALUE_SCALES, VALUE_ZEROS,
        )  # fmt: skip
        next_page, next_valid = _page_of(batch, heads, sequence, position + 2 * _TILE, begin, stop, BLOCK_SIZE)

        # Keys, per scale and without what meets the scores.
        if MIDDLE:
            key_units |= tl.where(tl.arange(0, KEY_UNITS) == 0, MIDDLE, 0).to(tl.uint16)[None, :]
        key_pieces = pieces_of(key_units, KEY_BITS, PTX)
        low = tl.dot(key_pieces[0], up_low[0])
        high = tl.dot(key_pieces[0], up_high[0])
        for piece in tl.static_range(1, KEY_PIECES):
            low = tl.dot(key_pieces[piece], up_low[piece], low)
            high = tl.dot(key_pieces[piece], up_high[piece], high)
        low_key, high_key = turned(low.to(tl.float16), high.to(tl.float16), cos, sin, PTX)

        # Queries, turned back to the tile's first position.
        of_tile = heads.base + tile * (2 * HALF) + 2 * pair
        base_cos, base_sin = tl.load(of_tile)[:, None], tl.load(of_tile + 1)[:, None]
        low_turned = (low_query * base_cos + high_query * base_sin).to(tl.float16)
        high_turned = (high_query * base_cos - low_query * base_sin).to(tl.float16)

        product = tl.dot(high_key, high_turned, tl.dot(low_key, low_turned))
        score = product * (ks * of_codes)[:, None]
        product = tl.dot(zero_high, high_turned, tl.dot(zero_low, low_turned))
        score += product * (kz * of_zero)[:, None]
        if OUTLIERS:
            product = tl.dot(outlier_high, high_turned, tl.dot(outlier_low, low_turned))
            score += product * (ko.to(tl.float32) * of_outlier)[:, None]
        if BIAS:
            score += tl.dot(bias_high, high_turned, tl.dot(bias_low, low_turned)) * of_bias_row
        if SOFT_CAP:
            score = capped(score, scores.soft_cap) * _LOG2E

        # Weights times scales of values. Of these, not of weights, the largest is 1, so that FP16 has room for them.
        visible = valid[:, None]
        if not SINGLE:
            visible &= position[:, None] <= query_position[None, :]
            if WINDOW:
                visible &= position[:, None] > query_position[None, :] - scores.window
        score = tl.where(visible, score + tl.log2(vs)[:, None], float("-inf"))
        now = tl.maximum(largest, tl.max(score, 0))
        shift = tl.where(now == float("-inf"), 0.0, now)
        weight = tl.exp2(score - shift[None, :])
        decay = tl.exp2(largest - shift)[None, :]
        largest = now
        inverse = 1 / vs
        total = total * decay + weight * inverse[:, None]
        zeros = zeros * decay + weight * (vz * inverse)[:, None]

        weight = weight.to(tl.float16)
        value_pieces = pieces_of(tl.trans(value_units), VALUE_BITS, PTX)
        first = by_channels(value_pieces, 0, VALUE_UNITS, _TILE, VALUE_BITS)
        second = by_channels(value_pieces, 1, VALUE_UNITS, _TILE, VALUE_BITS)
        first_sums = tl.dot(first, weight, first_sums * decay)
        second_sums = tl.dot(second, weight, second_sums * decay)

    tl.store(stats, largest * _LN2, row_valid)
    tl.store(stats + 1, tl.sum(total, 0), row_valid)
    tl.store(stats + 2, tl.sum(zeros, 0), row_valid)
    channel, factor = row_channels(VALUE_UNITS, VALUE_ROW_BYTES, VALUE_BITS)
    factor = (factor * 16777216.0)[:, None]
    at = partial.sums + (row.to(tl.int64) * splits + split)[None, :] * VALUE_WIDTH + channel[:, None]
    there = row_valid[None, :] & (channel >= 0)[:, None]
    tl.store(at, first_sums * factor, there)
    tl.store(at + 1, second_sums * factor, there)
