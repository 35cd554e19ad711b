"""Bit packing against a packer written from the docstring's drawing alone."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_vllm.codec.packing import SUPPORTED_BITS, UNQUANTIZED_BITS, pack, packed_size, unpack


def independent_pack(codes: list[int], bits: int) -> bytes:
    """One group, bit by bit: plane after plane, byte i of a plane holds channels i, n + i, 2n + i, ... upwards."""
    packed = bytearray()
    low = 0
    for plane_bits in {8: [8], 6: [4, 2], 4: [4], 3: [2, 1], 2: [2]}[bits]:
        size = len(codes) * plane_bits // 8
        for index in range(size):
            byte = 0
            for slot, channel in enumerate(range(index, len(codes), size)):
                for bit in range(plane_bits):
                    byte |= ((codes[channel] >> (low + bit)) & 1) << (slot * plane_bits + bit)
            packed.append(byte)
        low += plane_bits
    return bytes(packed)


CODE_BITS = [bits for bits in SUPPORTED_BITS if bits != UNQUANTIZED_BITS]


@settings(deadline=None)
@given(data=st.data(), bits=st.sampled_from(CODE_BITS), units=st.integers(1, 34))
def test_pack_matches_the_drawing_and_unpack_inverts_it(data, bits, units):
    size = (8 if bits == 3 else 4) * units
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=size, max_size=size))
    packed = pack(torch.tensor(codes), bits)
    assert bytes(packed.tolist()) == independent_pack(codes, bits)
    assert packed.numel() == packed_size(len(codes), bits) == len(codes) * bits // 8
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", CODE_BITS)
def test_leading_dimensions_are_kept(bits):
    codes = torch.randint(0, 2**bits, (2, 3, 5, 32))
    assert torch.equal(unpack(pack(codes, bits), bits, 32), codes.int())


@pytest.mark.parametrize(
    ("group_size", "bits", "named"),
    [
        (10, 4, "10 codes of 4 bits"),
        (6, 6, "6 codes of 6 bits"),
        (12, 3, "12 codes of 3 bits"),
        (0, 4, "0 codes of 4 bits"),
        (64, 5, "bits = 5"),
    ],
)
def test_what_cannot_be_packed_is_named(group_size, bits, named):
    with pytest.raises(ValueError, match=named):
        packed_size(group_size, bits)


def test_wrong_byte_count_is_named():
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        unpack(torch.zeros(31, dtype=torch.uint8), 4, 64)


def test_sixteen_bits_are_the_fp16_numbers_themselves():
    numbers = torch.randn(3, 24).half()
    packed = pack(numbers, 16)
    assert bytes(packed[1].tolist()) == struct.pack("<24e", *numbers[1].tolist())
    assert packed.shape[-1] == packed_size(24, 16)
    assert torch.equal(unpack(packed, 16, 24), numbers)
