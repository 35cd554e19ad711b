"""The attention call over the pool on a GPU: vLLM's FlashAttention; on tensors elsewhere its twin in PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.hot.attend import attend_pool
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan


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
    if dtype not in (torch.float16, torch.bfloat16):
        return f"vLLM's FlashAttention does not support {dtype}"
    for impl in impls:
        if impl.head_size % 8 or impl.head_size > 256:
            return f"vLLM's FlashAttention does not support heads of {impl.head_size} channels"
        version = flash_version(impl.head_size, impl.has_sinks, impl.logits_soft_cap, block_size)
        if version is None:
            return "vLLM's FlashAttention does not support this GPU"
        if impl.has_sinks and version < 3:
            return f"vLLM's FlashAttention {version}, the one for this GPU, does not support attention sinks"
    return None


def flash_version(head_size: int, sinks: bool, soft_cap: float | None, block_size: int) -> int | None:
    """Which FlashAttention vLLM takes for a 16-bit cache; None where there is none. Asks vLLM's current configuration.

    Args:
        head_size: channels of a head.
        sinks: whether there are attention sinks.
        soft_cap: bound of the scores, or None.
        block_size: tokens of a block.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from vllm.v1.attention.backends import fa_utils

    version: int | None = fa_utils.get_flash_attn_version(
        head_size=head_size, has_sinks=sinks, requires_softcap=bool(soft_cap), kv_cache_block_size=block_size
    )
    return version


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
    from vllm.v1.attention.backends import fa_utils

    window = plan.sliding_window
    fa_utils.flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        out=output,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_q=batch.max_query_len,
        seqused_k=batch.seq_lens,
        max_seqlen_k=longest,
        softmax_scale=plan.scale,
        causal=True,
        # A window counts the query itself, this count does not.
        window_size=[-1, -1] if window is None else [window - 1, 0],
        block_table=batch.block_table,
        softcap=plan.logits_soft_cap or 0.0,
        fa_version=version,
        s_aux=_sinks(plan),
    )


@per_object
def _sinks(plan: AttentionLayerPlan) -> torch.Tensor | None:
    """As FlashAttention takes them."""
    return None if plan.sinks is None else plan.sinks.to(torch.bfloat16)
