"""Rotary position embedding of rematerialized keys."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines by position, any frequency scaling already applied.

    Attributes:
        cos: ``[max_position, rotary_size / 2]``, FP32.
        sin: ``[max_position, rotary_size / 2]``, FP32.
        interleaved: pairs are channels ``(2i, 2i + 1)`` (GPT-J style) instead of ``(i, i + rotary_size / 2)`` (NeoX).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False

    @property
    def rotary_size(self) -> int:
        """Leading channels of a head that rotate; the rest pass through (partial RoPE)."""
        return 2 * self.cos.shape[1]


def apply_rope(x: torch.Tensor, positions: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotate heads by their positions.

    Args:
        x: ``[num_tokens, num_heads, head_size]``, FP32.
        positions: ``[num_tokens]``, integer.
        table: cosines and sines.

    Returns:
        A new tensor shaped like ``x``.
    """
    cos = table.cos[positions.long()].unsqueeze(1)
    sin = table.sin[positions.long()].unsqueeze(1)
    rotated, passed = x[..., : table.rotary_size], x[..., table.rotary_size :]
    if table.interleaved:
        even, odd = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    else:
        first, second = rotated.chunk(2, -1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((turned, passed), -1)
