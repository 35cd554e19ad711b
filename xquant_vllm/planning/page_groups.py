"""How vLLM makes blocks of pages, and how many tokens it then says that the cache holds.

Layers that need the same tokens share a block table. If all do, a block is a page of every layer, whatever their
sizes. If there are several kinds, all pages get one size, and every kind is cut into groups of as many layers as the
rarest kind has; a block is a page of every layer of one group, and a sequence needs blocks in all groups. This is the
arithmetic of vLLM's ``vllm/v1/core/kv_cache_utils.py``; a test compares it with that file for every cache of a plan.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from xquant_vllm.scheme.hot_pool import PageNeeds

# Up to so many times as many layers as of the rarest kind vLLM pads that kind instead of cutting the others.
_PADDED_UP_TO = 1.5


@dataclass(frozen=True)
class LayerPages:
    """The pages of one layer.

    Attributes:
        block_size: tokens of a page.
        page_bytes: bytes of a page.
        window: tokens before a query that are kept; None keeps all.
    """

    block_size: int
    page_bytes: int
    window: int | None = None


@dataclass(frozen=True)
class Sequences:
    """What vLLM assumes of sequences.

    Attributes:
        context: tokens of the longest one, ``--max-model-len``.
        in_flight: tokens that may be scheduled and not yet computed; a window is kept that much longer.
    """

    context: int
    in_flight: int


def page_needs(layers: Sequence[LayerPages], sequences: Sequences) -> PageNeeds:
    """Bytes of a block, and blocks of a sequence.

    Args:
        layers: all layers of a rank.
        sequences: what is assumed of them.
    """
    kinds = _by_kind(layers)
    if len(kinds) == 1:
        ((kind, members),) = kinds.items()
        block_bytes = sum(layer.page_bytes for layer in members)
        return PageNeeds(block_bytes, _blocks(*kind, sequences), sequences.context)
    kinds = _by_kind(_one_size(layers))
    counts = [len(members) for members in kinds.values()]
    rarest, most = min(counts), max(counts)
    of_group = most if most < rarest * _PADDED_UP_TO else rarest
    page = next(iter(kinds.values()))[0].page_bytes
    blocks = 0
    widest = 0
    for kind, members in kinds.items():
        groups = -(-len(members) // of_group)
        widest = max(widest, -(-len(members) // groups))
        blocks += groups * _blocks(*kind, sequences)
    return PageNeeds(widest * page, blocks, sequences.context)


def _by_kind(layers: Sequence[LayerPages]) -> dict[tuple[int, int | None], list[LayerPages]]:
    """Layers by tokens of a block and window."""
    kinds: dict[tuple[int, int | None], list[LayerPages]] = defaultdict(list)
    for layer in layers:
        kinds[layer.block_size, layer.window].append(layer)
    return kinds


def _one_size(layers: Sequence[LayerPages]) -> list[LayerPages]:
    """Smaller pages get more tokens if that fills the largest one exactly; else they are padded."""
    largest = max(layer.page_bytes for layer in layers)
    filled = []
    for layer in layers:
        times = largest // layer.page_bytes if largest % layer.page_bytes == 0 else 1
        filled.append(replace(layer, block_size=layer.block_size * times, page_bytes=largest))
    return filled


def _blocks(block_size: int, window: int | None, sequences: Sequences) -> int:
    """Of one sequence, in one group."""
    if window is None:
        return -(-sequences.context // block_size)
    # A window may begin within a block.
    return -(-min(window - 1 + sequences.in_flight, sequences.context) // block_size) + 1
