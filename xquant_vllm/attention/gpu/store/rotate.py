"""Rotation of layer inputs X (see rotation_tables.py).

The kernel here leaves them for a prediction that is subtracted first; else store/store_rotated.py stores them at once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rotation(NamedTuple):
    """The tensors of :class:`RotationTables`; their shapes are there."""

    signs: Any
    left: Any
    right: Any
    rows: Any
    columns: Any


@triton.jit
def rotate_token(
    of_token,
    rotation,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rotate one token.

    Args:
        of_token: its channels, contiguous, FP32, FP16 or BF16.
        ROWS: rows of ``left``.
        COLUMNS: rows of ``right``.
        DTYPE: of the first product's operands; exact for what ``of_token`` holds.

    Returns:
        FP32, int32 and bool ``[ROWS, COLUMNS]``: what came out, which channels it is, and which of them there are.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    channel = row[:, None] * rotation.columns + column[None, :]
    there = (row < rotation.rows)[:, None] & (column < rotation.columns)[None, :]
    sign = tl.load(rotation.signs + channel, there, 0.0)
    left = tl.load(rotation.left + row[:, None] * ROWS + row[None, :])
    # +1, -1 and 0 are exact in any dtype, and so are inputs with another sign: only the sums are rounded.
    right = tl.load(rotation.right + column[:, None] * COLUMNS + column[None, :]).to(DTYPE)
    turned = (tl.load(of_token + channel, there, 0.0).to(tl.float32) * sign).to(DTYPE)
    half = tl.dot(turned, right, input_precision=PRECISION)
    return tl.dot(left, half, input_precision=PRECISION), channel, there


@triton.jit(do_not_specialize=["num_tokens"])
def rotate(
    x,
    token_stride,
    slots,
    num_tokens,
    rotation,
    rotated,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rotate tokens, one after another.

    Grid: ``(tiles of tokens,)``; tokens that are not stored are left out. Reads ``x``, ``[tokens, d]`` FP32, FP16 or
    BF16 with contiguous channels; writes ``rotated``, FP32 ``[tokens, d]``, contiguous. The constants are those of
    :func:`rotate_token`; ``TOKENS`` are tokens of a program.
    """
    width = (rotation.rows * rotation.columns).to(tl.int64)
    for index in range(TOKENS):
        token = tl.program_id(0) * TOKENS + index
        if tl.load(slots + token, token < num_tokens, -1) >= 0:
            of_token = x + token.to(tl.int64) * token_stride
            y, channel, there = rotate_token(of_token, rotation, ROWS, COLUMNS, DTYPE, PRECISION)
            tl.store(rotated + token * width + channel, y, there)
