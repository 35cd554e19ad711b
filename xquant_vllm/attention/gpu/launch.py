"""Paged attention through the Triton kernels: which of them take which sequences of a batch."""

from collections.abc import Sequence

import torch
import triton

from xquant_vllm.attention.batch import AttentionBatch, AttentionLayerPlan
from xquant_vllm.attention.gpu import decode
from xquant_vllm.attention.gpu.prefill import prefill
from xquant_vllm.attention.gpu.prepared import prepare


def paged_attention(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    batch: AttentionBatch,
    output: torch.Tensor,
) -> None:
    """Causal attention of query tokens over their sequences' pages; see :func:`reference.paged_attention`.

    Sequences with few query tokens *decode*: keys are rematerialized as queries go through them. Those with many
    *prefill*: the context is rematerialized first. Lengths that decide it are the host's. Where a batch only decodes,
    nothing is read from the device and no launch depends on what is there, so that a CUDA graph can hold the call.
    """
    if not query.shape[0] or not batch.seq_lens.shape[0]:
        return
    prepared = prepare(plan, query.dtype)
    decodes, longest = _decodes(batch, plan.num_heads // plan.projection.num_kv_heads)
    if decodes:
        decode.decode(query, pages, prepared, batch, output, decodes, longest)
    if decodes < batch.seq_lens.shape[0]:
        prefill(query, pages, prepared, batch, output, first_sequence=decodes)


def _decodes(batch: AttentionBatch, group: int) -> tuple[int, int]:
    """How many of the leading sequences decode, and the most query tokens that one of them has."""
    sequences, longest = batch.seq_lens.shape[0], batch.max_query_len
    if batch.lengths is None:
        if longest is None:
            longest = int((batch.query_start_loc[1:] - batch.query_start_loc[:-1]).max())
        return sequences, longest
    most = max(1, decode.MOST_ROWS // triton.next_power_of_2(group))
    if longest is not None and longest <= most:
        return sequences, longest
    decodes, longest = 0, 1
    for query_len, _ in batch.lengths:
        if query_len > most:
            break
        decodes += 1
        longest = max(longest, query_len)
    return decodes, longest
