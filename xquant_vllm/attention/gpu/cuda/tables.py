"""A latent as the CUDA decode kernel reads it; see csrc/cuda/decode/decode.h."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from xquant_vllm.attention.gpu.tables.bit_addresses import COLUMNS
from xquant_vllm.attention.gpu.tables.latent_tables import FP16, Band
from xquant_vllm.attention.gpu.tables.tile_rotation import TILE

# As in csrc/cuda/decode: tokens that are worked on at once, how many outlier channels keys may have, and bytes of codes
# that are unpacked at once, of which products take two.
TOKENS = TILE
MOST_OUTLIERS = 4
_VECTOR_BYTES = 16
_LOW, _LOW_MASK, _HIGH, _HIGH_MASK, _HIGH_SHIFT, _LEVELS = range(len(COLUMNS))
# A fast quad is four neighbouring bytes. As numbers of two bytes the first and the third are unpacked together.
_FAST_ORDER = {1: (0, 1, 2, 3), 2: (0, 2, 1, 3)}
_SLOW = 1 << 24


@dataclass(frozen=True)
class Quads:
    """A band's channels in the order in which the kernel unpacks them (the *k-order*).

    Attributes:
        order: the channel at every place; four places are a quad.
        addresses: int32 ``[quads, 4]``, see ``xquant_cuda_quad``.
        masks: int32 ``[quads]``.
        any_slow: whether a quad is not four neighbouring bytes.
    """

    order: list[int]
    addresses: torch.Tensor
    masks: torch.Tensor
    any_slow: bool


def quads(addresses: torch.Tensor, dtype: torch.dtype = torch.float16) -> Quads:
    """Put channels into quads: neighbours where their codes are in neighbouring bytes, others as they come.

    Args:
        addresses: ``[6, channels]``, see :func:`bit_addresses`; as many channels of every mask are a multiple of 4.
        dtype: what codes are unpacked to, FP16 or INT8.
    """
    table = addresses.T.tolist()
    fast: list[int] = []
    left: dict[int, list[int]] = {}
    at = 0
    while at < len(table):
        if _neighbours(table[at : at + 4]):
            fast.append(at)
            at += 4
        else:
            left.setdefault(_masks(table[at]), []).append(at)
            at += 1
    if dtype.itemsize == 1:
        # Those in the same bytes, at different bits, follow each other: four quads are unpacked together.
        fast.sort(key=lambda first: table[first][_LOW])
    order = [first + channel for first in fast for channel in _FAST_ORDER[dtype.itemsize]]
    rows = [[_packed(table[first]), 0, 0, 0] for first in fast]
    masks = [_masks(table[first]) for first in fast]
    for of_mask, channels in left.items():
        order += channels
        rows += [[_packed(table[c]) for c in channels[i : i + 4]] for i in range(0, len(channels), 4)]
        masks += [of_mask | _SLOW] * (len(channels) // 4)
    # Addresses of 16 bits twice are numbers up to 2**32.
    bits = torch.tensor(rows, dtype=torch.int64).to(torch.int32)
    return Quads(order, bits, torch.tensor(masks, dtype=torch.int32), bool(left))


def _neighbours(four: list[list[int]]) -> bool:
    first = four[0]
    return len(four) == 4 and all(
        channel[_LOW] == first[_LOW] + 8 * index
        and _masks(channel) == _masks(first)
        and (not first[_HIGH_MASK] or channel[_HIGH] == first[_HIGH] + 8 * index)
        for index, channel in enumerate(four)
    )


def _packed(channel: list[int]) -> int:
    return channel[_LOW] | channel[_HIGH] << 16


def _masks(channel: list[int]) -> int:
    return channel[_LOW_MASK] | channel[_HIGH_MASK] << 8 | channel[_HIGH_SHIFT] << 16


@dataclass(frozen=True)
class LatentArrays:
    """The heads of a latent, on the CPU.

    Attributes:
        records: int32 ``[num_kv_heads, 8]``: ``xquant_cuda_latent``.
        quads: int32 ``[num_kv_heads, head_size / 4, 4]``.
        masks: int32 ``[num_kv_heads, head_size / 4]``.
        channels: int64 ``[num_kv_heads, head_size]``: the channel at every place of the k-order; -1: none.
        half_levels: FP32 ``[num_kv_heads, head_size]``: half the largest code of each.
        row_bytes: of the longest row.
    """

    records: torch.Tensor
    quads: torch.Tensor
    masks: torch.Tensor
    channels: torch.Tensor
    half_levels: torch.Tensor
    row_bytes: int


def latent_arrays(bands: list[Band], head_size: int, dtype: torch.dtype = torch.float16) -> LatentArrays:
    """Describe a latent whose heads are one band each.

    Args:
        bands: of every kv head.
        head_size: channels of a head.
        dtype: what codes are unpacked to, FP16 or INT8.
    """
    records, rows, masks, channels, levels = [], [], [], [], []
    for band in bands:
        of_head = quads(band.addresses, dtype)
        vectors = -(-len(of_head.order) * dtype.itemsize // (2 * _VECTOR_BYTES)) * 2
        field = band.fields
        # Rows of a multiple of 32 bytes start in one bank, or two.
        by_token = of_head.any_slow and field["row_bytes"] % 32 != 0
        lanes = -1 if by_token else math.ceil(math.log2(vectors))
        records.append(
            [
                *(field["codes"], field["row_bytes"], field["scales"], field.get("zeros", 0)),
                *(field.get("outliers", 0), field["num_outliers"], vectors, lanes),
            ]
        )
        missing = head_size // 4 - of_head.masks.numel()
        rows.append(F.pad(of_head.addresses, (0, 0, 0, missing)))
        masks.append(F.pad(of_head.masks, (0, missing)))
        order = torch.tensor(of_head.order)
        missing = head_size - order.numel()
        channels.append(F.pad(order, (0, missing), value=-1))
        levels.append(F.pad(band.addresses[_LEVELS, order].float() / 2, (0, missing)))
    return LatentArrays(
        torch.tensor(records, dtype=torch.int32),
        torch.stack(rows),
        torch.stack(masks),
        torch.stack(channels),
        torch.stack(levels),
        max(band.fields["row_bytes"] for band in bands),
    )


def fits(bands: list[list[Band]], head_size: int) -> bool:
    """Whether a latent's heads are one band each of codes that the kernel unpacks."""
    return all(
        len(of_head) == 1
        and of_head[0].fields["kind"] != FP16
        and of_head[0].addresses.shape[1] <= head_size
        and of_head[0].fields["num_outliers"] <= MOST_OUTLIERS
        and int(of_head[0].addresses[:4].max()) < 1 << 16
        for of_head in bands
    )
