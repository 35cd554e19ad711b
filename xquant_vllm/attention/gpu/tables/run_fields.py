"""Rows of runs of several bits as the decode kernel for latents per head reads them: as fields of one width.

A row is read as if all of its codes had as few bits as its narrowest plane (packing.py), but at least two: 2, 4 or 8. A
code of more bits, or of two planes, is several such *fields*. Keys are linear in their codes and codes in their fields,
so each field meets the channel's row of the up-projection, times what its bits count: formats differ in a matrix alone.

A plane of single bits (of codes of 3) has two channels' bits in a field of two::

    field = low + 2 high        low A_1 + high A_2  =  field A_1  +  high (A_2 - 2 A_1)

So what is written is the first channel's row, and the upper bits of that plane are read a second time, through a window
of their own, with all other bits masked out.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
import triton

from xquant_vllm.attention.gpu.tables.code_bytes import code_bytes
from xquant_vllm.codec.allocated import AllocatedFormat, channel_tables
from xquant_vllm.codec.allocation import Runs, run_bytes
from xquant_vllm.codec.layout import StreamFormat
from xquant_vllm.codec.packing import PLANES

# What stands in the last four bytes behind a row of keys, in place of what is there: fields of the number 3 in the last
# two. They meet what takes the middle off all codes.
CONSTANT, CONSTANT_BYTES, CONSTANT_NUMBER = 0x03030000, 4, 3
# Fields of a part of a row at least, as sums over values are 64 rows of a product; and at most, where three parts
# suffice, as so many are unpacked at once, into registers and shared memory. Rows of runs are loaded in fewer parts,
# as each part of a row that is not aligned is loaded twice.
_LEAST_FIELDS, _MOST_FIELDS, _MOST_FIELDS_OF_RUNS = 64, 64, 128
# Units of a window of single bits at least: 32 rows of a product of keys, and 64 of sums over values.
_KEY_ONES, _VALUE_ONES = 4, 8
# The upper bit of a code of 3 bits counts 4; the one beside it, which counts as much, is taken from it.
MOST_OF_THREE_BITS = 8
# Fields of a value that ``merge`` takes at once.
_MERGED = 64


@dataclass(frozen=True)
class FieldRows:
    """What the fields of one head meet; places count: a field at bit ``n`` of its byte is ``2 ** n`` times its number.

    Attributes:
        fields: ``[pieces, units, columns]``, see tables/head_tables.py.
        ones: ``[8, ones, columns]``: the same of the window, as pieces of two bits.
        middle: ``[columns]``: what codes in the middle of their range make.
    """

    fields: torch.Tensor
    ones: torch.Tensor
    middle: torch.Tensor


@dataclass(frozen=True)
class FieldFormat:
    """How all heads of an allocated stream are read.

    Attributes:
        bits: of a field: 2, 4 or 8.
        parts: units of two bytes of a row. Its parts are read and multiplied one after another: powers of two, of which
            later ones may be 0.
        ones: units of the window of single bits, a power of two; 0: there are none.
    """

    bits: int
    parts: tuple[int, int, int]
    ones: int

    @property
    def pieces(self) -> int:
        """Fields of a unit."""
        return 16 // self.bits

    @property
    def number(self) -> int:
        """Fields of a row, those of the window included."""
        return self.pieces * sum(self.parts) + 8 * self.ones

    def in_order(self, rows: FieldRows) -> torch.Tensor:
        """What fields meet in the order in which they are read, ``[number, columns]``."""
        parts = *rows.fields.split(self.parts, 1), rows.ones
        return torch.cat([part.flatten(0, 1) for part in parts])


@dataclass(frozen=True)
class MergedFields:
    """What sums over fields of values are multiplied by when splits are merged.

    Attributes:
        first_band: int32 ``[num_kv_heads + 1]``: the heads.
        up: ``[num_kv_heads, parts * width, columns]``, in the dtype of the products.
        up_sum: FP32 ``[num_kv_heads, columns]``: what sums of weighed scales, or zero points, are multiplied by.
        parts: that fields are cut into.
        width: fields of a part, a power of two.
        are_codes: whether products are numbers ``n`` of tables/latent_tables.py, whose factors follow; else values.
    """

    first_band: torch.Tensor
    up: torch.Tensor
    up_sum: torch.Tensor
    parts: int
    width: int
    are_codes: bool


def key_format(stream: AllocatedFormat) -> FieldFormat:
    """How a stream of keys is read, the constant behind its rows included."""
    return _format(stream, CONSTANT_BYTES, _KEY_ONES, _MOST_FIELDS_OF_RUNS)


def value_format(stream: AllocatedFormat) -> FieldFormat:
    """How a stream of values is read."""
    return _format(stream, 0, _VALUE_ONES, _MOST_FIELDS_OF_RUNS)


def _format(stream: AllocatedFormat, more_bytes: int, least_ones: int, most_fields: int) -> FieldFormat:
    planes = [plane for runs in stream.runs for bits, _ in runs for plane in PLANES[bits]]
    longest = max(map(run_bytes, stream.runs)) + more_bytes
    window = max(window_of_ones(runs)[1] for runs in stream.runs)
    bits = max(2, min(planes))
    parts = _parts(-(-longest // 2), 16 // bits, most_fields)
    ones = max(least_ones, triton.next_power_of_2(-(-window // 2))) if window else 0
    return FieldFormat(bits, parts, ones)


def _parts(units: int, pieces: int, most_fields: int) -> tuple[int, int, int]:
    """So many units, or a few more, as three powers of two, of which later ones may be 0."""
    most, least = most_fields // pieces, _LEAST_FIELDS // pieces
    while 3 * most < units:
        most *= 2
    sizes = [0, *(1 << bit for bit in range(most.bit_length()))]
    fitting = [
        (first, second, third)
        for first, second, third in product(sizes, repeat=3)
        if first >= max(least, second)
        and second >= third
        and (not second or min(of for of in (first, second, third) if of) >= least)
        and first + second + third >= units
    ]
    return min(fitting, key=lambda parts: (sum(parts), sum(map(bool, parts))))


def window_of_ones(runs: Runs) -> tuple[int, int]:
    """Where a row has its plane of single bits: its first byte, and how many; both 0 if it has none."""
    first = 0
    for bits, channels in runs:
        if 1 in PLANES[bits]:
            return first + channels // 4, channels // 8
        first += bits * channels // 8
    return 0, 0


def format_of_three_bits(channels: int, *, keys: bool) -> FieldFormat:
    """How a uniform stream of 3 bits is read, whose rows have nothing behind them."""
    rows = AllocatedFormat(channels, (((3, channels),),))
    return _format(rows, 0, _KEY_ONES if keys else _VALUE_ONES, _MOST_FIELDS)


def fields_of_three_bits(lead: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """What fields of keys of 3 bits meet.

    Args:
        lead: ``[num_kv_heads, 0 or 1, columns]``: what the two lower bits of the outlier channel meet, which pages have
            as 0; so its upper one is.
        stored: ``[num_kv_heads, channels, columns]``: what the other channels meet, times ``MOST_OF_THREE_BITS`` in the
            range of FP16.

    Returns:
        ``[num_kv_heads, number, columns]``.
    """
    channels = lead.shape[1] + stored.shape[1]
    form, found = format_of_three_bits(channels, keys=True), []
    for head, rows in enumerate(torch.cat((torch.zeros_like(lead), stored), 1)):
        made = field_rows(((3, channels),), rows, form, torch.float16)
        if lead.shape[1]:
            made.fields[0, 0] = lead[head, 0]
        found.append(form.in_order(made))
    return torch.stack(found)


def field_rows(runs: Runs, rows: torch.Tensor, form: FieldFormat, dtype: torch.dtype) -> FieldRows:
    """Spread what channels meet over the fields of their codes.

    Args:
        runs: of the head.
        rows: ``[channels, columns]`` FP32: what a channel's code is multiplied by.
        form: how the stream is read.
        dtype: what fields' rows are rounded to.
    """
    channel, stride, bits, shift = code_bytes(runs).long().to(rows.device)
    columns = rows.shape[1]
    fields = rows.new_zeros(8 // form.bits, 2 * sum(form.parts), columns)
    middle = rows.new_zeros(columns)
    for place in range(fields.shape[0]):
        code = form.bits * place // bits
        of_code = torch.exp2((shift - code * bits).float())[:, None]
        met = (rows[channel + code * stride] * of_code).to(dtype).float()
        fields[place, : met.shape[0]] = met
        middle += met.sum(0) * ((1 << form.bits) - 1) * 2.0 ** (form.bits * place - 1)
    ones = rows.new_zeros(4, 2 * form.ones, columns)
    first, count = window_of_ones(runs)
    for place in range(4 if count else 0):
        of_bytes = slice(first, first + count)
        upper = 2.0 ** (2 * place + 1)
        of_code = torch.exp2(shift[of_bytes].float())[:, None] / upper
        wanted = rows[channel[of_bytes] + (2 * place + 1) * stride[of_bytes]] * of_code
        met = (wanted - fields[place, of_bytes]).to(dtype).float()
        ones[place, :count] = met
        middle += met.sum(0) * upper / 2
    return FieldRows(_by_units(fields), _by_units(ones), middle)


def _by_units(fields: torch.Tensor) -> torch.Tensor:
    """``[places, bytes, columns]`` as ``[pieces, units, columns]``."""
    return fields.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1)


def run_table(stream: AllocatedFormat, codes: int, scales: int, block_size: int) -> torch.Tensor:
    """Where a head's numbers are in a page: int32 ``[heads, 5]``.

    Columns are the byte of the page where codes start, bytes of a token's codes, the byte where scales start, the byte
    of a row where the window of single bits starts, and its bytes.

    Args:
        stream: the stream.
        codes: byte of the page where the first head's codes start.
        scales: the same of scales.
        block_size: tokens of a page.
    """
    table, before = [], 0
    for head, runs in enumerate(stream.runs):
        table.append([codes + block_size * before, run_bytes(runs), scales + block_size * head, *window_of_ones(runs)])
        before += run_bytes(runs)
    return torch.tensor(table, dtype=torch.int32)


def key_fields(stream: AllocatedFormat, up: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What the fields of keys are multiplied by.

    Args:
        stream: of the keys.
        up: ``[num_kv_heads, width, columns]`` FP32: the up-projection.
        largest: number of the result.

    Returns:
        FP16 ``[num_kv_heads, number, columns]``, and what it counts, FP32 ``[num_kv_heads]``.
    """
    form, found, counted = key_format(stream), [], []
    for head, runs in enumerate(stream.runs):
        rows = _stepped(runs, up[head])
        exact = field_rows(runs, rows, form, torch.float32)
        most = max(float(part.abs().max()) for part in (exact.fields, exact.middle / CONSTANT_NUMBER, rows))
        if form.ones:
            most = max(most, float(exact.ones.abs().max()))
        unit = 2.0 ** math.floor(math.log2(largest / max(most, 1e-30)))
        made = field_rows(runs, rows * unit, form, torch.float16)
        # In two parts, so that nothing is lost: the middle is larger than what it is taken from.
        taken = -made.middle / CONSTANT_NUMBER
        made.fields[0, -1] = taken.half().float()
        made.fields[1, -1] = taken - made.fields[0, -1]
        found.append(form.in_order(made).half())
        counted.append(1 / unit)
    return torch.stack(found).contiguous(), torch.tensor(counted, device=up.device)


