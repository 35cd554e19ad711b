"""The norm of the keys in an attention module, and what takes its place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class NormModule:
    """A module that normalizes keys.

    Attributes:
        module: the module.
        device: where it runs.
    """

    module: Any
    device: torch.device

    @property
    def weight(self) -> torch.Tensor | None:
        """Its weights; None without (vLLM keeps ones for such a norm)."""
        weight = getattr(self.module, "weight", None)
        return weight.data if isinstance(weight, torch.Tensor) and getattr(self.module, "has_weight", True) else None

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs that it surely takes."""
        return torch.float32 if self.weight is None else self.weight.dtype

    def run(self, x: torch.Tensor) -> Any:
        """Call the module: its output, or a tuple of it and a residual."""
        # It may be compiled when it is first called, which takes seconds, and for shapes that never come again.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return self.module(x)


class KeyPassesThrough(nn.Module):
    """In place of a norm of keys: what passes here are latents, which are normalized when they are read, or cached."""

    def __init__(self, norm: NormModule, head_size: int) -> None:
        """Stand in for ``norm``, of heads of ``head_size`` channels, and return what it is given."""
        super().__init__()
        shape = (1, head_size) if norm.weight is None else (1, *norm.weight.shape)
        # Those of Command-R return a residual, too.
        result = norm.run(torch.ones(shape, dtype=norm.dtype, device=norm.device))
        self._returns_pair = isinstance(result, tuple)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> Any:
        """``x`` as it is."""
        return (x, None) if self._returns_pair else x
