"""What a module of transformers does to its keys, found by trying."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.models.transformers.fusers.rms_norm import TPAwareGemmaRMSNorm, TPAwareRMSNorm

from xquant_vllm.projection.rematerialize import HeadNorm, LayerProjection, finish_keys
from xquant_vllm.projection.rope import RotaryTable

_PLAIN = (RMSNorm, TPAwareRMSNorm)
_GEMMA = (GemmaRMSNorm, TPAwareGemmaRMSNorm)


@dataclass(frozen=True)
class KeyPath:
    """What is done to keys between their projection and attention.

    Attributes:
        norm: of every key head, or None.
        rope: rotary table, or None.
        error: relative difference to what the module does.
    """

    norm: HeadNorm | None
    rope: RotaryTable | None
    error: float


def find_key_path(
    projected: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    norms: Sequence[HeadNorm],
    tables: Sequence[RotaryTable],
) -> KeyPath:
    """The norm and the rotation that explain a module's keys best; it may not be good enough.

    Args:
        projected: what the projection yielded for keys ``[num_tokens, num_kv_heads, head_size]``, FP32.
        keys: what attention was given for them, likewise.
        positions: ``[num_tokens]``.
        norms: that the module has.
        tables: that it may turn its keys by.
    """
    heads, head_size = projected.shape[1:]
    best: KeyPath | None = None
    for norm, rope in product((None, *norms), (None, *tables)):
        projection = LayerProjection(projected.new_empty(heads, 0, head_size), None, key_norm=norm, rope=rope)
        made = finish_keys(projected, positions, projection)
        error = ((made - keys).norm() / keys.norm().clamp_min(1e-30)).item()
        if best is None or error < best.error:
            best = KeyPath(norm, rope, error)
    assert best is not None
    return best


def head_norm(module: Any, head_size: int) -> HeadNorm | None:
    """A module as a norm of every key head; None if it is none that is known here."""
    plain = type(module) in _PLAIN and module.variance_size_override is None
    if not plain and type(module) not in _GEMMA:
        return None
    weight = module.weight.data.float()
    if plain and not module.has_weight:
        weight = weight.new_ones(head_size)
    if weight.shape != (head_size,):
        return None
    return HeadNorm(weight=weight if plain else weight + 1.0, eps=module.variance_epsilon)
