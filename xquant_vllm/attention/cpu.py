"""The C++ kernels of csrc/cpu: :mod:`xquant_vllm.attention.reference`, fast, on CPUs.

What is guaranteed, for one instruction set:

* ``store`` writes the bytes that the reference writes (a NaN or a zero may differ in its sign); of allocated streams
  bytes that read back with the same error;
* ``paged_attention`` agrees with the reference in FP32 to a relative error of about 1e-5;
* the output of a query token has the same bits whatever else is in the batch, however its prompt was cut into chunks,
  wherever its blocks lie and however many threads work: the context is reduced in chunks at fixed positions.

The library is plain C (csrc/cpu/api.h) and called through ctypes. It is linked against no OpenMP runtime, so that it
runs on the threads of the runtime that torch uses; see :func:`_share_openmp_runtime`.
"""

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from xquant_vllm.attention.batch import AttentionBatch, AttentionLayerPlan
from xquant_vllm.attention.cpu_abi import ABI, AttentionCall, Input, Pages, StoreCall
from xquant_vllm.attention.cpu_plan import PreparedPlan, prepare

LIBRARY_PATH = Path(__file__).with_name("_cpu_kernels.so")

# The instruction set that multiplies integers.
INTEGER_ISA = "vnni"

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _mapped_openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process, in the order of their addresses."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line)
    return list(dict.fromkeys(path for path in paths if re.match(r"lib(gomp|iomp5|omp)\b", os.path.basename(path))))


