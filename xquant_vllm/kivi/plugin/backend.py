"""The attention backend as vLLM's selector sees it."""

from xquant_vllm.kivi.plugin.impl import KiviImpl
from xquant_vllm.kivi.plugin.metadata import KiviMetadataBuilder
from xquant_vllm.plugin.backend.backend import PagedBackend
from xquant_vllm.plugin.registration import KIVI_BACKEND_NAME


class KiviBackend(PagedBackend):
    """Pages of quantized keys and values; beside them every layer has a residual, see ``residual.py``."""

    @staticmethod
    def get_name() -> str:
        """Name of the enum member."""
        return KIVI_BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[KiviImpl]:
        """The per-layer implementation."""
        return KiviImpl

    @staticmethod
    def get_builder_cls() -> type[KiviMetadataBuilder]:
        """The metadata builder."""
        return KiviMetadataBuilder
