"""Streams of a page as the C++ kernels want them: heads of runs, put together to bands.

A *run* is neighbouring channels with one number of bits: a group of a uniform stream, a run of an allocated one. A
*band* is runs that are unpacked and multiplied at once.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from xquant_vllm.attention.cpu.abi import Band, Head, Run
from xquant_vllm.attention.cpu.abi import Stream as CStream
from xquant_vllm.codec.allocated import AllocatedFormat, channel_tables
from xquant_vllm.codec.allocation import Runs
from xquant_vllm.codec.layout import Stream, StreamOffsets
from xquant_vllm.codec.packing import packed_size

# Rows that vectors go along are padded to this, and bands that others follow end at a multiple (kPad in csrc/cpu).
LANES = 16
# Channels of a band: a tile of them stays in cache.
_AT_ONCE = 256


@dataclass(frozen=True)
class CpuStream:
    """A stream's C struct.

    Attributes:
        struct: the struct.
        kept: what it points to.
    """

    struct: CStream
    kept: list[object]


def cpu_stream(stream: Stream, at: StreamOffsets, block_size: int) -> CpuStream:
    """A stream of pages of so many slots, and where its sections are.

    Raises:
        ValueError: the runs of an allocated stream cannot be cut into bands.
    """
    kept: list[object] = []
    allocated = isinstance(stream, AllocatedFormat)
    if isinstance(stream, AllocatedFormat):
        heads = [_allocated_head(runs, kept) for runs in stream.runs]
        outlier_channels = 0
    else:
        # All heads are alike and share the arrays of the first.
        head = _head(((stream.bits, stream.group_size),) * stream.num_groups, kept)
        heads = [Head.from_buffer_copy(head) for _ in range(stream.num_heads)]
        outlier_channels = stream.outlier_channels
    codes = at.codes
    for head in heads:
        head.codes = codes
        codes += block_size * head.row_bytes
    array = _array(Head, heads, kept)
    struct = CStream(
        stream.num_heads, stream.width, int(allocated), outlier_channels, array, at.scales, at.zeros, at.outliers
    )
    return CpuStream(struct, kept)


def _head(runs: Runs, kept: list[object]) -> Head:
    """A head without its offset in the page."""
    channels = [0, *accumulate(count for _, count in runs)]
    bytes_ = [0, *accumulate(packed_size(count, bits) for bits, count in runs)]
    structs = [Run(*run, channels[i], bytes_[i]) for i, run in enumerate(runs)]
    bands = [Band(begin, end, channels[begin], channels[end] - channels[begin]) for begin, end in _bands(channels)]
    return Head(
        row_bytes=bytes_[-1],
        channels=channels[-1],
        num_runs=len(structs),
        num_bands=len(bands),
        runs=_array(Run, structs, kept),
        bands=_array(Band, bands, kept),
    )


def _bands(channels: list[int]) -> list[tuple[int, int]]:
    """Runs that make up the bands: as many as fit, but at least what ends at a multiple of the lanes.

    Args:
        channels: at which every run starts, and at which the last ends.
    """
    last = len(channels) - 1
    ends = [index for index in range(1, last + 1) if channels[index] % LANES == 0 or index == last]
    bands, begin = [], 0
    for end, following in pairwise([*ends, None]):
        if following is None or channels[following] - channels[begin] > _AT_ONCE:
            assert end is not None
            bands.append((begin, end))
            begin = end
    return bands


def _allocated_head(runs: Runs, kept: list[object]) -> Head:
    head = _head(runs, kept)
    if any(head.bands[index].channels > _AT_ONCE for index in range(head.num_bands)):
        raise ValueError(
            f"runs {runs} cannot be cut into bands of {_AT_ONCE} channels: where there are more, runs must end at "
            f"multiples of {LANES} channels"
        )
    step, largest, worth = channel_tables(runs)
    head.step = _table(step, kept)
    head.zero = _table(-step * largest / 2, kept)
    head.inverse_step = _table(1 / step, kept)
    head.middle = _table(largest / 2, kept)
    head.worth = _table(worth * step.square(), kept)
    head.channels_worth = worth.sum().item()
    return head


def _table(of_channels: torch.Tensor, kept: list[object]) -> int:
    """Address of FP32 numbers, filled up with zeros to a multiple of the lanes."""
    table = torch.nn.functional.pad(of_channels, (0, -of_channels.numel() % LANES)).contiguous()
    kept.append(table)
    return table.data_ptr()


def _array(kind: Any, elements: list[Any], kept: list[object]) -> Any:
    array = (kind * len(elements))(*elements)
    kept.append(array)
    return array
