"""The best attention over whole sequences of different lengths that is there: FlashAttention, else xformers'.

Used where a sequence's keys and values are all in the workspace; what neither does is left to prefill/dense.py.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.prefill.spans import Span
from xquant_vllm.attention.plan import AttentionLayerPlan

Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int], Sequence[int], float, int], torch.Tensor]
"""Of queries, keys and values ``[tokens, heads, head_size]``, query and key lengths, scale, window (0: none)."""


def use_library(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: AttentionLayerPlan,
    batch: AttentionBatch,
    spans: Sequence[Span],
    output: torch.Tensor,
) -> bool:
    """Attend with a library, if it can.

    Args:
        query: ``[num_tokens, num_heads, head_size]``.
        keys: ``[room, num_kv_heads, head_size]``.
        values: ``[room, num_kv_heads, head_size]``.
        plan: the layer's plan.
        batch: the sequences, with ``lengths``.
        spans: what is in the workspace.
        output: ``[num_tokens, num_heads, head_size]``, written.

    Returns:
        Whether it did.
    """
    whole = all(span.first and span.last for span in spans)
    special = plan.logits_soft_cap or plan.sinks is not None or query.dtype == torch.float32
    if not whole or special or query.device.type != "cuda":
        return False
    library = best()
    if library is None:
        return False
    assert batch.lengths is not None
    query_lens = [batch.lengths[span.sequence][0] for span in spans]
    key_lens = [span.stop - span.begin for span in spans]
    begin = sum(query_len for query_len, _ in batch.lengths[: spans[0].sequence])
    end, context = begin + sum(query_lens), sum(key_lens)
    attended = library(
        query[begin:end], keys[:context], values[:context], query_lens, key_lens, plan.scale, plan.sliding_window or 0
    )
    output[begin:end] = attended
    return True


@functools.cache
def best() -> Varlen | None:
    """The library's attention, or None where there is none."""
    for candidate in (_flash, _xformers):
        try:
            return candidate()
        except ImportError:
            continue
    return None


def starts(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """``[sequences + 1]`` int32: at which token every sequence starts."""
    host = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return host.pin_memory().to(device, non_blocking=True)


def _flash() -> Varlen:
    """PyTorch's own FlashAttention (2.10 and later); causal, aligned to the last token."""
    from torch.nn.attention.varlen import varlen_attn

    def varlen(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
        scale: float,
        window: int,
    ) -> torch.Tensor:
        attended = varlen_attn(
            query,
            keys,
            values,
            starts(query_lens, query.device),
            starts(key_lens, query.device),
            max(query_lens),
            max(key_lens),
            scale=scale,
            # A window counts the query itself, this count does not.
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        assert isinstance(attended, torch.Tensor)
        return attended

    return varlen


def _xformers() -> Varlen:
    """Memory-efficient attention of xformers."""
    from xformers.ops import fmha

    def varlen(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
        scale: float,
        window: int,
    ) -> torch.Tensor:
        mask = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(list(query_lens), list(key_lens))
        if window:
            mask = mask.make_local_attention(window)
        kv_heads = keys.shape[1]
        # [1, tokens, kv heads, query heads of a kv head, channels]; keys and values are views, not copies.
        grouped = query.unflatten(1, (kv_heads, -1))[None]
        group = grouped.shape[3]
        keys, values = (x[None, :, :, None].expand(-1, -1, -1, group, -1) for x in (keys, values))
        return fmha.memory_efficient_attention_forward(grouped, keys, values, mask, scale=scale)[0].flatten(1, 2)

    return varlen
