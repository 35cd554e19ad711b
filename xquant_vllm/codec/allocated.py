"""Symmetric uniform quantization of a calibrated latent: every channel its own bits, one scale per token.

A calibrated basis yields channels whose root mean square over a text is 1, the most important first, and
:mod:`.allocation` has given each its bits. A token's latent head becomes integer codes and an 8-bit scale s, the power
of ``2 ** (1/8)`` that reads the token back best::

    x_c  ~=  (code_c - (2**b_c - 1) / 2) * step(b_c) * s,      code_c in [0, 2**b_c - 1],   s = 2 ** ((scale - 128) / 8)

``step(b)`` is the best uniform step for a Gaussian channel, so s is about 1 and departs from it where a token is larger
or smaller than others. Which s is best is tried out: it clips a few channels where that makes the others finer. An
error counts by what the allocation has made of the channel's importance: a channel of b bits is worth
``1 / distortion(b)``, because water-filling leaves the same weighted error in every channel.
"""

from dataclasses import dataclass

import torch

from xquant_vllm.codec.allocation import DISTORTION, STEP, Runs, run_bytes
from xquant_vllm.codec.packing import packed_size

# Eighths of an octave around the scale that matches the token's weighted mean square, tried in this order.
CANDIDATES = (-6, -4, -2, 0, 2, 4, 6, 8, 10)
SCALE_BIAS = 128
SCALES_PER_OCTAVE = 8
_SMALLEST, _LARGEST = 1, 255


@dataclass(frozen=True)
class AllocatedFormat:
    """Number format of one stream of calibrated latents.

    Attributes:
        width: channels per latent head, those included that are not stored.
        runs: per latent head, bits and number of channels, bits not ascending; the rest of the width is not stored and
            reads back as 0.
    """

    width: int
    runs: tuple[Runs, ...]

    def __post_init__(self) -> None:
        """Refuse runs that cannot be packed or do not fit."""
        for runs in self.runs:
            for bits, channels in runs:
                if bits not in STEP:
                    raise ValueError(f"a run of {bits} bits is not supported: set one of {', '.join(map(str, STEP))}")
                packed_size(channels, bits)
            if [bits for bits, _ in runs] != sorted((bits for bits, _ in runs), reverse=True):
                raise ValueError(f"the bits of the runs {runs} ascend")
            if not runs or sum(channels for _, channels in runs) > self.width:
                raise ValueError(f"runs {runs} do not fit {self.width} channels")

    @property
    def num_heads(self) -> int:
        """Latent heads."""
        return len(self.runs)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one token, all latent heads."""
        return sum(map(run_bytes, self.runs))

    @property
    def parameter_bytes(self) -> tuple[int, int, int]:
        """Bytes of the scales of one token, all latent heads; there are no zeros and no outliers."""
        return self.num_heads, 0, 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token, all latent heads: codes and scales."""
        return self.code_bytes + self.num_heads

    @property
    def bits(self) -> float:
        """Bytes of a token as bits per channel."""
        return 8 * self.bytes_per_token / (self.num_heads * self.width)


def channel_tables(runs: Runs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every stored channel the step, the largest code and what an error is worth; FP32 on the CPU."""
    channels = torch.tensor([count for _, count in runs], device="cpu")
    of_runs = [(STEP[bits], float((1 << bits) - 1), 1 / DISTORTION[bits]) for bits, _ in runs]
    step, largest, worth = torch.tensor(of_runs, device="cpu").repeat_interleave(channels, 0).T.contiguous()
    return step, largest, worth


def quantize_allocated(x: torch.Tensor, runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize one latent head.

    Args:
        x: ``[..., width]`` latents, any float dtype; computed in FP32. Channels that are not stored are not read.
        runs: the head's runs.

    Returns:
        ``codes [..., stored channels]`` int32 and ``scales [...]`` uint8.
    """
    step, largest, worth = (table.to(x.device) for table in channel_tables(runs))
    x = x[..., : step.numel()].float().nan_to_num(0.0, 3e38, -3e38)
    mean_square = (x.square() * worth).sum(-1) / worth.sum()
    octaves = mean_square.double().clamp(1e-30, 1e30).log2() / 2
    middle = (octaves * SCALES_PER_OCTAVE).round() + SCALE_BIAS

    best_error = torch.full_like(mean_square, torch.inf)
    best_codes = torch.zeros_like(x, dtype=torch.int32)
    best_scale = torch.full_like(middle, _SMALLEST)
    for candidate in CANDIDATES:
        scale = (middle + candidate).clamp(_SMALLEST, _LARGEST)
        unit = _scale_value(scale).unsqueeze(-1) * step
        codes = (x / unit + largest / 2).round().clamp_min(0).minimum(largest)
        error = ((x - (codes - largest / 2) * unit).square() * worth).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better.unsqueeze(-1), codes.to(torch.int32), best_codes)
    return best_codes, best_scale.to(torch.uint8)


def dequantize_allocated(codes: torch.Tensor, scales: torch.Tensor, runs: Runs, width: int) -> torch.Tensor:
    """Invert :func:`quantize_allocated` up to rounding.

    Args:
        codes: ``[..., stored channels]``, integer.
        scales: ``[...]``, uint8.
        runs: the head's runs.
        width: channels to return; those that are not stored are 0.

    Returns:
        ``[..., width]``, FP32.
    """
    step, largest, _ = (table.to(codes.device) for table in channel_tables(runs))
    x = (codes.float() - largest / 2) * (_scale_value(scales).unsqueeze(-1) * step)
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def scale_values() -> torch.Tensor:
    """What the 256 codes of a scale stand for; FP32 on the CPU."""
    return _scale_value(torch.arange(256, device="cpu"))


def _scale_value(scale: torch.Tensor) -> torch.Tensor:
    """FP32 scales from their codes."""
    return torch.exp2((scale.double() - SCALE_BIAS) / SCALES_PER_OCTAVE).float()
