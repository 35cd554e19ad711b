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

from xquant_vllm.attention.gpu.device.code_units import channels_of, pieces_of, side_by_side, turned
from xquant_vllm.attention.gpu.device.query_tile import rows_of_tile, seen_by_tile
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
    turns: Any
    base: Any  # FP32 [tiles, HALF, 2]: cosines and sines of every tile's first position


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
def _load_blocks(batch, table_stride, sequence, position, begin, stop, BLOCK_SIZE: tl.constexpr):
    """Block ids of positions, int32 ``[TILE]``; 0, which is always there, outside of ``[begin, stop)``."""
    valid = (position >= begin) & (position < stop)
    row = batch.block_table + sequence.to(tl.int64) * table_stride
    return tl.load(row + position // BLOCK_SIZE, valid, 0)


@triton.jit
def _load_parameters(
    heads,
    block,
    position,
    begin,
    stop,
    head,
    BLOCK_SIZE: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    KEY_ZEROS: tl.constexpr,
    KEY_OUTLIERS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    VALUE_ZEROS: tl.constexpr,
):
    """Scales and zero points of keys and values, and the outlier, FP16 ``[TILE]`` each; 0 where there is no token."""
    valid = (position >= begin) & (position < stop)
    page = heads.pages + block.to(tl.int64) * heads.page_stride
    at = page.to(tl.pointer_type(tl.float16)) + head * BLOCK_SIZE + position % BLOCK_SIZE
    return (
        tl.load(at + KEY_SCALES // 2, valid, 0.0),
        tl.load(at + KEY_ZEROS // 2, valid, 0.0),
        tl.load(at + VALUE_SCALES // 2, valid, 0.0),
        tl.load(at + VALUE_ZEROS // 2, valid, 0.0),
        tl.load(at + KEY_OUTLIERS // 2, valid & (OUTLIERS > 0), 0.0),
    )


@triton.jit(do_not_specialize=["table_stride", "query_tiles", "splits"])
def attend_heads(
    batch,
    columns,
    heads,
    partial,
    scores,
    table_stride,
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
    token, query_head, row_valid, query_position, row = rows_of_tile(
        batch, first_query, query_len, past, head, tile_first, GROUP, ROWS, TOKENS
    )
    stats = partial.stats + (row.to(tl.int64) * splits + split) * 3

    oldest, end = seen_by_tile(scores, past, query_len, tile_first, TOKENS, WINDOW)
    first_tile, tiles = oldest // _TILE, tl.cdiv(end, _TILE)
    of_split = tl.cdiv(tiles - first_tile, splits)
    first_tile += split * of_split
    tiles = tl.minimum(tiles, first_tile + of_split)
    if first_tile >= tiles:
        tl.store(stats, tl.full([ROWS], float("-inf"), tl.float32), row_valid)
        return

    pair, distance = tl.arange(0, HALF), tl.arange(0, _TILE)
    # What stays: the up-projection, rows and angles of all distances, queries.
    KEY_WIDTH: tl.constexpr = 16 // KEY_BITS * KEY_UNITS
    up = heads.up + (head * KEY_WIDTH + tl.arange(0, KEY_WIDTH)[:, None]) * (2 * HALF) + pair[None, :]
    up_low, up_high = tl.load(up), tl.load(up + HALF)
    turns = heads.turns + distance[:, None] * HALF + pair[None, :]
    cos, sin = tl.load(turns), tl.load(turns + _TILE * HALF)
    NUM_ROWS: tl.constexpr = 1 + OUTLIERS + BIAS
    column = tl.arange(0, 2 * HALF)[None, :]
    rows = heads.rows + head * (NUM_ROWS * _TILE * 2 * HALF) + distance[:, None] * (2 * HALF) + column
    zero_row = tl.load(rows)
    if OUTLIERS:
        outlier_row = tl.load(rows + _TILE * 2 * HALF)
    if BIAS:
        bias_row = tl.load(rows + (NUM_ROWS - 1) * _TILE * 2 * HALF)
    at = batch.query + (first_query + token).to(tl.int64)[None, :] * batch.token_stride
    at += query_head[None, :] * batch.head_stride
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
    of_outlier, of_bias = tl.load(of_head + 1 + OUTLIERS) * unit, tl.load(of_head + NUM_ROWS) * unit

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([_TILE, ROWS], tl.float32)
    zeros = tl.zeros([_TILE, ROWS], tl.float32)
    sums = tl.zeros([16 // VALUE_BITS * VALUE_UNITS, ROWS], tl.float32)

    # Codes come by asynchronous copies. Parameters are loaded one tile ahead, and their block ids two.
    begin, stop = tl.maximum(oldest, first_tile * _TILE), tl.minimum(end, tiles * _TILE)
    position = first_tile * _TILE + distance
    block = _load_blocks(batch, table_stride, sequence, position, begin, stop, BLOCK_SIZE)
    key_scale, key_zero, value_scale, value_zero, outlier = _load_parameters(
        heads, block, position, begin, stop, head, BLOCK_SIZE, KEY_SCALES, KEY_ZEROS, KEY_OUTLIERS, OUTLIERS,
        VALUE_SCALES, VALUE_ZEROS,
    )  # fmt: skip
    next_block = _load_blocks(batch, table_stride, sequence, position + _TILE, begin, stop, BLOCK_SIZE)
    for tile in tl.range(first_tile, tiles, num_stages=STAGES):
        position = tile * _TILE + distance
        valid = (position >= begin) & (position < stop)
        block = _load_blocks(batch, table_stride, sequence, position, begin, stop, BLOCK_SIZE)
        page = heads.pages + block.to(tl.int64) * heads.page_stride
        row_of_head = head * BLOCK_SIZE + position % BLOCK_SIZE
        key_units = _load_units(page + KEY_CODES + row_of_head * KEY_ROW_BYTES, KEY_UNITS, KEY_ROW_BYTES)
        value_units = _load_units(page + VALUE_CODES + row_of_head * VALUE_ROW_BYTES, VALUE_UNITS, VALUE_ROW_BYTES)
        ks, kz = key_scale.to(tl.float32), key_zero.to(tl.float32) + MIDDLE * key_scale.to(tl.float32)
        vs, vz, ko = tl.maximum(value_scale.to(tl.float32), _SMALLEST_SCALE), value_zero.to(tl.float32), outlier
        key_scale, key_zero, value_scale, value_zero, outlier = _load_parameters(
            heads, next_block, position + _TILE, begin, stop, head, BLOCK_SIZE, KEY_SCALES, KEY_ZEROS, KEY_OUTLIERS,
            OUTLIERS, VALUE_SCALES, VALUE_ZEROS,
        )  # fmt: skip
        next_block = _load_blocks(batch, table_stride, sequence, position + 2 * _TILE, begin, stop, BLOCK_SIZE)

        # Keys, per scale and without what meets the scores.
        if MIDDLE:
            key_units |= tl.where(tl.arange(0, KEY_UNITS) == 0, MIDDLE, 0).to(tl.uint16)[None, :]
        key_codes = side_by_side(pieces_of(key_units, KEY_BITS, PTX), KEY_UNITS, _TILE, KEY_BITS)
        low, high = tl.dot(key_codes, up_low), tl.dot(key_codes, up_high)
        low_key, high_key = turned(low.to(tl.float16), high.to(tl.float16), cos, sin, PTX)

        # Queries, turned back to the tile's first position.
        of_tile = heads.base + tile * (2 * HALF) + 2 * pair
        base_cos, base_sin = tl.load(of_tile)[:, None], tl.load(of_tile + 1)[:, None]
        low_turned = (low_query * base_cos + high_query * base_sin).to(tl.float16)
        high_turned = (high_query * base_cos - low_query * base_sin).to(tl.float16)
        query = tl.reshape(tl.permute(tl.join(low_turned, high_turned), (2, 0, 1)), [2 * HALF, ROWS])

        key = tl.reshape(tl.permute(tl.join(low_key, high_key), (0, 2, 1)), [_TILE, 2 * HALF])
        score = tl.dot(key, query) * (ks * of_codes)[:, None]
        score += tl.dot(zero_row, query) * (kz * of_zero)[:, None]
        if OUTLIERS:
            score += tl.dot(outlier_row, query) * (ko.to(tl.float32) * of_outlier)[:, None]
        if BIAS:
            score += tl.dot(bias_row, query) * of_bias
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

        value_codes = side_by_side(pieces_of(value_units, VALUE_BITS, PTX), VALUE_UNITS, _TILE, VALUE_BITS)
        sums = tl.dot(tl.trans(value_codes), weight.to(tl.float16), sums * decay)

    tl.store(stats, largest * _LN2, row_valid)
    tl.store(stats + 1, tl.sum(total, 0), row_valid)
    tl.store(stats + 2, tl.sum(zeros, 0), row_valid)
    channel, factor = channels_of(VALUE_UNITS, VALUE_ROW_BYTES, VALUE_BITS)
    at = partial.sums + (row.to(tl.int64) * splits + split)[None, :] * VALUE_WIDTH + channel[:, None]
    tl.store(at, sums * factor[:, None], row_valid[None, :] & (channel >= 0)[:, None])
