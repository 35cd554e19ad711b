"""Decoding over per-head latents by the CUDA kernel, in place of the Triton kernel ``attend`` in decode/attend.py."""

import ctypes
import weakref
from collections.abc import Sequence

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.cuda import library as cuda_library
from xquant_vllm.attention.gpu.cuda.keys import key_arrays, key_factors
from xquant_vllm.attention.gpu.cuda.tables import fits, latent_arrays, rope_arrays
from xquant_vllm.attention.gpu.decode.attend import Partial
from xquant_vllm.attention.gpu.prepared import PreparedPlan
from xquant_vllm.attention.gpu.tables.latent_tables import ALLOCATED, latent_chunks
from xquant_vllm.attention.gpu.tables.pairs import arranged

MOST_ROWS = 16
_HEAD_SIZES = (64, 128)
_TYPES = {torch.float16: 1, torch.bfloat16: 2}
_KEY_TYPES = {torch.float16: 1, torch.int8: 3}
_ALIGNMENT = 16


class DecodePlan:
    """What the kernel reads of a plan: the struct, and the tensors that it points to."""

    def __init__(self, struct: cuda_library.DecodePlan, kept: list[torch.Tensor]) -> None:
        """Keep both."""
        self.struct, self._kept = struct, kept


def decode_plan(prepared: PreparedPlan) -> DecodePlan | None:
    """The plan for the kernel, or None where the kernel does not do what it says."""
    plan, projection = prepared.plan, prepared.plan.projection
    head_size, heads = projection.head_size, projection.num_kv_heads
    if (
        head_size not in _HEAD_SIZES
        or prepared.dtype not in _TYPES
        or prepared.absorb_key
        or prepared.norm
        or not prepared.absorb_value
        or projection.rope is None
        or len(plan.layouts) != 1
        or len(plan.key_terms) != 1
        or len(plan.value_terms) != 1
        or prepared.half * 2 != head_size
    ):
        return None
    # A head that cannot be one chunk is several: then the latent does not fit.
    cut = [[latent_chunks(plan.layouts, t, head, 1 << 16) for head in range(heads)] for t in _terms(prepared)]
    if not all(fits(of_latent, head_size) for of_latent in cut):
        return None
    rope = rope_arrays(projection.rope, prepared.half)
    if rope is None:
        return None
    key_chunks, value_chunks = ([of_head[0] for of_head in of_latent] for of_latent in cut)
    device, columns = plan.device, prepared.columns
    bias = None if projection.key_bias is None else arranged(projection.key_bias, columns)
    factors = key_factors(key_chunks, arranged(projection.up_key.to(device), columns))
    key, value = latent_arrays(key_chunks, head_size, factors.dtype), latent_arrays(value_chunks, head_size)
    of_keys = key_arrays(key_chunks, factors, key.channels, bias)
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
    struct = cuda_library.DecodePlan(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        key_allocated=int(key_chunks[0].fields["kind"] == ALLOCATED),
        value_allocated=int(value_chunks[0].fields["kind"] == ALLOCATED),
        key_type=_KEY_TYPES[factors.dtype],
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
    return DecodePlan(struct, list(tensors.values()))


def _terms(prepared: PreparedPlan) -> tuple:
    return prepared.plan.key_terms, prepared.plan.value_terms


_plans: dict[int, DecodePlan | None] = {}


def _plan_of(prepared: PreparedPlan) -> DecodePlan | None:
    """Made on first use and forgotten together with the prepared plan."""
    if id(prepared) not in _plans:
        _plans[id(prepared)] = decode_plan(prepared)
        weakref.finalize(prepared, _plans.pop, id(prepared), None)
    return _plans[id(prepared)]


def arrange(prepared: PreparedPlan) -> None:
    """Do now what the first call would: it allocates, and copies to the device."""
    if cuda_library.available(prepared.columns.device):
        _plan_of(prepared)


def takes(prepared: PreparedPlan, pages: Sequence[torch.Tensor], rows: int) -> bool:
    """Whether the kernel does a call.

    Args:
        prepared: the plan.
        pages: the call's pages.
        rows: query tokens of a sequence, at most, times the query heads of a kv head.
    """
    return (
        rows <= MOST_ROWS
        and cuda_library.available(pages[0].device)
        and all(of.data_ptr() % _ALIGNMENT == 0 and of.stride(0) % _ALIGNMENT == 0 for of in pages)
        and _plan_of(prepared) is not None
    )


def attend(
    prepared: PreparedPlan,
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
        prepared: the plan.
        query: ``[tokens, num_heads, head_size]``, channels contiguous.
        pages: the call's pages.
        batch: the sequences.
        partial: ``[tokens, num_heads, splits, ...]``, written.
        sequences: how many of the sequences, from the first on.
        rows: query tokens of a sequence, at most, times the query heads of a kv head.
        library: another library than the installed one, for tests.
    """
    library = library or cuda_library.library()
    plan = _plan_of(prepared)
    assert library is not None
    assert plan is not None
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
        type=_TYPES[query.dtype],
    )
    stream = torch.cuda.current_stream(query.device).cuda_stream if query.is_cuda else 0
    cuda_library.check(
        library.xquant_cuda_decode(ctypes.byref(plan.struct), ctypes.byref(call), ctypes.c_void_p(stream))
    )
