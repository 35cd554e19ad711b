"""How a model normalizes its keys, and where each part of that goes once latents are cached instead of keys.

========================  ==============================================================================================
the mean (LayerNorm)      is subtracted by the up-projection: its columns are centered
an RMS norm of a head     follows the up-projection when keys are read, with weights for all heads or for every head
an RMS norm over all      cannot follow it there, where heads are read one by one. Its mean square is one number for all
heads together            keys of a token, so latents are divided by its root before they are cached
                          (:class:`~xquant_vllm.projection.key_scale.KeyScale`); its weights go into the up-projection
weights behind RoPE       multiply queries instead: ``q . (w k) = (w q) . k``. The norm without them commutes with RoPE
========================  ==============================================================================================
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from xquant_vllm.projection.rematerialize import HeadNorm


@dataclass(frozen=True)
class KeyNorm:
    """A norm between a key's bias and RoPE.

    Attributes:
        weight: ``[num_kv_heads, head_size]``, FP32, of this rank's heads, the factor itself (Gemma's ``1 + w``).
        eps: added to the mean square.
        centered: whether the mean over a head's channels is subtracted first (LayerNorm).
        channels: how many are normalized together: those of all kv heads of all ranks; None for every head by itself.
        sum_over_ranks: adds up an FP32 tensor over the ranks that share these channels; None where one rank has all.
        query_weight: ``[num_kv_heads, head_size]``, FP32, weights that follow RoPE; None without.
    """

    weight: torch.Tensor
    eps: float
    centered: bool = False
    channels: int | None = None
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
    query_weight: torch.Tensor | None = None

    @property
    def all_weights(self) -> torch.Tensor:
        """The weights, wherever they are."""
        return self.weight if self.query_weight is None else self.query_weight

    @property
    def of_heads(self) -> HeadNorm | None:
        """What is left to do when keys are read; None where all heads are normalized together."""
        return HeadNorm(self.weight, self.eps) if self.channels is None else None

    def into_up(self, up: torch.Tensor) -> torch.Tensor:
        """A key up-projection ``[num_kv_heads, width, head_size]`` with what of the norm goes into it."""
        if self.centered:
            up = up - up.mean(-1, keepdim=True)
        return up if self.channels is None else up * self.weight.unsqueeze(1)

    def into_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Likewise the bias of the keys, ``[num_kv_heads, head_size]``, which the norm follows."""
        assert bias is None or self.channels is None
        return bias - bias.mean(-1, keepdim=True) if bias is not None and self.centered else bias


def normalize(keys: torch.Tensor, norm: KeyNorm) -> torch.Tensor:
    """The norm itself, without the weights that follow RoPE.

    Args:
        keys: ``[num_tokens, num_kv_heads, head_size]``, FP32.
        norm: the norm.
    """
    if norm.centered:
        keys = keys - keys.mean(-1, keepdim=True)
    if norm.channels is None:
        mean_square = keys.square().mean(-1, keepdim=True)
    else:
        mean_square = token_mean_square(keys, norm.channels, norm.sum_over_ranks)
    return keys * torch.rsqrt(mean_square + norm.eps) * norm.weight


def token_mean_square(
    keys: torch.Tensor, channels: int, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """The mean square of all of a token's keys, ``[num_tokens, 1, 1]``.

    Args:
        keys: ``[num_tokens, num_kv_heads, head_size]``, FP32, of this rank.
        channels: of all ranks together.
        sum_over_ranks: see :class:`KeyNorm`.
    """
    squares = keys.square().sum((1, 2), keepdim=True)
    return (squares if sum_over_ranks is None else sum_over_ranks(squares)) / channels
