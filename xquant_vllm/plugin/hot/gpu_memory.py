"""Memory that layers share for writing to their pools of hot blocks and for attending from two places."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from xquant_vllm.attention.gpu.hot.buffers import BufferSizes, HotBuffers
from xquant_vllm.attention.plan import AttentionLayerPlan


class HotGpuMemory:
    """Of an engine."""

    def __init__(self, plans: Sequence[AttentionLayerPlan], tokens: int, dtype: torch.dtype) -> None:
        """Take the memory."""
        device = plans[0].device
        self.buffers = HotBuffers(BufferSizes.of(plans), tokens, dtype, device)
        self._attended = torch.empty(_attended_size(plans) * tokens, dtype=dtype, device=device)

    @staticmethod
    def bytes_of(plans: Sequence[AttentionLayerPlan], tokens: int, dtype: torch.dtype) -> int:
        """Bytes of this, and of the up-projections in the products' dtype."""
        shared = BufferSizes.of(plans).bytes_of(tokens, dtype) + _attended_size(plans) * tokens * dtype.itemsize
        matrices = [of for plan in plans for of in (plan.projection.up_key, plan.projection.up_value) if of is not None]
        return shared + sum(of.numel() for of in matrices) * dtype.itemsize

    def attended(self, query: torch.Tensor) -> torch.Tensor:
        """Room for an output."""
        return self._attended[: query.numel()].view(query.shape)


def _attended_size(plans: Sequence[AttentionLayerPlan]) -> int:
    return max(plan.num_heads * plan.projection.head_size for plan in plans)


def step_tokens(vllm_config: Any) -> int:
    """Query tokens of a batch at most, padding and drafts included."""
    scheduler, speculative = vllm_config.scheduler_config, vllm_config.speculative_config
    drafted = 0 if speculative is None else speculative.num_speculative_tokens
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(scheduler.max_num_batched_tokens, captured) + scheduler.max_num_seqs * drafted


def plans_of(vllm_config: Any) -> list[AttentionLayerPlan]:
    """The plans of all layers that have pages of latents."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    impls = [layer.impl for layer in layers if isinstance(layer, Attention)]
    block_size = vllm_config.cache_config.block_size
    return [impl.plan(block_size) for impl in impls if getattr(impl, "scheme", None) is not None]


def shared_bytes(vllm_config: Any) -> int:
    """Bytes of what is shared, and of the layers' up-projections in the model's dtype."""
    return HotGpuMemory.bytes_of(plans_of(vllm_config), step_tokens(vllm_config), vllm_config.model_config.dtype)
