"""What an attention call is given, in vLLM's terms but without vLLM."""

from dataclasses import dataclass

import torch

from xquant_vllm.codec.layout import PageLayout
from xquant_vllm.projection.rematerialize import LayerProjection


@dataclass(frozen=True)
class AttentionBatch:
    """A batch of sequences, each with some query tokens at the end of its cached tokens.

    Attributes:
        query_start_loc: ``[num_seqs + 1]`` int32, first query token of every sequence.
        seq_lens: ``[num_seqs]`` int32, cached tokens including the query tokens; their slots are already written.
        block_table: ``[num_seqs, max_blocks]`` int32, block ids; entries past a sequence's last block, and those wholly
            behind the sliding window, are arbitrary and never read.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True)
class AttentionLayerPlan:
    """Everything about one layer that does not change from call to call.

    Attributes:
        layout: layout of its pages: stream 0 holds key latents, stream 1 value latents.
        projection: from latents to keys and values.
        num_heads: query heads; a multiple of the kv heads, which they share in consecutive groups.
        scale: factor on the scores.
        sliding_window: keys a query sees, itself included, or None for all.
        logits_soft_cap: scores become ``cap * tanh(score / cap)``, or None.
    """

    layout: PageLayout
    projection: LayerProjection
    num_heads: int
    scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
