"""The reference with keys of latents in 8 bits, as csrc/cpu/attention/byte_keys.h makes them."""

from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import torch

from tests.attention.attention_cases import Case
from tests.attention.cpu.twin import twin
from xquant_vllm.attention import reference
from xquant_vllm.attention.cpu import library
from xquant_vllm.attention.cpu.byte_keys import round_latents
from xquant_vllm.attention.cpu.plan import CpuPlan
from xquant_vllm.projection.integer_up import LARGEST_BYTE
from xquant_vllm.projection.rematerialize import LayerProjection, rematerialize_keys


def on_bytes(case: Case) -> Case:
    """The case with its key up-projection in integers of 8 bits, a unit per column, so that kernels round nothing."""
    projection = case.plan.projection
    up = projection.up_key.double()
    unit = (up.abs().amax(1, keepdim=True) / LARGEST_BYTE).clamp_min(1e-30)
    whole = ((up / unit).round() * unit).float()
    return replace(case, plan=replace(case.plan, projection=replace(projection, up_key=whole)))


def in_bytes(case: Case) -> bool:
    """Whether the instruction set in use makes the case's keys of bytes."""
    return CpuPlan(case.plan, library.multiplies_integers()).byte_keys is not None


def run_reference(case: Case) -> torch.Tensor:
    """What the reference makes of a case, with what the kernels round rounded: key latents, for AMX keys.

    Tokens that come exactly are not rounded: they come as keys.
    """
    if not in_bytes(case):
        return case.run(twin())
    exact = 0

    def exact_latents(plan: object, inputs: Sequence[torch.Tensor], *rest: object) -> torch.Tensor:
        nonlocal exact
        exact = inputs[0].shape[0]
        return original(plan, inputs, *rest)

    def rounded_keys(latents: torch.Tensor, positions: torch.Tensor, projection: LayerProjection) -> torch.Tensor:
        nonlocal exact
        count, exact = latents.shape[0] - exact, 0
        latents = torch.cat((round_latents(latents[:count]), latents[count:]))
        return rematerialize_keys(latents, positions, projection)

    original = reference.exact_latents
    with (
        patch.object(reference, "exact_latents", exact_latents),
        patch.object(reference, "rematerialize_keys", rounded_keys),
    ):
        return case.run(reference)
