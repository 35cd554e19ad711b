"""What writing to the pool of hot blocks needs, in C++: :mod:`xquant_vllm.attention.hot.reference`, fast, on CPUs."""

import ctypes
from collections.abc import Sequence

import torch

from xquant_vllm.attention.cpu.abi import FinishCall, ReadCall
from xquant_vllm.attention.cpu.library import library, products, raise_error
from xquant_vllm.attention.cpu.plan import prepare
from xquant_vllm.attention.cpu.tensors import dtype_code, index_address
from xquant_vllm.attention.plan import AttentionLayerPlan


def read_tokens(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    slots: torch.Tensor,
    latents: torch.Tensor,
    *,
    values: bool,
    first_term: int,
    output: torch.Tensor | None,
) -> None:
    """Read a latent of single tokens; see :func:`xquant_vllm.attention.hot.reference.read_tokens`.

    Raises:
        ValueError: a tensor has the wrong type, shape or strides, or a slot is out of range.
    """
    prepared = prepare(plan, *products())
    structs, num_blocks = prepared.structs_of(pages)
    latent = prepared.struct.value if values else prepared.struct.key
    shape = (slots.shape[0], latent.num_heads, latent.width)
    if latents.dtype != torch.float32 or latents.shape != shape or not latents.is_contiguous():
        raise ValueError(
            f"latents must be FP32 {list(shape)} and contiguous, not {latents.dtype} {list(latents.shape)}"
        )
    if output is not None and (output.shape != shape or not output.is_contiguous()):
        raise ValueError(f"output must be {list(shape)} and contiguous, not {list(output.shape)}")
    call = ReadCall(
        pages=structs,
        num_blocks=num_blocks,
        slots=index_address("slots", slots, torch.int64, 1),
        num_tokens=shape[0],
        latents=latents.data_ptr(),
        output=None if output is None else output.data_ptr(),
        dtype=0 if output is None else dtype_code("output", output),
        values=int(values),
        first_term=first_term,
    )
    raise_error(library.xquant_cpu_read_tokens(prepared.pointer, ctypes.byref(call)))


def finish_tokens(plan: AttentionLayerPlan, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Add biases, then norm and turn the keys; see :func:`xquant_vllm.attention.hot.reference.finish_tokens`.

    A bias of keys that no score can show is left out, as everywhere in the C++ kernels.

    Raises:
        ValueError: a tensor has the wrong type, shape or strides, or a position is not in the rotary table.
    """
    prepared = prepare(plan, *products())
    shape = (positions.shape[0], prepared.struct.num_kv_heads, prepared.struct.head_size)
    for name, heads in (("keys", keys), ("values", values)):
        if heads.shape != shape or heads.stride(2) != 1 or heads.dtype != keys.dtype:
            raise ValueError(
                f"{name} must be {list(shape)} in one dtype with contiguous heads, not {list(heads.shape)}"
            )
    call = FinishCall(
        positions=index_address("positions", positions, torch.int64, 1),
        num_tokens=shape[0],
        keys=keys.data_ptr(),
        key_token_stride=keys.stride(0),
        key_head_stride=keys.stride(1),
        values=values.data_ptr(),
        value_token_stride=values.stride(0),
        value_head_stride=values.stride(1),
        dtype=dtype_code("keys", keys),
    )
    raise_error(library.xquant_cpu_finish_tokens(prepared.pointer, ctypes.byref(call)))
