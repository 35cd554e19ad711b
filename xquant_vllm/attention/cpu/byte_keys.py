"""Key up-projections in 8 bits for latents that all kv heads read, as csrc/cpu/attention/byte_keys.h multiplies them.

``up = unit * integers`` with a unit for every column of a kv head, its largest integer 127. The latents of a token,
summed up where a chain has several terms, become integers of 8 bits of their largest: :func:`round_latents` does what
the kernels do. So one product in INT8 goes over all channels, and the token's scale and the column's unit are
multiplied in once.

Both roundings together change keys by less than 1%. Codes of 4 bits and fewer have cost several times as much before,
those of 8 bits have not: hence :func:`has_byte_keys`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from xquant_vllm.attention.cpu.integers import in_tiles
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.layout import StreamFormat
from xquant_vllm.projection.integer_up import BYTE_BITS, LARGEST_BYTE

# What is added to a latent's integer, and channels that are read at once.
_OFFSET = 128
_CHANNELS = 16
# What a token's largest latent becomes before it is rounded: not 127, for half of it would be halfway between two
# integers, and last bits would decide.
_LARGEST_LATENT = 126.9375
# Rows of a block of the product: kByteRows.
_ROWS = 8
# Sums of so many products stay below 2**31.
_WIDEST = 2**16


@dataclass(frozen=True)
class ByteKeys:
    """An up-projection in 8 bits.

    Attributes:
        integers: ``[num_kv_heads, head_size / 8, quads, 8]`` INT32: four channels in each, the first lowest. For tiles
            ``[num_kv_heads, chunks, head_size rounded up to 16, 64]`` INT8, see
            :func:`xquant_vllm.attention.cpu.integers.in_tiles`.
        offsets: ``[num_kv_heads, head_size]`` INT32, what 128 times the integers of a column add up to, negative.
        units: ``[num_kv_heads, head_size]`` FP32.
    """

    integers: torch.Tensor
    offsets: torch.Tensor
    units: torch.Tensor


def shares_latents(plan: AttentionLayerPlan) -> bool:
    """Whether all kv heads of a layer, and it has several, read one latent for keys and one for values."""
    terms: tuple[LatentTerm, ...] = (*plan.key_terms, *plan.value_terms)
    alone = all(plan.layouts[term.page].streams[term.stream].num_heads == 1 for term in terms)
    return alone and plan.projection.num_kv_heads > 1


def has_byte_keys(plan: AttentionLayerPlan) -> bool:
    """Whether rounding latents to bytes adds little to what their codes have lost: X and sums of X in few bits."""
    streams = [plan.layouts[term.page].streams[term.stream] for term in plan.key_terms]
    few = all(
        isinstance(stream, StreamFormat) and stream.bits <= BYTE_BITS and not stream.outlier_channels
        for stream in streams
    )
    one = all(term.adds for term in plan.key_terms[1:])
    return few and one and streams[0].width <= _WIDEST and shares_latents(plan)


def byte_keys(up_key: torch.Tensor, with_tiles: bool = False) -> ByteKeys:
    """An up-projection ``[num_kv_heads, width, head_size]`` FP32, rounded to 8 bits; in another order for tiles."""
    exact = up_key.double()
    units = (exact.abs().amax(1) / LARGEST_BYTE).clamp_min(1e-30)
    integers = (exact / units.unsqueeze(1)).round().to(torch.int8)
    offsets = -_OFFSET * integers.sum(1, dtype=torch.int32)
    if with_tiles:
        tiles = torch.stack([in_tiles(of_head) for of_head in integers])
        return ByteKeys(tiles, offsets.contiguous(), units.float())
    rows = F.pad(integers, (0, 0, 0, -integers.shape[1] % _CHANNELS)).transpose(1, 2)
    blocks = rows.unflatten(2, (-1, 4)).unflatten(1, (-1, _ROWS)).transpose(2, 3)
    return ByteKeys(blocks.contiguous().view(torch.int32).squeeze(-1), offsets.contiguous(), units.float())


def round_latents(latents: torch.Tensor) -> torch.Tensor:
    """Latents ``[..., width]`` FP32 as the kernels multiply them: integers times a scale of the token."""
    largest = latents.abs().amax(-1, keepdim=True)
    integers = (latents * (_LARGEST_LATENT / largest.clamp_min(1e-30))).round()
    return integers * (largest * (1 / _LARGEST_LATENT))
