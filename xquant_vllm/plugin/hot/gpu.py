"""Hot blocks on GPUs: pools that FlashAttention attends to (flash.py), and what a step does (see gpu_steps.py)."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from xquant_vllm.attention import dispatch
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.hot.rows import HotRowTensors
from xquant_vllm.attention.gpu.hot.write import prepare_hot, write_tokens
from xquant_vllm.attention.hot.policy import PROMOTED_TOKENS, HotMap
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.plugin.flash import flash_version
from xquant_vllm.plugin.hot.budget import hot_memory
from xquant_vllm.plugin.hot.flash import attend_hot
from xquant_vllm.plugin.hot.gpu_memory import HotGpuMemory, plans_of, step_tokens
from xquant_vllm.plugin.hot.log import HotLog


@dataclass
class HotGpuRows:
    """The rows of a batch that are attended from the pool.

    Attributes:
        batch: all rows, lengths of the others 0, the block table translated to hot blocks.
        tokens: ``[tokens]`` bool, query tokens of hot rows.
        longest: tokens of a row at most.
    """

    batch: AttentionBatch
    tokens: torch.Tensor
    longest: int


@dataclass
class HotGpuBatch:
    """What the layers of a builder do in a step.

    Attributes:
        written: tokens that go to the pool first.
        hot: rows that are attended from it; None: the whole batch is attended from pages.
        cold: all rows, lengths of hot ones 0; None: all rows are hot.
    """

    written: HotTokens
    hot: HotGpuRows | None
    cold: AttentionBatch | None


class HotGpuPool:
    """The pool of one layer, as FlashAttention takes it: keys and values ``[hot blocks, block size, heads, size]``."""

    def __init__(self, num_hot_blocks: int, plan: AttentionLayerPlan, memory: HotGpuMemory) -> None:
        """Take the pool's memory; it is zero, and so are keys and values that were never written."""
        projection, block_size = plan.projection, plan.layout.block_size
        shape = (num_hot_blocks, block_size, projection.num_kv_heads, projection.head_size)
        self.keys, self.values = (torch.zeros(shape, dtype=memory.buffers.dtype, device=plan.device) for _ in range(2))
        self._memory = memory
        self._version = flash_version(
            projection.head_size, plan.sinks is not None, plan.logits_soft_cap, plan.layout.block_size
        )
        prepare_hot(plan, memory.buffers.dtype)

    def write(
        self, pages: Sequence[torch.Tensor], plan: AttentionLayerPlan, tokens: HotTokens, layer: Any, before: Any
    ) -> None:
        """Rematerialize a step's tokens; see :func:`write_tokens`."""
        if tokens.count:
            write_tokens(pages, plan, tokens, self._memory.buffers, self.keys, self.values, layer, before)

    def attend(
        self,
        query: torch.Tensor,
        pages: Sequence[torch.Tensor],
        plan: AttentionLayerPlan,
        batch: HotGpuBatch,
        output: torch.Tensor,
        inputs: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Attend to hot rows from the pool and to the others from pages.

        Where both are called, each leaves zeros or nothing of use in the other's rows, and their tokens are selected.

        Args:
            query: ``[num_tokens, num_heads, head_size]``, after RoPE.
            pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8.
            plan: the layer's plan.
            batch: the rows; what is written in this step is written.
            output: ``[num_tokens, num_heads, head_size]``, written.
            inputs: what the store was given of the tokens, if rows with many of them attend to these exactly.
        """
        rows = batch.hot
        assert rows is not None
        if batch.cold is None:
            self._attend(query, plan, rows, output)
            return
        dispatch.select(query.device.type).paged_attention(query, pages, plan, batch.cold, output, inputs)
        attended = self._memory.attended(query)
        self._attend(query, plan, rows, attended)
        torch.where(rows.tokens[: query.shape[0], None, None], attended, output, out=output)

    def _attend(self, query: torch.Tensor, plan: AttentionLayerPlan, rows: HotGpuRows, output: torch.Tensor) -> None:
        attend_hot(query, self.keys, self.values, output, plan, rows.batch, rows.longest, self._version)


class HotGroup:
    """The map of the layers of one metadata builder, and what the device knows of it.

    Attributes:
        layer_names: the layers.
        hot_map: what is hot.
        log: of the map.
        exact_from: rows with so many query tokens are attended from pages.
        hot_of: ``[blocks]`` int32, hot blocks by block, on the device; 0: none.
        decided: of the step that runs whether "all" of its rows are hot, "none" or "some"; None: not known.
        hot_lengths: query tokens and tokens of rows that are hot, whichever rows of the step have as many.
    """

    def __init__(
        self,
        layer_names: Sequence[str],
        hot_map: HotMap,
        exact_from: int | None,
        num_blocks: int,
        device: torch.device,
    ) -> None:
        """Nothing is hot yet."""
        self.layer_names, self.hot_map, self.log = tuple(layer_names), hot_map, HotLog()
        self.exact_from = exact_from
        self.decided: str | None = None
        self.hot_lengths: Set[tuple[int, int]] = frozenset()
        self.hot_of = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        self._blocks = np.arange(num_blocks)
        self._shown = np.zeros(num_blocks, np.int32)

    def decide(self, hot: str | None, hot_lengths: Set[tuple[int, int]] = frozenset()) -> None:
        """Note what is decided of a step, see :attr:`decided` and :attr:`hot_lengths`."""
        self.decided, self.hot_lengths = hot, hot_lengths

    def show(self) -> None:
        """Bring the device's map up to date, in the order of its stream and without waiting for it."""
        now = self.hot_map.hot_of(self._blocks).astype(np.int32)
        if not np.array_equal(now, self._shown):
            self._shown = now
            self.hot_of.copy_(on_device(now, self.hot_of.device), non_blocking=True)


def on_device(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers on the way to a device, without waiting for it."""
    host = torch.from_numpy(numbers)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class HotGpuEngine:
    """What the layers, the builders and the steps of an engine share.

    Attributes:
        groups: by the names of their layers.
    """

    def __init__(self) -> None:
        """No pool yet."""
        self.groups: dict[tuple[str, ...], HotGroup] = {}
        self._memory: HotGpuMemory | None = None

    def take_memory(self, make: Callable[[], HotGpuMemory]) -> HotGpuMemory:
        """What the layers share, made for the first of them."""
        if self._memory is None:
            self._memory = make()
        return self._memory


@per_object
def hot_engine(vllm_config: Any) -> HotGpuEngine:
    """Of an engine."""
    return HotGpuEngine()


class HotGpuBuilder:
    """Makes :class:`HotGpuBatch` for the layers of one metadata builder; reads nothing back from the device."""

    def __init__(
        self, spec: KVCacheSpec, names: Sequence[str], impls: Sequence[Any], vllm_config: Any, device: torch.device
    ) -> None:
        """Give every layer its pool."""
        engine, dtype = hot_engine(vllm_config), vllm_config.model_config.dtype
        tokens, block_size = step_tokens(vllm_config), spec.block_size
        memory = engine.take_memory(lambda: HotGpuMemory(plans_of(vllm_config), tokens, dtype))
        num_hot_blocks = hot_memory(vllm_config).tokens // block_size
        for impl in impls:
            impl.set_pool(HotGpuPool(num_hot_blocks, impl.plan(block_size), memory))
        self._block_size = block_size
        self._window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
        # A promotion passes through the same buffers as a step, and its last block may go beyond the limit.
        promoted = max(1, min(PROMOTED_TOKENS, tokens - block_size))
        hot_map = HotMap(num_hot_blocks, block_size, self._window, promoted_tokens=promoted)
        num_blocks, exact_from = vllm_config.cache_config.num_gpu_blocks, impls[0].plan(block_size).exact_from
        self._group = HotGroup(names, hot_map, exact_from, num_blocks, device)
        engine.groups[self._group.layer_names] = self._group
        rows, columns = (
            vllm_config.scheduler_config.max_num_seqs,
            -(-vllm_config.model_config.max_model_len // block_size),
        )
        self._tensors = HotRowTensors(rows, columns, tokens, device)
        # vLLM may understate what a window of a row with drafted tokens sees: then the device alone knows.
        self._device_decides = vllm_config.speculative_config is not None and self._window is not None

    @property
    def hot_map(self) -> HotMap:
        """Of the layers."""
        return self._group.hot_map

    @classmethod
    def make(
        cls, spec: KVCacheSpec, names: Sequence[str], impls: Sequence[Any], vllm_config: Any, device: torch.device
    ) -> "HotGpuBuilder | None":
        """None where there is no pool."""
        # One hot block is the null block's.
        if hot_memory(vllm_config).tokens < 2 * spec.block_size:
            return None
        return cls(spec, names, impls, vllm_config, device)

    def build(self, common: CommonAttentionMetadata, batch: AttentionBatch) -> HotGpuBatch:
        """Find out on the device which rows are hot.

        The calls that follow depend on the host's knowledge of the step, where it has any: whether all rows are hot, or
        none. A CUDA graph is captured with both calls, and what is built when it is replayed changes tensors alone.

        Args:
            common: vLLM's metadata.
            batch: what was made of it.
        """
        slots = common.slot_mapping[: common.num_actual_tokens]
        group = self._group
        rows = self._tensors.locate(batch, slots, group.hot_of, self._block_size, self._window, group.exact_from)
        if group.decided == "none":
            return HotGpuBatch(rows.written, None, rows.cold)
        hot = HotGpuRows(rows.hot, rows.hot_tokens, common.max_seq_len)
        if self._device_decides:
            return HotGpuBatch(rows.written, hot, rows.cold)
        return HotGpuBatch(rows.written, hot, None if group.decided == "all" else self._without_hot(rows.cold))

    def _without_hot(self, cold: AttentionBatch) -> AttentionBatch:
        """Rows that prefill and are known to be hot have no tokens here, so nothing is launched for them.

        The host does not know which request a row is of, but how long a row that prefills is.
        """
        known = self._group.hot_lengths
        if not known or cold.lengths is None:
            return cold
        return replace(cold, lengths=tuple((of[0], 0) if of in known else of for of in cold.lengths))
