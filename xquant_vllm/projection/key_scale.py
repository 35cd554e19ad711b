"""What a norm over all key heads together divides the keys of a token by, told from their latents.

It is one number s for all keys of a token, and latents are linear: ``K / s = (z / s) M``. So latents are cached divided
by s, and whoever reads them need not know of it. s is taken from the latents before they are quantized, with the eps of
the norm in it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from xquant_vllm.projection.basis import left_inverse
from xquant_vllm.projection.key_norm import KeyNorm, token_mean_square
from xquant_vllm.projection.rematerialize import up_project


@dataclass(frozen=True)
class KeyScale:
    """Divides key latents before they are cached.

    Attributes:
        up: ``[num_kv_heads, width, head_size]``, FP32, from latents to the keys that the norm is of.
        eps: of the norm.
        channels: that it is over, those of all ranks.
        sum_over_ranks: see :class:`~xquant_vllm.projection.key_norm.KeyNorm`.
    """

    up: torch.Tensor
    eps: float
    channels: int
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None

    @staticmethod
    def of(norm: KeyNorm | None, down: torch.Tensor, weight: torch.Tensor) -> "KeyScale | None":
        """The scale of a layer; None where keys are not normalized over all heads together.

        Args:
            norm: of its keys, or None.
            down: ``[latent_heads, hidden_size, width]``, as it is served.
            weight: ``[num_kv_heads * head_size, hidden_size]`` of its keys.
        """
        if norm is None or norm.channels is None:
            return None
        kv_heads, heads = norm.weight.shape[0], down.shape[0]
        columns = weight.to(torch.float64).unflatten(0, (heads, -1)).mT
        # Not the up-projection that keys are read with, which has the weights of the norm in it.
        up = left_inverse(down, columns).unflatten(2, (kv_heads // heads, -1)).transpose(1, 2).flatten(0, 1)
        return KeyScale(up.float().contiguous(), norm.eps, norm.channels, norm.sum_over_ranks)

    def apply(self, latents: torch.Tensor) -> torch.Tensor:
        """Divide.

        Args:
            latents: of keys, ``[num_tokens, ...]`` with the channels of all latent heads, any floating dtype.

        Returns:
            Likewise, in their dtype, contiguous. The division is in FP32, and rounded once.
        """
        exact = latents.float()
        keys = up_project(exact.flatten(1).unflatten(1, (-1, self.up.shape[1])), self.up)
        mean_square = token_mean_square(keys, self.channels, self.sum_over_ranks)
        factor = torch.rsqrt(mean_square + self.eps).view(-1, *[1] * (latents.dim() - 1))
        return (exact * factor).to(latents.dtype)
