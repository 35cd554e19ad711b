"""Memory for the pool of hot blocks, taken from what vLLM gives to the cache.

vLLM asks a worker how much memory there is for the cache and makes pages of all of it. The answer is lowered by the
pool's bytes, and on a GPU by those of the buffers that writing to it takes; the log says what is left.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from xquant_vllm.attention import dispatch
from xquant_vllm.attention.hot.policy import HotMap
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.errors import SettingsError
from xquant_vllm.plugin.registration import BACKEND_NAME
from xquant_vllm.scheme.hot_pool import PageNeeds, pool_share, pool_tokens, wanted_bytes

logger = logging.getLogger("vllm.xquant_vllm")


@dataclass
class HotMemory:
    """What was kept back for an engine.

    Attributes:
        tokens: of every layer, that fit the pool; 0 until vLLM asks for the memory, and without a pool.
        total: bytes for pages and pool together; 0 until vLLM asks for the memory.
        taken: bytes of the pool, and of what it needs beside it.
        maps: of the KV cache groups, by the address of their block table, with the step that was planned last.
    """

    tokens: int = 0
    total: int = 0
    taken: int = 0
    maps: dict[int, tuple[HotMap, Any, Any]] = field(default_factory=dict)

    def share(self, total: int) -> int:
        """Note what there is for pages and pool; what is left for pages."""
        self.total = total
        return total - self.taken

    def take(self, memory: int, per_token: int, shared: int = 0) -> int:
        """Take whole tokens of so many bytes each out of ``memory``, and ``shared`` bytes; all bytes that are taken."""
        self.tokens = memory // per_token
        self.taken = self.tokens * per_token + shared
        return self.taken


@per_object
def hot_memory(vllm_config: Any) -> HotMemory:
    """Of an engine."""
    return HotMemory()


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


def of_a_draft(impl: Any, vllm_config: Any) -> bool:
    """Whether a layer belongs to a draft model, which takes steps between those of the model that it drafts for.

    What is hot is planned once per step, so a draft's layers are attended from their pages.
    """
    return vllm_config.speculative_config is not None and (
        impl.vllm_config.attention_config is not vllm_config.attention_config
    )


def rows_on_device() -> bool:
    """Whether kernels find out which rows are hot: where the Triton kernels run, interpreted ones included."""
    return hasattr(dispatch.select("cpu" if _on_cpu() else "cuda"), "HOT_ROWS_ON_DEVICE")


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def take_pool(vllm_config: Any, total: int, page_needs: Callable[[], PageNeeds]) -> int:
    """Decide how large the pool of an engine is, and warn of one that is too small.

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
    _, impls = own_layers(vllm_config)
    if not impls:
        return 0
    formats = [impl.scheme.format for impl in impls]
    asked = impls[0].settings.hot
    setting = pool_share(asked, formats)
    if not setting or (asked is None and (rows_on_device() or not _on_cpu())):  # on GPUs no default was measured
        return 0
    dtype = vllm_config.model_config.dtype
    reason, shared = _on_platform(vllm_config, impls)
    if reason is not None:
        logger.info("xquant: hot blocks are off: %s", reason)
        return 0
    if wanted_bytes(setting, total, None) + shared >= total:
        raise SettingsError(
            f"xquant: setting 'hot': {setting} cannot work: of {total} bytes for the cache none would be left for "
            "pages; set less, or give more memory (--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE)"
        )
    needs = page_needs()
    # With --max-model-len auto vLLM takes what the pages can hold.
    gives_way = asked is None and vllm_config.model_config.original_max_model_len != -1
    wanted = wanted_bytes(setting, total, needs.least if gives_way else None)
    per_token = dtype.itemsize * 2 * sum(impl.num_kv_heads * impl.head_size for impl in impls)
    if not pool_tokens(wanted, per_token, vllm_config.cache_config.block_size):
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
    taken = memory.take(wanted, per_token, shared)
    if memory.tokens < needs.max_model_len:
        logger.warning(
            "xquant: the pool of hot blocks holds %s tokens, fewer than one sequence of --max-model-len %s: longer "
            "sequences are attended from their pages, which is slow; set more, for example "
            '--additional-config \'{"xquant": {"hot": "40%%"}}\'',
            f"{memory.tokens:,}",
            f"{needs.max_model_len:,}",
        )
    return taken


def own_layers(vllm_config: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """All attention layers, and the implementations of those of the served model that are compressed."""
    layers = [x for x in vllm_config.compilation_config.static_forward_context.values() if isinstance(x, Attention)]
    impls = [x.impl for x in layers if x.attn_backend.get_name() == BACKEND_NAME]
    return layers, [impl for impl in impls if impl.scheme is not None and not of_a_draft(impl, vllm_config)]


def _on_platform(vllm_config: Any, impls: Sequence[Any]) -> tuple[str | None, int]:
    """Why the platform's kernel cannot attend to the pool, or None, and bytes of what the pool needs beside itself."""
    dtype = vllm_config.model_config.dtype
    if not rows_on_device():
        if not _on_cpu():
            return "the kernels for GPUs do not run", 0
        return unsupported(dtype, sorted({impl.head_size for impl in impls})), 0
    if vllm_config.model_config.enable_sleep_mode:
        return "--enable-sleep-mode discards what the pool holds, and where it is", 0
    from xquant_vllm.plugin.hot.flash import flash_unsupported
    from xquant_vllm.plugin.hot.gpu_memory import shared_bytes

    reason = flash_unsupported(dtype, impls, vllm_config.cache_config.block_size)
    return reason, 0 if reason is not None else shared_bytes(vllm_config)


def times_plain(layers: Sequence[Any], impls: Sequence[Any], dtype: torch.dtype) -> float:
    """How many times the tokens of a 16-bit cache pages of all layers hold in the same memory."""
    plain = sum(4 * layer.impl.num_kv_heads * layer.impl.head_size for layer in layers)
    kept = [layer.impl for layer in layers if layer.impl not in impls]
    ours = sum(impl.scheme.format.bytes_per_token for impl in impls)
    return plain / (ours + sum(2 * dtype.itemsize * impl.num_kv_heads * impl.head_size for impl in kept))
