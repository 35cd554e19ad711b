"""Hot blocks on CPUs: attended by vLLM's own kernels for 16-bit caches (CPU_ATTN)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from xquant_vllm.attention import dispatch
from xquant_vllm.attention import reference as slow
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.hot import reference
from xquant_vllm.attention.hot.policy import PROMOTED_TOKENS, HotMap
from xquant_vllm.attention.hot.pool import Pool
from xquant_vllm.attention.hot.rematerialize import TokenKernels, rematerialize
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.plugin.hot.budget import HotMemory, hot_memory
from xquant_vllm.plugin.hot.layout import pool_layout
from xquant_vllm.plugin.hot.log import HotLog


@dataclass
class HotRows:
    """The rows of a batch that are attended from the pool.

    Attributes:
        batch: the rows, their block table translated to hot blocks.
        scheduler: what CPU_ATTN wants to know of them.
        tokens: ``[n]`` int64, their query tokens; None for all.
    """

    batch: AttentionBatch
    scheduler: torch.Tensor
    tokens: torch.Tensor | None


@dataclass
class HotBatch:
    """What the layers of a builder do in a step.

    Attributes:
        written: tokens that go to the pool first.
        hot: rows that are attended from it; None: the whole batch is attended from pages.
        cold: the other rows and ``[n]`` int64, their query tokens; None: there are none.
    """

    written: HotTokens
    hot: HotRows | None
    cold: tuple[AttentionBatch, torch.Tensor] | None


class HotPool:
    """The pool of one layer, as CPU_ATTN keeps its cache: ``[hot blocks, kv heads, block size, 2 * head size]``."""

    def __init__(self, num_hot_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype):
        """Take the memory; it is zero, and so are keys and values that were never written."""
        self._isa = _get_attn_isa(dtype, block_size, head_size)
        self._dtype = dtype
        memory = torch.zeros(num_hot_blocks, num_kv_heads, 2 * block_size, head_size, dtype=dtype)
        self.keys, self.values = memory.chunk(2, 2)
        layout = pool_layout(dtype, block_size, head_size, self._isa)
        # What the C++ kernels write to.
        self._pool = None if layout is None else Pool(self.keys.flatten(2), self.values.flatten(2), layout)

    def write(
        self,
        pages: Sequence[torch.Tensor],
        plan: AttentionLayerPlan,
        tokens: HotTokens,
        layer: Any,
        before: Any,
    ) -> None:
        """Rematerialize a step's tokens; see :func:`rematerialize`."""
        if not tokens.count:
            return
        kernels = _token_kernels()
        if kernels is not reference and self._pool is not None:
            from xquant_vllm.attention.cpu import hot_write

            hot_write.write(pages, plan, tokens, self._pool, layer, before)
            return
        keys, values = rematerialize(kernels, pages, plan, tokens, self._dtype, layer, before)
        ops.cpu_attn_reshape_and_cache(keys, values, self.keys, self.values, tokens.hot_slots, self._isa)

    def attend(
        self,
        query: torch.Tensor,
        pages: Sequence[torch.Tensor],
        plan: AttentionLayerPlan,
        batch: HotBatch,
        output: torch.Tensor,
        inputs: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Attend to hot rows from the pool and to the others from pages.

        Args:
            query: ``[num_tokens, num_heads, head_size]``, after RoPE.
            pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8.
            plan: the layer's plan.
            batch: the rows; some are hot, and what is written in this step is written.
            output: ``[num_tokens, num_heads, head_size]``, written.
            inputs: what the store was given of the tokens, if rows with many of them attend to these exactly.
        """
        assert batch.hot is not None
        if batch.cold is None:
            self._attend(query, plan, batch.hot, output)
            return
        assert batch.hot.tokens is not None
        part = query[batch.hot.tokens]
        result = torch.empty_like(part)
        self._attend(part, plan, batch.hot, result)
        output.index_copy_(0, batch.hot.tokens, result)
        rows, tokens = batch.cold
        part = query[tokens]
        result = torch.empty_like(part)
        some = None if inputs is None else tuple(x[tokens] for x in inputs)
        dispatch.select("cpu").paged_attention(part, pages, plan, rows, result, some)
        output.index_copy_(0, tokens, result)

    def _attend(self, query: torch.Tensor, plan: AttentionLayerPlan, rows: HotRows, output: torch.Tensor) -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self.keys,
            value_cache=self.values,
            output=output,
            query_start_loc=rows.batch.query_start_loc,
            seq_lens=rows.batch.seq_lens,
            scale=plan.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1 if plan.sliding_window is None else plan.sliding_window,
            block_table=rows.batch.block_table,
            softcap=plan.logits_soft_cap or 0,
            scheduler_metadata=rows.scheduler,
            s_aux=plan.sinks,
        )


def _token_kernels() -> TokenKernels:
    if dispatch.select("cpu") is slow:
        return reference  # type: ignore[return-value]
    from xquant_vllm.attention.cpu import hot_tokens

    return hot_tokens  # type: ignore[return-value]


class HotBuilder:
    """Makes :class:`HotBatch` for the layers of one metadata builder.

    Attributes:
        hot_map: of the KV cache group, from the first step on.
    """

    def __init__(self, spec: KVCacheSpec, impls: Sequence[Any], vllm_config: Any, memory: HotMemory) -> None:
        """Give every layer its pool."""
        first = impls[0]
        self._memory, self._block_size = memory, spec.block_size
        self._num_hot_blocks = memory.tokens // spec.block_size
        self._map_window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
        windows = {impl.sliding_window for impl in impls}
        window = windows.pop() if len(windows) == 1 else None
        self._exact_from = first._exact_from
        self.hot_map: HotMap | None = None
        self._log = HotLog()
        dtype = vllm_config.model_config.dtype
        self._schedule = {
            "num_heads": first.num_heads,
            "num_kv_heads": first.num_kv_heads,
            "head_dim": first.head_size,
            "dtype": dtype,
            "causal": True,
            "sliding_window_size": -1 if window is None else window,
            "isa": _get_attn_isa(dtype, spec.block_size, first.head_size),
            "enable_kv_split": envs.VLLM_CPU_ATTN_SPLIT_KV,
        }
        # A chain takes longer to attend from pages than to promote: then what waits only costs more.
        chained = any(impl.earlier_layers for impl in impls)
        self._promoted_tokens = max(PROMOTED_TOKENS, vllm_config.model_config.max_model_len if chained else 0)
        for impl in impls:
            impl.set_pool(HotPool(self._num_hot_blocks, spec.block_size, impl.num_kv_heads, impl.head_size, dtype))

    @classmethod
    def make(cls, spec: KVCacheSpec, impls: Sequence[Any], vllm_config: Any) -> "HotBuilder | None":
        """None where there is no pool."""
        memory = hot_memory(vllm_config)
        # One hot block is the null block's.
        if memory.tokens < 2 * spec.block_size:
            return None
        return cls(spec, impls, vllm_config, memory)

    def build(self, common: CommonAttentionMetadata) -> HotBatch:
        """Plan a step. Builders of one KV cache group share its map, and the step."""
        starts = common.query_start_loc
        lengths = common.seq_lens.numpy().astype(np.int64)
        counts = np.diff(starts.numpy().astype(np.int64))
        address = common.block_table_tensor.data_ptr()
        known = self._memory.maps.get(address)
        if known is None or known[1] is not common:
            hot_map = self._new_map() if known is None else known[0]
            exact = None if self._exact_from is None else counts >= self._exact_from
            step = hot_map.plan(common.block_table_tensor.numpy(), lengths, counts, exact)
            known = self._memory.maps[address] = (hot_map, common, (step, HotTokens.of(step)))
            self._log.say(hot_map)
        self.hot_map, (step, written) = known[0], known[2]
        table = torch.from_numpy(step.block_table)
        if step.hot.sum() == np.count_nonzero(counts):
            batch = AttentionBatch(starts, common.seq_lens, table, common.max_query_len)
            return HotBatch(written, self._rows(batch, None), None)
        if not step.hot.any():
            return HotBatch(written, None, None)
        (hot, hot_tokens), cold = (
            _some_rows(np.flatnonzero(rows), counts, starts, common.seq_lens, of)
            for rows, of in ((step.hot, table), (~step.hot & (counts > 0), common.block_table_tensor))
        )
        return HotBatch(written, self._rows(hot, hot_tokens), cold)

    def _rows(self, batch: AttentionBatch, tokens: torch.Tensor | None) -> HotRows:
        scheduler = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch.seq_lens.shape[0],
            seq_lens=batch.seq_lens,
            query_start_loc=batch.query_start_loc,
            **self._schedule,
        )
        return HotRows(batch, scheduler, tokens)

    def _new_map(self) -> HotMap:
        return HotMap(self._num_hot_blocks, self._block_size, self._map_window, promoted_tokens=self._promoted_tokens)


def _some_rows(
    rows: np.ndarray, counts: np.ndarray, starts: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor
) -> tuple[AttentionBatch, torch.Tensor]:
    """Some rows of a batch as a batch of their own, and its query tokens."""
    index = torch.from_numpy(rows)
    some = counts[rows]
    new_starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(some)))
    first = np.repeat(starts.numpy()[rows] - new_starts[:-1], some)
    tokens = torch.from_numpy(first + np.arange(len(first)))
    batch = AttentionBatch(
        torch.from_numpy(new_starts.astype(np.int32)),
        seq_lens[index],
        block_table[index],
        int(some.max(initial=0)),
    )
    return batch, tokens
