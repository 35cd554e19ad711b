"""KIVI (Liu et al., arXiv 2402.02750), and KIVI* of the XQuant paper (arXiv 2508.10395), with keys before RoPE.

Keys are quantized per channel in groups of tokens, values per token in groups of channels, asymmetrically between
minimum and maximum, with FP16 scales and zero points. Published are groups of 32 and a residual of 128 tokens; the
XQuant paper compares with groups of 128.

With a residual of R tokens KIVI keeps the most recent tokens in 16 bit (algorithm 1): of l cached tokens the last
``l mod R`` keys, because keys are quantized R at a time, and the last R values. Without one, the default, every token
that attention reads has been quantized, as for all other methods here; an incomplete last group of tokens is quantized,
too, and its bytes are counted as if it were full.
"""

import torch

from xquant_vllm.evaluation.methods.baselines.groups import per_channel, per_channel_bytes, per_token, per_token_bytes
from xquant_vllm.evaluation.model.cache_method import AttendedMethod, ProjectedMethod, Version

PUBLISHED_GROUP_SIZE = 32
PRE_ROPE_GROUP_SIZE = 128


class Kivi(AttendedMethod):
    """Keys after RoPE."""

    def __init__(self, bits: int, group_size: int, residual: int) -> None:
        """Set bits, tokens (of keys) or channels (of values) per group, and tokens of the residual."""
        self._bits, self._group_size, self._residual = bits, group_size, residual

    def read(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Version, ...]:
        """Quantized; of recent tokens the values, and of the most recent ones the keys, too, as they are."""
        heads = keys.shape[1:]
        quantized_keys = per_channel(keys.flatten(1), self._bits, self._group_size).unflatten(1, heads)
        quantized_values = per_token(values.flatten(1), self._bits, self._group_size).unflatten(1, heads)
        if not self._residual:
            return (Version(quantized_keys, quantized_values),)
        exact_keys, exact_values = recent(keys.shape[0], self._residual, keys.device)
        # Keys that are still exact are fewer than R, so their values are, too.
        return (
            Version(quantized_keys, quantized_values, ~exact_values),
            Version(quantized_keys, values, exact_values & ~exact_keys),
            Version(keys, values, exact_keys),
        )


class KiviPreRope(ProjectedMethod):
    """Keys before RoPE (KIVI*)."""

    def __init__(self, bits: int, group_size: int) -> None:
        """Set bits, and tokens (of keys) or channels (of values) per group."""
        self._bits, self._group_size = bits, group_size

    def keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Per channel."""
        return per_channel(keys, self._bits, self._group_size)

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """Per token."""
        return per_token(values, self._bits, self._group_size)


def recent(num_tokens: int, residual: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys and which values a query finds in 16 bit, ``[num_tokens, num_tokens]`` bool, queries in rows.

    A query's own token and those after it count as any other; masking what is to come is the model's affair.
    """
    cached = torch.arange(1, num_tokens + 1, device=device).unsqueeze(1)
    token = torch.arange(num_tokens, device=device)
    return token >= cached - cached % residual, token >= cached - residual


def kivi_bytes(channels: int, bits: int, group_size: int, residual: int, num_tokens: int) -> float:
    """Mean bytes of a token's keys and values in one layer when ``num_tokens`` are cached.

    Args:
        channels: of all kv heads, ``num_kv_heads * head_size``.
        bits: bits per code.
        group_size: tokens or channels that share a scale and a zero point.
        residual: R.
        num_tokens: tokens in the cache.
    """
    exact_keys, exact_values = (num_tokens % residual, min(residual, num_tokens)) if residual else (0, 0)
    keys = (num_tokens - exact_keys) * per_channel_bytes(channels, bits, group_size) + 2 * channels * exact_keys
    values = (num_tokens - exact_values) * per_token_bytes(channels, bits, group_size) + 2 * channels * exact_values
    return (keys + values) / num_tokens
