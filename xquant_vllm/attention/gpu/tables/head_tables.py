"""What the decode kernel for latents per head reads of a layer, and which layers it takes; see decode/attend_heads.py.

Codes are read as *units* of two bytes. Of 4 bits a unit holds four codes; codes at the same place of their units are a
*piece*. A code is not shifted to the low end of its byte: there it would count 1, and counts ``2 ** (bits * n)`` at its
place, so the rows of the up-projection that it meets are divided by that. Of a row of ``r`` bytes::

    piece           2 n        2 n + 1
    of unit u       byte 2 u   byte 2 u + 1         bits  bits * n ... bits * n + bits - 1
    is channel      n r + 2 u  n r + 2 u + 1

Left in 16 bits, such a number is a subnormal FP16 number, ``code * 2 ** (bits * n - 24)``, and needs no conversion.

Codes of 3 bits, and channels with bits of their own, are read as fields of one width, see tables/run_fields.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton

from xquant_vllm.attention.gpu.limits import shared_memory, tensor_memory
from xquant_vllm.attention.gpu.tables.pairs import arranged, pair_columns
from xquant_vllm.attention.gpu.tables.run_fields import (
    MOST_OF_THREE_BITS,
    FieldFormat,
    fields_of_three_bits,
    format_of_three_bits,
    key_fields,
    key_format,
    run_table,
    value_format,
)
from xquant_vllm.attention.gpu.tables.tile_rotation import TILE, RopeArrays, rope_arrays
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import Stream, StreamFormat

BITS = (8, 4, 3, 2)
# Channels of a latent, and of a head: more do not fit the registers beside their up-projection's products.
MOST_CHANNELS = 128
# Query heads of a kv head: the scores of more do not, either.
MOST_GROUP = 16
# Rows of a tile of queries: more do not fit the registers.
MOST_ROWS = 32
# The same where sums are over fields of values, of which there are up to four times as many as channels.
MOST_ROWS_OF_FIELDS = 16
# What is called a large shared memory: that of 8.0, 9.0 and 10.0.
_LARGE_SHARED_MEMORY = 160000
# Columns of a tile in FP16, for layouts that are changed on the way to tensor memory.
_MORE_OF_TENSOR_MEMORY = 64
# Of FP16, with room to round up.
_LARGEST = 30000.0
_SUBNORMAL = 2.0**24
PARAMETER_ROWS = 16
"""Rows behind those of codes, as many as a product takes at least: what zero points meet, twice, and outliers."""
PARAMETER_SCALE = 2.0**10
"""What parameters count, of which a token's scale has been divided off: FP16 has room for as many scales."""
_PARAMETER_UNIT = PARAMETER_SCALE / _SUBNORMAL


@dataclass(frozen=True)
class HeadStream:
    """A stream as the kernel is compiled for it.

    Attributes:
        bits: of a code, or of a field.
        units: of two bytes of a token's codes, a power of two of at least 16; those of the first of several parts.
        row_bytes: bytes of a token's codes. These and the next ones are 0 where every head has its own.
        codes: byte of a page where the codes start; then ``scales``, ``zeros`` and ``outliers``.
        num_outliers: outlier channels.
        ones: units of a window of single bits, see :class:`FieldFormat`.
        window: byte of a row where that starts.
        second: units of the second part, see :class:`FieldFormat`; 0: there is none.
        third: units of the third.
    """

    bits: int
    units: int
    row_bytes: int
    codes: int
    scales: int
    zeros: int
    outliers: int
    num_outliers: int
    ones: int = 0
    window: int = 0
    second: int = 0
    third: int = 0

    @property
    def pieces(self) -> int:
        """Codes of a unit."""
        return 16 // self.bits

    @property
    def rows(self) -> int:
        """Of what is multiplied by codes, or by fields."""
        return self.pieces * sum(self.parts) + 8 * self.ones

    @property
    def parts(self) -> tuple[int, int, int]:
        """Units of all parts."""
        return self.units, self.second, self.third


