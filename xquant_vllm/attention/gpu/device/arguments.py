"""The tuples of arguments that kernels of attention are handed alike."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """:class:`AttentionBatch` and the queries; strides in elements."""

    query: Any  # [tokens, num_heads, head_size], after RoPE, channels contiguous
    token_stride: Any
    head_stride: Any
    query_start_loc: Any  # int32 [sequences + 1]
    seq_lens: Any  # int32 [sequences]
    block_table: Any  # int32 [sequences, max_blocks]; its stride is an argument of its own, never specialized on
    num_heads: Any


class Absorbed(NamedTuple):
    """Queries times the up-projection of every band, of keys without norm and RoPE; see decode/absorb.py."""

    query: Any  # [tokens, num_heads, most_bands, WIDTH], in the dtype of the products
    sums: Any  # [tokens, num_heads, most_bands, 1 + OUTLIERS], FP32
    most_bands: Any


class Partial(NamedTuple):
    """What a split leaves, FP32.

    ``sums`` ``[tokens, num_heads, splits, columns]`` are of value codes weighed by scales (columns are then channels of
    the latent), or of values (channels of the head, in halves). ``stats`` ``[tokens, num_heads, splits, 3]`` are the
    largest score, the sum of weights, and the sum of weighed zero points. Where the largest score is -inf, nothing else
    is written.
    """

    sums: Any
    stats: Any


class Scores(NamedTuple):
    """From products to scores; a ``window`` or ``soft_cap`` of 0 is none."""

    scale: Any
    soft_cap: Any
    window: Any
