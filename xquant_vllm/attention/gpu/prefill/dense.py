"""Flash attention of prefilling sequences over rematerialized keys and values, a span of the context after another."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.softmax import to_scores, weigh
from xquant_vllm.attention.gpu.prefill.rematerialize_pages import load_span


class Carried(NamedTuple):
    """What is carried from one span of a sequence to the next, FP32."""

    sums: Any  # [tokens, num_heads, head_size]
    largest: Any  # [tokens, num_heads]
    total: Any  # [tokens, num_heads]


@triton.jit
def dense(
    spans,
    batch,
    keys,
    values,
    carried,
    sinks,
    scores,
    output,
    token_stride,
    head_stride,
    num_kv_heads,
    head_size,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to one span, for one query head and a tile of query tokens.

    Grid: ``(tiles of queries, spans, num_heads)``. Reads queries, ``keys`` and ``values``, and ``carried`` unless the
    span is its sequence's first. Writes ``output`` if it is the last, else ``carried``.

    Args:
        QUERIES: query tokens of a tile.
        TOKENS: cached tokens of a tile.
        WIDTH: a power of two of at least 16 and ``head_size``.
    """
    head = tl.program_id(2)
    sequence, begin, stop, offset, is_first, is_last, _ = load_span(spans, tl.program_id(1))
    first_query = tl.load(batch.query_start_loc + sequence)
    query_len = tl.load(batch.query_start_loc + sequence + 1) - first_query
    tile_first = tl.program_id(0) * QUERIES
    if tile_first >= query_len:
        return
    past = tl.load(batch.seq_lens + sequence) - query_len
    token = tile_first + tl.arange(0, QUERIES)
    row_valid = token < query_len
    position = past + token
    channel = tl.arange(0, WIDTH)
    there = row_valid[:, None] & (channel < head_size)[None, :]
    of_token = (first_query + token).to(tl.int64)
    query = tl.load(
        batch.query + (of_token * batch.token_stride + head * batch.head_stride)[:, None] + channel[None, :], there, 0.0
    ).to(DTYPE)
    row = of_token * batch.num_heads + head

    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, WIDTH], tl.float32)
    if is_first == 0:
        largest = tl.load(carried.largest + row, row_valid, float("-inf"))
        total = tl.load(carried.total + row, row_valid, 0.0)
        sums = tl.load(carried.sums + row[:, None] * head_size + channel[None, :], there, 0.0)

    end = tl.minimum(stop, past + tl.minimum(tile_first + QUERIES, query_len))
    start = begin
    if WINDOW:
        start = tl.maximum(begin, past + tile_first - scores.window + 1)
    for tile in range(start, end, TOKENS):
        key_position = tile + tl.arange(0, TOKENS)
        valid = key_position < end
        at = ((offset + key_position - begin).to(tl.int64) * num_kv_heads + head // GROUP) * head_size
        of_key = at[:, None] + channel[None, :]
        key_there = valid[:, None] & (channel < head_size)[None, :]
        key = tl.load(keys + of_key, key_there, 0.0)
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        score = to_scores(product, scores, SOFT_CAP)
        visible = valid[None, :] & (key_position[None, :] <= position[:, None])
        if WINDOW:
            visible &= key_position[None, :] > position[:, None] - scores.window
        weight, decay, largest, total = weigh(score, visible, largest, total)
        value = tl.load(values + of_key, key_there, 0.0)
        sums = sums * decay[:, None] + tl.dot(weight.to(DTYPE), value, input_precision=PRECISION)

    if is_last == 0:
        tl.store(carried.largest + row, largest, row_valid)
        tl.store(carried.total + row, total, row_valid)
        tl.store(carried.sums + row[:, None] * head_size + channel[None, :], sums, there)
    else:
        if SINKS:
            total += tl.exp(tl.load(sinks + head) - largest)
        result = sums / tl.where(row_valid, total, 1.0)[:, None]
        at = output + (of_token * token_stride + head * head_stride)[:, None] + channel[None, :]
        tl.store(at, result.to(output.dtype.element_ty), there)
