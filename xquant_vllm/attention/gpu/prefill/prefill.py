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
from xquant_vllm.attention.gpu.prefill.spans import SPAN_FIELDS, Span, rounds
from xquant_vllm.attention.gpu.prefill.tiles import dense_tile
from xquant_vllm.attention.gpu.prefill.varlen import use_library
from xquant_vllm.attention.plan import AttentionLayerPlan

# Cached tokens in the workspace at a time.
ROOM = 16384


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
    output: torch.Tensor,
    inputs: Sequence[torch.Tensor] | None = None,
    first_sequence: int = 0,
    room: int = ROOM,
) -> None:
    """Causal attention of the sequences from ``first_sequence`` on; needs ``batch.lengths``.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, after RoPE.
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8.
        plan: the layer's plan.
        gpu_plan: what kernels read of it.
        batch: the sequences; those before ``first_sequence`` are left alone.
        output: ``[num_tokens, num_heads, head_size]``, written.
        inputs: what was stored of these tokens; required if a sequence attends to its own exactly.
        first_sequence: first sequence to attend for.
        room: tokens of the workspace.
    """
    assert batch.lengths is not None
    window, exact_from = plan.sliding_window, plan.exact_from
    contexts, longest_query = [], 0
    for sequence, (query_len, seq_len) in enumerate(batch.lengths[first_sequence:], first_sequence):
        if query_len:
            oldest = max(0, seq_len - query_len - window + 1) if window else 0
            exact = seq_len
            if exact_from is not None and query_len >= exact_from:
                exact = seq_len - query_len
            contexts.append((sequence, oldest, seq_len, exact))
            longest_query = max(longest_query, query_len)
    keys, values, *carried = workspace.take(query.device, *workspace_parts(plan, gpu_plan, query.shape[0], room))
    of_batch = describe_batch(query, batch)
    for spans in rounds(contexts, room):
        described = torch.tensor([[int(getattr(p, name)) for name in SPAN_FIELDS] for p in spans], dtype=torch.int32)
        if query.device.type == "cuda":
            described = described.pin_memory().to(query.device, non_blocking=True)
        _rematerialize(described, spans, pages, plan, gpu_plan, batch, keys, values)
        if any(span.exact < span.stop for span in spans):
            assert inputs is not None
            project_inputs(described, spans, inputs, gpu_plan, batch, keys, values)
        if not use_library(query, keys, values, plan, batch, spans, output):
            _dense(described, spans, of_batch, keys, values, Carried(*carried), plan, gpu_plan, longest_query, output)


def _rematerialize(
    described: torch.Tensor,
    spans: Sequence[Span],
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    gpu_plan: GpuPlan,
    batch: AttentionBatch,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Fill the workspace with a round's keys and values."""
    tiles = max(triton.cdiv(span.stop - span.begin, gpu_plan.tokens) for span in spans)
    rematerialize_pages[(tiles, len(spans), plan.projection.num_kv_heads)](
        described,
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
    described: torch.Tensor,
    spans: Sequence[Span],
    of_batch: Batch,
    keys: torch.Tensor,
    values: torch.Tensor,
    carried: Carried,
    plan: AttentionLayerPlan,
    gpu_plan: GpuPlan,
    longest_query: int,
    output: torch.Tensor,
) -> None:
    """Attend to a round's keys and values."""
    head_size = plan.projection.head_size
    width = max(16, triton.next_power_of_2(head_size))
    tile = dense_tile(width, gpu_plan.dtype, shared_memory(keys.device))
    dense[(triton.cdiv(longest_query, tile.queries), len(spans), plan.num_heads)](
        described,
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
