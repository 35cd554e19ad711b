"""What Triton makes of the kernels, on a machine without a GPU.

``python -m tests.attention.gpu.compiled 90 NAME...`` calls the host functions for the cases of that name
(compile_cases.py) with CPU tensors. Every launch becomes a compilation for compute capability 9.0, by the ptxas that
comes with Triton; nothing is run. It prints one line of JSON per kernel. Must run without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: per thread registers and bytes of stack (spilled registers), bytes of shared memory, warps."""

    kernel: str
    case: str
    capability: int
    registers: int
    stack: int
    shared: int
    warps: int


class GPUlessDriver:
    """Says to Triton's compiler what it asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

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
        result = run(self, *map(_mocked, args), grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, result))
        return result

    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


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


def main() -> None:
    from tests.attention.gpu.compile_cases import CASES

    capability, names = int(sys.argv[1]), sys.argv[2:]
    for name in names or CASES:
        with compiled_launches(capability) as launches:
            CASES[name]()
        seen = set()
        for kernel, binary in launches:
            if binary.hash in seen:
                continue
            seen.add(binary.hash)
            registers, stack = resources(binary.asm["cubin"])
            metadata = binary.metadata
            line = Compiled(kernel, name, capability, registers, stack, metadata.shared, metadata.num_warps)
            print(json.dumps(asdict(line)), flush=True)


if __name__ == "__main__":
    main()
