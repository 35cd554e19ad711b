"""The structs that Python hands the CUDA kernels, and libraries that have others."""

import ctypes
from pathlib import Path

import pytest

from tests.attention.c_structs import assert_mirrored, header_structs
from xquant_vllm.attention.gpu.cuda import library as cuda_library
from xquant_vllm.attention.struct_sizes import struct_sizes

HEADERS = header_structs("cuda/decode/decode.h", "cuda/store/store.h")


def test_structs_are_those_of_the_headers() -> None:
    assert_mirrored(cuda_library.STRUCTS, HEADERS)


def test_the_library_tells_all_sizes(library) -> None:
    sizes = struct_sizes(library, "xquant_cuda_struct_sizes")
    assert list(sizes) == list(HEADERS)
    assert sizes.items() >= {name: ctypes.sizeof(struct) for name, struct in cuda_library.STRUCTS.items()}.items()


def test_refuses_other_structs(library, monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(ctypes.Structure):
        _fields_ = [*cuda_library.DecodeCall._fields_, ("more", ctypes.c_int64)]

    monkeypatch.setitem(cuda_library.STRUCTS, "xquant_cuda_decode_call", Longer)
    with pytest.raises(OSError, match=r"another version .*xquant_cuda_decode_call has \d+ bytes, not \d+ bytes"):
        cuda_library.load(Path(library._name))
