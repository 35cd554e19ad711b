"""What this machine reaches: bandwidth of a large copy, rates of large matrix products."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.cpu.work import Roofs

_COPIED_BYTES = 2**27
_MATRIX_SIZE = 1024
_COPY, _FP32, _INT8 = "roof: copy", "roof: FP32", "roof: INT8"


def roof_calls() -> dict[str, Callable[[], object]]:
    """Calls to be timed in turns with what is measured, so that both meet the same machine."""
    generator = torch.Generator().manual_seed(0)
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)
    size = _MATRIX_SIZE
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    small, other = (torch.randint(-127, 128, (size, size), dtype=torch.int8, generator=generator) for _ in range(2))
    return {
        _COPY: lambda: target.copy_(source),
        _FP32: lambda: torch.mm(left, right, out=product),
        _INT8: lambda: torch._int_mm(small, other),
    }


def roofs_of(taken: Mapping[str, Sequence[float]]) -> Roofs:
    """The roofs of the rounds in which :func:`roof_calls` were timed; medians, as what is measured is one."""
    products = _MATRIX_SIZE**3
    return Roofs(
        2 * _COPIED_BYTES / statistics.median(taken[_COPY]),
        products / statistics.median(taken[_FP32]),
        products / statistics.median(taken[_INT8]),
    )
