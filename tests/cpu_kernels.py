"""What tests of the C++ kernels share: whether there are any, and how near they come to the reference."""

import shutil

import torch

# The portable kernels have no fused multiply-add; the largest relative error seen is 4e-6. Of "vnni" it is 2e-4: it
# rounds weights to 16 bits, and what many tokens' values average to is small. Against a twin that rounds keys to BF16 as
# AMX does, one that lies halfway falls to the other side now and then: up to 6e-4 were seen.
TOLERANCES = dict.fromkeys(("portable", "avx2", "avx512"), 1e-5) | {"vnni": 5e-4} | dict.fromkeys(
    ("amx", "amx-emulated"), 2e-3
)
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
    actual, expected = actual.float(), expected.float()
    tolerance = TOLERANCES[cpu.isa()] if tolerance is None else tolerance
    allowed = tolerance * expected.abs().amax(-1, keepdim=True) + rounding * expected.abs()
    assert expected.isfinite().all()
    assert actual.isfinite().all()
    worst = ((actual - expected).abs() - allowed).max()
    assert worst <= 0, f"off by {worst} more than allowed"


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return x.contiguous().view(torch.uint8)
