"""What several kernels are handed alike: the batch, the scores, and what they are compiled for."""

from typing import Any, Protocol

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.decode.attend import Batch, Scores
from xquant_vllm.attention.gpu.operands import LAUNCH, TOKENS, operand_type, precision
from xquant_vllm.attention.gpu.prepared import PreparedPlan


def describe_batch(query: torch.Tensor, batch: AttentionBatch) -> Batch:
    """The batch as kernels read it; ``query`` is ``[num_tokens, num_heads, head_size]``."""
    return Batch(
        query,
        query.stride(0),
        query.stride(1),
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        batch.block_table.stride(0),
        query.shape[1],
    )


class Scored(Protocol):
    """A layer's plan, as far as scores go."""

    @property
    def scale(self) -> float:
        """Factor on the scores."""

    @property
    def logits_soft_cap(self) -> float | None:
        """Their bound, or None."""

    @property
    def sliding_window(self) -> int | None:
        """Keys that a query sees, or None."""


def describe_scores(plan: Scored) -> Scores:
    """Scale, soft cap and window as kernels read them."""
    return Scores(plan.scale, plan.logits_soft_cap or 0.0, plan.sliding_window or 0)


def products(dtype: torch.dtype) -> dict[str, Any]:
    """Operands and precision of a kernel's products of operands of a dtype."""
    return {"DTYPE": operand_type(dtype), "PRECISION": precision(dtype)}


def unpacking(prepared: PreparedPlan) -> dict[str, Any]:
    """What kernels that rematerialize keys and values from pages are compiled for, and how they are launched."""
    key, value = prepared.key, prepared.value
    return {
        "TOKENS": TOKENS,
        "HALF": prepared.half,
        "KEY_WIDTH": key.width,
        "KEY_KINDS": key.kinds,
        "KEY_HIGH": key.high,
        "KEY_OUTLIERS": key.most_outliers,
        "VALUE_WIDTH": value.width,
        "VALUE_KINDS": value.kinds,
        "VALUE_HIGH": value.high,
        "VALUE_OUTLIERS": value.most_outliers,
        "BIAS": prepared.has_key_bias,
        "NORM": prepared.norm,
        "ROPE": prepared.rotates,
        **products(prepared.dtype),
        **LAUNCH,
    }
