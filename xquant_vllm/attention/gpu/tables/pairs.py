"""Which channel of a head stands where: kernels keep a head as two halves whose channels pair up under RoPE."""

import torch
import triton

from xquant_vllm.projection.rope import RotaryTable


def pair_columns(head_size: int, rope: RotaryTable | None) -> torch.Tensor:
    """Channels of a head in the order of the kernels.

    Args:
        head_size: channels of a head, even.
        rope: which pairs rotate; they come first.

    Returns:
        ``[2 * half]`` int32: the channels of the first half, then those that each of them pairs with; -1 pads a half
        to a power of two of at least 16.
    """
    rotary = rope.rotary_size if rope is not None else 0
    rotating = torch.arange(rotary // 2)
    low, high = rotating, rotating + rotary // 2
    if rope is not None and rope.interleaved:
        low, high = 2 * rotating, 2 * rotating + 1
    passing = torch.arange((head_size - rotary) // 2)
    low = torch.cat((low, rotary + passing))
    high = torch.cat((high, rotary + passing.numel() + passing))
    half = max(16, triton.next_power_of_2(low.numel()))
    padding = half - low.numel()
    return torch.cat([torch.nn.functional.pad(part, (0, padding), value=-1) for part in (low, high)]).to(torch.int32)


def plain_columns(head_size: int, half: int) -> torch.Tensor:
    """Channels of a head in their own order, for what does not turn.

    Args:
        head_size: channels of a head.
        half: columns of half a head.

    Returns:
        ``[2 * half]`` int32: the channels, then -1.
    """
    return torch.nn.functional.pad(torch.arange(head_size), (0, 2 * half - head_size), value=-1).to(torch.int32)


def arranged(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``x`` ``[..., head_size]`` as ``[..., 2 * half]``, padding 0."""
    columns = columns.to(x.device)
    return torch.where(columns >= 0, x[..., columns.clamp_min(0).long()], 0)
