"""How CPU_ATTN lays out its cache, found out by asking it.

The layout depends on the processor, the dtype and the block size, and is nobody's promise. So it is not written down
here: vLLM's own operation is given a block whose numbers say which token and channel they are, and where these end up
is the layout. Then a block of other numbers must come out alike. Where :class:`PoolLayout` cannot say it, tokens are
written by vLLM's operation.
"""

import functools

import torch
from vllm import _custom_ops as ops

from xquant_vllm.attention.hot.pool import Pool, PoolLayout


@functools.cache
def pool_layout(dtype: torch.dtype, block_size: int, head_size: int, isa: str) -> PoolLayout | None:
    """The layout, or None where keys and values are not laid out by token and channel.

    Args:
        dtype: of the cache.
        block_size: tokens of a block.
        head_size: channels of a head.
        isa: what CPU_ATTN calls its kernel.
    """
    tokens, channels = torch.arange(block_size), torch.arange(head_size)
    names = [number[:, None, :].expand(block_size, 1, head_size) for number in (tokens[:, None], channels[None])]
    found = [_written(_named(number, dtype), block_size, head_size, isa) for number in names]
    places = []
    for of_tokens, of_channels in zip(*found, strict=True):
        token, channel = (_names(numbers[0], dtype) for numbers in (of_tokens, of_channels))
        if not (_within(token, block_size) and _within(channel, head_size)):
            return None
        place = torch.full((block_size, head_size), -1)
        place[token, channel] = torch.arange(block_size * head_size)
        places += [place[:, 0].clone(), place[0] - place[0, 0]]
    if min(int(numbers.min()) for numbers in places) < 0:
        return None
    layout = PoolLayout(*places)
    return layout if _agrees(layout, dtype, isa) else None


def _written(numbers: torch.Tensor, block_size: int, head_size: int, isa: str) -> list[torch.Tensor]:
    """What a block of keys and one of values have in memory after tokens with these numbers were written."""
    heads = numbers.shape[1]
    memory = torch.zeros(2, heads, 2 * block_size, head_size, dtype=numbers.dtype)
    keys, values = memory.chunk(2, 2)
    slots = torch.arange(block_size) + block_size
    ops.cpu_attn_reshape_and_cache(numbers, numbers.clone(), keys, values, slots, isa)
    return [cache[1].flatten(1) for cache in (keys, values)]


def _named(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Small integers as numbers of a dtype, which has not all of them: of two bytes their bits."""
    if dtype == torch.float32:
        return numbers.float().contiguous()
    # With this beside it none is zero, subnormal, infinite or NaN.
    return (numbers + 0x0800).to(torch.int16).contiguous().view(dtype)


def _names(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Invert :func:`_named`."""
    if dtype == torch.float32:
        return numbers.long()
    return numbers.contiguous().view(torch.int16).long() - 0x0800


def _within(numbers: torch.Tensor, count: int) -> bool:
    return int(numbers.min()) >= 0 and int(numbers.max()) < count


def _agrees(layout: PoolLayout, dtype: torch.dtype, isa: str) -> bool:
    """Whether other numbers, of two heads, end up where the layout says."""
    block_size, head_size = layout.block_size, layout.key_channels.shape[0]
    numbers = torch.randn(block_size, 2, head_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys, values = _written(numbers, block_size, head_size, isa)
    pool = Pool(keys[None], values[None], layout)
    try:
        return all(torch.equal(found, numbers) for found in pool.get(torch.arange(block_size)))
    except IndexError:  # a place outside of a block
        return False
