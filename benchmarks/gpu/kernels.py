"""Which kernels the suite checks and times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.plan import AttentionLayerPlan

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
