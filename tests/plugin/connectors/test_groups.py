"""What a connector knows of vLLM's KV cache groups."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.connectors.groups import PageGroup, common_end, common_step, page_groups, pages_of

NAME = "XQuantConnector"


def spec(kind=FullAttentionSpec, block_size=16, state_bytes=24, **more):
    pages = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.uint8, "num_head_slots": 1}
    return kind(block_size=block_size, state_content_bytes=state_bytes, **pages, **more)


def config(*groups, cacheable=None):
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=names) for spec, names in groups]
    ids = range(len(groups)) if cacheable is None else cacheable
    return SimpleNamespace(kv_cache_groups=groups, prefix_cacheable_group_ids=tuple(ids))


def test_groups_are_read():
    different = {"a": spec(state_bytes=24), "b": spec(state_bytes=16)}
    uniform = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=different)
    described = config((uniform, ["a", "b"]), (spec(SlidingWindowSpec, 48, sliding_window=40), ["c"]))
    groups = page_groups(described, NAME)
    assert groups == (PageGroup(16, None, ("a", "b")), PageGroup(48, 40, ("c",)))
    assert (common_step(groups), common_end(groups)) == (16, 48)


def test_windows_that_are_kept_like_full_attention_have_all_blocks():
    assert page_groups(config((spec(sliding_window=40), ["a"])), NAME)[0].window is None


@pytest.mark.parametrize(
    ("kind", "more"), [(ChunkedLocalAttentionSpec, {"attention_chunk_size": 64}), (MLAAttentionSpec, {})]
)
def test_other_kinds_are_refused_by_name(kind, more):
    with pytest.raises(
        UnsupportedError, match=rf"XQuantConnector does not support .*: a keeps .* {kind.__name__}; leave"
    ):
        page_groups(config((spec(kind, **more), ["a"])), NAME)


def test_groups_without_prefix_caching_are_refused():
    with pytest.raises(UnsupportedError, match="b shares its block table"):
        page_groups(config((spec(), ["a"]), (spec(), ["b"]), cacheable=[0]), NAME)


def test_pages_are_described_by_their_bytes():
    groups = (PageGroup(16, None, ("a",)), PageGroup(48, 40, ("b",)))
    caches = {"a": torch.empty(7, 16, 24, dtype=torch.uint8), "b": torch.empty(7, 48, 8, dtype=torch.float16)}
    assert pages_of(groups, caches) == [
        [16, None, [["a", [16, 24], "torch.uint8"]]],
        [48, 40, [["b", [48, 8], "torch.float16"]]],
    ]


@pytest.mark.parametrize(
    ("window", "start", "end", "blocks"),
    [
        (None, 0, 12, [0, 1, 2]),
        (None, 8, 12, [2]),
        # The next token, 12, sees 12 - window + 1 to 12.
        (1, 0, 12, []),
        (2, 0, 12, [2]),
        (5, 0, 12, [2]),
        (6, 0, 12, [1, 2]),
        (6, 8, 12, [2]),
        (100, 0, 12, [0, 1, 2]),
    ],
)
def test_blocks_that_are_needed(window, start, end, blocks):
    assert list(PageGroup(4, window, ()).needed(start, end)) == blocks
