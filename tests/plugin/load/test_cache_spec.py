"""What vLLM's allocator and the log are told about layers."""

import pytest

from xquant_vllm.plugin.load.cache_spec import fill_page
from xquant_vllm.plugin.load.coverage import ranges


@pytest.mark.parametrize(
    ("block_size", "bytes_per_token", "other_page_bytes", "expected"),
    [
        (128, 100, 0, 128),
        (128, 100, 12800, 128),
        (128, 100, 12800 * 1.49, 128),
        (128, 100, 12800 * 1.73, 192),
        (128, 100, 12800 * 3.05, 384),
        # Half a block of 16 tokens could not be aligned.
        (16, 100, 1600 * 1.73, 16),
        (16, 100, 1600 * 2.1, 32),
        # Larger than the others': theirs are padded.
        (128, 100, 6400, 128),
    ],
)
def test_blocks_fill_the_pages_of_other_layers(block_size, bytes_per_token, other_page_bytes, expected):
    assert fill_page(block_size, block_size * bytes_per_token, int(other_page_bytes)) == expected


def test_layers_are_named_in_runs():
    assert ranges([5, 0, 1, 3, 4]) == "0-1, 3-5"
    assert ranges([7]) == "7"
    assert ranges([]) == ""
