"""The attention kernel for latents per head: what decode/attend.py computes, in fewer instructions.

docs/kernels/triton.md draws a tile. In short, with ``R(p)`` the rotation by a position's angles, ``b`` the first
position of a tile, ``d`` the distance of a token from it, and ``q`` a query turned back by ``b``::

    key    = R(b) (R(d) scale * (U codes + (zero / scale) * S + (outlier / scale) * o)  +  R(d) bias)
    score  = scale * (R(d) [U S o] [codes, zero / scale, outlier / scale]) q  +  (R(d) bias) q

``S`` is the sum of the rows of U, ``o`` the outlier channel's row. ``R(d)`` is the same in every tile, and so are all
matrices but the codes and what stands beside them: they stay where the first tile put them.

Streams of runs of several bits are read as fields of one width (tables/run_fields.py). Their codes count from the
middle of their range; a constant behind every row takes that off, so they have no zero points::

    score  = scale * (R(d) (U fields - middle)) q  +  (R(d) bias) q
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.code_units import (
    channels_of,
    pieces_of,
    side_by_side,
    turned,
    units_of,
    word_from,
    words_from,
)
from xquant_vllm.attention.gpu.device.query_tile import rows_of_tile, seen_by_tile
from xquant_vllm.attention.gpu.device.softmax import binary_logarithm, capped, reciprocal
from xquant_vllm.attention.gpu.tables.head_tables import PARAMETER_ROWS, PARAMETER_SCALE
from xquant_vllm.attention.gpu.tables.run_fields import CONSTANT
from xquant_vllm.attention.gpu.tables.tile_rotation import TILE

_TILE = tl.constexpr(TILE)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# The smallest FP16 number: what stands for a scale of 0, whose codes are all 0.
_SMALLEST_SCALE = tl.constexpr(2.0**-24)
# What a code counts that is read as a subnormal number.
_SUBNORMAL = tl.constexpr(2.0**24)
_CONSTANT = tl.constexpr(CONSTANT)
_PARAMETER_ROWS, _PARAMETER_SCALE = tl.constexpr(PARAMETER_ROWS), tl.constexpr(PARAMETER_SCALE)
# Of a zero point or an outlier: so much is its token's scale at least. FP16 rounds a zero point by more than what all
# codes of a smaller scale amount to, and keys have to fit FP16.
_LEAST_SCALE = tl.constexpr(2.0**-20)
# Of bytes, the upper one of every two bits.
_UPPER_BITS = tl.constexpr(0xAAAA)


class Heads(NamedTuple):
    """The tensors of :class:`HeadTables` and the pages; strides in bytes."""

    pages: Any  # uint8: the layer's own pages
    page_stride: Any
    up: Any
    bias: Any
    norm: Any
    eps: Any
    head_size: Any
    factors: Any
    turns: Any
    base: Any  # FP32 [tiles, HALF, 2]: cosines and sines of every tile's first position
    key_runs: Any  # where heads are, if their channels have bits of their own
    value_runs: Any


@triton.jit
def _load_units(row, UNITS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """``[TILE, UNITS]`` uint16 from pointers to bytes ``[TILE]``; 0 where a row has no more than ``ROW_BYTES``."""
    unit = tl.arange(0, UNITS)
    at = row.to(tl.pointer_type(tl.uint16))[:, None] + unit[None, :]
    if 2 * UNITS <= ROW_BYTES:
        # What is read of tokens that are not there is in page 0, and is not used.
        return tl.load(at)
    return tl.load(at, (2 * unit < ROW_BYTES)[None, :], 0)


@triton.jit
def _load_blocks(batch, table_stride, sequence, position, begin, stop, BLOCK_SIZE: tl.constexpr):
    """Block ids of positions, int32 ``[TILE]``; 0, which is always there, outside of ``[begin, stop)``."""
    valid = (position >= begin) & (position < stop)
    row = batch.block_table + sequence.to(tl.int64) * table_stride
    return tl.load(row + position.to(tl.uint32) // BLOCK_SIZE, valid, 0)


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
    at = page.to(tl.pointer_type(tl.float16)) + head * BLOCK_SIZE + position.to(tl.uint32) % BLOCK_SIZE
    return (
        tl.load(at + KEY_SCALES // 2, valid, 0.0),
        tl.load(at + KEY_ZEROS // 2, valid, 0.0),
        tl.load(at + VALUE_SCALES // 2, valid, 0.0),
        tl.load(at + VALUE_ZEROS // 2, valid, 0.0),
        tl.load(at + KEY_OUTLIERS // 2, valid & (OUTLIERS > 0), 0.0),
    )


@triton.jit
def _load_words(pages, at, row_bytes, FIRST: tl.constexpr, WORDS: tl.constexpr, PTX: tl.constexpr):
    """``[TILE, WORDS]`` uint32, from the ``FIRST`` of rows at bytes ``at`` ``[TILE]`` on, which need not be aligned.

    What follows a row's ``row_bytes`` is not specified: 15 bytes of it are read at most, over and over. Behind codes
    there are always 16. Two words are loaded at once, which halves the rows whose addresses a thread has to know.
    """
    if WORDS == 2:  # a row of one pair would be laid out anew on its way
        word = tl.minimum(FIRST + tl.arange(0, WORDS), (row_bytes + 2) // 4)
        ahead = at & 3
        aligned = (pages + (at - ahead)).to(tl.pointer_type(tl.uint32))[:, None] + word[None, :]
        low, high = tl.load(aligned), tl.load(aligned + 1)
        return word_from(low, high, tl.broadcast_to((8 * ahead).to(tl.uint32)[:, None], [_TILE, WORDS]), PTX)
    PAIRS: tl.constexpr = WORDS // 2
    pair = tl.minimum(FIRST // 2 + tl.arange(0, PAIRS), (row_bytes + 6) // 8)
    ahead = at & 7
    aligned = (pages + (at - ahead)).to(tl.pointer_type(tl.uint64))[:, None] + pair[None, :]
    low, high = tl.load(aligned), tl.load(aligned + 1)
    shift = tl.broadcast_to((8 * ahead).to(tl.uint32)[:, None], [_TILE, PAIRS])
    first, second = words_from(low, high, shift, PTX)
    return tl.reshape(tl.join(first, second), [_TILE, WORDS])


@triton.jit
def _load_fields(
    pages, at, row_bytes, FIRST: tl.constexpr, UNITS: tl.constexpr, CONSTANT_LAST: tl.constexpr, PTX: tl.constexpr
):
    """``[TILE, UNITS]`` uint16 from unit ``FIRST`` of rows on; the last two are the constant if asked for."""
    WORDS: tl.constexpr = UNITS // 2
    words = _load_words(pages, at, row_bytes, FIRST // 2, WORDS, PTX)
    if CONSTANT_LAST:
        words = tl.where(tl.arange(0, WORDS)[None, :] == WORDS - 1, _CONSTANT, words).to(tl.uint32)
    return units_of(words, WORDS, _TILE)


@triton.jit
def _load_up(up, FIRST: tl.constexpr, COUNT: tl.constexpr, HALF: tl.constexpr):
    """Rows of the up-projection from row ``FIRST`` on, ``[COUNT, 2 * HALF]``."""
    return tl.load(up + (FIRST + tl.arange(0, COUNT)[:, None]) * (2 * HALF))


@triton.jit
def _rematerialized(units, up, keys, UNITS: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Keys, to which what units make is added."""
    return tl.dot(side_by_side(pieces_of(units, BITS, PTX), UNITS, _TILE, BITS), up, keys)


