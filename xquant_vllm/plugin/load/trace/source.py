"""Which rows of which linear layer become the keys, or the values, of an attention layer."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Source:
    """Where a layer's keys come from, or its values.

    Channel c, as it arrives at attention, is output row ``rows[c]`` of a linear layer times ``factor``, but for norms
    and RoPE.

    Attributes:
        child: path of the linear layer in the attention module, ``qkv_proj`` or ``query_key_value``.
        linear: the linear layer, vLLM's.
        rows: ``[num_kv_heads * head_size]``, int64 on the CPU, no row twice. Counted on this rank.
        factor: what a model's code multiplies all channels by.
    """

    child: str
    linear: Any
    rows: torch.Tensor
    factor: float = 1.0

    @staticmethod
    def of_range(child: str, linear: Any, start: int, size: int) -> "Source":
        """Rows that follow each other."""
        return Source(child, linear, torch.arange(start, start + size, device="cpu"))

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of a weight ``[out, in]`` or bias ``[out]``, in order of channels: a view if they follow each other."""
        rows = self._slice
        return tensor[self.rows.to(tensor.device)] if rows is None else tensor[rows]

    def put(self, tensor: torch.Tensor, values: torch.Tensor | int) -> None:
        """Overwrite these rows of a weight or bias by ``values`` (rows in order of channels), in place."""
        rows = self._slice
        tensor[self.rows.to(tensor.device) if rows is None else rows] = values

    @property
    def _slice(self) -> slice | None:
        """The rows, if they follow each other."""
        start, size = int(self.rows[0]), self.rows.numel()
        follow = bool((self.rows == torch.arange(start, start + size, device="cpu")).all())
        return slice(start, start + size) if follow else None
