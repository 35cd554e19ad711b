"""Per-layer implementation: vLLM's calls handed to the kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionLayer, max_decode_query_len

from xquant_vllm.attention import dispatch, reference
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.plugin.backend.metadata import PagedMetadata
from xquant_vllm.plugin.backend.paged_impl import PagedImpl, pages_of, refuse_output_scales
from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.engine_settings import settings_of
from xquant_vllm.plugin.flash import attend_whole_for
from xquant_vllm.plugin.hot.budget import rows_on_device
from xquant_vllm.plugin.hot.worker import keep_pool_back
from xquant_vllm.plugin.load.loader import install_loader_hook
from xquant_vllm.plugin.observe.probe import probe_of
from xquant_vllm.plugin.observe.steps import count_steps
from xquant_vllm.plugin.observe.summary import summarize_start
from xquant_vllm.plugin.refusals import announced
from xquant_vllm.plugin.registration import BACKEND_NAME
from xquant_vllm.scheme.layer_scheme import LayerScheme


class XQuantImpl(PagedImpl):
    """Stores latents as codes and attends over them.

    ``scheme`` is set by the loader hook once the weights are there.
    """

    backend_name = BACKEND_NAME

    @announced()
    def __init__(self, *args: Any, sinks: torch.Tensor | None = None, **kwargs: Any) -> None:
        """Keep the layer's shape; refuse what the kernels do not do.

        Args:
            args: as vLLM hands them.
            sinks: ``[num_heads]`` of this rank, any floating dtype: see ``AttentionLayerPlan.sinks``. The model's own
                parameter, which is filled later.
            kwargs: as vLLM hands them.

        Raises:
            UnsupportedError: the model by name, and what of it is not supported.
        """
        super().__init__(*args, **kwargs)
        if sinks is not None and tuple(sinks.shape) != (self.num_heads,):
            who = self.vllm_config.model_config.architecture
            raise unsupported_model(
                f"{who} has attention sinks of shape {list(sinks.shape)}, not a number for each of a layer's "
                f"{self.num_heads} query heads, which is not supported",
                self.backend_name,
            )
        self.settings = settings_of(self.vllm_config)
        self.scheme: LayerScheme | None = None
        self._own_sinks, self._sinks = sinks, sinks
        self._attend_whole = attend_whole_for(
            self.vllm_config.model_config.dtype, self.head_size, self.num_heads, self.has_sinks, self.logits_soft_cap
        )
        self._earlier: tuple[Any, ...] = ()
        self._plans: dict[int, AttentionLayerPlan] = {}
        self._known_pages: tuple[list[torch.Tensor], tuple[torch.Tensor, ...]] = ([], ())
        self.hot_pool: Any = None
        install_loader_hook()
        keep_pool_back()
        if rows_on_device():
            from xquant_vllm.plugin.hot.gpu_steps import follow_scheduler

            follow_scheduler()
        summarize_start()
        # Around what others do to a step.
        count_steps()
        self._probe = probe_of(self.vllm_config)

    def set_scheme(self, scheme: LayerScheme, earlier: Sequence[Any]) -> None:
        """Take what surgery made of this layer. The weights are loaded by now, its sinks among them.

        Args:
            scheme: how its cache is written and read.
            earlier: vLLM's ``Attention`` of the layers whose pages are read too.
        """
        device = scheme.projection.up_key.device
        arranges = device.type != "cpu" and dispatch.select(device.type) is not reference
        self.scheme, self._earlier = scheme.on_host() if arranges else scheme, tuple(earlier)
        if self._own_sinks is not None:
            self._sinks = self._own_sinks.detach().to(device, torch.float32).contiguous()
        self._plans.clear()

    @property
    def served(self) -> Any:
        """What surgery made of this layer, for when it shall be served again after all."""
        return self.scheme, self._earlier, self._sinks

    @served.setter
    def served(self, served: Any) -> None:
        self.scheme, self._earlier, self._sinks = served
        self._plans.clear()

    @property
    def earlier_layers(self) -> int:
        """Of how many layers the pages are read too."""
        return len(self._earlier)

    @property
    def has_sinks(self) -> bool:
        """Whether the layer has attention sinks."""
        return self._sinks is not None

    def set_pool(self, pool: Any) -> None:
        """Take the layer's pool of hot blocks, a ``HotPool`` (hot/cpu.py) or ``HotGpuPool`` (hot/gpu.py)."""
        self.hot_pool = pool

    def write_hot(self, kv_cache: torch.Tensor, tokens: HotTokens) -> None:
        """Read tokens from the layer's pages and write them to its pool.

        Args:
            kv_cache: ``[num_blocks, 1, block_size, bytes_per_token]`` uint8.
            tokens: the tokens; shared by the layers of a KV cache group, which are called in their order.
        """
        chained = self.settings.method == "xquant-cl"
        before = self._earlier[-1].impl if self._earlier else None
        plan = self.plan(kv_cache.shape[2])
        self.hot_pool.write(self._pages(kv_cache), plan, tokens, self if chained else None, before)

    def plan(self, block_size: int) -> AttentionLayerPlan:
        """The layer's plan for pages of a block size; vLLM decides on it after the weights are loaded."""
        plan = self._plans.get(block_size)
        if plan is None:
            assert self.scheme is not None
            plan = self._plans[block_size] = self.scheme.plan(
                block_size,
                [attention.impl.scheme.format for attention in self._earlier],
                num_heads=self.num_heads,
                scale=self.scale,
                sliding_window=self.sliding_window,
                logits_soft_cap=self.logits_soft_cap,
                sinks=self._sinks,
                exact_from=self._exact_from,
                attend_whole=self._attend_whole,
            )
        return plan

    @property
    def _exact_from(self) -> int | None:
        """More query tokens than a decoding sequence has are a prompt's."""
        if self.settings.prompt == "cached":
            return None
        return 1 + max_decode_query_len(self.vllm_config)

    def reserve(self, block_size: int, device: torch.device) -> None:
        """Take the memory that the kernels need for the largest batch.

        Args:
            block_size: slots per page.
            device: where.
        """
        scheduler = self.vllm_config.scheduler_config
        dtype = self.vllm_config.model_config.dtype
        tokens = scheduler.max_num_batched_tokens
        dispatch.reserve(self.plan(block_size), tokens, scheduler.max_num_seqs, dtype, device)

    def _pages(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The layer's own pages and those that it reads too; all go by one block table.

        The same tuple as long as vLLM's tensors are the same, so that kernels look at it once.
        """
        caches = [kv_cache, *(attention.kv_cache for attention in self._earlier)]
        known, pages = self._known_pages
        if len(known) != len(caches) or any(a is not b for a, b in zip(known, caches, strict=True)):
            pages = tuple(map(pages_of, caches))
            self._known_pages = (caches, pages)
        return pages

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
        """Attend over the pages; the latents of this call are already stored.

        Args:
            layer: the calling layer.
            query: ``[num_tokens, num_heads, head_size]``, after RoPE.
            key: key latents (or the layer input, padded) ``[num_tokens, heads, head_size]``; read where prompts attend
                to their own tokens exactly.
            value: value latents, likewise.
            kv_cache: ``[num_blocks, 1, block_size, bytes_per_token]`` uint8.
            attn_metadata: the batch; None in profiling runs.
            output: ``[num_tokens, num_heads, head_size]``, written.
            output_scale: not supported.
            output_block_scale: not supported.
        """
        refuse_output_scales(BACKEND_NAME, output_scale, output_block_scale)
        if attn_metadata is None:
            # vLLM measures what is left for the cache: what the kernels need must be there by now.
            self.reserve(self.vllm_config.cache_config.block_size, query.device)
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        kernels = dispatch.select(query.device.type)
        plan = self.plan(kv_cache.shape[2])
        inputs = None
        assert self.scheme is not None
        if plan.exact_from is not None:
            inputs = self.scheme.inputs(key[:tokens], value[:tokens])
        pages = self._pages(kv_cache)
        if self._probe is not None and self._probe.is_due():
            exact = self.scheme.inputs(key[:tokens], value[:tokens])
            self._probe.measure(self, self.scheme.queries(query[:tokens]), pages, plan, attn_metadata.batch, exact)
        query, rows = self.scheme.queries(query[:tokens]), output[:tokens]
        hot = attn_metadata.hot
        if hot is not None and self.hot_pool is not None:
            self.write_hot(kv_cache, hot.written)
            if hot.hot is not None:
                self.hot_pool.attend(query, pages, plan, hot, rows, inputs)
                return output
        kernels.paged_attention(query, pages, plan, attn_metadata.batch, rows, inputs)
        return output

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store latents of new tokens.

        Args:
            layer: the calling layer.
            key: key latents (or the layer input, padded) ``[num_tokens, heads, head_size]``, possibly a slice.
            value: value latents, likewise.
            kv_cache: ``[num_blocks, 1, block_size, bytes_per_token]`` uint8.
            slot_mapping: ``[num_tokens]`` int64; negative entries are padding.
        """
        kernels = dispatch.select(key.device.type)
        assert self.scheme is not None
        plan = self.plan(kv_cache.shape[2])
        kernels.store(self._pages(kv_cache), plan, slot_mapping, self.scheme.inputs(key, value))
