"""Paged attention through the Triton kernels: which of them take which sequences of a batch."""

from collections.abc import Sequence

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.decode.decode import decode
from xquant_vllm.attention.gpu.gpu_plan import prepare
from xquant_vllm.attention.gpu.prefill.prefill import prefill
from xquant_vllm.attention.gpu.tiling import decodes
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

    Sequences with few query tokens *decode*: keys are rematerialized as queries go through them. Those with many
    *prefill*: the context is rematerialized first. Lengths that decide it are the host's. Where a batch only decodes,
    nothing is read from the device and no launch depends on what is there, so that a CUDA graph can hold the call.
    """
    if not query.shape[0] or not batch.seq_lens.shape[0]:
        return
    gpu_plan = prepare(plan, query.dtype)
    leading, longest = decodes(batch, plan.num_heads // plan.projection.num_kv_heads, plan.exact_from)
    if leading:
        decode(query, pages, plan, gpu_plan, batch, output, leading, longest)
    if leading < batch.seq_lens.shape[0]:
        prefill(query, pages, plan, gpu_plan, batch, output, inputs, first_sequence=leading)
