"""The layout of CPU_ATTN's cache is found, whatever it is, and nothing is found where there is none."""

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from xquant_vllm.attention.hot.pool import Pool, PoolLayout
from xquant_vllm.plugin.hot import layout as hot_layout
from xquant_vllm.plugin.hot.layout import pool_layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("block_size", "head_size"), [(128, 64), (16, 64), (32, 80), (128, 256), (64, 96)])
def test_the_operation_writes_what_the_layout_says(dtype: torch.dtype, block_size: int, head_size: int) -> None:
    isa = _get_attn_isa(dtype, block_size, head_size)
    layout = pool_layout(dtype, block_size, head_size, isa)
    assert layout is not None
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(50, 3, head_size, generator=generator).to(dtype) for _ in range(2)]
    slots = torch.randperm(4 * block_size, generator=generator)[:50]
    memory = torch.zeros(4, 3, 2 * block_size, head_size, dtype=dtype)
    keys, values = memory.chunk(2, 2)
    ops.cpu_attn_reshape_and_cache(*numbers, keys, values, slots, isa)
    ours = torch.zeros_like(memory)
    pool = Pool(*(part.flatten(2) for part in ours.chunk(2, 2)), layout)
    pool.put(*numbers, slots)
    assert torch.equal(ours, memory)
    assert all(torch.equal(x, y) for x, y in zip(pool.get(slots), numbers, strict=True))


def with_operation(monkeypatch: pytest.MonkeyPatch, places: torch.Tensor) -> PoolLayout | None:
    """What is found of an operation that puts token and channel of a block of 16 at ``places`` [16, 32]."""

    def write(keys, values, key_cache, value_cache, slots, isa):
        for numbers, cache in ((keys, key_cache), (values, value_cache)):
            for head in range(numbers.shape[1]):
                memory = torch.zeros(16 * 32, dtype=numbers.dtype)
                memory[places.flatten()] = numbers[:, head].flatten()
                cache[1, head] = memory.view(16, 32)

    monkeypatch.setattr(hot_layout.ops, "cpu_attn_reshape_and_cache", write)
    return pool_layout.__wrapped__(torch.bfloat16, 16, 32, "some")


def test_pairs_of_tokens_are_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels with tiles want: [tokens / 2, channels, 2]."""
    tokens = torch.arange(16)
    places = (tokens // 2 * 64 + tokens % 2)[:, None] + torch.arange(32) * 2
    layout = with_operation(monkeypatch, places)
    assert layout is not None
    assert torch.equal(layout.key_tokens[:, None] + layout.key_channels, places)


def test_what_is_no_layout_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    places = torch.arange(16 * 32).view(16, 32)
    places[3] = places[3].flip(0)  # one token's channels in another order
    assert with_operation(monkeypatch, places) is None
    assert with_operation(monkeypatch, torch.zeros(16, 32, dtype=torch.int64)) is None
