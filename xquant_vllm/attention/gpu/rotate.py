"""The kernel that rotates layer inputs X before they are stored (see rotation_tables.py)."""

import triton
import triton.language as tl


@triton.jit
def rotate(
    x,
    token_stride,
    slots,
    num_tokens,
    signs,
    left,
    right,
    rotated,
    num_rows,
    num_columns,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rotate tokens, one after another. Grid: ``(tiles of tokens,)``; tokens that are not stored are left out.

    Args:
        x: ``[tokens, d]``, FP32, FP16 or BF16, contiguous channels.
        token_stride: of x, in elements.
        slots: int64 ``[>= tokens]``; tokens whose slot is negative are not stored.
        num_tokens: tokens.
        signs: see :class:`RotationTables`, as the next two and ``num_rows`` and ``num_columns``.
        left: likewise.
        right: likewise.
        rotated: FP32 ``[tokens, d]``, contiguous, written.
        num_rows: likewise.
        num_columns: likewise.
        TOKENS: tokens of a program.
        ROWS: rows of ``left``.
        COLUMNS: rows of ``right``.
        DTYPE: of the first product's operands; exact for what ``x`` holds.
        PRECISION: of products whose operands are FP32.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    channel = row[:, None] * num_columns + column[None, :]
    there = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    sign = tl.load(signs + channel, there, 0.0)
    of_left = tl.load(left + row[:, None] * ROWS + row[None, :])
    # +1, -1 and 0 are exact in any dtype, and so are inputs with another sign: only the sums are rounded.
    of_right = tl.load(right + column[:, None] * COLUMNS + column[None, :]).to(DTYPE)
    width = (num_rows * num_columns).to(tl.int64)
    for index in range(TOKENS):
        token = tl.program_id(0) * TOKENS + index
        if tl.load(slots + token, token < num_tokens, -1) >= 0:
            of_token = tl.load(x + token.to(tl.int64) * token_stride + channel, there, 0.0)
            turned = (of_token.to(tl.float32) * sign).to(DTYPE)
            half = tl.dot(turned, of_right, input_precision=PRECISION)
            y = tl.dot(of_left, half, input_precision=PRECISION)
            tl.store(rotated + token * width + channel, y, there)
