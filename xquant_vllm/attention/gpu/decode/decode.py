"""Decoding: few query tokens per sequence, keys rematerialized as they go; see decode/attend.py."""

from collections.abc import Sequence

import torch
import triton

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu import workspace
from xquant_vllm.attention.gpu.arguments import (
    describe_batch,
    describe_fields,
    describe_latent,
    describe_scores,
    products,
    unpacking,
)
from xquant_vllm.attention.gpu.decode.absorb import absorb
from xquant_vllm.attention.gpu.decode.attend import attend
from xquant_vllm.attention.gpu.decode.launch_heads import launch_heads
from xquant_vllm.attention.gpu.decode.merge import merge
from xquant_vllm.attention.gpu.device.arguments import Absorbed, Partial
from xquant_vllm.attention.gpu.gpu_plan import GpuPlan
from xquant_vllm.attention.gpu.page_pointers import page_pointers
from xquant_vllm.attention.gpu.tiling import shape_of
from xquant_vllm.attention.plan import AttentionLayerPlan

# Products of FP32 are no tensor cores': four warps would spill 10 KB a thread of what they unroll to.
_MERGE_WARPS = {torch.float32: 16}


def workspace_parts(
    plan: AttentionLayerPlan, gpu_plan: GpuPlan, tokens: int, splits: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of what :func:`decode` takes of the workspace."""
    heads, key = plan.num_heads, gpu_plan.key
    width = gpu_plan.value.width if gpu_plan.absorb_value else 2 * gpu_plan.half
    if gpu_plan.fields is not None:
        width = gpu_plan.fields.parts * gpu_plan.fields.width
    bands = key.most_bands if gpu_plan.absorb_key else 0
    return (
        ((tokens, heads, splits, width), torch.float32),
        ((tokens, heads, splits, 3), torch.float32),
        ((tokens, heads, bands, key.width), gpu_plan.dtype),
        ((tokens, heads, bands, 1 + key.most_outliers), torch.float32),
    )


def decode(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    gpu_plan: GpuPlan,
    batch: AttentionBatch,
    output: torch.Tensor,
    sequences: int,
    longest: int,
) -> None:
    """Causal attention of the first ``sequences`` sequences.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, after RoPE.
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8.
        plan: the layer's plan.
        gpu_plan: what kernels read of it.
        batch: the sequences.
        output: ``[num_tokens, num_heads, head_size]``, written.
        sequences: how many of the sequences.
        longest: query tokens of one of these at most.
    """
    kv_heads, num_heads = plan.projection.num_kv_heads, plan.num_heads
    # Tokens of these sequences come first, but how many they are the host need not know.
    tokens = min(query.shape[0], sequences * longest)
    group, half = num_heads // kv_heads, gpu_plan.half
    key, value = gpu_plan.key, gpu_plan.value
    rows, tiles, splits = shape_of(group, kv_heads, sequences, longest, batch.decode_tokens)
    of_batch = describe_batch(query, batch)
    sums, stats, absorbed_query, absorbed_sums = workspace.take(
        query.device, *workspace_parts(plan, gpu_plan, tokens, splits)
    )
    partial, absorbed = Partial(sums, stats), Absorbed(absorbed_query, absorbed_sums, key.most_bands)
    of_token = max(16, triton.next_power_of_2(group))
    if gpu_plan.absorb_key:
        absorb[(tokens, kv_heads, key.most_bands)](
            of_batch,
            gpu_plan.columns,
            describe_latent(key),
            absorbed,
            GROUP=group,
            ROWS=of_token,
            HALF=half,
            WIDTH=key.width,
            OUTLIERS=key.most_outliers,
            **products(gpu_plan.dtype),
        )
    if gpu_plan.heads is not None:
        launch_heads(
            of_batch,
            batch.block_table.stride(0),
            pages[0],
            plan,
            gpu_plan,
            partial,
            sequences,
            longest,
            batch.decode_tokens,
            splits,
        )
    else:
        attend[(sequences * tiles, kv_heads, splits)](
            of_batch,
            gpu_plan.columns,
            page_pointers(pages, plan.layout.block_size),
            describe_latent(key),
            gpu_plan.tail,
            describe_latent(value),
            absorbed,
            partial,
            describe_scores(plan),
            batch.block_table.stride(0),
            tiles,
            splits,
            GROUP=group,
            ROWS=rows,
            ABSORB_KEY=gpu_plan.absorb_key,
            ABSORB_VALUE=gpu_plan.absorb_value,
            SHARED=gpu_plan.shared and not gpu_plan.absorb_key,
            SOFT_CAP=bool(plan.logits_soft_cap),
            WINDOW=bool(plan.sliding_window),
            **unpacking(gpu_plan),
        )
    fields = gpu_plan.fields
    merge[(tokens, kv_heads)](
        partial,
        describe_latent(value) if fields is None else describe_fields(fields),
        gpu_plan.value_factors,
        gpu_plan.value_columns,
        gpu_plan.value_bias,
        gpu_plan.sinks,
        batch.query_start_loc,
        sequences,
        output,
        output.stride(0),
        output.stride(1),
        num_heads,
        splits,
        GROUP=group,
        ROWS=of_token,
        HALF=half,
        WIDTH=value.width if fields is None else fields.width,
        PARTS=1 if fields is None else fields.parts,
        ABSORB_VALUE=gpu_plan.absorb_value,
        PROJECT_VALUE=gpu_plan.project_value or fields is not None,
        FACTORS=fields is not None and fields.are_codes,
        BIAS=gpu_plan.has_value_bias,
        SINKS=plan.sinks is not None,
        num_warps=_MERGE_WARPS.get(gpu_plan.dtype, 4),
        **products(gpu_plan.dtype),
    )
