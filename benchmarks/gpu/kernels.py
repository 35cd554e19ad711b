"""Which kernels the suite checks and times."""

import importlib
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
        store: likewise.
    """

    name: str
    paged_attention: Attention | None
    store: Store | None


def _of(module: str, name: str) -> Callable[..., None] | None:
    """A function of a module; None where there is no such module."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


def triton_kernels() -> Kernels:
    """The Triton kernels. The one that stores may be missing."""
    package = "xquant_vllm.attention.gpu"
    return Kernels("triton", _of(f"{package}.launch", "paged_attention"), _of(f"{package}.store", "store"))


KERNELS: dict[str, Callable[[], Kernels]] = {"triton": triton_kernels}
"""By name, so that another process can find them."""
