"""Prefill: the context is rematerialized once per call, piece by piece, and attended to as keys and values.

A decoding query rematerializes keys as it goes. Here hundreds of queries attend to the same tokens, so these pass
through a workspace of bounded size (prefill/spans.py), whatever the context's length. Tokens of the step itself, where
they are attended to exactly, come from the model instead of the pages.
"""

from collections.abc import Sequence

import torch
import triton

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu import workspace
from xquant_vllm.attention.gpu.arguments import describe_batch, describe_scores, products, unpacking
from xquant_vllm.attention.gpu.decode.attend import Batch
from xquant_vllm.attention.gpu.operands import TOKENS
from xquant_vllm.attention.gpu.page_pointers import page_pointers
from xquant_vllm.attention.gpu.prefill.dense import Carried, dense
from xquant_vllm.attention.gpu.prefill.project_inputs import project_inputs
from xquant_vllm.attention.gpu.prefill.rematerialize_pages import rematerialize_pages
from xquant_vllm.attention.gpu.prefill.spans import PIECE_FIELDS, Piece, rounds
from xquant_vllm.attention.gpu.prefill.varlen import attend_whole
from xquant_vllm.attention.gpu.prepared import PreparedPlan, latent

# Cached tokens in the workspace at a time.
ROOM = 16384
_QUERIES, _KEYS = 64, 64


def workspace_parts(prepared: PreparedPlan, tokens: int, room: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of what :func:`prefill` takes of the workspace, for at most ``tokens`` query tokens."""
    projection, heads = prepared.plan.projection, prepared.plan.num_heads
    rematerialized = (room, projection.num_kv_heads, projection.head_size)
    return (
        (rematerialized, prepared.dtype),
        (rematerialized, prepared.dtype),
        ((tokens, heads, projection.head_size), torch.float32),
        ((tokens, heads), torch.float32),
        ((tokens, heads), torch.float32),
    )


def prefill(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    prepared: PreparedPlan,
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
        prepared: the layer's plan.
        batch: the sequences; those before ``first_sequence`` are left alone.
        output: ``[num_tokens, num_heads, head_size]``, written.
        inputs: what was stored of these tokens; required if a sequence attends to its own exactly.
        first_sequence: first sequence to attend for.
        room: tokens of the workspace.
    """
    assert batch.lengths is not None
    window, exact_from = prepared.plan.sliding_window, prepared.plan.exact_from
    contexts, longest_query = [], 0
    for sequence, (query_len, seq_len) in enumerate(batch.lengths[first_sequence:], first_sequence):
        if query_len:
            oldest = max(0, seq_len - query_len - window + 1) if window else 0
            exact = seq_len
            if exact_from is not None and query_len >= exact_from:
                exact = seq_len - query_len
            contexts.append((sequence, oldest, seq_len, exact))
            longest_query = max(longest_query, query_len)
    keys, values, *carried = workspace.take(query.device, *workspace_parts(prepared, query.shape[0], room))
    of_batch = describe_batch(query, batch)
    for pieces in rounds(contexts, room):
        described = torch.tensor([[int(getattr(p, name)) for name in PIECE_FIELDS] for p in pieces], dtype=torch.int32)
        if query.device.type == "cuda":
            described = described.pin_memory().to(query.device, non_blocking=True)
        _rematerialize(described, pieces, pages, prepared, batch, keys, values)
        if any(piece.exact < piece.stop for piece in pieces):
            assert inputs is not None
            project_inputs(described, pieces, inputs, prepared, batch, keys, values)
        if attend_whole(query, keys, values, prepared.plan, batch, pieces, output):
            continue
        _attend(described, pieces, of_batch, keys, values, Carried(*carried), prepared, longest_query, output)


def _rematerialize(
    described: torch.Tensor,
    pieces: Sequence[Piece],
    pages: Sequence[torch.Tensor],
    prepared: PreparedPlan,
    batch: AttentionBatch,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Fill the workspace with a round's keys and values."""
    tiles = max(triton.cdiv(piece.stop - piece.begin, TOKENS) for piece in pieces)
    rematerialize_pages[(tiles, len(pieces), prepared.plan.projection.num_kv_heads)](
        described,
        prepared.columns,
        prepared.value_columns,
        page_pointers(pages, prepared.plan.layout.block_size),
        batch.seq_lens,
        batch.block_table,
        batch.block_table.stride(0),
        latent(prepared.key),
        prepared.tail,
        latent(prepared.value),
        prepared.value_units,
        prepared.value_bias,
        keys,
        values,
        PROJECT_VALUE=prepared.project_value,
        SHARED=prepared.shared,
        VALUE_BIAS=prepared.has_value_bias,
        **unpacking(prepared),
    )


def _attend(
    described: torch.Tensor,
    pieces: Sequence[Piece],
    of_batch: Batch,
    keys: torch.Tensor,
    values: torch.Tensor,
    carried: Carried,
    prepared: PreparedPlan,
    longest_query: int,
    output: torch.Tensor,
) -> None:
    """Attend to a round's keys and values."""
    plan = prepared.plan
    head_size = plan.projection.head_size
    dense[(triton.cdiv(longest_query, _QUERIES), len(pieces), plan.num_heads)](
        described,
        of_batch,
        keys,
        values,
        carried,
        prepared.sinks,
        describe_scores(plan),
        output,
        output.stride(0),
        output.stride(1),
        plan.projection.num_kv_heads,
        head_size,
        GROUP=plan.num_heads // plan.projection.num_kv_heads,
        QUERIES=_QUERIES,
        TOKENS=32 if head_size > 128 else _KEYS,
        WIDTH=max(16, triton.next_power_of_2(head_size)),
        SOFT_CAP=bool(plan.logits_soft_cap),
        WINDOW=bool(plan.sliding_window),
        SINKS=plan.sinks is not None,
        **products(prepared.dtype),
    )
