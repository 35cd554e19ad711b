"""Keys and values of a step's own tokens, from what the model computed, written to the workspace of prefill."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.arguments import products
from xquant_vllm.attention.gpu.device.rematerialize import finish_keys, store_pairs
from xquant_vllm.attention.gpu.prefill.input_projection import InputProjection
from xquant_vllm.attention.gpu.prefill.rematerialize_pages import load_piece
from xquant_vllm.attention.gpu.prefill.spans import Piece
from xquant_vllm.attention.gpu.prepared import PreparedPlan

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
def project_pieces(
    pieces,
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
    """A tile of the exact tokens of one piece, for one kv head. Grid: ``(tiles, pieces, num_kv_heads)``.

    Args:
        pieces: int32 ``[pieces, len(PIECE_FIELDS)]``.
        columns: int32 ``[2 * HALF]``: channels of keys in the kernels' order; -1 is padding.
        value_columns: likewise, of values.
        query_start_loc: int32 ``[sequences + 1]``.
        seq_lens: int32 ``[sequences]``.
        key: :class:`Inputs` of the keys.
        tail: :class:`KeyTail`.
        value: :class:`Inputs` of the values.
        value_bias: FP32 ``[num_kv_heads, 2 * HALF]``.
        keys: ``[room, num_kv_heads, head_size]``, written.
        values: likewise.
        TOKENS: tokens of a tile.
        CHANNELS: channels of an input that are multiplied at a time.
        HALF: columns of half a head.
        BIAS: whether keys have one.
        VALUE_BIAS: whether values have one.
        NORM: whether keys have one.
        ROPE: whether any pair rotates.
        DTYPE: of the products' operands.
        PRECISION: of the products, where operands are FP32.
    """
    head = tl.program_id(2)
    sequence, begin, stop, offset, _, _, exact = load_piece(pieces, tl.program_id(1))
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
    described: torch.Tensor,
    pieces: Sequence[Piece],
    inputs: Sequence[torch.Tensor],
    prepared: PreparedPlan,
    batch: AttentionBatch,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Fill the workspace with a round's exact keys and values.

    Args:
        described: the pieces, as kernels read them.
        pieces: the round's pieces.
        inputs: what was stored of the query tokens, for every stream ``[num_tokens, ...]``.
        prepared: the layer's plan, which says ``exact_from``.
        batch: the sequences.
        keys: ``[room, num_kv_heads, head_size]``, written where tokens are exact.
        values: likewise.
    """
    assert prepared.exact_key is not None
    assert prepared.exact_value is not None
    longest = max(piece.stop - max(piece.begin, piece.exact) for piece in pieces)
    project_pieces[(triton.cdiv(longest, _TOKENS), len(pieces), prepared.plan.projection.num_kv_heads)](
        described,
        prepared.columns,
        prepared.value_columns,
        batch.query_start_loc,
        batch.seq_lens,
        _described(prepared.exact_key, inputs),
        prepared.tail,
        _described(prepared.exact_value, inputs),
        prepared.value_bias,
        keys,
        values,
        TOKENS=_TOKENS,
        CHANNELS=_CHANNELS,
        HALF=prepared.half,
        BIAS=prepared.has_key_bias,
        VALUE_BIAS=prepared.has_value_bias,
        NORM=prepared.norm,
        ROPE=prepared.rotates,
        **products(prepared.dtype),
    )


def _described(projection: InputProjection, inputs: Sequence[torch.Tensor]) -> Inputs:
    rows = inputs[projection.stream].flatten(1)
    width = projection.up.shape[1]
    return Inputs(rows, rows.stride(0), width if projection.heads > 1 else 0, width, projection.up)
