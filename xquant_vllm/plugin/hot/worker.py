"""What vLLM's worker does for hot blocks: it keeps their memory back, and says at its end what they were good for."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from xquant_vllm.attention.hot.policy import HotMap
from xquant_vllm.plugin.connectors.transfers import blocks_written
from xquant_vllm.plugin.hot.budget import hot_memory, rows_on_device, take_pool
from xquant_vllm.plugin.hot.log import say_counts
from xquant_vllm.plugin.worker_class import worker_class
from xquant_vllm.scheme.hot_pool import PageNeeds


@functools.cache
def keep_pool_back() -> None:
    """Let vLLM's worker keep the pool's bytes out of the cache's memory, once per process.

    It also says at its end what the pool was good for, and on CPUs lets the maps forget what something else than the
    store writes; on a GPU gpu_steps.py does that.
    """
    worker = worker_class()
    original, end = worker.determine_available_memory, worker.shutdown

    @functools.wraps(original)
    def determine_available_memory(self: Any) -> int:
        total = original(self)
        take_pool(self.vllm_config, total, lambda: _page_needs(self))
        return hot_memory(self.vllm_config).share(total)

    @functools.wraps(end)
    def shutdown(self: Any) -> Any:
        for hot_map in hot_maps(self.vllm_config):
            say_counts(hot_map, hot_map.counts, "in all")
        return end(self)

    worker.determine_available_memory = determine_available_memory
    worker.shutdown = shutdown
    if not rows_on_device():
        _forget_what_others_write(worker)


def _forget_what_others_write(worker: Any) -> None:
    original = worker.execute_model

    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        for hot_map in hot_maps(self.vllm_config):
            forget_written(hot_map, scheduler_output)
        return original(self, scheduler_output)

    worker.execute_model = execute_model


def forget_written(hot_map: HotMap, scheduler_output: Any) -> None:
    """Let a map forget the blocks that something else than the store writes, before the step in which that begins.

    Such are blocks that vLLM copies, because a prefix ends within one, and those that a KV connector reads.

    Args:
        hot_map: of a KV cache group; all groups take their blocks from one pool.
        scheduler_output: vLLM's ``SchedulerOutput`` of the step.
    """
    written = blocks_written(scheduler_output.kv_connector_metadata)
    if scheduler_output.kv_cache_block_copies or written is None:
        hot_map.clear()
    elif written:
        hot_map.forget(np.array(written, np.int64))


def hot_maps(vllm_config: Any) -> Sequence[HotMap]:
    """What is hot, of an engine."""
    if not rows_on_device():
        return [hot_map for hot_map, *_ in hot_memory(vllm_config).maps.values()]
    from xquant_vllm.plugin.hot.gpu import hot_engine

    return [group.hot_map for group in hot_engine(vllm_config).groups.values()]


def _page_needs(worker: Any) -> PageNeeds:
    """As vLLM will find when it makes pages."""
    # vLLM 0.33 has a module of its own for it.
    known = importlib.util.find_spec("vllm.v1.core.kv_cache_planning") is not None
    planning = importlib.import_module(f"vllm.v1.core.{'kv_cache_planning' if known else 'kv_cache_utils'}")
    config = worker.vllm_config
    # A copy, because specs may be unified in place.
    groups = planning.get_kv_cache_groups(config, dict(worker.get_kv_cache_spec()))
    block = planning._pool_bytes_per_block(config, groups)
    return PageNeeds(block, sequence_blocks(groups, config), config.model_config.max_model_len)


def sequence_blocks(groups: Sequence[Any], config: Any) -> int:
    """Blocks of one sequence of ``--max-model-len`` in all KV cache groups, whose blocks come from one pool."""
    return sum(_most_blocks(group.kv_cache_spec, config) for group in groups if not group.host_resident)


def _most_blocks(spec: Any, config: Any) -> int:
    """Blocks of one sequence of ``--max-model-len`` in a KV cache group; groups take them from one pool."""
    if hasattr(spec, "max_memory_usage_pages"):  # of layers whose pages differ
        return spec.max_memory_usage_pages(config)
    return -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes)
