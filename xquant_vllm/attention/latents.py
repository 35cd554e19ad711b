"""How a layer's latents are put together from the streams in its own pages and in those of earlier layers.

A latent is read from a row of *terms*. A term's channels follow those of the term before it, or, if it ``adds``, are
added to them::

    latents of a layer       [own stream]
    X by deltas (XQuant-CL)  [anchor] + [delta] + ... + [own delta]
    latents by a chain       [anchor's latents | next layer's residual | ... | own residual]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.codec.pages import load_latents, load_slots

# Kernels go through channels in vectors: terms that others follow must end at a multiple of this.
CHANNEL_MULTIPLE = 16


@dataclass(frozen=True)
class LatentTerm:
    """One stream that a latent is read from.

    Attributes:
        page: which of the pages handed to a call; 0 is the layer's own.
        stream: which stream of that page.
        adds: its channels are added to those of the term before instead of following them.
    """

    page: int
    stream: int
    adds: bool = False


@dataclass(frozen=True)
class Prediction:
    """What a layer's stream is expected to be, from pages written by earlier layers; only the difference is stored.

    Taken from the pages, not from the exact latents, so that a reader finds what the writer found: errors do not add up
    along a chain.

    Attributes:
        terms: what the prediction is made from.
        matrix: ``[num_heads, width of the terms, width of the stream]``, FP32, that it is multiplied by; None: the
            terms are the prediction.
    """

    terms: tuple[LatentTerm, ...]
    matrix: torch.Tensor | None = None


def check_terms(
    what: str, layouts: Sequence[PageLayout], terms: Sequence[LatentTerm], width: int, num_heads: int
) -> None:
    """Refuse terms that name no stream or do not fit together.

    Args:
        what: what they make up, for the error.
        layouts: layouts of the pages.
        terms: the terms.
        width: channels per head that they must come to.
        num_heads: heads of what they make up; terms may have one head that all of them read.

    Raises:
        ValueError: with the reason.
    """
    if not terms or terms[0].adds:
        raise ValueError(f"the {what} terms must start with one that does not add")
    try:
        streams = [layouts[term.page].streams[term.stream] for term in terms]
    except IndexError:
        raise ValueError(f"the {what} terms name a page or stream that is not there") from None
    total = 0
    for index, (term, stream) in enumerate(zip(terms, streams, strict=True)):
        if stream.num_heads not in (1, num_heads) or stream.num_heads != streams[0].num_heads:
            raise ValueError(f"{stream.num_heads} {what} latent heads do not fit {num_heads} kv heads")
        if term.adds:
            before = streams[index - 1]
            if not isinstance(before, StreamFormat) or not isinstance(stream, StreamFormat):
                raise ValueError(f"{what} terms whose channels have different bits cannot be added")
            if before.outlier_channels or stream.outlier_channels:
                raise ValueError(f"{what} terms with outlier channels cannot be added")
            if (stream.width, stream.group_size) != (before.width, before.group_size):
                raise ValueError(
                    f"{what} terms of {before.width} and {stream.width} channels in groups of {before.group_size} and "
                    f"{stream.group_size} cannot be added"
                )
        else:
            if total % CHANNEL_MULTIPLE:
                raise ValueError(f"{what} terms of {total} channels cannot be followed by others: no multiple of 16")
            total += stream.width
    if total != width:
        raise ValueError(f"the {what} terms have {total} channels, expected {width}")


def read_blocks(
    pages: Sequence[torch.Tensor], layouts: Sequence[PageLayout], terms: Sequence[LatentTerm], block_ids: torch.Tensor
) -> torch.Tensor:
    """Latents of whole blocks, ``[n * block_size, num_heads, width]`` FP32; see :func:`load_latents`."""
    return combine(terms, [load_latents(pages[t.page], layouts[t.page], block_ids, t.stream) for t in terms])


def read_slots(
    pages: Sequence[torch.Tensor], layouts: Sequence[PageLayout], terms: Sequence[LatentTerm], slots: torch.Tensor
) -> torch.Tensor:
    """Latents of single slots, ``[n, num_heads, width]`` FP32; see :func:`load_slots`."""
    return combine(terms, [load_slots(pages[t.page], layouts[t.page], slots, t.stream) for t in terms])


def combine(terms: Sequence[LatentTerm], loaded: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put a latent together.

    Args:
        terms: its terms.
        loaded: what every term reads, ``[n, num_heads, width]`` FP32.

    Returns:
        ``[n, num_heads, width of the latent]``, FP32.
    """
    parts: list[torch.Tensor] = []
    for term, x in zip(terms, loaded, strict=True):
        if term.adds:
            parts[-1] = parts[-1] + x
        else:
            parts.append(x)
    return torch.cat(parts, -1)
