"""Rows of a linear layer, read and written wherever they are."""

import pytest
import torch

from xquant_vllm.plugin.load.trace.source import Source

ROWS = [[4, 5, 6], [6, 5, 4], [0, 7, 3], [9, 8, 7], [2]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(10, 4), (10,)])
def test_rows_are_taken_and_put_in_order_of_channels(rows, shape):
    source, tensor = Source("qkv", None, torch.tensor(rows)), torch.randn(shape)
    before, values = tensor.clone(), torch.randn(len(rows), *shape[1:])
    assert torch.equal(source.take(tensor), torch.stack([tensor[row] for row in rows]))
    source.put(tensor, values)
    for channel, row in enumerate(rows):
        assert torch.equal(tensor[row], values[channel])
    others = [row for row in range(10) if row not in rows]
    assert torch.equal(tensor[others], before[others])
    source.put(tensor, 0)
    assert torch.count_nonzero(tensor[rows]) == 0


@pytest.mark.parametrize("rows", ROWS)
def test_only_rows_that_follow_each_other_are_a_view(rows):
    source, tensor = Source("qkv", None, torch.tensor(rows)), torch.randn(10, 4)
    follow = rows == list(range(rows[0], rows[0] + len(rows)))
    assert (source.take(tensor).data_ptr() == tensor[rows[0]].data_ptr()) == follow


def test_a_range_is_a_source():
    assert torch.equal(Source.of_range("qkv", None, 3, 2).rows, torch.tensor([3, 4]))
