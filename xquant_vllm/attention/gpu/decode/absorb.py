"""Queries times the up-projection of every band of the key latents, for keys without norm and RoPE.

``q^T K^T = (q^T U^T) z``: queries then score against latents, and no key is rematerialized.
"""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.decode.merge import latent_rows


@triton.jit
def absorb(
    batch,
    columns,
    key,
    absorbed,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fill :class:`Absorbed` for one query token, kv head and band.

    Grid: ``(tokens, num_kv_heads, most_bands)``. Reads ``batch.query``, ``columns`` and the up-projection of ``key``.
    Here ``ROWS`` is a power of two of at least 16 and ``GROUP``: the query heads of a kv head, padded.
    """
    token, head, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    band = tl.load(key.first_band + head) + index
    if band >= tl.load(key.first_band + head + 1):
        return
    of_row = tl.arange(0, ROWS)
    row_valid = of_row < GROUP
    half = tl.arange(0, HALF)
    query = batch.query + token.to(tl.int64) * batch.token_stride + (head * GROUP + of_row[:, None]) * batch.head_stride
    row = (token.to(tl.int64) * batch.num_heads + head * GROUP + of_row) * absorbed.most_bands + index
    sums = absorbed.sums + row * (1 + OUTLIERS)
    up = latent_rows(key, band, WIDTH, HALF)
    product = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range(2):
        column = tl.load(columns + part * HALF + half)[None, :]
        of_part = tl.load(query + column, row_valid[:, None] & (column >= 0), 0.0).to(DTYPE)
        matrix = tl.load(up + part * HALF + half[None, :])
        product += tl.dot(of_part, tl.trans(matrix), input_precision=PRECISION)
        of_sum = tl.load(key.up_sum + band * (2 * HALF) + part * HALF + half)
        total += tl.sum(of_part.to(tl.float32) * of_sum[None, :], 1)
    tl.store(
        absorbed.query + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], product.to(DTYPE), row_valid[:, None]
    )
    tl.store(sums, total, row_valid)
    for channel in tl.static_range(OUTLIERS):
        of_channel = tl.zeros([ROWS], tl.float32)
        for part in tl.static_range(2):
            column = tl.load(columns + part * HALF + half)[None, :]
            of_part = tl.load(query + column, row_valid[:, None] & (column >= 0), 0.0).to(tl.float32)
            up_row = key.up_outliers + (band * OUTLIERS + channel) * (2 * HALF) + part * HALF + half
            of_channel += tl.sum(of_part * tl.load(up_row)[None, :], 1)
        tl.store(sums + 1 + channel, of_channel, row_valid)
