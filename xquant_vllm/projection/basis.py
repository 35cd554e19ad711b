"""The latent basis: a factorization of Wk or Wv, with channel scales and a rotation folded into the weights.

XQuant (section 3.2) factorizes ``W = U S B^T`` and caches ``X U``, which rematerializes as ``(X U) (S B^T)``. Two
changes fold into the same two matrices and so cost nothing at run time:

* channel ``c`` is multiplied by ``(s_c / mean s)^0.5``. Every channel is quantized with about the same step, and an
  error in channel c reaches the keys times ``s_c``, so the channels that matter more get a finer step;
* the channels are rotated by a fixed orthogonal matrix, which evens out their ranges. The leading channels of the SVD
  carry the outliers of ``X U``; those kept in FP16 stay out of the rotation.

With one basis per kv head the up-projection is block diagonal and the latents shard by head; with a joint basis all kv
heads share one latent. A little text makes better ones: see :mod:`.calibrated` and :mod:`.predicted`.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from xquant_vllm.codec.rotation import random_rotation

BasisKind = Literal["head", "joint"]

# Channels far below the mean singular value would get an enormous up-projection for nothing.
_SMALLEST_CHANNEL_SCALE = 0.05
# Singular values from a Gram matrix are exact to FP64's epsilon over their ratio to the largest; below this ratio they
# are taken from a QR decomposition, at several times the price.
_SMALLEST_GRAM_RATIO = 1e-5


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
    columns = weight.to(torch.float64).reshape(latent_heads, width, -1).mT
    down = down_projection(columns, outlier_channels=outlier_channels, rotate=rotate, seed=seed, dtype=dtype)
    up = left_inverse(down, columns)
    if kind == "joint":
        up = up[0].reshape(width, num_kv_heads, head_size).transpose(0, 1)
    return LatentBasis(down=down, up=up.to(torch.float32).contiguous())


def down_projection(
    columns: torch.Tensor,
    *,
    outlier_channels: int,
    rotate: bool,
    seed: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Scaled and rotated latent channels.

    Args:
        columns: ``[latent_heads, hidden_size, width]``, FP64, the projections to factorize.
        outlier_channels: leading channels that are left out of the rotation.
        rotate: whether to rotate the remaining channels.
        seed: seed of the rotation.
        dtype: of the result.

    Returns:
        ``[latent_heads, hidden_size, width]`` in ``dtype``, contiguous.
    """
    width = columns.shape[-1]
    u, s = _singular(columns)
    scale = (s / s.mean(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)).sqrt()
    down = u * scale.clamp_min(_SMALLEST_CHANNEL_SCALE).unsqueeze(-2)
    if down.shape[-1] < width:
        # Fewer inputs than channels: the surplus channels carry nothing.
        down = torch.nn.functional.pad(down, (0, width - down.shape[-1]))
    if rotate and width - outlier_channels > 1:
        rotation = random_rotation(width - outlier_channels, seed).to(down.device)
        down[..., outlier_channels:] = down[..., outlier_channels:] @ rotation
    return down.to(dtype).contiguous()


def left_inverse(down: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What best inverts a rounded down-projection: the least squares solution of ``down @ up = columns``.

    Args:
        down: ``[latent_heads, hidden_size, width]``, any dtype.
        columns: ``[latent_heads, hidden_size, n]``, FP64.

    Returns:
        ``[latent_heads, width, n]``, FP64.
    """
    down = down.to(torch.float64)
    gram = down.mT @ down
    # A ridge far below rounding keeps surplus (zero) channels from making the system singular.
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-13 * diagonal.sum(-1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve(gram, down.mT @ columns)


def _singular(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors ``[b, hidden_size, n]`` and singular values ``[b, n]``, descending, of tall matrices."""
    s, mixing = _roots(columns.mT @ columns)
    if bool((s[:, -1] > _SMALLEST_GRAM_RATIO * s[:, 0]).all()):
        return columns @ (mixing / s.unsqueeze(-2)), s
    # (Nearly) rank deficient, or fewer inputs than channels.
    q, r = torch.linalg.qr(columns)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ u, s


def _roots(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square roots of the eigenvalues, descending, and eigenvectors of symmetric ``[b, n, n]``."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)
