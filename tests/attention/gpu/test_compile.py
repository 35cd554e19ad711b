"""The kernels compile for every generation of GPUs that vLLM serves on, and fit what these have."""

from typing import Any

import pytest

from tests.attention.gpu import compile_cases
from tests.attention.gpu.compiled import compiled
from xquant_vllm.attention.gpu.limits import SHARED_MEMORY

# Compiling takes seconds a kernel: those that differ most.
_SOME = ["decode served", "decode allocated", "prefill uniform", "store many x", "hot many x"]
_NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        (90, _SOME),
        pytest.param(90, list(compile_cases.CASES), marks=_NIGHTLY),
        pytest.param(80, _SOME, marks=_NIGHTLY),
        pytest.param(100, _SOME, marks=_NIGHTLY),
    ],
    ids=["9.0", "9.0 all", "8.0", "10.0"],
)
def test_compiles(capability: int, names: list[str]) -> None:
    kernels = compiled(compile_cases, capability, names)
    assert max(of["shared"] for of in kernels) <= SHARED_MEMORY[capability]
    assert all(of["stack"] == 0 for of in kernels if of["case"].startswith("hot")), "spilled registers"
    assert not any(of["fused"] for of in kernels if of["case"].startswith("store")), "see operands.py"
    assert not too_large(kernels)


def too_large(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Programs for latents per head that spill registers, or of which no two fit a multiprocessor of an H100.

    Those of random runs of up to 8 bits (allocated) may.
    """
    return [
        of
        for of in kernels
        if of["kernel"] == "attend_heads"
        and of["case"] != "decode allocated"
        and (
            of["stack"] > 0
            or 2 * 32 * of["warps"] * of["registers"] > 1 << 16
            or of["shared"] + 1024 > SHARED_MEMORY[90] // 2
        )
    ]


@pytest.mark.nightly
@pytest.mark.parametrize("capability", [80, 100])
def test_latents_per_head_compile(capability: int) -> None:
    kernels = compiled(compile_cases, capability, ["decode served"])
    assert not [of for of in kernels if of["kernel"] == "attend_heads" and of["stack"] > 0]
