"""A stream as the quantizing kernel writes it: its scale groups, and what their bytes hold."""

from dataclasses import dataclass

import torch
import triton

from xquant_vllm.attention.gpu.tables.code_bytes import ROWS, code_bytes
from xquant_vllm.attention.gpu.tables.latent_tables import ALLOCATED, FP16, UNIFORM, latent_bands
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.codec.allocated import AllocatedFormat, channel_tables
from xquant_vllm.codec.allocation import Runs
from xquant_vllm.codec.layout import PageLayout, Stream, StreamFormat

# Columns of the description of a scale group, the channels of a token that share one scale: its first channel within a
# token's row of all heads, its channels, codes of the page's first token, bytes from a token's codes to the next one's,
# scales, zeros, outliers, how many outlier channels lead the group, and which tables describe its bytes and channels.
# Offsets are bytes from the start of a page.
FIELDS = ("first", "channels", "codes", "row_bytes", "scales", "zeros", "outliers", "num_outliers", "table")
# Rows of a table of channels: the step, the largest code, and what an error is worth (codec/allocated.py).
CHANNEL_ROWS = ("step", "largest", "worth")


@dataclass(frozen=True)
class StreamTables:
    """Tensors that describe a stream of a layer's own pages, and what the kernel is compiled for.

    Attributes:
        scale_groups: ``[num_scale_groups, len(FIELDS)]`` int32: groups of a uniform stream, heads of an allocated one.
        bytes: ``[num_tables, 4, row_bytes]`` int32, see tables/code_bytes.py; ``bits`` 0 in bytes that are not there.
        channels: ``[num_tables, 3, width]`` FP32, see ``CHANNEL_ROWS``, of allocated streams; 0 beyond a scale group.
        width: channels of a scale group, rounded up to a power of two.
        row_bytes: bytes of a scale group's codes, rounded up to a power of two.
        codes_per_byte: codes that meet in a byte, at most.
        kind: ``FP16``, ``UNIFORM`` or ``ALLOCATED``, see tables/latent_tables.py.
        largest: the largest code of a uniform stream.
        outliers: whether any channels are kept in FP16 beside the codes.
    """

    scale_groups: torch.Tensor
    bytes: torch.Tensor
    channels: torch.Tensor
    width: int
    row_bytes: int
    codes_per_byte: int
    kind: int
    largest: int
    outliers: bool


def stream_tables(layout: PageLayout, index: int, device: torch.device) -> StreamTables:
    """Describe stream ``index`` of a layout to the quantizing kernel."""
    stream = layout.streams[index]
    allocated = isinstance(stream, AllocatedFormat)
    scale_groups, of_bytes, of_channels = [], [], []
    tables: dict[Runs, int] = {}
    for head in range(stream.num_heads):
        runs = _runs(stream, head)
        if runs not in tables:
            tables[runs] = len(tables)
            of_bytes.append(code_bytes(runs))
            of_channels.append(torch.stack(channel_tables(runs)) if allocated else torch.zeros(len(CHANNEL_ROWS), 1))
        for band in latent_bands((layout,), (LatentTerm(0, index),), head, at_most=stream.width):
            fields = band.fields | {"first": head * stream.width + band.first_row, "table": tables[runs]}
            scale_groups.append([fields.get(name, 0) for name in FIELDS])
    row_bytes = triton.next_power_of_2(max(table.shape[1] for table in of_bytes))
    width = triton.next_power_of_2(max(scale_group[FIELDS.index("channels")] for scale_group in scale_groups))
    bits = torch.cat([table[ROWS.index("bits")] for table in of_bytes])
    kind, largest = ALLOCATED, 0
    if isinstance(stream, StreamFormat):
        kind, largest = (UNIFORM, (1 << stream.bits) - 1) if stream.quantized else (FP16, 0)
    return StreamTables(
        scale_groups=torch.tensor(scale_groups, dtype=torch.int32, device=device),
        bytes=_stacked(of_bytes, row_bytes).to(device),
        channels=_stacked(of_channels, width if allocated else 1).to(device),
        width=width,
        row_bytes=row_bytes,
        codes_per_byte=8 // int(bits.min()),
        kind=kind,
        largest=largest,
        outliers=any(scale_group[FIELDS.index("num_outliers")] for scale_group in scale_groups),
    )


def _runs(stream: Stream, head: int) -> Runs:
    """Bits and channels of what is packed by itself: the runs of a latent head, or one group like all others."""
    if isinstance(stream, StreamFormat):
        return ((stream.bits, stream.group_size),)
    return stream.runs[head]


def _stacked(tables: list[torch.Tensor], width: int) -> torch.Tensor:
    """``[tables, rows, width]``, padded with 0."""
    return torch.stack([torch.nn.functional.pad(table, (0, width - table.shape[1])) for table in tables])
