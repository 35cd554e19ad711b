"""The sequences of an attention call, in vLLM's terms but without vLLM."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionBatch:
    """A batch of sequences, each with some query tokens at the end of its cached tokens.

    Attributes:
        query_start_loc: ``[num_seqs + 1]`` int32, first query token of every sequence.
        seq_lens: ``[num_seqs]`` int32, cached tokens including the query tokens; their slots are already written.
        block_table: ``[num_seqs, max_blocks]`` int32, block ids; entries past a sequence's last block, and those wholly
            behind the sliding window, are arbitrary and never read.
        max_query_len: query tokens of a sequence at most, known without reading from a device; None: to be found out.
        lengths: for every sequence its query tokens and its cached tokens, known likewise; None: not known. Cached
            tokens of a sequence with one query token may be overstated.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int | None = None
    lengths: tuple[tuple[int, int], ...] | None = None
