"""Device functions: from bytes in pages to small integers, scales and zero points."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.error_scale import scale_value
from xquant_vllm.attention.gpu.tables.bit_addresses import COLUMNS
from xquant_vllm.attention.gpu.tables.latent_tables import ALLOCATED, FIELDS, FP16, UNIFORM

_FIELDS = tl.constexpr(len(FIELDS))
_COLUMNS = tl.constexpr(len(COLUMNS))
_PAGE = tl.constexpr(FIELDS.index("page"))
_CODES = tl.constexpr(FIELDS.index("codes"))
_ROW_BYTES = tl.constexpr(FIELDS.index("row_bytes"))
_KIND = tl.constexpr(FIELDS.index("kind"))
_SCALES = tl.constexpr(FIELDS.index("scales"))
_ZEROS = tl.constexpr(FIELDS.index("zeros"))
_OUTLIERS = tl.constexpr(FIELDS.index("outliers"))
NUM_OUTLIERS = tl.constexpr(FIELDS.index("num_outliers"))
_TABLE = tl.constexpr(FIELDS.index("table"))
_LOW = tl.constexpr(COLUMNS.index("low"))
_LOW_MASK = tl.constexpr(COLUMNS.index("low_mask"))
_HIGH = tl.constexpr(COLUMNS.index("high"))
_HIGH_MASK = tl.constexpr(COLUMNS.index("high_mask"))
_HIGH_SHIFT = tl.constexpr(COLUMNS.index("high_shift"))
_LEVELS = tl.constexpr(COLUMNS.index("levels"))
_FP16 = tl.constexpr(FP16)
_UNIFORM = tl.constexpr(UNIFORM)
_ALLOCATED = tl.constexpr(ALLOCATED)
# Bits of KINDS.
HAS_FP16 = tl.constexpr(1 << FP16)
HAS_UNIFORM = tl.constexpr(1 << UNIFORM)
HAS_ALLOCATED = tl.constexpr(1 << ALLOCATED)


class Pages(NamedTuple):
    """The pages that a layer reads: its own first, then those of earlier layers."""

    pointers: Any  # int64 [layouts]: addresses
    strides: Any  # int64 [layouts]: bytes from a page to the next one
    block_size: Any  # tokens of a page


class Latent(NamedTuple):
    """The tensors of :class:`LatentTables` that kernels read; their shapes are there."""

    bands: Any
    first_band: Any
    addresses: Any
    up: Any
    up_sum: Any
    up_outliers: Any


@triton.jit
def load_field(latent, band, field: tl.constexpr):
    """A number of a band's description."""
    return tl.load(latent.bands + band * _FIELDS + field)


@triton.jit
def locate(pages, latent, band, block, within):
    """Start of a band's page for every token.

    Returns:
        Pointers to bytes ``[TOKENS]``: of the token's page, and of its codes.
    """
    index = load_field(latent, band, _PAGE)
    base = tl.load(pages.pointers + index).to(tl.pointer_type(tl.uint8))
    page = base + block * tl.load(pages.strides + index)
    return page, page + load_field(latent, band, _CODES) + within * load_field(latent, band, _ROW_BYTES)


@triton.jit
def load_numbers(latent, band, codes, valid, WIDTH: tl.constexpr, KINDS: tl.constexpr, HIGH: tl.constexpr):
    """The numbers n of a band (see tables/latent_tables.py), from pointers ``[TOKENS]`` to the tokens' codes.

    Returns:
        ``[TOKENS, WIDTH]``, FP32; 0 in channels that the band does not have.
    """
    table = latent.addresses + load_field(latent, band, _TABLE) * (_COLUMNS * WIDTH) + tl.arange(0, WIDTH)
    low, mask = tl.load(table + _LOW * WIDTH), tl.load(table + _LOW_MASK * WIDTH)
    byte = tl.load(codes[:, None] + (low >> 3)[None, :], valid[:, None] & (mask != 0)[None, :], 0)
    code = (byte.to(tl.int32) >> (low & 7)[None, :]) & mask[None, :]
    if HIGH:
        high, mask = tl.load(table + _HIGH * WIDTH), tl.load(table + _HIGH_MASK * WIDTH)
        byte = tl.load(codes[:, None] + (high >> 3)[None, :], valid[:, None] & (mask != 0)[None, :], 0)
        part = (byte.to(tl.int32) >> (high & 7)[None, :]) & mask[None, :]
        code |= part << tl.load(table + _HIGH_SHIFT * WIDTH)[None, :]
    kind = load_field(latent, band, _KIND)
    number = code
    if HAS_ALLOCATED & KINDS:
        number = tl.where(kind == _ALLOCATED, 2 * code - tl.load(table + _LEVELS * WIDTH)[None, :], code)
    result = number.to(tl.float32)
    if HAS_FP16 & KINDS:
        exact = code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        result = tl.where(kind == _FP16, exact, result)
    return result


