"""What an evaluation asks of the model: logits of windows, with the 16-bit cache and with a quantized one."""

from typing import Protocol

import torch


class Rows(Protocol):
    """Logits by position, a tensor ``[num_positions, vocabulary]`` or what acts like one."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def __getitem__(self, positions: slice, /) -> torch.Tensor:
        """Of some positions."""


class Logits(Protocol):
    """A model with one of both caches."""

    def __call__(self, tokens: torch.Tensor, last: int | None = None) -> Rows:
        """Run a window by itself, from its first token.

        Args:
            tokens: ``[num_tokens]``, int64.
            last: of how many positions, counted from the end; None for all.
        """


class Engine(Protocol):
    """A model with both caches."""

    @property
    def reference(self) -> Logits:
        """With the 16-bit cache."""

    @property
    def candidate(self) -> Logits:
        """With the method's cache."""
