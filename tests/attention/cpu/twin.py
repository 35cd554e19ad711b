"""What the C++ kernels are compared with: the reference, for AMX with keys rounded as tiles take them."""

from collections.abc import Sequence
from types import ModuleType
from unittest import mock

import torch

from xquant_vllm.attention import reference
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.projection.rematerialize import rematerialize_keys


def _rounded_keys(*arguments: object) -> torch.Tensor:
    return rematerialize_keys(*arguments).bfloat16().float()  # type: ignore[arg-type]


class BfloatScores:
    """The reference with keys, after RoPE, rounded to BF16 for BF16 queries.

    Not where keys are absorbed or kv heads share latents.
    """

    @staticmethod
    def paged_attention(
        query: torch.Tensor,
        pages: Sequence[torch.Tensor],
        plan: AttentionLayerPlan,
        batch: AttentionBatch,
        output: torch.Tensor,
        inputs: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """See :func:`xquant_vllm.attention.reference.paged_attention`."""
        from xquant_vllm.attention.cpu.plan import CpuPlan

        struct = CpuPlan(plan, with_integers=True).struct
        if struct.key_absorbed or struct.shares_latents or query.dtype != torch.bfloat16:
            reference.paged_attention(query, pages, plan, batch, output, inputs)
            return
        with mock.patch.object(reference, "rematerialize_keys", _rounded_keys):
            reference.paged_attention(query, pages, plan, batch, output, inputs)


def twin() -> ModuleType | type[BfloatScores]:
    """That of the instruction set in use."""
    from xquant_vllm.attention.cpu import library

    return BfloatScores if library.isa().startswith("amx") else reference