def _share_openmp_runtime() -> None:
    """Make the OpenMP symbols of torch's runtime visible to the library that is loaded next.

    A second runtime would bring a second set of threads, which fight the first one for the cores and know nothing of
    ``torch.set_num_threads``. LLVM's and Intel's runtimes answer to GNU's symbols, too.
    """
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):  # preloaded (LD_PRELOAD): torch uses that one, too
        return
    runtimes = _mapped_openmp_runtimes()
    # Several are mapped if another package brought its own: torch's is the one in torch's folder.
    torch_folder = os.path.dirname(torch.__file__)
    runtimes.sort(key=lambda path: not path.startswith(torch_folder))
    ctypes.CDLL(runtimes[0] if runtimes else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def _load() -> ctypes.CDLL:
    """Load the library.

    Raises:
        OSError: it was not built, does not fit this machine, or is of another version.
    """
    if not LIBRARY_PATH.is_file():
        raise OSError(f"{LIBRARY_PATH} was not built")
    _share_openmp_runtime()
    library = ctypes.CDLL(str(LIBRARY_PATH))
    if library.xquant_cpu_abi() != ABI:
        raise OSError(f"{LIBRARY_PATH} is of another version of this package")
    for function in (library.xquant_cpu_store, library.xquant_cpu_attention, library.xquant_cpu_isa):
        function.restype = ctypes.c_char_p
    library.xquant_cpu_set_isa.argtypes = [ctypes.c_char_p]
    return library


_library = _load()


def isa() -> str:
    """The instruction set in use: ``vnni``, ``avx512``, ``avx2`` or ``portable``."""
    return str(_library.xquant_cpu_isa().decode())


def set_isa(name: str | None) -> bool:
    """Use another instruction set, or the best one for None; False where this machine or this build lacks it."""
    return bool(_library.xquant_cpu_set_isa(None if name is None else name.encode()))


def num_threads() -> int:
    """Threads that the next call would use."""
    return int(_library.xquant_cpu_threads())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _pages(prepared: PreparedPlan, pages: Sequence[torch.Tensor]) -> tuple[ctypes.Array, int]:
    """Check the pages of a call; their structs and the number of blocks that all of them have."""
    if len(pages) != len(prepared.page_bytes):
        raise ValueError(f"{len(pages)} pages were given, the plan reads {len(prepared.page_bytes)}")
    for tensor, page_bytes in zip(pages, prepared.page_bytes, strict=True):
        if (
            tensor.dtype != torch.uint8
            or tensor.device.type != "cpu"
            or tensor.ndim != 2
            or tensor.shape[1] != page_bytes
            or tensor.stride(1) != 1
        ):
            raise ValueError(
                f"pages must be uint8 [num_blocks, {page_bytes}] on the CPU with contiguous rows, not {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
            )
    structs = (Pages * len(pages))(*(Pages(tensor.data_ptr(), tensor.stride(0)) for tensor in pages))
    return structs, min(tensor.shape[0] for tensor in pages)


def _dtype(name: str, tensor: torch.Tensor) -> int:
    code = _DTYPES.get(tensor.dtype)
    if code is None or tensor.device.type != "cpu":
        raise ValueError(f"{name} must be FP32, FP16 or BF16 on the CPU, not {tensor.dtype} on {tensor.device}")
    return code


def _index(name: str, tensor: torch.Tensor, dtype: torch.dtype, ndim: int) -> int:
    """Check a tensor of indices with contiguous rows; returns its address."""
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


def _rows(index: int, tensor: torch.Tensor, elements: int) -> int:
    """Check an input ``[num_tokens, ...]`` whose tokens are contiguous; returns the stride of the tokens."""
    if tensor.ndim == 2 and tensor.shape[1] == elements and tensor.stride(1) == 1:
        return tensor.stride(0)
    count = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        _require(size <= 1 or stride == count, f"a token of input {index} must be contiguous")
        count *= size
    if tensor.ndim < 2 or count != elements:
        raise ValueError(f"input {index} must hold {elements} numbers per token, not {list(tensor.shape)}")
    return tensor.stride(0)


def _raise(message: bytes | None) -> None:
    if message is not None:
        raise ValueError(message.decode())


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
    prepared = prepare(plan, isa() == INTEGER_ISA)
    structs, num_blocks = _pages(prepared, pages)
    if len(inputs) != len(prepared.input_elements):
        raise ValueError(f"{len(inputs)} inputs were given, the pages have {len(prepared.input_elements)} streams")
    num_tokens = inputs[0].shape[0]
    slots = _index("slot_mapping", slot_mapping, torch.int64, 1)
    if any(x.shape[0] != num_tokens for x in inputs) or slot_mapping.shape[0] < num_tokens:
        raise ValueError(
            f"inputs of {', '.join(str(x.shape[0]) for x in inputs)} tokens and {slot_mapping.shape[0]} slots do not "
            "fit together"
        )
    rows = (Input * len(inputs))(
        *(
            Input(x.data_ptr(), _rows(index, x, elements), _dtype(f"input {index}", x))
            for index, (x, elements) in enumerate(zip(inputs, prepared.input_elements, strict=True))
        )
    )
    call = StoreCall(structs, num_blocks, slots, num_tokens, rows)
    _raise(_library.xquant_cpu_store(prepared.pointer, ctypes.byref(call)))


def paged_attention(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    batch: AttentionBatch,
    output: torch.Tensor,
) -> None:
    """Causal attention over pages; see :func:`xquant_vllm.attention.reference.paged_attention`.

    ``query`` and ``output`` may have any strides between tokens and heads.

    Raises:
        ValueError: a tensor has the wrong type, shape or strides, or the batch names tokens or blocks out of range.
    """
    prepared = prepare(plan, isa() == INTEGER_ISA)
    structs, num_blocks = _pages(prepared, pages)
    for name, tensor in (("query", query), ("output", output)):
        if tensor.ndim != 3 or tensor.shape[1:] != prepared.heads or tensor.stride(2) != 1:
            raise ValueError(
                f"{name} must be [num_tokens, {prepared.heads[0]}, {prepared.heads[1]}] with contiguous heads, not "
                f"{list(tensor.shape)} with strides {tensor.stride()}"
            )
    dtype = _dtype("query", query)
    if _dtype("output", output) != dtype or output.shape[0] != query.shape[0]:
        raise ValueError(
            f"output must be like query, {query.dtype} {list(query.shape)}, not {output.dtype} {list(output.shape)}"
        )
    table = batch.block_table
    num_seqs = batch.seq_lens.shape[0]
    starts = _index("query_start_loc", batch.query_start_loc, torch.int32, 1)
    lengths = _index("seq_lens", batch.seq_lens, torch.int32, 1)
    blocks = _index("block_table", table, torch.int32, 2)
    if batch.query_start_loc.shape[0] != num_seqs + 1 or table.shape[0] < num_seqs:
        raise ValueError(
            f"{num_seqs} seq_lens, {batch.query_start_loc.shape[0]} query_start_loc and {table.shape[0]} rows of "
            "block_table do not fit together"
        )
    call = AttentionCall(
        structs,
        num_blocks,
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        output.data_ptr(),
        output.stride(0),
        output.stride(1),
        dtype,
        query.shape[0],
        starts,
        lengths,
        blocks,
        table.stride(0),
        table.shape[1],
        num_seqs,
    )
    _raise(_library.xquant_cpu_attention(prepared.pointer, ctypes.byref(call)))
