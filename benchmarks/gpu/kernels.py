"""Which kernels the suite checks and times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.layers import Model
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.plan import AttentionLayerPlan, WholeAttention

Attention = Callable[
    [torch.Tensor, Sequence[torch.Tensor], AttentionLayerPlan, AttentionBatch, torch.Tensor],
    None,
]
Store = Callable[[Sequence[torch.Tensor], AttentionLayerPlan, torch.Tensor, Sequence[torch.Tensor]], None]


@dataclass(frozen=True)
class Kernels:
    """One implementation of :mod:`xquant_vllm.attention.reference`.

    Attributes:
        name: what tables call it.
        paged_attention: see the reference; None: there is none.
        store: see the reference; None: there is none.
    """

    name: str
    paged_attention: Attention | None
    store: Store | None


def triton_kernels() -> Kernels:
    """The Triton kernels."""
    from xquant_vllm.attention.gpu.launch import paged_attention
    from xquant_vllm.attention.gpu.store.store import store

    return Kernels("triton", paged_attention, store)


KERNELS: dict[str, Callable[[], Kernels]] = {"triton": triton_kernels}
"""By name, so that another process can find them."""


def attend_whole_of(model: Model, device: torch.device, dtype: torch.dtype) -> WholeAttention | None:
    """What a served layer attends to rematerialized keys and values with: vLLM's FlashAttention, where it is installed.

    Args:
        model: whose layer.
        device: where.
        dtype: of the queries.
    """
    if device.type != "cuda":
        return None
    try:
        from xquant_vllm.plugin.flash import attend_whole_for

        return attend_whole_for(dtype, model.head_size, model.heads, sinks=False, soft_cap=None)
    except ImportError:
        return None
