"""The kernels compile for every generation of GPUs that vLLM serves on, and fit what these have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attention.gpu.compile_cases import CASES

# Bytes of shared memory that a program may have. 8.6 and 8.9, which run what is compiled for 8.0, have 101376.
SHARED = {80: 101376, 90: 232448, 100: 232448}
# Compiling takes seconds a kernel: every case for 9.0, for the others those that differ most.
_SOME = ["decode allocated", "prefill uniform", "store many x"]
NAMES = {80: _SOME, 90: list(CASES), 100: _SOME}


@pytest.mark.parametrize("capability", NAMES)
def test_compiles(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.gpu.compiled", str(capability), *NAMES[capability]],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"{'kernel':20} {'case':24} sm {'registers':>9} {'stack':>6} {'shared':>7} warps")
    for of in kernels:
        print(
            f"{of['kernel']:20} {of['case']:24} {of['capability']:3} {of['registers']:8} {of['stack']:6} "
            f"{of['shared']:7} {of['warps']:5}"
        )
    assert done.returncode == 0, done.stderr[-4000:]
    assert {of["case"] for of in kernels} == set(NAMES[capability])
    assert max(of["shared"] for of in kernels) <= SHARED[capability]
