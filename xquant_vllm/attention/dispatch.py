"""Which implementation of the attention calls runs: Triton kernels on GPUs, C++ kernels on CPUs, else the reference."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

from xquant_vllm.attention import reference
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.plan import AttentionLayerPlan

# For tests: "reference", "triton" (also on the CPU, under TRITON_INTERPRET=1), or an instruction set of the C++ kernels
# ("portable", "avx2", "avx512", "vnni", "amx", "amx-emulated"). Read once per process.
OVERRIDE_VARIABLE = "XQUANT_ATTENTION_KERNELS"

_CHOICES = ("reference", "triton", "portable", "avx2", "avx512", "vnni", "amx", "amx-emulated")

# Measured: decode of 8 sequences with 512 and 4096 cached tokens, 9 heads, 3 kv heads of 64 channels, 4 bits, AVX-512,
# on 1 and 2 cores.
_REFERENCE_SLOWDOWN = "13 to 20 times"


class AttentionKernels(Protocol):
    """What all implementations offer; see :mod:`xquant_vllm.attention.reference`."""

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
        inputs: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Causal attention of query tokens over their sequences' pages."""


_Kernels = TypeVar("_Kernels")


@dataclass(frozen=True)
class Choice(Generic[_Kernels]):
    """What runs, and one line for the log that says so and, if it is the slow one, what to do about it."""

    kernels: _Kernels
    text: str


def choose(
    device_type: str, slow: _Kernels, load_cpu: Callable[[], _Kernels], load_triton: Callable[[], _Kernels]
) -> Choice[_Kernels]:
    """The implementation for tensors on devices of this type, or that which the override variable demands.

    Args:
        device_type: "cpu", ...
        slow: the PyTorch reference.
        load_cpu: imports the C++ kernels; raises OSError where they were not built.
        load_triton: imports the Triton kernels; raises ImportError where Triton is missing.

    Raises:
        ValueError: the override variable has an unknown value.
        RuntimeError: what the override variable demands is not available.
    """
    override = os.environ.get(OVERRIDE_VARIABLE)
    if override and override not in _CHOICES:
        raise ValueError(f"{OVERRIDE_VARIABLE}={override} is unknown: set one of {', '.join(_CHOICES)}, or unset it")
    if override == "reference":
        return Choice(slow, f"attention runs on the PyTorch reference, as {OVERRIDE_VARIABLE} demands")
    if device_type == "cuda" or override == "triton":
        return _triton(slow, load_triton, override)
    if device_type != "cpu":
        return Choice(slow, f"attention runs on the PyTorch reference: there are no kernels for {device_type}")
    try:
        kernels = load_cpu()
        from xquant_vllm.attention.cpu import library as cpu
    except OSError as error:
        if override:
            raise RuntimeError(f"{OVERRIDE_VARIABLE}={override} cannot be met: {error}") from error
        return Choice(
            slow,
            f"attention runs on the PyTorch reference, {_REFERENCE_SLOWDOWN} slower than the C++ kernels, because "
            f"these cannot be loaded ({error}); install g++ and reinstall xquant-vllm",
        )
    if override and not cpu.set_isa(override):
        raise RuntimeError(f"{OVERRIDE_VARIABLE}={override} cannot be met: this processor or this build lacks it")
    return Choice(kernels, f"attention runs on the C++ kernels for {cpu.describe()}")


def _triton(slow: _Kernels, load: Callable[[], _Kernels], override: str | None) -> Choice[_Kernels]:
    try:
        kernels = load()
    except ImportError as error:
        if override:
            raise RuntimeError(f"{OVERRIDE_VARIABLE}={override} cannot be met: {error}") from error
        return Choice(
            slow,
            "attention runs on the PyTorch reference, many times slower than the Triton kernels, because Triton cannot "
            f"be imported ({error}); install the triton that belongs to your torch",
        )
    text = (
        "attention runs on the Triton kernels: interpreted, compiled and counted without a GPU, and neither run nor "
        "measured on one yet (docs/gpu.md says what to expect)"
    )
    return Choice(kernels, text)


class Dispatch(Generic[_Kernels]):
    """One choice per type of device, made when it is first asked for."""

    def __init__(self, slow: _Kernels, load_cpu: Callable[[], _Kernels], load_triton: Callable[[], _Kernels]) -> None:
        """Take what :func:`choose` chooses from."""

        def of_device(device_type: str) -> Choice[_Kernels]:
            return choose(device_type, slow, load_cpu, load_triton)

        self.choice = functools.cache(of_device)

    def select(self, device_type: str) -> _Kernels:
        """The implementation for tensors on devices of this type ("cpu", ...).

        Raises:
            ValueError: the override variable has an unknown value.
            RuntimeError: what the override variable demands is not available.
        """
        return self.choice(device_type).kernels

    def describe(self, device_type: str = "cpu") -> str:
        """One line for the log: what runs and, if it is the slow one, what to do about it."""
        return self.choice(device_type).text

    def reserve(self, plan: Any, tokens: int, sequences: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take what memory the kernels need beside their arguments, before anything else does.

        Args:
            plan: a layer's plan.
            tokens: query tokens of a batch at most.
            sequences: sequences of a batch at most.
            dtype: of the queries.
            device: where.
        """
        take = getattr(self.select(device.type), "reserve", None)
        if take is not None:
            take(plan, tokens, sequences, dtype, device)

    def steps(self, plans: Iterable[Any], device: torch.device) -> Callable[[AttentionBatch], AttentionBatch]:
        """What makes of every batch, once for some layers, what these have in common.

        Args:
            plans: of the layers; they are not kept.
            device: where.
        """
        make = getattr(self.select(device.type), "PrefillSteps", None)
        if make is None:
            return lambda batch: batch
        steps = make(plans)
        return lambda batch: replace(batch, prefill=steps.make(batch))

    def fix(self, device: torch.device) -> None:
        """From now on the kernels may not allocate."""
        hold = getattr(self.select(device.type), "fix", None)
        if hold is not None:
            hold(device)


def _load_cpu() -> AttentionKernels:
    from xquant_vllm.attention.cpu import kernels as cpu

    return cast(AttentionKernels, cpu)


def _load_triton() -> AttentionKernels:
    from xquant_vllm.attention.gpu import kernels

    return cast(AttentionKernels, kernels)


_dispatch = Dispatch(cast(AttentionKernels, reference), _load_cpu, _load_triton)
_choose = _dispatch.choice
select, describe, reserve, fix = _dispatch.select, _dispatch.describe, _dispatch.reserve, _dispatch.fix
steps = _dispatch.steps
