"""The layouts: sections, bytes by the paper's formula, and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_vllm.evaluation.methods.baselines.kivi import kivi_bytes
from xquant_vllm.kivi.pages import QuantizedLayout, ResidualLayout

layouts = st.builds(
    lambda heads, size, bits, key_group, value_group, groups: QuantizedLayout(
        heads, size, bits, key_group, value_group, key_group * groups
    ),
    st.integers(1, 8),
    st.sampled_from([8, 24, 64, 72, 128, 256]),
    st.sampled_from([4, 2]),
    st.sampled_from([16, 32, 64, 128]),
    st.just(8),
    st.integers(1, 8),
)


@settings(deadline=None)
@given(layout=layouts)
def test_sections_fill_the_page_without_gap_or_overlap(layout):
    values = layout.values_at
    starts = [layout.key_codes_at, values.codes, layout.key_scales_at, layout.key_zeros_at, values.scales, values.zeros]
    heads, size, tokens = layout.num_kv_heads, layout.head_size, layout.block_size
    codes = heads * tokens * size * layout.bits // 8
    key_scales, value_scales = heads * layout.num_key_groups * size * 2, heads * tokens * (size // 8) * 2
    ends = [
        at + n for at, n in zip(starts, (codes, codes, key_scales, key_scales, value_scales, value_scales), strict=True)
    ]
    assert starts == [0, *ends[:-1]]
    assert ends[-1] == layout.content_bytes
    assert all(start % 16 == 0 for start in starts)
    assert 0 <= layout.page_bytes - layout.content_bytes < layout.block_size
    assert layout.page_bytes == layout.bytes_per_token * layout.block_size


@pytest.mark.parametrize(("bits", "expected"), [(4, 240), (2, 144)])
def test_bytes_are_the_baselines(bits, expected):
    layout = QuantizedLayout(3, 64, bits, 32, 32, 64)
    assert layout.bytes_per_token == expected == kivi_bytes(192, bits, 32, 0, 1024)
    assert layout.page_bytes == layout.content_bytes
    assert ResidualLayout(3, 64, torch.bfloat16, 16).bytes_per_token == 768


def test_a_fraction_of_a_byte_per_token_is_padded_and_counted():
    layout = QuantizedLayout(1, 8, 4, 64, 8, 128)
    assert layout.content_bytes == 128 * (4 + 4 + 4) + 2 * 2 * 8 * 2
    assert layout.bytes_per_token == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 64, 3, 32, 32, 64), "bits = 3 is not supported: set one of 4, 2"),
        ((2, 60, 4, 32, 32, 64), "heads of 60 channels cannot be packed"),
        ((2, 64, 4, 24, 32, 64), "group_size = 24 .* multiple of 16"),
        ((2, 64, 4, 32, 48, 64), "group_size = 48 does not divide the 64 channels"),
        ((2, 64, 4, 32, 32, 48), "block_size = 48 would split a group of keys: set a multiple of 32"),
    ],
)
def test_what_cannot_be_paged_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizedLayout(*arguments)


def test_residuals_that_cannot_be_paged_are_refused():
    with pytest.raises(ValueError, match=r"torch\.int8 is not supported: serve the model in one of bfloat16"):
        ResidualLayout(2, 64, torch.int8, 16)
    with pytest.raises(ValueError, match=r"block_size = 24 .* multiple of 16"):
        ResidualLayout(2, 64, torch.float16, 24)
