"""What a layer's first stream is predicted from (XQuant-CL), as the kernels read it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.attention.gpu.tables.latent_tables import LatentTables, latent_tables
from xquant_vllm.attention.gpu.tables.segments import band_limit, segments_of
from xquant_vllm.attention.latents import Prediction
from xquant_vllm.codec.layout import PageLayout

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
    own, terms = layouts[0].streams[0], prediction.terms
    at_most = band_limit(layouts, terms)
    if prediction.matrix is not None:
        matrix = prediction.matrix.to(device, torch.float32)
        return PredictionTables(latent_tables(layouts, terms, matrix, torch.float32, at_most), None, None)
    ones = torch.ones(own.num_heads, own.width, 1, device=device)
    latent = latent_tables(layouts, terms, ones, torch.float32, at_most)
    rows: list[tuple[int, int, int, int]] = []
    order: list[int] = []
    for segment in segments_of(layouts, terms, own.num_heads, own.width, at_most, latent.width):
        first = segment.head * own.width + segment.first
        rows.append((len(order), len(order) + len(segment.bands), first, segment.channels))
        order += segment.bands
    return PredictionTables(
        latent,
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(order, dtype=torch.int32, device=device),
    )
