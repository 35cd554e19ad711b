"""What stands in for a model's 16-bit cache: three places where keys and values can be replaced by what is read back.

A method sees one sequence at a time, from its first token, and all layers in the order in which they run.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


class CacheMethod:
    """The 16-bit cache itself: nothing is replaced."""

    def start(self, num_tokens: int) -> None:
        """A new sequence of so many tokens begins; forget the one before."""


class InputMethod(CacheMethod, ABC):
    """Caches something made of the layer input, and keys and values are computed from that.

    Attributes:
        keys_are_normed: whether a norm over all key heads together is in the keys already, if the model has one.
    """

    keys_are_normed: ClassVar[bool] = False

    @abstractmethod
    def rematerialize(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the projections of a layer yield when its cache is read.

        Args:
            layer: the layer.
            hidden: ``[num_tokens, hidden_size]``, what enters the projections.

        Returns:
            Keys before norm and RoPE (see ``keys_are_normed``), and values, bias included, ``[num_tokens,
            num_kv_heads * head_size]``.
        """


class ProjectedMethod(CacheMethod, ABC):
    """Caches keys before RoPE (after the key norm, where there is one), and values."""

    @abstractmethod
    def keys(self, keys: torch.Tensor) -> torch.Tensor:
        """What is read back of keys ``[num_tokens, num_kv_heads * head_size]``."""

    @abstractmethod
    def values(self, values: torch.Tensor) -> torch.Tensor:
        """What is read back of values ``[num_tokens, num_kv_heads * head_size]``."""


@dataclass(frozen=True)
class Version:
    """Keys and values as some queries see some of them.

    Attributes:
        keys: ``[num_tokens, num_kv_heads, head_size]``.
        values: likewise.
        seen: ``[num_tokens, num_tokens]`` bool, which query (row) sees which token (column) in this version; None for
            all. Every query must see every token in exactly one version.
    """

    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor | None = None


class AttendedMethod(CacheMethod, ABC):
    """Caches keys after RoPE, and values."""

    @abstractmethod
    def read(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Version, ...]:
        """What attention reads of a layer's keys and values ``[num_tokens, num_kv_heads, head_size]``."""