def merged_fields(
    stream: AllocatedFormat | StreamFormat,
    up: torch.Tensor | None,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
) -> MergedFields:
    """What sums over fields of values are multiplied by.

    Args:
        stream: of the values, allocated or of 3 bits.
        up: ``[num_kv_heads, width, columns]`` FP32: the up-projection; None: latents are the values.
        columns: of the result.
        dtype: of the products' operands.
        device: of the result.
    """
    found, sums = [], []
    if isinstance(stream, AllocatedFormat):
        form, runs_of_heads = value_format(stream), stream.runs
    else:
        form, runs_of_heads = format_of_three_bits(stream.width, keys=False), (((3, stream.width),),) * stream.num_heads
    for head, runs in enumerate(runs_of_heads):
        # Powers of two are exact in any dtype. Numbers n of runs are twice the codes less their middles.
        if up is None:
            rows = torch.eye(stored(runs), columns, device=device) * (2 if isinstance(stream, AllocatedFormat) else 1)
        else:
            rows = _stepped(runs, up[head]) if isinstance(stream, AllocatedFormat) else up[head]
        made = field_rows(runs, rows, form, dtype)
        found.append(form.in_order(made))
        # Of runs sums of weighed scales follow, else of weighed zero points.
        sums.append(-made.middle if isinstance(stream, AllocatedFormat) else rows.to(dtype).float().sum(0))
    width = min(_MERGED, form.pieces * form.parts[0])
    return MergedFields(
        first_band=torch.arange(len(found) + 1, dtype=torch.int32, device=device),
        up=torch.stack(found).to(dtype).contiguous(),
        up_sum=torch.stack(sums).contiguous(),
        parts=form.number // width,
        width=width,
        are_codes=up is None,
    )


def stored(runs: Runs) -> int:
    """Channels that a head stores."""
    return sum(channels for _, channels in runs)


def _stepped(runs: Runs, up: torch.Tensor) -> torch.Tensor:
    """Rows of stored channels, times the steps of their codes."""
    step, _, _ = channel_tables(runs)
    return up[: step.numel()] * step.to(up).unsqueeze(1)
