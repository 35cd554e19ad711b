"""What baselines are given, and what they make of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """What is attended to, in several sets.

    Attributes:
        queries: ``[sets, batch, query_len, heads, head_size]``; the last tokens of their sequences.
        keys: ``[sets, batch, padded seq_len, kv_heads, head_size]``; contiguous, so also pages of ``block_size``.
        values: likewise.
        seq_len: tokens of every sequence.
        block_size: tokens of a page; divides the padded length.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    seq_len: int
    block_size: int

    @property
    def query_len(self) -> int:
        """Query tokens of every sequence."""
        return self.queries.shape[2]


@dataclass(frozen=True)
class Prepared:
    """A baseline's calls, one for each set of a problem.

    Attributes:
        calls: return ``[batch, query_len, heads, head_size]`` in any shape with these elements.
        expected: what the first call must return of the first sequence, ``[query_len, heads, head_size]`` FP32.
        allowed: error that its own arithmetic may cause.
        number_bytes: of a cached number on average, scales included, where it depends on the problem; None: the
            baseline's.
    """

    calls: list[Call]
    expected: Call
    allowed: float = 2e-2
    number_bytes: float | None = None


def exact_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last tokens of one sequence in FP32, straight from its definition."""
    query_len, heads, size = query.shape
    group = heads // keys.shape[1]
    of_groups = query.unflatten(1, (-1, group))
    later = causal_mask(query_len, keys.shape[0], query.device).logical_not()
    result = torch.empty_like(query)
    for begin in range(0, query_len, 256):
        tile = slice(begin, begin + 256)
        scores = torch.einsum("qhgs,khs->hgqk", of_groups[tile], keys) * size**-0.5
        weights = scores.masked_fill(later[tile], -torch.inf).softmax(-1)
        result[tile] = torch.einsum("hgqk,khs->qhgs", weights, values).flatten(1, 2)
    return result


def causal_mask(query_len: int, seq_len: int, device: torch.device) -> torch.Tensor:
    """Which tokens the last ``query_len`` of a sequence see."""
    return torch.ones(query_len, seq_len, dtype=torch.bool, device=device).tril(seq_len - query_len)
