"""Bit packing of quantization codes.

Codes are packed group by group, so that a group is readable without its neighbours. Within a group of ``g`` channels a
plane of ``p`` bits per code takes ``n = g * p / 8`` bytes, and byte ``i`` holds channels ``i, n + i, 2n + i, ...`` from
its lowest bits up::

    4 bits, g = 8    byte 0      byte 1      byte 2      byte 3
                     c4 | c0     c5 | c1     c6 | c2     c7 | c3        (high | low nibble)

A vector unit so unpacks a contiguous run of channels with one mask and one shift. 8-, 4- and 2-bit codes are one plane;
3-bit codes are a plane of their low 2 bits followed by a plane of their high bit, 6-bit codes one of their low 4 bits
followed by one of their high 2. All take whole bytes for a multiple of 8 channels, and for one of 4 all but 3 bits.

16 bits are no codes: a channel is its own FP16 number, little-endian, in channel order, without scale and zero point.
"""

import torch

SUPPORTED_BITS = (16, 8, 6, 4, 3, 2)
UNQUANTIZED_BITS = 16

# Bits of the planes that codes are split into, the lowest first.
PLANES = {8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,)}


def packed_size(group_size: int, bits: int) -> int:
    """Bytes that a group of ``group_size`` codes of ``bits`` bits takes.

    Raises:
        ValueError: ``bits`` is not supported, or the codes do not take whole bytes in every plane.
    """
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits = {bits} is not supported: set one of {', '.join(map(str, SUPPORTED_BITS))}")
    multiple = 8 if bits == 3 else 4
    if group_size <= 0 or group_size % multiple:
        raise ValueError(f"{group_size} codes of {bits} bits cannot be packed: set a positive multiple of {multiple}")
    return group_size * bits // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into bytes.

    Args:
        codes: ``[..., group_size]``, integer dtype, values in ``[0, 2**bits)``; FP16 numbers at 16 bits.
        bits: 16, 8, 6, 4, 3 or 2.

    Returns:
        ``[..., group_size * bits / 8]``, uint8.
    """
    group_size = codes.shape[-1]
    packed_size(group_size, bits)
    if bits == UNQUANTIZED_BITS:
        return codes.to(torch.float16).contiguous().view(torch.uint8)
    planes, shift = [], 0
    for plane_bits in PLANES[bits]:
        plane = (codes.to(torch.int32) >> shift) & ((1 << plane_bits) - 1)
        codes_per_byte = 8 // plane_bits
        plane = plane.unflatten(-1, (codes_per_byte, group_size // codes_per_byte))
        shifts = torch.arange(codes_per_byte, device=codes.device, dtype=torch.int32) * plane_bits
        # The fields do not overlap, so their sum is their union.
        planes.append((plane << shifts[:, None]).sum(-2).to(torch.uint8))
        shift += plane_bits
    return torch.cat(planes, -1)


def unpack(packed: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Invert :func:`pack`.

    Args:
        packed: ``[..., group_size * bits / 8]``, uint8.
        bits: 16, 8, 6, 4, 3 or 2.
        group_size: number of codes in the last dimension of the result.

    Returns:
        ``[..., group_size]``, int32; FP16 at 16 bits.
    """
    size = packed_size(group_size, bits)
    if packed.shape[-1] != size:
        raise ValueError(f"a group of {group_size} codes at {bits} bits is {size} bytes, not {packed.shape[-1]}")
    if bits == UNQUANTIZED_BITS:
        return packed.contiguous().view(torch.float16)
    codes, shift, start = None, 0, 0
    for plane_bits in PLANES[bits]:
        plane_size = group_size * plane_bits // 8
        plane = packed[..., start : start + plane_size].to(torch.int32)
        shifts = torch.arange(8 // plane_bits, device=packed.device, dtype=torch.int32) * plane_bits
        fields = (plane.unsqueeze(-2) >> shifts[:, None]) & ((1 << plane_bits) - 1)
        plane_codes = fields.flatten(-2) << shift
        codes = plane_codes if codes is None else codes | plane_codes
        start += plane_size
        shift += plane_bits
    assert codes is not None
    return codes
