"""Memory for what passes from a token's latents to its keys and values: taken once, as CUDA graphs keep addresses."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.attention.gpu.hot.read_tables import width_of
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.plan import AttentionLayerPlan


def carries(plan: AttentionLayerPlan) -> bool:
    """Whether another layer may go on from what this one reads: keys and values have one latent."""
    return plan.key_terms == plan.value_terms


@dataclass(frozen=True)
class BufferSizes:
    """Numbers of a token, of the layers that share the buffers.

    Attributes:
        latent_heads: heads of a latent.
        latent_width: channels of a head of it.
        projected: numbers of its keys and values.
        carried: whether latents are carried on in FP32.
    """

    latent_heads: int
    latent_width: int
    projected: int
    carried: bool

    @classmethod
    def of(cls, plans: Sequence[AttentionLayerPlan]) -> "BufferSizes":
        """What the largest of some layers needs."""
        heads, width, projected = 1, 1, 1
        for plan in plans:
            for terms in (plan.key_terms, plan.value_terms):
                heads = max(heads, plan.layouts[terms[0].page].streams[terms[0].stream].num_heads)
                width = max(width, width_of(plan.layouts, terms))
            projection = plan.projection
            projected = max(projected, 2 * projection.num_kv_heads * projection.head_size)
        return cls(heads, width, projected, any(len(plan.key_terms) > 1 and carries(plan) for plan in plans))

    def bytes_of(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of :class:`HotBuffers`."""
        latents = self.latent_heads * self.latent_width
        return tokens * ((4 * latents if self.carried else 0) + dtype.itemsize * (latents + self.projected))


class HotBuffers:
    """Shared by the layers of an engine, which write one after another.

    Attributes:
        tokens: of a step at most.
        dtype: of products and of the pool.
        left: of which tokens the latents are here that the last layer has put together, and which layer that was; None
            where no layer may go on from them.
    """

    def __init__(self, sizes: BufferSizes, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take the memory.

        Args:
            sizes: numbers of a token.
            tokens: of a step at most.
            dtype: of products and of the pool.
            device: where.
        """
        self.tokens, self.dtype = tokens, dtype
        self.left: tuple[HotTokens, Hashable] | None = None
        shape = (sizes.latent_heads, tokens, sizes.latent_width)
        self._rounded = torch.empty(shape, dtype=dtype, device=device)
        # Without anything carried the kernel neither reads nor writes it.
        self._latents = torch.empty(shape, device=device) if sizes.carried else self._rounded
        self._projected = torch.empty(tokens * sizes.projected, dtype=dtype, device=device)

    def latents(self, heads: int, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents that are carried on, FP32, and those that are multiplied, both ``[heads, tokens, width]``.

        Layers find each other's numbers here: a channel is at the same place for all widths.
        """
        latents, rounded = (x[:heads, :tokens, :width] for x in (self._latents, self._rounded))
        return latents, rounded

    def projected(self, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        """Tensors side by side, not initialized."""
        taken, start = [], 0
        for shape in shapes:
            size = math.prod(shape)
            taken.append(self._projected[start : start + size].view(shape))
            start += size
        return taken
