"""The summary that the log has once an engine's memory is given out, and the metrics that say the same."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank

from xquant_vllm.attention import dispatch, reference
from xquant_vllm.plugin.engine_factors import factors_of
from xquant_vllm.plugin.hot.budget import hot_memory, own_layers, times_plain
from xquant_vllm.plugin.hot.worker import sequence_blocks
from xquant_vllm.plugin.load.report import LoadNotes, describe_cache, describe_layers, load_notes, tensor_parallel
from xquant_vllm.plugin.observe import metrics
from xquant_vllm.plugin.observe.board import board_of
from xquant_vllm.plugin.observe.probe import describe_probe, probe_of
from xquant_vllm.plugin.worker_class import worker_class

logger = logging.getLogger("vllm.xquant_vllm")


@functools.cache
def summarize_start() -> None:
    """Let vLLM's worker say what it holds once it has made its pages, once per process."""
    worker = worker_class()
    original = worker.initialize_from_config

    @functools.wraps(original)
    def initialize_from_config(self: Any, kv_cache_config: Any) -> Any:
        result = original(self, kv_cache_config)
        notes = load_notes(self.vllm_config.compilation_config)
        if notes.caches:
            memory = Memory(self.vllm_config, kv_cache_config)
            publish(self.vllm_config, notes, memory)
            # Ranks of tensor parallelism hold as much as the first; those of a pipeline have layers of their own.
            if get_tensor_model_parallel_rank() == 0:
                say(self.vllm_config, notes, memory)
        return result

    worker.initialize_from_config = initialize_from_config


class Memory:
    """What a rank's memory for the cache holds.

    Attributes:
        pages: bytes of the pages.
        pool: bytes of the pool of hot blocks, and of what it needs beside it.
        tokens: that pages hold, as vLLM counts them.
        hot_tokens: that the pool holds.
        times: tokens of the pages, those of a 16-bit cache in pages and pool together being 1; None where states of
            other layers take of the same memory.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        """Count it.

        Args:
            vllm_config: vLLM's configuration, with the loaded layers.
            kv_cache_config: vLLM's ``KVCacheConfig``, of the pages that were made.
        """
        hot = hot_memory(vllm_config)
        # Tensors of pages may lie upon each other, so their sizes do not add up.
        self.pages, self.pool, self.hot_tokens = hot.total - hot.taken, hot.taken, hot.tokens
        blocks = sequence_blocks(kv_cache_config.kv_cache_groups, vllm_config)
        self.tokens = int(kv_cache_config.num_blocks / blocks * vllm_config.model_config.max_model_len)
        self.times: float | None = None
        if hot.total and not getattr(vllm_config.model_config, "is_hybrid", False):
            layers, impls = own_layers(vllm_config)
            share = self.pages / (self.pages + self.pool)
            self.times = share * times_plain(layers, impls, vllm_config.model_config.dtype)


def say(vllm_config: Any, notes: LoadNotes, memory: Memory) -> None:
    """Write the summary to the log, a fact a line."""
    device = vllm_config.device_config.device_type
    for line in summary(vllm_config, notes, memory):
        logger.info("xquant: %s", line)
    fast = dispatch.select(device) is not reference
    logger.log(logging.INFO if fast else logging.WARNING, "xquant: %s", dispatch.describe(device))


def summary(vllm_config: Any, notes: LoadNotes, memory: Memory) -> Iterator[str]:
    """The lines of the summary, but for the kernels'."""
    parallel = vllm_config.parallel_config
    heads = vllm_config.model_config.get_total_num_kv_heads()
    for cache in notes.caches:
        yield from describe_cache(cache, alone=parallel.world_size == 1)
    _, header = factors_of(vllm_config)
    # Others are served with any bits.
    if header is not None and header.settings.allocation is not None and header.certificate is not None:
        yield f"measured loss of these factors {header.certificate.describe()}"
    total = memory.pages + memory.pool
    times = "" if memory.times is None else f", {memory.times:.2f}x of what 16 bit would hold in all of it"
    yield f"pages hold {memory.tokens:,} tokens{times} ({memory.pages / 2**30:.2f} of {total / 2**30:.2f} GiB)"
    yield (
        f"hot blocks: {memory.pool / 2**30:.2f} of {total / 2**30:.2f} GiB of the cache keep the keys and values of up "
        f"to {memory.hot_tokens:,} tokens in use"
        if memory.hot_tokens
        else "hot blocks: none, all sequences are attended from their pages"
    )
    for cache in notes.caches:
        yield from describe_layers(cache)
        yield from tensor_parallel(cache.formats, parallel.tensor_parallel_size, heads)
    yield from notes.remarks
    if board_of(vllm_config) is not None:
        written = "written for /metrics"
    else:
        written = "not on /metrics (without statistics of vLLM, or the server is elsewhere)"
    yield f"metrics (xquant_...) are {written}; quality probe: {describe_probe(vllm_config)}"


def publish(vllm_config: Any, notes: LoadNotes, memory: Memory) -> None:
    """Write the metrics that do not change any more."""
    board = board_of(vllm_config)
    if board is None:
        return
    cache = notes.caches[0]
    board.set(metrics.BYTES, cache.bytes_per_token)
    board.set(metrics.PLAIN_BYTES, cache.plain_bytes_per_token)
    board.set(metrics.CAPACITY, memory.tokens)
    if memory.times is not None:
        board.set(metrics.PLAIN_CAPACITY, memory.tokens / memory.times)
    board.set(metrics.HOT_CAPACITY, memory.hot_tokens)
    for metric in (metrics.HOT, metrics.COLD, metrics.PROMOTED, metrics.REMATERIALIZED):
        board.set(metric, 0)
    if probe_of(vllm_config) is not None:
        layers = [form.shape.index for form in cache.formats]
        for metric in metrics.METRICS:
            if metric.layered:
                board.begin(metric, layers)
