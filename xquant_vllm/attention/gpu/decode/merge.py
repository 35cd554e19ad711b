"""The second kernel of attention: puts the splits together and up-projects values, once per query head.

Where value latents are the values, nothing is up-projected: their sums go to the output.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_sequences", "splits"])
def merge(
    partial,
    value,
    value_factors,
    columns,
    bias,
    sinks,
    query_start_loc,
    num_sequences,
    output,
    token_stride,
    head_stride,
    num_heads,
    splits,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ABSORB_VALUE: tl.constexpr,
    PROJECT_VALUE: tl.constexpr,
    FACTORS: tl.constexpr,
    BIAS: tl.constexpr,
    SINKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Merge the splits of one query token's heads of one kv head.

    Grid: ``(tokens, num_kv_heads)``; tokens after the last sequence's are left alone. Reads ``partial``, writes
    ``output``. Here ``ROWS`` is a power of two of at least 16 and ``GROUP``, and ``WIDTH`` channels of a value latent,
    or fields of each of its ``PARTS``.

    Args:
        value: read if ``ABSORB_VALUE`` and ``PROJECT_VALUE``.
        value_factors: read if ``ABSORB_VALUE`` and not ``PROJECT_VALUE``, or ``FACTORS``.
        columns: of the output. Where latents are the values a column is the channel of its index.
        bias: of the values.
        ABSORB_VALUE: whether sums are over latents.
        PROJECT_VALUE: whether these are multiplied by a matrix; else they are the values.
        FACTORS: whether that makes what ``value_factors`` are to be multiplied by.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    if token >= tl.load(query_start_loc + num_sequences):
        return
    of_row = tl.arange(0, ROWS)
    row_valid = of_row < GROUP
    query_head = head * GROUP + of_row
    row = token.to(tl.int64) * num_heads + query_head
    half = tl.arange(0, HALF)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    if SINKS:
        largest = tl.load(sinks + query_head, row_valid, 0.0)
    for split in range(splits):
        largest = tl.maximum(largest, tl.load(partial.stats + (row * splits + split) * 3, row_valid, float("-inf")))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([ROWS], tl.float32)
    zeros = tl.zeros([ROWS], tl.float32)
    low = tl.zeros([ROWS, HALF], tl.float32)
    high = tl.zeros([ROWS, HALF], tl.float32)
    # Of latents those that are not stored may be missing at the end.
    COLUMNS: tl.constexpr = WIDTH * PARTS if ABSORB_VALUE else 2 * HALF
    for split in range(splits):
        stats = partial.stats + (row * splits + split) * 3
        reached = tl.load(stats, row_valid, float("-inf"))
        there = row_valid & (reached > float("-inf"))
        factor = tl.exp(reached - largest)
        total += factor * tl.load(stats + 1, there, 0.0)
        if ABSORB_VALUE:
            zeros += factor * tl.load(stats + 2, there, 0.0)
        if not (ABSORB_VALUE and PROJECT_VALUE):
            at = partial.sums + (row * splits + split)[:, None] * COLUMNS
            of_low, of_high = half[None, :] < COLUMNS, HALF + half[None, :] < COLUMNS
            low += factor[:, None] * tl.load(at + half[None, :], there[:, None] & of_low, 0.0)
            high += factor[:, None] * tl.load(at + HALF + half[None, :], there[:, None] & of_high, 0.0)
    every = total
    if SINKS:
        every += tl.exp(tl.load(sinks + query_head, row_valid, 0.0) - largest)
    # A sequence always has its own token; only padding rows would divide by 0.
    inverse = (1 / tl.where(row_valid, every, 1.0))[:, None]
    if ABSORB_VALUE and PROJECT_VALUE:
        band = tl.load(value.first_band + head)
        for part in range(PARTS):
            sums = tl.zeros([ROWS, WIDTH], tl.float32)
            for split in range(splits):
                reached = tl.load(partial.stats + (row * splits + split) * 3, row_valid, float("-inf"))
                there = row_valid & (reached > float("-inf"))
                at = partial.sums + (row * splits + split)[:, None] * COLUMNS + part * WIDTH
                of_split = tl.load(at + tl.arange(0, WIDTH)[None, :], there[:, None], 0.0)
                sums += tl.exp(reached - largest)[:, None] * of_split
            sums *= inverse
            # Operands are rounded, sums should not be: what rounding leaves is multiplied as well.
            rounded = sums.to(DTYPE)
            rest = (sums - rounded.to(tl.float32)).to(DTYPE)
            up = latent_rows(value, band * PARTS + part, WIDTH, HALF)
            matrix = tl.load(up + half[None, :])
            low += tl.dot(rounded, matrix, input_precision=PRECISION) + tl.dot(rest, matrix, input_precision=PRECISION)
            matrix = tl.load(up + HALF + half[None, :])
            high += tl.dot(rounded, matrix, input_precision=PRECISION) + tl.dot(rest, matrix, input_precision=PRECISION)
        zeros = zeros[:, None] * inverse
        total_up = value.up_sum + band * (2 * HALF) + half
        low += zeros * tl.load(total_up)[None, :]
        high += zeros * tl.load(total_up + HALF)[None, :]
        if FACTORS:
            of_head = value_factors + head * (2 * HALF) + half
            low *= tl.load(of_head)[None, :]
            high *= tl.load(of_head + HALF)[None, :]
    else:
        low *= inverse
        high *= inverse
        if ABSORB_VALUE:
            of_head = value_factors + head * (2 * HALF) + half
            zeros = zeros[:, None] * inverse
            low = low * tl.load(of_head)[None, :] + zeros
            high = high * tl.load(of_head + HALF)[None, :] + zeros
    if BIAS:
        share = total[:, None] * inverse  # what a sink takes has no value
        low += share * tl.load(bias + head * (2 * HALF) + half)[None, :]
        high += share * tl.load(bias + head * (2 * HALF) + HALF + half)[None, :]
    at = output + token.to(tl.int64) * token_stride + query_head[:, None] * head_stride
    low_column, high_column = tl.load(columns + half)[None, :], tl.load(columns + HALF + half)[None, :]
    tl.store(at + low_column, low.to(output.dtype.element_ty), row_valid[:, None] & (low_column >= 0))
    tl.store(at + high_column, high.to(output.dtype.element_ty), row_valid[:, None] & (high_column >= 0))


@triton.jit
def latent_rows(latent, band, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Pointers ``[WIDTH, 1]`` to the rows of a band's up-projection."""
    row = (band * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    return latent.up + row[:, None] * (2 * HALF)
