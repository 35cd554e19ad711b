"""The kernel that quantizes rows of latents into their slots, and its device function.

Rounding is decided by a subtraction and a division that rounds to nearest, so codes of uniform streams are bit for bit
those of codec/quantizer.py. Of allocated streams a code may be another by one where a number lies halfway between two.
"""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.fit import allocated_codes, fit_group, fit_scale, saturated_half, uniform_codes
from xquant_vllm.attention.gpu.tables.code_bytes import ROWS
from xquant_vllm.attention.gpu.tables.latent_tables import ALLOCATED, UNIFORM
from xquant_vllm.attention.gpu.tables.stream_tables import CHANNEL_ROWS, FIELDS

SCALE_GROUP_FIELDS = tl.constexpr(len(FIELDS))
_FIRST = tl.constexpr(FIELDS.index("first"))
_CHANNELS = tl.constexpr(FIELDS.index("channels"))
_CODES = tl.constexpr(FIELDS.index("codes"))
_ROW_BYTES = tl.constexpr(FIELDS.index("row_bytes"))
_SCALES = tl.constexpr(FIELDS.index("scales"))
_ZEROS = tl.constexpr(FIELDS.index("zeros"))
_OUTLIERS = tl.constexpr(FIELDS.index("outliers"))
_NUM_OUTLIERS = tl.constexpr(FIELDS.index("num_outliers"))
_TABLE = tl.constexpr(FIELDS.index("table"))
_BYTE_ROWS = tl.constexpr(len(ROWS))
_CHANNEL = tl.constexpr(ROWS.index("channel"))
_STRIDE = tl.constexpr(ROWS.index("stride"))
_BITS = tl.constexpr(ROWS.index("bits"))
_SHIFT = tl.constexpr(ROWS.index("shift"))
_CHANNEL_ROWS = tl.constexpr(len(CHANNEL_ROWS))
_STEP = tl.constexpr(CHANNEL_ROWS.index("step"))
_LARGEST = tl.constexpr(CHANNEL_ROWS.index("largest"))
_WORTH = tl.constexpr(CHANNEL_ROWS.index("worth"))
_UNIFORM = tl.constexpr(UNIFORM)
_ALLOCATED = tl.constexpr(ALLOCATED)


