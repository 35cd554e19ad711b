"""Which implementation of KIVI's calls runs: C++ kernels on CPUs, else the reference."""

import functools
from typing import Protocol, cast

import torch

from xquant_vllm.attention.dispatch import Choice, choose
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
    from xquant_vllm.kivi import cpu

    return cast(KiviKernels, cpu)


@functools.cache
def _choose(device_type: str) -> Choice[KiviKernels]:
    return choose(device_type, cast(KiviKernels, reference), _load_cpu, None)


def select(device_type: str) -> KiviKernels:
    """The implementation for tensors on devices of this type ("cpu", ...); see :func:`.attention.dispatch.choose`."""
    return _choose(device_type).kernels


def describe(device_type: str) -> str:
    """One line for the log: what runs and, if it is the slow one, why."""
    return _choose(device_type).text
