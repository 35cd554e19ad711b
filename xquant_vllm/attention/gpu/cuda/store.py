"""Storing latents, and X, by the CUDA kernels."""

import ctypes
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from xquant_vllm.attention.dtype_codes import DTYPE_CODES
from xquant_vllm.attention.gpu.cuda import library as cuda_library
from xquant_vllm.attention.gpu.tables.code_bytes import code_bytes
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat, channel_tables, scale_values
from xquant_vllm.codec.allocation import Runs, run_bytes
from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.codec.packing import UNQUANTIZED_BITS

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SMALLEST_BLOCK = 8
# FP32 copies of a token, twice, and its codes, in a block's shared memory.
_MOST_ROTATED = 16384


def byte_records(runs: Runs) -> torch.Tensor:
    """Which codes every byte of a row holds, see tables/code_bytes.py: int16 ``[bytes, 4]``, ``xquant_cuda_byte``."""
    channel, stride, bits, shift = code_bytes(runs)
    return torch.stack((channel, stride, bits | shift << 8, torch.zeros_like(bits)), 1).to(torch.int16)


@per_object
def prepare(plan: AttentionLayerPlan, device: torch.device) -> cuda_library.StoreCall:
    """What does not change from call to call of a plan, made on first use and forgotten together with the plan.

    Args:
        plan: a plan that the kernels do.
        device: where the tables are kept.
    """
    tensors: list[torch.Tensor] = []

    def kept(tensor: torch.Tensor) -> int:
        tensors.append(tensor.to(device).contiguous())
        return tensors[-1].data_ptr()

    call = cuda_library.StoreCall(num_streams=len(plan.layout.streams), block_size=plan.layout.block_size)
    for index, struct in zip(range(call.num_streams), call.streams, strict=False):
        _describe_stream(struct, plan.layout, index, kept)
    if plan.rotation is not None:
        call.signs, call.mix, call.block = kept(plan.rotation.signs), kept(plan.rotation.mix), plan.rotation.block
    call.tensors = tensors
    return call


def _describe_stream(
    struct: cuda_library.StoreStream, layout: PageLayout, index: int, kept: Callable[[torch.Tensor], int]
) -> None:
    """Fill a struct; ``kept`` keeps a tensor on the device and returns its address."""
    stream, at = layout.streams[index], layout.offsets[index]
    struct.num_heads, struct.width = stream.num_heads, stream.width
    struct.codes, struct.scales, struct.zeros, struct.outliers = at.codes, at.scales, at.zeros, at.outliers
    if isinstance(stream, StreamFormat):
        struct.bits, struct.group_size, struct.outlier_channels = stream.bits, stream.group_size, 0
        if stream.bits != UNQUANTIZED_BITS:
            struct.outlier_channels = stream.outlier_channels
            struct.bytes = kept(byte_records(((stream.bits, stream.group_size),)))
        return
    tables = [channel_tables(runs) for runs in stream.runs]
    channels = [table[0].numel() for table in tables]
    sizes = [run_bytes(runs) for runs in stream.runs]
    first = list(accumulate(sizes, initial=0))
    heads = [
        [at.codes + layout.block_size * first[h], sizes[h], channels[h], sum(channels[:h]), first[h]]
        for h in range(stream.num_heads)
    ]
    struct.heads = kept(torch.tensor(heads, dtype=torch.int32))
    struct.bytes = kept(torch.cat([byte_records(runs) for runs in stream.runs]))
    struct.step = kept(torch.cat([step for step, _, _ in tables]))
    struct.half_levels = kept(torch.cat([largest / 2 for _, largest, _ in tables]))
    struct.worth = kept(torch.cat([worth for _, _, worth in tables]))
    struct.total_worth = kept(torch.stack([worth.sum() for _, _, worth in tables]))
    struct.scale_values = kept(scale_values())


def does(plan: AttentionLayerPlan) -> bool:
    """Whether the kernels do what a plan asks for, apart from whether they are there."""
    streams, rotation = plan.layout.streams, plan.rotation
    if plan.prediction is not None or len(streams) > 2:
        return False
    if rotation is None:
        return True
    return (
        len(streams) == 1
        and not isinstance(streams[0], AllocatedFormat)
        and streams[0].num_heads == 1
        and rotation.block >= _SMALLEST_BLOCK
        and streams[0].width <= _MOST_ROTATED
    )


def takes(plan: AttentionLayerPlan, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels do a call."""
    return cuda_library.available(inputs[0].device) and does(plan) and all(_is_rows(x) for x in inputs)


def _is_rows(x: torch.Tensor) -> bool:
    """Whether a token's numbers are contiguous, and of a type that is read."""
    return x.dtype in _DTYPES and (x.shape[0] == 0 or x[0].is_contiguous())


def store(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    slot_mapping: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    library: ctypes.CDLL | None = None,
) -> None:
    """Quantize what new tokens bring into their slots; see :func:`reference.store`.

    Args:
        pages: the layer's own pages come first.
        plan: a plan that the kernels do.
        slot_mapping: int64, contiguous.
        inputs: for every stream ``[num_tokens, ...]``, a token's numbers contiguous.
        library: another library than the installed one, for tests.
    """
    library = library or cuda_library.library()
    assert library is not None
    if not inputs[0].shape[0]:
        return
    call = cuda_library.StoreCall.from_buffer_copy(prepare(plan, inputs[0].device))
    call.pages, call.page_stride = pages[0].data_ptr(), pages[0].stride(0)
    call.slot_mapping, call.num_tokens = slot_mapping.data_ptr(), inputs[0].shape[0]
    for stream, x in zip(call.streams, inputs, strict=False):
        stream.input, stream.input_stride, stream.type = x.data_ptr(), x.stride(0), DTYPE_CODES[x.dtype]
    stream = torch.cuda.current_stream(inputs[0].device).cuda_stream if inputs[0].is_cuda else 0
    function = library.xquant_cuda_store_latents if plan.rotation is None else library.xquant_cuda_store_rotated
    cuda_library.check(function(ctypes.byref(call), ctypes.c_void_p(stream)))
