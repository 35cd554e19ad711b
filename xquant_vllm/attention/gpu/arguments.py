"""What several kernels are handed alike: the batch, latents, scores, and what they are compiled for."""

from typing import Any, Protocol

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.device.arguments import Batch, Scores
from xquant_vllm.attention.gpu.device.unpack import Latent
from xquant_vllm.attention.gpu.gpu_plan import GpuPlan
from xquant_vllm.attention.gpu.operands import ATTENDS, LAUNCH, operand_type, precision
from xquant_vllm.attention.gpu.tables.latent_tables import LatentTables
from xquant_vllm.attention.gpu.tables.run_fields import MergedFields


def describe_batch(query: torch.Tensor, batch: AttentionBatch) -> Batch:
    """The batch as kernels read it; ``query`` is ``[num_tokens, num_heads, head_size]``."""
    return Batch(
        query,
        query.stride(0),
        query.stride(1),
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        query.shape[1],
    )


def describe_latent(tables: LatentTables) -> Latent:
    """A latent as kernels read it."""
    return Latent(tables.bands, tables.first_band, tables.addresses, tables.up, tables.up_sum, tables.up_outliers)


def describe_fields(tables: MergedFields) -> Latent:
    """What sums over fields are multiplied by, as ``merge`` reads it; it reads nothing else of a latent."""
    return Latent(tables.first_band, tables.first_band, tables.first_band, tables.up, tables.up_sum, tables.up_sum)


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
    """Operands and precision of an attention kernel's products of operands of a dtype, and how it rounds."""
    return {"DTYPE": operand_type(dtype), "PRECISION": precision(dtype), **ATTENDS}


def unpacking(gpu_plan: GpuPlan) -> dict[str, Any]:
    """What kernels that rematerialize keys and values from pages are compiled for, and how they are launched."""
    key, value = gpu_plan.key, gpu_plan.value
    return {
        "TOKENS": gpu_plan.tokens,
        "HALF": gpu_plan.half,
        "KEY_WIDTH": key.width,
        "KEY_KINDS": key.kinds,
        "KEY_HIGH": key.high,
        "KEY_OUTLIERS": key.most_outliers,
        "VALUE_WIDTH": value.width,
        "VALUE_KINDS": value.kinds,
        "VALUE_HIGH": value.high,
        "VALUE_OUTLIERS": value.most_outliers,
        "BIAS": gpu_plan.has_key_bias,
        "NORM": gpu_plan.norm,
        "ROPE": gpu_plan.rotates,
        **products(gpu_plan.dtype),
        **LAUNCH,
    }
