"""The Triton kernels, as :class:`xquant_vllm.kivi.dispatch.KiviKernels` has them."""

import torch

from xquant_vllm.attention.gpu import workspace
from xquant_vllm.attention.gpu.limits import refusing_what_does_not_fit
from xquant_vllm.attention.gpu.tiling import most_splits
from xquant_vllm.attention.gpu.workspace import fix
from xquant_vllm.kivi.gpu.kivi_gpu_plan import prepare
from xquant_vllm.kivi.gpu.launch import paged_attention as _attend
from xquant_vllm.kivi.gpu.launch import workspace_parts
from xquant_vllm.kivi.gpu.store import store as _store
from xquant_vllm.kivi.plan import KiviLayerPlan

__all__ = ["fix", "paged_attention", "reserve", "store"]

paged_attention = refusing_what_does_not_fit(_attend)
store = refusing_what_does_not_fit(_store)


def reserve(plan: KiviLayerPlan, tokens: int, sequences: int, dtype: torch.dtype, device: torch.device) -> None:
    """Make room for every batch of at most as many tokens and sequences, and the tables of a layer.

    Args:
        plan: the layer's plan.
        tokens: query tokens of a batch at most.
        sequences: sequences of a batch at most.
        dtype: of the queries.
        device: where.
    """
    gpu_plan = prepare(plan, dtype, device)
    splits = most_splits(plan.num_heads // plan.num_kv_heads, plan.num_kv_heads, tokens)
    workspace.reserve(device, workspace.bytes_of(*workspace_parts(plan, gpu_plan, tokens, splits)))
