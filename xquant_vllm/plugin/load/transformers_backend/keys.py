"""How a module of transformers turns keys, and whether it normalizes them before or behind that: found by trying."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from xquant_vllm.projection.key_norm import KeyNorm, normalize
from xquant_vllm.projection.rope import RotaryTable, apply_rope


@dataclass(frozen=True)
class KeyPath:
    """What is done to keys between their projection and attention.

    Attributes:
        rope: rotary table, or None.
        behind: whether the norm, if there is one, follows RoPE.
        error: relative difference to what the module does.
    """

    rope: RotaryTable | None
    behind: bool
    error: float


def find_key_path(
    projected: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    norm: KeyNorm | None,
    tables: Sequence[RotaryTable],
) -> KeyPath:
    """What explains a module's keys best; it may not be good enough.

    Args:
        projected: what the projection yielded for keys ``[num_tokens, num_kv_heads, head_size]``, FP32.
        keys: what attention was given for them, likewise.
        positions: ``[num_tokens]``.
        norm: that they go through, or None.
        tables: that they may be turned by.
    """
    paths = (
        KeyPath(rope, behind, ((made - keys).norm() / keys.norm().clamp_min(1e-30)).item())
        for rope, behind, made in _tried(projected, positions, norm, tables)
    )
    return min(paths, key=lambda path: path.error)


def _tried(
    projected: torch.Tensor, positions: torch.Tensor, norm: KeyNorm | None, tables: Sequence[RotaryTable]
) -> Iterator[tuple[RotaryTable | None, bool, torch.Tensor]]:
    """All ways, and the keys ``[num_tokens, num_kv_heads, head_size]`` that they make; ahead of others what is less."""
    for rope, behind in product((None, *tables), (False, True)):
        if behind and (norm is None or rope is None):
            continue
        made = projected if norm is None or behind else normalize(projected, norm)
        made = made if rope is None else apply_rope(made, positions, rope)
        yield rope, behind, normalize(made, norm) if behind and norm is not None else made
