"""Per-layer implementation: vLLM's calls handed to the kernels."""

from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.v1.attention.backend import AttentionLayer

from xquant_vllm.kivi import dispatch
from xquant_vllm.kivi.plan import KiviBatch, KiviLayerPlan
from xquant_vllm.kivi.plugin.loader import install_loader_hook
from xquant_vllm.kivi.plugin.settings import layouts_of, settings_of
from xquant_vllm.plugin.backend.metadata import PagedMetadata
from xquant_vllm.plugin.backend.paged_impl import PagedImpl, pages_of, refuse_output_scales
from xquant_vllm.plugin.refusals import announced
from xquant_vllm.plugin.registration import KIVI_BACKEND_NAME
from xquant_vllm.projection.rope import RotaryTable


class KiviImpl(PagedImpl):
    """Stores keys and values as codes and the most recent ones as they are, and attends over both.

    ``residual_name`` is set by the loader hook once the weights are there.
    """

    backend_name = KIVI_BACKEND_NAME

    @announced()
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Keep the layer's shape; refuse what the kernels do not do."""
        super().__init__(*args, **kwargs)
        self.settings = settings_of(self.vllm_config)
        quantized, residual = layouts_of(self.vllm_config, self.settings, self.num_kv_heads, self.head_size)
        self.plan = KiviLayerPlan(
            quantized,
            residual,
            num_heads=self.num_heads,
            scale=self.scale,
            residual_tokens=self.settings.residual,
            exact_step=self.settings.prompt == "exact",
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
        )
        self.residual_name: str | None = None
        install_loader_hook()

    def set_residual(self, name: str, rope: RotaryTable | None) -> None:
        """Take what the loader hook found out.

        Args:
            name: of the residual in vLLM's table of layers.
            rope: rotates keys when they are read; None if the model has rotated them.
        """
        self.residual_name, self.plan = name, replace(self.plan, rope=rope)

    def reserve(self, device: torch.device) -> None:
        """Take the memory that the kernels need for the largest batch."""
        scheduler, dtype = self.vllm_config.scheduler_config, self.vllm_config.model_config.dtype
        dispatch.reserve(self.plan, scheduler.max_num_batched_tokens, scheduler.max_num_seqs, dtype, device)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PagedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over the pages; the keys and values of this call are already stored.

        Args:
            layer: the calling layer.
            query: ``[num_tokens, num_heads, head_size]``, after RoPE.
            key: unused here.
            value: unused here.
            kv_cache: ``[num_blocks, 1, block_size, bytes_per_token]`` uint8.
            attn_metadata: the batch; None in profiling runs.
            output: ``[num_tokens, num_heads, head_size]``, written.
            output_scale: not supported.
            output_block_scale: not supported.
        """
        refuse_output_scales(KIVI_BACKEND_NAME, output_scale, output_block_scale)
        if attn_metadata is None:
            # vLLM measures what is left for the cache: what the kernels need must be there by now.
            self.reserve(query.device)
            return output.zero_()
        batch, residual_pages, _ = self._residual(attn_metadata)
        tokens = attn_metadata.num_actual_tokens
        dispatch.select(query.device.type).paged_attention(
            query[:tokens], pages_of(kv_cache), residual_pages, self.plan, batch, output[:tokens]
        )
        return output

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store keys and values of new tokens.

        Args:
            layer: the calling layer.
            key: ``[num_tokens, num_kv_heads, head_size]``, after RoPE, or before it with ``pre_rope``.
            value: likewise.
            kv_cache: ``[num_blocks, 1, block_size, bytes_per_token]`` uint8.
            slot_mapping: ``[num_tokens]`` int64; negative entries are padding.
        """
        metadata = get_attention_context(layer.layer_name)[0]
        if metadata is None:
            return
        batch, residual_pages, residual_slots = self._residual(metadata)
        dispatch.select(key.device.type).store(
            pages_of(kv_cache), residual_pages, self.plan, batch, slot_mapping, residual_slots, key, value
        )

    def _residual(self, metadata: PagedMetadata) -> tuple[KiviBatch, torch.Tensor, torch.Tensor]:
        """The batch with the residual's block table, the residual's pages and its slot mapping."""
        assert self.residual_name is not None
        residual, _, kv_cache, slot_mapping = get_attention_context(self.residual_name)
        return KiviBatch(metadata.batch, residual.batch.block_table), pages_of(kv_cache), slot_mapping
