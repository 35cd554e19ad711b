"""What the implementations of this package's backends have in common: a layer's shape, and what is refused."""

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from xquant_vllm.plugin.backend.frame_room import give_forward_room
from xquant_vllm.plugin.backend.metadata import PagedMetadata
from xquant_vllm.plugin.backend.warm_up import WARM_UP
from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.ranks import check_rank


class PagedImpl(AttentionImpl[PagedMetadata]):
    """A layer that attends over pages of its own format."""

    backend_name: ClassVar[str]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **unsupported: Any,
    ) -> None:
        """Keep the layer's shape; refuse what the kernels do not do.

        Raises:
            UnsupportedError: the model by name, and what of it is not supported.
            SettingsError: this rank is not set up like its engine.
        """
        self.vllm_config = get_current_vllm_config()
        check_rank(self.vllm_config)
        who = self.vllm_config.model_config.architecture
        if alibi_slopes is not None:
            raise unsupported_model(f"{who} uses ALiBi, which is not supported", self.backend_name)
        if kv_sharing_target_layer_name is not None:
            raise unsupported_model(
                f"{who} has a layer that shares the cache of {kv_sharing_target_layer_name}, which is not supported",
                self.backend_name,
            )
        if attn_type != AttentionType.DECODER:
            raise unsupported_model(f"{who} has {attn_type} layers, which are not supported", self.backend_name)
        for name, value in unsupported.items():
            if value is not None:
                raise unsupported_model(
                    f"{who} asks its attention for {name}, which is not supported", self.backend_name
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or None
        give_forward_room()
        WARM_UP.register_warmup()


def pages_of(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache that vLLM binds, as ``[num_blocks, page_bytes]``, without a copy."""
    return kv_cache.view(kv_cache.shape[0], -1)


def refuse_output_scales(backend_name: str, *scales: torch.Tensor | None) -> None:
    """Refuse scales of an attention output that shall be quantized in the same call.

    Raises:
        NotImplementedError: one is given.
    """
    if any(scale is not None for scale in scales):
        raise NotImplementedError(
            f"{backend_name.lower()}: fused quantization of the attention output is not supported"
        )
