"""Memory for the pool of hot blocks, taken from what vLLM gives to the cache.

vLLM asks a worker how much memory there is for the cache and makes pages of all of it. Where the model is served from
a CPU, the answer is lowered by the pool's bytes, and the log says what is left.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from xquant_vllm.attention.hot.policy import HotCounts, HotMap
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.errors import SettingsError
from xquant_vllm.plugin.registration import BACKEND_NAME
from xquant_vllm.scheme.formats import LayerFormat
from xquant_vllm.scheme.hot_share import DEFAULT_SHARE, pool_bytes
from xquant_vllm.scheme.settings import XQuantSettings

logger = logging.getLogger("vllm.xquant_vllm")


@dataclass
class HotMemory:
    """What was kept back for an engine.

    Attributes:
        tokens: of every layer, that fit the pool; 0 until vLLM asks for the memory, and without a pool.
        maps: of the KV cache groups, by the address of their block table, with the step that was planned last.
    """

    tokens: int = 0
    maps: dict[int, tuple[HotMap, Any, Any]] = field(default_factory=dict)

    def take(self, memory: int, per_token: int) -> int:
        """Take whole tokens of so many bytes each out of ``memory``; the bytes that they take."""
        self.tokens = memory // per_token
        return self.tokens * per_token


@dataclass(frozen=True)
class PageNeeds:
    """What vLLM's pages take of the memory.

    Attributes:
        block_bytes: bytes of a block in all layers of a KV cache group; groups share the memory.
        sequence_blocks: blocks of one sequence of ``--max-model-len`` in all groups.
        max_model_len: its tokens.
    """

    block_bytes: int
    sequence_blocks: int
    max_model_len: int

    @property
    def least(self) -> int:
        """Bytes without which vLLM refuses to start: one sequence, and the block that it gives to nobody."""
        return (self.sequence_blocks + 1) * self.block_bytes

    def tokens(self, memory: int) -> int:
        """What vLLM calls the size of a cache of so many bytes."""
        return int(memory // self.block_bytes / self.sequence_blocks * self.max_model_len)


@per_object
def hot_memory(vllm_config: Any) -> HotMemory:
    """Of an engine."""
    return HotMemory()


def hot_setting(settings: XQuantSettings, formats: Sequence[LayerFormat]) -> int | float:
    """The user's setting, or the default: none where all layers hold latents per head, which are fast in pages."""
    if settings.hot is not None:
        return settings.hot
    return DEFAULT_SHARE if any(_slow_in_pages(form) for form in formats) else 0


def _slow_in_pages(form: LayerFormat) -> bool:
    """Whether all kv heads multiply one wide latent: the layer input, or latents with a joint basis."""
    return form.holds != "latents" or any(stream.num_heads < form.shape.num_kv_heads for stream in form.streams)


def unsupported(dtype: torch.dtype, head_sizes: Sequence[int]) -> str | None:
    """Why vLLM's kernel cannot attend to the pool, or None."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if dtype not in CPUAttentionBackend.supported_dtypes:
        return f"vLLM's CPU_ATTN does not support {dtype}"
    known = CPUAttentionBackend.get_supported_head_sizes()
    for size in head_sizes:
        if size not in known:
            return f"vLLM's CPU_ATTN does not support heads of {size} channels"
    return None


def keep_pool_back() -> None:
    """Let vLLM's CPU worker keep the pool's bytes out of the cache's memory, once per process.

    It also empties the maps where it copies pages, and says at its end what the pool was good for.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_worker import CPUWorker

    original = CPUWorker.determine_available_memory
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def determine_available_memory(self: Any) -> int:
        total = original(self)
        return total - take_pool(self.vllm_config, total, lambda: _page_needs(self))

    execute = CPUWorker.execute_model

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        if scheduler_output.kv_cache_block_copies:
            # A prefix ends within a block, which vLLM copies: the one page that the store does not write.
            for hot_map, *_ in hot_memory(self.vllm_config).maps.values():
                hot_map.clear()
        return execute(self, scheduler_output)

    end = CPUWorker.shutdown

    @functools.wraps(end)
    def shutdown(self: Any) -> Any:
        for hot_map, *_ in hot_memory(self.vllm_config).maps.values():
            say_counts(hot_map, hot_map.counts, "in all")
        return end(self)

    CPUWorker.determine_available_memory = determine_available_memory
    CPUWorker.execute_model = execute_model
    CPUWorker.shutdown = shutdown


