"""The kernel that writes new tokens: keys and values as they are to residual pages, values quantized to the others.

Codes are bit for bit those of codec/quantizer.py, by the device functions that quantize latents.
"""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.fit import fit_group, uniform_codes


@triton.jit(do_not_specialize=["num_tokens"])
def store_tokens(
    keys,
    key_token_stride,
    key_head_stride,
    values,
    value_token_stride,
    value_head_stride,
    slots,
    residual_slots,
    num_tokens,
    quantized,
    residual,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    BYTES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Write some tokens of one head to both kinds of pages.

    Grid: ``(tiles of tokens, num_kv_heads)``.

    Args:
        keys: ``[num_tokens, num_kv_heads, head_size]``, any float dtype, contiguous channels; strides in elements.
        values: like ``keys``.
        slots: int64 ``[>= num_tokens]``, in quantized pages; tokens whose slot is negative are not written there.
        residual_slots: int64 ``[>= num_tokens]``, in residual pages, in the same way.
        WIDTH: a power of two of at least ``HEAD_SIZE``.
        VALUE_GROUPS: groups of a value, padded to a power of two.
        BYTES: bytes of a group's codes, padded to a power of two.
    """
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < num_tokens
    residual_slot = tl.load(residual_slots + token, there, -1)
    page = residual.pages + residual_slot // residual.block_size * residual.stride
    row = (head * residual.block_size + residual_slot % residual.block_size) * HEAD_SIZE
    channel = tl.arange(0, WIDTH)
    kept = (residual_slot >= 0)[:, None] & (channel < HEAD_SIZE)[None, :]
    of_token = token.to(tl.int64)
    key = tl.load((keys + of_token * key_token_stride + head * key_head_stride)[:, None] + channel[None, :], kept, 0.0)
    to = page.to(tl.pointer_type(RESIDUAL)) + row
    tl.store(to[:, None] + channel[None, :], key.to(RESIDUAL), kept)
    at = (values + of_token * value_token_stride + head * value_head_stride)[:, None] + channel[None, :]
    to = (page + residual.values_at).to(tl.pointer_type(RESIDUAL)) + row
    tl.store(to[:, None] + channel[None, :], tl.load(at, kept, 0.0).to(RESIDUAL), kept)

    # Rows are groups of tokens. The codes of a byte, ``row_bytes`` channels apart, are BYTES columns apart.
    groups: tl.constexpr = HEAD_SIZE // VALUE_GROUP
    row_bytes: tl.constexpr = VALUE_GROUP * BITS // 8
    parts: tl.constexpr = 8 // BITS
    of_row = tl.arange(0, TOKENS * VALUE_GROUPS)
    token = tl.program_id(0) * TOKENS + of_row // VALUE_GROUPS
    group = of_row % VALUE_GROUPS
    slot = tl.load(slots + token, token < num_tokens, -1)
    valid = (slot >= 0) & (group < groups)
    column = tl.arange(0, parts * BYTES)
    part, byte = column // BYTES, column % BYTES
    counts = byte < row_bytes
    at = values + token.to(tl.int64) * value_token_stride + head * value_head_stride + group * VALUE_GROUP
    channel = part * row_bytes + byte
    x = tl.load(at[:, None] + channel[None, :], valid[:, None] & counts[None, :], 0.0).to(tl.float32)
    scale, zero = fit_group(x, counts[None, :], (1 << BITS) - 1)
    code = uniform_codes(x, scale, zero, counts[None, :], (1 << BITS) - 1) << (part * BITS)[None, :]
    packed = tl.sum(tl.reshape(code, [TOKENS * VALUE_GROUPS, parts, BYTES]), 1)
    page = quantized.pages + slot // quantized.block_size * quantized.stride
    within = slot % quantized.block_size
    to = page + quantized.value_codes + ((head * quantized.block_size + within) * groups + group) * row_bytes
    byte = tl.arange(0, BYTES)
    kept = valid[:, None] & (byte < row_bytes)[None, :]
    tl.store(to[:, None] + byte[None, :], packed.to(tl.uint8), kept)
    parameter = (head * groups + group) * quantized.block_size + within
    tl.store((page + quantized.value_scales).to(tl.pointer_type(tl.float16)) + parameter, scale, valid)
    tl.store((page + quantized.value_zeros).to(tl.pointer_type(tl.float16)) + parameter, zero, valid)
