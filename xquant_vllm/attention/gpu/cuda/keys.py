"""What the CUDA decode kernel rematerializes keys by: the up-projection in FP16, or in integers; see csrc/cuda/decode.

With ``up = unit * numbers`` for every column a key is ``scale * unit * (numbers^T codes) + zero * sums``, and its
outliers and bias besides. The numbers are integers of 8 bits where the up-projection of every kv head is on a grid of
such (projection/integer_up.py), and lose nothing then; else they are FP16.
"""

import math
from dataclasses import dataclass

import torch

from xquant_vllm.attention.gpu.cuda.tables import MOST_OUTLIERS
from xquant_vllm.attention.gpu.tables.bit_addresses import COLUMNS
from xquant_vllm.attention.gpu.tables.latent_tables import ALLOCATED, Band
from xquant_vllm.projection.integer_up import byte_units

_LEVELS = COLUMNS.index("levels")
# The kernel reads codes as subnormal FP16 numbers, and integers as they are.
_CODE_FACTOR = {torch.float16: 2.0**24, torch.int8: 1.0}
_LARGEST_EXPONENT = 14  # of FP16, with room to round up


@dataclass(frozen=True)
class KeyFactors:
    """What codes of keys are multiplied by, for every kv head.

    Attributes:
        numbers: ``[channels, head_size]``, all FP16 or all INT8; rows of outliers are 0.
        units: ``[head_size]`` FP64, what the numbers of a column count.
        outliers: ``[num_outliers, head_size]`` FP32, by what outliers are multiplied.
    """

    numbers: list[torch.Tensor]
    units: list[torch.Tensor]
    outliers: list[torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers, and of what codes must be unpacked to."""
        return self.numbers[0].dtype


def key_factors(bands: list[Band], up: torch.Tensor) -> KeyFactors:
    """Integers where every kv head allows them: it is one kernel for all heads.

    Args:
        bands: of every kv head.
        up: ``[num_kv_heads, width, head_size]``, FP32, columns in halves.
    """
    weighted, outliers = [], []
    for head, band in enumerate(bands):
        kept = band.fields["num_outliers"]
        of_head = up[head, band.first_row : band.first_row + band.addresses.shape[1]]
        outliers.append(of_head[:kept])
        stored = of_head.double()
        stored[:kept] = 0
        # A band's factor is for codes that count half steps.
        steps = 2 * band.factor.to(stored).unsqueeze(1) if band.fields["kind"] == ALLOCATED else 1
        weighted.append(stored * steps)
    units = [unit for of_head in weighted for unit in [byte_units(of_head)] if unit is not None]
    if len(units) == len(weighted):
        numbers = [(of_head / unit).round().to(torch.int8) for of_head, unit in zip(weighted, units, strict=True)]
    else:
        units = [_power_of_two(of_head) for of_head in weighted]
        numbers = [(of_head / unit).to(torch.float16) for of_head, unit in zip(weighted, units, strict=True)]
    return KeyFactors(numbers, units, outliers)


def _power_of_two(weighted: torch.Tensor) -> torch.Tensor:
    """A unit for all columns with which FP16 has room for them."""
    largest = float(weighted.abs().max())
    unit = 2.0 ** (math.ceil(math.log2(largest)) - _LARGEST_EXPONENT) if largest > 0 else 1.0
    return weighted.new_full(weighted.shape[1:], unit)


def up_fragments(up: torch.Tensor) -> torch.Tensor:
    """An up-projection as the second operand of products, in the order in which lanes hold it (csrc/cuda/common/mma.h).

    Args:
        up: ``[num_kv_heads, head_size, head_size]``, FP16 or INT8: places of the k-order, columns in halves.

    Returns:
        ``[num_kv_heads, steps, column warps, 4, 32, 2, numbers of a register]``: of a step of 16 places (INT8: 32) the
        16 columns of the first half that a warp has, in two tiles of 8, and their partners; lanes, registers, numbers.
    """
    heads, places, columns = up.shape
    together = 4 // up.element_size()
    steps, warps = places // (8 * together), columns // 32
    # [head, step, register, member, number of the register, half of the head, warp, tile, group]
    parts = up.reshape(heads, steps, 2, 4, together, 2, warps, 2, 8)
    return parts.permute(0, 1, 6, 5, 7, 8, 3, 2, 4).reshape(heads, steps, warps, 4, 32, 2, together)


@dataclass(frozen=True)
class KeyArrays:
    """The same as the kernel reads it.

    Attributes:
        up: FP16 or INT8, see :func:`up_fragments`.
        rows: FP32 ``[num_kv_heads, 3 + MOST_OUTLIERS, head_size]``: what products count, and by what zero points, 1 and
            outliers are multiplied.
    """

    up: torch.Tensor
    rows: torch.Tensor


def key_arrays(bands: list[Band], factors: KeyFactors, channels: torch.Tensor, bias: torch.Tensor | None) -> KeyArrays:
    """Arrange factors.

    Args:
        bands: of every kv head.
        factors: by what they are multiplied.
        channels: see :class:`.LatentArrays`.
        bias: ``[num_kv_heads, head_size]``, FP32, columns in halves, or None.
    """
    heads, columns = len(bands), factors.units[0].numel()
    rows = factors.outliers[0].new_zeros(heads, 3 + MOST_OUTLIERS, columns)
    placed = factors.numbers[0].new_zeros(heads, columns, columns)
    for head, band in enumerate(bands):
        numbers, unit = factors.numbers[head], factors.units[head]
        there = channels[head][channels[head] >= 0].to(numbers.device)
        placed[head, : there.numel()] = numbers[there]
        rows[head, 0] = unit * _CODE_FACTOR[factors.dtype]
        # The zero point is a uniform stream's own; an allocated one has half the largest code, in steps. The sums are
        # over the rounded numbers, so that codes and zero points that cancel do so exactly.
        levels = band.addresses[_LEVELS].to(unit)
        zeros = levels / -2 if band.fields["kind"] == ALLOCATED else torch.ones_like(levels)
        rows[head, 1] = zeros @ numbers.double() * unit
        rows[head, 3 : 3 + band.fields["num_outliers"]] = factors.outliers[head]
    if bias is not None:
        rows[:, 2] = bias
    return KeyArrays(up_fragments(placed).contiguous(), rows)
