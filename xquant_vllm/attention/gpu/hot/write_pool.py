"""The kernel that makes keys and values of what the up-projection left, and writes them to the pool."""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.rematerialize import finish_keys, store_pairs


@triton.jit
def _load_halves(source, row, columns, valid, HALF: tl.constexpr):
    """Both halves of a tile of heads, two of ``[TOKENS, HALF]`` FP32; ``row`` is where every token's begins."""
    half = tl.arange(0, HALF)
    low, high = tl.load(columns + half)[None, :], tl.load(columns + HALF + half)[None, :]
    at = source + row[:, None]
    low_part = tl.load(at + low, valid[:, None] & (low >= 0), 0.0).to(tl.float32)
    high_part = tl.load(at + high, valid[:, None] & (high >= 0), 0.0).to(tl.float32)
    return low_part, high_part


# The strides between heads are products of the number of tokens where every head has a matrix of its own.
@triton.jit(do_not_specialize=["key_head_stride", "value_head_stride", "num_tokens"])
def write_pool(
    keys,
    key_token_stride,
    key_head_stride,
    values,
    value_token_stride,
    value_head_stride,
    positions,
    hot_slots,
    num_tokens,
    columns,
    value_columns,
    tail,
    value_bias,
    hot_keys,
    hot_values,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE_BIAS: tl.constexpr,
):
    """Finish and write a tile of tokens, of one kv head.

    Grid: ``(tiles of tokens, num_kv_heads)``. Tokens without a hot slot are left out.

    Args:
        keys: up-projected, ``[num_tokens, num_kv_heads, head_size]`` by the strides, contiguous channels.
        values: likewise.
        positions: int64 ``[num_tokens]``.
        hot_slots: int64 ``[num_tokens]``; negative ones are not written.
        columns: channels of keys in the kernels' order.
        value_columns: of values.
        tail: :class:`KeyTail`.
        hot_keys: ``[slots of the pool, num_kv_heads, head_size]``, contiguous, as ``hot_values``; written.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    there = token < num_tokens
    hot_slot = tl.load(hot_slots + token, there, -1)
    valid = hot_slot >= 0
    position = tl.load(positions + token, valid, 0)
    to = (hot_slot * tl.num_programs(1) + head)[:, None] * tail.head_size
    of_token = token.to(tl.int64)
    row = of_token * key_token_stride + head * key_head_stride
    low, high = _load_halves(keys, row, columns, valid, HALF)
    low, high = finish_keys(low, high, tail, head, position, valid, HALF, BIAS, NORM, ROPE)
    store_pairs(hot_keys, columns, to, low, high, valid, HALF, hot_keys.dtype.element_ty)
    row = of_token * value_token_stride + head * value_head_stride
    low, high = _load_halves(values, row, value_columns, valid, HALF)
    if VALUE_BIAS:
        at = value_bias + head * (2 * HALF) + tl.arange(0, HALF)
        low += tl.load(at)[None, :]
        high += tl.load(at + HALF)[None, :]
    store_pairs(hot_values, value_columns, to, low, high, valid, HALF, hot_values.dtype.element_ty)
