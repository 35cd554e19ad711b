"""What tests of the C++ kernels share: whether there are any, and how near they come to the reference."""

import ctypes
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

# The portable kernels have no fused multiply-add; the largest relative error seen is 4e-6. Of "vnni" it is 2e-4: it
# rounds weights to 16 bits, and what many tokens' values average to is small.
TOLERANCES = {"portable": 1e-5, "avx2": 1e-5, "avx512": 1e-5, "vnni": 5e-4, "amx": 5e-4, "amx-emulated": 5e-4}
# For BF16 queries AMX and the twin round keys to BF16, too; one that lies halfway falls to the other side now and then.
BFLOAT_TOLERANCES = TOLERANCES | {"amx": 2e-3, "amx-emulated": 2e-3}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def has_kernels() -> bool:
    """False where they were not built because nothing could build them.

    Raises:
        OSError: they can be built here, so they must be tested: install the package.
    """
    try:
        import xquant_vllm.attention.cpu.kernels  # noqa: F401
    except OSError:
        if shutil.which("g++"):
            raise
        return False
    return True


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Equal up to the instruction set's error, relative to a head's largest element, and the rounding of the dtype."""
    from xquant_vllm.attention.cpu import library as cpu

    assert actual.dtype == expected.dtype
    rounding = ROUNDING[expected.dtype]
    if tolerance is None:
        tolerance = (BFLOAT_TOLERANCES if expected.dtype == torch.bfloat16 else TOLERANCES)[cpu.isa()]
    actual, expected = actual.float(), expected.float()
    allowed = tolerance * expected.abs().amax(-1, keepdim=True) + rounding * expected.abs()
    assert expected.isfinite().all()
    assert actual.isfinite().all()
    worst = ((actual - expected).abs() - allowed).max()
    assert worst <= 0, f"off by {worst} more than allowed"


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return x.contiguous().view(torch.uint8)


@functools.cache
def trap() -> ctypes.CDLL:
    """That of tools/amx_trap.py."""
    import amx_trap

    with tempfile.TemporaryDirectory() as folder:
        return amx_trap.build(Path(folder))


def _can_trap() -> bool:
    """Not under a sanitizer: what the trap reads and writes it does not see. It sees it of "amx-emulated"."""
    return shutil.which("g++") is not None and "libasan" not in os.environ.get("LD_PRELOAD", "")


@contextmanager
def using(isa: str) -> Iterator[bool]:
    """The kernels use an instruction set; False: this machine lacks it.

    Without AMX the code for it is run all the same, its AMX instructions caught (tools/amx_trap.py).
    """
    import amx_trap

    from xquant_vllm.attention.cpu import library as cpu

    with ExitStack() as stack:
        there = cpu.set_isa(isa)
        if not there and isa == "amx" and _can_trap() and cpu.set_isa("amx-trapped"):
            stack.enter_context(amx_trap.trapped(trap()))
            there = True
        stack.callback(cpu.set_isa, None)
        yield there