@dataclass(frozen=True)
class HeadTables:
    """Tensors on the device, and what the kernel is compiled for.

    Attributes:
        key: the stream of keys.
        value: the stream of values.
        middle: what is taken off the codes of keys, so that what products round is small: the middle of their range.
            The code of the outlier channel, which is 0, is set to it, and the up-projection's row is minus the sum of
            all others. 0 where there is no outlier channel.
        up: FP16 ``[num_kv_heads, rows, 2 * half]``: ``key.rows`` of the key's up-projection by pieces; behind them,
            but not of runs, ``PARAMETER_ROWS``.
        bias: FP16 ``[num_kv_heads, 0 or 1, TILE, 2 * half]``: the key's bias, turned by every distance within a tile.
        norm: FP16 ``[num_kv_heads, 2 * half]``: weights of the key's norm, the largest of a head about 1; or anything.
        factors: FP32 ``[num_kv_heads, 1 or 2]``: what products of codes count, and those of the bias, or the norm's
            weights.
        turns: FP16 ``[2, TILE, half]``: cosines and sines of every distance within a tile.
        rope: angles of tiles, and of distances once more.
        ahead: see :func:`tiles_ahead`.
        key_runs: int32 ``[num_kv_heads, 5]``, see :func:`run_table`; None where all channels have the same bits.
        value_runs: the same of values.
    """

    key: HeadStream
    value: HeadStream
    middle: int
    up: torch.Tensor
    bias: torch.Tensor
    norm: torch.Tensor
    factors: torch.Tensor
    turns: torch.Tensor
    rope: RopeArrays
    ahead: int
    key_runs: torch.Tensor | None = None
    value_runs: torch.Tensor | None = None


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
    if projection.key_norm is not None and projection.key_bias is not None:
        return "keys have a norm behind a bias"
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
    if len({isinstance(stream, AllocatedFormat) for stream in plan.layout.streams}) > 1:
        return "channels have bits of their own in keys or in values alone"
    columns = pair_columns(projection.head_size, projection.rope).numel()
    if rope_arrays(projection.rope, columns // 2) is None:
        return "angles of RoPE are not proportional to positions"
    needed, limit = _shared_bytes(plan, columns), shared_memory(plan.device)
    if needed > limit:
        return f"it needs {needed} bytes of shared memory, more than the {limit} of this GPU"
    return None


def tiles_ahead(plan: AttentionLayerPlan) -> int:
    """How many tiles ahead codes are on their way from memory.

    One where shared memory is small (8.6 and 8.9), and for rows of fields, whose tiles take longer than memory does:
    two programs fit a multiprocessor so.
    """
    fields = any(isinstance(stream, AllocatedFormat) or stream.bits == 3 for stream in plan.layout.streams)
    return 1 if fields or shared_memory(plan.device) < _LARGE_SHARED_MEMORY else 2


def _shared_bytes(plan: AttentionLayerPlan, columns: int) -> int:
    """What the kernel takes at most; counted from what it compiles to for 9.0 and 10.0."""
    key, value = _streams(plan)
    runs = isinstance(plan.layout.streams[0], AllocatedFormat)
    rows = key.rows + (0 if runs else PARAMETER_ROWS) + TILE * (plan.projection.key_bias is not None)
    queries = MOST_ROWS_OF_FIELDS if runs or value.ones else MOST_ROWS
    of_values = [*(part * value.pieces for part in value.parts), 8 * value.ones]
    if tensor_memory():
        codes = sum(of_values) + _MORE_OF_TENSOR_MEMORY
    else:
        codes = max(*of_values, *(part * key.pieces for part in key.parts))
    # Rows that are not aligned are read twice.
    loaded = (2 if runs else 1) * 2 * sum(sum(of.parts) + of.ones for of in (key, value))
    return 2 * columns * (rows + queries) + TILE * (2 * codes + tiles_ahead(plan) * loaded) + 1024


def _stream_refusal(stream: Stream, what: str, num_kv_heads: int) -> str | None:
    if stream.num_heads != num_kv_heads:
        return f"{what} share a latent"
    if stream.width > MOST_CHANNELS:
        return f"latents of {what} have {stream.width} channels, more than {MOST_CHANNELS}"
    if isinstance(stream, AllocatedFormat):
        return None
    if stream.bits not in BITS:
        return f"codes of {what} have {stream.bits} bits, not {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}"
    if stream.row_bytes % 2:
        return f"rows of {what} have {stream.row_bytes} bytes, which are no units of two"
    if stream.num_groups != 1:
        return f"{what} have {stream.num_groups} scales per head"
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
    key, value = _streams(plan)
    rope = rope_arrays(projection.rope, columns.numel() // 2)
    assert rope is not None
    up = arranged(projection.up_key.to(device), columns)
    bias = None if projection.key_bias is None else arranged(projection.key_bias.to(device), columns)[:, None]
    turned, of_more = _turned(up.new_zeros(len(up), 0, up.shape[2]) if bias is None else bias, rope)
    norm = up.new_zeros(1)
    if projection.key_norm is not None:
        norm = arranged(projection.key_norm.weights(projection.num_kv_heads).to(device), columns)
        of_more = _rounded_up(norm)[:, None]
        norm = norm / of_more
    runs = isinstance(plan.layout.streams[plan.key_terms[0].stream], AllocatedFormat)
    of_codes, counted = key_fields(_allocated(plan, plan.key_terms), up, _LARGEST) if runs else _uniform_rows(up, key)
    return HeadTables(
        key=key,
        value=value,
        middle=0 if runs else _middle(key),
        up=of_codes,
        bias=turned.half().contiguous(),
        norm=norm.half().contiguous(),
        factors=torch.cat((_SUBNORMAL * counted[:, None], of_more), 1).contiguous(),
        turns=rope.offset.permute(2, 0, 1).to(device).contiguous(),
        rope=rope,
        ahead=tiles_ahead(plan),
        key_runs=_run_table(plan, plan.key_terms) if runs else None,
        value_runs=_run_table(plan, plan.value_terms) if runs else None,
    )


def _uniform_rows(up: torch.Tensor, key: HeadStream) -> tuple[torch.Tensor, torch.Tensor]:
    """What codes of one width and their parameters are multiplied by.

    Args:
        up: ``[num_kv_heads, width, columns]`` FP32: the up-projection.
        key: the stream.

    Returns:
        FP16 ``[num_kv_heads, key.rows + PARAMETER_ROWS, columns]``, and what it counts, FP32 ``[num_kv_heads]``.
    """
    outliers, stored = up[:, : key.num_outliers], up[:, key.num_outliers :]
    # What is added to rows of codes is the sum of the rounded rows: codes and zero points that cancel do so exactly.
    met = torch.cat((up, stored.sum(1, keepdim=True)), 1)
    unit = _LARGEST / met.abs().amax((1, 2)).clamp_min(1e-30)
    if key.ones:
        unit /= MOST_OF_THREE_BITS
    unit = torch.exp2(unit.log2().floor())[:, None, None]
    rounded = (stored * unit).half().float()
    total = rounded.sum(1, keepdim=True).half().float()
    lead = -total.expand(-1, key.num_outliers, -1)
    of_codes = fields_of_three_bits(lead, rounded) if key.ones else _pieces(torch.cat((lead, rounded), 1), key)
    more = _PARAMETER_UNIT * parameter_rows(total, outliers * unit)
    return torch.cat((of_codes, more), 1).half().contiguous(), 1 / unit[:, 0, 0]


def parameter_rows(total: torch.Tensor, outliers: torch.Tensor) -> torch.Tensor:
    """What parameters of keys meet, in the order in which the kernel has them, ``[num_kv_heads, 16, columns]``.

    Args:
        total: ``[num_kv_heads, 1, columns]``: what zero points meet, which are two numbers.
        outliers: ``[num_kv_heads, 0 or 1, columns]``.
    """
    rows = total.new_zeros(len(total), PARAMETER_ROWS, total.shape[2])
    rows[:, 0::8] = total
    rows[:, 4 : 4 + outliers.shape[1]] = outliers
    return rows


def _middle(key: HeadStream) -> int:
    if not key.num_outliers:
        return 0
    # Of 3 bits the outlier channel's code has two, as the first plane has.
    return 3 if key.ones else 1 << (key.bits - 1)


def _allocated(plan: AttentionLayerPlan, terms: Sequence[LatentTerm]) -> AllocatedFormat:
    stream = plan.layout.streams[terms[0].stream]
    assert isinstance(stream, AllocatedFormat)
    return stream


def _run_table(plan: AttentionLayerPlan, terms: Sequence[LatentTerm]) -> torch.Tensor:
    at = plan.layout.offsets[terms[0].stream]
    return run_table(_allocated(plan, terms), at.codes, at.scales, plan.layout.block_size).to(plan.device)


def _streams(plan: AttentionLayerPlan) -> tuple[HeadStream, HeadStream]:
    """Of keys and of values."""
    key, value = (plan.layout.streams[terms[0].stream] for terms in (plan.key_terms, plan.value_terms))
    if isinstance(key, AllocatedFormat) and isinstance(value, AllocatedFormat):
        return _of_fields(key_format(key)), _of_fields(value_format(value))
    return _stream(plan, plan.key_terms[0].stream), _stream(plan, plan.value_terms[0].stream)


def _of_fields(form: FieldFormat) -> HeadStream:
    first, second, third = form.parts
    return HeadStream(form.bits, first, 0, 0, 0, 0, 0, 0, form.ones, second=second, third=third)


def _stream(plan: AttentionLayerPlan, index: int) -> HeadStream:
    stream, at = plan.layout.streams[index], plan.layout.offsets[index]
    assert isinstance(stream, StreamFormat)
    bits, units, more = stream.bits, max(16, triton.next_power_of_2(stream.row_bytes // 2)), dict[str, int]()
    if bits == 3:
        form = format_of_three_bits(stream.width, keys=index == plan.key_terms[0].stream)
        bits, (units, second, third) = form.bits, form.parts
        more = {"ones": form.ones, "window": stream.width // 4, "second": second, "third": third}
    return HeadStream(
        bits=bits,
        units=units,
        row_bytes=stream.row_bytes,
        codes=at.codes,
        scales=at.scales,
        zeros=at.zeros,
        outliers=at.outliers,
        num_outliers=stream.outlier_channels,
        **more,
    )


def _pieces(up: torch.Tensor, stream: HeadStream) -> torch.Tensor:
    """``[heads, channels, columns]`` as ``[heads, pieces * units, columns]``, divided by what places count."""
    of_bytes = up.unflatten(1, (-1, stream.row_bytes))
    places = torch.exp2(-stream.bits * torch.arange(of_bytes.shape[1], device=up.device, dtype=torch.float32))
    of_units = (of_bytes * places[:, None, None]).unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2)
    return F.pad(of_units, (0, 0, 0, stream.units - of_units.shape[2])).flatten(1, 2)


def _turned(rows: torch.Tensor, rope: RopeArrays) -> tuple[torch.Tensor, torch.Tensor]:
    """``[heads, rows, 2 * half]`` turned by every distance, at most about 1, and what they count ``[heads, rows]``."""
    factors = _rounded_up(rows)
    low, high = (rows / factors[:, :, None]).unsqueeze(2).chunk(2, 3)
    cos, sin = rope.offset.float().to(rows.device).unbind(2)
    assert cos.shape[0] == TILE
    return torch.cat((low * cos - high * sin, high * cos + low * sin), 3), factors


def _rounded_up(numbers: torch.Tensor) -> torch.Tensor:
    """The powers of two that are no less than any of the last dimension."""
    return torch.exp2(numbers.abs().amax(-1).clamp_min(1e-30).log2().ceil())
