"""What Triton makes of the kernels, on a machine without a GPU.

``python -m tests.attention.gpu.compiled MODULE 90 NAME...`` calls the host functions for the cases of that name in a
module, ``tests.attention.gpu.compile_cases`` or ``tests.kivi.gpu.compile_cases``, with tensors that no GPU holds. Every
launch becomes a compilation for compute capability 9.0, by the ptxas that comes with Triton; nothing is run. It prints
one line of JSON per kernel. Must run without TRITON_INTERPRET.
"""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from xquant_vllm.attention.gpu.limits import SHARED_MEMORY


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        kernel: its name.
        case: what launches it.
        capability: compute capability, times ten.
        registers: of a thread.
        stack: bytes of a thread, spilled registers.
        shared: bytes of shared memory of a program.
        warps: of a program.
        fused: whether a product and a sum may be rounded together.
    """

    kernel: str
    case: str
    capability: int
    registers: int
    stack: int
    shared: int
    warps: int
    fused: bool


class GPUlessDriver:
    """Says to Triton's compiler what it asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @property
    def utils(self) -> "GPUlessDriver":
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.target.arch]}

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "int"

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _mocked(argument: Any) -> Any:
    """Tensors without memory in place of tensors, also in tuples."""
    if isinstance(argument, torch.Tensor):
        return MockTensor(argument.dtype)
    if isinstance(argument, tuple):
        return type(argument)(*map(_mocked, argument))
    return argument


@contextmanager
def compiled_launches(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Within it a launch compiles, and adds the kernel's name and what it was compiled to."""
    triton.runtime.driver.set_active(GPUlessDriver(capability))
    run, found = JITFunction.run, []

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert "enable_fp_fusion" in kwargs, f"{self.__name__}: the default is another from version to version"
        result = run(self, *map(_mocked, args), grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, result))
        return result

    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


@functools.cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def compile_call(case: str, call: Callable[[], None], capability: int) -> list[Compiled]:
    """Compile what a call launches, every kernel once."""
    with compiled_launches(capability) as launches:
        call()
    kernels = {binary.hash: (name, binary) for name, binary in launches}
    return [
        Compiled(
            name, case, capability, *resources(binary.asm["cubin"]), binary.metadata.shared, binary.metadata.num_warps,
            binary.metadata.enable_fp_fusion,
        )
        for name, binary in kernels.values()
    ]  # fmt: skip


def compiled(module: ModuleType, capability: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """What the kernels of cases are compiled to, as :class:`Compiled` has it, by another process; also printed."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, module.__name__, str(capability), *names],
        cwd=Path(__file__).parents[3],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
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
    assert {of["case"] for of in kernels} == set(names)
    return kernels


def main() -> None:
    module, capability, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    cases = importlib.import_module(module).CASES
    for name in names or cases:
        for kernel in compile_call(name, cases[name], capability):
            print(json.dumps(asdict(kernel)), flush=True)


if __name__ == "__main__":
    main()
