"""Device functions: which queries a program of attention has, and what they see."""

import triton
import triton.language as tl


@triton.jit
def rows_of_tile(
    batch, first_query, query_len, past, head, tile_first, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr
):
    """The rows of a tile: ``TOKENS`` query tokens of a sequence with the ``GROUP`` query heads of a kv head.

    Args:
        batch: :class:`Batch`.
        first_query: the sequence's first query token.
        query_len: its query tokens.
        past: its cached tokens before these.
        head: the kv head.
        tile_first: the tile's first query token, of the sequence's.

    Returns:
        ``[ROWS]`` each: the query token, of the sequence's; the query head; whether there is such a row; the token's
        position; and the row of ``[tokens, num_heads]``.
    """
    of_row = tl.arange(0, ROWS)
    token = tile_first + of_row // GROUP
    row_valid = (of_row < TOKENS * GROUP) & (token < query_len)
    query_head = head * GROUP + of_row % GROUP
    return token, query_head, row_valid, past + token, (first_query + token) * batch.num_heads + query_head


@triton.jit
def seen_by_tile(scores, past, query_len, tile_first, TOKENS: tl.constexpr, WINDOW: tl.constexpr):
    """The first cached token that a tile of query tokens may see, and the one after the last."""
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(0, past + tile_first - scores.window + 1)
    return oldest, past + tl.minimum(tile_first + TOKENS, query_len)
