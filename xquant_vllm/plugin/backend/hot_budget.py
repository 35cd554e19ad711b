"""Memory for the pool of hot blocks, taken from what vLLM gives to the cache.

vLLM asks a worker how much memory there is for the cache and makes pages of all of it. The answer is lowered by the
pool's bytes, and on a GPU by those of the buffers that writing to it takes; the log says what is left.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from xquant_vllm.attention import dispatch
from xquant_vllm.attention.hot.policy import HotMap
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
        tokens: of every layer, that fit the pool.
        maps: of the KV cache groups, by the address of their block table, with the step that was planned last.
    """

    tokens: int
    maps: dict[int, tuple[HotMap, Any, Any]]

    def keep(self, tokens: int) -> None:
        """Keep so many."""
        self.tokens = tokens


@per_object
def hot_memory(vllm_config: Any) -> HotMemory:
    """Of an engine; filled when vLLM asks for the memory."""
    return HotMemory(0, {})


def hot_setting(settings: XQuantSettings, formats: Sequence[LayerFormat]) -> int | float:
    """The user's setting, or the default: none where all layers hold latents of keys and of values."""
    if settings.hot is not None:
        return settings.hot
    return 0 if all(form.holds == "latents" for form in formats) else DEFAULT_SHARE


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


def rows_on_device() -> bool:
    """Whether kernels find out which rows are hot: where the Triton kernels run, interpreted ones included."""
    from vllm.platforms import current_platform

    return hasattr(dispatch.select("cpu" if current_platform.is_cpu() else "cuda"), "HOT_ROWS_ON_DEVICE")


@functools.cache
def keep_pool_back() -> None:
    """Let vLLM's worker keep the pool's bytes out of the cache's memory, once per process."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    else:
        from vllm.v1.worker.gpu_worker import Worker

    original = Worker.determine_available_memory

    @functools.wraps(original)
    def determine_available_memory(self: Any) -> int:
        total = original(self)
        return total - take_pool(self.vllm_config, total)

    Worker.determine_available_memory = determine_available_memory


def take_pool(vllm_config: Any, total: int) -> int:
    """Decide how large the pool of an engine is, and say so.

    Args:
        vllm_config: vLLM's configuration, with the loaded layers.
        total: bytes for pages and pool together.

    Returns:
        The pool's bytes; 0 without.

    Raises:
        SettingsError: no memory would be left for pages.
    """
    layers = vllm_config.compilation_config.static_forward_context.values()
    impls = [x.impl for x in layers if isinstance(x, Attention) and x.attn_backend.get_name() == BACKEND_NAME]
    impls = [impl for impl in impls if impl.scheme is not None]
    if not impls:
        return 0
    formats = [impl.scheme.format for impl in impls]
    setting = hot_setting(impls[0].settings, formats)
    if not setting or (impls[0].settings.hot is None and rows_on_device()):  # on GPUs no default was measured
        return 0
    dtype = vllm_config.model_config.dtype
    reason, shared = _on_platform(vllm_config, impls)
    if reason is not None:
        logger.info("xquant: hot blocks are off: %s", reason)
        return 0
    per_token = dtype.itemsize * 2 * sum(impl.num_kv_heads * impl.head_size for impl in impls)
    wanted = pool_bytes(setting, total)
    if wanted + shared >= total:
        raise SettingsError(
            f"xquant: setting 'hot': {setting} cannot work: of {total} bytes for the cache none would be left for "
            "pages; set less, or give more memory (--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE)"
        )
    memory = hot_memory(vllm_config)
    memory.keep(wanted // per_token)
    taken = memory.tokens * per_token + shared
    _say(memory.tokens, taken, total, formats, vllm_config.model_config.max_model_len)
    return taken


def _on_platform(vllm_config: Any, impls: Sequence[Any]) -> tuple[str | None, int]:
    """Why the platform's kernel cannot attend to the pool, or None, and bytes of what the pool needs beside itself."""
    dtype = vllm_config.model_config.dtype
    if not rows_on_device():
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return "the kernels for GPUs do not run", 0
        return unsupported(dtype, sorted({impl.head_size for impl in impls})), 0
    if vllm_config.model_config.enable_sleep_mode:
        return "--enable-sleep-mode discards what the pool holds, and where it is", 0
    from xquant_vllm.plugin.backend.flash import flash_unsupported
    from xquant_vllm.plugin.backend.hot_gpu_memory import shared_bytes

    reason = flash_unsupported(dtype, impls, vllm_config.cache_config.block_size)
    return reason, 0 if reason is not None else shared_bytes(vllm_config)


def _say(tokens: int, taken: int, total: int, formats: Sequence[LayerFormat], max_model_len: int) -> None:
    """What the log says of the pool."""
    cached = (total - taken) // sum(form.bytes_per_token for form in formats)
    plain = total // sum(form.plain_bytes_per_token for form in formats)
    logger.info(
        "xquant: hot blocks: %.2f of %.2f GiB of the cache keep the keys and values of up to %s tokens in use; pages "
        "hold %s tokens, %.2fx of what 16 bit would hold in all of it",
        taken / 2**30,
        total / 2**30,
        f"{tokens:,}",
        f"{cached:,}",
        cached / max(1, plain),
    )
    if tokens < max_model_len:
        logger.warning(
            "xquant: the pool of hot blocks holds %s tokens, fewer than one sequence of --max-model-len %s: longer "
            "sequences are attended from their pages, which is slow; set more, for example "
            '--additional-config \'{"xquant": {"hot": "40%%"}}\'',
            f"{tokens:,}",
            f"{max_model_len:,}",
        )
