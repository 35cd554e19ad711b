"""The kernel that rotates layer inputs X and quantizes them into their slots in one go.

Between the two a token's row passes through memory, because its channels are needed in another order: through a row
that only one program uses, over and over, so that it stays in the cache.
"""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.store.quantize import PIECE_FIELDS, quantize_rows
from xquant_vllm.attention.gpu.store.rotate import rotate_token


@triton.jit
def store_rotated(
    x,
    token_stride,
    slots,
    num_tokens,
    rotation,
    scratch,
    pages,
    page_stride,
    block_size,
    pieces,
    num_pieces,
    bytes_of_codes,
    channel_tables,
    TOKENS: tl.constexpr,
    ROTATION_ROWS: tl.constexpr,
    ROTATION_COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BYTES: tl.constexpr,
    CODES_PER_BYTE: tl.constexpr,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
    OUTLIERS: tl.constexpr,
):
    """Rotate and store tokens, one after another. Grid: ``(tiles of tokens,)``.

    Args:
        x: ``[tokens, d]``, FP32, FP16 or BF16, contiguous channels.
        token_stride: of x, in elements.
        slots: int64 ``[>= tokens]``; tokens whose slot is negative are not stored.
        num_tokens: tokens.
        rotation: :class:`Rotation`.
        scratch: FP32 ``[tiles of tokens, d]``, contiguous, written.
        pages: uint8 ``[blocks, page bytes]``, written.
        page_stride: bytes from a page to the next one.
        block_size: tokens of a page.
        pieces: see :class:`StreamTables`; all of them are described by table 0.
        num_pieces: how many there are.
        bytes_of_codes: its ``bytes``.
        channel_tables: its ``channels``.
        TOKENS: tokens of a program.
        ROTATION_ROWS: see ``rotate_token`` in store/rotate.py, as the next three.
        ROTATION_COLUMNS: likewise.
        DTYPE: likewise.
        PRECISION: likewise.
        PIECES: pieces that are quantized at once.
        WIDTH: see ``quantize_rows`` in store/quantize.py, as the rest.
        ROW_BYTES: likewise.
        BYTES: likewise.
        CODES_PER_BYTE: likewise.
        KIND: likewise.
        LARGEST: likewise.
        OUTLIERS: likewise.
    """
    row = scratch + tl.program_id(0).to(tl.int64) * (rotation.rows * rotation.columns)
    for index in range(TOKENS):
        token = tl.program_id(0) * TOKENS + index
        slot = tl.load(slots + token, token < num_tokens, -1)
        if slot >= 0:
            of_token = x + token.to(tl.int64) * token_stride
            y, channel, there = rotate_token(
                of_token, rotation, ROTATION_ROWS, ROTATION_COLUMNS, DTYPE, PRECISION
            )  # fmt: skip
            tl.debug_barrier()  # all have read the token before
            tl.store(row + channel, y, there)
            tl.debug_barrier()  # all can read this one
            for first in range(0, num_pieces, PIECES):
                piece = first + tl.arange(0, PIECES)
                exists = piece < num_pieces
                quantize_rows(
                    row + tl.zeros([PIECES], tl.int32),
                    tl.where(exists, slot, -1),
                    pages,
                    page_stride,
                    block_size,
                    pieces + tl.where(exists, piece, 0) * PIECE_FIELDS,
                    0,
                    bytes_of_codes,
                    channel_tables,
                    PIECES,
                    WIDTH,
                    ROW_BYTES,
                    BYTES,
                    CODES_PER_BYTE,
                    KIND,
                    LARGEST,
                    OUTLIERS,
                )
