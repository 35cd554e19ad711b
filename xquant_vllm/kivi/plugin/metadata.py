"""Per-batch metadata of the quantized pages; the residual's are built by the same class without the check."""

from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import KVCacheSpec

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.backend.metadata import PagedMetadataBuilder
from xquant_vllm.plugin.refusals import announced


class KiviMetadataBuilder(PagedMetadataBuilder):
    """Makes sure that every layer has its residual."""

    @announced()
    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """Check that the loader hook saw every layer."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        missed = [name for name, layer in layers.items() if layer.impl.residual_name is None]
        if missed:
            raise UnsupportedError(
                f"kivi: {missed[0]} (and {len(missed) - 1} more layers) were given no residual: "
                f"--load-format {vllm_config.load_config.load_format} loads without vLLM's post-processing of weights; "
                "use --load-format auto"
            )

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """None: the reference reads lengths on the host."""
        return AttentionCGSupport.NEVER
