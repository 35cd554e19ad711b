"""Keys and values of single tokens, read from pages and written to the pool; see attention/hot/rematerialize.py.

Two kernels and the matrix products between them, which are PyTorch's. Launches depend on the number of tokens alone and
nothing is allocated, so a CUDA graph can hold them. Tokens that have no place in the pool pass through the products and
are left out by the kernels.
"""

from collections.abc import Hashable, Sequence

import torch
import triton

from xquant_vllm.attention.gpu.arguments import describe_latent
from xquant_vllm.attention.gpu.gpu_plan import GpuPlan, prepare
from xquant_vllm.attention.gpu.hot.buffers import HotBuffers, carries
from xquant_vllm.attention.gpu.hot.read_latents import read_latents
from xquant_vllm.attention.gpu.hot.read_tables import read_tables, width_of
from xquant_vllm.attention.gpu.hot.write_pool import write_pool
from xquant_vllm.attention.gpu.operands import ATTENDS
from xquant_vllm.attention.gpu.page_pointers import page_pointers
from xquant_vllm.attention.hot.rematerialize import up_projections
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.plan import AttentionLayerPlan

# From so many tokens on a program has several: there are programs enough.
_MANY_TOKENS = 256
_OF_PROGRAM = 4


def prepare_hot(plan: AttentionLayerPlan, dtype: torch.dtype) -> None:
    """Make what a layer's writes need on the device: the first one may be in a CUDA graph."""
    prepare(plan, dtype)
    up_projections(plan, dtype)
    read_tables(plan, False, False)
    if not carries(plan):
        read_tables(plan, True, False)
    elif len(plan.key_terms) > 1:
        read_tables(plan, False, True)


def write_tokens(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    tokens: HotTokens,
    buffers: HotBuffers,
    hot_keys: torch.Tensor,
    hot_values: torch.Tensor,
    layer: Hashable = None,
    before: Hashable = None,
) -> None:
    """Rematerialize tokens into the pool.

    Args:
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8; they hold the tokens.
        plan: the layer's plan.
        tokens: the tokens, at most as many as the buffers are made for; negative hot slots are left out.
        buffers: shared by the layers.
        hot_keys: ``[hot blocks, block size, num_kv_heads, head_size]``, contiguous, in the buffers' dtype; written.
        hot_values: likewise.
        layer: under what name the layer's latents are carried on; None: they are not.
        before: under what name the layer before in a chain has left its latents, or None.
    """
    dtype, count, projection = buffers.dtype, tokens.count, plan.projection
    gpu_plan, ups = prepare(plan, dtype), up_projections(plan, dtype)
    heads, size = projection.num_kv_heads, projection.head_size
    if carries(plan):
        rounded = _read_chained(pages, plan, tokens, buffers, layer, before)
        if ups.both is not None:
            (both,) = buffers.projected((count, 2, heads, size))
            torch.mm(rounded[0], ups.both, out=both.flatten(1))
            keys, values = both.unbind(1)
        else:
            keys, values = (x.transpose(0, 1) for x in buffers.projected((heads, count, size), (heads, count, size)))
            _multiply(rounded, ups.key, keys)
            values = _multiply(rounded, ups.value, values)
    else:
        buffers.left = None
        keys, values = (x.transpose(0, 1) for x in buffers.projected((heads, count, size), (heads, count, size)))
        _multiply(_read(pages, plan, tokens, buffers, values=False), ups.key, keys)
        values = _multiply(_read(pages, plan, tokens, buffers, values=True), ups.value, values)
    _write(gpu_plan, tokens, keys, values, hot_keys, hot_values)


def _multiply(latents: torch.Tensor, up: torch.Tensor | None, heads: torch.Tensor) -> torch.Tensor:
    """``[latent heads, n, width]`` times ``[kv_heads, width, head_size]``, into ``[n, kv_heads, head_size]``.

    Returns:
        The product, or the latents, where these are the values.
    """
    if up is None:
        return latents.transpose(0, 1)
    torch.bmm(latents.expand(up.shape[0], -1, -1), up, out=heads.transpose(0, 1))
    return heads


def _read_chained(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    tokens: HotTokens,
    buffers: HotBuffers,
    layer: Hashable,
    before: Hashable,
) -> torch.Tensor:
    """A latent that keys and values share: its last term alone, where the layer before has left the others."""
    left, buffers.left = buffers.left, None
    chained = len(plan.key_terms) > 1 and left is not None and left[0] is tokens and left[1] == before
    rounded = _read(pages, plan, tokens, buffers, values=False, last=chained, carry=layer is not None)
    if layer is not None:
        buffers.left = tokens, layer
    return rounded


def _read(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    tokens: HotTokens,
    buffers: HotBuffers,
    *,
    values: bool,
    last: bool = False,
    carry: bool = False,
) -> torch.Tensor:
    """Read a latent, ``[heads, n, width]`` in the products' dtype.

    Args:
        pages: see :func:`write_tokens`.
        plan: likewise.
        tokens: likewise.
        buffers: likewise; they have the terms before already if only the ``last`` is read.
        values: whether it is the value latent.
        last: whether only its last term is read.
        carry: whether it is kept in FP32, too.
    """
    tables = read_tables(plan, values, last)
    terms = plan.value_terms if values else plan.key_terms
    stream = plan.layouts[terms[0].page].streams[terms[0].stream]
    count, latent = tokens.count, tables.latent
    latents, rounded = buffers.latents(stream.num_heads, count, width_of(plan.layouts, terms))
    of_program = _OF_PROGRAM if count >= _MANY_TOKENS else 1
    read_latents[(triton.cdiv(count, of_program), tables.segments.shape[0])](
        tokens.slots,
        tokens.hot_slots,
        count,
        page_pointers(pages, plan.layout.block_size),
        describe_latent(latent),
        tables.segments,
        tables.order,
        latents,
        rounded,
        rounded.stride(0),
        rounded.stride(1),
        TOKENS=of_program,
        WIDTH=latent.width,
        KINDS=latent.kinds,
        HIGH=latent.high,
        OUTLIERS=latent.most_outliers,
        ADDS=tables.adds,
        CARRIES=carry and latents is not rounded,
        **ATTENDS,
    )
    return rounded


def _write(
    gpu_plan: GpuPlan,
    tokens: HotTokens,
    keys: torch.Tensor,
    values: torch.Tensor,
    hot_keys: torch.Tensor,
    hot_values: torch.Tensor,
) -> None:
    """Bias, norm and RoPE, then into the pool."""
    count = tokens.count
    of_program = _OF_PROGRAM if count >= _MANY_TOKENS else 1
    write_pool[(triton.cdiv(count, of_program), hot_keys.shape[2])](
        keys,
        keys.stride(0),
        keys.stride(1),
        values,
        values.stride(0),
        values.stride(1),
        tokens.positions,
        tokens.hot_slots,
        count,
        gpu_plan.columns,
        gpu_plan.value_columns,
        gpu_plan.tail,
        gpu_plan.value_bias,
        hot_keys,
        hot_values,
        TOKENS=of_program,
        HALF=gpu_plan.half,
        BIAS=gpu_plan.has_key_bias,
        NORM=gpu_plan.norm,
        ROPE=gpu_plan.rotates,
        VALUE_BIAS=gpu_plan.has_value_bias,
        **ATTENDS,
    )
