"""What an operation cannot do without: bytes through device memory and multiplications, and how long these take.

Bytes: every input is read once, every output written once. Floating-point operations: those of matrix products, two for
a multiply-add, in the cheapest order that computes the same function; unpacking, norms, RoPE and softmax are not
counted, and neither is what a kernel keeps in memory in between. No version of a kernel runs much faster than
:func:`floor`; one that reaches a large share of it has little left to gain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import Stream


@dataclass(frozen=True)
class Cost:
    """Bytes that must be moved and floating-point operations that must be done."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Roofs:
    """What the device reached in the same run: bytes and floating-point operations per second."""

    copy: float
    matrix: float


def floor(cost: Cost, roofs: Roofs) -> tuple[float, str]:
    """Seconds that the cost takes at least, and which roof binds: ``"copy"`` or ``"matrix"``."""
    moving, computing = cost.bytes / roofs.copy, cost.flops / roofs.matrix
    return (moving, "copy") if moving >= computing else (computing, "matrix")


def visible_tokens(seq_len: int, query_len: int, window: int | None = None) -> int:
    """Cached tokens that any of the last ``query_len`` tokens sees."""
    if not query_len:
        return 0
    return seq_len if window is None else min(seq_len, query_len + window - 1)


def visible_pairs(seq_len: int, query_len: int, window: int | None = None) -> int:
    """Pairs of a query token and a cached token that it sees, itself included."""
    past = seq_len - query_len
    if window is None:
        return query_len * past + query_len * (query_len + 1) // 2
    return sum(min(past + index + 1, window) for index in range(query_len))


def stored_channels(stream: Stream, head: int) -> int:
    """Channels of a latent head that pages hold; a stream with one head is read by all kv heads."""
    if isinstance(stream, AllocatedFormat):
        return sum(channels for _, channels in stream.runs[head if stream.num_heads > 1 else 0])
    return stream.width


def latent_channels(plan: AttentionLayerPlan, terms: Sequence[LatentTerm], head: int) -> int:
    """Channels of a latent that meet the up-projection of a kv head; terms that are added meet it together."""
    return sum(stored_channels(plan.layouts[term.page].streams[term.stream], head) for term in terms if not term.adds)


def cached_bytes(plan: AttentionLayerPlan) -> int:
    """Bytes of one cached token that attention reads, of the layer's own pages and of earlier layers'."""
    streams = {(term.page, term.stream) for term in (*plan.key_terms, *plan.value_terms)}
    return sum(plan.layouts[page].streams[stream].bytes_per_token for page, stream in streams)


def attention_cost(
    plan: AttentionLayerPlan, seq_lens: Sequence[int], query_lens: Sequence[int], element_bytes: int = 2
) -> Cost:
    """Paged attention over latents.

    Bytes: per visible token what the pages hold of it, the block table, per query token query and output, and once the
    rows of both up-projections that meet stored channels. (RoPE's table can be computed and is not counted.)

    Operations, for a kv head with ``c`` stored channels, head size ``s``, ``g`` query heads, ``n`` visible tokens,
    ``q`` query tokens and ``p`` pairs of both::

        keys     2 c s n  to rematerialize them        + 2 g s p  for the scores
           or    2 c s g q  to absorb the projection   + 2 g c p   (neither with RoPE nor with a norm)
        values   2 c s n  to rematerialize them        + 2 g s p  to weigh them
           or    2 c s g q  to project what was weighed + 2 g c p  to weigh latents

    whichever is less. Values that the output projection up-projects take ``2 g c p`` and no matrix.

    Args:
        plan: the layer.
        seq_lens: cached tokens of every sequence, those of the query included.
        query_lens: query tokens of every sequence.
        element_bytes: of queries, outputs and up-projections.
    """
    projection, window = plan.projection, plan.sliding_window
    kv_heads, size = projection.num_kv_heads, projection.head_size
    group = plan.num_heads // kv_heads
    absorbs_keys = projection.rope is None and projection.key_norm is None
    keys = sum(latent_channels(plan, plan.key_terms, head) for head in range(kv_heads))
    values = sum(latent_channels(plan, plan.value_terms, head) for head in range(kv_heads))
    folded = projection.up_value is None
    moved, flops = (keys if folded else keys + values) * size * element_bytes, 0
    for seq_len, query_len in zip(seq_lens, query_lens, strict=True):
        tokens, pairs = visible_tokens(seq_len, query_len, window), visible_pairs(seq_len, query_len, window)
        moved += tokens * cached_bytes(plan) + 4 * -(-tokens // plan.layout.block_size)
        moved += 2 * query_len * plan.num_heads * size * element_bytes
        for channels, absorbs, projected in ((keys, absorbs_keys, True), (values, True, not folded)):
            rematerialized = 2 * channels * size * tokens + 2 * plan.num_heads * size * pairs
            absorbed = 2 * channels * group * (size * query_len * projected + pairs)
            flops += min(rematerialized, absorbed) if absorbs else rematerialized
    return Cost(moved, flops)


def dense_attention_cost(
    heads: int,
    kv_heads: int,
    head_size: int,
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    number_bytes: float = 2,
    element_bytes: int = 2,
) -> Cost:
    """Attention over keys and values: ``2 s`` numbers of ``number_bytes`` per token and kv head, ``4 s`` operations
    per pair and query head, and query and output of every query token.
    """
    moved, flops = 0.0, 0
    for seq_len, query_len in zip(seq_lens, query_lens, strict=True):
        moved += 2 * kv_heads * head_size * number_bytes * visible_tokens(seq_len, query_len)
        moved += 2 * query_len * heads * head_size * element_bytes
        flops += 4 * heads * head_size * visible_pairs(seq_len, query_len)
    return Cost(round(moved), flops)


def store_cost(plan: AttentionLayerPlan, tokens: int, element_bytes: int = 2) -> Cost:
    """Storing new tokens.

    Bytes: what comes in, 8 for the slot, what the layer's own page holds of the token, and what a prediction reads.
    Operations: those of the prediction's matrix, if there is one.
    """
    layout, prediction = plan.layout, plan.prediction
    per_token = 8 + layout.bytes_per_token
    per_token += sum(stream.num_heads * stream.width for stream in layout.streams) * element_bytes
    flops = 0
    if prediction is not None:
        streams = {(term.page, term.stream) for term in prediction.terms}
        per_token += sum(plan.layouts[page].streams[stream].bytes_per_token for page, stream in streams)
        if prediction.matrix is not None:
            stored = [stored_channels(layout.streams[0], head) for head in range(layout.streams[0].num_heads)]
            rows = [latent_channels(plan, prediction.terms, head) for head in range(len(stored))]
            flops = sum(2 * row * column for row, column in zip(rows, stored, strict=True))
    return Cost(per_token * tokens, flops * tokens)
