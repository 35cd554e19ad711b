"""Which kernels are used, and why not the others, from what two processes have found out."""

from xquant_vllm.diagnosis.child import Found
from xquant_vllm.diagnosis.kernel_table import kernel_table

CPP = {"library": "/l.so", "best": "vnni", "there": ["vnni", "avx512", "avx2", "portable"], "why_no_amx": "no AMX"}
FLAGS = {"flags": ["avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi"]}
SECTIONS = {
    "torch": {"gpu_seen": False},
    "triton": {"version": "3.7.0"},
    "cpp": CPP,
    "choice": {"kind": "cpp", "instruction_set": "vnni", "device": "cpu"},
}
NO_FLASH = {"version": None, "why": "vLLM runs on 'cpu'"}


def table(sections=None, errors=None, flags=FLAGS, ended=None, flash=NO_FLASH):
    rows = kernel_table(Found({**SECTIONS, **(sections or {})}, errors or {}, ended), flash, flags)
    return {row["name"]: (row["used"], row["why"]) for row in rows}


def test_kernels_of_a_cpu():
    rows = table()
    assert rows["C++ for vnni"] == (True, "the fastest here")
    assert rows["C++ for amx"] == (False, "the processor lacks avx512_bf16, amx_tile, amx_int8, amx_bf16")
    assert rows["C++ for avx2"] == (False, "vnni is used")
    assert rows["Triton"] == (False, "torch sees no GPU")
    assert rows["PyTorch reference"] == (False, "the fallback of all others")
    assert [name for name, (used, _) in rows.items() if used] == ["C++ for vnni"]


def test_a_processor_with_amx_that_may_not_be_used():
    flags = {"flags": [*FLAGS["flags"], "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"]}
    assert table(flags=flags)["C++ for amx"] == (False, "no AMX")


def test_an_instruction_set_that_was_asked_for():
    rows = table({"choice": {"kind": "cpp", "instruction_set": "avx2", "device": "cpu"}})
    assert rows["C++ for avx2"] == (True, "asked for by XQUANT_ATTENTION_KERNELS")
    assert rows["C++ for vnni"] == (False, "avx2 is used")


def test_a_library_that_cannot_be_loaded():
    sections = {"cpp": None, "choice": {"kind": "reference", "device": "cpu", "text": "x"}}
    rows = table(sections, {"cpp": "OSError: /l.so was not built"})
    assert rows["C++ for avx2"] == (False, "the library cannot be loaded: OSError: /l.so was not built")
    assert rows["PyTorch reference"] == (True, "there is nothing faster here")


def test_a_process_that_died():
    rows = kernel_table(Found({}, {}, "ended by SIGILL"), None, FLAGS)
    assert not any(row["used"] for row in rows)
    assert rows[0]["why"] == "the library cannot be loaded: ended by SIGILL"


def test_kernels_of_a_gpu():
    sections = {
        "torch": {"gpu_seen": True},
        "choice": {"kind": "triton", "instruction_set": None, "device": "cuda"},
    }
    rows = table(sections, flash={"version": 3, "why": None})
    assert rows["Triton"] == (True, "version 3.7.0")
    assert rows["vLLM's FlashAttention (prompts on GPUs)"] == (True, "version 3")
    assert rows["C++ for vnni"] == (False, "vLLM runs on cuda")
