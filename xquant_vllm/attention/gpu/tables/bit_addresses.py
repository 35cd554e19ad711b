"""At which bits of a token's row the code of every channel lies: what lets one kernel unpack every format."""

from collections.abc import Sequence

import torch

from xquant_vllm.codec.packing import PLANES, UNQUANTIZED_BITS, packed_size

# Columns of a table, in this order. A code has a low part and, with 3, 6 and 16 bits, a high one::
#
#     code = (row[low / 8] >> low % 8 & low_mask) | (row[high / 8] >> high % 8 & high_mask) << high_shift
COLUMNS = ("low", "low_mask", "high", "high_mask", "high_shift", "levels")


def bit_addresses(runs: Sequence[tuple[int, int]], first_byte: int = 0) -> torch.Tensor:
    """Where the codes of a row are.

    Args:
        runs: bits and number of channels of runs, each packed by itself, one after another (packing.py).
        first_byte: byte of the row at which the first one starts.

    Returns:
        ``[6, channels]`` int32, rows as named in ``COLUMNS``; ``low`` and ``high`` in bits from the start of the row,
        ``levels`` is the largest code. An FP16 number is a code of 16 bits here.
    """
    parts = []
    for bits, channels in runs:
        parts.append(_run(bits, channels, first_byte))
        first_byte += packed_size(channels, bits)
    return torch.cat(parts, 1)


def _run(bits: int, channels: int, first_byte: int) -> torch.Tensor:
    channel = torch.arange(channels, dtype=torch.int32)
    zero = torch.zeros_like(channel)
    if bits == UNQUANTIZED_BITS:
        low = 8 * first_byte + 16 * channel
        return torch.stack((low, zero + 255, low + 8, zero + 255, zero + 8, zero))
    addresses, masks, shifts, shift = [], [], [], 0
    for plane_bits in PLANES[bits]:
        plane_bytes = channels * plane_bits // 8
        addresses.append(8 * (first_byte + channel % plane_bytes) + channel // plane_bytes * plane_bits)
        masks.append(zero + (1 << plane_bits) - 1)
        shifts.append(zero + shift)
        first_byte += plane_bytes
        shift += plane_bits
    if len(addresses) == 1:
        addresses.append(zero)
        masks.append(zero)
        shifts.append(zero)
    return torch.stack((addresses[0], masks[0], addresses[1], masks[1], shifts[1], zero + (1 << bits) - 1))