@triton.jit
def quantize_rows(
    rows,
    slot,
    pages,
    page_stride,
    block_size,
    scale_group,
    table,
    bytes_of_codes,
    channel_tables,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BYTES: tl.constexpr,
    CODES_PER_BYTE: tl.constexpr,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
    OUTLIERS: tl.constexpr,
):
    """Quantize scale groups of tokens, one of a token in every row, and write codes, scales and zero points to pages.

    Args:
        rows: pointers ``[ROWS]`` to the rows of all heads of the tokens, any float dtype, contiguous channels.
        slot: int64 ``[ROWS]``, the tokens' slots; where it is negative nothing is stored.
        pages: uint8 ``[blocks, page bytes]``, ``page_stride`` bytes from one to the next.
        scale_group: pointers ``[ROWS]`` to rows of ``scale_groups`` of :class:`StreamTables`.
        table: which of its tables describes all of these scale groups.
        bytes_of_codes: its ``bytes``.
        channel_tables: its ``channels``.
        ROWS: scale groups.
        WIDTH: see :class:`StreamTables`, as the other constants.
        BYTES: bytes that are packed at once; divides ``ROW_BYTES``.
    """
    valid = slot >= 0
    block = slot // block_size
    within = slot - block * block_size
    page = pages + block * page_stride
    row = rows + tl.load(scale_group + _FIRST)
    channel = tl.arange(0, WIDTH)
    there = channel[None, :] < tl.load(scale_group + _CHANNELS)[:, None]
    outliers = tl.zeros([ROWS], tl.int32)

    if KIND == _UNIFORM:
        x = tl.load(row[:, None] + channel[None, :], valid[:, None] & there, 0.0).to(tl.float32)
        if OUTLIERS:
            outliers = tl.load(scale_group + _NUM_OUTLIERS)
            at = (page + tl.load(scale_group + _OUTLIERS)).to(tl.pointer_type(tl.float16)) + within
            exact = valid[:, None] & (channel[None, :] < outliers[:, None])
            tl.store(at[:, None] + (channel * block_size)[None, :], saturated_half(x), exact)
        scale, zero = fit_group(x, there & (channel[None, :] >= outliers[:, None]), LARGEST)
        tl.store((page + tl.load(scale_group + _SCALES)).to(tl.pointer_type(tl.float16)) + within, scale, valid)
        tl.store((page + tl.load(scale_group + _ZEROS)).to(tl.pointer_type(tl.float16)) + within, zero, valid)
    channel_table = channel_tables + table * (_CHANNEL_ROWS * WIDTH)
    if KIND == _ALLOCATED:
        x = tl.load(row[:, None] + channel[None, :], valid[:, None] & there, 0.0).to(tl.float32)
        scale, value = fit_scale(
            x,
            tl.load(channel_table + _STEP * WIDTH + channel),
            tl.load(channel_table + _LARGEST * WIDTH + channel),
            tl.load(channel_table + _WORTH * WIDTH + channel),
            there,
        )
        tl.store(page + tl.load(scale_group + _SCALES) + within, scale, valid)

    to = page + tl.load(scale_group + _CODES) + within * tl.load(scale_group + _ROW_BYTES)
    for start in range(0, ROW_BYTES, BYTES):
        byte = start + tl.arange(0, BYTES)
        byte_table = bytes_of_codes + table * (_BYTE_ROWS * ROW_BYTES) + byte
        first, stride = tl.load(byte_table + _CHANNEL * ROW_BYTES), tl.load(byte_table + _STRIDE * ROW_BYTES)
        bits, shift = tl.load(byte_table + _BITS * ROW_BYTES), tl.load(byte_table + _SHIFT * ROW_BYTES)
        packed = tl.zeros([ROWS, BYTES], tl.int32)
        for index in tl.static_range(CODES_PER_BYTE):
            # The row is read again in the order of its bytes: it is still in the cache.
            of_byte = first + index * stride
            has = (bits > 0) & (index * bits < 8)
            number = tl.load(row[:, None] + of_byte[None, :], valid[:, None] & has[None, :], 0.0).to(tl.float32)
            if KIND == _UNIFORM:
                code = uniform_codes(number, scale, zero, of_byte[None, :] >= outliers[:, None], LARGEST)
            elif KIND == _ALLOCATED:
                step = tl.load(channel_table + _STEP * WIDTH + of_byte, has, 1.0)
                largest = tl.load(channel_table + _LARGEST * WIDTH + of_byte, has, 0.0)
                code = allocated_codes(number, value, step, largest)
            else:
                code = saturated_half(number).to(tl.int16, bitcast=True).to(tl.int32)
            part = (code >> shift[None, :]) & ((1 << bits) - 1)[None, :]
            packed |= part << (index * bits)[None, :]
        tl.store(to[:, None] + byte[None, :], packed.to(tl.uint8), valid[:, None] & (bits > 0)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def quantize(
    rows,
    token_stride,
    slots,
    num_tokens,
    pages,
    page_stride,
    block_size,
    scale_groups,
    bytes_of_codes,
    channel_tables,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BYTES: tl.constexpr,
    CODES_PER_BYTE: tl.constexpr,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
    OUTLIERS: tl.constexpr,
):
    """Quantize one scale group of some tokens.

    Grid: ``(tiles of tokens, scale groups)``. Reads ``rows``, writes ``pages``; see :func:`quantize_rows`.

    Args:
        rows: ``[tokens, channels of all heads]``, any float dtype, contiguous channels.
        token_stride: of the rows, in elements.
        scale_groups: of :class:`StreamTables`, as ``bytes_of_codes`` (its ``bytes``) and ``channel_tables``.
    """
    scale_group = scale_groups + tl.program_id(1) * SCALE_GROUP_FIELDS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    quantize_rows(
        rows + token.to(tl.int64) * token_stride,
        tl.load(slots + token, token < num_tokens, -1),
        pages,
        page_stride,
        block_size,
        scale_group + tl.zeros([TOKENS], tl.int32),
        tl.load(scale_group + _TABLE),
        bytes_of_codes,
        channel_tables,
        TOKENS,
        WIDTH,
        ROW_BYTES,
        BYTES,
        CODES_PER_BYTE,
        KIND,
        LARGEST,
        OUTLIERS,
    )