def take_pool(vllm_config: Any, total: int, page_needs: Callable[[], PageNeeds]) -> int:
    """Decide how large the pool of an engine is, and say so.

    A pool that nobody asked for leaves enough for pages of one sequence of ``--max-model-len``, without which vLLM
    would not start.

    Args:
        vllm_config: vLLM's configuration, with the loaded layers.
        total: bytes for pages and pool together.
        page_needs: what the pages take.

    Returns:
        The pool's bytes; 0 without.

    Raises:
        SettingsError: no memory would be left for pages.
    """
    layers = [x for x in vllm_config.compilation_config.static_forward_context.values() if isinstance(x, Attention)]
    impls = [x.impl for x in layers if x.attn_backend.get_name() == BACKEND_NAME]
    impls = [impl for impl in impls if impl.scheme is not None]
    if not impls:
        return 0
    formats = [impl.scheme.format for impl in impls]
    asked = impls[0].settings.hot
    setting = hot_setting(impls[0].settings, formats)
    if not setting:
        return 0
    dtype = vllm_config.model_config.dtype
    reason = unsupported(dtype, sorted({impl.head_size for impl in impls}))
    if reason is not None:
        logger.info("xquant: hot blocks are off: %s", reason)
        return 0
    wanted = pool_bytes(setting, total)
    if wanted >= total:
        raise SettingsError(
            f"xquant: setting 'hot': {setting} cannot work: of {total} bytes for the cache none would be left for "
            "pages; set less, or give more memory (--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE)"
        )
    needs = page_needs()
    # With --max-model-len auto vLLM takes what the pages can hold.
    if asked is None and vllm_config.model_config.original_max_model_len != -1:
        wanted = max(0, min(wanted, total - needs.least))
    per_token = dtype.itemsize * 2 * sum(impl.num_kv_heads * impl.head_size for impl in impls)
    # One block is the null block's, which is never hot.
    if wanted // per_token < 2 * vllm_config.cache_config.block_size:
        logger.warning(
            "xquant: hot blocks are off: of %.2f GiB of cache the pool would be %s bytes, less than a block%s; "
            "sequences are attended from their pages, which is slow; give more memory (--kv-cache-memory-bytes, "
            "VLLM_CPU_KVCACHE_SPACE)",
            total / 2**30,
            f"{wanted:,}",
            ""
            if asked is not None
            else f", so that pages hold one sequence of --max-model-len {needs.max_model_len:,}",
        )
        return 0
    memory = hot_memory(vllm_config)
    taken = memory.take(wanted, per_token)
    _say(memory.tokens, taken, total, needs, (total - taken) / total * _times_plain(layers, impls, dtype))
    return taken


def say_counts(hot_map: HotMap, counts: HotCounts, when: str) -> None:
    """What the log says of steps.

    Args:
        hot_map: of a KV cache group.
        counts: sums over its steps.
        when: which steps.
    """
    logger.info(
        "xquant: hot blocks: %s %s rows of batches were attended from the pool and %s from pages; %s new and %s "
        "promoted tokens were written to the pool%s",
        when,
        *(f"{number:,}" for number in (counts.hot_rows, counts.cold_rows, counts.new_tokens, counts.promoted_tokens)),
        "" if hot_map.window is None else f" (layers with windows of {hot_map.window:,} tokens)",
    )


def _page_needs(worker: Any) -> PageNeeds:
    """As vLLM will find when it makes pages."""
    from vllm.v1.core import kv_cache_utils

    config = worker.vllm_config
    # A copy, because specs may be unified in place.
    groups = kv_cache_utils.get_kv_cache_groups(config, dict(worker.get_kv_cache_spec()))
    block = kv_cache_utils._pool_bytes_per_block(config, groups)
    longest = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
    return PageNeeds(block, longest // block, config.model_config.max_model_len)


def _times_plain(layers: Sequence[Any], impls: Sequence[Any], dtype: torch.dtype) -> float:
    """How many times the tokens of a 16-bit cache pages of all layers hold in the same memory."""
    plain = sum(4 * layer.impl.num_kv_heads * layer.impl.head_size for layer in layers)
    kept = [layer.impl for layer in layers if layer.impl not in impls]
    ours = sum(impl.scheme.format.bytes_per_token for impl in impls)
    return plain / (ours + sum(2 * dtype.itemsize * impl.num_kv_heads * impl.head_size for impl in kept))


def _say(tokens: int, taken: int, total: int, needs: PageNeeds, capacity: float) -> None:
    """What the log says of the pool."""
    logger.info(
        "xquant: hot blocks: %.2f of %.2f GiB of the cache keep the keys and values of up to %s tokens in use; pages "
        "hold %s tokens, %.2fx of what 16 bit would hold in all of it",
        taken / 2**30,
        total / 2**30,
        f"{tokens:,}",
        f"{needs.tokens(total - taken):,}",
        capacity,
    )
    if tokens < needs.max_model_len:
        logger.warning(
            "xquant: the pool of hot blocks holds %s tokens, fewer than one sequence of --max-model-len %s: longer "
            "sequences are attended from their pages, which is slow; set more, for example "
            '--additional-config \'{"xquant": {"hot": "40%%"}}\'',
            f"{tokens:,}",
            f"{needs.max_model_len:,}",
        )
