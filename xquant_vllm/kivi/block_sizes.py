"""How many tokens a block of each kind of pages holds.

vLLM allocates both kinds from one pool, so their pages take the same bytes and the smaller one, the residual's, is
padded. A sequence holds as many residual pages as its last R tokens touch. Prefixes are found in the cache in multiples
of what both block sizes divide: the residual's divides the other, which is thus the granularity.
"""

from collections.abc import Iterator
from dataclasses import replace

from xquant_vllm.codec.layout import BLOCK_SIZE_MULTIPLE
from xquant_vllm.kivi.pages import QuantizedLayout, ResidualLayout

# Residual blocks of 16 tokens fit into blocks of codes of fewer tokens than this for all formats.
_LARGEST_BLOCK = 512


def choose_block_sizes(
    quantized: QuantizedLayout, residual: ResidualLayout, residual_tokens: int, block_size: int | None
) -> tuple[QuantizedLayout, ResidualLayout]:
    """The block sizes that leave the fewest bytes of a sequence unused.

    Args:
        quantized: layout of the quantized pages, of any block size.
        residual: layout of the residual pages, of any block size.
        residual_tokens: R.
        block_size: tokens per quantized page if the user has set it; None: to be chosen, too.

    Returns:
        The same layouts with block sizes; a residual page takes no more bytes than a quantized one.

    Raises:
        ValueError: ``block_size`` is too small or splits groups of keys.
    """
    group = quantized.key_group_size
    sizes = range(group, max(_LARGEST_BLOCK, group) + 1, group)
    chosen = [pair for size in sizes for pair in _pairs(replace(quantized, block_size=size), residual)]
    if block_size is not None:
        fitting = list(_pairs(replace(quantized, block_size=block_size), residual))
        if not fitting:
            smallest = min(pages.block_size for pages, _ in chosen)
            raise ValueError(
                f"block_size = {block_size} does not suit the residual, whose pages of at least {BLOCK_SIZE_MULTIPLE} "
                f"tokens must fit into as many bytes; set {smallest} or more, a multiple of {group}"
            )
        chosen = fitting
    return min(chosen, key=lambda pair: _unused_bytes(pair[0], pair[1], residual_tokens))


def _pairs(quantized: QuantizedLayout, residual: ResidualLayout) -> Iterator[tuple[QuantizedLayout, ResidualLayout]]:
    """The layouts with every block size of the residual that fits."""
    for size in range(BLOCK_SIZE_MULTIPLE, quantized.block_size + 1, BLOCK_SIZE_MULTIPLE):
        fits = size * residual.bytes_per_token <= quantized.page_bytes
        if fits and quantized.block_size % size == 0:
            yield quantized, replace(residual, block_size=size)


def _unused_bytes(quantized: QuantizedLayout, residual: ResidualLayout, residual_tokens: int) -> int:
    """Half of a sequence's last block, and what its residual pages take, on average."""
    pages = -(-(residual_tokens - 1) // residual.block_size) + 1
    return quantized.page_bytes // 2 + pages * quantized.page_bytes
