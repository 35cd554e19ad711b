"""The kernel that rotates layer inputs X and quantizes them into their slots in one go.

Between the two a token's row passes through memory, because its channels are needed in another order: through a row
that only one program uses, over and over, so that it stays in the cache.
"""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.store.quantize import SCALE_GROUP_FIELDS, quantize_rows
from xquant_vllm.attention.gpu.store.rotate import rotate_token


@triton.jit(do_not_specialize=["num_tokens"])
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
    scale_groups,
    num_scale_groups,
    bytes_of_codes,
    channel_tables,
    TOKENS: tl.constexpr,
    ROTATION_ROWS: tl.constexpr,
    ROTATION_COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BYTES: tl.constexpr,
    CODES_PER_BYTE: tl.constexpr,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
    OUTLIERS: tl.constexpr,
):
    """Rotate and store tokens, one after another.

    Grid: ``(tiles of tokens,)``. Reads ``x``, ``[tokens, d]`` FP32, FP16 or BF16 with contiguous channels; writes
    ``pages``. The constants are those of ``rotate_token`` (store/rotate.py) and ``quantize_rows`` (store/quantize.py).

    Args:
        scratch: FP32 ``[tiles of tokens, d]``, contiguous, written.
        scale_groups: see :class:`StreamTables`; all of them are described by table 0.
        num_scale_groups: how many there are.
        TOKENS: tokens of a program.
        SCALE_GROUPS: scale groups that are quantized at once.
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
            for first in range(0, num_scale_groups, SCALE_GROUPS):
                scale_group = first + tl.arange(0, SCALE_GROUPS)
                exists = scale_group < num_scale_groups
                quantize_rows(
                    row + tl.zeros([SCALE_GROUPS], tl.int32),
                    tl.where(exists, slot, -1),
                    pages,
                    page_stride,
                    block_size,
                    scale_groups + tl.where(exists, scale_group, 0) * SCALE_GROUP_FIELDS,
                    0,
                    bytes_of_codes,
                    channel_tables,
                    SCALE_GROUPS,
                    WIDTH,
                    ROW_BYTES,
                    BYTES,
                    CODES_PER_BYTE,
                    KIND,
                    LARGEST,
                    OUTLIERS,
                )
