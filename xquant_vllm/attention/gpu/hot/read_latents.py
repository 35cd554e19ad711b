"""The kernel that reads latents of single tokens from their pages."""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.unpack import add_terms
from xquant_vllm.attention.gpu.hot.read_tables import SEGMENT_FIELDS

_FIELDS = tl.constexpr(len(SEGMENT_FIELDS))
_START = tl.constexpr(SEGMENT_FIELDS.index("start"))
_STOP = tl.constexpr(SEGMENT_FIELDS.index("stop"))
_HEAD = tl.constexpr(SEGMENT_FIELDS.index("head"))
_FIRST = tl.constexpr(SEGMENT_FIELDS.index("first"))
_CHANNELS = tl.constexpr(SEGMENT_FIELDS.index("channels"))


@triton.jit(do_not_specialize=["num_tokens"])
def read_latents(
    slots,
    hot_slots,
    num_tokens,
    pages,
    latent,
    segments,
    order,
    latents,
    rounded,
    head_stride,
    token_stride,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    HIGH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    ADDS: tl.constexpr,
    CARRIES: tl.constexpr,
):
    """Read a tile of tokens over the channels of one segment.

    Grid: ``(tiles of tokens, segments)``. Tokens without a hot slot are left out. Reads pages, and ``latents`` if
    ``ADDS``; writes ``rounded``, and ``latents`` if ``CARRIES``.

    Args:
        slots: int64 ``[num_tokens]``, slots in the pages.
        hot_slots: int64 ``[num_tokens]``; negative ones are not written.
        latent: :class:`Latent`; ``up`` is ``[bands, WIDTH, 1]``, the factors of channels.
        segments: see :class:`ReadTables`, as ``order``.
        latents: FP32 ``[heads, tokens, width]``.
        rounded: the same in any dtype, with the same strides.
        ADDS: whether what is read is added to ``latents``.
        CARRIES: whether another layer will need ``latents``.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < num_tokens
    valid = tl.load(hot_slots + token, there, -1) >= 0
    slot = tl.load(slots + token, valid, 0)
    block = slot // pages.block_size
    within = slot - block * pages.block_size
    segment = segments + tl.program_id(1) * _FIELDS
    channel = tl.arange(0, WIDTH)
    inside = valid[:, None] & (channel < tl.load(segment + _CHANNELS))[None, :]
    of_head = tl.load(segment + _HEAD).to(tl.int64) * head_stride + tl.load(segment + _FIRST)
    at = of_head + token.to(tl.int64)[:, None] * token_stride + channel[None, :]
    sums = tl.zeros([TOKENS, WIDTH], tl.float32)
    if ADDS:
        sums += tl.load(latents + at, inside, 0.0)
    start, stop = tl.load(segment + _START), tl.load(segment + _STOP)
    sums = add_terms(sums, pages, latent, order, start, stop, block, within, valid, WIDTH, KINDS, HIGH, OUTLIERS)
    if CARRIES:
        tl.store(latents + at, sums, inside)
    tl.store(rounded + at, sums.to(rounded.dtype.element_ty), inside)
