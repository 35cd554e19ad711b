"""The Triton kernels, as :class:`xquant_vllm.attention.dispatch.AttentionKernels` has them."""

import torch

from xquant_vllm.attention.gpu import workspace
from xquant_vllm.attention.gpu.decode import decode
from xquant_vllm.attention.gpu.gpu_plan import prepare
from xquant_vllm.attention.gpu.launch import paged_attention as _attend
from xquant_vllm.attention.gpu.limits import refusing_what_does_not_fit
from xquant_vllm.attention.gpu.prefill import prefill
from xquant_vllm.attention.gpu.prefill.step import ROOM, PrefillSteps
from xquant_vllm.attention.gpu.store.store import store as _store
from xquant_vllm.attention.gpu.store.store import workspace_parts
from xquant_vllm.attention.gpu.store.store_tables import prepare_store
from xquant_vllm.attention.gpu.tiling import most_splits
from xquant_vllm.attention.plan import AttentionLayerPlan

__all__ = ["HOT_ROWS_ON_DEVICE", "PrefillSteps", "fix", "paged_attention", "reserve", "store"]

paged_attention = refusing_what_does_not_fit(_attend)
store = refusing_what_does_not_fit(_store)

HOT_ROWS_ON_DEVICE = True
"""Kernels find out which rows are attended from a pool of hot blocks, see gpu/hot/rows.py; read by the plugin."""


def reserve(plan: AttentionLayerPlan, tokens: int, sequences: int, dtype: torch.dtype, device: torch.device) -> None:
    """Make room for every batch of at most as many tokens and sequences, and the tables of a layer.

    Args:
        plan: the layer's plan.
        tokens: query tokens of a batch at most.
        sequences: sequences of a batch at most.
        dtype: of the queries.
        device: where.
    """
    gpu_plan = prepare(plan, dtype)
    prepare_store(plan)
    sizes = [workspace.bytes_of(*prefill.workspace_parts(plan, gpu_plan, tokens, ROOM))]
    sizes.append(workspace.bytes_of(*workspace_parts(plan, tokens)))
    kv_heads = plan.projection.num_kv_heads
    splits = most_splits(plan.num_heads // kv_heads, kv_heads, tokens)
    sizes.append(workspace.bytes_of(*decode.workspace_parts(plan, gpu_plan, tokens, splits)))
    workspace.reserve(device, max(sizes))


def fix(device: torch.device) -> None:
    """From now on nothing is allocated: what is reserved must do."""
    workspace.fix(device)
