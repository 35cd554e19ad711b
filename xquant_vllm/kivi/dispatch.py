"""Which implementation of KIVI's calls runs: Triton kernels on GPUs, C++ kernels on CPUs, else the reference."""

from typing import Protocol, cast

import torch

from xquant_vllm.attention.dispatch import Dispatch
from xquant_vllm.kivi import reference
from xquant_vllm.kivi.plan import KiviBatch, KiviLayerPlan


class KiviKernels(Protocol):
    """What all implementations offer; see :mod:`xquant_vllm.kivi.reference`."""

    def store(
        self,
        pages: torch.Tensor,
        residual_pages: torch.Tensor,
        plan: KiviLayerPlan,
        batch: KiviBatch,
        slot_mapping: torch.Tensor,
        residual_slot_mapping: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Write new tokens to residual pages, their values to quantized pages, and complete groups of keys."""

    def paged_attention(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        residual_pages: torch.Tensor,
        plan: KiviLayerPlan,
        batch: KiviBatch,
        output: torch.Tensor,
    ) -> None:
        """Causal attention of query tokens over their sequences' pages."""


def _load_cpu() -> KiviKernels:
    from xquant_vllm.kivi.cpu import kernels as cpu

    return cast(KiviKernels, cpu)


def _load_triton() -> KiviKernels:
    from xquant_vllm.kivi.gpu import kernels

    return cast(KiviKernels, kernels)


_dispatch = Dispatch(cast(KiviKernels, reference), _load_cpu, _load_triton)
_choose = _dispatch.choice
select, describe, reserve, fix = _dispatch.select, _dispatch.describe, _dispatch.reserve, _dispatch.fix
