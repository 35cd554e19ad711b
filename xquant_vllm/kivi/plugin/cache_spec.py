"""Tell vLLM's allocator what a layer's quantized pages take."""

from dataclasses import replace
from typing import Any

import torch

from xquant_vllm.kivi.pages import QuantizedLayout


def publish_pages(attention: Any, layout: QuantizedLayout) -> None:
    """Make a layer report its quantized pages.

    Args:
        attention: vLLM's ``Attention``; its ``get_kv_cache_spec`` is replaced on this instance, since block size and
            bytes depend on the settings.
        layout: the pages' layout.
    """
    original = type(attention).get_kv_cache_spec.__get__(attention)

    def get_kv_cache_spec(vllm_config: Any) -> Any:
        return replace(
            original(vllm_config),
            block_size=layout.block_size,
            dtype=torch.uint8,
            num_head_slots=1,
            state_content_bytes=layout.bytes_per_token,
        )

    attention.get_kv_cache_spec = get_kv_cache_spec
