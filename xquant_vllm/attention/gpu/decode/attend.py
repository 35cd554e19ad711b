"""The attention kernel: split-KV flash attention over pages of latents.

A program has one kv head, a tile of one sequence's query tokens with all query heads of the kv head, and a share
(*split*) of the cached tokens. It leaves a partial result that decode/merge.py puts together with those of others.
"""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.query_tile import rows_of_tile, seen_by_tile
from xquant_vllm.attention.gpu.device.rematerialize import finish_keys, project_both, project_pairs
from xquant_vllm.attention.gpu.device.softmax import to_scores, weigh
from xquant_vllm.attention.gpu.device.unpack import HAS_UNIFORM, load_band, load_outlier


@triton.jit
def _absorbed_scores(
    absorbed,
    pages,
    key,
    first,
    last,
    block,
    within,
    valid,
    row,
    row_valid,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    HIGH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of absorbed queries with latents, ``[ROWS, TOKENS]`` FP32; ``row`` indexes ``[tokens, num_heads]``."""
    product = tl.zeros([ROWS, TOKENS], tl.float32)
    for band in range(first, last):
        page, number, scale, zero = load_band(pages, key, band, block, within, valid, WIDTH, KINDS, HIGH)
        number = number.to(DTYPE)
        of_band = row.to(tl.int64) * absorbed.most_bands + (band - first)
        at = absorbed.query + of_band[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        query = tl.load(at, row_valid[:, None], 0.0)
        product += tl.dot(query, tl.trans(number), input_precision=PRECISION) * scale[None, :]
        sums = absorbed.sums + of_band * (1 + OUTLIERS)
        if HAS_UNIFORM & KINDS:
            product += tl.load(sums, row_valid, 0.0)[:, None] * zero[None, :]
        for channel in tl.static_range(OUTLIERS):
            exact = load_outlier(key, band, channel, pages, page, within, valid)
            product += tl.load(sums + 1 + channel, row_valid, 0.0)[:, None] * exact[None, :]
    return product


@triton.jit(do_not_specialize=["table_stride", "query_tiles", "splits"])
def attend(
    batch,
    columns,
    pages,
    key,
    tail,
    value,
    absorbed,
    partial,
    scores,
    table_stride,
    query_tiles,
    splits,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    KEY_KINDS: tl.constexpr,
    KEY_HIGH: tl.constexpr,
    KEY_OUTLIERS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_KINDS: tl.constexpr,
    VALUE_HIGH: tl.constexpr,
    VALUE_OUTLIERS: tl.constexpr,
    ABSORB_KEY: tl.constexpr,
    ABSORB_VALUE: tl.constexpr,
    SHARED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend over one split of one sequence, for one kv head and a tile of query tokens.

    Grid: ``(sequences * query_tiles, num_kv_heads, splits)``; ``query_tiles`` is how many tiles of query tokens a
    sequence may have. Reads queries and pages, and ``absorbed`` if ``ABSORB_KEY``; writes ``partial``.

    Args:
        ABSORB_KEY: whether queries score against latents.
        ABSORB_VALUE: whether latents are weighed, not values; they are then one band without outliers.
        SHARED: whether keys and values are projections of one latent, with bands alike; neither is then absorbed.
    """
    sequence, tile = tl.program_id(0) // query_tiles, tl.program_id(0) % query_tiles
    head, split = tl.program_id(1), tl.program_id(2)
    first_query = tl.load(batch.query_start_loc + sequence)
    query_len = tl.load(batch.query_start_loc + sequence + 1) - first_query
    tile_tokens: tl.constexpr = ROWS // GROUP
    tile_first = tile * tile_tokens
    if tile_first >= query_len:
        return
    past = tl.load(batch.seq_lens + sequence) - query_len
    token, query_head, row_valid, query_position, row = rows_of_tile(
        batch, first_query, query_len, past, head, tile_first, GROUP, ROWS, tile_tokens
    )

    oldest, end = seen_by_tile(scores, past, query_len, tile_first, tile_tokens, WINDOW)
    tiles = tl.cdiv(end - oldest, TOKENS)
    of_split = tl.cdiv(tiles, splits) * TOKENS
    begin = oldest + split * of_split
    stop = tl.minimum(end, begin + of_split)

    stats = partial.stats + (row.to(tl.int64) * splits + split) * 3
    if begin >= stop:
        tl.store(stats, tl.full([ROWS], float("-inf"), tl.float32), row_valid)
        return

    half = tl.arange(0, HALF)
    if not ABSORB_KEY:
        at = (first_query + token).to(tl.int64) * batch.token_stride + query_head * batch.head_stride
        low_column, high_column = tl.load(columns + half), tl.load(columns + HALF + half)
        query = batch.query + at
        low_query = tl.load(
            query[:, None] + low_column[None, :], row_valid[:, None] & (low_column >= 0)[None, :], 0.0
        ).to(DTYPE)
        high_query = tl.load(
            query[:, None] + high_column[None, :], row_valid[:, None] & (high_column >= 0)[None, :], 0.0
        ).to(DTYPE)
    key_first, key_last = tl.load(key.first_band + head), tl.load(key.first_band + head + 1)
    value_first, value_last = tl.load(value.first_band + head), tl.load(value.first_band + head + 1)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    zeros = tl.zeros([ROWS], tl.float32)
    if ABSORB_VALUE:
        sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    else:
        low_sums = tl.zeros([ROWS, HALF], tl.float32)
        high_sums = tl.zeros([ROWS, HALF], tl.float32)
    for start in range(begin, stop, TOKENS):
        position = start + tl.arange(0, TOKENS)
        valid = position < stop
        of_table = batch.block_table + sequence.to(tl.int64) * table_stride + position // pages.block_size
        block = tl.load(of_table, valid, 0).to(tl.int64)
        within = position % pages.block_size
        if ABSORB_KEY:
            product = _absorbed_scores(
                absorbed, pages, key, key_first, key_last, block, within, valid, row, row_valid, ROWS, TOKENS,
                KEY_WIDTH, KEY_KINDS, KEY_HIGH, KEY_OUTLIERS, DTYPE, PRECISION,
            )  # fmt: skip
        else:
            if SHARED:
                low, high, low_value, high_value = project_both(
                    pages, key, value, key_first, key_last, block, within, valid, TOKENS, HALF, KEY_WIDTH, KEY_KINDS,
                    KEY_HIGH, KEY_OUTLIERS, DTYPE, PRECISION,
                )  # fmt: skip
            else:
                low, high = project_pairs(
                    pages, key, key_first, key_last, block, within, valid, TOKENS, HALF, KEY_WIDTH, KEY_KINDS,
                    KEY_HIGH, KEY_OUTLIERS, DTYPE, PRECISION,
                )  # fmt: skip
            low, high = finish_keys(low, high, tail, head, position, valid, HALF, BIAS, NORM, ROPE)
            product = tl.dot(low_query, tl.trans(low.to(DTYPE)), input_precision=PRECISION)
            product += tl.dot(high_query, tl.trans(high.to(DTYPE)), input_precision=PRECISION)
        score = to_scores(product, scores, SOFT_CAP)
        visible = valid[None, :] & (position[None, :] <= query_position[:, None])
        if WINDOW:
            visible &= position[None, :] > query_position[:, None] - scores.window
        weight, decay, largest, total = weigh(score, visible, largest, total)
        if ABSORB_VALUE:
            _, number, scale, zero = load_band(
                pages, value, value_first, block, within, valid, VALUE_WIDTH, VALUE_KINDS, VALUE_HIGH
            )
            number = number.to(DTYPE)
            # FP16 has no room for weights times small scales.
            largest_scale = tl.max(scale, 0)
            largest_scale = tl.where(largest_scale > 0, largest_scale, 1.0)
            weighed = (weight * (scale / largest_scale)[None, :]).to(DTYPE)
            sums = sums * decay[:, None] + largest_scale * tl.dot(weighed, number, input_precision=PRECISION)
            zeros = zeros * decay + tl.sum(weight * zero[None, :], 1)
        else:
            if not SHARED:
                low_value, high_value = project_pairs(
                    pages, value, value_first, value_last, block, within, valid, TOKENS, HALF, VALUE_WIDTH,
                    VALUE_KINDS, VALUE_HIGH, VALUE_OUTLIERS, DTYPE, PRECISION,
                )  # fmt: skip
            weighed = weight.to(DTYPE)
            low_sums = low_sums * decay[:, None] + tl.dot(weighed, low_value.to(DTYPE), input_precision=PRECISION)
            high_sums = high_sums * decay[:, None] + tl.dot(weighed, high_value.to(DTYPE), input_precision=PRECISION)

    tl.store(stats, largest, row_valid)
    tl.store(stats + 1, total, row_valid)
    tl.store(stats + 2, zeros, row_valid)
    at = partial.sums + (row.to(tl.int64) * splits + split)[:, None] * (VALUE_WIDTH if ABSORB_VALUE else 2 * HALF)
    if ABSORB_VALUE:
        tl.store(at + tl.arange(0, VALUE_WIDTH)[None, :], sums, row_valid[:, None])
    else:
        tl.store(at + half[None, :], low_sums, row_valid[:, None])
        tl.store(at + HALF + half[None, :], high_sums, row_valid[:, None])
