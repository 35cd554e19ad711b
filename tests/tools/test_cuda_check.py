"""tools/cuda_check.py on what ptxas writes, without nvcc."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "cuda_check.py"

SAID = """\
ptxas info    : Compiling entry function '_ZN6xquant6decode13decode_kernelILi128ELi2EEEvNS0_6ParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN6xquant6decode13decode_kernelILi128ELi2EEEvNS0_6ParamsE
    32 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 624 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6xquant5store15_GLOBAL__N__a_120store_latents_kernelENS1_6ParamsE' for 'x'
ptxas info    : Function properties for x
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 60 registers, used 0 barriers, 256 bytes smem
"""


@pytest.fixture
def cuda_check(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("cuda_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cuda_check", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_parse(cuda_check) -> None:
    first, second = cuda_check.parse(SAID, "80")
    assert first == cuda_check.Kernel("decode_kernel<128, 2>", "80", 168, 12, 8, 32, 0)
    assert second.name == "store_latents_kernel"
    assert (second.registers, second.spill_stores, second.stack, second.shared) == (60, 0, 0, 256)


def test_spills_fail(cuda_check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(cuda_check, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_check, "compile_one", lambda *_: cuda_check.parse(SAID, "80"))
    assert cuda_check.main() == 1
    said = capsys.readouterr()
    assert "decode_kernel<128, 2>" in said.out
    assert "decode_kernel<128, 2> (sm_80)" in said.err


def test_without_nvcc() -> None:
    environment = {"PATH": "/nonexistent", "CUDA_HOME": "/nonexistent"}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("cuda-check: nvcc is missing")
    assert done.stdout.count("\n") == 1
