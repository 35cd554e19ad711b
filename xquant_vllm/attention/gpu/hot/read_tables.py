"""A latent as it is read of single tokens: segments of channels that programs make apart from each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.attention.gpu.tables.latent_tables import LatentTables, latent_tables
from xquant_vllm.attention.gpu.tables.segments import band_limit, segments_of
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.layout import PageLayout

# Columns of a segment's description: where its row of bands starts and stops, its head, its first channel within the
# head, and its channels.
SEGMENT_FIELDS = ("start", "stop", "head", "first", "channels")


@dataclass(frozen=True)
class ReadTables:
    """What is read of a latent.

    Attributes:
        latent: the bands of what is read; ``up`` is FP32 ``[bands, width, 1]``, the factor of every channel.
        segments: int32 ``[segments, 5]``, see ``SEGMENT_FIELDS``.
        order: int32: the bands of one segment after those of another.
        adds: whether what is read is added to what is there already.
    """

    latent: LatentTables
    segments: torch.Tensor
    order: torch.Tensor
    adds: bool


def width_of(layouts: Sequence[PageLayout], terms: Sequence[LatentTerm]) -> int:
    """Channels of a head of a latent."""
    return sum(layouts[term.page].streams[term.stream].width for term in terms if not term.adds)


@per_object
def read_tables(plan: AttentionLayerPlan, values: bool, last: bool) -> ReadTables:
    """The tables, made on first use and forgotten together with the plan.

    Args:
        plan: the layer's plan.
        values: of the value latent, not of the key latent.
        last: of its last term alone; those before are there already.
    """
    layouts, device = plan.layouts, plan.device
    every = plan.value_terms if values else plan.key_terms
    terms = every[-1:] if last else every
    stream = layouts[terms[0].page].streams[terms[0].stream]
    heads = stream.num_heads
    width = stream.width if last else width_of(layouts, every)
    offset = width_of(layouts, every) - width
    at_most = band_limit(layouts, terms)
    latent = latent_tables(layouts, terms, torch.ones(heads, width, 1, device=device), torch.float32, at_most)
    rows: list[tuple[int, ...]] = []
    order: list[int] = []
    for segment in segments_of(layouts, terms, heads, width, at_most, latent.width):
        stop = len(order) + len(segment.bands)
        rows.append((len(order), stop, segment.head, offset + segment.first, segment.channels))
        order += segment.bands
    return ReadTables(
        latent,
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(order, dtype=torch.int32, device=device),
        last and terms[0].adds,
    )
