"""Whether a cache has a pool of hot blocks, and how large it is: the rules that a server and ``xquant plan`` share."""

from collections.abc import Sequence
from dataclasses import dataclass

from xquant_vllm.scheme.formats import LayerFormat
from xquant_vllm.scheme.hot_share import DEFAULT_SHARE, pool_bytes

# Blocks that a pool holds at least: one is the null block's, which is never hot.
_LEAST_BLOCKS = 2


@dataclass(frozen=True)
class PageNeeds:
    """What vLLM's pages take of the memory.

    Attributes:
        block_bytes: bytes of a block in all layers of a KV cache group; groups share the memory.
        sequence_blocks: blocks of one sequence of ``--max-model-len`` in all groups.
        max_model_len: its tokens.
    """

    block_bytes: int
    sequence_blocks: int
    max_model_len: int

    @property
    def least(self) -> int:
        """Bytes without which vLLM refuses to start: one sequence, and the block that it gives to nobody."""
        return (self.sequence_blocks + 1) * self.block_bytes

    def tokens(self, memory: int) -> int:
        """What vLLM calls the size of a cache of so many bytes."""
        return int(memory // self.block_bytes / self.sequence_blocks * self.max_model_len)


def pool_share(asked: int | float | None, formats: Sequence[LayerFormat]) -> int | float:
    """The user's setting, or the default: none where all layers hold latents per head, which are fast in pages."""
    if asked is not None:
        return asked
    return DEFAULT_SHARE if any(_slow_in_pages(form) for form in formats) else 0


def wanted_bytes(share: int | float, total: int, least: int | None) -> int:
    """Bytes that the pool is to have.

    Args:
        share: see :func:`pool_share`.
        total: bytes for pages and pool together.
        least: bytes that pages must keep, of a pool that nobody asked for; None for one that was asked for.
    """
    wanted = pool_bytes(share, total)
    return wanted if least is None else max(0, min(wanted, total - least))


def pool_tokens(wanted: int, token_bytes: int, block_size: int) -> int:
    """Whole tokens in a pool of so many bytes; 0 if it is too small to be of use.

    Args:
        wanted: bytes.
        token_bytes: of the keys and values of one token in all layers, in the model's dtype.
        block_size: tokens of a block.
    """
    tokens = wanted // token_bytes
    return tokens if tokens >= _LEAST_BLOCKS * block_size else 0


def _slow_in_pages(form: LayerFormat) -> bool:
    """Whether all kv heads multiply one wide latent: the layer input, or latents with a joint basis."""
    return form.holds != "latents" or any(stream.num_heads < form.shape.num_kv_heads for stream in form.streams)
