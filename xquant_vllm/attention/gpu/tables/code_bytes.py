"""Which channels meet in every byte of a row of codes: what lets one kernel pack every format."""

from collections.abc import Sequence

import torch

from xquant_vllm.codec.packing import PLANES, UNQUANTIZED_BITS

# Rows of a table, in this order. Of the code of channel ``channel + k * stride``, the byte holds the ``bits`` bits from
# bit ``shift`` on, as its own bits from ``k * bits`` on, for every k for which it has these bits.
ROWS = ("channel", "stride", "bits", "shift")


def code_bytes(runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """What the bytes of a row hold; inverts ``bit_addresses`` in tables/bit_addresses.py.

    Args:
        runs: bits and number of channels of runs, each packed by itself, one after another (packing.py).

    Returns:
        ``[4, bytes]`` int32, rows as named in ``ROWS``. An FP16 number is a code of 16 bits here.
    """
    parts, first_channel = [], 0
    for bits, channels in runs:
        parts.append(_run(bits, channels, first_channel))
        first_channel += channels
    return torch.cat(parts, 1)


def _run(bits: int, channels: int, first_channel: int) -> torch.Tensor:
    if bits == UNQUANTIZED_BITS:
        byte = torch.arange(2 * channels, dtype=torch.int32)
        zero = torch.zeros_like(byte)
        return torch.stack((first_channel + byte // 2, zero, zero + 8, byte % 2 * 8))
    planes, shift = [], 0
    for plane_bits in PLANES[bits]:
        byte = torch.arange(channels * plane_bits // 8, dtype=torch.int32)
        zero = torch.zeros_like(byte)
        planes.append(torch.stack((first_channel + byte, zero + byte.numel(), zero + plane_bits, zero + shift)))
        shift += plane_bits
    return torch.cat(planes, 1)
