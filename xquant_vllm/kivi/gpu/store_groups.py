"""The kernel that quantizes the groups of keys that new tokens complete, from residual pages."""

import triton
import triton.language as tl

from xquant_vllm.attention.gpu.device.fit import fit_group, uniform_codes
from xquant_vllm.kivi.gpu.load import exact_rows


@triton.jit
def _find(query_start_loc, num_sequences, index, KEY_GROUP: tl.constexpr):
    """The sequence of a program and which of the sequence's programs it is.

    Sequence s has the programs from ``query_start_loc[s] // KEY_GROUP + s`` on: at least as many as it can complete
    groups, and the host knows how many there are in all without knowing the sequences' lengths.
    """
    low, high = 0, num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // KEY_GROUP + middle <= index:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1
    return sequence, index - (tl.load(query_start_loc + sequence) // KEY_GROUP + sequence)


@triton.jit(do_not_specialize=["num_sequences", "table_stride", "residual_stride"])
def store_groups(
    query_start_loc,
    seq_lens,
    num_sequences,
    block_table,
    table_stride,
    residual_stride,
    quantized,
    residual,
    TOKENS: tl.constexpr,
    BYTES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Quantize some channels of one head of a group of keys.

    Grid: ``(num_tokens // KEY_GROUP + num_sequences, num_kv_heads, cdiv(bytes of a row, BYTES))``. Reads residual
    pages, which hold all tokens of the groups; writes quantized ones, whose block table is ``block_table``.

    Args:
        residual_stride: of the residual pages' block table.
        TOKENS: a power of two of at least ``KEY_GROUP``.
        BYTES: bytes of a token's codes that a program packs, a power of two.
    """
    sequence, index = _find(query_start_loc, num_sequences, tl.program_id(0), KEY_GROUP)
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - tl.load(query_start_loc + sequence)
    group = (seq_len - query_len) // KEY_GROUP + index
    if group >= seq_len // KEY_GROUP:
        return
    # Rows are channels. The codes of a byte, ``row_bytes`` channels apart, are BYTES rows apart.
    row_bytes: tl.constexpr = HEAD_SIZE * BITS // 8
    parts: tl.constexpr = 8 // BITS
    of_row = tl.arange(0, parts * BYTES)
    part, byte = of_row // BYTES, tl.program_id(2) * BYTES + of_row % BYTES
    channel, there = part * row_bytes + byte, byte < row_bytes
    token = tl.arange(0, TOKENS)
    counts = token < KEY_GROUP
    table = residual.block_table + sequence.to(tl.int64) * residual_stride
    at = exact_rows(residual, 0, table, head, group * KEY_GROUP + token, counts, HEAD_SIZE, RESIDUAL)
    x = tl.load(at[None, :] + channel[:, None], there[:, None] & counts[None, :], 0.0).to(tl.float32)
    scale, zero = fit_group(x, counts[None, :], (1 << BITS) - 1)
    code = uniform_codes(x, scale, zero, counts[None, :], (1 << BITS) - 1) << (part * BITS)[:, None]
    packed = tl.sum(tl.reshape(code, [parts, BYTES, TOKENS]), 0)

    per_block = quantized.block_size // KEY_GROUP
    block = tl.load(block_table + sequence.to(tl.int64) * table_stride + group // per_block).to(tl.int64)
    page, of_page = quantized.pages + block * quantized.stride, group % per_block
    to = page + (head * quantized.block_size + of_page * KEY_GROUP + token) * row_bytes
    byte = tl.program_id(2) * BYTES + tl.arange(0, BYTES)
    kept = (byte < row_bytes)[:, None] & counts[None, :]
    tl.store(to[None, :] + byte[:, None], packed.to(tl.uint8), kept)
    parameter = (head * per_block + of_page) * HEAD_SIZE + channel
    tl.store((page + quantized.key_scales).to(tl.pointer_type(tl.float16)) + parameter, scale, there)
    tl.store((page + quantized.key_zeros).to(tl.pointer_type(tl.float16)) + parameter, zero, there)
