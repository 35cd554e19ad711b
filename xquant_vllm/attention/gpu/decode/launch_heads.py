"""How the kernel for latents per head is launched; see decode/attend_heads.py."""

import torch
import triton

from xquant_vllm.attention.gpu.arguments import describe_scores
from xquant_vllm.attention.gpu.decode.attend_heads import Heads, attend_heads
from xquant_vllm.attention.gpu.device.arguments import Batch, Partial
from xquant_vllm.attention.gpu.gpu_plan import GpuPlan
from xquant_vllm.attention.gpu.operands import ATTENDS
from xquant_vllm.attention.gpu.tables.head_tables import MOST_ROWS, MOST_ROWS_OF_FIELDS
from xquant_vllm.attention.gpu.tiling import rows_of
from xquant_vllm.attention.plan import AttentionLayerPlan

_LEAST_ROWS = 8  # of a product
# Block ids take half of them.
_STAGES = {1: 3, 2: 5}
"""Of the kernel's loop, by how many tiles ahead codes are."""


def launch_heads(
    batch: Batch,
    table_stride: int,
    pages: torch.Tensor,
    plan: AttentionLayerPlan,
    gpu_plan: GpuPlan,
    partial: Partial,
    sequences: int,
    longest: int,
    decode_tokens: int,
    splits: int,
) -> None:
    """Fill ``partial``, as ``attend`` does.

    Args:
        batch: the sequences and their queries.
        table_stride: elements from one row of the block table to the next.
        pages: ``[num_blocks, page_bytes]`` uint8: the layer's own.
        plan: the layer's plan.
        gpu_plan: what kernels read of it, ``heads`` included.
        partial: written.
        sequences: how many of the sequences, from the first on.
        longest: query tokens of one of these at most.
        decode_tokens: of any batch's decoding sequence at most.
        splits: shares of the cached tokens.
    """
    tables = gpu_plan.heads
    assert tables is not None
    kv_heads = plan.projection.num_kv_heads
    group = plan.num_heads // kv_heads
    most = MOST_ROWS if gpu_plan.fields is None else MOST_ROWS_OF_FIELDS
    rows = rows_of(group, longest, decode_tokens, _LEAST_ROWS, most)
    tiles = triton.cdiv(longest, rows // group)
    runs = tables.key_runs is not None
    heads = Heads(
        pages,
        pages.stride(0),
        tables.up,
        tables.bias,
        tables.norm,
        gpu_plan.tail.eps,
        gpu_plan.tail.head_size,
        tables.factors,
        tables.turns,
        tables.rope.base,
        tables.key_runs if runs else gpu_plan.columns,
        tables.value_runs if runs else gpu_plan.columns,
    )
    key, value = tables.key, tables.value
    stages = _STAGES[tables.ahead]
    attend_heads[(sequences * tiles, kv_heads, splits)](
        batch,
        gpu_plan.columns,
        heads,
        partial,
        describe_scores(plan),
        table_stride,
        tiles,
        splits,
        GROUP=group,
        ROWS=rows,
        SINGLE=longest <= 1,
        HALF=gpu_plan.half,
        BLOCK_SIZE=plan.layout.block_size,
        KEY_BITS=key.bits,
        KEY_UNITS=key.units,
        KEY_SECOND=key.second,
        KEY_THIRD=key.third,
        KEY_ROW_BYTES=key.row_bytes,
        KEY_CODES=key.codes,
        KEY_SCALES=key.scales,
        KEY_ZEROS=key.zeros,
        KEY_OUTLIERS=key.outliers,
        KEY_ONES=key.ones,
        KEY_WINDOW=key.window,
        OUTLIERS=key.num_outliers,
        MIDDLE=tables.middle,
        BIAS=gpu_plan.has_key_bias,
        NORM=gpu_plan.norm,
        VALUE_BITS=value.bits,
        VALUE_UNITS=value.units,
        VALUE_SECOND=value.second,
        VALUE_THIRD=value.third,
        VALUE_ROW_BYTES=value.row_bytes,
        VALUE_CODES=value.codes,
        VALUE_SCALES=value.scales,
        VALUE_ZEROS=value.zeros,
        VALUE_ONES=value.ones,
        VALUE_WINDOW=value.window,
        VALUE_WIDTH=gpu_plan.value.width if gpu_plan.fields is None else value.rows,
        RUNS=runs,
        SOFT_CAP=bool(plan.logits_soft_cap),
        WINDOW=bool(plan.sliding_window),
        STAGES=stages,
        PTX=not triton.knobs.runtime.interpret,
        num_warps=4,
        num_stages=stages,
        **ATTENDS,
    )
