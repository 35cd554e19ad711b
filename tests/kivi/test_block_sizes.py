"""Blocks of both kinds share pages: what fits, what is left unused, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_vllm.kivi.block_sizes import choose_block_sizes
from xquant_vllm.kivi.pages import QuantizedLayout, ResidualLayout


def layouts(heads=3, size=64, bits=4, group=32, dtype=torch.bfloat16):
    return QuantizedLayout(heads, size, bits, group, 8, group), ResidualLayout(heads, size, dtype, 16)


@settings(deadline=None)
@given(
    heads=st.integers(1, 8),
    size=st.sampled_from([8, 64, 80, 256]),
    bits=st.sampled_from([4, 2]),
    group=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    groups_of_residual=st.integers(1, 4),
)
def test_the_residuals_block_fits_and_divides(heads, size, bits, group, dtype, groups_of_residual):
    quantized, residual = choose_block_sizes(
        *layouts(heads, size, bits, group, dtype), group * groups_of_residual, None
    )
    assert residual.page_bytes <= quantized.page_bytes
    assert quantized.block_size % residual.block_size == 0
    assert quantized.block_size % group == 0


def test_as_published():
    """16 tokens of 768 bytes into 64 of 240, of which 4/5 are filled: the last 128 tokens touch up to 9 such pages."""
    quantized = QuantizedLayout(3, 64, 4, 32, 32, 32)
    pages = choose_block_sizes(quantized, ResidualLayout(3, 64, torch.bfloat16, 16), 128, None)
    assert [layout.block_size for layout in pages] == [64, 16]
    assert [layout.page_bytes for layout in pages] == [15360, 12288]


def test_a_size_that_was_asked_for_is_taken():
    quantized, residual = choose_block_sizes(*layouts(), 128, 256)
    assert (quantized.block_size, residual.block_size) == (256, 64)


@pytest.mark.parametrize(
    ("block_size", "message"),
    [(32, "block_size = 32 does not suit the residual.*; set 64 or more, a multiple of 32"), (80, "set a multiple of")],
)
def test_sizes_that_do_not_fit_are_refused(block_size, message):
    with pytest.raises(ValueError, match=message):
        choose_block_sizes(*layouts(), 128, block_size)
