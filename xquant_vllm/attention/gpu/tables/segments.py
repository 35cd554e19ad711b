"""Segments: channels of a latent whose bands are added up, so that a program can make these channels alone."""

from collections.abc import Sequence
from typing import NamedTuple

from xquant_vllm.attention.gpu.tables.latent_tables import Band, latent_bands
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.codec.layout import PageLayout, StreamFormat

# Channels of a band, at most, but for bands of more outlier channels. The kernels spill registers with twice as many.
_AT_MOST = 64


class Segment(NamedTuple):
    """Channels of one head.

    Attributes:
        head: the head.
        first: its first channel within the head.
        channels: how many.
        bands: which bands of all heads, in the order of ``latent_tables``, are added up; none: no term stores them.
    """

    head: int
    first: int
    channels: int
    bands: tuple[int, ...]


def band_limit(layouts: Sequence[PageLayout], terms: Sequence[LatentTerm]) -> int:
    """Channels of a band, at most: those of outliers fit one."""
    at_most = _AT_MOST
    for term in terms:
        stream = layouts[term.page].streams[term.stream]
        while isinstance(stream, StreamFormat) and stream.outlier_channels > at_most:
            at_most *= 2
    return at_most


def segments_of(
    layouts: Sequence[PageLayout],
    terms: Sequence[LatentTerm],
    num_heads: int,
    width: int,
    at_most: int,
    gaps_of: int,
) -> list[Segment]:
    """The segments of a latent, which together are all of its channels.

    Args:
        layouts: layouts of the pages.
        terms: the latent's terms.
        num_heads: its heads.
        width: channels of a head.
        at_most: channels of a band, at most.
        gaps_of: channels of a segment without bands, at most.
    """
    found: list[Segment] = []
    before = 0
    for head in range(num_heads):
        bands = latent_bands(layouts, terms, head, at_most)
        for (first, channels), meeting in _meeting(bands, width, gaps_of).items():
            found.append(Segment(head, first, channels, tuple(before + band for band in meeting)))
        before += len(bands)
    return found


def _meeting(bands: Sequence[Band], width: int, at_most: int) -> dict[tuple[int, int], list[int]]:
    """Which bands of a head are added up for which of its ``width`` channels: first channel and how many of them.

    Terms that are added have bands of the same channels. Channels that no term stores are 0.
    """
    meeting: dict[tuple[int, int], list[int]] = {}
    for index, band in enumerate(bands):
        meeting.setdefault((band.first_row, band.fields["channels"]), []).append(index)
    end = 0
    for first, channels in [*sorted(meeting), (width, 0)]:
        for gap in range(end, first, at_most):
            meeting[gap, min(at_most, first - gap)] = []
        end = first + channels
    return meeting
