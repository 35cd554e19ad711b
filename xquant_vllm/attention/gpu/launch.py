"""Paged attention through the Triton kernels: which of them take which sequences of a batch."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from xquant_vllm.attention.batch import AttentionBatch, DecodingRun
from xquant_vllm.attention.gpu.decode.decode import decode
from xquant_vllm.attention.gpu.gpu_plan import GpuPlan, prepare
from xquant_vllm.attention.gpu.prefill.prefill import prefill
from xquant_vllm.attention.gpu.prefill.step import PrefillStep, View
from xquant_vllm.attention.plan import AttentionLayerPlan


def paged_attention(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    batch: AttentionBatch,
    output: torch.Tensor,
    inputs: Sequence[torch.Tensor] | None = None,
) -> None:
    """Causal attention of query tokens over their sequences' pages; see :func:`reference.paged_attention`.

    Sequences with few query tokens *decode* (see ``AttentionBatch.decode_tokens``): keys are rematerialized as queries
    go through them. Those with more *prefill*: the context is rematerialized first. Where a batch only decodes, nothing
    is read from the device and no launch depends on what is there, so that a CUDA graph can hold the call.
    """
    sequences = batch.seq_lens.shape[0]
    if not query.shape[0] or not sequences:
        return
    gpu_plan = prepare(plan, query.dtype)
    leading = batch.decoding.leading
    if leading.stop:
        decode(query, pages, plan, gpu_plan, batch, output, leading.stop, leading.longest)
    if leading.stop < sequences:
        view = View.of(plan)
        step = batch.prefill or PrefillStep(batch, (view,))
        prefill(query, pages, plan, gpu_plan, batch, step.rounds(view), output, inputs)
    for run in batch.decoding.later:
        _decode_run(query, pages, plan, gpu_plan, batch, output, run)


def _decode_run(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    gpu_plan: GpuPlan,
    batch: AttentionBatch,
    output: torch.Tensor,
    run: DecodingRun,
) -> None:
    """Decode sequences that are behind others. Prefill has left them alone, or written zeros where they are between."""
    assert batch.lengths is not None
    before, tokens = (
        sum(query_len for query_len, _ in of)
        for of in (batch.lengths[: run.first], batch.lengths[run.first : run.stop])
    )
    if not tokens:
        return
    apart = replace(
        batch,
        query_start_loc=batch.query_start_loc[run.first : run.stop + 1] - before,
        # Kernels are compiled for aligned addresses.
        seq_lens=batch.seq_lens[run.first : run.stop].clone(),
        block_table=batch.block_table[run.first : run.stop].clone(),
        max_query_len=run.longest,
        lengths=None,
    )
    query, output = (x[before : before + tokens] for x in (query, output))
    decode(query, pages, plan, gpu_plan, apart, output, run.stop - run.first, run.longest)
