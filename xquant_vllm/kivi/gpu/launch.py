"""Paged attention through the Triton kernels."""

from typing import Any

import torch
import triton

from xquant_vllm.attention.gpu import workspace
from xquant_vllm.attention.gpu.arguments import describe_batch, describe_scores, products
from xquant_vllm.attention.gpu.decode.merge import merge
from xquant_vllm.attention.gpu.device.arguments import Partial
from xquant_vllm.attention.gpu.tiling import shape_of
from xquant_vllm.kivi.gpu.arguments import describe_quantized, describe_residual
from xquant_vllm.kivi.gpu.kivi_attend import kivi_attend
from xquant_vllm.kivi.gpu.kivi_gpu_plan import KiviGpuPlan, prepare
from xquant_vllm.kivi.plan import KiviBatch, KiviLayerPlan

# Rows of a tile of prefilling queries, and numbers of their sums at most.
_PREFILL_ROWS, _MOST_SUMS = 128, 16384
# Of these sums, those that four warps have registers for.
_OF_FOUR_WARPS = 4096


def paged_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    residual_pages: torch.Tensor,
    plan: KiviLayerPlan,
    batch: KiviBatch,
    output: torch.Tensor,
) -> None:
    """Causal attention of query tokens over their sequences' pages; see :func:`reference.paged_attention`.

    Leading sequences with few query tokens *decode*: their contexts are split among programs. From the first that has
    more on all *prefill*: their queries are split. Cached tokens are counted on the device in both cases. Where a batch
    only decodes, nothing is read from the device and no launch depends on what is there, so that a CUDA graph can hold
    the call.
    """
    sequences = batch.sequences.seq_lens.shape[0]
    if not query.shape[0] or not sequences:
        return
    gpu_plan = prepare(plan, query.dtype, query.device)
    group = plan.num_heads // plan.num_kv_heads
    arguments = _arguments(query, pages, residual_pages, plan, gpu_plan, batch)
    run = batch.sequences.decoding.leading
    leading = run.stop
    if leading:
        rows, tiles, splits = shape_of(group, plan.num_kv_heads, leading, run.longest, batch.sequences.decode_tokens)
        partial = None
        if splits > 1:
            # Tokens of these sequences come first, but how many they are the host need not know.
            tokens = min(query.shape[0], leading * run.longest)
            partial = Partial(*workspace.take(query.device, *workspace_parts(plan, gpu_plan, tokens, splits)))
        _launch_attention(arguments, plan, gpu_plan, partial, output, 0, leading, rows, tiles, splits)
        if partial is not None:
            _launch_merge(partial, plan, gpu_plan, batch, output, tokens, leading, splits)
    if leading < sequences:
        assert batch.sequences.lengths is not None
        longest = max(query_len for query_len, _ in batch.sequences.lengths[leading:])
        rows = max(min(_PREFILL_ROWS, _MOST_SUMS // gpu_plan.value_width), triton.next_power_of_2(group))
        tiles = triton.cdiv(longest, rows // group)
        _launch_attention(arguments, plan, gpu_plan, None, output, leading, sequences - leading, rows, tiles, 1)


def workspace_parts(
    plan: KiviLayerPlan, gpu_plan: KiviGpuPlan, tokens: int, splits: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of what decoding takes of the workspace."""
    if splits == 1:
        return ()
    rows = (tokens, plan.num_heads, splits)
    return ((*rows, gpu_plan.value_width), torch.float32), ((*rows, 3), torch.float32)


def _arguments(
    query: torch.Tensor,
    pages: torch.Tensor,
    residual_pages: torch.Tensor,
    plan: KiviLayerPlan,
    gpu_plan: KiviGpuPlan,
    batch: KiviBatch,
) -> tuple[Any, ...]:
    """What :func:`kivi_attend` reads."""
    return (
        describe_batch(query, batch.sequences),
        gpu_plan.columns,
        describe_quantized(pages, plan.quantized),
        describe_residual(residual_pages, plan.residual, batch.residual_block_table),
        gpu_plan.tail,
        describe_scores(plan),
        plan.residual_tokens,
        batch.sequences.block_table.stride(0),
        batch.residual_block_table.stride(0),
    )


def _launch_attention(
    arguments: tuple[Any, ...],
    plan: KiviLayerPlan,
    gpu_plan: KiviGpuPlan,
    partial: Partial | None,
    output: torch.Tensor,
    first_sequence: int,
    sequences: int,
    rows: int,
    tiles: int,
    splits: int,
) -> None:
    kivi_attend[(sequences * tiles, plan.num_kv_heads, splits)](
        *arguments,
        partial,
        output,
        output.stride(0),
        output.stride(1),
        first_sequence,
        tiles,
        splits,
        GROUP=plan.num_heads // plan.num_kv_heads,
        ROWS=rows,
        SPLIT=partial is not None,
        EXACT_STEP=plan.exact_step,
        SOFT_CAP=bool(plan.logits_soft_cap),
        WINDOW=bool(plan.sliding_window),
        **gpu_plan.constants,
        **products(gpu_plan.dtype),
        num_warps=8 if rows * gpu_plan.value_width > _OF_FOUR_WARPS else 4,
        num_stages=2,
    )


def _launch_merge(
    partial: Partial,
    plan: KiviLayerPlan,
    gpu_plan: KiviGpuPlan,
    batch: KiviBatch,
    output: torch.Tensor,
    tokens: int,
    sequences: int,
    splits: int,
) -> None:
    group = plan.num_heads // plan.num_kv_heads
    merge[(tokens, plan.num_kv_heads)](
        partial,
        None,
        None,
        gpu_plan.value_columns,
        None,
        None,
        batch.sequences.query_start_loc,
        sequences,
        output,
        output.stride(0),
        output.stride(1),
        plan.num_heads,
        splits,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        HALF=gpu_plan.value_width // 2,
        WIDTH=0,
        PARTS=1,
        ABSORB_VALUE=False,
        PROJECT_VALUE=False,
        FACTORS=False,
        BIAS=False,
        SINKS=False,
        **products(gpu_plan.dtype),
    )
