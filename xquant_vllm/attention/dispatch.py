"""Which implementation of the attention calls runs: the C++ kernels where they were built, else the reference."""

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch

from xquant_vllm.attention import reference
from xquant_vllm.attention.batch import AttentionBatch, AttentionLayerPlan

# For tests: "reference", or an instruction set of the kernels ("portable", "avx2", "avx512"). Read once per process.
OVERRIDE_VARIABLE = "XQUANT_ATTENTION_KERNELS"

_CHOICES = ("reference", "portable", "avx2", "avx512")

# Measured: decode of 8 sequences with 512 and 4096 cached tokens, 9 heads, 3 kv heads of 64 channels, 4 bits, AVX-512,
# on 1 and 2 cores.
_REFERENCE_SLOWDOWN = "13 to 20 times"


class AttentionKernels(Protocol):
    """What both implementations offer; see :mod:`xquant_vllm.attention.reference`."""

    def store(
        self,
        pages: Sequence[torch.Tensor],
        plan: AttentionLayerPlan,
        slot_mapping: torch.Tensor,
        inputs: Sequence[torch.Tensor],
    ) -> None:
        """Quantize what new tokens bring into their slots."""

    def paged_attention(
        self,
        query: torch.Tensor,
        pages: Sequence[torch.Tensor],
        plan: AttentionLayerPlan,
        batch: AttentionBatch,
        output: torch.Tensor,
    ) -> None:
        """Causal attention of query tokens over their sequences' pages."""


class _Choice(NamedTuple):
    kernels: AttentionKernels
    text: str


@functools.cache
def _choose(device_type: str) -> _Choice:
    override = os.environ.get(OVERRIDE_VARIABLE)
    if override and override not in _CHOICES:
        raise ValueError(f"{OVERRIDE_VARIABLE}={override} is unknown: set one of {', '.join(_CHOICES)}, or unset it")
    slow = cast(AttentionKernels, reference)
    if override == "reference":
        return _Choice(slow, f"attention runs on the PyTorch reference, as {OVERRIDE_VARIABLE} demands")
    if device_type != "cpu":
        return _Choice(slow, f"attention runs on the PyTorch reference: there are no kernels for {device_type} yet")
    try:
        from xquant_vllm.attention import cpu
    except OSError as error:
        if override:
            raise RuntimeError(f"{OVERRIDE_VARIABLE}={override} cannot be met: {error}") from error
        return _Choice(
            slow,
            f"attention runs on the PyTorch reference, {_REFERENCE_SLOWDOWN} slower than the C++ kernels, because "
            f"these cannot be loaded ({error}); install g++ and reinstall xquant-vllm",
        )
    if override and not cpu.set_isa(override):
        raise RuntimeError(f"{OVERRIDE_VARIABLE}={override} cannot be met: this processor or this build lacks it")
    return _Choice(cast(AttentionKernels, cpu), f"attention runs on the C++ kernels for {cpu.isa()}")


def select(device_type: str) -> AttentionKernels:
    """The implementation for tensors on devices of this type ("cpu", ...).

    Raises:
        ValueError: the override variable has an unknown value.
        RuntimeError: what the override variable demands is not available.
    """
    return _choose(device_type).kernels


def describe(device_type: str = "cpu") -> str:
    """One line for the log: what runs and, if it is the slow one, what to do about it."""
    return _choose(device_type).text
