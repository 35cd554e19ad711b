"""The CUDA kernels, compiled for this machine's processor against tests/cuda_emulation."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xquant_vllm.attention.gpu.cuda import library as cuda_library

ROOT = Path(__file__).resolve().parents[3]
KERNELS, EMULATION = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda_emulation"
# Fibers jump between stacks, which a fortified longjmp takes for an attack. Sums must not depend on contraction.
FLAGS = [
    *("-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fPIC"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes"),
    *("-DXQUANT_EMULATION", f"-I{KERNELS}", f"-I{EMULATION}"),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The library as cuda_library.load() returns it, with the functions of the emulation."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: the CUDA kernels are tested by compiling them for the processor")
    folder = tmp_path_factory.mktemp("cuda_emulation")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.{source.suffix[1:]}.o"
        subprocess.run(["g++", "-x", "c++", *FLAGS, "-c", str(source), "-o", str(target)], check=True)
        return target

    sources = [*sorted(KERNELS.rglob("*.cu")), *sorted(EMULATION.glob("*.cpp"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    target = folder / "kernels.so"
    subprocess.run(["g++", "-shared", "-o", str(target), *map(str, objects)], check=True)
    return cuda_library.load(target)
