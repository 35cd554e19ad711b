"""Where the code of a module looks for queries, keys and values in what its projections yield.

Mostly it turns queries and keys by one function, and a latent must not be turned. So what is cached in place of keys
travels with what is cached in place of values, which no such code touches: for keys there are zeros, whatever is done
to them, and the attention layer takes both apart again. Compiled, what is done to zeros that nobody reads is no code.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from xquant_vllm.plugin.load.trace.source import Source


class FusedLayout(Protocol):
    """Where a module's code looks for them in the output of one projection."""

    @property
    def q_size(self) -> int:
        """Channels of the queries."""
        ...

    @property
    def kv_size(self) -> int:
        """Channels of the keys, and of the values."""
        ...

    def rearranged(self, output: torch.Tensor) -> torch.Tensor:
        """What is cached where the code looks for values, and zeros where it looks for keys.

        Args:
            output: ``[..., rows]``: queries, and what is cached where the projection has keys and values.

        Returns:
            ``[..., rows]``, more than before. The channels of the values begin with what is cached in place of keys.
        """
        ...


@dataclass(frozen=True)
class Sections:
    """Queries, keys, values, one behind the other; where values end is not in the module's code."""

    q_size: int
    kv_size: int

    def rearranged(self, output: torch.Tensor) -> torch.Tensor:
        """All that is behind the queries is for values."""
        query, cached = output.split([self.q_size, output.shape[-1] - self.q_size], -1)
        return torch.cat((query, query.new_zeros((*query.shape[:-1], self.kv_size)), cached), -1)


@dataclass(frozen=True)
class ByHead:
    """Query, key and value of one head, then of the next (GPT-NeoX); how many heads there are is not in the code."""

    q_size: int
    kv_size: int
    head_size: int

    def rearranged(self, output: torch.Tensor) -> torch.Tensor:
        """Twice as many heads: values of the first are for keys. The others have no queries."""
        query, key, value = output.unflatten(-1, (-1, 3, self.head_size)).unbind(-2)
        zeros = torch.zeros_like(query)
        first, second = torch.stack((query, zeros, key), -2), torch.stack((zeros, zeros, value), -2)
        return torch.cat((first, second), -3).flatten(-3)


@dataclass(frozen=True)
class Apart:
    """Keys and values of one linear layer each; how many values there are is not in the module's code."""

    kv_size: int


def layout_of(key: Source, value: Source, q_size: int, kv_size: int, head_size: int) -> FusedLayout | Apart | None:
    """The layout of a module's projections.

    Args:
        key: which rows of which linear layer its keys are.
        value: the same of its values.
        q_size: channels of the queries.
        kv_size: channels of the keys, and of the values.
        head_size: channels of a head.

    Returns:
        The layout; None if it is not known here.
    """
    if key.child != value.child:
        whole = torch.arange(kv_size, device="cpu")
        children = (key.child, value.child)
        alone = torch.equal(key.rows, whole) and torch.equal(value.rows, whole) and not any("." in x for x in children)
        return Apart(kv_size) if alone else None
    rows = torch.cat((key.rows, value.rows))
    if torch.equal(rows, torch.arange(q_size, q_size + 2 * kv_size, device="cpu")):
        return Sections(q_size, kv_size)
    if q_size == kv_size:
        by_head = torch.arange(3 * q_size, device="cpu").view(-1, 3, head_size)
        if torch.equal(rows, torch.cat((by_head[:, 1].flatten(), by_head[:, 2].flatten()))):
            return ByHead(q_size, kv_size, head_size)
    return None
