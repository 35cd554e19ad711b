"""What stands in for FlashAttention over keys and values side by side, where none can run."""

import torch

from xquant_vllm.attention.batch import WholeSequences
from xquant_vllm.attention.hot.attend import attend_pool
from xquant_vllm.attention.plan import AttentionLayerPlan


def attend_side_by_side(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    **scores,
) -> None:
    """As FlashAttention does it by the starts of sequences alone: keys are blocks of one token of a pool."""
    lengths = key_starts.diff()
    table = torch.zeros(len(lengths), max(lengths.tolist()), dtype=torch.int32)
    for row, (start, length) in enumerate(zip(key_starts.tolist(), lengths.tolist(), strict=False)):
        table[row, :length] = torch.arange(start, start + length)
    attend_pool(query, keys[:, None], values[:, None], output, query_starts, lengths, table, **scores)


class WholeAttention:
    """A plan's ``attend_whole`` that notes how it was called."""

    def __init__(self) -> None:
        """Not yet."""
        self.calls: list[WholeSequences] = []

    def __call__(self, query, keys, values, output, sequences: WholeSequences, plan: AttentionLayerPlan) -> None:
        """Attend."""
        self.calls.append(sequences)
        assert query.dtype == keys.dtype == values.dtype == output.dtype != torch.float32
        assert keys.shape == values.shape
        assert query.shape == output.shape
        assert query.shape[0] == sequences.query_starts[-1] == sum(sequences.query_lens)
        assert keys.shape[0] == sequences.key_starts[-1] == sum(sequences.key_lens)
        assert sequences.query_starts.data_ptr() % 16 == sequences.key_starts.data_ptr() % 16 == 0
        attend_side_by_side(
            query,
            keys,
            values,
            output,
            sequences.query_starts,
            sequences.key_starts,
            longest_query=max(sequences.query_lens),
            longest=max(sequences.key_lens),
            scale=plan.scale,
            window=plan.sliding_window,
            soft_cap=plan.logits_soft_cap,
            sinks=plan.sinks,
        )