@triton.jit
def _parameters(zero, outlier):
    """What meets ``parameter_rows``, FP16 ``[TILE, PARAMETER_ROWS]``: joined so that a thread has all of a token."""
    rounded = zero.to(tl.float16)
    rest = (zero - rounded.to(tl.float32)).to(tl.float16)
    none = tl.zeros([_TILE], tl.float16)
    four = tl.reshape(tl.join(tl.join(rounded, rest), tl.join(outlier.to(tl.float16), none)), [_TILE, 4])
    eight = tl.reshape(tl.join(four, tl.zeros([_TILE, 4], tl.float16)), [_TILE, 8])
    return tl.reshape(tl.join(eight, tl.zeros([_TILE, 8], tl.float16)), [_TILE, 16])


@triton.jit
def _weighed(units, weight, sums, UNITS: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Sums over values, to which those of units are added."""
    codes = side_by_side(pieces_of(units, BITS, PTX), UNITS, _TILE, BITS)
    return tl.dot(tl.trans(codes), weight.to(tl.float16), sums)


@triton.jit
def _load_scales(heads, block, position, begin, stop, key_scales, value_scales, BLOCK_SIZE: tl.constexpr):
    """Scales of keys and of values of runs, uint8 ``[TILE]``; 0 where there is no token."""
    valid = (position >= begin) & (position < stop)
    at = heads.pages + block.to(tl.int64) * heads.page_stride + position.to(tl.uint32) % BLOCK_SIZE
    return tl.load(at + key_scales, valid, 0), tl.load(at + value_scales, valid, 0)


@triton.jit
def _octaves(scale):
    """Logarithm to base 2 of what the scale of a stream of runs stands for (codec/allocated.py)."""
    return (scale.to(tl.float32) - 128.0) * 0.125


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
    KEY_SECOND: tl.constexpr,
    KEY_THIRD: tl.constexpr,
    KEY_ROW_BYTES: tl.constexpr,
    KEY_CODES: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    KEY_ZEROS: tl.constexpr,
    KEY_OUTLIERS: tl.constexpr,
    KEY_ONES: tl.constexpr,
    KEY_WINDOW: tl.constexpr,
    OUTLIERS: tl.constexpr,
    MIDDLE: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_UNITS: tl.constexpr,
    VALUE_SECOND: tl.constexpr,
    VALUE_THIRD: tl.constexpr,
    VALUE_ROW_BYTES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    VALUE_ZEROS: tl.constexpr,
    VALUE_ONES: tl.constexpr,
    VALUE_WINDOW: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    RUNS: tl.constexpr,
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
        BIAS: whether keys have a bias, and no norm.
        NORM: whether they have a norm, and no bias.
        VALUE_WIDTH: columns of ``partial.sums``.
        RUNS: whether channels have bits of their own, see tables/run_fields.py. Where its numbers are every head says
            itself. Sums are then of fields, as they are of values with a window of single bits.
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
    share = row * splits + split

    oldest, end = seen_by_tile(scores, past, query_len, tile_first, TOKENS, WINDOW)
    first_tile, tiles = oldest // _TILE, tl.cdiv(end, _TILE)
    of_split = tl.cdiv(tiles - first_tile, splits)
    first_tile += split * of_split
    tiles = tl.minimum(tiles, first_tile + of_split)
    if first_tile >= tiles:
        tl.store(partial.stats + share.to(tl.int64) * 3, tl.full([ROWS], float("-inf"), tl.float32), row_valid)
        return

    pair, distance = tl.arange(0, HALF), tl.arange(0, _TILE)
    # What stays: the up-projection, bias and angles of all distances, queries.
    KEY_WIDTH: tl.constexpr = 16 // KEY_BITS * KEY_UNITS
    KEY_WIDTH_2: tl.constexpr = 16 // KEY_BITS * KEY_SECOND
    KEY_WIDTH_3: tl.constexpr = 16 // KEY_BITS * KEY_THIRD
    KEY_FIELDS: tl.constexpr = KEY_WIDTH + KEY_WIDTH_2 + KEY_WIDTH_3
    VALUE_WIDTH_1: tl.constexpr = 16 // VALUE_BITS * VALUE_UNITS
    VALUE_WIDTH_2: tl.constexpr = 16 // VALUE_BITS * VALUE_SECOND
    VALUE_WIDTH_3: tl.constexpr = 16 // VALUE_BITS * VALUE_THIRD
    column = tl.arange(0, 2 * HALF)[None, :]
    UP_ROWS: tl.constexpr = KEY_FIELDS + 8 * KEY_ONES + (0 if RUNS else _PARAMETER_ROWS)
    up = heads.up + head * (UP_ROWS * 2 * HALF) + column
    up_1 = _load_up(up, 0, KEY_WIDTH, HALF)
    if KEY_SECOND:
        up_2 = _load_up(up, KEY_WIDTH, KEY_WIDTH_2, HALF)
    if KEY_THIRD:
        up_3 = _load_up(up, KEY_WIDTH + KEY_WIDTH_2, KEY_WIDTH_3, HALF)
    if KEY_ONES:
        ones_up = _load_up(up, KEY_FIELDS, 8 * KEY_ONES, HALF)
    if not RUNS:
        parameters_up = _load_up(up, KEY_FIELDS + 8 * KEY_ONES, _PARAMETER_ROWS, HALF)
    turns = heads.turns + distance[:, None] * HALF + pair[None, :]
    cos, sin = tl.load(turns), tl.load(turns + _TILE * HALF)
    if BIAS:
        bias_row = tl.load(heads.bias + (head * _TILE + distance[:, None]) * (2 * HALF) + column)
    if NORM:
        norm_weight = tl.load(heads.norm + head * (2 * HALF) + column)
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
    of_head = heads.factors + head * (1 + BIAS + NORM)
    of_codes, of_more = tl.load(of_head), tl.load(of_head + BIAS + NORM) * unit
    if not NORM:
        of_codes *= unit

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([_TILE, ROWS], tl.float32)
    zeros = tl.zeros([_TILE, ROWS], tl.float32)
    sums_1 = tl.zeros([VALUE_WIDTH_1, ROWS], tl.float32)
    if VALUE_SECOND:
        sums_2 = tl.zeros([VALUE_WIDTH_2, ROWS], tl.float32)
    if VALUE_THIRD:
        sums_3 = tl.zeros([VALUE_WIDTH_3, ROWS], tl.float32)
    if VALUE_ONES:
        ones_sums = tl.zeros([8 * VALUE_ONES, ROWS], tl.float32)

    # Codes come by asynchronous copies. Parameters are loaded one tile ahead, and their block ids two.
    begin, stop = tl.maximum(oldest, first_tile * _TILE), tl.minimum(end, tiles * _TILE)
    position = first_tile * _TILE + distance
    block = _load_blocks(batch, table_stride, sequence, position, begin, stop, BLOCK_SIZE)
    if RUNS:
        of_keys, of_values = heads.key_runs + 5 * head, heads.value_runs + 5 * head
        key_codes_at, key_bytes, key_scales_at = tl.load(of_keys), tl.load(of_keys + 1), tl.load(of_keys + 2)
        value_codes_at, value_bytes = tl.load(of_values), tl.load(of_values + 1)
        value_scales_at = tl.load(of_values + 2)
        if KEY_ONES:
            key_ones_at, key_ones_bytes = tl.load(of_keys + 3), tl.load(of_keys + 4)
        if VALUE_ONES:
            value_ones_at, value_ones_bytes = tl.load(of_values + 3), tl.load(of_values + 4)
        key_octaves, value_octaves = _load_scales(
            heads, block, position, begin, stop, key_scales_at, value_scales_at, BLOCK_SIZE
        )
    else:
        key_scale, key_zero, value_scale, value_zero, outlier = _load_parameters(
            heads, block, position, begin, stop, head, BLOCK_SIZE, KEY_SCALES, KEY_ZEROS, KEY_OUTLIERS, OUTLIERS,
            VALUE_SCALES, VALUE_ZEROS,
        )  # fmt: skip
    next_block = _load_blocks(batch, table_stride, sequence, position + _TILE, begin, stop, BLOCK_SIZE)
    for tile in tl.range(first_tile, tiles, num_stages=STAGES):
        position = tile * _TILE + distance
        valid = (position >= begin) & (position < stop)
        block = _load_blocks(batch, table_stride, sequence, position, begin, stop, BLOCK_SIZE)
        # Codes are loaded as late as can be: registers are scarce while keys are made, per scale and without what meets
        # the scores.
        in_page = block.to(tl.int64) * heads.page_stride
        in_block = position.to(tl.uint32) % BLOCK_SIZE
        keys = tl.zeros([_TILE, 2 * HALF], tl.float32)
        if RUNS:
            ks, of_value = tl.exp2(_octaves(key_octaves)), _octaves(value_octaves)
            inverse = tl.exp2(-of_value)
            key_at = in_page + key_codes_at + in_block * key_bytes
            units = _load_fields(heads.pages, key_at, key_bytes, 0, KEY_UNITS, not KEY_SECOND, PTX)
        else:
            ks, kz, ko = key_scale.to(tl.float32), key_zero.to(tl.float32), outlier.to(tl.float32)
            kz += MIDDLE * ks
            # A scale of 0, or one that is next to nothing: FP16 has room for what is divided by it.
            ks = tl.maximum(ks, tl.maximum(tl.maximum(tl.abs(kz), tl.abs(ko)) * _LEAST_SCALE, _SMALLEST_SCALE))
            per_scale = reciprocal(ks * _PARAMETER_SCALE, PTX)
            keys = tl.dot(_parameters(kz * per_scale, ko * per_scale), parameters_up, keys)
            vs, vz = tl.maximum(value_scale.to(tl.float32), _SMALLEST_SCALE), value_zero.to(tl.float32)
            key_row = heads.pages + in_page + KEY_CODES + (head * BLOCK_SIZE + in_block) * KEY_ROW_BYTES
            units = _load_units(key_row, KEY_UNITS, KEY_ROW_BYTES)
        if MIDDLE:
            units |= tl.where(tl.arange(0, KEY_UNITS) == 0, MIDDLE, 0).to(tl.uint16)[None, :]
        keys = _rematerialized(units, up_1, keys, KEY_UNITS, KEY_BITS, PTX)
        if KEY_SECOND:
            if RUNS:
                units_2 = _load_fields(heads.pages, key_at, key_bytes, KEY_UNITS, KEY_SECOND, not KEY_THIRD, PTX)
            else:
                units_2 = _load_units(key_row + 2 * KEY_UNITS, KEY_SECOND, KEY_ROW_BYTES - 2 * KEY_UNITS)
            keys = _rematerialized(units_2, up_2, keys, KEY_SECOND, KEY_BITS, PTX)
        if KEY_THIRD:
            BEFORE: tl.constexpr = KEY_UNITS + KEY_SECOND
            if RUNS:
                units_3 = _load_fields(heads.pages, key_at, key_bytes, BEFORE, KEY_THIRD, True, PTX)
            else:
                units_3 = _load_units(key_row + 2 * BEFORE, KEY_THIRD, KEY_ROW_BYTES - 2 * BEFORE)
            keys = _rematerialized(units_3, up_3, keys, KEY_THIRD, KEY_BITS, PTX)
        if KEY_ONES:
            if RUNS:
                ones = _load_fields(heads.pages, key_at + key_ones_at, key_ones_bytes, 0, KEY_ONES, False, PTX)
            else:
                ones = _load_units(key_row + KEY_WINDOW, KEY_ONES, KEY_ROW_BYTES - KEY_WINDOW)
            keys = _rematerialized(ones & _UPPER_BITS, ones_up, keys, KEY_ONES, 2, PTX)
        of_key = ks * of_codes
        rounded_keys = keys.to(tl.float16)
        if NORM:
            square = tl.sum(keys * keys, 1) * (of_key * of_key)
            of_key *= tl.rsqrt(square / heads.head_size + heads.eps) * of_more
            rounded_keys *= norm_weight
        low, high = tl.split(tl.permute(tl.reshape(rounded_keys, [_TILE, 2, HALF]), (0, 2, 1)))
        low_key, high_key = turned(low, high, cos, sin, PTX)

        # Queries, turned back to the tile's first position.
        of_tile = tile * (2 * HALF) + 2 * pair
        base_cos, base_sin = tl.load(heads.base + of_tile)[:, None], tl.load(heads.base + (of_tile + 1))[:, None]
        low_turned = (low_query * base_cos + high_query * base_sin).to(tl.float16)
        high_turned = (high_query * base_cos - low_query * base_sin).to(tl.float16)
        query = tl.reshape(tl.permute(tl.join(low_turned, high_turned), (2, 0, 1)), [2 * HALF, ROWS])

        key = tl.reshape(tl.permute(tl.join(low_key, high_key), (0, 2, 1)), [_TILE, 2 * HALF])
        score = tl.dot(key, query) * of_key[:, None]
        if BIAS:
            score += tl.dot(bias_row, query) * of_more
        if SOFT_CAP:
            score = capped(score, scores.soft_cap) * _LOG2E

        # What the next tile needs, as late as can be: registers are scarce while keys are made.
        if RUNS:
            key_octaves, value_octaves = _load_scales(
                heads, next_block, position + _TILE, begin, stop, key_scales_at, value_scales_at, BLOCK_SIZE
            )
        else:
            key_scale, key_zero, value_scale, value_zero, outlier = _load_parameters(
                heads, next_block, position + _TILE, begin, stop, head, BLOCK_SIZE, KEY_SCALES, KEY_ZEROS,
                KEY_OUTLIERS, OUTLIERS, VALUE_SCALES, VALUE_ZEROS,
            )  # fmt: skip
        next_block = _load_blocks(batch, table_stride, sequence, position + 2 * _TILE, begin, stop, BLOCK_SIZE)

        # Weights times scales of values. Of these, not of weights, the largest is 1, so that FP16 has room for them.
        visible = valid[:, None]
        if not SINGLE:
            visible &= position[:, None] <= query_position[None, :]
            if WINDOW:
                visible &= position[:, None] > query_position[None, :] - scores.window
        if not RUNS:
            of_value = binary_logarithm(vs, PTX)
        score = tl.where(visible, score + of_value[:, None], float("-inf"))
        now = tl.maximum(largest, tl.max(score, 0))
        shift = tl.where(now == float("-inf"), 0.0, now)
        weight = tl.exp2(score - shift[None, :])
        decay = tl.exp2(largest - shift)[None, :]
        largest = now
        if RUNS:
            zeros = zeros * decay + weight
        else:
            inverse = reciprocal(vs, PTX)
            zeros = zeros * decay + weight * (vz * inverse)[:, None]
        total = total * decay + weight * inverse[:, None]

        if RUNS:
            value_at = in_page + value_codes_at + in_block * value_bytes
            value_units = _load_fields(heads.pages, value_at, value_bytes, 0, VALUE_UNITS, False, PTX)
        else:
            value_row = heads.pages + in_page + VALUE_CODES + (head * BLOCK_SIZE + in_block) * VALUE_ROW_BYTES
            value_units = _load_units(value_row, VALUE_UNITS, VALUE_ROW_BYTES)
        sums_1 = _weighed(value_units, weight, sums_1 * decay, VALUE_UNITS, VALUE_BITS, PTX)
        if VALUE_SECOND:
            if RUNS:
                value_units_2 = _load_fields(heads.pages, value_at, value_bytes, VALUE_UNITS, VALUE_SECOND, False, PTX)
            else:
                value_units_2 = _load_units(
                    value_row + 2 * VALUE_UNITS, VALUE_SECOND, VALUE_ROW_BYTES - 2 * VALUE_UNITS
                )
            sums_2 = _weighed(value_units_2, weight, sums_2 * decay, VALUE_SECOND, VALUE_BITS, PTX)
        if VALUE_THIRD:
            FIRST: tl.constexpr = VALUE_UNITS + VALUE_SECOND
            if RUNS:
                value_units_3 = _load_fields(heads.pages, value_at, value_bytes, FIRST, VALUE_THIRD, False, PTX)
            else:
                value_units_3 = _load_units(value_row + 2 * FIRST, VALUE_THIRD, VALUE_ROW_BYTES - 2 * FIRST)
            sums_3 = _weighed(value_units_3, weight, sums_3 * decay, VALUE_THIRD, VALUE_BITS, PTX)
        if VALUE_ONES:
            if RUNS:
                ones_at = value_at + value_ones_at
                value_ones = _load_fields(heads.pages, ones_at, value_ones_bytes, 0, VALUE_ONES, False, PTX)
            else:
                value_ones = _load_units(value_row + VALUE_WINDOW, VALUE_ONES, VALUE_ROW_BYTES - VALUE_WINDOW)
            ones_sums = _weighed(value_ones & _UPPER_BITS, weight, ones_sums * decay, VALUE_ONES, 2, PTX)

    stats = partial.stats + share.to(tl.int64) * 3
    tl.store(stats, largest * _LN2, row_valid)
    tl.store(stats + 1, tl.sum(total, 0), row_valid)
    tl.store(stats + 2, tl.sum(zeros, 0), row_valid)
    at = partial.sums + share.to(tl.int64)[None, :] * VALUE_WIDTH
    if RUNS or VALUE_ONES:
        tl.store(at + tl.arange(0, VALUE_WIDTH_1)[:, None], sums_1 * _SUBNORMAL, row_valid[None, :])
        if VALUE_SECOND:
            field = VALUE_WIDTH_1 + tl.arange(0, VALUE_WIDTH_2)
            tl.store(at + field[:, None], sums_2 * _SUBNORMAL, row_valid[None, :])
        if VALUE_THIRD:
            field = VALUE_WIDTH_1 + VALUE_WIDTH_2 + tl.arange(0, VALUE_WIDTH_3)
            tl.store(at + field[:, None], sums_3 * _SUBNORMAL, row_valid[None, :])
        if VALUE_ONES:
            field = VALUE_WIDTH_1 + VALUE_WIDTH_2 + VALUE_WIDTH_3 + tl.arange(0, 8 * VALUE_ONES)
            tl.store(at + field[:, None], ones_sums * _SUBNORMAL, row_valid[None, :])
    else:
        CHANNELS: tl.constexpr = VALUE_ROW_BYTES * 8 // VALUE_BITS
        if VALUE_WIDTH > CHANNELS:  # ``merge`` multiplies what is behind the channels by 0
            column = tl.arange(0, VALUE_WIDTH)
            behind = row_valid[None, :] & (column >= CHANNELS)[:, None]
            tl.store(at + column[:, None], tl.zeros([VALUE_WIDTH, ROWS], tl.float32), behind)
        channel, factor = channels_of(VALUE_UNITS, VALUE_ROW_BYTES, VALUE_BITS)
        tl.store(at + channel[:, None], sums_1 * factor[:, None], row_valid[None, :] & (channel >= 0)[:, None])
