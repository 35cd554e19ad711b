"""How far keys and values that were read back are from exact ones, and what that does to attention weights.

Exact keys and values are there for the tokens of the current step alone, as the model has just computed what they are
made from. So errors are those of tokens that the step has stored, and weights are compared in a sequence whose tokens
are all of this step: a prompt that has just begun.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.exact import exact_keys, exact_latents
from xquant_vllm.attention.latents import read_slots
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.projection.rematerialize import rematerialize_keys, rematerialize_values

MOST_TOKENS = 32
"""Tokens whose keys and values are compared at once."""

MOST_KEYS = 256
"""Keys among which attention weights are compared."""

MOST_QUERIES = 8
"""Queries whose weights are compared."""


@dataclass(frozen=True)
class Deviation:
    """Of a layer in a step.

    Attributes:
        keys: norm of the difference of keys over the norm of exact ones, after RoPE.
        values: likewise, of values.
        attention: divergence (KL, in nats) of the attention weights from those of exact keys, mean over queries and
            heads; None where no sequence has all of its tokens in the step.
    """

    keys: float
    values: float
    attention: float | None


def deviation(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    batch: AttentionBatch,
    inputs: Sequence[torch.Tensor],
    folded_value: torch.Tensor | None = None,
) -> Deviation | None:
    """Compare some tokens of a step.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, after RoPE.
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8; they hold the step's tokens.
        plan: the layer's plan.
        batch: the sequences.
        inputs: what the store was given of these tokens.
        folded_value: the up-projection of values, ``[num_kv_heads, head_size, head_size]`` FP32, where the plan has
            none because it is in the output projection.

    Returns:
        None where the step has no token.
    """
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    rows = [
        (row, first, end, length)
        for row, (first, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False))
        if end > first
    ]
    if not rows:
        return None
    chosen = _spread(rows[-1][2], MOST_TOKENS)
    slots, positions = _places(plan, batch, rows, chosen)
    keys, exact = _keys(pages, plan, inputs, chosen, slots, positions)
    projection = plan.projection
    if projection.up_value is None and folded_value is not None:
        projection = replace(projection, up_value=folded_value)
    width = projection.value_width
    values = rematerialize_values(read_slots(pages, plan.layouts, plan.value_terms, slots), projection)
    some = [x[chosen] for x in inputs]
    exact_values = rematerialize_values(exact_latents(plan, some, plan.value_terms, width), projection)
    whole = max((row for row in rows if row[2] - row[1] == row[3] > 1), key=lambda row: row[3], default=None)
    attention = None if whole is None else _divergence(query, pages, plan, batch, inputs, whole)
    return Deviation(_relative(keys, exact), _relative(values, exact_values), attention)


def _spread(number: int, most: int) -> torch.Tensor:
    """Indices of so many things, or of some of them, evenly spread; the last is among them."""
    count = min(number, most)
    return number - 1 - torch.arange(count - 1, -1, -1) * number // count


def _places(
    plan: AttentionLayerPlan, batch: AttentionBatch, rows: Sequence[tuple[int, int, int, int]], tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and positions of query tokens, both ``[n]`` int64."""
    row, _, end, length = torch.tensor(rows).T
    of = torch.searchsorted(end.contiguous(), tokens, right=True)
    positions = length[of] - (end[of] - tokens)
    size = plan.layout.block_size
    blocks = batch.block_table[row[of], positions // size].long()
    return blocks * size + positions % size, positions


def _keys(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    inputs: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys as read back, and exact ones, ``[n, num_kv_heads, head_size]`` FP32."""
    latents = read_slots(pages, plan.layouts, plan.key_terms, slots)
    keys = rematerialize_keys(latents, positions, plan.projection)
    return keys, exact_keys(plan, [x[tokens] for x in inputs], positions)


def _relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def _divergence(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    batch: AttentionBatch,
    inputs: Sequence[torch.Tensor],
    row: tuple[int, int, int, int],
) -> float:
    """Of the weights of some queries of a sequence that begins in this step."""
    _, first, _, length = row
    tokens = first + torch.arange(min(length, MOST_KEYS))
    slots, positions = _places(plan, batch, [row], tokens)
    keys, exact = _keys(pages, plan, inputs, tokens, slots, positions)
    chosen = _spread(len(tokens), MOST_QUERIES)
    queries = query[first + chosen].float()
    actual, expected = (_log_weights(queries, of, positions[chosen], positions, plan) for of in (keys, exact))
    weights = expected.exp()
    # What is masked has no weight, and log-weights of -inf.
    terms = torch.where(weights > 0, weights * (expected - actual), 0)
    return terms.sum(-1).mean().item()


def _log_weights(
    query: torch.Tensor, keys: torch.Tensor, at: torch.Tensor, positions: torch.Tensor, plan: AttentionLayerPlan
) -> torch.Tensor:
    """Logarithms of attention weights, ``[num_kv_heads, group, queries, keys]``; a sink is one more key."""
    kv_heads = plan.projection.num_kv_heads
    tile = query.unflatten(1, (kv_heads, -1))
    scores = torch.einsum("qhgs,khs->hgqk", tile, keys) * plan.scale
    if plan.logits_soft_cap:
        scores = plan.logits_soft_cap * torch.tanh(scores / plan.logits_soft_cap)
    masked = positions > at[:, None]
    if plan.sliding_window is not None:
        masked |= positions <= at[:, None] - plan.sliding_window
    scores = scores.masked_fill(masked, -torch.inf)
    if plan.sinks is not None:
        sinks = plan.sinks.float().view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    return scores.log_softmax(-1)
