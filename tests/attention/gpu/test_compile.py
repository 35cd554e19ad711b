"""The kernels compile for every generation of GPUs that vLLM serves on, and fit what these have."""

import pytest

from tests.attention.gpu import compile_cases
from tests.attention.gpu.compiled import compiled
from xquant_vllm.attention.gpu.limits import SHARED_MEMORY

# Compiling takes seconds a kernel: every case for 9.0, for the others those that differ most.
_SOME = ["decode allocated", "prefill uniform", "store many x", "hot many x"]
NAMES = {80: _SOME, 90: list(compile_cases.CASES), 100: _SOME}


@pytest.mark.parametrize("capability", NAMES)
def test_compiles(capability: int) -> None:
    kernels = compiled(compile_cases, capability, NAMES[capability])
    assert max(of["shared"] for of in kernels) <= SHARED_MEMORY[capability]
    assert all(of["stack"] == 0 for of in kernels if of["case"].startswith("hot")), "spilled registers"
    assert not any(of["fused"] for of in kernels if of["case"].startswith("store")), "see operands.py"
