"""Attention over the pool in PyTorch, as FlashAttention is called: its twin where there is none."""

import torch


def attend_pool(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    longest_query: int,
    longest: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Causal attention of rows over the blocks of a pool. Rows of length 0 give zeros, as FlashAttention has it.

    Args:
        query: ``[tokens, num_heads, head_size]``, after RoPE.
        keys: ``[hot blocks, block size, num_kv_heads, head_size]``.
        values: likewise.
        output: like the query; written up to the last row's last token.
        query_start_loc: ``[rows + 1]`` int32.
        seq_lens: ``[rows]`` int32, tokens of every row, those of the query included; 0 for rows that are left out.
        block_table: ``[rows, columns]`` int32, blocks of the pool.
        longest_query: query tokens of a row at most.
        longest: tokens of a row at most.
        scale: factor on the scores.
        window: keys that a query sees, itself included, or None for all.
        soft_cap: bound of the scores, or None.
        sinks: ``[num_heads]`` FP32, scores of keys that have no value, or None.
    """
    group, block_size = query.shape[1] // keys.shape[2], keys.shape[1]
    starts = query_start_loc.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        first, stop = starts[row], starts[row + 1]
        count = stop - first
        if not count:
            continue
        if not length:
            output[first:stop] = 0
            continue
        assert count <= longest_query
        assert length <= longest
        oldest = 0 if window is None else max(0, length - count - window + 1)
        position = torch.arange(oldest, length)
        slots = block_table[row, position // block_size].long() * block_size + position % block_size
        k, v = (x.flatten(0, 1)[slots].float().repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("qhs,khs->hqk", query[first:stop].float(), k) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        asking = torch.arange(length - count, length)[:, None]
        visible = position <= asking
        if window is not None:
            visible &= position > asking - window
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, count, 1)), -1)
        weights = scores.softmax(-1)[..., : len(position)]
        output[first:stop] = torch.einsum("hqk,khs->qhs", weights, v)
