"""Storing new tokens through the Triton kernels.

Nothing is read back from the device, no launch depends on what is there and nothing is allocated, so a CUDA graph can
hold these calls.
"""

import torch
import triton

from xquant_vllm.attention.gpu.operands import STORES, operand_type
from xquant_vllm.kivi.gpu.arguments import describe_quantized, describe_residual
from xquant_vllm.kivi.gpu.kivi_gpu_plan import padded_groups, page_constants
from xquant_vllm.kivi.gpu.store_groups import store_groups
from xquant_vllm.kivi.gpu.store_tokens import store_tokens
from xquant_vllm.kivi.plan import KiviBatch, KiviLayerPlan

# From so many tokens on a program has several: there are programs enough.
_MANY_TOKENS, _OF_PROGRAM = 256, 8
# Numbers of a program that quantizes keys at most, unless a group has more, and of one of its warps.
_NUMBERS, _OF_WARP = 4096, 512


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
    """Write new tokens and the groups of keys that they complete; see :func:`reference.store`."""
    tokens = keys.shape[0]
    if not tokens:
        return
    layout, kv_heads = plan.quantized, plan.num_kv_heads
    quantized = describe_quantized(pages, layout)
    residual = describe_residual(residual_pages, plan.residual, batch.residual_block_table)
    constants = page_constants(plan)
    keys, values = _rows("keys", keys), _rows("values", values)
    of_program = _OF_PROGRAM if tokens >= _MANY_TOKENS else 1
    groups, _ = padded_groups(layout)
    store_tokens[(triton.cdiv(tokens, of_program), kv_heads)](
        keys,
        keys.stride(0),
        keys.stride(1),
        values,
        values.stride(0),
        values.stride(1),
        slot_mapping,
        residual_slot_mapping,
        tokens,
        quantized,
        residual,
        TOKENS=of_program,
        WIDTH=triton.next_power_of_2(plan.head_size),
        VALUE_GROUPS=groups,
        BYTES=triton.next_power_of_2(layout.value_group_size * layout.bits // 8),
        VALUE_GROUP=layout.value_group_size,
        **constants,
        num_warps=4 if of_program > 1 else 1,
        **STORES,
    )

    sequences = batch.sequences
    num_sequences, group_size = sequences.seq_lens.shape[0], layout.key_group_size
    of_group = triton.next_power_of_2(group_size)
    at_once = min(triton.next_power_of_2(layout.key_row_bytes), max(1, _NUMBERS * layout.bits // (8 * of_group)))
    numbers = at_once * 8 // layout.bits * of_group
    store_groups[(tokens // group_size + num_sequences, kv_heads, triton.cdiv(layout.key_row_bytes, at_once))](
        sequences.query_start_loc,
        sequences.seq_lens,
        num_sequences,
        sequences.block_table,
        sequences.block_table.stride(0),
        batch.residual_block_table.stride(0),
        quantized,
        residual,
        TOKENS=of_group,
        BYTES=at_once,
        KEY_GROUP=group_size,
        **constants,
        num_warps=max(1, min(8, numbers // _OF_WARP)),
        **STORES,
    )


def _rows(what: str, x: torch.Tensor) -> torch.Tensor:
    """With contiguous channels; a view, where they are contiguous already."""
    operand_type(x.dtype, what)
    return x if x.stride(-1) == 1 else x.contiguous()
