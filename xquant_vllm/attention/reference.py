"""Paged attention over quantized latents in PyTorch: the oracle of every kernel, and the fallback where none was built.

Every attended token, also of the chunk being prefilled, is read back from the pages. So a token's output does not
depend on how its prompt was cut into chunks, on what was found in the prefix cache, or on its neighbours in the batch.
Only where a plan says ``exact_from`` do the tokens of a prompt see those of their own step as they were computed.
"""

from collections.abc import Sequence

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.exact import exact_latents
from xquant_vllm.attention.latents import read_blocks, read_slots
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.pages import store_latents
from xquant_vllm.projection.rematerialize import rematerialize_keys, up_project

# Queries scored at once; bounds the score matrix to this times the context, per head.
_QUERY_TILE = 256


def store(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    slot_mapping: torch.Tensor,
    inputs: Sequence[torch.Tensor],
) -> None:
    """Quantize what new tokens bring into their slots.

    Args:
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8; the first is written. The others are
            read where the plan predicts from them: they must hold these tokens already.
        plan: the layer's plan.
        slot_mapping: ``[>= num_tokens]`` int64; negative entries are padding.
        inputs: for every stream of the layer's own pages its latents (or X), ``[num_tokens, num_heads * width]`` in any
            shape with these elements per token.
    """
    slots = slot_mapping[: inputs[0].shape[0]]
    kept = torch.nonzero(slots >= 0).squeeze(1)
    slots = slots[kept]
    rows = [x.flatten(1)[kept] for x in inputs]
    if plan.rotation is not None:
        rows[0] = plan.rotation.apply(rows[0])
    if plan.prediction is not None:
        predicted = read_slots(pages, plan.layouts, plan.prediction.terms, slots)
        if plan.prediction.matrix is not None:
            predicted = torch.einsum("thp,hpw->thw", predicted, plan.prediction.matrix)
        rows[0] = rows[0].float() - predicted.flatten(1)
    store_latents(pages[0], plan.layout, slots, tuple(rows))


def paged_attention(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    batch: AttentionBatch,
    output: torch.Tensor,
    inputs: Sequence[torch.Tensor] | None = None,
) -> None:
    """Causal attention of query tokens over their sequences' pages.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, after RoPE.
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8.
        plan: the layer's plan.
        batch: the sequences.
        output: ``[num_tokens, num_heads, head_size]``, written.
        inputs: what :func:`store` was given of these tokens; read if the plan has ``exact_from``, and required if a
            sequence has so many query tokens.
    """
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    for index, seq_len in enumerate(lengths):
        begin, end = starts[index], starts[index + 1]
        if end > begin:
            exact = None
            if plan.exact_from is not None and end - begin >= plan.exact_from:
                assert inputs is not None
                exact = [x[begin:end] for x in inputs]
            output[begin:end] = _attend(query[begin:end], pages, plan, batch.block_table[index], seq_len, exact)


def _attend(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    block_ids: torch.Tensor,
    seq_len: int,
    exact: Sequence[torch.Tensor] | None,
) -> torch.Tensor:
    """One sequence; returns ``[query_len, num_heads, head_size]`` in the query's dtype.

    ``exact`` are the inputs of its query tokens, if these are not to be read from pages.
    """
    query_len = query.shape[0]
    block_size = plan.layout.block_size
    first_position = seq_len - query_len
    # Blocks wholly behind the window of the first query may have been freed and reused.
    oldest = 0 if plan.sliding_window is None else max(0, first_position - plan.sliding_window + 1)
    first_block, last_block = oldest // block_size, -(-seq_len // block_size)
    blocks = block_ids[first_block:last_block]
    positions = torch.arange(first_block * block_size, seq_len, device=query.device)
    key_latents = read_blocks(pages, plan.layouts, plan.key_terms, blocks)[: positions.numel()]
    value_latents = key_latents
    if plan.value_terms != plan.key_terms:
        value_latents = read_blocks(pages, plan.layouts, plan.value_terms, blocks)[: positions.numel()]
    if exact is not None:
        key_latents, value_latents = (
            torch.cat((cached[:-query_len], exact_latents(plan, exact, terms, cached.shape[-1])))
            for cached, terms in ((key_latents, plan.key_terms), (value_latents, plan.value_terms))
        )
    # Slots older than the window were possibly never written for this sequence: keep them out of 0 * NaN.
    visible = positions >= oldest
    key_latents, value_latents, positions = key_latents[visible], value_latents[visible], positions[visible]

    projection = plan.projection
    keys = rematerialize_keys(key_latents, positions, projection)
    group = plan.num_heads // projection.num_kv_heads
    value_latents = value_latents.expand(-1, projection.num_kv_heads, -1)
    result = torch.empty_like(query)
    for begin in range(0, query_len, _QUERY_TILE):
        tile = query[begin : begin + _QUERY_TILE].float().unflatten(1, (projection.num_kv_heads, group))
        query_positions = first_position + begin + torch.arange(tile.shape[0], device=query.device)
        scores = torch.einsum("qhgs,khs->hgqk", tile, keys) * plan.scale
        if plan.logits_soft_cap:
            scores = plan.logits_soft_cap * torch.tanh(scores / plan.logits_soft_cap)
        masked = positions > query_positions[:, None]
        if plan.sliding_window is not None:
            masked |= positions <= query_positions[:, None] - plan.sliding_window
        scores = scores.masked_fill(masked, -torch.inf)
        if plan.sinks is not None:
            sinks = plan.sinks.float().view(-1, group, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1)[..., : positions.numel()]
        # V is absorbed: weigh the latents first, up-project once per query instead of once per cached token.
        attended = torch.einsum("hgqk,khw->qghw", weights, value_latents)
        heads = up_project(attended.flatten(0, 1), projection.up_value).unflatten(0, (-1, group))
        if projection.value_bias is not None:
            # What a sink takes of the weight has no value, nor a bias.
            share = weights.sum(-1).permute(2, 1, 0).unsqueeze(-1)
            heads = heads + share * projection.value_bias
        result[begin : begin + tile.shape[0]] = heads.transpose(1, 2).flatten(1, 2).to(result.dtype)
    return result
