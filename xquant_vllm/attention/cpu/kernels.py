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
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.cpu.abi import ABI, Input, StoreCall
from xquant_vllm.attention.cpu.exact_tokens import exact_tokens
from xquant_vllm.attention.cpu.prepared import prepare
from xquant_vllm.attention.cpu.tensors import batch_call, index_address, input_struct, set_heads
from xquant_vllm.attention.plan import AttentionLayerPlan

LIBRARY_PATH = Path(__file__).with_name("_cpu_kernels.so")

# The instruction set that multiplies integers.
INTEGER_ISA = "vnni"


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
    for name in ("store", "attention", "read_tokens", "finish_tokens", "kivi_store", "kivi_attention", "isa"):
        getattr(library, f"xquant_cpu_{name}").restype = ctypes.c_char_p
    library.xquant_cpu_set_isa.argtypes = [ctypes.c_char_p]
    return library


library = _load()


def isa() -> str:
    """The instruction set in use: ``vnni``, ``avx512``, ``avx2`` or ``portable``."""
    return str(library.xquant_cpu_isa().decode())


def set_isa(name: str | None) -> bool:
    """Use another instruction set, or the best one for None; False where this machine or this build lacks it."""
    _multiplies_integers.cache_clear()
    return bool(library.xquant_cpu_set_isa(None if name is None else name.encode()))


@functools.cache
def _multiplies_integers() -> bool:
    return isa() == INTEGER_ISA


def num_threads() -> int:
    """Threads that the next call would use."""
    return int(library.xquant_cpu_threads())


def raise_error(message: bytes | None) -> None:
    """Raise what a call of the library says is wrong with its input."""
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
    prepared = prepare(plan, _multiplies_integers())
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
    prepared = prepare(plan, _multiplies_integers())
    call = batch_call(*prepared.structs_of(pages), batch, query.shape[0])
    set_heads(call, prepared.heads, query, output)
    exact = exact_tokens(plan, batch, inputs, query.shape[0])
    if exact is not None:
        call.exact_keys, call.exact_values = (tensor.data_ptr() for tensor in exact)
        call.exact_from = plan.exact_from or 0
    raise_error(library.xquant_cpu_attention(prepared.pointer, ctypes.byref(call)))
