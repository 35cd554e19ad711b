"""How the work of decoding sequences is cut into programs."""

import triton

# Rows (query tokens times query heads of a kv head) of a tile at most, unless one token has more.
MOST_ROWS = 64
# Programs that keep a GPU busy, and splits of a sequence at most. They depend on a batch's shape alone, so that a CUDA
# graph, which is captured once for a shape, serves every context.
_PROGRAMS = 512
_MOST_SPLITS = 32


def rows_of(group: int, longest: int, decode_tokens: int, least: int = 16, most: int = MOST_ROWS) -> int:
    """Rows of a tile, a power of two.

    Kernels are compiled for it. So there are two for batches that vLLM calls decoding, however many drafted tokens each
    of them has: of one query token, and of as many as there may be.

    Args:
        group: query heads of a kv head.
        longest: query tokens of a sequence of the batch at most.
        decode_tokens: query tokens of a decoding sequence of any batch at most.
        least: rows of a tile at least.
        most: rows of a tile at most, unless one token has more.
    """
    tokens = 1 if longest <= 1 else max(longest, decode_tokens)
    return max(least, min(triton.next_power_of_2(tokens * group), most), triton.next_power_of_2(group))


def shape_of(group: int, kv_heads: int, sequences: int, longest: int, decode_tokens: int) -> tuple[int, int, int]:
    """Rows of a tile, tiles of a sequence, splits.

    Args:
        group: query heads of a kv head.
        kv_heads: kv heads.
        sequences: sequences of the batch.
        longest: query tokens of a sequence at most.
        decode_tokens: see :func:`rows_of`.
    """
    rows = rows_of(group, longest, decode_tokens)
    tiles = triton.cdiv(longest, rows // group)
    return rows, tiles, max(1, min(_MOST_SPLITS, _PROGRAMS // max(1, sequences * tiles * kv_heads)))


def most_splits(group: int, kv_heads: int, tokens: int) -> int:
    """Splits with which a batch of so many query tokens needs as much memory for their results as any batch does.

    Args:
        group: query heads of a kv head.
        kv_heads: kv heads.
        tokens: query tokens of a batch at most.
    """
    # With more than one split programs are no more than wanted, and a program has a tile of query tokens.
    of_tile = max(MOST_ROWS, triton.next_power_of_2(group)) // group
    return min(_MOST_SPLITS, max(1, triton.cdiv(_PROGRAMS // kv_heads * of_tile, tokens)))
