"""What the decode kernel for latents per head reads of a layer, and which layers it takes; see decode/attend_heads.py.

Codes are read as *units* of two bytes. Of 4 bits a unit holds four codes; codes at the same place of their units are a
*piece*. A code is not shifted to the low end of its byte: there it would count 1, and counts ``2 ** (bits * n)`` at its
place, so the rows of the up-projection that it meets are divided by that. Of a row of ``r`` bytes::

    piece           2 n        2 n + 1
    of unit u       byte 2 u   byte 2 u + 1         bits  bits * n ... bits * n + bits - 1
    is channel      n r + 2 u  n r + 2 u + 1

Left in 16 bits, such a number is a subnormal FP16 number, ``code * 2 ** (bits * n - 24)``, and needs no conversion.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton

from xquant_vllm.attention.gpu.limits import shared_memory
from xquant_vllm.attention.gpu.tables.pairs import arranged, pair_columns
from xquant_vllm.attention.gpu.tables.tile_rotation import TILE, RopeArrays, rope_arrays
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.layout import Stream, StreamFormat

# Bits whose codes lie in one plane of their bytes.
BITS = (8, 4, 2)
# Channels of a latent, and of a head: more do not fit the registers beside their up-projection's products.
MOST_CHANNELS = 128
# Query heads of a kv head: the scores of more do not, either.
MOST_GROUP = 16
# Rows of a tile of queries: more do not fit the registers.
MOST_ROWS = 32
# Of FP16, with room to round up.
_LARGEST = 30000.0
_SUBNORMAL = 2.0**24


@dataclass(frozen=True)
class HeadStream:
    """A stream as the kernel is compiled for it.

    Attributes:
        bits: of a code.
        units: of two bytes of a token's codes, a power of two of at least 16.
        row_bytes: bytes of a token's codes.
        codes: byte of a page where the codes start; then ``scales``, ``zeros`` and ``outliers``.
        num_outliers: outlier channels.
    """

    bits: int
    units: int
    row_bytes: int
    codes: int
    scales: int
    zeros: int
    outliers: int
    num_outliers: int

    @property
    def pieces(self) -> int:
        """Codes of a unit."""
        return 16 // self.bits


@dataclass(frozen=True)
class HeadTables:
    """Tensors on the device, and what the kernel is compiled for.

    Attributes:
        key: the stream of keys.
        value: the stream of values.
        middle: what is taken off the codes of keys, so that what products round is small: the middle of their range.
            The code of the outlier channel, which is 0, is set to it, and the up-projection's row is minus the sum of
            all others. 0 where there is no outlier channel.
        up: FP16 ``[num_kv_heads, pieces, units, 2 * half]``: rows of the key's up-projection by pieces.
        rows: FP16 ``[num_kv_heads, num_rows, TILE, 2 * half]``, turned by every distance within a tile: what zero
            points multiply, then outliers, then the bias.
        factors: FP32 ``[num_kv_heads, 1 + num_rows]``: what products of codes count, and the rows.
        turns: FP16 ``[2, TILE, half]``: cosines and sines of every distance within a tile.
        rope: angles of tiles, and of distances once more.
    """

    key: HeadStream
    value: HeadStream
    middle: int
    up: torch.Tensor
    rows: torch.Tensor
    factors: torch.Tensor
    turns: torch.Tensor
    rope: RopeArrays


def refusal(plan: AttentionLayerPlan, dtype: torch.dtype) -> str | None:
    """Why a layer is left to the general decode kernel; None: it need not be.

    Args:
        plan: the layer's plan.
        dtype: of the products' operands, as queries have it.
    """
    projection = plan.projection
    if dtype == torch.float32:
        return "queries are FP32, and its products are of FP16 numbers"
    if projection.rope is None or not projection.rope.rotary_size:
        return "keys have no RoPE: queries are absorbed instead"
    if projection.key_norm is not None:
        return "keys have a norm, for which every key has to be known"
    if len(plan.layouts) != 1 or len(plan.key_terms) != 1 or len(plan.value_terms) != 1:
        return "latents are read from pages of several layers"
    if plan.num_heads > MOST_GROUP * projection.num_kv_heads:
        return f"{plan.num_heads // projection.num_kv_heads} query heads share a kv head, more than {MOST_GROUP}"
    if projection.head_size > MOST_CHANNELS:
        return f"heads have {projection.head_size} channels, more than {MOST_CHANNELS}"
    streams = [(plan.key_terms[0].stream, "keys"), (plan.value_terms[0].stream, "values")]
    for index, what in streams:
        reason = _stream_refusal(plan.layout.streams[index], what, projection.num_kv_heads)
        if reason is not None:
            return reason
    columns = pair_columns(projection.head_size, projection.rope).numel()
    if rope_arrays(projection.rope, columns // 2) is None:
        return "angles of RoPE are not proportional to positions"
    needed, limit = _shared_bytes(plan, columns), shared_memory(plan.device)
    if needed > limit:
        return f"it needs {needed} bytes of shared memory, more than the {limit} of this GPU"
    return None


def _shared_bytes(plan: AttentionLayerPlan, columns: int) -> int:
    """What the kernel takes at least, with codes one tile ahead; counted from what it compiles to for 9.0."""
    key, value = (_stream(plan, terms[0].stream) for terms in (plan.key_terms, plan.value_terms))
    rows = 1 + key.num_outliers + (plan.projection.key_bias is not None)
    stays = 2 * columns * (key.units * key.pieces + rows * TILE + MOST_ROWS)
    codes = max(of.units * of.pieces for of in (key, value))
    return stays + TILE * (2 * codes + 2 * key.units + 2 * value.units) + 1024


def _stream_refusal(stream: Stream, what: str, num_kv_heads: int) -> str | None:
    if not isinstance(stream, StreamFormat):
        return f"channels of {what} have different bits"
    if stream.num_heads != num_kv_heads:
        return f"{what} share a latent"
    if stream.bits not in BITS:
        return f"codes of {what} have {stream.bits} bits, not {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}"
    if stream.num_groups != 1:
        return f"{what} have {stream.num_groups} scales per head"
    if stream.width > MOST_CHANNELS:
        return f"latents of {what} have {stream.width} channels, more than {MOST_CHANNELS}"
    most = 1 if what == "keys" else 0
    if stream.outlier_channels > most:
        return f"{what} have {stream.outlier_channels} outlier channels, more than {most}"
    return None


def head_tables(plan: AttentionLayerPlan, columns: torch.Tensor) -> HeadTables:
    """Arrange a layer that :func:`refusal` does not refuse.

    Args:
        plan: the layer's plan.
        columns: ``[2 * half]``: channels of keys in the kernels' order.
    """
    projection, device = plan.projection, plan.device
    assert projection.rope is not None
    key, value = (_stream(plan, terms[0].stream) for terms in (plan.key_terms, plan.value_terms))
    rope = rope_arrays(projection.rope, columns.numel() // 2)
    assert rope is not None
    up = arranged(projection.up_key.to(device), columns)
    middle = 1 << (key.bits - 1) if key.num_outliers else 0
    outliers, stored = up[:, : key.num_outliers], up[:, key.num_outliers :]
    # What is added to rows of codes is the sum of the rounded rows: codes and zero points that cancel do so exactly.
    unit = _LARGEST / torch.maximum(stored.abs().amax((1, 2)), stored.sum(1).abs().amax(1)).clamp_min(1e-30)
    unit = torch.exp2(unit.log2().floor())[:, None, None]
    rounded = (stored * unit).half().float()
    total = rounded.sum(1, keepdim=True).half().float()
    lead = -total.expand(-1, key.num_outliers, -1)
    rows = [total / unit, outliers]
    if projection.key_bias is not None:
        rows.append(arranged(projection.key_bias.to(device), columns)[:, None])
    turned, of_rows = _turned(torch.cat(rows, 1), rope)
    return HeadTables(
        key=key,
        value=value,
        middle=middle,
        up=_pieces(torch.cat((lead, rounded), 1), key).half().contiguous(),
        rows=turned.half().contiguous(),
        factors=torch.cat((_SUBNORMAL / unit[:, :, 0], of_rows), 1).contiguous(),
        turns=rope.offset.permute(2, 0, 1).to(device).contiguous(),
        rope=rope,
    )


def _stream(plan: AttentionLayerPlan, index: int) -> HeadStream:
    stream, at = plan.layout.streams[index], plan.layout.offsets[index]
    assert isinstance(stream, StreamFormat)
    return HeadStream(
        bits=stream.bits,
        units=max(16, triton.next_power_of_2(stream.row_bytes // 2)),
        row_bytes=stream.row_bytes,
        codes=at.codes,
        scales=at.scales,
        zeros=at.zeros,
        outliers=at.outliers,
        num_outliers=stream.outlier_channels,
    )


def _pieces(up: torch.Tensor, stream: HeadStream) -> torch.Tensor:
    """``[heads, channels, columns]`` as ``[heads, pieces, units, columns]``, divided by what places count."""
    of_bytes = up.unflatten(1, (-1, stream.row_bytes))
    places = torch.exp2(-stream.bits * torch.arange(of_bytes.shape[1], device=up.device, dtype=torch.float32))
    of_units = (of_bytes * places[:, None, None]).unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2)
    return F.pad(of_units, (0, 0, 0, stream.units - of_units.shape[2]))


def _turned(rows: torch.Tensor, rope: RopeArrays) -> tuple[torch.Tensor, torch.Tensor]:
    """``[heads, rows, 2 * half]`` turned by every distance, at most about 1, and what they count ``[heads, rows]``."""
    factors = torch.exp2(rows.abs().amax(2).clamp_min(1e-30).log2().ceil())
    low, high = (rows / factors[:, :, None]).unsqueeze(2).chunk(2, 3)
    cos, sin = rope.offset.float().to(rows.device).unbind(2)
    assert cos.shape[0] == TILE
    return torch.cat((low * cos - high * sin, high * cos + low * sin), 3), factors
