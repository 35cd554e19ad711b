"""The attention kernel: flash attention over quantized and residual pages, cached tokens in splits.

A program has one kv head, a tile of one sequence's query tokens with all query heads of the kv head, and a share
(*split*) of the cached tokens. Tokens before the first that any of its queries sees exactly are a loop of their own,
which never looks at residual pages.
"""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.query_tile import rows_of_tile, seen_by_tile
from xquant_vllm.attention.gpu.device.softmax import to_scores, weigh
from xquant_vllm.kivi.gpu.load import (
    exact_rows,
    first_exact,
    key_channels,
    load_exact_keys,
    load_quantized_keys,
    load_quantized_values,
    value_channels,
)


@triton.jit
def _products(low_query, high_query, low, high, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Of queries with keys, both in halves, ``[rows, tokens]`` FP32."""
    product = tl.dot(low_query, tl.trans(low.to(DTYPE)), input_precision=PRECISION)
    return product + tl.dot(high_query, tl.trans(high.to(DTYPE)), input_precision=PRECISION)


@triton.jit(do_not_specialize=["table_stride", "residual_stride", "first_sequence", "query_tiles", "splits"])
def kivi_attend(
    batch,
    columns,
    quantized,
    residual,
    tail,
    scores,
    residual_tokens,
    table_stride,
    residual_stride,
    partial,
    output,
    token_stride,
    head_stride,
    first_sequence,
    query_tiles,
    splits,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    SPLIT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NATURAL: tl.constexpr,
    EXACT_STEP: tl.constexpr,
    ROPE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend over one split of one sequence, for one kv head and a tile of query tokens.

    Grid: ``(sequences * query_tiles, num_kv_heads, splits)``. Reads queries and both kinds of pages. Writes ``partial``
    if ``SPLIT``, else ``output``. Names are those of attention/gpu/device, and:

    Args:
        batch: its block table is that of the quantized pages.
        columns: read unless ``NATURAL``.
        tail: for RoPE.
        residual_tokens: R.
        table_stride: of the quantized pages' block table.
        residual_stride: of the residual pages' block table.
        first_sequence: sequence of the first program.
        query_tiles: tiles of query tokens that a sequence may have.
        splits: of a sequence; 1 unless ``SPLIT``.
        TOKENS: cached tokens of a tile; divides ``KEY_GROUP``.
        HEAD_SIZE: channels of a head.
        BITS: bits of a code.
        KEY_GROUP: tokens of a group of keys.
        VALUE_GROUP: channels of a group of values.
        VALUE_GROUPS: groups of a value, padded to a power of two.
        VALUE_CHANNELS: channels of a group, padded to a power of two.
        RESIDUAL: dtype of residual pages.
        NATURAL: whether halves of keys are their channels in order.
        EXACT_STEP: whether queries see the tokens of their own step exactly.
    """
    sequence, tile = first_sequence + tl.program_id(0) // query_tiles, tl.program_id(0) % query_tiles
    head, split = tl.program_id(1), tl.program_id(2)
    first_query = tl.load(batch.query_start_loc + sequence)
    query_len = tl.load(batch.query_start_loc + sequence + 1) - first_query
    tile_tokens: tl.constexpr = ROWS // GROUP
    tile_first = tile * tile_tokens
    if tile_first >= query_len:
        return
    past = tl.load(batch.seq_lens + sequence) - query_len
    token, query_head, row_valid, query_position, _ = rows_of_tile(
        batch, first_query, query_len, past, head, tile_first, GROUP, ROWS, tile_tokens
    )
    row = (first_query + token).to(tl.int64) * batch.num_heads + query_head

    oldest, end = seen_by_tile(scores, past, query_len, tile_first, tile_tokens, WINDOW)
    # Tiles lie in one group of keys: they start at multiples of their size.
    first_tile = oldest // TOKENS * TOKENS
    of_split = tl.cdiv(tl.cdiv(end - first_tile, TOKENS), splits) * TOKENS
    begin = first_tile + split * of_split
    stop = tl.minimum(end, begin + of_split)
    if SPLIT:
        stats = partial.stats + (row * splits + split) * 3
        if begin >= stop:
            tl.store(stats, tl.full([ROWS], float("-inf"), tl.float32), row_valid)
            return

    # Of all rows: keys before last_key and values before last_value are read quantized, others from the first ones on.
    first_key, first_value = first_exact(past + tile_first, past, residual_tokens, EXACT_STEP)
    last_key, last_value = first_exact(end - 1, past, residual_tokens, EXACT_STEP)
    exact_key, exact_value = first_exact(query_position, past, residual_tokens, EXACT_STEP)
    exact_begin = tl.maximum(begin, first_value // TOKENS * TOKENS)

    low_channel, high_channel, channel_there = key_channels(columns, HEAD_SIZE, HALF, NATURAL)
    value_channel, value_there = value_channels(HEAD_SIZE, VALUE_GROUP, VALUE_GROUPS, VALUE_CHANNELS)
    at = (first_query + token).to(tl.int64) * batch.token_stride + query_head * batch.head_stride
    query, there = (batch.query + at)[:, None], row_valid[:, None] & channel_there[None, :]
    low_query = tl.load(query + low_channel[None, :], there, 0.0).to(DTYPE)
    high_query = tl.load(query + high_channel[None, :], there, 0.0).to(DTYPE)
    table = batch.block_table + sequence.to(tl.int64) * table_stride
    residual_table = residual.block_table + sequence.to(tl.int64) * residual_stride

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_GROUPS * VALUE_CHANNELS], tl.float32)
    for start in range(begin, tl.minimum(stop, exact_begin), TOKENS):
        position = start + tl.arange(0, TOKENS)
        valid = position >= oldest
        low, high = load_quantized_keys(
            quantized, table, tail, low_channel, high_channel, channel_there, head, start, valid, HEAD_SIZE, BITS,
            KEY_GROUP, TOKENS, HALF, ROPE,
        )  # fmt: skip
        score = to_scores(_products(low_query, high_query, low, high, DTYPE, PRECISION), scores, SOFT_CAP)
        visible = valid[None, :]
        if WINDOW:
            visible &= position[None, :] > query_position[:, None] - scores.window
        weight, decay, largest, total = weigh(score, visible, largest, total)
        value = load_quantized_values(
            quantized, table, head, start, valid, HEAD_SIZE, BITS, VALUE_GROUP, VALUE_GROUPS, VALUE_CHANNELS, TOKENS
        )
        sums = sums * decay[:, None] + tl.dot(weight.to(DTYPE), value.to(DTYPE), input_precision=PRECISION)

    for start in range(exact_begin, stop, TOKENS):
        position = start + tl.arange(0, TOKENS)
        valid = (position >= oldest) & (position < stop)
        product = tl.zeros([ROWS, TOKENS], tl.float32)
        if start < last_key:
            low, high = load_quantized_keys(
                quantized, table, tail, low_channel, high_channel, channel_there, head, start, valid, HEAD_SIZE, BITS,
                KEY_GROUP, TOKENS, HALF, ROPE,
            )  # fmt: skip
            product = _products(low_query, high_query, low, high, DTYPE, PRECISION)
        if start + TOKENS > first_key:
            low, high = load_exact_keys(
                residual, residual_table, tail, low_channel, high_channel, channel_there, head, position,
                valid & (position >= first_key), HEAD_SIZE, HALF, ROPE, RESIDUAL,
            )  # fmt: skip
            exact = _products(low_query, high_query, low, high, DTYPE, PRECISION)
            product = tl.where(position[None, :] >= exact_key[:, None], exact, product)
        score = to_scores(product, scores, SOFT_CAP)
        visible = valid[None, :] & (position[None, :] <= query_position[:, None])
        if WINDOW:
            visible &= position[None, :] > query_position[:, None] - scores.window
        weight, decay, largest, total = weigh(score, visible, largest, total)
        sums *= decay[:, None]
        if start < last_value:
            of_quantized = tl.where(position[None, :] < exact_value[:, None], weight, 0.0)
            value = load_quantized_values(
                quantized, table, head, start, valid, HEAD_SIZE, BITS, VALUE_GROUP, VALUE_GROUPS, VALUE_CHANNELS, TOKENS
            )
            sums += tl.dot(of_quantized.to(DTYPE), value.to(DTYPE), input_precision=PRECISION)
            weight -= of_quantized
        valid &= position >= first_value
        values = exact_rows(
            residual, residual.values_at, residual_table, head, position, valid, HEAD_SIZE, RESIDUAL
        )[:, None]  # fmt: skip
        value = tl.load(values + value_channel[None, :], valid[:, None] & value_there[None, :], 0.0)
        sums += tl.dot(weight.to(DTYPE), value.to(DTYPE), input_precision=PRECISION)

    if SPLIT:
        tl.store(stats, largest, row_valid)
        tl.store(stats + 1, total, row_valid)
        width: tl.constexpr = VALUE_GROUPS * VALUE_CHANNELS
        at = partial.sums + (row * splits + split)[:, None] * width + tl.arange(0, width)[None, :]
        tl.store(at, sums, row_valid[:, None])
    else:
        # A query always sees itself; only padding rows would divide by 0.
        result = sums / tl.where(row_valid, total, 1.0)[:, None]
        at = output + ((first_query + token).to(tl.int64) * token_stride + query_head * head_stride)[:, None]
        there = row_valid[:, None] & value_there[None, :]
        tl.store(at + value_channel[None, :], result.to(output.dtype.element_ty), there)
