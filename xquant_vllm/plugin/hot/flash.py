"""The attention call over the pool on a GPU: vLLM's FlashAttention; on tensors elsewhere its twin in PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.hot.attend import attend_pool
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.plugin.flash import flash_attention, flash_refusal, flash_version


def flash_unsupported(dtype: torch.dtype, impls: Sequence[Any], block_size: int) -> str | None:
    """Why vLLM's FlashAttention cannot attend to the pool of some layers, or None.

    Args:
        dtype: of the model.
        impls: :class:`XQuantImpl` of the layers.
        block_size: tokens of a block.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None  # the twin has no limits
    for impl in impls:
        version = flash_version(impl.head_size, impl.has_sinks, impl.logits_soft_cap, block_size)
        reason = flash_refusal(dtype, impl.head_size, impl.num_heads, impl.has_sinks, version)
        if reason is not None:
            return reason
    return None


def attend_hot(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    plan: AttentionLayerPlan,
    batch: AttentionBatch,
    longest: int,
    version: int | None,
) -> None:
    """Causal attention of rows over blocks of the pool. Rows of length 0 get zeros.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, after RoPE.
        keys: ``[hot blocks, block size, num_kv_heads, head_size]``, contiguous.
        values: likewise.
        output: like the query; written.
        plan: the layer's plan.
        batch: the rows; their block table has hot blocks.
        longest: tokens of a row at most.
        version: see :func:`flash_version`.
    """
    assert batch.max_query_len is not None
    if query.device.type != "cuda":
        attend_pool(
            query,
            keys,
            values,
            output,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table,
            longest_query=batch.max_query_len,
            longest=longest,
            scale=plan.scale,
            window=plan.sliding_window,
            soft_cap=plan.logits_soft_cap,
            sinks=plan.sinks,
        )
        return
    flash_attention(
        query,
        keys,
        values,
        output,
        plan,
        version,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_q=batch.max_query_len,
        seqused_k=batch.seq_lens,
        max_seqlen_k=longest,
        block_table=batch.block_table,
    )
