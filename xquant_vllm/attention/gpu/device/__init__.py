"""Device functions, and the names that all kernels share.

A kernel's docstring says what a program does, its grid, and what it reads and writes. What its arguments are is said
here, and at the tuples that carry tensors: ``Pages`` and ``Latent`` (device/unpack.py), ``KeyTail``
(device/rematerialize.py), ``Batch``, ``Absorbed``, ``Partial`` and ``Scores`` (device/arguments.py), ``Heads``
(decode/attend_heads.py), ``Carried`` (prefill/dense.py), ``Inputs`` (prefill/project_inputs.py), ``Rotation``
(store/rotate.py). A kernel for any tuple takes its tensors under the tuple's name in lower case; a latent is
``latent``, or ``key`` and ``value``.

Tensors, and numbers that are not constants of a compilation::

    columns          int32 [2 * HALF]: which channel of a query or key each column is; -1 is padding
    value_columns    int32 [2 * HALF]: the same for values and outputs
    value_bias       FP32 [num_kv_heads, 2 * HALF]
    value_factors    FP32 [num_kv_heads, 2 * HALF], see band_factors in tables/latent_tables.py
    sinks            FP32 [num_heads]: of every query head the score of a key that has no value
    query_start_loc  int32 [sequences + 1];   seq_lens  int32 [sequences]
    block_table      int32 [sequences, max_blocks], table_stride elements from row to row
    output           [tokens, num_heads, head_size], token_stride and head_stride in elements
    slots            int64 [>= num_tokens]; tokens whose slot is negative are not stored
    keys, values     [room, num_kv_heads, head_size], contiguous: the workspace of prefill
    spans            int32 [spans, len(SPAN_FIELDS)], see prefill/spans.py

Of a tile of cached tokens, one number per token::

    block            int64: block id
    within           slot within the block
    position         position in the sequence
    valid            whether there is such a token; of others nothing is read

Constants of a compilation::

    GROUP            query heads of a kv head
    ROWS             rows of a tile of queries, a power of two of at least 16: ROWS // GROUP query tokens
    TOKENS           tokens of a tile
    HALF             columns of half a head; a head is two halves whose columns pair up under RoPE
    SPLITS           shares of the cached tokens
    WIDTH, KINDS, HIGH, OUTLIERS
                     of a latent: width, kinds, high and most_outliers of LatentTables; with KEY_ and VALUE_ in front
                     where a kernel has two latents
    BIAS, NORM, ROPE whether keys have a bias, a norm, rotating pairs;  VALUE_BIAS  whether values have a bias
    SOFT_CAP, WINDOW, SINKS
                     whether there is one
    DTYPE            of the products' operands
    PRECISION        of the products, where operands are FP32
"""
