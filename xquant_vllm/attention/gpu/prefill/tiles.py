"""Tiles of prefill/dense.py: as large as a GPU's shared memory allows."""

from typing import NamedTuple

import torch


class DenseTile(NamedTuple):
    """How a program of prefill/dense.py goes through its work.

    Attributes:
        queries: query tokens of a program.
        tokens: cached tokens at a time.
        stages: such tiles of keys and values that are loaded ahead, the one in use included.
        warps: warps of a program.
    """

    queries: int
    tokens: int
    stages: int
    warps: int


# Best ones first. FP32 products are no tensor cores': fewer queries, or there are not registers enough.
_HALF_PRECISION = (
    DenseTile(64, 64, 3, 4),
    DenseTile(64, 32, 3, 4),
    DenseTile(64, 32, 2, 4),
    DenseTile(64, 16, 2, 4),
    DenseTile(16, 16, 2, 4),
)
# Of more than 128 channels a program has twice as many sums: four warps would spill 360 bytes a thread on 9.0.
_WIDE_HALF_PRECISION = (
    DenseTile(64, 32, 3, 8),
    DenseTile(64, 32, 2, 8),
    DenseTile(64, 16, 2, 8),
    DenseTile(16, 16, 2, 4),
)
_FULL_PRECISION = (DenseTile(32, 32, 2, 8), DenseTile(32, 16, 2, 8), DenseTile(16, 16, 2, 4), DenseTile(16, 16, 1, 4))


def bytes_of_tile(tile: DenseTile, width: int, dtype: torch.dtype) -> int:
    """Shared memory that a tile takes, at most: queries, keys, values and weights, see tests/attention/gpu/sweep.py."""
    return dtype.itemsize * (tile.queries * width + tile.queries * tile.tokens + 2 * tile.stages * tile.tokens * width)


def dense_tile(width: int, dtype: torch.dtype, shared_memory: int) -> DenseTile:
    """The best tile that fits.

    Args:
        width: columns of a head: a power of two, at least its size.
        dtype: of the products' operands.
        shared_memory: bytes that a program may have.

    Raises:
        ValueError: none does.
    """
    tiles: tuple[DenseTile, ...] = _WIDE_HALF_PRECISION if width > 128 else _HALF_PRECISION
    if dtype == torch.float32:
        tiles = _FULL_PRECISION
    for tile in tiles:
        if bytes_of_tile(tile, width, dtype) <= shared_memory:
            return tile
    least = bytes_of_tile(tiles[-1], width, dtype)
    raise ValueError(
        f"heads of {width} channels in {dtype} take {least:,} bytes of shared memory at least, this GPU has "
        f"{shared_memory:,}: set --dtype bfloat16, or take another GPU"
    )
