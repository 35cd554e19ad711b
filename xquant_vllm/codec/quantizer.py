"""Per-token asymmetric uniform quantization in groups of channels (XQuant, section 3.1; the KIVI quantizer per token).

A group of channels of one token becomes integer codes, an FP16 scale and an FP16 zero point (the group's minimum)::

    x  ~=  code * scale + zero,      code in [0, 2**bits - 1]

Codes are computed against the *rounded* scale and zero, so that rounding these costs nothing beyond the step itself.
"""

import torch

_FP16_MAX = 65504.0


def to_fp16(x: torch.Tensor) -> torch.Tensor:
    """Round to FP16, saturating instead of overflowing to infinity. NaN stays NaN."""
    return x.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16)


def quantize(
    x: torch.Tensor, bits: int, group_size: int, outlier_channels: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize latents; the leading ``outlier_channels`` are kept in FP16 beside the codes.

    Args:
        x: ``[..., width]`` latents, any float dtype; computed in FP32.
        bits: bits per code.
        group_size: channels that share a scale and a zero point; divides ``width``.
        outlier_channels: leading channels that do not take part in their group's range; their codes are 0.

    Returns:
        ``codes [..., groups, group_size]`` int32, ``scales [..., groups]`` FP16, ``zeros [..., groups]`` FP16,
        ``outliers [..., outlier_channels]`` FP16.
    """
    x = x.float()
    levels = (1 << bits) - 1
    outliers = to_fp16(x[..., :outlier_channels])
    groups = x.unflatten(-1, (-1, group_size))
    low, high = groups.clone(), groups.clone()
    low[..., 0, :outlier_channels] = torch.inf
    high[..., 0, :outlier_channels] = -torch.inf
    zeros = to_fp16(low.amin(-1))
    base = zeros.float().unsqueeze(-1)
    scales = to_fp16((high.amax(-1) - zeros.float()) / levels)
    step = scales.float().unsqueeze(-1)
    # A constant group has scale 0 (or one that underflows FP16): its codes are 0 and it reads back as its zero point.
    codes = torch.where(step > 0, (groups - base) / step, torch.zeros_like(groups))
    codes = codes.round().clamp(0, levels).nan_to_num(0).to(torch.int32)
    codes[..., 0, :outlier_channels] = 0
    return codes, scales, zeros, outliers


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, outliers: torch.Tensor) -> torch.Tensor:
    """Invert :func:`quantize` up to rounding.

    Args:
        codes: ``[..., groups, group_size]``, integer.
        scales: ``[..., groups]``, FP16.
        zeros: ``[..., groups]``, FP16.
        outliers: ``[..., outlier_channels]``, FP16; written over the leading channels.

    Returns:
        ``[..., groups * group_size]``, FP32.
    """
    x = codes.float() * scales.float().unsqueeze(-1) + zeros.float().unsqueeze(-1)
    x = x.flatten(-2)
    if outliers.shape[-1]:
        x[..., : outliers.shape[-1]] = outliers.float()
    return x
