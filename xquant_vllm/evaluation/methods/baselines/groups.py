"""Asymmetric uniform quantization in groups, along channels or along tokens, and the bytes that it takes.

The quantizer of KIVI and of XQuant: minimum and maximum of a group, an FP16 scale and an FP16 zero point (its minimum).
"""

import torch
from torch.nn import functional

from xquant_vllm.codec.quantizer import dequantize, quantize

_GROUP_BYTES = 4  # an FP16 scale and an FP16 zero point


def per_token(x: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """What is read back of ``x`` ``[num_tokens, channels]`` quantized in groups of channels of one token, FP32.

    The last group is smaller where ``group_size`` does not divide the channels.
    """
    channels = x.shape[-1]
    # Copies of the last channel change neither minimum nor maximum of its group.
    padded = functional.pad(x.float().unsqueeze(0), (0, -channels % group_size), mode="replicate")[0]
    return dequantize(*quantize(padded, bits, group_size))[..., :channels]


def per_channel(x: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The same in groups of successive tokens of one channel; the last group may be incomplete."""
    return per_token(x.T, bits, group_size).T


def per_token_bytes(channels: int, bits: int, group_size: int) -> float:
    """Bytes of a token: codes, and a scale and a zero point for every group, also the last."""
    return channels * bits / 8 + _GROUP_BYTES * -(-channels // group_size)


def per_channel_bytes(channels: int, bits: int, group_size: int) -> float:
    """Bytes of a token; scales and zero points are shared by ``group_size`` tokens, as if all groups were full."""
    return channels * (bits / 8 + _GROUP_BYTES / group_size)
