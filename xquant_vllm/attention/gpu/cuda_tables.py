"""A latent as the CUDA decode kernel reads it; see csrc/cuda/decode/decode.h."""

import math
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from xquant_vllm.attention.gpu.bit_addresses import COLUMNS
from xquant_vllm.attention.gpu.latent_tables import ALLOCATED, FP16, Chunk
from xquant_vllm.projection.rope import RotaryTable

# As in csrc/cuda/decode: what is copied and multiplied at once, and how many outlier channels keys may have.
TOKENS = 64
MOST_OUTLIERS = 4
_LOW, _LOW_MASK, _HIGH, _HIGH_MASK, _HIGH_SHIFT, _LEVELS = range(len(COLUMNS))
# A fast quad is four neighbouring bytes; the first and the third are unpacked together.
_FAST_ORDER = (0, 2, 1, 3)
_SLOW = 1 << 24
# By how much a product of cosines and sines may miss the table's. Tables of FP32 angles are that inexact themselves at
# positions of hundreds of thousands; tables that are no rotation miss by far more.
_ROPE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Quads:
    """A chunk's channels in the order in which the kernel unpacks them (the *k-order*).

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


def quads(addresses: torch.Tensor) -> Quads:
    """Put channels into quads: neighbours where their codes are in neighbouring bytes, others as they come.

    Args:
        addresses: ``[6, channels]``, see :func:`bit_addresses`; as many channels of every mask are a multiple of 4.
    """
    table = addresses.T.tolist()
    order: list[int] = []
    rows: list[list[int]] = []
    masks: list[int] = []
    left: dict[int, list[int]] = {}
    at = 0
    while at < len(table):
        four = table[at : at + 4]
        if _neighbours(four):
            order += [at + channel for channel in _FAST_ORDER]
            rows.append([_packed(four[0]), 0, 0, 0])
            masks.append(_masks(four[0]))
            at += 4
        else:
            left.setdefault(_masks(table[at]), []).append(at)
            at += 1
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
        half_levels: FP32, likewise: half the largest code.
        row_bytes: of the longest row.
    """

    records: torch.Tensor
    quads: torch.Tensor
    masks: torch.Tensor
    channels: torch.Tensor
    half_levels: torch.Tensor
    row_bytes: int


