"""The C++ kernels of csrc/cpu: :mod:`xquant_vllm.attention.reference`, fast, on CPUs.

What is guaranteed, for one instruction set:

* ``store`` writes the bytes that the reference writes (a NaN or a zero may differ in its sign); of allocated streams
  bytes that read back with the same error;
* ``paged_attention`` agrees with the reference in FP32 to a relative error of about 1e-5;
* the output of a query token has the same bits whatever else is in the batch, however its prompt was cut into chunks,
  wherever its blocks lie and however many threads work: the context is reduced in stretches at fixed positions.
"""

import ctypes
from collections.abc import Sequence

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.cpu.abi import Input, StoreCall
from xquant_vllm.attention.cpu.exact_tokens import exact_tokens
from xquant_vllm.attention.cpu.library import library, products, raise_error
from xquant_vllm.attention.cpu.plan import prepare
from xquant_vllm.attention.cpu.tensors import batch_call, index_address, input_struct, set_heads
from xquant_vllm.attention.plan import AttentionLayerPlan


def store(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    slot_mapping: torch.Tensor,
    inputs: Sequence[torch.Tensor],
) -> None:
    """Quantize what new tokens bring into their slots; see :func:`xquant_vllm.attention.reference.store`.

    Tokens of the inputs may lie at any stride.

    Raises:
        ValueError: a tensor has the wrong type, shape or strides, or a slot is out of range.
    """
    prepared = prepare(plan, *products())
    structs, num_blocks = prepared.structs_of(pages)
    if len(inputs) != len(prepared.input_elements):
        raise ValueError(f"{len(inputs)} inputs were given, the pages have {len(prepared.input_elements)} streams")
    num_tokens = inputs[0].shape[0]
    slots = index_address("slot_mapping", slot_mapping, torch.int64, 1)
    if any(x.shape[0] != num_tokens for x in inputs) or slot_mapping.shape[0] < num_tokens:
        raise ValueError(
            f"inputs of {', '.join(str(x.shape[0]) for x in inputs)} tokens and {slot_mapping.shape[0]} slots do not "
            "fit together"
        )
    rows = (Input * len(inputs))(
        *(
            input_struct(f"input {index}", x, elements)
            for index, (x, elements) in enumerate(zip(inputs, prepared.input_elements, strict=True))
        )
    )
    call = StoreCall(structs, num_blocks, slots, num_tokens, rows)
    raise_error(library.xquant_cpu_store(prepared.pointer, ctypes.byref(call)))


def paged_attention(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    batch: AttentionBatch,
    output: torch.Tensor,
    inputs: Sequence[torch.Tensor] | None = None,
) -> None:
    """Causal attention over pages; see :func:`xquant_vllm.attention.reference.paged_attention`.

    ``query`` and ``output`` may have any strides between tokens and heads.

    Raises:
        ValueError: a tensor has the wrong type, shape or strides, or the batch names tokens or blocks out of range.
    """
    prepared = prepare(plan, *products())
    call = batch_call(*prepared.structs_of(pages), batch, query.shape[0])
    set_heads(call, prepared.heads, query, output)
    exact = exact_tokens(plan, batch, inputs, query.shape[0])
    if exact is not None:
        call.exact_keys, call.exact_values = (tensor.data_ptr() for tensor in exact)
        call.exact_from = plan.exact_from or 0
    raise_error(library.xquant_cpu_attention(prepared.pointer, ctypes.byref(call)))
