"""The structs that Python hands the C++ kernels, and libraries that have others."""

import ctypes

import pytest

from tests.attention.c_structs import assert_mirrored, header_structs
from tests.cpu_kernels import has_kernels
from xquant_vllm.attention.cpu.abi import STRUCTS, Run
from xquant_vllm.attention.struct_sizes import check_structs, struct_sizes
from xquant_vllm.kivi.cpu.abi import STRUCTS as KIVI_STRUCTS

HEADERS = header_structs("cpu/api.h", "cpu/kivi/kivi_api.h")
FUNCTION = "xquant_cpu_struct_sizes"
needs_kernels = pytest.mark.skipif(not has_kernels(), reason="the kernels were not built")


def test_structs_are_those_of_the_headers() -> None:
    structs = STRUCTS | KIVI_STRUCTS
    assert list(structs) == list(HEADERS)
    assert_mirrored(structs, HEADERS)


@needs_kernels
def test_the_library_tells_all_sizes() -> None:
    from xquant_vllm.attention.cpu.library import library

    expected = {name: ctypes.sizeof(struct) for name, struct in (STRUCTS | KIVI_STRUCTS).items()}
    assert struct_sizes(library, FUNCTION) == expected


class LongerRun(ctypes.Structure):
    _fields_ = [*Run._fields_, ("more", ctypes.c_int64)]


@needs_kernels
def test_refuses_other_structs() -> None:
    from xquant_vllm.attention.cpu.library import library

    with pytest.raises(OSError, match=r"another version .*xquant_run has 32 bytes, not 40 bytes; build it anew with"):
        check_structs(library, FUNCTION, STRUCTS | {"xquant_run": LongerRun}, "make kernels")
    with pytest.raises(OSError, match="xquant_walk has an unknown size, not 32 bytes"):
        check_structs(library, FUNCTION, {"xquant_walk": Run}, "make kernels")


def test_refuses_a_library_that_tells_no_sizes() -> None:
    """As those built before sizes were told."""
    with pytest.raises(OSError, match="xquant_run has an unknown size"):
        check_structs(ctypes.CDLL(None), FUNCTION, STRUCTS, "make kernels")
