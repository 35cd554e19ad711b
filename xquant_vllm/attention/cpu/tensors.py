"""Tensors of a call, checked, as the structs that the C++ kernels take."""

import ctypes
from collections.abc import Sequence

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.cpu.abi import AttentionCall, Input, Pages

# As in csrc/cpu/api.h.
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def dtype_number(dtype: torch.dtype) -> int:
    """The kernels' number of FP32, FP16 or BF16."""
    return _DTYPES[dtype]


def dtype_code(name: str, tensor: torch.Tensor) -> int:
    """The kernels' number of a tensor's dtype.

    Raises:
        ValueError: the tensor is of another dtype than FP32, FP16 and BF16, or on another device.
    """
    code = _DTYPES.get(tensor.dtype)
    if code is None or tensor.device.type != "cpu":
        raise ValueError(f"{name} must be FP32, FP16 or BF16 on the CPU, not {tensor.dtype} on {tensor.device}")
    return code


def page_structs(page_bytes: Sequence[int], pages: Sequence[torch.Tensor]) -> tuple[ctypes.Array, int]:
    """The structs of a call's pages, and the number of blocks that all of them have.

    Args:
        page_bytes: bytes of a page of each.
        pages: ``[num_blocks, page_bytes]`` uint8 each; rows may be strided.

    Raises:
        ValueError: they are others.
    """
    if len(pages) != len(page_bytes):
        raise ValueError(f"{len(pages)} pages were given, the plan reads {len(page_bytes)}")
    for tensor, size in zip(pages, page_bytes, strict=True):
        if (
            tensor.dtype != torch.uint8
            or tensor.device.type != "cpu"
            or tensor.ndim != 2
            or tensor.shape[1] != size
            or tensor.stride(1) != 1
        ):
            raise ValueError(
                f"pages must be uint8 [num_blocks, {size}] on the CPU with contiguous rows, not {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
            )
    structs = (Pages * len(pages))(*(Pages(tensor.data_ptr(), tensor.stride(0)) for tensor in pages))
    return structs, min(tensor.shape[0] for tensor in pages)


def index_address(name: str, tensor: torch.Tensor, dtype: torch.dtype, ndim: int) -> int:
    """The address of a tensor of indices.

    Raises:
        ValueError: it is not of ``dtype`` and ``ndim`` dimensions on the CPU, or its rows are not contiguous.
    """
    if (
        tensor.dtype != dtype
        or tensor.device.type != "cpu"
        or tensor.ndim != ndim
        or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1)
    ):
        raise ValueError(
            f"{name} must be {dtype} with {ndim} dimension(s) on the CPU and contiguous rows, not {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def input_struct(name: str, tensor: torch.Tensor, elements: int) -> Input:
    """What new tokens bring, ``[num_tokens, ...]`` with ``elements`` numbers per token, which are contiguous.

    Raises:
        ValueError: they are others.
    """
    code = dtype_code(name, tensor)
    if tensor.ndim != 2 or tensor.shape[1] != elements or tensor.stride(1) != 1:
        count = 1
        for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
            if size > 1 and stride != count:
                raise ValueError(f"a token of {name} must be contiguous")
            count *= size
        if tensor.ndim < 2 or count != elements:
            raise ValueError(f"{name} must hold {elements} numbers per token, not {list(tensor.shape)}")
    return Input(tensor.data_ptr(), tensor.stride(0), code)


def batch_call(pages: ctypes.Array, num_blocks: int, batch: AttentionBatch, num_tokens: int) -> AttentionCall:
    """The struct of a batch, so far without query and output.

    Args:
        pages: see :func:`page_structs`.
        num_blocks: likewise.
        batch: the sequences.
        num_tokens: query tokens.

    Raises:
        ValueError: a tensor of the batch has the wrong type or shape.
    """
    global _last
    # A batch goes through all layers: its tensors are looked at once.
    if _last[0] is not batch or _last[1].num_tokens != num_tokens:
        _last = (batch, _checked_call(batch, num_tokens))
    call = AttentionCall.from_buffer_copy(_last[1])
    call.pages, call.num_blocks = pages, num_blocks
    return call


_last: tuple[AttentionBatch | None, AttentionCall] = (None, AttentionCall())


def _checked_call(batch: AttentionBatch, num_tokens: int) -> AttentionCall:
    table = batch.block_table
    num_seqs = batch.seq_lens.shape[0]
    call = AttentionCall(
        num_tokens=num_tokens,
        query_start_loc=index_address("query_start_loc", batch.query_start_loc, torch.int32, 1),
        seq_lens=index_address("seq_lens", batch.seq_lens, torch.int32, 1),
        block_table=index_address("block_table", table, torch.int32, 2),
        block_table_stride=table.stride(0),
        max_blocks=table.shape[1],
        num_seqs=num_seqs,
    )
    if batch.query_start_loc.shape[0] != num_seqs + 1 or table.shape[0] < num_seqs:
        raise ValueError(
            f"{num_seqs} seq_lens, {batch.query_start_loc.shape[0]} query_start_loc and {table.shape[0]} rows of "
            "block_table do not fit together"
        )
    return call


def set_heads(call: AttentionCall, heads: tuple[int, int], query: torch.Tensor, output: torch.Tensor) -> None:
    """Add query and output, ``[num_tokens, *heads]`` with contiguous heads, to a batch.

    Raises:
        ValueError: they are others, or unlike.
    """
    for name, tensor in (("query", query), ("output", output)):
        if tensor.ndim != 3 or tensor.shape[1:] != heads or tensor.stride(2) != 1:
            raise ValueError(
                f"{name} must be [num_tokens, {heads[0]}, {heads[1]}] with contiguous heads, not "
                f"{list(tensor.shape)} with strides {tensor.stride()}"
            )
    dtype = dtype_code("query", query)
    if dtype_code("output", output) != dtype or output.shape[0] != query.shape[0]:
        raise ValueError(
            f"output must be like query, {query.dtype} {list(query.shape)}, not {output.dtype} {list(output.shape)}"
        )
    call.query, call.query_token_stride, call.query_head_stride = query.data_ptr(), query.stride(0), query.stride(1)
    call.output, call.output_token_stride, call.output_head_stride = (
        output.data_ptr(),
        output.stride(0),
        output.stride(1),
    )
    call.dtype = dtype
