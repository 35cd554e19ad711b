"""What a layer's first stream is predicted from (XQuant-CL), as the kernels read it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.attention.gpu.tables.latent_tables import Band, LatentTables, latent_bands, latent_tables
from xquant_vllm.attention.latents import Prediction
from xquant_vllm.codec.layout import PageLayout, StreamFormat

# Channels of a band, at most, but for bands of more outlier channels. The kernels spill registers with twice as many.
_AT_MOST = 64
# Columns of a segment's description: where its row of bands starts and stops, its first channel within a token's row
# of all heads, and its channels.
SEGMENT_FIELDS = ("start", "stop", "first", "channels")


@dataclass(frozen=True)
class PredictionTables:
    """The terms of a prediction.

    Attributes:
        latent: the terms' bands. With a matrix, times the matrix, FP32; without one ``up`` is ``[bands, width, 1]``,
            the factor of every channel.
        segments: int32 ``[segments, 4]``, see ``SEGMENT_FIELDS``: channels whose bands of all terms are added up.
            None with a matrix.
        order: int32: the bands of one segment after those of another. None with a matrix.
    """

    latent: LatentTables
    segments: torch.Tensor | None
    order: torch.Tensor | None


def prediction_tables(layouts: Sequence[PageLayout], prediction: Prediction, device: torch.device) -> PredictionTables:
    """Describe a prediction of the first stream of the first layout."""
    own, terms, at_most = layouts[0].streams[0], prediction.terms, _AT_MOST
    for term in terms:
        stream = layouts[term.page].streams[term.stream]
        while isinstance(stream, StreamFormat) and stream.outlier_channels > at_most:
            at_most *= 2
    if prediction.matrix is not None:
        matrix = prediction.matrix.to(device, torch.float32)
        return PredictionTables(latent_tables(layouts, terms, matrix, torch.float32, at_most), None, None)
    ones = torch.ones(own.num_heads, own.width, 1, device=device)
    latent = latent_tables(layouts, terms, ones, torch.float32, at_most)
    segments: list[tuple[int, int, int, int]] = []
    order: list[int] = []
    for head in range(own.num_heads):
        before = len(order)
        meeting = _meeting(latent_bands(layouts, terms, head, at_most), own.width, latent.width)
        for (first, channels), bands in meeting.items():
            segments.append((len(order), len(order) + len(bands), head * own.width + first, channels))
            order += [before + band for band in bands]
    return PredictionTables(
        latent,
        torch.tensor(segments, dtype=torch.int32, device=device),
        torch.tensor(order, dtype=torch.int32, device=device),
    )


def _meeting(bands: Sequence[Band], width: int, at_most: int) -> dict[tuple[int, int], list[int]]:
    """Which bands of a head are added up for which of its ``width`` channels: first channel and how many of them.

    Terms that are added have bands of the same channels. Channels that no term stores are predicted to be 0.
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
