"""Prefill: the context is rematerialized once per call, span by span, and attended to as keys and values.

A decoding query rematerializes keys as it goes. Here hundreds of queries attend to the same tokens, so these pass
through a workspace of bounded size (prefill/spans.py), whatever the context's length. Tokens of the step itself, where
they are attended to exactly, come from the model instead of the pages.
"""

from collections.abc import Sequence

import torch
import triton

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu import workspace
from xquant_vllm.attention.gpu.arguments import describe_batch, describe_latent, describe_scores, products, unpacking
from xquant_vllm.attention.gpu.device.arguments import Batch
from xquant_vllm.attention.gpu.gpu_plan import GpuPlan
from xquant_vllm.attention.gpu.limits import shared_memory
from xquant_vllm.attention.gpu.page_pointers import page_pointers
from xquant_vllm.attention.gpu.prefill.dense import Carried, dense
from xquant_vllm.attention.gpu.prefill.project_inputs import project_inputs
from xquant_vllm.attention.gpu.prefill.rematerialize_pages import rematerialize_pages
from xquant_vllm.attention.gpu.prefill.step import ROOM, Round
from xquant_vllm.attention.gpu.prefill.tiles import dense_tile
from xquant_vllm.attention.gpu.prefill.varlen import library
from xquant_vllm.attention.plan import AttentionLayerPlan


def workspace_parts(
    plan: AttentionLayerPlan, gpu_plan: GpuPlan, tokens: int, room: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of what :func:`prefill` takes of the workspace, for at most ``tokens`` query tokens."""
    projection, heads = plan.projection, plan.num_heads
    rematerialized = (room, projection.num_kv_heads, projection.head_size)
    return (
        (rematerialized, gpu_plan.dtype),
        (rematerialized, gpu_plan.dtype),
        ((tokens, heads, projection.head_size), torch.float32),
        ((tokens, heads), torch.float32),
        ((tokens, heads), torch.float32),
    )


def prefill(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    gpu_plan: GpuPlan,
    batch: AttentionBatch,
    rounds: Sequence[Round],
    output: torch.Tensor,
    inputs: Sequence[torch.Tensor] | None = None,
    room: int = ROOM,
) -> None:
    """Causal attention of the sequences that are in ``rounds``.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, after RoPE.
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8.
        plan: the layer's plan.
        gpu_plan: what kernels read of it.
        batch: the sequences; those that are in no round are left alone.
        rounds: of the batch as the layer views it, see :class:`PrefillStep`.
        output: ``[num_tokens, num_heads, head_size]``, written.
        inputs: what was stored of these tokens; required if a sequence attends to its own exactly.
        room: tokens of the workspace.
    """
    keys, values, *carried = workspace.take(query.device, *workspace_parts(plan, gpu_plan, query.shape[0], room))
    of_batch = describe_batch(query, batch)
    attend_whole = library(query, keys, output, plan)
    for part in rounds:
        _rematerialize(part, pages, plan, gpu_plan, batch, keys, values)
        if part.longest_exact:
            assert inputs is not None
            project_inputs(part, inputs, gpu_plan, batch, keys, values)
        whole = part.whole
        if attend_whole is None or whole is None:
            _dense(part, of_batch, keys, values, Carried(*carried), plan, gpu_plan, output)
        else:
            at, there = whole.tokens, slice(whole.keys)
            attend_whole(query[at], keys[there], values[there], output[at], whole.sequences, plan)


def _rematerialize(
    part: Round,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    gpu_plan: GpuPlan,
    batch: AttentionBatch,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Fill the workspace with a round's keys and values."""
    tiles = triton.cdiv(part.longest, gpu_plan.tokens)
    rematerialize_pages[(tiles, part.spans.shape[0], plan.projection.num_kv_heads)](
        part.spans,
        gpu_plan.columns,
        gpu_plan.value_columns,
        page_pointers(pages, plan.layout.block_size),
        batch.seq_lens,
        batch.block_table,
        batch.block_table.stride(0),
        describe_latent(gpu_plan.key),
        gpu_plan.tail,
        describe_latent(gpu_plan.value),
        gpu_plan.value_factors,
        gpu_plan.value_bias,
        keys,
        values,
        PROJECT_VALUE=gpu_plan.project_value,
        SHARED=gpu_plan.shared,
        VALUE_BIAS=gpu_plan.has_value_bias,
        **unpacking(gpu_plan),
    )


def _dense(
    part: Round,
    of_batch: Batch,
    keys: torch.Tensor,
    values: torch.Tensor,
    carried: Carried,
    plan: AttentionLayerPlan,
    gpu_plan: GpuPlan,
    output: torch.Tensor,
) -> None:
    """Attend to a round's keys and values."""
    head_size = plan.projection.head_size
    width = max(16, triton.next_power_of_2(head_size))
    tile = dense_tile(width, gpu_plan.dtype, shared_memory(keys.device))
    dense[(triton.cdiv(part.longest_query, tile.queries), part.spans.shape[0], plan.num_heads)](
        part.spans,
        of_batch,
        keys,
        values,
        carried,
        gpu_plan.sinks,
        describe_scores(plan),
        output,
        output.stride(0),
        output.stride(1),
        plan.projection.num_kv_heads,
        head_size,
        GROUP=plan.num_heads // plan.projection.num_kv_heads,
        QUERIES=tile.queries,
        TOKENS=tile.tokens,
        WIDTH=width,
        SOFT_CAP=bool(plan.logits_soft_cap),
        WINDOW=bool(plan.sliding_window),
        SINKS=plan.sinks is not None,
        **products(gpu_plan.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