def latent_arrays(chunks: list[Chunk], head_size: int) -> LatentArrays:
    """Describe a latent whose heads are one chunk each."""
    records, rows, masks, channels, levels = [], [], [], [], []
    for chunk in chunks:
        of_head = quads(chunk.addresses)
        octets = -(-len(of_head.order) // 16) * 2
        field = chunk.fields
        # Rows of a multiple of 32 bytes start in one bank, or two.
        by_token = of_head.any_slow and field["row_bytes"] % 32 != 0
        lanes = -1 if by_token else math.ceil(math.log2(octets))
        records.append(
            [
                *(field["codes"], field["row_bytes"], field["scales"], field.get("zeros", 0)),
                *(field.get("outliers", 0), field["num_outliers"], octets, lanes),
            ]
        )
        missing = head_size // 4 - of_head.masks.numel()
        rows.append(F.pad(of_head.addresses, (0, 0, 0, missing)))
        masks.append(F.pad(of_head.masks, (0, missing)))
        order = torch.tensor(of_head.order)
        missing = head_size - order.numel()
        channels.append(F.pad(order, (0, missing), value=-1))
        levels.append(F.pad(chunk.addresses[_LEVELS, order].float() / 2, (0, missing)))
    return LatentArrays(
        torch.tensor(records, dtype=torch.int32),
        torch.stack(rows),
        torch.stack(masks),
        torch.stack(channels),
        torch.stack(levels),
        max(chunk.fields["row_bytes"] for chunk in chunks),
    )


def fits(chunks: list[list[Chunk]], head_size: int) -> bool:
    """Whether a latent's heads are one chunk each of codes that the kernel unpacks."""
    return all(
        len(of_head) == 1
        and of_head[0].fields["kind"] != FP16
        and of_head[0].addresses.shape[1] <= head_size
        and of_head[0].fields["num_outliers"] <= MOST_OUTLIERS
        and int(of_head[0].addresses[:4].max()) < 1 << 16
        for of_head in chunks
    )


def up_fragments(up: torch.Tensor) -> torch.Tensor:
    """An up-projection as the second operand of products, in the order in which lanes hold it (csrc/cuda/common/mma.h).

    Args:
        up: ``[num_kv_heads, head_size, head_size]``: places of the k-order, columns in halves.

    Returns:
        ``[num_kv_heads, steps, column warps, 4, 32, 2, 2]``: of a step of 16 places the 16 columns of the first half
        that a warp has, in two tiles of 8, and their partners; lanes, registers, halves of registers.
    """
    heads, places, columns = up.shape
    # [head, step, register, member, half of the register, half of the head, warp, tile, group]
    parts = up.reshape(heads, places // 16, 2, 4, 2, 2, columns // 32, 2, 8)
    return parts.permute(0, 1, 6, 5, 7, 8, 3, 2, 4).reshape(heads, places // 16, columns // 32, 4, 32, 2, 2)


@dataclass(frozen=True)
class KeyArrays:
    """What keys are rematerialized by.

    Attributes:
        up: FP16, see :func:`up_fragments`; every head times a power of two, so that FP16 has room for it.
        unit: FP32 ``[num_kv_heads]``: what a product of codes (times ``2**-24``) and ``up`` counts.
        rows: FP32 ``[num_kv_heads, 2 + MOST_OUTLIERS, head_size]``: factors of the zero point, 1 and the outliers.
    """

    up: torch.Tensor
    unit: torch.Tensor
    rows: torch.Tensor


def key_arrays(chunks: list[Chunk], channels: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None) -> KeyArrays:
    """Arrange the up-projection of keys.

    Args:
        chunks: of every kv head.
        channels: see :class:`LatentArrays`.
        up: ``[num_kv_heads, width, head_size]``, FP32, columns in halves.
        bias: ``[num_kv_heads, head_size]``, likewise, or None.
    """
    heads, _, columns = up.shape
    rows = up.new_zeros(heads, 2 + MOST_OUTLIERS, columns)
    scaled = up.new_zeros(heads, columns, columns)
    units = []
    for head, chunk in enumerate(chunks):
        of_head = up[head, chunk.first_row : chunk.first_row + chunk.addresses.shape[1]]
        outliers, allocated = chunk.fields["num_outliers"], chunk.fields["kind"] == ALLOCATED
        rows[head, 2 : 2 + outliers] = of_head[:outliers]
        stored = of_head.clone()
        stored[:outliers] = 0
        if allocated:
            stored *= 2 * chunk.factor.to(up.device).unsqueeze(1)
        largest = float(stored.abs().max())
        factor = 2.0 ** (14 - math.ceil(math.log2(largest))) if largest > 0 else 1.0
        units.append(2.0**24 / factor)
        # All sums are over the same rounded numbers, so that codes and zero points that cancel do so exactly.
        rounded = (stored * factor).to(torch.float16).float()
        there = channels[head][channels[head] >= 0].to(up.device)
        scaled[head, : there.numel()] = rounded[there]
        weights = chunk.addresses[_LEVELS].to(up.device).float() / -2 if allocated else up.new_ones(rounded.shape[0])
        rows[head, 0] = (weights.double() @ rounded.double() / factor).float()
    if bias is not None:
        rows[:, 1] = bias
    return KeyArrays(up_fragments(scaled.to(torch.float16)).contiguous(), up.new_tensor(units), rows)


@dataclass(frozen=True)
class RopeArrays:
    """Cosines and sines in two steps: of every 64th position, and of the positions between.

    Attributes:
        base: FP32 ``[positions / 64, half, 2]``.
        offset: FP16 ``[64, half, 2]``.
    """

    base: torch.Tensor
    offset: torch.Tensor


_rope_arrays: dict[tuple[int, int], RopeArrays | None] = {}


def rope_arrays(table: RotaryTable, half: int) -> RopeArrays | None:
    """Cut a table up; None where angles are not proportional to positions. Layers share it.

    Args:
        table: the table.
        half: pairs of a head; those beyond the table's do not rotate.
    """
    at = (id(table), half)
    if at not in _rope_arrays:
        _rope_arrays[at] = _cut_table(table, half)
        weakref.finalize(table, _rope_arrays.pop, at, None)
    return _rope_arrays[at]


def _cut_table(table: RotaryTable, half: int) -> RopeArrays | None:
    positions = table.cos.shape[0]
    angles = torch.complex(table.cos, table.sin)
    padded = F.pad(torch.view_as_real(angles), (0, 0, 0, 0, 0, -positions % TOKENS))
    tiles = torch.view_as_complex(padded).unflatten(0, (-1, TOKENS))
    # A factor on all cosines and sines (YaRN) is kept by the base.
    offset = tiles[0] * tiles[0, :1].conj() / tiles[0, :1].abs().square()
    rounded = torch.view_as_real(offset).to(torch.float16)
    if positions < TOKENS:
        rounded[positions:] = 0
    base = tiles[:, 0].contiguous()
    for begin in range(0, base.shape[0], 256):
        product = (base[begin : begin + 256].unsqueeze(1) * offset).flatten(0, 1)
        expected = angles[begin * TOKENS : (begin + 256) * TOKENS]
        missed = (product[: expected.shape[0]] - expected).abs()
        if bool((missed > _ROPE_TOLERANCE * expected.abs().amax(-1, keepdim=True)).any()):
            return None
    return RopeArrays(_passing(torch.view_as_real(base), half), _passing(rounded, half))


def _passing(x: torch.Tensor, half: int) -> torch.Tensor:
    """``[..., pairs, 2]`` filled up with pairs that do not rotate."""
    still = x.new_tensor([1.0, 0.0]).expand(*x.shape[:-2], half - x.shape[-2], 2)
    return torch.cat((x, still), -2).contiguous()
