"""The page layout: byte counts from the formula, and refusals."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import PageLayout, StreamFormat

stream_formats = st.builds(
    lambda num_heads, width, bits, group_size, outliers: StreamFormat(
        num_heads, width, bits, group_size, 0 if bits == 16 else outliers
    ),
    st.integers(1, 8),
    st.sampled_from([64, 128, 192]),
    st.sampled_from([16, 8, 4, 3, 2]),
    st.sampled_from([16, 32, 64]),
    st.integers(0, 3),
)


allocated_formats = st.builds(
    lambda runs: AllocatedFormat(64, tuple(runs)),
    st.lists(st.sampled_from([((8, 4), (6, 12), (3, 8)), ((4, 64),), ((2, 4),)]), min_size=1, max_size=3),
)


@settings(deadline=None)
@given(streams=st.lists(stream_formats | allocated_formats, min_size=1, max_size=3), blocks=st.integers(1, 8))
def test_sections_fill_the_page_without_gap_or_overlap(streams, blocks):
    layout = PageLayout(tuple(streams), 16 * blocks)
    spans = []
    for stream, at in zip(layout.streams, layout.offsets, strict=True):
        heads, block_size = stream.num_heads, layout.block_size
        if isinstance(stream, AllocatedFormat):
            bits = sum(bits * channels for runs in stream.runs for bits, channels in runs)
            spans += [(at.codes, block_size * bits // 8), (at.scales, heads * block_size)]
            continue
        groups = stream.width // stream.group_size
        spans.append((at.codes, heads * block_size * stream.width * stream.bits // 8))
        scales = 0 if stream.bits == 16 else heads * groups
        spans.append((at.scales, scales * block_size * 2))
        spans.append((at.zeros, scales * block_size * 2))
        spans.append((at.outliers, heads * stream.outlier_channels * block_size * 2))
    end = 0
    for start, size in sorted(span for span in spans if span[1]):
        assert start == end
        assert start % 16 == 0
        end = start + size
    assert end == layout.page_bytes == layout.block_size * layout.bytes_per_token


def test_the_example_of_the_drawing():
    key, value = StreamFormat(3, 64, 4, 64, 1), StreamFormat(3, 64, 4, 64)
    assert PageLayout((key, value), 128).bytes_per_token == 222


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((3, 64, 4, 48), "group_size = 48 does not divide the 64"),
        ((3, 64, 5, 64), "bits = 5"),
        ((3, 64, 4, 64, 64), "outlier_channels = 64"),
        ((3, 64, 16, 64, 1), "outlier_channels = 1 with 16 bits"),
    ],
)
def test_impossible_formats_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        StreamFormat(*arguments)


@pytest.mark.parametrize(
    ("runs", "named"),
    [
        (((4, 32), (6, 8)), "the bits of the runs .* ascend"),
        (((5, 32),), "a run of 5 bits"),
        (((16, 32),), "a run of 16 bits"),
        (((3, 12),), "12 codes of 3 bits"),
        (((4, 64), (2, 4)), "do not fit 64 channels"),
        ((), "do not fit 64 channels"),
    ],
)
def test_impossible_runs_are_refused_by_name(runs, named):
    with pytest.raises(ValueError, match=named):
        AllocatedFormat(64, (((4, 64),), runs))


def test_bits_of_an_allocated_format_count_its_scales():
    stream = AllocatedFormat(64, (((4, 32), (2, 16)), ((8, 4),)))
    assert (stream.num_heads, stream.code_bytes, stream.bytes_per_token) == (2, 16 + 4 + 4, 26)
    assert stream.bits == 8 * 26 / 128


def test_misaligned_blocks_are_refused_by_name():
    with pytest.raises(ValueError, match="block_size = 24"):
        PageLayout((StreamFormat(1, 64, 4, 64),), 24)
