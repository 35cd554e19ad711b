"""Which sequences of a batch decode, and how their work is cut into programs."""

from collections.abc import Iterator

import triton

from xquant_vllm.attention.batch import AttentionBatch

# Rows (query tokens times query heads of a kv head) of a tile at most; sequences with more rows prefill.
MOST_ROWS = 64
# Programs that keep a GPU busy, and splits of a sequence at most. They depend on a batch's shape alone, so that a CUDA
# graph, which is captured once for a shape, serves every context.
_PROGRAMS = 512
_MOST_SPLITS = 32


def decodes(batch: AttentionBatch, group: int, fewer: int | None = None) -> tuple[int, int]:
    """How many of the leading sequences decode, and the most query tokens that one of them has.

    Args:
        batch: the sequences.
        group: query heads of a kv head.
        fewer: than so many query tokens decode, if the host knows the lengths; None: as many as fit a tile.
    """
    sequences, longest = batch.seq_lens.shape[0], batch.max_query_len
    if batch.lengths is None:
        if longest is None:
            longest = int((batch.query_start_loc[1:] - batch.query_start_loc[:-1]).max())
        return sequences, longest
    most = max(1, MOST_ROWS // triton.next_power_of_2(group))
    if fewer is not None:
        most = min(most, fewer - 1)
    if longest is not None and longest <= most:
        return sequences, longest
    leading, longest = 0, 1
    for query_len, _ in batch.lengths:
        if query_len > most:
            break
        leading += 1
        longest = max(longest, query_len)
    return leading, longest


def shape_of(group: int, kv_heads: int, sequences: int, longest: int) -> tuple[int, int, int]:
    """Rows of a tile, tiles of a sequence, splits.

    Args:
        group: query heads of a kv head.
        kv_heads: kv heads.
        sequences: sequences of the batch.
        longest: query tokens of a sequence at most.
    """
    rows = min(triton.next_power_of_2(max(longest, 1) * group), MOST_ROWS)
    rows = max(16, rows, triton.next_power_of_2(group))
    tiles = triton.cdiv(longest, rows // group)
    return rows, tiles, max(1, min(_MOST_SPLITS, _PROGRAMS // max(1, sequences * tiles * kv_heads)))


def largest_batches(group: int, kv_heads: int, sequences: int, longest: int) -> set[int]:
    """Numbers of sequences, up to ``sequences``, of which one needs the most memory.

    With the splits it grows in the sequences, so it is the most that have so many splits.
    """
    _, tiles, _ = shape_of(group, kv_heads, 1, longest)
    most = (_PROGRAMS // (splits * tiles * kv_heads) for splits in range(1, _MOST_SPLITS + 1))
    return {sequences, 1, *(count for count in most if 1 <= count <= sequences)}


def largest_decodes(group: int, kv_heads: int, tokens: int, sequences: int) -> Iterator[tuple[int, int]]:
    """Query tokens and splits of decoding batches of which one needs the most memory.

    Args:
        group: query heads of a kv head.
        kv_heads: kv heads.
        tokens: query tokens of a batch at most.
        sequences: sequences of a batch at most.
    """
    longest = 1
    while longest <= MOST_ROWS:
        for count in largest_batches(group, kv_heads, sequences, longest):
            _, _, splits = shape_of(group, kv_heads, count, longest)
            yield min(tokens, count * longest), splits
        longest *= 2
