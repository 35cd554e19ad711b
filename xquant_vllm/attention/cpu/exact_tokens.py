"""Exact tokens of a step as the C++ kernels take them (csrc/cpu/attention/exact_tokens.h)."""

from collections.abc import Sequence

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.cpu.streams import LANES
from xquant_vllm.attention.exact import exact_keys, exact_latents, prompts, query_positions
from xquant_vllm.attention.plan import AttentionLayerPlan


def exact_tokens(
    plan: AttentionLayerPlan, batch: AttentionBatch, inputs: Sequence[torch.Tensor] | None, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and value latents of the query tokens, if a sequence attends to its own exactly.

    They are computed by torch, once per token: kernels that find codes rematerialize a key for every tile of queries.

    Args:
        plan: the layer's plan.
        batch: the sequences.
        inputs: as of :func:`reference.store`.
        num_tokens: query tokens.

    Returns:
        Keys ``[num_kv_heads, head_size, num_tokens]`` after RoPE and value latents ``[num_tokens, latent heads, width
        rounded up to 16]``, FP32; None if all tokens are read from pages.
    """
    if not prompts(plan, batch):
        return None
    assert inputs is not None
    width = plan.projection.value_width
    keys = exact_keys(plan, inputs, query_positions(batch, num_tokens)).permute(1, 2, 0).contiguous()
    values = exact_latents(plan, inputs, plan.value_terms, width + -width % LANES).contiguous()
    return keys, values
