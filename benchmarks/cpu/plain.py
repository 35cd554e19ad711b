"""vLLM's own CPU kernels on BF16 pages, called as its CPU_ATTN backend calls them."""

from collections.abc import Callable

import torch

from benchmarks.cpu.layers import BLOCK_SIZE, Model
from xquant_vllm.attention.batch import AttentionBatch


class PlainLayers:
    """BF16 keys and values of some layers."""

    def __init__(self, model: Model, blocks: int, layers: int) -> None:
        """Allocate and fill them."""
        import vllm._C  # noqa: F401
        from vllm import _custom_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self._ops, self._model = _custom_ops, model
        self._isa = _get_attn_isa(torch.bfloat16, BLOCK_SIZE, model.head_size)
        shape = (blocks, model.kv_heads, 2 * BLOCK_SIZE, model.head_size)
        first = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
        self.caches = [cache.chunk(2, 2) for cache in (first, *(first.clone() for _ in range(layers - 1)))]

    def decode(self, query: torch.Tensor, batch: AttentionBatch, output: torch.Tensor) -> Callable[[], None]:
        """A call that attends in every layer."""
        model = self._model
        sequences = batch.seq_lens.shape[0]
        metadata = self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=sequences,
            num_heads=model.heads,
            num_kv_heads=model.kv_heads,
            head_dim=model.head_size,
            seq_lens=batch.seq_lens,
            dtype=torch.bfloat16,
            query_start_loc=batch.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=True,
        )

        def call() -> None:
            for cache in self.caches:
                self._ops.cpu_attention_with_kv_cache(
                    query=query,
                    key_cache=cache[0],
                    value_cache=cache[1],
                    output=output,
                    query_start_loc=batch.query_start_loc,
                    seq_lens=batch.seq_lens,
                    scale=model.head_size**-0.5,
                    causal=True,
                    alibi_slopes=None,
                    sliding_window=-1,
                    block_table=batch.block_table,
                    softcap=0.0,
                    scheduler_metadata=metadata,
                    s_aux=None,
                )

        return call

    def store(self, tokens: int, slots: torch.Tensor) -> Callable[[], None]:
        """A call that stores tokens in every layer."""
        model = self._model
        generator = torch.Generator().manual_seed(4)
        shape = (tokens, model.kv_heads, model.head_size)
        key, value = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))

        def call() -> None:
            for cache in self.caches:
                self._ops.cpu_attn_reshape_and_cache(key, value, cache[0], cache[1], slots, self._isa)

        return call
