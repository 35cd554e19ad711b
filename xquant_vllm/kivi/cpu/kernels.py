"""The C++ kernels of csrc/cpu/kivi: :mod:`xquant_vllm.kivi.reference`, fast, on CPUs.

What is guaranteed is what :mod:`xquant_vllm.attention.cpu.kernels` guarantees, whose library, instruction set and
threads these are: ``store`` writes the reference's bytes (a NaN or a zero may differ in its sign), and the output of
a query token has the same bits whatever else is in the batch and however many threads work; with ``exact_step=False``
also however its prompt was cut into chunks.
"""

import ctypes

import torch

from xquant_vllm.attention.cpu.abi import Input, StoreCall
from xquant_vllm.attention.cpu.library import check_library, library, raise_error
from xquant_vllm.attention.cpu.tensors import batch_call, index_address, input_struct, page_structs, set_heads
from xquant_vllm.kivi.cpu.abi import STRUCTS, KiviAttentionCall, KiviStoreCall, Residual
from xquant_vllm.kivi.cpu.plan import KiviCpuPlan, prepare
from xquant_vllm.kivi.plan import KiviBatch, KiviLayerPlan

check_library(library, STRUCTS)


def _residual(prepared: KiviCpuPlan, residual_pages: torch.Tensor, batch: KiviBatch) -> Residual:
    structs, num_blocks = page_structs([prepared.residual_page_bytes], [residual_pages])
    table, num_seqs = batch.residual_block_table, batch.sequences.seq_lens.shape[0]
    address = index_address("residual_block_table", table, torch.int32, 2)
    if table.shape[0] < num_seqs:
        raise ValueError(f"{num_seqs} seq_lens and {table.shape[0]} rows of residual_block_table do not fit together")
    return Residual(structs[0], num_blocks, address, table.stride(0), table.shape[1])


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
    """Write new tokens to both kinds of pages; see :func:`xquant_vllm.kivi.reference.store`.

    Tokens of keys and values may lie at any stride.

    Raises:
        ValueError: a tensor has the wrong type, shape or strides, or a slot or block is out of range.
    """
    prepared, num_tokens = prepare(plan), keys.shape[0]
    structs, num_blocks = page_structs([prepared.page_bytes], [pages])
    slots = index_address("slot_mapping", slot_mapping, torch.int64, 1)
    residual_slots = index_address("residual_slot_mapping", residual_slot_mapping, torch.int64, 1)
    key_rows = input_struct("keys", keys, prepared.elements)
    value_rows = (Input * 1)(input_struct("values", values, prepared.elements))
    if values.shape[0] != num_tokens or min(slot_mapping.shape[0], residual_slot_mapping.shape[0]) < num_tokens:
        raise ValueError(
            f"{num_tokens} keys, {values.shape[0]} values, {slot_mapping.shape[0]} slots and "
            f"{residual_slot_mapping.shape[0]} slots of the residual do not fit together"
        )
    call = KiviStoreCall(
        batch_call(structs, num_blocks, batch.sequences, num_tokens),
        _residual(prepared, residual_pages, batch),
        StoreCall(structs, num_blocks, slots, num_tokens, value_rows),
        key_rows,
        residual_slots,
    )
    raise_error(library.xquant_cpu_kivi_store(prepared.pointer, ctypes.byref(call)))


def paged_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    residual_pages: torch.Tensor,
    plan: KiviLayerPlan,
    batch: KiviBatch,
    output: torch.Tensor,
) -> None:
    """Causal attention over both kinds of pages; see :func:`xquant_vllm.kivi.reference.paged_attention`.

    ``query`` and ``output`` may have any strides between tokens and heads.

    Raises:
        ValueError: a tensor has the wrong type, shape or strides, or the batch names tokens or blocks out of range.
    """
    prepared = prepare(plan)
    structs = page_structs([prepared.page_bytes], [pages])
    call = KiviAttentionCall(
        batch_call(*structs, batch.sequences, query.shape[0]), _residual(prepared, residual_pages, batch)
    )
    set_heads(call.batch, prepared.heads, query, output)
    raise_error(library.xquant_cpu_kivi_attention(prepared.pointer, ctypes.byref(call)))
