"""Device functions: keys and values of a tile of cached tokens, from either kind of pages, FP32."""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.rematerialize import finish_keys


@triton.jit
def first_exact(position, step_start, residual_tokens, EXACT_STEP: tl.constexpr):
    """First exact key and value of queries, as :meth:`KiviLayerPlan.first_exact` says; neither falls with position."""
    cached = position + 1
    keys = cached - cached % residual_tokens
    values = tl.maximum(cached - residual_tokens, 0)
    if EXACT_STEP:
        keys, values = tl.minimum(keys, step_start), tl.minimum(values, step_start)
    return keys, values


@triton.jit
def key_channels(columns, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, NATURAL: tl.constexpr):
    """Channels of both halves of a key, and which of them there are, ``[HALF]``.

    Halves in natural order are computed: so the compiler knows that neighbours are neighbours in memory.
    """
    half = tl.arange(0, HALF)
    if NATURAL:
        low, high = half, HEAD_SIZE // 2 + half
    else:
        low, high = tl.load(columns + half), tl.load(columns + HALF + half)
    return low, high, half < HEAD_SIZE // 2


@triton.jit
def value_channels(
    HEAD_SIZE: tl.constexpr, VALUE_GROUP: tl.constexpr, VALUE_GROUPS: tl.constexpr, VALUE_CHANNELS: tl.constexpr
):
    """Channels of a value's columns, and which of them there are, ``[VALUE_GROUPS * VALUE_CHANNELS]``."""
    column = tl.arange(0, VALUE_GROUPS * VALUE_CHANNELS)
    within = column % VALUE_CHANNELS
    channel = column // VALUE_CHANNELS * VALUE_GROUP + within
    return channel, (within < VALUE_GROUP) & (channel < HEAD_SIZE)


@triton.jit
def load_codes(row, channel, there, ROW_BYTES: tl.constexpr, BITS: tl.constexpr):
    """Codes of channels that are packed as one group, int32; byte i holds channels i, ``ROW_BYTES`` + i, ..."""
    byte = tl.load(row + channel % ROW_BYTES, there, 0).to(tl.int32)
    return (byte >> (channel // ROW_BYTES * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _page_of(quantized, table, start):
    """The page of the token at ``start``, and its slot; ``table`` is the sequence's row of the block table."""
    block = tl.load(table + start // quantized.block_size).to(tl.int64)
    return quantized.pages + block * quantized.stride, start % quantized.block_size


@triton.jit
def load_quantized_keys(
    quantized,
    table,
    tail,
    low_channel,
    high_channel,
    channel_there,
    head,
    start,
    valid,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Halves of the keys of the tile at position ``start``, ``[TOKENS, HALF]``; the tile's group of keys is complete.

    Args:
        table: the sequence's row of the block table.
        low_channel: channels of the first half, ``[HALF]``; of the second ``high_channel``.
        channel_there: which of them there are.
        start: a multiple of ``TOKENS``.
        valid: tokens whose positions RoPE may look up; the keys of others are arbitrary.
    """
    row_bytes: tl.constexpr = HEAD_SIZE * BITS // 8
    page, slot = _page_of(quantized, table, start)
    token = tl.arange(0, TOKENS)
    row = (page + (head * quantized.block_size + slot + token) * row_bytes)[:, None]
    of_group = (head * (quantized.block_size // KEY_GROUP) + slot // KEY_GROUP) * HEAD_SIZE
    scales = (page + quantized.key_scales).to(tl.pointer_type(tl.float16)) + of_group
    zeros = (page + quantized.key_zeros).to(tl.pointer_type(tl.float16)) + of_group
    there = channel_there[None, :]
    low = load_codes(row, low_channel[None, :], there, row_bytes, BITS).to(tl.float32)
    high = load_codes(row, high_channel[None, :], there, row_bytes, BITS).to(tl.float32)
    scale, zero = tl.load(scales + low_channel, channel_there, 0.0), tl.load(zeros + low_channel, channel_there, 0.0)
    low = low * scale.to(tl.float32)[None, :] + zero.to(tl.float32)[None, :]
    scale, zero = tl.load(scales + high_channel, channel_there, 0.0), tl.load(zeros + high_channel, channel_there, 0.0)
    high = high * scale.to(tl.float32)[None, :] + zero.to(tl.float32)[None, :]
    return finish_keys(low, high, tail, head, start + token, valid, HALF, False, False, ROPE)


@triton.jit
def load_quantized_values(
    quantized,
    table,
    head,
    start,
    valid,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Values of the tile at position ``start``, ``[TOKENS, VALUE_GROUPS * VALUE_CHANNELS]``; 0 where not ``valid``.

    ``table`` is the sequence's row of the block table, ``start`` a multiple of ``TOKENS``.
    """
    row_bytes: tl.constexpr = VALUE_GROUP * BITS // 8
    groups: tl.constexpr = HEAD_SIZE // VALUE_GROUP
    page, slot = _page_of(quantized, table, start)
    slot += tl.arange(0, TOKENS)
    group, channel = tl.arange(0, VALUE_GROUPS), tl.arange(0, VALUE_CHANNELS)
    there = valid[:, None] & (group < groups)[None, :]
    row = (head * quantized.block_size + slot)[:, None] * groups + group[None, :]
    row = (page + quantized.value_codes + row * row_bytes)[:, :, None]
    channel_there = there[:, :, None] & (channel < VALUE_GROUP)[None, None, :]
    code = load_codes(row, channel[None, None, :], channel_there, row_bytes, BITS).to(tl.float32)
    at = (head * groups + group)[None, :] * quantized.block_size + slot[:, None]
    scale = tl.load((page + quantized.value_scales).to(tl.pointer_type(tl.float16)) + at, there, 0.0)
    zero = tl.load((page + quantized.value_zeros).to(tl.pointer_type(tl.float16)) + at, there, 0.0)
    value = code * scale.to(tl.float32)[:, :, None] + zero.to(tl.float32)[:, :, None]
    return tl.reshape(value, [TOKENS, VALUE_GROUPS * VALUE_CHANNELS])


@triton.jit
def exact_rows(residual, section, table, head, position, valid, HEAD_SIZE: tl.constexpr, RESIDUAL: tl.constexpr):
    """Pointers ``[TOKENS]`` to what residual pages hold of tokens of a sequence and a head.

    Args:
        section: bytes from the start of a page to its keys or values.
        table: the sequence's row of the residual's block table.
        position: of the tokens.
        valid: whose blocks to look up; pointers of others must not be followed.
    """
    block = tl.load(table + position // residual.block_size, valid, 0).to(tl.int64)
    page = (residual.pages + block * residual.stride + section).to(tl.pointer_type(RESIDUAL))
    return page + (head * residual.block_size + position % residual.block_size) * HEAD_SIZE


@triton.jit
def load_exact_keys(
    residual,
    table,
    tail,
    low_channel,
    high_channel,
    channel_there,
    head,
    position,
    valid,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    ROPE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Halves of the keys of tokens, ``[TOKENS, HALF]``; 0 where not ``valid``; see :func:`load_quantized_keys`."""
    row = exact_rows(residual, 0, table, head, position, valid, HEAD_SIZE, RESIDUAL)[:, None]
    there = valid[:, None] & channel_there[None, :]
    low = tl.load(row + low_channel[None, :], there, 0.0).to(tl.float32)
    high = tl.load(row + high_channel[None, :], there, 0.0).to(tl.float32)
    return finish_keys(low, high, tail, head, position, valid, HALF, False, False, ROPE)
