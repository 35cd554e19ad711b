"""The attention backends as vLLM's selector sees them."""

from typing import Any, ClassVar

import torch
from vllm.config.cache import CacheDType
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from xquant_vllm.codec.layout import BLOCK_SIZE_MULTIPLE
from xquant_vllm.plugin.backend.impl import XQuantImpl
from xquant_vllm.plugin.backend.metadata import XQuantMetadataBuilder
from xquant_vllm.plugin.backend.wrappers import PACKAGE, raise_for_wrapper
from xquant_vllm.plugin.load.cache_spec import as_published
from xquant_vllm.plugin.registration import BACKEND_NAME


class PagedBackend(AttentionBackend):
    """Pages whose bytes only this package reads.

    vLLM builds layers of other kinds by deriving a backend whose metadata they change. Those are refused here, which is
    before a weight is loaded; the layers themselves are checked again once the model is there.
    """

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    # The page format comes from the backend's settings; these name the model's own dtype and change nothing.
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse backends that others derive.

        Raises:
            UnsupportedError: the class is none of this package.
        """
        super().__init_subclass__(**kwargs)
        if not cls.__module__.startswith(f"{PACKAGE}."):
            raise_for_wrapper(cls)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """Block sizes that keep every section of a page aligned."""
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Codes of a head are packed into whole bytes."""
        return head_size % 8 == 0 and head_size <= 256

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Kernels skip what is behind the window."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """None knows these pages, unless a backend says so."""
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layouts that keep the bytes of a page together; each layer may have its own page size."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)


class XQuantBackend(PagedBackend):
    """Pages of quantized latents instead of keys and values."""

    @staticmethod
    def get_name() -> str:
        """Name of the enum member."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[XQuantImpl]:
        """The per-layer implementation."""
        return XQuantImpl

    @staticmethod
    def get_builder_cls() -> type[XQuantMetadataBuilder]:
        """The metadata builder."""
        return XQuantMetadataBuilder

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Those that move whole pages; see connectors/allowed.py."""
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Layers publish their own bytes; this answers where vLLM aligns pages with states, before it asks layers."""
        aligned: AttentionSpec = as_published(spec)
        return aligned

    @classmethod
    def supports_sink(cls) -> bool:
        """A learned score of every query head without a value, as of GPT-OSS."""
        return True
