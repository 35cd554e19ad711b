"""Per-batch metadata of the backends."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from xquant_vllm.attention import dispatch
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.hot.policy import HotMap
from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.backend.wrappers import PACKAGE, raise_for_wrapper
from xquant_vllm.plugin.builders import builders_of
from xquant_vllm.plugin.hot.budget import of_a_draft, rows_on_device
from xquant_vllm.plugin.hot.cpu import HotBuilder
from xquant_vllm.plugin.refusals import announced


@dataclass
class PagedMetadata(AttentionMetadata):
    """One batch, shared by the layers of a KV cache group.

    Attributes:
        num_actual_tokens: query tokens without padding.
        batch: the sequences.
        hot: what is done with hot blocks, a ``HotBatch`` (hot/cpu.py) or ``HotGpuBatch`` (hot/gpu.py); None without a
            pool.
    """

    num_actual_tokens: int
    batch: AttentionBatch
    hot: Any = None


class PagedMetadataBuilder(AttentionMetadataBuilder[PagedMetadata]):
    """Builds :class:`PagedMetadata`; reads nothing back from a device.

    Attributes:
        decode_tokens: query tokens of a decoding sequence at most: one, and those drafted for it.
    """

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """Keep what vLLM keeps; refuse a builder that others derive, which may tell other positions than tokens have.

        Raises:
            UnsupportedError: the class is none of this package.
        """
        if not type(self).__module__.startswith(f"{PACKAGE}."):
            raise_for_wrapper(type(self))
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        refuse_bypass(self.layers)
        builders_of(vllm_config.compilation_config)[tuple(layer_names)] = self
        self.decode_tokens = max_decode_query_len(vllm_config)
        if device.type == "cuda":
            # vLLM puts decoding sequences first.
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """Batches whose sequences have the same few query tokens: their launches depend on nothing else."""
        return AttentionCGSupport.UNIFORM_BATCH

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PagedMetadata:
        """Pick what the attention call needs from vLLM's metadata.

        Raises:
            UnsupportedError: tokens shall see what comes after them.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedError("xquant: a batch that is not causal was asked for, which no backend here supports")
        return PagedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            batch=AttentionBatch(
                common.query_start_loc,
                common.seq_lens,
                common.block_table_tensor,
                common.max_query_len,
                self._lengths(common),
                self.decode_tokens,
            ),
        )

    def _lengths(self, common: CommonAttentionMetadata) -> tuple[tuple[int, int], ...] | None:
        """Query tokens and cached tokens of every sequence, as the host knows them; None where all decode.

        vLLM may not know yet how many drafted tokens a decoding sequence kept, but it knows of one that prefills.
        """
        if common.max_query_len <= self.decode_tokens or common.seq_lens_cpu_upper_bound is None:
            return None
        query_lens = (common.query_start_loc_cpu[1:] - common.query_start_loc_cpu[:-1]).tolist()
        return tuple(zip(query_lens, common.seq_lens_cpu_upper_bound[: len(query_lens)].tolist(), strict=True))


class XQuantMetadataBuilder(PagedMetadataBuilder):
    """Makes sure that every layer has its projections and its memory."""

    @announced()
    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """Check that the loader hook saw every layer: latents cannot be attended without their projections."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = self.layers
        missed = [name for name, layer in layers.items() if layer.impl.scheme is None]
        if missed:
            raise UnsupportedError(
                f"xquant: the weights of {missed[0]} (and {len(missed) - 1} more layers) were never factorized: "
                f"--load-format {vllm_config.load_config.load_format} loads without vLLM's post-processing of weights; "
                "use --load-format auto"
            )
        block_size = kv_cache_spec.block_size
        for layer in layers.values():
            layer.impl.reserve(block_size, device)
        self._steps = dispatch.steps([layer.impl.plan(block_size) for layer in layers.values()], device)
        own = {name: layer.impl for name, layer in layers.items() if not of_a_draft(layer.impl, vllm_config)}
        self._some_without_pool = len(own) < len(layers)
        # How many layers see how many tokens back.
        self._windows = Counter(impl.sliding_window for impl in own.values())
        self._hot: HotBuilder | None = None
        self._hot_gpu: Any = None
        if own and rows_on_device():
            from xquant_vllm.plugin.hot.gpu import HotGpuBuilder

            self._hot_gpu = HotGpuBuilder.make(kv_cache_spec, list(own), list(own.values()), vllm_config, device)
        elif own and device.type == "cpu":
            self._hot = HotBuilder.make(kv_cache_spec, list(own.values()), vllm_config)

    @property
    def attended(self) -> tuple[Mapping[int | None, int], HotMap | None]:
        """How many layers there are by window, those of a draft left out, and what is hot of them; None without."""
        hot = self._hot if self._hot_gpu is None else self._hot_gpu
        return self._windows, None if hot is None else hot.hot_map

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PagedMetadata:
        """Pick what the attention call needs from vLLM's metadata."""
        # All layers have reserved what they need, and a graph may be captured with this batch.
        dispatch.fix(self.device)
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self._hot_gpu is not None:
            hot = self._hot_gpu.build(common_attn_metadata, metadata.batch)
            if hot.cold is not None and hot.hot is not None:
                hot = replace(hot, cold=self._steps(hot.cold))
            # Layers of a draft model have no pool, nor has any if nothing is hot.
            if hot.hot is None or self._some_without_pool:
                metadata = replace(metadata, batch=self._steps(metadata.batch))
            return replace(metadata, hot=hot)
        hot = None if self._hot is None else self._hot.build(common_attn_metadata)
        return replace(metadata, batch=self._steps(metadata.batch), hot=hot)


def refuse_bypass(layers: dict[str, Any]) -> None:
    """Refuse layers whose cache the model writes itself; vLLM has such from 0.33 on.

    Raises:
        UnsupportedError: the layer by name.
    """
    for name, layer in layers.items():
        if getattr(layer, "kv_cache_update_bypass", False):
            raise UnsupportedError(
                f"xquant: the model itself writes keys and values of {name} to the cache (kv_cache_update_bypass), in "
                "a format that no backend here reads; use another attention backend for this model"
            )
