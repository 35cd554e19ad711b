"""The pool of one layer: memory in the layout of another kernel's cache."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PoolLayout:
    """Where a block has its keys and values: number ``i`` of token ``t`` at ``tokens[t] + channels[i]`` of a kv head.

    Attributes:
        key_tokens: ``[block_size]`` int64.
        key_channels: ``[head_size]`` int64.
        value_tokens: ``[block_size]`` int64.
        value_channels: ``[head_size]`` int64.
    """

    key_tokens: torch.Tensor
    key_channels: torch.Tensor
    value_tokens: torch.Tensor
    value_channels: torch.Tensor

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.key_tokens.shape[0]


@dataclass(frozen=True, eq=False)
class Pool:
    """Keys and values of hot blocks.

    Attributes:
        keys: ``[num_hot_blocks, num_kv_heads, block_size * head_size]`` FP32, FP16 or BF16; the last dimension is
            contiguous.
        values: likewise, with the same strides.
        layout: what the last dimension is.
    """

    keys: torch.Tensor
    values: torch.Tensor
    layout: PoolLayout

    def put(self, keys: torch.Tensor, values: torch.Tensor, hot_slots: torch.Tensor) -> None:
        """Write tokens: what the C++ kernels do, in PyTorch.

        Args:
            keys: ``[n, num_kv_heads, head_size]``.
            values: likewise.
            hot_slots: ``[n]`` int64, slots in the pool.
        """
        layout = self.layout
        for memory, numbers, tokens, channels in (
            (self.keys, keys, layout.key_tokens, layout.key_channels),
            (self.values, values, layout.value_tokens, layout.value_channels),
        ):
            blocks, offsets = hot_slots // layout.block_size, hot_slots % layout.block_size
            places = (tokens[offsets][:, None] + channels)[:, None]
            heads = torch.arange(memory.shape[1])[:, None]
            memory[blocks[:, None, None], heads, places] = numbers.to(memory.dtype)

    def get(self, hot_slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens, each ``[n, num_kv_heads, head_size]``; the inverse of :meth:`put`."""
        layout = self.layout
        blocks, offsets = hot_slots // layout.block_size, hot_slots % layout.block_size
        heads = torch.arange(self.keys.shape[1])[:, None]
        keys, values = (
            memory[blocks[:, None, None], heads, (tokens[offsets][:, None] + channels)[:, None]]
            for memory, tokens, channels in (
                (self.keys, layout.key_tokens, layout.key_channels),
                (self.values, layout.value_tokens, layout.value_channels),
            )
        )
        return keys, values
