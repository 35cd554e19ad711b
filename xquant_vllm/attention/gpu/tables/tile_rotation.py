"""Angles of RoPE in two steps: of the first position of a tile of 64, and of the distances within a tile.

The second are the same in every tile, so a kernel keeps them and looks up one row of a table per tile.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from xquant_vllm.attention.per_object import per_object
from xquant_vllm.projection.rope import RotaryTable

TILE = 64
"""Positions of a tile."""
# By how much a product of cosines and sines may miss the table's. Tables of FP32 angles are that inexact themselves at
# positions of hundreds of thousands; tables that are no rotation miss by far more.
_ROPE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class RopeArrays:
    """Cosines and sines in two steps: of every 64th position, and of the positions between.

    Attributes:
        base: FP32 ``[positions / 64, half, 2]``.
        offset: FP16 ``[64, half, 2]``.
    """

    base: torch.Tensor
    offset: torch.Tensor


@per_object
def rope_arrays(table: RotaryTable, half: int) -> RopeArrays | None:
    """Cut a table up; None where angles are not proportional to positions. Layers share it.

    Args:
        table: the table.
        half: pairs of a head; those beyond the table's do not rotate.
    """
    positions = table.cos.shape[0]
    angles = torch.complex(table.cos, table.sin)
    padded = F.pad(torch.view_as_real(angles), (0, 0, 0, 0, 0, -positions % TILE))
    tiles = torch.view_as_complex(padded).unflatten(0, (-1, TILE))
    # A factor on all cosines and sines (YaRN) is kept by the base.
    offset = tiles[0] * tiles[0, :1].conj() / tiles[0, :1].abs().square()
    rounded = torch.view_as_real(offset).to(torch.float16)
    if positions < TILE:
        rounded[positions:] = 0
    base = tiles[:, 0].contiguous()
    for begin in range(0, base.shape[0], 256):
        product = (base[begin : begin + 256].unsqueeze(1) * offset).flatten(0, 1)
        expected = angles[begin * TILE : (begin + 256) * TILE]
        missed = (product[: expected.shape[0]] - expected).abs()
        if bool((missed > _ROPE_TOLERANCE * expected.abs().amax(-1, keepdim=True)).any()):
            return None
    return RopeArrays(_passing(torch.view_as_real(base), half), _passing(rounded, half))


def _passing(x: torch.Tensor, half: int) -> torch.Tensor:
    """``[..., pairs, 2]`` filled up with pairs that do not rotate."""
    still = x.new_tensor([1.0, 0.0]).expand(*x.shape[:-2], half - x.shape[-2], 2)
    return torch.cat((x, still), -2).contiguous()
