"""Orthogonal rotations that spread a vector's energy evenly over its channels before uniform quantization.

A latent's rotation is folded into its down-projection, so any matrix will do (:func:`random_rotation`). The layer
input X has no weights to fold a rotation into: it is rotated token by token when it is stored, and for that
:class:`HadamardRotation` takes ``d log d`` operations instead of ``d**2``.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class HadamardRotation:
    """``y = (M kron H) (x * signs)``: random signs, Hadamard transforms of blocks, a mix of the blocks.

    ``d`` channels are ``m`` blocks of ``2**k``, the largest power of two that divides d. ``H`` is the Hadamard matrix
    ``[2**k, 2**k]`` of +1 and -1 in its natural order; ``M`` ``[m, m]`` is a random rotation times ``2**(-k/2)``, so
    that the whole is orthogonal. Where d is a power of two, m is 1.

    Attributes:
        signs: ``[d]``, FP32, +1 or -1.
        mix: ``[m, m]``, FP32.
    """

    signs: torch.Tensor
    mix: torch.Tensor

    @property
    def size(self) -> int:
        """Channels d."""
        return self.signs.shape[0]

    @property
    def block(self) -> int:
        """Channels of a Hadamard block, a power of two."""
        return self.size // self.mix.shape[0]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate ``x`` ``[..., d]``; returns FP32 (FP64 if ``x`` is) of the same shape."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = (x.to(dtype) * self.signs.to(dtype)).unflatten(-1, (-1, self.block))
        half = 1
        while half < self.block:
            first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
            y = torch.stack((first + second, first - second), -2).flatten(-3)
            half *= 2
        return torch.einsum("rc,...cb->...rb", self.mix.to(dtype), y).flatten(-2)

    def invert(self, y: torch.Tensor) -> torch.Tensor:
        """What :meth:`apply` rotated to ``y`` ``[..., d]``; returns FP32 (FP64 if ``y`` is) of the same shape."""
        back = HadamardRotation(torch.ones_like(self.signs), self.mix.T.contiguous()).apply(y)
        return back * self.signs.to(back.dtype)

    def to(self, device: torch.device) -> "HadamardRotation":
        """The same rotation on another device."""
        return HadamardRotation(self.signs.to(device), self.mix.to(device))


def hadamard_rotation(size: int, seed: int) -> HadamardRotation:
    """A fixed fast rotation of ``size`` channels, the same on every machine and rank."""
    block = size & -size
    generator = torch.Generator(device="cpu").manual_seed(seed)
    signs = torch.randint(2, (size,), generator=generator, device="cpu") * 2 - 1
    mix = random_rotation(size // block, seed) * block**-0.5
    return HadamardRotation(signs.to(torch.float32), mix.to(torch.float32))
