"""Per-batch metadata of the quantized pages; the residual's are built by the same class without the check."""

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.kivi import dispatch
from xquant_vllm.plugin.backend.metadata import PagedMetadata, PagedMetadataBuilder
from xquant_vllm.plugin.refusals import announced


class KiviMetadataBuilder(PagedMetadataBuilder):
    """Makes sure that every layer has its residual."""

    @announced()
    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """Check that the loader hook saw every layer."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        missed = [name for name, layer in self.layers.items() if layer.impl.residual_name is None]
        if missed:
            raise UnsupportedError(
                f"kivi: {missed[0]} (and {len(missed) - 1} more layers) were given no residual: "
                f"--load-format {vllm_config.load_config.load_format} loads without vLLM's post-processing of weights; "
                "use --load-format auto"
            )
        for layer in self.layers.values():
            layer.impl.reserve(device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PagedMetadata:
        """Pick what the attention call needs from vLLM's metadata."""
        # All layers have reserved what they need, and a graph may be captured with this batch.
        dispatch.fix(self.device)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)
