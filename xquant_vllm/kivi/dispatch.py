"""Which implementation of KIVI's calls runs: so far the PyTorch reference."""

from typing import Protocol, cast

import torch

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


def select(device_type: str) -> KiviKernels:
    """The implementation for tensors on devices of this type ("cpu", ...)."""
    return cast(KiviKernels, reference)


def describe(device_type: str) -> str:
    """One line for the log: what runs and, if it is the slow one, why."""
    return f"attention runs on the PyTorch reference: there are no kernels for {device_type}"
