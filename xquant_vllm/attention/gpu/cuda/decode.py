"""Decoding over per-head latents by the CUDA kernel, in place of the Triton kernel ``attend`` in decode/attend.py."""

import ctypes
from collections.abc import Sequence

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.dtype_codes import DTYPE_CODES
from xquant_vllm.attention.gpu.cuda import library as cuda_library
from xquant_vllm.attention.gpu.cuda.keys import key_arrays, key_factors
from xquant_vllm.attention.gpu.cuda.tables import fits, latent_arrays
from xquant_vllm.attention.gpu.device.arguments import Partial
from xquant_vllm.attention.gpu.gpu_plan import prepare as prepare_gpu_plan
from xquant_vllm.attention.gpu.tables.latent_tables import ALLOCATED, latent_bands
from xquant_vllm.attention.gpu.tables.pairs import arranged
from xquant_vllm.attention.gpu.tables.tile_rotation import rope_arrays
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan

MOST_ROWS = 16
_HEAD_SIZES = (64, 128)
_DTYPES = (torch.float16, torch.bfloat16)
_ALIGNMENT = 16


@per_object
def prepare(plan: AttentionLayerPlan, dtype: torch.dtype) -> cuda_library.CudaDecodePlan | None:
    """What the kernel reads of a plan, made on first use and forgotten together with the plan.

    Args:
        plan: the layer's plan.
        dtype: of the queries.

    Returns:
        None where the kernel does not do what the plan asks for.
    """
    gpu_plan, projection = prepare_gpu_plan(plan, dtype), plan.projection
    head_size, heads = projection.head_size, projection.num_kv_heads
    if (
        head_size not in _HEAD_SIZES
        or gpu_plan.dtype not in _DTYPES
        or gpu_plan.absorb_key
        or gpu_plan.norm
        or not gpu_plan.absorb_value
        or projection.rope is None
        or len(plan.layouts) != 1
        or len(plan.key_terms) != 1
        or len(plan.value_terms) != 1
        or gpu_plan.half * 2 != head_size
    ):
        return None
    # A head that cannot be one band is several: then the latent does not fit.
    cut = [
        [latent_bands(plan.layouts, t, head, 1 << 16) for head in range(heads)]
        for t in (plan.key_terms, plan.value_terms)
    ]
    if not all(fits(of_latent, head_size) for of_latent in cut):
        return None
    rope = rope_arrays(projection.rope, gpu_plan.half)
    if rope is None:
        return None
    key_bands, value_bands = ([of_head[0] for of_head in of_latent] for of_latent in cut)
    device, columns = plan.device, gpu_plan.columns
    bias = None if projection.key_bias is None else arranged(projection.key_bias, columns)
    factors = key_factors(key_bands, arranged(projection.up_key.to(device), columns))
    key, value = latent_arrays(key_bands, head_size, factors.dtype), latent_arrays(value_bands, head_size)
    of_keys = key_arrays(key_bands, factors, key.channels, bias)
    tensors = {
        "key": key.records,
        "value": value.records,
        "key_quads": key.quads,
        "value_quads": value.quads,
        "key_masks": key.masks,
        "value_masks": value.masks,
        "up_key": of_keys.up,
        "key_rows": of_keys.rows,
        "value_levels": value.half_levels,
        "value_channels": value.channels.to(torch.int32),
        "columns": columns,
        "rope_base": rope.base,
        "rope_offset": rope.offset,
    }
    tensors = {name: tensor.to(device).contiguous() for name, tensor in tensors.items()}
    of_plan = cuda_library.CudaDecodePlan(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        key_allocated=int(key_bands[0].fields["kind"] == ALLOCATED),
        value_allocated=int(value_bands[0].fields["kind"] == ALLOCATED),
        key_type=DTYPE_CODES[factors.dtype],
        key_row_bytes=key.row_bytes,
        value_row_bytes=value.row_bytes,
        num_heads=plan.num_heads,
        num_kv_heads=heads,
        head_size=head_size,
        block_size=plan.layout.block_size,
        window=plan.sliding_window or 0,
        scale=plan.scale,
        soft_cap=plan.logits_soft_cap or 0.0,
    )
    of_plan.tensors = list(tensors.values())
    return of_plan


def takes(plan: AttentionLayerPlan, dtype: torch.dtype, pages: Sequence[torch.Tensor], rows: int) -> bool:
    """Whether the kernel does a call.

    Args:
        plan: the layer's plan.
        dtype: of the queries.
        pages: the call's pages.
        rows: query tokens of a sequence, at most, times the query heads of a kv head.
    """
    return (
        rows <= MOST_ROWS
        and cuda_library.available(pages[0].device)
        and all(of.data_ptr() % _ALIGNMENT == 0 and of.stride(0) % _ALIGNMENT == 0 for of in pages)
        and prepare(plan, dtype) is not None
    )


def launch(
    plan: AttentionLayerPlan,
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    batch: AttentionBatch,
    partial: Partial,
    sequences: int,
    rows: int,
    library: ctypes.CDLL | None = None,
) -> None:
    """Fill ``partial``, as ``attend`` in decode/attend.py does, from a call that the kernel takes.

    Args:
        plan: the layer's plan.
        query: ``[tokens, num_heads, head_size]``, channels contiguous.
        pages: the call's pages.
        batch: the sequences.
        partial: ``[tokens, num_heads, splits, ...]``, written.
        sequences: how many of the sequences, from the first on.
        rows: query tokens of a sequence, at most, times the query heads of a kv head.
        library: another library than the installed one, for tests.
    """
    library = library or cuda_library.library()
    of_plan = prepare(plan, query.dtype)
    assert library is not None
    assert of_plan is not None
    call = cuda_library.DecodeCall(
        pages=pages[0].data_ptr(),
        page_stride=pages[0].stride(0),
        query=query.data_ptr(),
        query_token_stride=query.stride(0),
        query_head_stride=query.stride(1),
        query_start_loc=batch.query_start_loc.data_ptr(),
        seq_lens=batch.seq_lens.data_ptr(),
        block_table=batch.block_table.data_ptr(),
        table_stride=batch.block_table.stride(0),
        sums=partial.sums.data_ptr(),
        stats=partial.stats.data_ptr(),
        sum_columns=partial.sums.shape[-1],
        num_sequences=sequences,
        splits=partial.sums.shape[2],
        row_tiles=1 if rows <= MOST_ROWS // 2 else 2,
        type=DTYPE_CODES[query.dtype],
    )
    stream = torch.cuda.current_stream(query.device).cuda_stream if query.is_cuda else 0
    cuda_library.check(library.xquant_cuda_decode(ctypes.byref(of_plan), ctypes.byref(call), ctypes.c_void_p(stream)))
