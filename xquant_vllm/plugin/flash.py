"""vLLM's FlashAttention: over keys and values side by side (prefill), and over the blocks of a pool (hot/)."""

import functools
from typing import Any

import torch

from xquant_vllm.attention.batch import WholeSequences
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan, WholeAttention

# FlashAttention 3 refuses more with sinks (hopper/flash_api.cpp).
_MOST_HEADS_WITH_SINKS = 64


def flash_version(head_size: int, sinks: bool, soft_cap: float | None, block_size: int | None = None) -> int | None:
    """Which FlashAttention vLLM takes for a 16-bit cache; None where there is none. Asks vLLM's current configuration.

    Args:
        head_size: channels of a head.
        sinks: whether there are attention sinks.
        soft_cap: bound of the scores, or None.
        block_size: tokens of a block, where keys and values are in blocks.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    try:
        from vllm.v1.attention.backends import fa_utils
    except ImportError:  # a build without its kernels
        return None
    version: int | None = fa_utils.get_flash_attn_version(
        head_size=head_size, has_sinks=sinks, requires_softcap=bool(soft_cap), kv_cache_block_size=block_size
    )
    return version


def flash_refusal(dtype: torch.dtype, head_size: int, num_heads: int, sinks: bool, version: int | None) -> str | None:
    """Why a version of vLLM's FlashAttention cannot attend for a layer, or None.

    Args:
        dtype: of queries, keys and values.
        head_size: channels of a head.
        num_heads: query heads.
        sinks: whether there are attention sinks.
        version: see :func:`flash_version`.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return f"vLLM's FlashAttention does not support {dtype}"
    if head_size % 8 or head_size > 256:
        return f"vLLM's FlashAttention does not support heads of {head_size} channels"
    if version is None:
        return "vLLM's FlashAttention does not support this GPU"
    if sinks and version < 3:
        return f"vLLM's FlashAttention {version}, the one for this GPU, does not support attention sinks"
    if sinks and num_heads > _MOST_HEADS_WITH_SINKS:
        return f"vLLM's FlashAttention does not support attention sinks with {num_heads} query heads"
    return None


def attend_whole_for(
    dtype: torch.dtype, head_size: int, num_heads: int, sinks: bool, soft_cap: float | None
) -> WholeAttention | None:
    """What a layer attends to rematerialized keys and values with; None where vLLM has nothing for it.

    Args:
        dtype: of the model.
        head_size: channels of a head.
        num_heads: query heads.
        sinks: whether there are attention sinks.
        soft_cap: bound of the scores, or None.
    """
    version = flash_version(head_size, sinks, soft_cap)
    if flash_refusal(dtype, head_size, num_heads, sinks, version) is not None:
        return None
    return functools.partial(_attend_whole, version)


def _attend_whole(
    version: int | None,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    sequences: WholeSequences,
    plan: AttentionLayerPlan,
) -> None:
    """See :class:`WholeAttention`."""
    flash_attention(
        query,
        keys,
        values,
        output,
        plan,
        version,
        cu_seqlens_q=sequences.query_starts,
        max_seqlen_q=max(sequences.query_lens),
        cu_seqlens_k=sequences.key_starts,
        max_seqlen_k=max(sequences.key_lens),
    )


def flash_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    plan: AttentionLayerPlan,
    version: int | None,
    **sequences: Any,
) -> None:
    """Call vLLM's FlashAttention, causal. Sequences without keys get zeros.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, after RoPE.
        keys: ``[keys, num_kv_heads, head_size]``, or ``[blocks, block size, num_kv_heads, head_size]``.
        values: likewise.
        output: like the query; written.
        plan: the layer's plan.
        version: see :func:`flash_version`.
        sequences: of the function's arguments those that say which tokens are whose.
    """
    from vllm.v1.attention.backends import fa_utils

    window = plan.sliding_window
    fa_utils.flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        out=output,
        softmax_scale=plan.scale,
        causal=True,
        # A window counts the query itself, this count does not.
        window_size=[-1, -1] if window is None else [window - 1, 0],
        softcap=plan.logits_soft_cap or 0.0,
        fa_version=version,
        s_aux=_sinks(plan),
        **sequences,
    )


@per_object
def _sinks(plan: AttentionLayerPlan) -> torch.Tensor | None:
    """As FlashAttention takes them."""
    return None if plan.sinks is None else plan.sinks.to(torch.bfloat16)