@triton.jit
def load_scales(latent, band, page, within, valid, KINDS: tl.constexpr):
    """Scale and zero point of every token, FP32 ``[TOKENS]``; 0 where not ``valid``."""
    kind = load_field(latent, band, _KIND)
    at = page + load_field(latent, band, _SCALES)
    scale = tl.where(valid, 1.0, 0.0)
    zero = tl.zeros_like(scale)
    if HAS_UNIFORM & KINDS:
        if kind == _UNIFORM:
            scale = tl.load(at.to(tl.pointer_type(tl.float16)) + within, valid, 0.0).to(tl.float32)
            zeros = page + load_field(latent, band, _ZEROS)
            zero = tl.load(zeros.to(tl.pointer_type(tl.float16)) + within, valid, 0.0).to(tl.float32)
    if HAS_ALLOCATED & KINDS:
        if kind == _ALLOCATED:
            scale = tl.where(valid, scale_value(tl.load(at + within, valid, 0).to(tl.float32)), 0.0)
    return scale, zero


@triton.jit
def load_band(pages, latent, band, block, within, valid, WIDTH: tl.constexpr, KINDS: tl.constexpr, HIGH: tl.constexpr):
    """A band of every token: where its page starts, numbers, scales and zero points.

    Returns:
        Pointers ``[TOKENS]``; FP32 ``[TOKENS, WIDTH]``, ``[TOKENS]`` and ``[TOKENS]``.
    """
    page, codes = locate(pages, latent, band, block, within)
    number = load_numbers(latent, band, codes, valid, WIDTH, KINDS, HIGH)
    scale, zero = load_scales(latent, band, page, within, valid, KINDS)
    return page, number, scale, zero


@triton.jit
def load_outlier(latent, band, channel, pages, page, within, valid):
    """An outlier channel's number of every token, FP32 ``[TOKENS]``; 0 where the band has fewer."""
    at = (page + load_field(latent, band, _OUTLIERS)).to(tl.pointer_type(tl.float16))
    exact = tl.where(valid, 0.0, 0.0)
    if channel < load_field(latent, band, NUM_OUTLIERS):
        exact = tl.load(at + channel * pages.block_size + within, valid, 0.0).to(tl.float32)
    return exact


@triton.jit
def add_terms(
    sums,
    pages,
    latent,
    order,
    start,
    stop,
    block,
    within,
    valid,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    HIGH: tl.constexpr,
    OUTLIERS: tl.constexpr,
):
    """Add the bands ``order[start:stop]`` of every token, which have the same channels, to ``sums``.

    Args:
        sums: FP32 ``[TOKENS, WIDTH]``.
        latent: :class:`Latent`; ``up`` is ``[bands, WIDTH, 1]``, the factors of channels.
        order: int32, numbers of bands.
    """
    channel = tl.arange(0, WIDTH)
    for index in range(start, stop):
        band = tl.load(order + index)
        page, number, scale, zero = load_band(pages, latent, band, block, within, valid, WIDTH, KINDS, HIGH)
        number *= tl.load(latent.up + band * WIDTH + channel)[None, :]
        number = number * scale[:, None] + zero[:, None]
        for outlier in tl.static_range(OUTLIERS):
            exact = load_outlier(latent, band, outlier, pages, page, within, valid)
            leads = (channel == outlier) & (outlier < load_field(latent, band, NUM_OUTLIERS))
            number = tl.where(leads[None, :], exact[:, None], number)
        sums += number
    return sums
