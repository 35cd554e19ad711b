"""The data-free latent basis: an SVD of Wk or Wv, with channel scales and a rotation folded into the weights.

XQuant (section 3.2) factorizes ``W = U S B^T`` and caches ``X U``, which rematerializes as ``(X U) (S B^T)``. Two
changes fold into the same two matrices and so cost nothing at run time:

* channel ``c`` is multiplied by ``(s_c / mean s)^0.5``. Every channel is quantized with about the same step, and an
  error in channel c reaches the keys times ``s_c``, so the channels that matter more get a finer step;
* the channels are rotated by a fixed orthogonal matrix, which evens out their ranges. The leading channels of the SVD
  carry the outliers of ``X U``; those kept in FP16 stay out of the rotation.

With one basis per kv head the up-projection is block diagonal and the latents shard by head; with a joint basis all kv
heads share one latent.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from xquant_vllm.codec.rotation import random_rotation

BasisKind = Literal["head", "joint"]

# Channels far below the mean singular value would get an enormous up-projection for nothing.
_SMALLEST_CHANNEL_SCALE = 0.05


@dataclass(frozen=True)
class LatentBasis:
    """A factorized projection: ``x @ down[b] @ up[h]`` is ``x @ W_h``, b being the latent head that kv head h reads.

    Attributes:
        down: ``[latent_heads, hidden_size, width]``, in the dtype that will serve.
        up: ``[num_kv_heads, width, head_size]``, FP32.
    """

    down: torch.Tensor
    up: torch.Tensor


def latent_shape(num_kv_heads: int, head_size: int, kind: BasisKind) -> tuple[int, int]:
    """Latent heads and channels per latent head of a basis."""
    return (num_kv_heads, head_size) if kind == "head" else (1, num_kv_heads * head_size)


def factorize(
    weight: torch.Tensor,
    num_kv_heads: int,
    kind: BasisKind,
    *,
    outlier_channels: int,
    rotate: bool,
    seed: int,
    dtype: torch.dtype,
) -> LatentBasis:
    """Factorize a key or value projection.

    Args:
        weight: ``[num_kv_heads * head_size, hidden_size]``, as a linear layer stores it.
        num_kv_heads: kv heads of this weight (of this rank's shard under tensor parallelism).
        kind: ``"head"`` for one basis per kv head, ``"joint"`` for one basis for all.
        outlier_channels: leading channels that are left out of the rotation.
        rotate: whether to rotate the remaining channels.
        seed: seed of the rotation.
        dtype: dtype that the down-projection is served in. Its rounding is made good in the up-projection.

    Returns:
        The basis, on the weight's device. Lossless up to rounding: no channel is dropped.
    """
    head_size = weight.shape[0] // num_kv_heads
    latent_heads, width = latent_shape(num_kv_heads, head_size, kind)
    columns = weight.to(torch.float64).reshape(latent_heads, width, -1).transpose(1, 2)
    rotation = None
    if rotate and width - outlier_channels > 1:
        rotation = random_rotation(width - outlier_channels, seed).to(weight.device)
    down = torch.stack([_down_projection(w, outlier_channels, rotation) for w in columns]).to(dtype)
    up = torch.stack([_refit(d.to(torch.float64), w) for d, w in zip(down, columns, strict=True)])
    if kind == "joint":
        up = up[0].reshape(width, num_kv_heads, head_size).transpose(0, 1)
    return LatentBasis(down=down, up=up.to(torch.float32).contiguous())


def _down_projection(w: torch.Tensor, outlier_channels: int, rotation: torch.Tensor | None) -> torch.Tensor:
    """Scaled and rotated left singular vectors of ``w`` ``[hidden_size, width]``, FP64, same shape."""
    width = w.shape[1]
    u, s, _ = torch.linalg.svd(w, full_matrices=False)
    scale = (s / s.mean().clamp_min(torch.finfo(s.dtype).tiny)).sqrt().clamp_min(_SMALLEST_CHANNEL_SCALE)
    down = u * scale
    if down.shape[1] < width:
        # Fewer inputs than channels: the surplus channels carry nothing.
        down = torch.nn.functional.pad(down, (0, width - down.shape[1]))
    if rotation is not None:
        down[:, outlier_channels:] = down[:, outlier_channels:] @ rotation
    return down


def _refit(down: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The up-projection that best inverts a rounded down-projection: least squares of ``down @ up = w``, FP64."""
    gram = down.T @ down
    # A ridge far below rounding keeps surplus (zero) channels from making the system singular.
    ridge = 1e-13 * torch.diagonal(gram).sum().clamp_min(torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, down.T @ w)
