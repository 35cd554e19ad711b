"""Storing latents, and X, by the CUDA kernels."""

import ctypes
import weakref
from collections.abc import Sequence
from itertools import accumulate

import torch

from xquant_vllm.attention.gpu.cuda import library as cuda_library
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat, channel_tables, scale_values
from xquant_vllm.codec.allocation import Runs, run_bytes
from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.codec.packing import PLANES, UNQUANTIZED_BITS

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SMALLEST_BLOCK = 8
# FP32 copies of a token, twice, and its codes, in a block's shared memory.
_MOST_ROTATED = 16384


def row_program(runs: Runs) -> torch.Tensor:
    """Which codes every byte of a row holds.

    Args:
        runs: bits and number of channels of pieces that are packed by themselves, one after another (packing.py).

    Returns:
        int16 ``[bytes, 4]``: ``xquant_cuda_byte``.
    """
    rows = []
    for (bits, channels), first in zip(runs, accumulate((count for _, count in runs), initial=0), strict=False):
        shift = 0
        for plane_bits in PLANES[bits]:
            distance = channels * plane_bits // 8
            rows += [[first + i, distance, plane_bits | shift << 8, 0] for i in range(distance)]
            shift += plane_bits
    return torch.tensor(rows, dtype=torch.int16)


class StorePlan:
    """What the kernels read of a plan; the fields of a call are filled in for every call."""

    def __init__(self, plan: AttentionLayerPlan, device: torch.device) -> None:
        """Describe the streams of the layer's own pages."""
        self._kept: list[torch.Tensor] = []
        self.rotated = plan.rotation is not None
        self.call = cuda_library.StoreCall(num_streams=len(plan.layout.streams), block_size=plan.layout.block_size)
        for index in range(len(plan.layout.streams)):
            self._add_stream(plan.layout, index, device)
        if plan.rotation is not None:
            self.call.signs = self._keep(plan.rotation.signs, device)
            self.call.mix = self._keep(plan.rotation.mix, device)
            self.call.block = plan.rotation.block

    def _keep(self, tensor: torch.Tensor, device: torch.device) -> int:
        tensor = tensor.to(device).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _add_stream(self, layout: PageLayout, index: int, device: torch.device) -> None:
        stream, at, struct = layout.streams[index], layout.offsets[index], self.call.streams[index]
        struct.num_heads, struct.width = stream.num_heads, stream.width
        struct.codes, struct.scales, struct.zeros, struct.outliers = at.codes, at.scales, at.zeros, at.outliers
        if isinstance(stream, StreamFormat):
            struct.bits, struct.group_size, struct.outlier_channels = stream.bits, stream.group_size, 0
            if stream.bits != UNQUANTIZED_BITS:
                struct.outlier_channels = stream.outlier_channels
                struct.bytes = self._keep(row_program(((stream.bits, stream.group_size),)), device)
            return
        tables = [channel_tables(runs) for runs in stream.runs]
        channels = [table[0].numel() for table in tables]
        sizes = [run_bytes(runs) for runs in stream.runs]
        first = list(accumulate(sizes, initial=0))
        heads = [
            [at.codes + layout.block_size * first[h], sizes[h], channels[h], sum(channels[:h]), first[h]]
            for h in range(stream.num_heads)
        ]
        struct.heads = self._keep(torch.tensor(heads, dtype=torch.int32), device)
        struct.bytes = self._keep(torch.cat([row_program(runs) for runs in stream.runs]), device)
        struct.step = self._keep(torch.cat([step for step, _, _ in tables]), device)
        struct.half_levels = self._keep(torch.cat([largest / 2 for _, largest, _ in tables]), device)
        struct.worth = self._keep(torch.cat([worth for _, _, worth in tables]), device)
        struct.total_worth = self._keep(torch.stack([worth.sum() for _, _, worth in tables]), device)
        struct.scale_values = self._keep(scale_values(), device)


_plans: dict[tuple[int, torch.device], StorePlan] = {}


def _plan_of(plan: AttentionLayerPlan, device: torch.device) -> StorePlan:
    """Made on first use and forgotten together with the plan."""
    at = (id(plan), device)
    if at not in _plans:
        _plans[at] = StorePlan(plan, device)
        weakref.finalize(plan, _plans.pop, at, None)
    return _plans[at]


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
    return x.dtype in _TYPES and (x.shape[0] == 0 or x[0].is_contiguous())


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
    of_plan = _plan_of(plan, inputs[0].device)
    call = cuda_library.StoreCall.from_buffer_copy(of_plan.call)
    call.pages, call.page_stride = pages[0].data_ptr(), pages[0].stride(0)
    call.slot_mapping, call.num_tokens = slot_mapping.data_ptr(), inputs[0].shape[0]
    for stream, x in zip(call.streams, inputs, strict=False):
        stream.input, stream.input_stride, stream.type = x.data_ptr(), x.stride(0), _TYPES[x.dtype]
    stream = torch.cuda.current_stream(inputs[0].device).cuda_stream if inputs[0].is_cuda else 0
    function = library.xquant_cuda_store_rotated if of_plan.rotated else library.xquant_cuda_store_latents
    cuda_library.check(function(ctypes.byref(call), ctypes.c_void_p(stream)))
