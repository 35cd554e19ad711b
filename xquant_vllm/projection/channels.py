"""The channels of a calibrated latent: principal channels of what is to be stored, each of root mean square 1."""

from dataclasses import dataclass

import torch

from xquant_vllm.codec.allocation import Runs
from xquant_vllm.codec.rotation import random_rotation

_SEED = 2508
# Channels that the text hardly ever used are not blown up to 1: relative to the largest.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class PrincipalChannels:
    """Eigenvectors of a second moment.

    Attributes:
        variances: ``[m]``, FP64, descending: what is lost in nats (times 2) if a channel is not stored.
        vectors: ``[m, m]``, FP64, a channel in every column.
    """

    variances: torch.Tensor
    vectors: torch.Tensor


def principal_channels(moment: torch.Tensor) -> PrincipalChannels:
    """Of ``[m, m]``, symmetric, FP64."""
    values, vectors = torch.linalg.eigh(moment)
    return PrincipalChannels(values.flip(0).clamp_min(0), vectors.flip(1))


def channel_basis(channels: PrincipalChannels, runs: Runs, weighted: torch.Tensor) -> torch.Tensor:
    """From y to channels as :mod:`xquant_vllm.codec.allocated` wants them.

    Channels with the same bits are rotated among each other: they come to about the same variance, and no one of them
    has heavier tails than the others.

    Args:
        channels: the principal channels.
        runs: their bits.
        weighted: ``[num_tokens, m]``, FP64, y, whose channels are to have root mean square 1.

    Returns:
        ``[m, m]``, FP64, invertible if y ever used all channels.
    """
    vectors = channels.vectors.clone()
    start = 0
    for _, count in runs:
        if count > 1:
            rotation = random_rotation(count, _SEED).to(vectors)
            vectors[:, start : start + count] = vectors[:, start : start + count] @ rotation
        start += count
    size = (weighted @ vectors).square().mean(0).sqrt()
    return vectors / size.clamp_min(_SMALLEST * size.max().clamp_min(torch.finfo(torch.float32).tiny))
