"""Key up-projections in integers, by which the C++ kernels multiply codes as they are (csrc/cpu/attention/integer.h).

A *scale group* is the channels that share a scale and a zero of a token: a run of a uniform stream, a band of an
allocated one. For its channels ``up = unit * integers``, with a unit for every column, and with
``latent = scale * code + zero`` a key is ``scale * unit * (integers^T codes) + zero * sums``. Allocated streams have
steps and zeros of channels besides: ``latent = scale * (step * code + zero)``, with
``zero = -step * largest code / 2``, so the steps are part of the integers and the zeros part of the sums.

Integers have 8 bits where the up-projection was rounded to such (projection/integer_up.py) and codes have 4 bits or
fewer, else 16. In a scale group with both kinds those of 16 bits come first and count units of 1/256.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from xquant_vllm.attention.cpu.abi import Head, Latent, Stream
from xquant_vllm.codec.allocation import STEP
from xquant_vllm.projection.integer_up import BYTE_BITS, LARGEST_BYTE, byte_units

# So that integers of 8 bits are multiples of a power of two, and stay exact.
_LARGEST_WORD = LARGEST_BYTE * 256
_LARGEST_SUM = 2**31 - 1
_WORD_STEPS = 256
# A tile register: csrc/cpu/tiles/registers.h.
_TILE_ROWS, _TILE_CHANNELS = 16, 64


@dataclass(frozen=True)
class IntegerKeys:
    """An up-projection in integers.

    Attributes:
        integers: ``[num_kv_heads, width / 2, head_size]`` INT32. The rows of a scale group begin at half its first
            channel: one for two channels of 16 bits, then one for four of 8 bits, the first channel in the lowest bits.
        words: ``[num_kv_heads, scale_groups]`` INT64, channels of a scale group that have 16 bits.
        units: ``[num_kv_heads, scale_groups, head_size]`` FP32, of what is summed up in INT32.
        sums: ``[num_kv_heads, scale_groups, head_size]`` FP32: of the *rounded* up-projection, so that its rounding
            errors are multiplied by latents, which are small, and not by codes, which are not.
        tiles: ``[chunks, head_size rounded up to 16, 64]`` INT8, the integers of scale groups that have 8 bits only,
            transposed: a chunk for 64 channels, the rest zero.
        first_tiles: ``[num_kv_heads, scale_groups]`` INT64, the first chunk of a scale group; -1: it has none.
    """

    integers: torch.Tensor
    words: torch.Tensor
    units: torch.Tensor
    sums: torch.Tensor
    tiles: torch.Tensor
    first_tiles: torch.Tensor


@dataclass(frozen=True)
class ScaleGroup:
    """Channels that share scales: the first and, for each, steps of codes, what zeros count, largest codes, bits."""

    first: int
    step: torch.Tensor
    zero: torch.Tensor
    largest: torch.Tensor
    bits: torch.Tensor


def integer_keys(up_key: torch.Tensor, latent: Latent) -> IntegerKeys:
    """An up-projection in integers: exactly, or rounded to 16 bits.

    Args:
        up_key: ``[num_kv_heads, width, head_size]`` FP32.
        latent: what it projects up. Terms that add to others and FP16 numbers have no use for their integers.
    """
    kv_heads, width, head_size = up_key.shape
    integers = torch.zeros(kv_heads, width // 2, head_size, dtype=torch.int32)
    words, units, sums, first_tiles = [], [], [], []
    tiles = [torch.zeros(0, -(-head_size // _TILE_ROWS) * _TILE_ROWS, _TILE_CHANNELS, dtype=torch.int8)]
    num_tiles = 0
    for kv_head in range(kv_heads):
        for scale_group in scale_groups(latent, kv_head):
            count = len(scale_group.step)
            # In FP64: only the rounding to integers is to be lost.
            rows = up_key[kv_head, scale_group.first : scale_group.first + count].double()
            weighted = rows * scale_group.step.unsqueeze(-1)
            num_words, unit = _bytes(weighted, scale_group) or (count, _word_unit(weighted, scale_group))
            # What every channel's integers count, in units.
            steps = torch.ones(count, 1, dtype=torch.float64)
            steps[num_words:] = _WORD_STEPS if num_words else 1
            rounded = (weighted / (unit * steps)).round()
            packed = _rows(rounded, num_words)
            integers[kv_head, scale_group.first // 2 : scale_group.first // 2 + len(packed)] = packed
            first_tiles.append(-1 if num_words else num_tiles)
            if not num_words:
                tiles.append(in_tiles(rounded))
                num_tiles += len(tiles[-1])
            words.append(num_words)
            units.append(unit)
            sums.append((rounded * steps * unit * scale_group.zero.unsqueeze(-1)).sum(0))
    return IntegerKeys(
        integers,
        torch.tensor(words).unflatten(0, (kv_heads, -1)),
        torch.stack(units).float().unflatten(0, (kv_heads, -1)),
        torch.stack(sums).float().unflatten(0, (kv_heads, -1)),
        torch.cat(tiles),
        torch.tensor(first_tiles).unflatten(0, (kv_heads, -1)),
    )


def _bytes(weighted: torch.Tensor, scale_group: ScaleGroup) -> tuple[int, torch.Tensor] | None:
    """Channels of 16 bits and the unit, if the channels of few bits are integers of 8 bits; else None."""
    num_words = int((scale_group.bits > BYTE_BITS).sum())
    few = weighted[num_words:]
    unit = byte_units(few) if len(few) else None
    if unit is None:
        return None
    if not num_words:
        return 0, unit
    unit = unit / _WORD_STEPS
    fits = bool((weighted[:num_words].abs() <= _LARGEST_WORD * unit).all())
    return (num_words, unit) if fits and _sums_fit(weighted, unit, scale_group) else None


def _word_unit(weighted: torch.Tensor, scale_group: ScaleGroup) -> torch.Tensor:
    """The unit of columns of which all integers have 16 bits."""
    codes = scale_group.largest.unsqueeze(-1)
    sums = (weighted.abs() * codes).sum(0) / (_LARGEST_SUM - codes.sum())
    return torch.maximum(weighted.abs().amax(0) / _LARGEST_WORD, sums).clamp_min(1e-30)


def _sums_fit(weighted: torch.Tensor, unit: torch.Tensor, scale_group: ScaleGroup) -> bool:
    sums = ((weighted.abs() / unit + 1) * scale_group.largest.unsqueeze(-1)).sum(0)
    return bool((sums <= _LARGEST_SUM).all())


def _rows(integers: torch.Tensor, num_words: int) -> torch.Tensor:
    """Integers ``[channels, head_size]`` put together to ``[rows, head_size]`` INT32."""
    rows = []
    for part, together, dtype in ((integers[:num_words], 2, torch.int16), (integers[num_words:], 4, torch.int8)):
        if len(part):
            grouped = part.to(dtype).unflatten(0, (-1, together)).transpose(1, 2).contiguous()
            rows.append(grouped.view(torch.int32).squeeze(-1))
    return torch.cat(rows)


def in_tiles(integers: torch.Tensor) -> torch.Tensor:
    """Whole numbers of 8 bits ``[channels, head_size]`` as INT8 ``[chunks, head_size rounded up to 16, 64]``.

    A chunk has 64 channels; the rest is zero.
    """
    channels, head_size = integers.shape
    padded = F.pad(integers.to(torch.int8), (0, -head_size % _TILE_ROWS, 0, -channels % _TILE_CHANNELS))
    return padded.unflatten(0, (-1, _TILE_CHANNELS)).transpose(1, 2).contiguous()


def scale_groups(latent: Latent, kv_head: int) -> list[ScaleGroup]:
    """Scale groups of a latent head in the order in which for_bands (csrc/cpu/common/layout.h) comes to them."""
    found, row = [], 0
    for index in range(latent.num_terms):
        term = latent.terms[index]
        if term.adds:
            continue
        stream = term.stream
        head = stream.heads[0 if stream.num_heads == 1 else kv_head]
        for band in (head.bands[i] for i in range(head.num_bands)):
            runs = list(range(band.begin, band.end))
            for members in [runs] if stream.allocated else [[run] for run in runs]:
                found.append(_scale_group(stream, head, members, row))
        row += stream.width
    return found


def _scale_group(stream: Stream, head: Head, members: list[int], row: int) -> ScaleGroup:
    runs = [head.runs[i] for i in members]
    channels = torch.tensor([run.channels for run in runs])
    bits = torch.tensor([run.bits for run in runs]).repeat_interleave(channels)
    largest = 2.0 ** bits.double() - 1
    first = row + runs[0].channel
    if stream.allocated:
        step = torch.tensor([STEP[run.bits] for run in runs]).double().repeat_interleave(channels)
        return ScaleGroup(first, step, -largest / 2, largest, bits)
    step = torch.ones_like(largest)
    if runs[0].channel == 0:  # their codes stand for nothing: the FP16 numbers are multiplied by themselves
        step[: stream.outlier_channels] = 0
    return ScaleGroup(first, step, torch.ones_like(largest), largest, bits)
