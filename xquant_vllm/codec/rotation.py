"""Orthogonal rotations that spread a latent's energy evenly over its channels before uniform quantization."""

import torch


def random_rotation(size: int, seed: int) -> torch.Tensor:
    """A fixed orthogonal matrix, drawn uniformly (Haar measure) from the seed.

    The same on every machine and rank: a latent written under one rotation must be read under the same one.

    Args:
        size: number of channels.
        seed: seed of the draw.

    Returns:
        ``[size, size]``, FP64, on the CPU.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    # Fixing the signs of R's diagonal makes the decomposition, and so the draw, unique.
    return q * torch.sign(torch.diagonal(r))
