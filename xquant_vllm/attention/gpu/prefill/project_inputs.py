"""Keys and values of a step's own tokens, from what the model computed, written to the workspace of prefill."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.arguments import products
from xquant_vllm.attention.gpu.device.rematerialize import finish_keys, store_pairs
from xquant_vllm.attention.gpu.gpu_plan import GpuPlan
from xquant_vllm.attention.gpu.prefill.rematerialize_pages import load_span
from xquant_vllm.attention.gpu.prefill.step import Round
from xquant_vllm.attention.gpu.tables.input_projection import InputProjection

# Tokens and channels that a program multiplies at a time.
_TOKENS, _CHANNELS = 64, 32


class Inputs(NamedTuple):
    """One stream's inputs, and the matrix that makes keys or values of them."""

    data: Any  # [num_tokens, heads, width]
    stride: Any  # between tokens
    head_stride: Any  # between the latents of two kv heads; 0 where all have one
    width: Any
    up: Any  # [num_kv_heads, width, 2 * HALF]


@triton.jit
def _project(
    inputs,
    head,
    token,
    valid,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both halves of the columns for a tile of tokens, two of ``[TOKENS, HALF]`` FP32."""
    low = tl.zeros([TOKENS, HALF], tl.float32)
    high = tl.zeros([TOKENS, HALF], tl.float32)
    column = tl.arange(0, HALF)
    rows = inputs.data + (token.to(tl.int64) * inputs.stride + head * inputs.head_stride)[:, None]
    of_head = inputs.up + (head * inputs.width).to(tl.int64) * (2 * HALF)
    for begin in range(0, inputs.width, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        there = channel < inputs.width
        x = tl.load(rows + channel[None, :], valid[:, None] & there[None, :], 0.0).to(DTYPE)
        up = of_head + channel[:, None] * (2 * HALF) + column[None, :]
        low += tl.dot(x, tl.load(up, there[:, None], 0.0), input_precision=PRECISION)
        high += tl.dot(x, tl.load(up + HALF, there[:, None], 0.0), input_precision=PRECISION)
    return low, high


@triton.jit
def project_spans(
    spans,
    columns,
    value_columns,
    query_start_loc,
    seq_lens,
    key,
    tail,
    value,
    value_bias,
    keys,
    values,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
    VALUE_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys and values of a tile of one span's exact tokens, for one kv head.

    Grid: ``(tiles, spans, num_kv_heads)``. Reads ``key`` and ``value``, which are :class:`Inputs`; writes ``keys`` and
    ``values``. ``CHANNELS`` are channels of an input that are multiplied at a time.
    """
    head = tl.program_id(2)
    sequence, begin, stop, offset, _, _, exact = load_span(spans, tl.program_id(1))
    start = tl.maximum(begin, exact) + tl.program_id(0) * TOKENS
    if start >= stop:
        return
    position = start + tl.arange(0, TOKENS)
    valid = position < stop
    # A sequence's last query token is its last token.
    token = position + tl.load(query_start_loc + sequence + 1) - tl.load(seq_lens + sequence)
    row = ((offset + position - begin).to(tl.int64) * tl.num_programs(2) + head)[:, None] * tail.head_size

    low, high = _project(key, head, token, valid, TOKENS, CHANNELS, HALF, DTYPE, PRECISION)
    low, high = finish_keys(low, high, tail, head, position, valid, HALF, BIAS, NORM, ROPE)
    store_pairs(keys, columns, row, low, high, valid, HALF, DTYPE)

    low, high = _project(value, head, token, valid, TOKENS, CHANNELS, HALF, DTYPE, PRECISION)
    if VALUE_BIAS:
        at = value_bias + head * (2 * HALF) + tl.arange(0, HALF)
        low += tl.load(at)[None, :]
        high += tl.load(at + HALF)[None, :]
    store_pairs(values, value_columns, row, low, high, valid, HALF, DTYPE)


def project_inputs(
    part: Round,
    inputs: Sequence[torch.Tensor],
    gpu_plan: GpuPlan,
    batch: AttentionBatch,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Fill the workspace with a round's exact keys and values.

    Args:
        part: the round.
        inputs: what was stored of the query tokens, for every stream ``[num_tokens, ...]``.
        gpu_plan: what kernels read of a plan that says ``exact_from``.
        batch: the sequences.
        keys: ``[room, num_kv_heads, head_size]``, written where tokens are exact.
        values: ``[room, num_kv_heads, head_size]``, written where tokens are exact.
    """
    assert gpu_plan.exact_key is not None
    assert gpu_plan.exact_value is not None
    tiles = triton.cdiv(part.longest_exact, _TOKENS)
    project_spans[(tiles, part.spans.shape[0], gpu_plan.exact_key.up.shape[0])](
        part.spans,
        gpu_plan.columns,
        gpu_plan.value_columns,
        batch.query_start_loc,
        batch.seq_lens,
        _described(gpu_plan.exact_key, inputs),
        gpu_plan.tail,
        _described(gpu_plan.exact_value, inputs),
        gpu_plan.value_bias,
        keys,
        values,
        TOKENS=_TOKENS,
        CHANNELS=_CHANNELS,
        HALF=gpu_plan.half,
        BIAS=gpu_plan.has_key_bias,
        VALUE_BIAS=gpu_plan.has_value_bias,
        NORM=gpu_plan.norm,
        ROPE=gpu_plan.rotates,
        **products(gpu_plan.dtype),
        num_warps=8,
    )


def _described(projection: InputProjection, inputs: Sequence[torch.Tensor]) -> Inputs:
    rows = inputs[projection.stream].flatten(1)
    width = projection.up.shape[1]
    return Inputs(rows, rows.stride(0), width if projection.heads > 1 else 0, width, projection.up)
