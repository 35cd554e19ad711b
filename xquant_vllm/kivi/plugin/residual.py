"""A layer's residual as vLLM's allocator sees it: a layer of its own, with a sliding window.

Its window is R. That covers what the next step of a sequence with s cached tokens reads: exact values from
``s + 1 - R`` on, exact keys from later on, and groups of keys to be quantized that begin at ``s + 1 - G`` or later, G
being at most R. So vLLM allocates, frees, counts, prefix-caches and recomputes the residual as it does any window.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from xquant_vllm.kivi.pages import ResidualLayout
from xquant_vllm.plugin.backend.backend import PagedBackend
from xquant_vllm.plugin.backend.metadata import PagedMetadataBuilder


class ResidualMetadataBuilder(PagedMetadataBuilder):
    """Gives the residual's block table."""


class ResidualBackend(PagedBackend):
    """Pages without attention: the layer that they belong to reads them."""

    @staticmethod
    def get_name() -> str:
        """No member of vLLM's enum: never selected."""
        return "KIVI_RESIDUAL"

    @staticmethod
    def get_impl_cls() -> Any:
        """There is none."""
        raise NotImplementedError("kivi: a residual does not attend")

    @staticmethod
    def get_builder_cls() -> type[ResidualMetadataBuilder]:
        """The metadata builder."""
        return ResidualMetadataBuilder


class ResidualLayer(AttentionLayerBase):
    """Stands in vLLM's table of layers for the residual of one attention layer.

    Attributes:
        kv_cache: what vLLM binds, ``[num_blocks, 1, block_size, bytes_per_token]`` uint8.
    """

    def __init__(self, layout: ResidualLayout, residual_tokens: int, page_bytes: int) -> None:
        """Describe the pages.

        Args:
            layout: their layout.
            residual_tokens: R.
            page_bytes: what a page takes in the pool, as much as one of quantized keys and values.
        """
        self._layout, self._residual_tokens, self._page_bytes = layout, residual_tokens, page_bytes
        self.kv_cache = torch.empty(0, dtype=torch.uint8)

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Builder and layouts."""
        return ResidualBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """A window of the last R tokens, in pages that are padded."""
        layout = self._layout
        return SlidingWindowSpec(
            block_size=layout.block_size,
            num_kv_heads=layout.num_kv_heads,
            head_size=layout.head_size,
            dtype=torch.uint8,
            sliding_window=self._residual_tokens,
            num_head_slots=1,
            state_content_bytes=layout.bytes_per_token,
            page_size_padded=self._page_bytes if self._page_bytes > layout.page_bytes else None,
        )
