"""The library of the C++ kernels: found, checked, loaded, and which of its instruction sets is in use.

It is plain C (csrc/cpu/api.h) and called through ctypes. It is linked against no OpenMP runtime, so that it runs on the
threads of the runtime that torch uses; see :func:`_share_openmp_runtime`.
"""

import ctypes
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from xquant_vllm.attention.cpu.abi import STRUCTS
from xquant_vllm.attention.struct_sizes import check_structs

LIBRARY_PATH = Path(__file__).with_name("_cpu_kernels.so")

# The instruction sets that multiply integers in tiles, and all that multiply integers. "amx-emulated" is for tests:
# "amx" with its instructions in plain C++.
TILE_ISAS = ("amx", "amx-emulated")
INTEGER_ISAS = (*TILE_ISAS, "vnni")

NO_TILES = "the processor has no AMX"
"""What :func:`tiles_refused` says where there is nothing to use."""


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


def check_library(library: ctypes.CDLL, structs: Mapping[str, type[ctypes.Structure]]) -> None:
    """Refuse a library with other structs; see :func:`check_structs`.

    Raises:
        OSError: a struct has another size.
    """
    check_structs(library, "xquant_cpu_struct_sizes", structs, "python setup.py build_kernels --inplace")


def _load() -> ctypes.CDLL:
    """Load the library.

    Raises:
        OSError: it was not built, does not fit this machine, or is of another version.
    """
    if not LIBRARY_PATH.is_file():
        raise OSError(f"{LIBRARY_PATH} was not built")
    _share_openmp_runtime()
    library = ctypes.CDLL(str(LIBRARY_PATH))
    check_library(library, STRUCTS)
    for name in (
        "store",
        "attention",
        "read_tokens",
        "finish_tokens",
        "write_hot",
        "kivi_store",
        "kivi_attention",
        "isa",
    ):
        getattr(library, f"xquant_cpu_{name}").restype = ctypes.c_char_p
    library.xquant_cpu_tiles_refused.restype = ctypes.c_char_p
    library.xquant_cpu_why_no_tiles.restype = ctypes.c_char_p
    library.xquant_cpu_why_no_tiles.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    library.xquant_cpu_set_isa.argtypes = [ctypes.c_char_p]
    return library


library = _load()


def isa() -> str:
    """The instruction set in use: ``amx``, ``vnni``, ``avx512``, ``avx2``, ``portable``; in tests ``amx-emulated``."""
    return str(library.xquant_cpu_isa().decode())


def tiles_refused() -> str | None:
    """Why ``amx`` is not there; None if it is."""
    reason = library.xquant_cpu_tiles_refused()
    return None if reason is None else str(reason.decode())


def describe() -> str:
    """The instruction set in use, and why it is not AMX on a processor that has it."""
    reason = tiles_refused()
    return isa() if reason is None or reason == NO_TILES else f"{isa()} (not AMX: {reason})"


def set_isa(name: str | None) -> bool:
    """Use another instruction set, or the best one for None; False where this machine or this build lacks it."""
    products.cache_clear()
    return bool(library.xquant_cpu_set_isa(None if name is None else name.encode()))


@functools.cache
def products() -> tuple[bool, bool]:
    """Whether the instruction set in use multiplies integers, and whether in tiles: what a plan is prepared for."""
    return isa() in INTEGER_ISAS, isa() in TILE_ISAS


def multiplies_integers() -> bool:
    """Whether the instruction set in use multiplies integers."""
    return products()[0]


def num_threads() -> int:
    """Threads that the next call would use."""
    return int(library.xquant_cpu_threads())


def raise_error(message: bytes | None) -> None:
    """Raise what a call of the library says is wrong with its input."""
    if message is not None:
        raise ValueError(message.decode())
