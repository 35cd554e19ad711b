"""What a program may have of a GPU, by which kernels choose their tiles."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import torch
import triton
from triton.compiler.compiler import max_shared_mem
from triton.runtime.errors import OutOfResources

Arguments = ParamSpec("Arguments")

# Bytes of shared memory that a program may have, by compute capability: NVIDIA's CUDA C++ programming guide, "Technical
# Specifications per Compute Capability". Only where kernels are compiled without a GPU; a GPU says it itself.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# Of compute capabilities with memory for products alone ("tensor memory"), the first number.
_TENSOR_MEMORY = (10, 11)
# Wide heads have more channels. In FP32 64 rows of queries take so many bytes then, with keys and values.
_WIDE, _OF_WIDE_FLOAT32 = 128, 114816


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a device.

    It is what Triton compares a kernel's demand with before it launches it. Where there is no GPU, also none to compile
    for, nothing is too large.
    """
    try:
        driver = triton.runtime.driver.active
    except RuntimeError:
        return sys.maxsize
    index = device.index if device.type == "cuda" else None
    return int(max_shared_mem(driver.get_current_device() if index is None else index))


def tensor_memory() -> bool:
    """Whether products have a memory of their own, as on compute capabilities 10.0 to 11.0.

    There Triton keeps every operand of sums that go on from tile to tile in shared memory, where others share a place.
    """
    try:
        arch = triton.runtime.driver.active.get_current_target().arch
    except RuntimeError:
        return False
    return isinstance(arch, int) and arch // 10 in _TENSOR_MEMORY


def refuse_wide_float32(dtype: torch.dtype, head_columns: int, device: torch.device) -> None:
    """Refuse FP32 with wide heads on GPUs with little shared memory, for kernels that keep keys and values at a time.

    Args:
        dtype: of the products' operands.
        head_columns: columns of a head, padding included.
        device: where.

    Raises:
        ValueError: it names the option, and what to set instead.
    """
    there = shared_memory(device)
    if dtype == torch.float32 and head_columns > _WIDE and there < _OF_WIDE_FLOAT32:
        raise ValueError(
            f"--dtype float32 cannot work with heads of more than {_WIDE} channels on this GPU: kernels take up to "
            f"{_OF_WIDE_FLOAT32:,} bytes of shared memory, a program has {there:,}; set --dtype bfloat16"
        )


def refusing_what_does_not_fit(call: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Say what to set instead where a kernel takes more of the GPU than there is.

    Triton finds out when it loads a kernel for the first time, which is at start-up.
    """

    @functools.wraps(call)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            call(*args, **kwargs)
        except OutOfResources as error:
            name = torch.cuda.get_device_name() if torch.cuda.is_available() else "this GPU"
            raise ValueError(
                f"a kernel does not fit {name}: it takes {error.required:,} of {error.limit:,} ({error.name}). With "
                "--dtype float32 set --dtype bfloat16, which takes half of it; else --attention-backend TRITON_ATTN "
                "caches 16 bit"
            ) from error

    return checked
