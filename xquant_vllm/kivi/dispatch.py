"""Which implementation of KIVI's calls runs: Triton kernels on GPUs, C++ kernels on CPUs, else the reference."""

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


def _load_triton() -> KiviKernels:
    from xquant_vllm.kivi.gpu import kernels

    return cast(KiviKernels, kernels)


@functools.cache
def _choose(device_type: str) -> Choice[KiviKernels]:
    return choose(device_type, cast(KiviKernels, reference), _load_cpu, _load_triton)


def reserve(plan: KiviLayerPlan, tokens: int, sequences: int, dtype: torch.dtype, device: torch.device) -> None:
    """Take what memory the kernels need beside their arguments, before anything else does.

    Args:
        plan: a layer's plan.
        tokens: query tokens of a batch at most.
        sequences: sequences of a batch at most.
        dtype: of the queries.
        device: where.
    """
    take = getattr(select(device.type), "reserve", None)
    if take is not None:
        take(plan, tokens, sequences, dtype, device)


def fix(device: torch.device) -> None:
    """From now on the kernels may not allocate."""
    hold = getattr(select(device.type), "fix", None)
    if hold is not None:
        hold(device)


def select(device_type: str) -> KiviKernels:
    """The implementation for tensors on devices of this type ("cpu", ...); see :func:`.attention.dispatch.choose`."""
    return _choose(device_type).kernels


def describe(device_type: str) -> str:
    """One line for the log: what runs and, if it is the slow one, why."""
    return _choose(device_type).text
