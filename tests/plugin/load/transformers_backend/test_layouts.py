"""Where a module's code looks for queries, keys and values: the code, written down here, finds them there."""

import pytest
import torch

from xquant_vllm.plugin.load.trace.source import Source
from xquant_vllm.plugin.load.transformers_backend.layouts import Apart, ByHead, Sections, layout_of

HEAD_SIZE = 4


def split_sections(output, q_size, kv_size):
    return output[..., :q_size], output[..., q_size : q_size + kv_size], output[..., q_size + kv_size :]


def split_by_head(output, *_):
    return [part.flatten(-2) for part in output.unflatten(-1, (-1, 3 * HEAD_SIZE)).chunk(3, -1)]


CASES = [
    pytest.param(Sections(16, 8), split_sections, id="sections"),
    pytest.param(ByHead(16, 16, HEAD_SIZE), split_by_head, id="by head"),
]


def rows_of(layout, split):
    rows = torch.arange(layout.q_size + 2 * layout.kv_size)
    return split(rows, layout.q_size, layout.kv_size)


def test_what_is_cached_arrives_as_values():
    for layout, split in (case.values for case in CASES):
        output = torch.randn(3, layout.q_size + 2 * layout.kv_size)
        query, key, value = split(output, layout.q_size, layout.kv_size)
        found = split(layout.rearranged(output), layout.q_size, layout.kv_size)
        assert torch.equal(found[0][..., : layout.q_size], query)
        assert not found[0][..., layout.q_size :].any()
        assert not found[1].any()
        assert torch.equal(found[2], torch.cat((key, value), -1))


def test_behind_the_queries_there_may_be_any_number_of_channels():
    output = torch.randn(3, 16 + 40)
    query, key, value = split_sections(Sections(16, 8).rearranged(output), 16, 8)
    assert torch.equal(torch.cat((query, value), -1), output)
    assert not key.any()


@pytest.mark.parametrize(("layout", "split"), CASES)
def test_a_layout_is_known_by_its_rows(layout, split):
    _, key, value = (Source("qkv", None, rows) for rows in rows_of(layout, split))
    assert layout_of(key, value, layout.q_size, layout.kv_size, HEAD_SIZE) == layout
    # In another order nothing that is carried would arrive where it should.
    assert layout_of(value, key, layout.q_size, layout.kv_size, HEAD_SIZE) is None
    assert layout_of(Source("qkv", None, key.rows.flip(0)), value, layout.q_size, layout.kv_size, HEAD_SIZE) is None


def test_keys_and_values_of_linear_layers_of_their_own():
    key, value = Source.of_range("k", None, 0, 8), Source.of_range("v", None, 0, 8)
    assert layout_of(key, value, 16, 8, HEAD_SIZE) == Apart(8)
    assert layout_of(Source.of_range("k", None, 8, 8), value, 16, 8, HEAD_SIZE) is None
    assert layout_of(Source.of_range("inner.k", None, 0, 8), value, 16, 8, HEAD_SIZE) is None
