"""Decoding: few query tokens per sequence, keys rematerialized as they go; see decode/attend.py."""

from collections.abc import Sequence

import torch
import triton

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu import workspace
from xquant_vllm.attention.gpu.arguments import describe_batch, describe_scores, products, unpacking
from xquant_vllm.attention.gpu.cuda import decode as cuda_decode
from xquant_vllm.attention.gpu.decode.absorb import absorb
from xquant_vllm.attention.gpu.decode.attend import Absorbed, Partial, attend
from xquant_vllm.attention.gpu.decode.merge import merge
from xquant_vllm.attention.gpu.page_pointers import page_pointers
from xquant_vllm.attention.gpu.prepared import PreparedPlan, latent
from xquant_vllm.attention.gpu.tiling import shape_of


def workspace_parts(
    prepared: PreparedPlan, tokens: int, splits: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of what :func:`decode` takes of the workspace."""
    heads, key = prepared.plan.num_heads, prepared.key
    width = prepared.value.width if prepared.absorb_value else 2 * prepared.half
    chunks = key.most_chunks if prepared.absorb_key else 0
    return (
        ((tokens, heads, splits, width), torch.float32),
        ((tokens, heads, splits, 3), torch.float32),
        ((tokens, heads, chunks, key.width), prepared.dtype),
        ((tokens, heads, chunks, 1 + key.most_outliers), torch.float32),
    )


def decode(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    prepared: PreparedPlan,
    batch: AttentionBatch,
    output: torch.Tensor,
    sequences: int,
    longest: int,
) -> None:
    """Causal attention of the first ``sequences`` sequences.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, after RoPE.
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8.
        prepared: the layer's plan.
        batch: the sequences.
        output: ``[num_tokens, num_heads, head_size]``, written.
        sequences: how many of the sequences.
        longest: query tokens of one of these at most.
    """
    plan = prepared.plan
    kv_heads, num_heads = plan.projection.num_kv_heads, plan.num_heads
    # Tokens of these sequences come first, but how many they are the host need not know.
    tokens = min(query.shape[0], sequences * longest)
    group, half = num_heads // kv_heads, prepared.half
    key, value = prepared.key, prepared.value
    rows, tiles, splits = shape_of(group, kv_heads, sequences, longest)
    of_batch = describe_batch(query, batch)
    sums, stats, absorbed_query, absorbed_sums = workspace.take(
        query.device, *workspace_parts(prepared, tokens, splits)
    )
    partial, absorbed = Partial(sums, stats), Absorbed(absorbed_query, absorbed_sums, key.most_chunks)
    of_token = max(16, triton.next_power_of_2(group))
    if prepared.absorb_key:
        absorb[(tokens, kv_heads, key.most_chunks)](
            of_batch,
            prepared.columns,
            latent(key),
            absorbed,
            GROUP=group,
            ROWS=of_token,
            HALF=half,
            WIDTH=key.width,
            OUTLIERS=key.most_outliers,
            **products(prepared.dtype),
        )
    if cuda_decode.takes(prepared, pages, longest * group):
        cuda_decode.attend(prepared, query, pages, batch, partial, sequences, longest * group)
    else:
        attend[(sequences * tiles, kv_heads, splits)](
            of_batch,
            prepared.columns,
            page_pointers(pages, plan.layout.block_size),
            latent(key),
            prepared.tail,
            latent(value),
            absorbed,
            partial,
            describe_scores(plan),
            tiles,
            GROUP=group,
            ROWS=rows,
            SPLITS=splits,
            ABSORB_KEY=prepared.absorb_key,
            ABSORB_VALUE=prepared.absorb_value,
            SHARED=prepared.shared and not prepared.absorb_key,
            SOFT_CAP=bool(plan.logits_soft_cap),
            WINDOW=bool(plan.sliding_window),
            **unpacking(prepared),
        )
    merge[(tokens, kv_heads)](
        partial,
        latent(value),
        prepared.value_units,
        prepared.value_columns,
        prepared.value_bias,
        prepared.sinks,
        batch.query_start_loc,
        sequences,
        output,
        output.stride(0),
        output.stride(1),
        num_heads,
        GROUP=group,
        ROWS=of_token,
        HALF=half,
        SPLITS=splits,
        WIDTH=value.width,
        ABSORB_VALUE=prepared.absorb_value,
        PROJECT_VALUE=prepared.project_value,
        BIAS=prepared.has_value_bias,
        SINKS=plan.sinks is not None,
        **products(prepared.dtype),
    )
