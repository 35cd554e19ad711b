"""TurboQuant (Zandieh et al., arXiv 2504.19874), the variant for the mean square error (algorithm 1).

Every key after RoPE and every value vector of a head is rotated by a random orthogonal matrix. Its norm is kept in
FP16; the coordinates of the unit vector, then nearly independent and N(0, 1/d), are quantized one by one with the
Lloyd-Max codebook of that distribution (the paper's exact Beta density tends to it). No data, no groups, no residual.
The paper's 2.5 and 3.5 bits split channels into two sets of codebooks by their outliers, which is not done here.
"""

import math

import torch

from xquant_vllm.codec.quantizer import to_fp16
from xquant_vllm.codec.rotation import random_rotation
from xquant_vllm.evaluation.model.cache_method import AttendedMethod, Version

_SEED = 2504


class TurboQuant(AttendedMethod):
    """Vectors of heads, rotated, by a scalar codebook."""

    def __init__(self, bits: int, head_size: int, device: torch.device) -> None:
        """Prepare the rotation and the codebook for heads of a size."""
        self._rotation = random_rotation(head_size, _SEED).float().to(device)
        self._levels = (lloyd_max(bits) / math.sqrt(head_size)).float().to(device)

    def read(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Version, ...]:
        """Both quantized alike."""
        return (Version(self.round_trip(keys), self.round_trip(values)),)

    def round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """What is read back of vectors ``[..., head_size]``, FP32."""
        norms = to_fp16(x.norm(dim=-1, keepdim=True)).float()
        unit = x @ self._rotation.T / norms.clamp_min(torch.finfo(torch.float32).tiny)
        boundaries = (self._levels[1:] + self._levels[:-1]) / 2
        return self._levels[torch.bucketize(unit, boundaries)] @ self._rotation * norms


def lloyd_max(bits: int) -> torch.Tensor:
    """The ``2**bits`` levels that quantize N(0, 1) with the least mean square error, ascending, FP64.

    Lloyd's iteration: boundaries half way between levels, levels in the middle (of mass) between boundaries.
    """
    count = 1 << bits
    # Quantiles of N(0, 3), which is how such levels are distributed where there are many.
    levels = math.sqrt(3) * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinite = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(4000):
        edges = torch.cat((-infinite, (levels[1:] + levels[:-1]) / 2, infinite))
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        moved = (density[:-1] - density[1:]) / torch.special.ndtr(edges).diff()
        done = bool((moved - levels).abs().max() < 1e-8)
        levels = moved
        if done:
            break
    return levels


def turboquant_bytes(channels: int, head_size: int, bits: int) -> float:
    """Bytes of a token's keys and values in one layer: codes, and an FP16 norm per vector.

    Args:
        channels: of all kv heads, ``num_kv_heads * head_size``.
        head_size: channels of a head.
        bits: bits per code.
    """
    return 2 * (channels * bits / 8 + 2 * channels // head_size)
