"""The best attention over whole sequences of different lengths that is there.

That is what the plan was handed (vLLM's FlashAttention), else PyTorch's FlashAttention, else xformers'. Used where a
sequence's keys and values are all in the workspace; what none of them does is left to prefill/dense.py.
"""

import functools
import inspect
from typing import Any

import torch

from xquant_vllm.attention.batch import WholeSequences
from xquant_vllm.attention.plan import AttentionLayerPlan, WholeAttention


def library(
    query: torch.Tensor, keys: torch.Tensor, output: torch.Tensor, plan: AttentionLayerPlan
) -> WholeAttention | None:
    """What attends to whole sequences of a layer; None where nothing does.

    Args:
        query: ``[num_tokens, num_heads, head_size]``.
        keys: ``[room, num_kv_heads, head_size]``.
        output: like the query.
        plan: the layer's plan.
    """
    if query.dtype == torch.float32 or not query.dtype == keys.dtype == output.dtype:
        return None
    if plan.attend_whole is not None:
        return plan.attend_whole
    if plan.logits_soft_cap or plan.sinks is not None or query.device.type != "cuda":
        return None
    return best()


@functools.cache
def best() -> WholeAttention | None:
    """What is installed beside vLLM, without soft caps and sinks; None where there is nothing."""
    for candidate in (_flash, _xformers):
        try:
            return candidate()
        except ImportError:
            continue
    return None


def _flash() -> WholeAttention:
    """PyTorch's own FlashAttention (2.11 and later); causal, aligned to the last token."""
    from torch.nn.attention.varlen import varlen_attn_out

    # Older ones do not ask whether heads share keys, and take them either way.
    asks = "enable_gqa" in inspect.signature(varlen_attn_out).parameters

    def attend(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        sequences: WholeSequences,
        plan: AttentionLayerPlan,
    ) -> None:
        window = plan.sliding_window
        grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != keys.shape[1]} if asks else {}
        varlen_attn_out(
            output,
            query,
            keys,
            values,
            sequences.query_starts,
            sequences.key_starts,
            max(sequences.query_lens),
            max(sequences.key_lens),
            scale=plan.scale,
            # A window counts the query itself, this count does not.
            window_size=(window - 1 if window else -1, 0),
            **grouped,
        )

    return attend


def _xformers() -> WholeAttention:
    """Memory-efficient attention of xformers."""
    from xformers.ops import fmha

    def attend(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        sequences: WholeSequences,
        plan: AttentionLayerPlan,
    ) -> None:
        mask = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            list(sequences.query_lens), list(sequences.key_lens)
        )
        if plan.sliding_window:
            mask = mask.make_local_attention(plan.sliding_window)
        kv_heads = keys.shape[1]
        # [1, tokens, kv heads, query heads of a kv head, channels]; keys and values are views, not copies.
        grouped = query.unflatten(1, (kv_heads, -1))[None]
        group = grouped.shape[3]
        keys, values = (x[None, :, :, None].expand(-1, -1, -1, group, -1) for x in (keys, values))
        output[:] = fmha.memory_efficient_attention_forward(grouped, keys, values, mask, scale=plan.scale)[0].flatten(
            1, 2
        )

    return attend
