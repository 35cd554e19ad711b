"""Tell vLLM's allocator how many bytes a token of a layer takes."""

from dataclasses import replace
from typing import Any

import torch


def publish_page_size(attention: Any, bytes_per_token: int) -> None:
    """Make a layer report pages of its own size, so that every byte is counted and none is allocated in vain.

    Args:
        attention: vLLM's ``Attention``; its ``get_kv_cache_spec`` is replaced on this instance, since the size depends
            on the layer and vLLM's hook for backends is a class method that knows neither layer nor settings.
        bytes_per_token: bytes of a token's slot.
    """
    original = type(attention).get_kv_cache_spec.__get__(attention)

    def get_kv_cache_spec(vllm_config: Any) -> Any:
        spec = original(vllm_config)
        return replace(spec, dtype=torch.uint8, num_head_slots=1, state_content_bytes=bytes_per_token)

    attention.get_kv_cache_spec = get_kv_cache_spec
