"""Key up-projections in integers, by which the C++ kernels multiply codes as they are (csrc/cpu/integer.h).

A *segment* is what shares a scale and a zero of a token: a piece of a uniform stream, a chunk of an allocated one. For
its channels ``up = unit * integers``, with a unit for every column, and with ``latent = scale * code + zero`` a key is
``scale * unit * (integers^T codes) + zero * sums``. Allocated streams have steps and zeros of channels besides:
``latent = scale * (step * code + zero)``, with ``zero = -step * largest code / 2``, so the steps are part of the
integers and the zeros part of the sums.

Integers have 8 bits where the up-projection was rounded to such (projection/integer_up.py) and codes have 4 bits or
fewer, else 16. In a segment with both kinds those of 16 bits come first and count units of 1/256.
"""

from dataclasses import dataclass

import torch

from xquant_vllm.attention.cpu.abi import Head, Latent, Stream
from xquant_vllm.codec.allocation import STEP
from xquant_vllm.projection.integer_up import BYTE_BITS, LARGEST_BYTE, byte_units

# So that integers of 8 bits are multiples of a power of two, and stay exact.
_LARGEST_WORD = LARGEST_BYTE * 256
_LARGEST_SUM = 2**31 - 1
_WORD_STEPS = 256


@dataclass(frozen=True)
class IntegerKeys:
    """An up-projection in integers.

    Attributes:
        integers: ``[num_kv_heads, width / 2, head_size]`` INT32. The rows of a segment begin at half its first channel:
            one for two channels of 16 bits, then one for four of 8 bits, the first channel in the lowest bits.
        words: ``[num_kv_heads, segments]`` INT64, channels of a segment that have 16 bits.
        units: ``[num_kv_heads, segments, head_size]`` FP32, of what is summed up in INT32.
        sums: ``[num_kv_heads, segments, head_size]`` FP32: of the *rounded* up-projection, so that its rounding errors
            are multiplied by latents, which are small, and not by codes, which are not.
    """

    integers: torch.Tensor
    words: torch.Tensor
    units: torch.Tensor
    sums: torch.Tensor


@dataclass(frozen=True)
class Segment:
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
    words, units, sums = [], [], []
    for kv_head in range(kv_heads):
        for segment in segments(latent, kv_head):
            count = len(segment.step)
            # In FP64: only the rounding to integers is to be lost.
            weighted = up_key[kv_head, segment.first : segment.first + count].double() * segment.step.unsqueeze(-1)
            num_words, unit = _bytes(weighted, segment) or (count, _word_unit(weighted, segment))
            # What every channel's integers count, in units.
            steps = torch.ones(count, 1, dtype=torch.float64)
            steps[num_words:] = _WORD_STEPS if num_words else 1
            rounded = (weighted / (unit * steps)).round()
            rows = _rows(rounded, num_words)
            integers[kv_head, segment.first // 2 : segment.first // 2 + len(rows)] = rows
            words.append(num_words)
            units.append(unit)
            sums.append((rounded * steps * unit * segment.zero.unsqueeze(-1)).sum(0))
    return IntegerKeys(
        integers,
        torch.tensor(words).unflatten(0, (kv_heads, -1)),
        torch.stack(units).float().unflatten(0, (kv_heads, -1)),
        torch.stack(sums).float().unflatten(0, (kv_heads, -1)),
    )


def _bytes(weighted: torch.Tensor, segment: Segment) -> tuple[int, torch.Tensor] | None:
    """Channels of 16 bits and the unit, if the channels of few bits are integers of 8 bits; else None."""
    num_words = int((segment.bits > BYTE_BITS).sum())
    few = weighted[num_words:]
    unit = byte_units(few) if len(few) else None
    if unit is None:
        return None
    if not num_words:
        return 0, unit
    unit = unit / _WORD_STEPS
    fits = bool((weighted[:num_words].abs() <= _LARGEST_WORD * unit).all())
    return (num_words, unit) if fits and _sums_fit(weighted, unit, segment) else None


def _word_unit(weighted: torch.Tensor, segment: Segment) -> torch.Tensor:
    """The unit of columns of which all integers have 16 bits."""
    codes = segment.largest.unsqueeze(-1)
    sums = (weighted.abs() * codes).sum(0) / (_LARGEST_SUM - codes.sum())
    return torch.maximum(weighted.abs().amax(0) / _LARGEST_WORD, sums).clamp_min(1e-30)


def _sums_fit(weighted: torch.Tensor, unit: torch.Tensor, segment: Segment) -> bool:
    sums = ((weighted.abs() / unit + 1) * segment.largest.unsqueeze(-1)).sum(0)
    return bool((sums <= _LARGEST_SUM).all())


def _rows(integers: torch.Tensor, num_words: int) -> torch.Tensor:
    """Integers ``[channels, head_size]`` put together to ``[rows, head_size]`` INT32."""
    rows = []
    for part, together, dtype in ((integers[:num_words], 2, torch.int16), (integers[num_words:], 4, torch.int8)):
        if len(part):
            grouped = part.to(dtype).unflatten(0, (-1, together)).transpose(1, 2).contiguous()
            rows.append(grouped.view(torch.int32).squeeze(-1))
    return torch.cat(rows)


def segments(latent: Latent, kv_head: int) -> list[Segment]:
    """Segments of a latent head in the order in which for_chunks (csrc/cpu/layout.h) comes to them."""
    segments, row = [], 0
    for index in range(latent.num_terms):
        term = latent.terms[index]
        if term.adds:
            continue
        stream = term.stream
        head = stream.heads[0 if stream.num_heads == 1 else kv_head]
        for chunk in (head.chunks[i] for i in range(head.num_chunks)):
            pieces = list(range(chunk.begin, chunk.end))
            for members in [pieces] if stream.allocated else [[piece] for piece in pieces]:
                segments.append(_segment(stream, head, members, row))
        row += stream.width
    return segments


def _segment(stream: Stream, head: Head, members: list[int], row: int) -> Segment:
    pieces = [head.pieces[i] for i in members]
    channels = torch.tensor([piece.channels for piece in pieces])
    bits = torch.tensor([piece.bits for piece in pieces]).repeat_interleave(channels)
    largest = 2.0 ** bits.double() - 1
    first = row + pieces[0].channel
    if stream.allocated:
        step = torch.tensor([STEP[piece.bits] for piece in pieces]).double().repeat_interleave(channels)
        return Segment(first, step, -largest / 2, largest, bits)
    step = torch.ones_like(largest)
    if pieces[0].channel == 0:  # their codes stand for nothing: the FP16 numbers are multiplied by themselves
        step[: stream.outlier_channels] = 0
    return Segment(first, step, torch.ones_like(largest), largest, bits)
