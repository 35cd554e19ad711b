"""Paged attention through the Triton kernels."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from xquant_vllm.attention.batch import AttentionBatch, AttentionLayerPlan
from xquant_vllm.attention.gpu import cuda_decode
from xquant_vllm.attention.gpu.absorb import absorb
from xquant_vllm.attention.gpu.attend import Absorbed, Batch, Partial, Scores, attend
from xquant_vllm.attention.gpu.merge import merge
from xquant_vllm.attention.gpu.page_pointers import page_pointers
from xquant_vllm.attention.gpu.prepared import PreparedPlan, latent, prepare

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Rows of a tile at most, and programs that keep a GPU busy.
_MOST_ROWS = 64
_PROGRAMS = 512
_MOST_SPLITS = 32


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype.

    Raises:
        ValueError: kernels have no products of it.
    """
    if dtype not in _TYPES:
        raise ValueError(f"query is {dtype}: the kernels take float16, bfloat16 and float32")
    return _TYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """How products are computed: FP32 operands exactly, others as they are."""
    return "ieee" if dtype == torch.float32 else "tf32"


def paged_attention(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    batch: AttentionBatch,
    output: torch.Tensor,
) -> None:
    """Causal attention of query tokens over their sequences' pages; see :func:`reference.paged_attention`."""
    if not query.shape[0] or not batch.seq_lens.shape[0]:
        return
    prepared = prepare(plan, query.dtype)
    group = plan.num_heads // plan.projection.num_kv_heads
    max_query_len = batch.max_query_len
    if max_query_len is None:
        max_query_len = int((batch.query_start_loc[1:] - batch.query_start_loc[:-1]).max())
    rows = max(16, min(triton.next_power_of_2(max(max_query_len, 1) * group), _MOST_ROWS))
    rows = max(rows, triton.next_power_of_2(group))
    tiles = triton.cdiv(max_query_len, rows // group)
    num_sequences = batch.seq_lens.shape[0]
    programs = num_sequences * tiles * plan.projection.num_kv_heads
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // max(programs, 1)))
    _attend(query, pages, prepared, batch, output, rows, tiles, splits)


def _attend(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    prepared: PreparedPlan,
    batch: AttentionBatch,
    output: torch.Tensor,
    rows: int,
    tiles: int,
    splits: int,
) -> None:
    plan = prepared.plan
    kv_heads, num_heads, tokens = plan.projection.num_kv_heads, plan.num_heads, query.shape[0]
    group, half = num_heads // kv_heads, prepared.half
    dtype, exact = operand_type(query.dtype), precision(query.dtype)
    key, value = prepared.key, prepared.value
    width = value.width if prepared.absorb_value else 2 * half
    of_batch = Batch(
        query,
        query.stride(0),
        query.stride(1),
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        batch.block_table.stride(0),
        num_heads,
    )
    partial = Partial(
        query.new_empty((tokens, num_heads, splits, width), dtype=torch.float32),
        query.new_empty((tokens, num_heads, splits, 3), dtype=torch.float32),
    )
    of_row = max(16, triton.next_power_of_2(group))
    absorbed = Absorbed(partial.sums, partial.stats, 1)
    if prepared.absorb_key:
        absorbed = Absorbed(
            query.new_empty((tokens, num_heads, key.most_chunks, key.width)),
            query.new_empty((tokens, num_heads, key.most_chunks, 1 + key.most_outliers), dtype=torch.float32),
            key.most_chunks,
        )
        absorb[(tokens, kv_heads, key.most_chunks)](
            of_batch,
            prepared.columns,
            latent(key),
            absorbed,
            GROUP=group,
            ROWS=of_row,
            HALF=half,
            WIDTH=key.width,
            OUTLIERS=key.most_outliers,
            DTYPE=dtype,
            PRECISION=exact,
        )
    if cuda_decode.takes(prepared, pages, rows):
        cuda_decode.attend(prepared, query, pages, batch, partial, rows)
    else:
        attend[(batch.seq_lens.shape[0] * tiles, kv_heads, splits)](
            of_batch,
            prepared.columns,
            page_pointers(pages, plan.layout.block_size),
            latent(key),
            prepared.tail,
            latent(value),
            absorbed,
            partial,
            Scores(plan.scale, plan.logits_soft_cap or 0.0, plan.sliding_window or 0),
            tiles,
            GROUP=group,
            ROWS=rows,
            TOKENS=32 if half > 64 else 64,
            HALF=half,
            SPLITS=splits,
            KEY_WIDTH=key.width,
            KEY_KINDS=key.kinds,
            KEY_HIGH=key.high,
            KEY_OUTLIERS=key.most_outliers,
            VALUE_WIDTH=value.width,
            VALUE_KINDS=value.kinds,
            VALUE_HIGH=value.high,
            VALUE_OUTLIERS=value.most_outliers,
            ABSORB_KEY=prepared.absorb_key,
            ABSORB_VALUE=prepared.absorb_value,
            BIAS=prepared.key_bias,
            NORM=prepared.norm,
            ROPE=prepared.rotates,
            SOFT_CAP=bool(plan.logits_soft_cap),
            WINDOW=bool(plan.sliding_window),
            DTYPE=dtype,
            PRECISION=exact,
        )
    merge[(tokens, kv_heads)](
        partial,
        latent(value),
        prepared.value_columns,
        prepared.value_bias,
        prepared.value_bias,
        batch.query_start_loc,
        batch.seq_lens.shape[0],
        output,
        output.stride(0),
        output.stride(1),
        num_heads,
        GROUP=group,
        ROWS=of_row,
        HALF=half,
        SPLITS=splits,
        WIDTH=value.width,
        ABSORB_VALUE=prepared.absorb_value,
        BIAS=prepared.has_value_bias,
        SINKS=False,
        DTYPE=dtype,
        PRECISION=exact,
    )
