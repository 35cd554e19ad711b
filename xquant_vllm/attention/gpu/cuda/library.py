"""The CUDA C++ kernels of csrc/cuda: the library and its structs, field by field.

The library is plain C and called through ctypes, as that of the CPU kernels. It holds machine code of several GPUs and
PTX for later ones; without it, or on a GPU that it does not know, the Triton kernels serve.
"""

import ctypes
import functools
import os
from pathlib import Path

import torch

from xquant_vllm.attention.struct_sizes import check_structs

LIBRARY_PATH = Path(__file__).with_name("_cuda_kernels.so")

# Compute capability of the oldest GPUs that it is built for.
_OLDEST = (8, 0)

# "1" uses the library, and fails where it cannot be loaded. Else the Triton kernels serve, until these were seen to run
# on a GPU. Read once per process.
OVERRIDE_VARIABLE = "XQUANT_CUDA_KERNELS"

_int32, _int64, _float, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class CudaDecodePlan(ctypes.Structure):
    """``xquant_cuda_decode_plan``; ``tensors`` are what its pointers point to."""

    tensors: list[torch.Tensor]

    _fields_ = [
        ("key", _pointer),
        ("value", _pointer),
        ("key_quads", _pointer),
        ("value_quads", _pointer),
        ("key_masks", _pointer),
        ("value_masks", _pointer),
        ("up_key", _pointer),
        ("key_rows", _pointer),
        ("value_levels", _pointer),
        ("value_channels", _pointer),
        ("columns", _pointer),
        ("rope_base", _pointer),
        ("rope_offset", _pointer),
        ("key_allocated", _int32),
        ("value_allocated", _int32),
        ("key_type", _int32),
        ("key_row_bytes", _int32),
        ("value_row_bytes", _int32),
        ("num_heads", _int32),
        ("num_kv_heads", _int32),
        ("head_size", _int32),
        ("block_size", _int32),
        ("window", _int32),
        ("scale", _float),
        ("soft_cap", _float),
    ]


class DecodeCall(ctypes.Structure):
    """``xquant_cuda_decode_call``."""

    _fields_ = [
        ("pages", _pointer),
        ("page_stride", _int64),
        ("query", _pointer),
        ("query_token_stride", _int64),
        ("query_head_stride", _int64),
        ("query_start_loc", _pointer),
        ("seq_lens", _pointer),
        ("block_table", _pointer),
        ("table_stride", _int64),
        ("sums", _pointer),
        ("stats", _pointer),
        ("sum_columns", _int32),
        ("num_sequences", _int32),
        ("splits", _int32),
        ("row_tiles", _int32),
        ("type", _int32),
        ("reserved", _int32),
    ]


class StoreStream(ctypes.Structure):
    """``xquant_cuda_store_stream``."""

    _fields_ = [
        ("input", _pointer),
        ("input_stride", _int64),
        ("heads", _pointer),
        ("bytes", _pointer),
        ("step", _pointer),
        ("half_levels", _pointer),
        ("worth", _pointer),
        ("total_worth", _pointer),
        ("scale_values", _pointer),
        ("type", _int32),
        ("num_heads", _int32),
        ("width", _int32),
        ("bits", _int32),
        ("group_size", _int32),
        ("outlier_channels", _int32),
        ("codes", _int32),
        ("scales", _int32),
        ("zeros", _int32),
        ("outliers", _int32),
    ]


class StoreCall(ctypes.Structure):
    """``xquant_cuda_store_call``; ``tensors`` are what the pointers of a layer point to."""

    tensors: list[torch.Tensor]

    _fields_ = [
        ("streams", StoreStream * 2),
        ("pages", _pointer),
        ("page_stride", _int64),
        ("slot_mapping", _pointer),
        ("signs", _pointer),
        ("mix", _pointer),
        ("num_streams", _int32),
        ("num_tokens", _int32),
        ("block_size", _int32),
        ("block", _int32),
    ]


STRUCTS = {
    "xquant_cuda_decode_plan": CudaDecodePlan,
    "xquant_cuda_decode_call": DecodeCall,
    "xquant_cuda_store_stream": StoreStream,
    "xquant_cuda_store_call": StoreCall,
}
"""By their C names."""


def load(path: Path = LIBRARY_PATH) -> ctypes.CDLL:
    """Load a library.

    Raises:
        OSError: it was not built, cannot be loaded, or is of another version.
    """
    if not path.is_file():
        raise OSError(f"{path} was not built")
    library = ctypes.CDLL(str(path))
    check_structs(library, "xquant_cuda_struct_sizes", STRUCTS, "python setup.py build_cuda --inplace")
    return library


def check(error: int) -> None:
    """Raise what a launch returned.

    Raises:
        RuntimeError: it is no success.
    """
    if error:
        raise RuntimeError(f"a CUDA kernel could not be started: error {error} of the CUDA runtime")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library that was built at installation, if it shall be used, or None.

    Raises:
        RuntimeError: the override variable demands a library that cannot be loaded.
        ValueError: the override variable has an unknown value.
    """
    override = os.environ.get(OVERRIDE_VARIABLE, "")
    if override not in ("", "0", "1"):
        raise ValueError(f"{OVERRIDE_VARIABLE}={override} is unknown: set 0 or 1, or unset it")
    if override != "1":
        return None
    try:
        return load()
    except OSError as error:
        raise RuntimeError(f"{OVERRIDE_VARIABLE}=1 cannot be met: {error}") from error


@functools.cache
def _known(device: torch.device) -> bool:
    """Whether the library has code for a device."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _OLDEST


def available(device: torch.device) -> bool:
    """Whether the library is there and runs on a device."""
    return library() is not None and _known(device)
