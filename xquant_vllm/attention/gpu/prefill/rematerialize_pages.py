"""Keys and values of cached tokens, written to a workspace: what prefill attends to."""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.rematerialize import finish_keys, project_both, project_pairs, store_pairs
from xquant_vllm.attention.gpu.device.unpack import load_band
from xquant_vllm.attention.gpu.prefill.spans import SPAN_FIELDS

_FIELDS = tl.constexpr(len(SPAN_FIELDS))


@triton.jit
def load_span(spans, index):
    """A span's description, in the order of ``SPAN_FIELDS``."""
    of_span = spans + index * _FIELDS
    return (
        tl.load(of_span),
        tl.load(of_span + 1),
        tl.load(of_span + 2),
        tl.load(of_span + 3),
        tl.load(of_span + 4),
        tl.load(of_span + 5),
        tl.load(of_span + 6),
    )


@triton.jit(do_not_specialize=["table_stride"])
def rematerialize_pages(
    spans,
    columns,
    value_columns,
    pages,
    seq_lens,
    block_table,
    table_stride,
    key,
    tail,
    value,
    value_factors,
    value_bias,
    keys,
    values,
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
    BIAS: tl.constexpr,
    PROJECT_VALUE: tl.constexpr,
    SHARED: tl.constexpr,
    VALUE_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rematerialize a tile of one span, for one kv head.

    Grid: ``(tiles, spans, num_kv_heads)``. Reads pages; writes ``keys`` and ``values``. ``seq_lens`` says what is
    there: the host may take a sequence for longer than it is.

    Args:
        value_factors: read unless ``PROJECT_VALUE``.
        PROJECT_VALUE: whether values are made by an up-projection; else value latents, of one band without outliers,
            are the values.
        SHARED: whether keys and values are projections of one latent, with bands alike.
    """
    head = tl.program_id(2)
    sequence, begin, stop, offset, _, _, exact = load_span(spans, tl.program_id(1))
    stop = tl.minimum(tl.minimum(stop, exact), tl.load(seq_lens + sequence))
    start = begin + tl.program_id(0) * TOKENS
    if start >= stop:
        return
    position = start + tl.arange(0, TOKENS)
    valid = position < stop
    of_table = block_table + sequence.to(tl.int64) * table_stride + position // pages.block_size
    block = tl.load(of_table, valid, 0).to(tl.int64)
    within = position % pages.block_size
    row = ((offset + position - begin).to(tl.int64) * tl.num_programs(2) + head)[:, None] * tail.head_size

    first, last = tl.load(key.first_band + head), tl.load(key.first_band + head + 1)
    if SHARED:
        low, high, low_value, high_value = project_both(
            pages, key, value, first, last, block, within, valid, TOKENS, HALF, KEY_WIDTH, KEY_KINDS, KEY_HIGH,
            KEY_OUTLIERS, DTYPE, PRECISION,
        )  # fmt: skip
    else:
        low, high = project_pairs(
            pages, key, first, last, block, within, valid, TOKENS, HALF, KEY_WIDTH, KEY_KINDS, KEY_HIGH, KEY_OUTLIERS,
            DTYPE, PRECISION,
        )  # fmt: skip
    low, high = finish_keys(low, high, tail, head, position, valid, HALF, BIAS, NORM, ROPE)
    store_pairs(keys, columns, row, low, high, valid, HALF, DTYPE)

    if PROJECT_VALUE:
        if not SHARED:
            first, last = tl.load(value.first_band + head), tl.load(value.first_band + head + 1)
            low_value, high_value = project_pairs(
                pages, value, first, last, block, within, valid, TOKENS, HALF, VALUE_WIDTH, VALUE_KINDS, VALUE_HIGH,
                VALUE_OUTLIERS, DTYPE, PRECISION,
            )  # fmt: skip
        if VALUE_BIAS:
            at = value_bias + head * (2 * HALF) + tl.arange(0, HALF)
            low_value += tl.load(at)[None, :]
            high_value += tl.load(at + HALF)[None, :]
        store_pairs(values, value_columns, row, low_value, high_value, valid, HALF, DTYPE)
    else:
        _store_latents(
            pages, value, value_factors, value_bias, values + row, tail.head_size, head, block, within, valid, HALF,
            VALUE_WIDTH, VALUE_KINDS, VALUE_HIGH, VALUE_BIAS, DTYPE,
        )  # fmt: skip


@triton.jit
def _store_latents(
    pages,
    value,
    factors,
    bias,
    to,
    head_size,
    head,
    block,
    within,
    valid,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    HIGH: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write a tile's value latents, of one band without outliers, as values of kv head ``head``.

    Args:
        factors: ``value_factors``.
        bias: ``value_bias``.
        to: rows to write, pointers ``[TOKENS, 1]``.
        DTYPE: of the values.
    """
    band = tl.load(value.first_band + head)
    _, number, scale, zero = load_band(pages, value, band, block, within, valid, WIDTH, KINDS, HIGH)
    channel = tl.arange(0, WIDTH)
    latent = number * tl.load(factors + head * (2 * HALF) + channel)[None, :] * scale[:, None] + zero[:, None]
    if BIAS:
        latent += tl.load(bias + head * (2 * HALF) + channel)[None, :]
    tl.store(to + channel[None, :], latent.to(DTYPE), valid[:, None] & (channel < head_size)[None, :])
    if WIDTH < 2 * HALF:
        # Channels that are not stored, if there are any behind the others.
        channel = tl.arange(0, 2 * HALF)
        rest = tl.zeros([2 * HALF], tl.float32)
        if BIAS:
            rest += tl.load(bias + head * (2 * HALF) + channel)
        missing = valid[:, None] & ((channel >= WIDTH) & (channel < head_size))[None, :]
        tl.store(to + channel[None, :], rest.to(DTYPE)[None, :], missing)
