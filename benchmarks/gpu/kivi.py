"""KIVI's cache through its Triton kernels: what this repository compares itself with, beside attention by others."""

import torch

from benchmarks.gpu.layers import DECODE_TOKENS
from benchmarks.gpu.problem import Call, Prepared, Problem
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.kivi import codec, reference
from xquant_vllm.kivi.block_sizes import choose_block_sizes
from xquant_vllm.kivi.pages import QuantizedLayout, ResidualLayout
from xquant_vllm.kivi.plan import KiviBatch, KiviLayerPlan

# Tokens of a group of keys and channels of one of values, and exact tokens: what is served by default.
GROUP, _RESIDUAL_TOKENS = 32, 128


def needs() -> None:
    """Raises where the kernels cannot run."""
    import triton

    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        raise RuntimeError("needs a GPU")


def prepare(bits: int, problem: Problem) -> Prepared:
    """Calls over pages of ``bits`` bits that hold the problem's keys and values, blocks in random order."""
    from xquant_vllm.kivi.gpu.kernels import paged_attention

    sets, batch, query_len, heads, size = problem.queries.shape
    device, dtype, seq_len = problem.queries.device, problem.queries.dtype, problem.seq_len
    plan = make_plan(bits, heads, problem.keys.shape[3], size, dtype)
    past = seq_len - query_len
    # Only what a query may see exactly stands in residual pages; their table has arbitrary entries before.
    first_exact = max(0, past + 1 - _RESIDUAL_TOKENS) // plan.residual.block_size * plan.residual.block_size
    table = _table(sets, batch, seq_len, plan.quantized.block_size, device)
    residual_table = _table(sets, batch, seq_len - first_exact, plan.residual.block_size, device)
    skipped = first_exact // plan.residual.block_size
    pages, residual_pages = (
        torch.empty(of_table.numel(), layout.page_bytes, dtype=torch.uint8, device=device)
        for of_table, layout in ((table, plan.quantized), (residual_table, plan.residual))
    )
    for index in range(sets):
        for sequence in range(batch):
            keys, values = (x[index, sequence, :seq_len] for x in (problem.keys, problem.values))
            _fill(pages, plan, table[index, sequence], keys, values)
            slots = _slots(residual_table[index, sequence], seq_len - first_exact, plan.residual.block_size)
            codec.store_residual(residual_pages, plan.residual, slots, keys[first_exact:], values[first_exact:])
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * query_len
    lengths = torch.full((batch,), seq_len, dtype=torch.int32, device=device)
    on_host = ((query_len, seq_len),) * batch if query_len > DECODE_TOKENS else None
    before = torch.zeros(sets, batch, skipped, dtype=torch.int32, device=device)
    residual_table = torch.cat((before, residual_table), 2)
    batches = [
        KiviBatch(AttentionBatch(starts, lengths, of_quantized, query_len, on_host, DECODE_TOKENS), of_residual)
        for of_quantized, of_residual in zip(table, residual_table, strict=True)
    ]
    queries = problem.queries.flatten(1, 2)
    outputs = torch.empty_like(queries)

    def call(index: int) -> torch.Tensor:
        paged_attention(queries[index], pages, residual_pages, plan, batches[index], outputs[index])
        return outputs[index]

    def expected() -> torch.Tensor:
        alone = KiviBatch(AttentionBatch(starts[:2], lengths[:1], table[0, :1]), residual_table[0, :1])
        query = queries[0, :query_len].float()
        output = torch.empty_like(query)
        reference.paged_attention(query, pages, residual_pages, plan, alone, output)
        return output

    calls: list[Call] = [lambda index=index: call(index) for index in range(sets)]
    return Prepared(calls, expected, number_bytes=_number_bytes(plan, seq_len, past))


def make_plan(bits: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> KiviLayerPlan:
    """A layer with groups of 32 channels, fewer where a head is no multiple of these."""
    group = max(channels for channels in range(8, GROUP + 1, 8) if size % channels == 0)
    quantized, residual = choose_block_sizes(
        QuantizedLayout(kv_heads, size, bits, GROUP, group, GROUP),
        ResidualLayout(kv_heads, size, dtype, 16),
        _RESIDUAL_TOKENS,
        None,
    )
    return KiviLayerPlan(quantized, residual, heads, size**-0.5, _RESIDUAL_TOKENS)


def _table(sets: int, batch: int, tokens: int, block_size: int, device: torch.device) -> torch.Tensor:
    """Blocks of every sequence of every set, ``[sets, batch, blocks]`` int32."""
    blocks = -(-tokens // block_size)
    order = torch.randperm(sets * batch * blocks, generator=torch.Generator().manual_seed(0))
    return order.int().view(sets, batch, blocks).to(device)


def _slots(blocks: torch.Tensor, tokens: int, block_size: int) -> torch.Tensor:
    positions = torch.arange(tokens, device=blocks.device)
    return blocks[positions // block_size].long() * block_size + positions % block_size


def _fill(
    pages: torch.Tensor, plan: KiviLayerPlan, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Quantize a sequence, ``[seq_len, kv_heads, head_size]``."""
    layout, seq_len = plan.quantized, keys.shape[0]
    codec.store_values(pages, layout, _slots(blocks, seq_len, layout.block_size), values)
    groups = torch.arange(seq_len // layout.key_group_size, device=pages.device)
    if groups.numel():
        whole = keys[: groups.numel() * layout.key_group_size].unflatten(0, (-1, layout.key_group_size))
        of_block = blocks[groups // layout.num_key_groups].long()
        codec.store_key_groups(pages, layout, of_block, groups % layout.num_key_groups, whole)


def _number_bytes(plan: KiviLayerPlan, seq_len: int, past: int) -> float:
    """Bytes of a cached number on average, as the last query reads it, exact ones as in 16 bits."""
    layout = plan.quantized
    total = 0.0
    groups = (layout.key_group_size, layout.value_group_size)
    for exact, group in zip(plan.first_exact(torch.tensor([seq_len - 1]), past), groups, strict=True):
        quantized = int(exact)
        total += quantized * (layout.bits / 8 + 4 / group) + 2 * (seq_len - quantized)
    return total / (2 * seq_len)
