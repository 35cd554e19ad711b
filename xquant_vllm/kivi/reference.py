"""KIVI's paged store and attention in PyTorch: the oracle of every kernel, and the fallback where none was built.

Every token is written to a residual page as it is, and its value quantized to a quantized page. A group of keys is
quantized when its last token arrives, from the residual pages. A group is written again where a drafted token in it was
not accepted, and nobody has read it as part of a longer prefix by then.
"""

import torch

from xquant_vllm.kivi.codec import (
    load_key_groups,
    load_residual,
    load_values,
    store_key_groups,
    store_residual,
    store_values,
)
from xquant_vllm.kivi.plan import KiviBatch, KiviLayerPlan
from xquant_vllm.projection.rope import apply_rope

# Queries scored at once; bounds the score matrix to this times the context, per head.
_QUERY_TILE = 256


def store(
    pages: torch.Tensor,
    residual_pages: torch.Tensor,
    plan: KiviLayerPlan,
    batch: KiviBatch,
    slot_mapping: torch.Tensor,
    residual_slot_mapping: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Write new tokens to residual pages, their values to quantized pages, and the groups of keys that they complete.

    Args:
        pages: quantized pages, ``[num_blocks, page_bytes]`` uint8, written.
        residual_pages: residual pages, likewise, written; they must hold what earlier steps stored of the groups of
            keys that these tokens complete.
        plan: the layer's plan.
        batch: the sequences; the query tokens are the new ones.
        slot_mapping: ``[>= num_tokens]`` int64, ``block * block_size + offset`` in quantized pages; negative entries
            are padding, not stored.
        residual_slot_mapping: likewise in residual pages.
        keys: ``[num_tokens, num_kv_heads, head_size]``, after RoPE, or before it if the plan has a rope.
        values: likewise.
    """
    tokens = keys.shape[0]
    kept = torch.nonzero(slot_mapping[:tokens] >= 0).squeeze(1)
    store_values(pages, plan.quantized, slot_mapping[kept], values[kept])
    kept = torch.nonzero(residual_slot_mapping[:tokens] >= 0).squeeze(1)
    store_residual(residual_pages, plan.residual, residual_slot_mapping[kept], keys[kept], values[kept])

    group_size, sequences = plan.quantized.key_group_size, batch.sequences
    starts, lengths = sequences.query_start_loc.tolist(), sequences.seq_lens.tolist()
    within = torch.arange(group_size, device=pages.device)
    for index, seq_len in enumerate(lengths):
        step_start = seq_len - (starts[index + 1] - starts[index])
        completed = torch.arange(step_start // group_size, seq_len // group_size, device=pages.device)
        if not completed.numel():
            continue
        positions = completed.unsqueeze(1) * group_size + within
        slots = _slots(batch.residual_block_table[index], positions.flatten(), plan.residual.block_size)
        exact, _ = load_residual(residual_pages, plan.residual, slots)
        blocks, groups = _key_groups(sequences.block_table[index], completed, plan)
        store_key_groups(pages, plan.quantized, blocks, groups, exact.unflatten(0, positions.shape))


def paged_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    residual_pages: torch.Tensor,
    plan: KiviLayerPlan,
    batch: KiviBatch,
    output: torch.Tensor,
) -> None:
    """Causal attention of query tokens over their sequences' pages.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, after RoPE.
        pages: quantized pages, ``[num_blocks, page_bytes]`` uint8.
        residual_pages: residual pages, likewise. Of a sequence only tokens from ``step_start + 1 - residual_tokens`` on
            are read, ``step_start`` being the position of its first query.
        plan: the layer's plan.
        batch: the sequences; the keys and values of the query tokens are stored already.
        output: ``[num_tokens, num_heads, head_size]``, written.
    """
    starts, lengths = batch.sequences.query_start_loc.tolist(), batch.sequences.seq_lens.tolist()
    for index, seq_len in enumerate(lengths):
        begin, end = starts[index], starts[index + 1]
        if end > begin:
            step_start = seq_len - (end - begin)
            oldest = 0 if plan.sliding_window is None else max(0, step_start - plan.sliding_window + 1)
            tables = batch.sequences.block_table[index], batch.residual_block_table[index]
            quantized = _read_quantized(pages, plan, tables[0], oldest, seq_len)
            exact = _read_exact(residual_pages, plan, tables[1], oldest, step_start, seq_len)
            output[begin:end] = _attend(query[begin:end], plan, oldest, seq_len, quantized, exact)


def _attend(
    query: torch.Tensor,
    plan: KiviLayerPlan,
    oldest: int,
    seq_len: int,
    quantized: tuple[torch.Tensor, torch.Tensor],
    exact: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """One sequence; keys and values are those of tokens ``[oldest, seq_len)`` in both versions."""
    query_len, step_start = query.shape[0], seq_len - query.shape[0]
    group = plan.num_heads // plan.num_kv_heads
    positions = torch.arange(oldest, seq_len, device=query.device)
    result = torch.empty_like(query)
    for begin in range(0, query_len, _QUERY_TILE):
        tile = query[begin : begin + _QUERY_TILE].float().unflatten(1, (plan.num_kv_heads, group))
        query_positions = step_start + begin + torch.arange(tile.shape[0], device=query.device)
        first_keys, first_values = plan.first_exact(query_positions, step_start)
        keys_exact, values_exact = positions >= first_keys[:, None], positions >= first_values[:, None]
        quantized_scores, exact_scores = (torch.einsum("qhgs,khs->hgqk", tile, x[0]) for x in (quantized, exact))
        scores = torch.where(keys_exact, exact_scores, quantized_scores) * plan.scale
        if plan.logits_soft_cap:
            scores = plan.logits_soft_cap * torch.tanh(scores / plan.logits_soft_cap)
        masked = positions > query_positions[:, None]
        if plan.sliding_window is not None:
            masked |= positions <= query_positions[:, None] - plan.sliding_window
        weights = scores.masked_fill(masked, -torch.inf).softmax(-1)
        attended = torch.einsum("hgqk,khs->qhgs", weights * values_exact, exact[1])
        attended += torch.einsum("hgqk,khs->qhgs", weights * ~values_exact, quantized[1])
        result[begin : begin + tile.shape[0]] = attended.flatten(1, 2).to(result.dtype)
    return result


def _read_quantized(
    pages: torch.Tensor, plan: KiviLayerPlan, block_ids: torch.Tensor, oldest: int, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of tokens ``[oldest, seq_len)``, FP32; 0 for the keys of an incomplete last group."""
    layout = plan.quantized
    size = layout.key_group_size
    values = load_values(pages, layout, _slots(block_ids, _range(oldest, seq_len, pages), layout.block_size))
    keys = torch.zeros_like(values)
    # A group may begin before the window, but then it lies in the block of a token that is in it.
    complete = _range(oldest // size, seq_len // size, pages)
    if complete.numel():
        read = load_key_groups(pages, layout, *_key_groups(block_ids, complete, plan)).flatten(0, 1)
        read = read[oldest - oldest // size * size :]
        keys[: read.shape[0]] = _rotate(read, oldest, plan)
    return keys, values


def _read_exact(
    pages: torch.Tensor, plan: KiviLayerPlan, block_ids: torch.Tensor, oldest: int, step_start: int, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of tokens ``[oldest, seq_len)``, FP32; 0 where no query of the step sees them exactly."""
    first = max(oldest, step_start + 1 - plan.residual_tokens)
    slots = _slots(block_ids, _range(first, seq_len, pages), plan.residual.block_size)
    keys, values = (x.float() for x in load_residual(pages, plan.residual, slots))
    keys = _rotate(keys, first, plan)
    shape = (seq_len - oldest, plan.num_kv_heads, plan.head_size)
    padded = keys.new_zeros(shape), values.new_zeros(shape)
    padded[0][first - oldest :], padded[1][first - oldest :] = keys, values
    return padded


def _rotate(keys: torch.Tensor, first: int, plan: KiviLayerPlan) -> torch.Tensor:
    """Keys of successive tokens from position ``first`` on, after RoPE."""
    return keys if plan.rope is None else apply_rope(keys, _range(first, first + keys.shape[0], keys), plan.rope)


def _range(first: int, end: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(first, max(first, end), device=like.device)


def _slots(block_ids: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Slots of positions of a sequence with these blocks."""
    return block_ids[positions // block_size].long() * block_size + positions % block_size


def _key_groups(
    block_ids: torch.Tensor, groups: torch.Tensor, plan: KiviLayerPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks, and groups within them, of a sequence's groups of keys."""
    per_block = plan.quantized.num_key_groups
    return block_ids[groups // per_block].long(), groups % per_block
