"""The processor, as Linux describes it, and what kernels make of it."""

import pytest

from xquant_vllm.diagnosis.processor import NEEDED, missing_flags, processor

CPUINFO = """processor\t: 0
model name\t: Some Processor @ 2.00GHz
flags\t\t: fpu avx2 fma avx512f avx512bw avx512dq avx512vl

processor\t: 1
model name\t: Some Processor @ 2.00GHz
"""


def test_a_processor(tmp_path):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    found = processor(tmp_path / "cpuinfo")
    assert found["model"] == "Some Processor @ 2.00GHz"
    assert found["flags"] == ["avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"]
    assert found["cores"] >= 1
    assert missing_flags("avx512", found["flags"]) == []
    assert missing_flags("vnni", found["flags"]) == ["avx512_vnni", "avx512vbmi"]
    assert missing_flags("portable", []) == []


def test_a_machine_that_describes_no_processor(tmp_path):
    assert processor(tmp_path / "nowhere")["model"] is None


def test_the_kernels_find_what_the_flags_promise():
    from tests.cpu_kernels import has_kernels

    if not has_kernels():
        pytest.skip("no kernels")
    from xquant_vllm.attention.cpu import library as cpu

    flags = processor()["flags"]
    for isa in ("vnni", "avx512", "avx2", "portable"):
        assert cpu.set_isa(isa) == (not missing_flags(isa, flags))
    cpu.set_isa(None)
    assert list(NEEDED) == ["amx", "vnni", "avx512", "avx2", "portable"]
